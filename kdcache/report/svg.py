"""Small charts as inline SVG text: bars and lines, no dependency, light and dark alike.

Colours are CSS variables with a fallback, so a page decides them and a chart that stands
alone still shows. Text is drawn in the colour of the text around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

#: CSS variables of the series colours, each with the colour it has outside a page.
SERIES = ("var(--series-1, #2a6fb0)", "var(--series-2, #d2691e)", "var(--series-3, #3a8f5c)")
MUTED = "var(--muted, #6b7280)"
GRID = "var(--grid, #d9dce1)"
TEXT = "var(--text, currentColor)"


@dataclass(frozen=True)
class Line:
    """One line of a chart: a name and its points (x ascending)."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str = SERIES[0]


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its value (not negative), and how the value is written at its end."""

    name: str
    value: float
    label: str
    color: str = SERIES[0]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span [low, high].

    Args:
        low: smallest value to be shown.
        high: largest value to be shown.
        count: about how many steps are wanted.

    Returns:
        Ascending ticks, the first at or below low, the last at or above high.
    """
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks for a logarithmic axis: 1, 2 and 5 times powers of ten that span [low, high].

    Args:
        low: smallest value to be shown, above 0.
        high: largest value to be shown.

    Returns:
        Ascending ticks, at least two, the first at or below low, the last at or above high.
    """
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
    steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max(n for n, step in enumerate(steps) if step <= low * (1 + 1e-9))
    last = min(n for n, step in enumerate(steps) if step >= high * (1 - 1e-9))
    return steps[first : max(last, first + 1) + 1]


def bar_chart(bars: Sequence[Bar], title: str, width: int = 560, top: float | None = None) -> str:
    """Horizontal bars, names to the left and values at their ends.

    Args:
        bars: from top to bottom.
        title: what a screen reader says the picture is.
        width: of the drawing's own coordinates; it scales to the space it gets.
        top: value of a bar of full length; the largest value without it.

    Returns:
        An `<svg>` element.
    """
    row, thick = 34, 20
    left = 14 + max((_text_width(bar.name) for bar in bars), default=0)
    right = 14 + max((_text_width(bar.label) for bar in bars), default=0)
    scale = (width - left - right) / (top or max((bar.value for bar in bars), default=0) or 1.0)
    parts = [_line(left, 0, left, row * len(bars), GRID)]
    for n, bar in enumerate(bars):
        y = row * n + (row - thick) / 2
        length = max(bar.value * scale, 1.5 if bar.value > 0 else 0.0)
        middle = y + thick / 2
        parts += [
            _text(left - 10, middle, bar.name, anchor="end"),
            f'<rect x="{left}" y="{y:g}" width="{length:.1f}" height="{thick}" rx="3" '
            f'style="fill:{bar.color}"/>',
            _text(left + length + 8, middle, bar.label, weight=600),
        ]
    return _svg(width, row * len(bars), title, parts)


def line_chart(
    lines: Sequence[Line],
    title: str,
    x_name: str,
    y_name: str,
    width: int = 640,
    height: int = 320,
    log_y: bool = False,
) -> str:
    """Lines over a common grid, each named at its end.

    Args:
        lines: at least one point in all.
        title: what a screen reader says the picture is.
        x_name: what x is, with its unit.
        y_name: what y is, with its unit.
        width: of the drawing's own coordinates; it scales to the space it gets.
        height: likewise.
        log_y: whether equal ratios of y are equally far apart; y is then above 0.

    Returns:
        An `<svg>` element.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return _svg(width, 40, title, [_text(width / 2, 20, "no points", anchor="middle")])
    xs = nice_ticks(0.0, max(x for x, _ in points))
    ticks, scaled = (log_ticks, math.log10) if log_y else (nice_ticks, float)
    ys = ticks(min(y for _, y in points), max(y for _, y in points))
    left, top, bottom = 52.0, 30.0, height - 46.0
    right = width - 24.0 - max(_text_width(line.name) for line in lines)
    x_scale = (right - left) / max(x for x, _ in points)
    y_scale = (bottom - top) / (scaled(ys[-1]) - scaled(ys[0]))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x * x_scale, bottom - (scaled(y) - scaled(ys[0])) * y_scale

    parts = [_text(left - 40, 10, y_name, color=MUTED)]
    for y in ys:
        at = place(0, y)[1]
        parts += [_line(left, at, right, at, GRID), _text(left - 8, at, _number(y), "end", MUTED)]
    for x in xs:
        at = place(x, ys[0])[0]
        if at <= right + 1:
            parts.append(_text(at, bottom + 16, _number(x), "middle", MUTED))
    parts.append(_text((left + right) / 2, height - 8, x_name, "middle", MUTED))
    for line in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke-width="2.5" stroke-linejoin="round" '
            f'stroke-linecap="round" style="stroke:{line.color}"/>'
        )
    ends = [(line, *place(*line.points[-1])) for line in lines if line.points]
    for (line, x, y), at in zip(ends, _apart([y for _, _, y in ends], 18.0), strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:{line.color}"/>')
        parts.append(_text(x + 10, at, line.name, color=line.color, weight=600))
    return _svg(width, height, title, parts)


def _apart(places: Sequence[float], distance: float) -> list[float]:
    """Move labels until neighbours are this far apart, about their common middle."""
    moved = [0.0] * len(places)
    last = -math.inf
    for n in sorted(range(len(places)), key=lambda n: places[n]):
        last = moved[n] = max(places[n], last + distance)
    back = (sum(moved) - sum(places)) / max(1, len(places))
    return [place - back for place in moved]


def _number(value: float) -> str:
    """A tick without a tail of zeros, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _text_width(text: str) -> int:
    """About how wide a text is at 13 pixels: no font is at hand to measure it."""
    return math.ceil(7.3 * len(text))


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="stroke:{color}"/>'


def _text(
    x: float, y: float, text: str, anchor: str = "start", color: str = TEXT, weight: int = 400
) -> str:
    """Text whose middle lies at y."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="central" '
        f'font-size="13" font-weight="{weight}" style="fill:{color}">{escape(text)}</text>'
    )


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(title, quote=True)}" font-family="system-ui, sans-serif" '
        f'style="max-width:{width:g}px;width:100%;height:auto">{"".join(parts)}</svg>'
    )
