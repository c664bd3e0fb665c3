"""Pictures of a report, drawn by matplotlib: SVG in the page's own colours, PNG beside Markdown.

What is drawn in one of the light colours of `page.STYLE` becomes its CSS variable in the SVG, so a
picture follows the page into the dark. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from kdcache.errors import KDCacheError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours of the light page, and the CSS variable of each.
TEXT, MUTED, GRID, CARD = "#1c2026", "#626a76", "#dfe2e7", "#ffffff"
SERIES = ("#2a6fb0", "#d0661a", "#3a8f5c")
_VARIABLES = {
    TEXT: "--text",
    MUTED: "--muted",
    GRID: "--grid",
    CARD: "--card",
    **{color: f"--series-{n}" for n, color in enumerate(SERIES, 1)},
}
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "kdcache",  # the same picture is the same bytes
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: of its file.
        alt: what it shows, for those who do not see it.
        svg: an `<svg>` element.
        png: the same on white.
    """

    name: str
    alt: str
    svg: str
    png: bytes


def require_matplotlib() -> None:
    """Refuse a report that could not be drawn, before anything is measured.

    Raises:
        KDCacheError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise KDCacheError(
            'a report is drawn by matplotlib, which is not installed; pip install "kdcache[report]"'
        ) from None


def draw(
    name: str,
    alt: str,
    paint: Callable[[Axes], None],
    width: float = 5.2,
    height: float = 3.1,
) -> Picture:
    """Draw one picture.

    Args:
        name: of its file, and of its elements.
        alt: what it shows, in a sentence.
        paint: draws into axes.
        width: inches.
        height: inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.tick_params(length=0)
        paint(axes)
        text, image = io.StringIO(), io.BytesIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(image, format="png", dpi=160, facecolor="white")
    return Picture(name, alt, _for_page(text.getvalue(), name, alt), image.getvalue())


def _for_page(svg: str, name: str, alt: str) -> str:
    """A file of matplotlib as an element of a page: its colours, its font, names of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # Several pictures stand on one page, and an id on a page is one element's.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable}, {color})")
    svg = re.sub(r"font: ([^;\"]*?)'?DejaVu Sans'?[^;\"]*", r"font: \1system-ui, sans-serif", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    opening = re.match(r"<svg[^>]*>", svg)
    assert opening is not None
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening[0])
    assert box is not None
    points = float(box[1]) * 4 / 3  # of 72 to the inch, in pixels
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {box[1]} {box[2]}" role="img" aria-label="{escape(alt, quote=True)}" '
        f'style="max-width:{points:.0f}px;width:100%;height:auto;display:block">'
    )
    return head + svg[opening.end() :].strip()
