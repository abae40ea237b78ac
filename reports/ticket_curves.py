"""Lottery tickets round by round (Frankle & Carbin, 2019, figures 3 to 5), with their controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from bench.record import PhaseResult, Record
from reports.aggregate import Results, Row
from reports.chart import (
    ACCURACY,
    Chart,
    Series,
    below,
    curve,
    extremes,
    file_name,
    floor,
    seeds_text,
)
from reports.settings import lines, settings

LEFT = "Weights left, P_m (% of the prunable weights)"

Value = Callable[[PhaseResult], float | None]


def tickets_accuracy(results: Results) -> tuple[Chart, ...]:
    """Accuracy at early stopping and at the end against P_m. Brief records suffice."""
    values: dict[str, Value] = {
        ", at the end": lambda phase: phase.top1,
        ", at early stopping": lambda phase: phase.least.top1 if phase.least else None,
    }
    return against_left(results, "accuracy", ACCURACY, values)


def tickets_early_stopping(results: Results) -> tuple[Chart, ...]:
    """Iteration of least validation loss against P_m. Brief records suffice."""
    values: dict[str, Value] = {"": lambda phase: phase.least.step if phase.least else None}
    label = "Iteration of least validation loss"
    return against_left(results, "early stopping", label, values)


def against_left(
    results: Results, what: str, y_label: str, values: dict[str, Value]
) -> tuple[Chart, ...]:
    """A chart of each setting that has rounds.

    Args:
        results: of a suite.
        what: is shown.
        y_label: with its unit.
        values: of one round; by what follows the row's label in the legend.
    """
    charts = []
    for about, rows in settings(results.rows).items():
        # A ticket's rows share one cell: its rounds are taken once.
        cells = {label: list(tested(found)) for label, found in lines(rows).items()}
        curves = [
            points(label + suffix, records, value)
            for label, records in cells.items()
            for suffix, value in values.items()
        ]
        series = tuple(one for one in curves if one.x)
        if not series:
            continue
        sizes = [len({record.spec.seed for record in records}) for records in cells.values()]
        begin = floor(series) if y_label == ACCURACY else None
        charts.append(
            Chart(
                f"Tickets' {what}: {about}",
                LEFT,
                y_label,
                series,
                log_x=True,
                falling_x=True,
                notes=(
                    seeds_text(sizes, "least to greatest"),
                    *wrong(cells),
                    *below(series, begin),
                ),
                name=file_name("tickets", what.replace(" ", "-"), about),
                floor=begin,
            )
        )
    return tuple(charts)


def tested(rows: Sequence[Row]) -> Iterator[Record]:
    """The record of each cell that answers a row, once, if its trainings were tested each."""
    found = {
        key: record
        for row in rows
        for key, record in zip(row.keys, row.records, strict=True)
        if record is not None and any(phase.counts is not None for phase in record.phases)
    }
    yield from found.values()


def points(label: str, records: Sequence[Record], value: Value) -> Series:
    """One curve: a round's value over the seeds, at the weights that it had left."""
    found: dict[float, list[float]] = {}
    for record in records:
        for phase in record.phases:
            y = value(phase) if phase.status == "ok" else None
            if phase.counts is not None and y is not None and math.isfinite(y):
                left = 100 * phase.counts.prunable_nonzero / phase.counts.prunable
                found.setdefault(left, []).append(y)
    return curve(label, found.items(), extremes)


def wrong(cells: dict[str, list[Record]]) -> Iterator[str]:
    """A note on rounds whose accuracy does not count."""
    named = [
        f"{label}, {phase.name}, seed {record.spec.seed}: {phase.status}"
        for label, records in cells.items()
        for record in records
        for phase in record.phases
        if phase.status not in (None, "ok")
    ]
    if named:
        yield f"not drawn: {'; '.join(named)}."
