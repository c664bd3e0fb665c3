"""Pages in a real browser without a screen: what they show, and what its console says."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: Looks into every frame once all are loaded, and writes what it found into the page.
_SCRIPT = """
addEventListener("load", () => {
  const pages = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument;
    const ids = [...page.querySelectorAll("[id]")].map((node) => node.id);
    const colour = (node, property) => frame.contentWindow.getComputedStyle(node)[property];
    return {
      pictures: [...page.querySelectorAll("svg")].map((svg) => ({
        alt: svg.getAttribute("aria-label"),
        width: svg.getBoundingClientRect().width,
        height: svg.getBoundingClientRect().height,
        drawn: [...svg.querySelectorAll("path, use, rect")].filter((node) => {
          const box = node.getBoundingClientRect();
          return box.width + box.height > 0;
        }).length,
        texts: [...svg.querySelectorAll("text")].map((node) => node.textContent.trim()),
        fonts: [...new Set([...svg.querySelectorAll("text")].map((n) => colour(n, "fontFamily")))],
      })),
      overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      twice: ids.filter((id, n) => ids.indexOf(id) !== n),
      fetched: frame.contentWindow.performance.getEntriesByType("resource").length,
      background: colour(page.body, "backgroundColor"),
      text: page.body.innerText,
    };
  });
  document.getElementById("found").textContent = JSON.stringify(pages);
});
"""


def find_browser() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def look(browser: str, pages: list[Path], folder: Path, dark: bool = False) -> Any:
    """What the script finds of each page, and the lines of the console."""
    frames = "".join(
        f'<iframe style="width:1000px;height:900px" srcdoc="{html.escape(page.read_text())}">'
        "</iframe>"
        for page in pages
    )
    whole = folder / "pages.html"
    whole.write_text(
        f"<!doctype html><meta charset=utf-8><body>{frames}<pre id=found></pre>"
        f"<script>{_SCRIPT}</script></body>"
    )
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=10000", *(["--force-dark-mode"] if dark else [])]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [*command, whole.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    [found] = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found)), said
