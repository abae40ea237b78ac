"""Charts drawn by matplotlib, as SVG and PNG of the same bytes each time.

Readable in black and white: each curve of a panel has a marker and a line of its own, and colours
only help. Text stays text in the SVG, set out for the font that comes with matplotlib.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter

from bench.store import write_atomically
from reports.chart import Chart, Level, Series, known, short

PANEL = 8
"""Curves that a panel holds; more are spread over several panels of one figure."""

MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#882255", "#56B4E9", "#8C510A", "#332288", "#666666")
"""Told apart by the colour-blind (after Okabe and Ito), and dark enough for white paper."""

POINTS = 30
"""A curve of more points has a band instead of bars, and markers on some points only."""

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 5,
    "errorbar.capsize": 2,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 4,  # a whole period of every line style
    "savefig.dpi": 120,
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsebench",  # names of elements, else drawn by chance
}

METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}
"""What matplotlib would write of the day and of itself."""


def draw(chart: Chart) -> Figure:
    """The chart as a figure; up to `PANEL` curves share a panel."""
    parts = panels(chart.series)
    with style():
        figure = Figure(figsize=(8, 0.8 + 3.2 * len(parts)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(parts), sharex=True, sharey=True, squeeze=False)
        for axes, part in zip(grid[:, 0], parts, strict=True):
            fill(axes, chart, part)
        grid[-1, 0].set_xlabel(chart.x_label)
        figure.suptitle("\n".join(textwrap.wrap(chart.title, 90)), fontsize=10)
        below = "\n".join(line for note in chart.notes for line in textwrap.wrap(note, 130))
        figure.text(0.01, -0.01, below, fontsize=7, va="top")
    return figure


def write(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes NAME.svg and NAME.png, each at once or not at all.

    Args:
        figure: from `draw`.
        folder: is made where it is not there.
        name: without an ending.

    Returns:
        The paths.
    """
    paths = []
    for kind, metadata in METADATA.items():
        content = io.BytesIO()
        with style():
            figure.savefig(content, format=kind, metadata=metadata, bbox_inches="tight")
        paths.append(folder / f"{name}.{kind}")
        write_atomically(paths[-1], content.getvalue())
    return paths


def style() -> AbstractContextManager[None]:
    """Our settings on top of matplotlib's own, whatever the user's are; theirs come back."""
    return context(["default", STYLE])


def panels(series: Sequence[Series]) -> list[Sequence[Series]]:
    """Curves in as few parts as `PANEL` allows, of about equal size."""
    size = math.ceil(len(series) / math.ceil(len(series) / PANEL))
    return [series[start : start + size] for start in range(0, len(series), size)]


def fill(axes: Axes, chart: Chart, part: Sequence[Series]) -> None:
    """Draws one panel."""
    for number, level in enumerate(chart.levels):
        draw_level(axes, level, number)
    for number, series in enumerate(part):
        draw_series(axes, series, number)
    axes.set_ylabel("\n".join(textwrap.wrap(chart.y_label, 40)))
    if chart.floor is not None:
        axes.set_ylim(chart.floor, top(chart) + 0.05 * (top(chart) - chart.floor))
    if chart.log_x:
        logarithmic(axes, [x for series in chart.series for x in series.x])
    if chart.falling_x and not axes.xaxis_inverted():  # panels share their axis
        axes.invert_xaxis()
    if chart.x_names:
        upright = sum(map(len, chart.x_names)) > 60  # they would run into each other
        axes.set_xticks(range(len(chart.x_names)), chart.x_names, rotation=90 * upright)
        axes.tick_params(axis="x", labelsize=8 if len(chart.x_names) < 25 else 6)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def draw_level(axes: Axes, level: Level, number: int) -> None:
    """A horizontal line, black, with its band."""
    axes.axhline(
        level.y, color="black", linewidth=1, linestyle=LINES[number % 4], label=level.label
    )
    if level.low is not None and level.high is not None:
        axes.axhspan(level.low, level.high, color="black", alpha=0.1, linewidth=0)


def draw_series(axes: Axes, series: Series, number: int) -> None:
    """A curve with its bars, or with a band where it has many points."""
    colour = COLOURS[number % len(COLOURS)]
    many = len(series.x) > POINTS
    look: dict[str, Any] = {
        "color": colour,
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markerfacecolor": "white" if number % 2 else colour,
        # each curve has its markers at other places, so that one does not hide another's
        "markevery": (number, max(1, len(series.x) // 10)) if many else None,
        "label": series.label,
    }
    if many:
        axes.plot(series.x, filled(series.y), **look)
        axes.fill_between(
            series.x, filled(series.low), filled(series.high), color=colour, alpha=0.15, linewidth=0
        )
        return
    y = filled(series.y)
    below = [middle - low for middle, low in zip(y, filled(series.low), strict=True)]
    above = [high - middle for middle, high in zip(y, filled(series.high), strict=True)]
    axes.errorbar(series.x, y, yerr=(below, above), elinewidth=0.8, **look)


def filled(values: Sequence[float | None]) -> list[float]:
    """Points and ends of bars as matplotlib takes them: it draws none that is not a number."""
    return [math.nan if value is None else value for value in values]


def top(chart: Chart) -> float:
    """Upper end of all that is drawn."""
    ends = [y for one in chart.series for y in known(one)] + [level.y for level in chart.levels]
    return max(ends + [high for one in chart.series for high in one.high if high is not None])


def logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis whose ticks are plain numbers."""
    axes.set_xscale("log")
    wide = max(values) >= 5 * min(values)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else AutoLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
