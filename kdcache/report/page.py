"""One self-contained HTML page: no script, no font, no picture is fetched from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1c2026; --muted: #626a76; --grid: #dfe2e7;
  --series-1: #2a6fb0; --series-2: #d0661a; --series-3: #3a8f5c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2126; --text: #e6e8eb; --muted: #98a1ad; --grid: #343a42;
    --series-1: #6aa9e4; --series-2: #eb9350; --series-3: #6cc08e;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 4px; }
.lead { color: var(--muted); margin: 0 0 28px; max-width: 68ch; font-size: 17px; }
section {
  background: var(--card); border: 1px solid var(--grid); border-radius: 12px;
  padding: 22px 24px; margin: 0 0 18px; min-width: 0;
}
section > p {
  margin: 0 0 16px; color: var(--muted); max-width: 76ch; overflow-wrap: anywhere;
}
section > p:last-child { margin: 14px 0 0; }
.pair { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); }
.pair section { margin: 0; }
.pair section:last-child:nth-child(2n + 3) { grid-column: 1 / -1; }
.pair { margin: 0 0 18px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; text-align: right; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; font-size: 14px; color: var(--muted); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
table.words th, table.words td { text-align: left; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
tr.best td { font-weight: 650; }
code, pre { font: 14px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: 0; padding: 14px 16px; background: var(--page); border-radius: 8px;
  overflow-x: auto; }
.tokens { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.token { border: 1px solid var(--grid); border-radius: 8px; padding: 8px 10px 10px; }
.token > b { display: block; font: 600 14px/1.4 ui-monospace, Menlo, Consolas, monospace; }
.entry { display: grid; grid-template-columns: 1fr 40px; align-items: center; font-size: 12.5px;
  gap: 6px; margin-top: 4px; position: relative; padding: 1px 4px; }
.entry i { position: absolute; inset: 0 auto 0 0; border-radius: 3px; opacity: 0.28;
  background: var(--series-3); }
.entry.gold i { background: var(--series-1); opacity: 0.4; }
.entry.drawn i { background: var(--series-2); opacity: 0.32; }
.entry span { position: relative; white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  font-family: ui-monospace, Menlo, Consolas, monospace; }
.entry span + span { text-align: right; color: var(--muted); font-family: inherit; }
.key { margin: 0 0 12px; color: var(--muted); font-size: 14px; }
.key .name { white-space: nowrap; margin-right: 14px; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
details > summary { cursor: pointer; color: var(--muted); margin: 0 0 10px; }
details + details { margin-top: 12px; }
.wide + .wide, .wide + svg, svg + .wide, .wide + details { margin-top: 20px; }
footer { color: var(--muted); font-size: 14px; margin-top: 26px; }
@media (max-width: 520px) {
  main { padding: 24px 14px 40px; }
  .pair { grid-template-columns: minmax(0, 1fr); }
  section { padding: 16px; }
}
"""


@dataclass(frozen=True)
class Entry:
    """One id of a soft label: its token, its weight, and how it came into the label."""

    token: str
    weight: float
    gold: bool = False
    drawn: bool = False


def page(title: str, lead: str, sections: Sequence[str], footer: str) -> str:
    """A whole page.

    Args:
        title: heading, plain text.
        lead: the sentence under it, plain text.
        sections: HTML, from `section` and `side_by_side`.
        footer: plain text.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        + "\n".join(sections)
        + f"\n<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def section(title: str, text: str, body: str, note: str = "") -> str:
    """A card: heading, what is to be seen (plain text), the HTML itself, a note (plain text)."""
    parts = [f"<h2>{escape(title)}</h2>", f"<p>{escape(text)}</p>" if text else "", body]
    if note:
        parts.append(f"<p>{escape(note)}</p>")
    return f"<section>{''.join(parts)}</section>"


def side_by_side(*cards: str) -> str:
    """Cards in one row where there is room, below one another where there is not."""
    return f'<div class="pair">{"".join(cards)}</div>'


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    strong: int | None = None,
    words: bool = False,
) -> str:
    """A table of plain texts.

    Args:
        header: of the columns.
        rows: cells.
        strong: the row in bold.
        words: all columns to the left; else the first alone.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = []
    for n, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body.append(f'<tr class="best">{cells}</tr>' if n == strong else f"<tr>{cells}</tr>")
    return (
        f'<div class="wide"><table{" class=words" if words else ""}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def preformatted(text: str) -> str:
    """Text as it is, such as commands."""
    return f"<pre>{escape(text)}</pre>"


def soft_labels(positions: Sequence[tuple[str, Sequence[Entry]]]) -> str:
    """Every target token with the entries of its soft label as bars, heaviest first."""
    cells = []
    for token, entries in positions:
        bars = []
        for entry in sorted(entries, key=lambda entry: -entry.weight):
            kind = "gold" if entry.gold else "drawn" if entry.drawn else ""
            percent = 100 * min(entry.weight, 1.0)
            bars.append(
                f'<div class="entry {kind}"><i style="width:{percent:.1f}%"></i>'
                f"<span>{escape(entry.token)}</span><span>{percent:.0f}%</span></div>"
            )
        cells.append(f'<div class="token"><b>{escape(token)}</b>{"".join(bars)}</div>')
    keys = "".join(
        f'<span class="name"><i style="background:var(--series-{series})"></i>{name}</span> '
        for series, name in ((1, "the reference"), (3, "kept exactly"), (2, "drawn from the tail"))
    )
    return f'<div class="key">{keys}</div><div class="tokens">{"".join(cells)}</div>'
