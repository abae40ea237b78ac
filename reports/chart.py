"""What a figure shows, as plain data: whoever draws it adds colours and nothing else."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from reports.statistics import mean_sd

Ends = tuple[float, float] | None
"""Both ends of a bar; None where there is none."""


@dataclass(frozen=True, slots=True)
class Series:
    """One curve.

    Attributes:
        label: its name in the legend.
        x: of each point, ascending.
        y: mean over seeds; None where no seed has one, so that the curve is interrupted.
        low: lower end of each point's bar; None where there is none, as for one seed.
        high: upper end.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line, such as the dense network's accuracy, with its band."""

    label: str
    y: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure.

    Attributes:
        title: what is shown, and of which model and data set.
        x_label: with the unit; y_label likewise.
        series: at least one.
        log_x: the x axis is logarithmic.
        falling_x: the x axis falls from left to right, as for the share of weights that is left.
        levels: horizontal lines.
        x_names: names of x = 0, 1, 2, ..., where x is no quantity.
        notes: a sentence each: what the bars are, how many seeds, what is left out and why.
        name: for files, unique among the charts of a suite.
        floor: where the y axis begins; None: where its points do. Notes name what lies below.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    falling_x: bool = False
    levels: tuple[Level, ...] = ()
    x_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    name: str = ""
    floor: float | None = None


ACCURACY = "Test accuracy (%)"

FENCE, SHOWN = 3.0, 10.0
"""Accuracies below Tukey's outer fence may lie below the axis, but not the first ten points."""


def floor(series: Sequence[Series], levels: Sequence[Level] = ()) -> float | None:
    """Where an axis of accuracies in per cent begins, so that one bad cell does not flatten all.

    Half of each curve is shown, and every level; None where all points are.
    """
    values = [y for one in series for y in known(one)]
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    shown = [statistics.median(known(one)) for one in series] + [level.y for level in levels]
    begin = math.floor(min(low - FENCE * (high - low), high - SHOWN, min(shown) - 1))
    return begin if begin > min(values) else None


def below(series: Sequence[Series], begin: float | None) -> list[str]:
    """A note on the points that lie below the axis."""
    hidden = [
        f"{one.label} ({y:.2f} at {short(x)})"
        for one in series
        for x, y in zip(one.x, one.y, strict=True)
        if begin is not None and y is not None and y < begin
    ]
    return [f"below the axis: {'; '.join(hidden)}."] if hidden else []


def known(series: Series) -> list[float]:
    """Heights of the points that have one."""
    return [y for y in series.y if y is not None]


def short(value: float) -> str:
    """A number with the letter of its thousands, such as `20 k`."""
    if value < 1000:
        return f"{value:.4g}"
    power = min(math.floor(math.log10(value) / 3 + 1e-9), 6)
    return f"{value / 1000**power:.4g} {' kMGTPE'[power]}"


def deviation(values: Sequence[float]) -> Ends:
    """Mean plus and minus one standard deviation."""
    center, spread = mean_sd(values)
    return None if spread is None else (center - spread, center + spread)


def extremes(values: Sequence[float]) -> Ends:
    """Least and greatest (Frankle & Carbin, 2019, figures 3 to 5)."""
    return (min(values), max(values)) if len(values) > 1 else None


def curve(
    label: str,
    points: Iterable[tuple[float, Sequence[float]]],
    bar: Callable[[Sequence[float]], Ends] = deviation,
    gaps: Sequence[float] = (),
) -> Series:
    """A series of the means of points.

    Args:
        label: its name.
        points: x with the value of each seed; a point without seeds is left out.
        bar: of the values of one point.
        gaps: x of cells without a value; between two points, one interrupts the curve.
    """
    found = sorted((x, tuple(values)) for x, values in points if values)
    found += [(x, ()) for x in gaps if found and found[0][0] < x < found[-1][0]]
    found.sort()
    bars = [bar(values) or (None, None) if values else (None, None) for _, values in found]
    return Series(
        label,
        tuple(x for x, _ in found),
        tuple(statistics.fmean(values) if values else None for _, values in found),
        tuple(low for low, _ in bars),
        tuple(high for _, high in bars),
    )


def seeds_text(counts: Iterable[int], bar: str = "standard deviation") -> str:
    """The note on the number of seeds and on the bars."""
    found = sorted(set(counts) - {0})
    if found == [1]:
        return "n = 1 seed, without bars."
    n = f"{found[0]} to {found[-1]}" if len(found) > 1 else f"{found[0]}"
    none = "; none for one seed" if found[0] == 1 else ""
    return f"n = {n} seeds; bars and bands: {bar} over seeds{none}."


def file_name(*parts: str) -> str:
    """Parts as the name of a file, such as `mask-overlap-dpf-lenet_300_100-mnist`."""
    return re.sub(r"[^\w.=]+", "-", "-".join(parts)).strip("-.")
