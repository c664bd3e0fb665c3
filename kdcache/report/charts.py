"""The kinds of pictures that reports have: curves, histograms, heat maps, dots, reliability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.report.pictures import MUTED, SERIES, TEXT, Picture, draw
from kdcache.report.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Curve:
    """A line: its name, its points, its colour; a faint one stays behind the others."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str = SERIES[0]
    faint: bool = False
    dashed: bool = False


def curves(
    name: str,
    alt: str,
    lines: Sequence[Curve],
    x: str,
    y: str,
    log_y: bool = False,
    from_zero: bool = False,
    **size: float,
) -> Picture:
    """Lines over a common x.

    Args:
        name: of the picture.
        alt: what it shows.
        lines: each with a point at least.
        x: what x is.
        y: what y is.
        log_y: whether equal ratios are equally far apart.
        from_zero: whether y begins at 0.
        **size: see `draw`.
    """

    def paint(axes: Axes) -> None:
        for line in lines:
            xs, ys = zip(*line.points, strict=True)
            axes.plot(
                xs,
                ys,
                color=line.color,
                alpha=0.3 if line.faint else 1,
                linewidth=1.1 if line.faint else 2,
                linestyle="--" if line.dashed else "-",
                marker="o" if len(xs) < 4 else None,
                markersize=4,
                label=line.name or "_",
                zorder=1 if line.faint else 2,
            )
        if log_y:
            _log_axis(axes)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if any(line.name for line in lines):
            axes.legend()

    return draw(name, alt, paint, **size)


def _log_axis(axes: Axes) -> None:
    """A logarithmic y whose ticks are plain numbers, some even where a decade is far."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    low, high = axes.get_ylim()
    axes.set_yscale("log")
    wide = low > 0 and high / low > 8
    ticks = LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5)
    axes.yaxis.set_major_locator(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.tick_params(which="minor", length=0)


def histogram(name: str, alt: str, values: Any, x: str, top: float | None = None) -> Picture:
    """How some values are distributed, as shares, with their mean marked.

    Args:
        name: of the picture.
        alt: what it shows.
        values: [N] numbers, 0 or more.
        x: what they are.
        top: where the last bin ends; the largest value without it.
    """
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    end = top or float(values.max(initial=0)) or 1.0
    counts, edges = np.histogram(np.clip(values, 0, end), bins=30, range=(0, end))
    mean = float(values.mean())

    def paint(axes: Axes) -> None:
        width = float(edges[1] - edges[0])
        heights = 100 * counts / max(1, len(values))
        axes.bar(edges[:-1], heights, width=0.9 * width, align="edge", color=SERIES[0])
        axes.axvline(mean, color=SERIES[1], linewidth=1.5)
        right = mean > 0.6 * end
        axes.annotate(
            f"mean {mean:.3g}",
            (mean, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if right else 5, -4),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            color=SERIES[1],
        )
        axes.set_ylim(top=1.15 * float(heights.max()))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(x)
        axes.set_ylabel("% of labels")

    return draw(name, alt, paint)


def heat_map(
    name: str,
    alt: str,
    cells: Mapping[tuple[str, str], float],
    axes_names: tuple[str, str],
    lower: bool,
) -> Picture:
    """Values over two settings, the darkest the best.

    Args:
        name: of the picture.
        alt: what it shows.
        cells: (row, column) to value; some may be missing.
        axes_names: what rows and what columns are.
        lower: whether a lower value is better.
    """
    from matplotlib.patches import Rectangle

    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    values = list(cells.values())
    best, worst = (min(values), max(values)) if lower else (max(values), min(values))

    def paint(axes: Axes) -> None:
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for (row, column), value in cells.items():
            good = 1 - abs(value - best) / abs(worst - best) if worst != best else 1.0
            at = (columns.index(column), rows.index(row))
            corner, size = (at[0] + 0.02, at[1] + 0.02), (0.96, 0.96)
            # One hue, more or less of it, on whatever the page's ground is.
            color = Rectangle(corner, *size, color=SERIES[0], alpha=0.08 + 0.5 * good, linewidth=0)
            axes.add_patch(color)
            if value == best:
                axes.add_patch(
                    Rectangle(corner, *size, fill=False, edgecolor=SERIES[1], linewidth=2)
                )
            text = number(value)
            axes.text(at[0] + 0.5, at[1] + 0.5, text, ha="center", va="center", color=TEXT)
        axes.set_xticks([n + 0.5 for n in range(len(columns))], columns)
        axes.set_yticks([n + 0.5 for n in range(len(rows))], rows)
        axes.set_ylabel(axes_names[0])
        axes.set_xlabel(axes_names[1])

    return draw(name, alt, paint, height=1.1 + 0.55 * len(rows))


@dataclass(frozen=True)
class Dots:
    """A row of a comparison: its name, and the value of each run."""

    name: str
    values: Sequence[float]
    strong: bool = False


def dots(name: str, alt: str, rows: Sequence[Dots], x: str) -> Picture:
    """Every run as a dot and every row's mean and spread, one below the other.

    Args:
        name: of the picture.
        alt: what it shows.
        rows: from top to bottom.
        x: what the values are.
    """
    import statistics

    def paint(axes: Axes) -> None:
        for at, row in enumerate(rows):
            color = SERIES[1] if row.strong else SERIES[0]
            mean = statistics.fmean(row.values)
            if len(row.values) > 1:
                spread = statistics.stdev(row.values)
                axes.plot([mean - spread, mean + spread], [at, at], color=color, linewidth=1.6)
                axes.plot(row.values, [at] * len(row.values), "o", color=color, alpha=0.35, ms=5)
            axes.plot([mean], [at], "D" if len(row.values) > 1 else "o", color=color, ms=6)
        axes.locator_params(axis="x", nbins=5)  # labels of many digits would meet
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x)
        axes.tick_params(axis="y", labelcolor=TEXT)

    return draw(name, alt, paint, height=0.9 + 0.32 * len(rows))


def scatter(
    name: str,
    alt: str,
    points: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    log_x: bool = False,
) -> Picture:
    """Named groups of points, each of one x; a line goes through their means.

    Args:
        name: of the picture.
        alt: what it shows.
        points: name to points.
        x: what x is.
        y: what y is.
        log_x: whether equal ratios of x are equally far apart.
    """
    from matplotlib.ticker import NullFormatter

    def paint(axes: Axes) -> None:
        for group in points.values():
            xs, ys = zip(*group, strict=True)
            axes.plot(xs, ys, "o", color=SERIES[0], alpha=0.55, ms=6, markeredgewidth=0)
        means = sorted(
            (group[0][0], sum(value for _, value in group) / len(group))
            for group in points.values()
        )
        axes.plot(*zip(*means, strict=True), color=SERIES[0], linewidth=1, alpha=0.6)
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(which="minor", length=0)
        axes.set_xticks([at for at, _ in means], [_tick(at) for at, _ in means])
        for label, group in points.items():
            if label == _tick(group[0][0]):
                continue  # the axis says so
            middle = group[0][0], sum(value for _, value in group) / len(group)
            right = group[0][0] == means[-1][0]
            axes.annotate(
                label,
                middle,
                xytext=(-8 if right else 8, 5),
                textcoords="offset points",
                ha="right" if right else "left",
                fontsize=9,
            )
        axes.margins(x=0.12, y=0.12)
        axes.set_xlabel(x)
        axes.set_ylabel(y)

    return draw(name, alt, paint)


def _tick(value: float) -> str:
    """A size on an axis."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Reliability:
    """How often a model was right where it was so sure.

    Attributes:
        name: of the model.
        bins: (mean confidence, share right, number) of every bin that has any.
        color: of its line.
    """

    name: str
    bins: Sequence[tuple[float, float, int]]
    color: str

    @property
    def error(self) -> float:
        """Expected calibration error: the mean gap of confidence and share, by number."""
        total = sum(count for *_, count in self.bins)
        gaps = sum(count * abs(sure - right) for sure, right, count in self.bins)
        return gaps / total if total else 0.0


def reliability(name: str, alt: str, models: Sequence[Reliability]) -> Picture:
    """A reliability diagram: below the diagonal a model is surer than it is right.

    Args:
        name: of the picture.
        alt: what it shows.
        models: one line each.
    """

    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
        for model in models:
            most = max(count for *_, count in model.bins)
            sure, right, counts = zip(*model.bins, strict=True)
            axes.plot(sure, right, color=model.color, label=f"{model.name} ({model.error:.3f})")
            sizes = [12 + 60 * count / most for count in counts]
            axes.scatter(sure, right, s=sizes, color=model.color, linewidths=0, zorder=3)
        axes.set_xlim(0, 1.03)
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("probability of the likeliest token")
        axes.set_ylabel("share that was the target")
        axes.legend(loc="lower right")

    return draw(name, alt, paint, width=4.6, height=3.6)
