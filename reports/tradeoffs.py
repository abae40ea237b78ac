"""Accuracy against what it costs: a curve for each method, a chart for each setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reports.aggregate import Results, Row, accuracies, name_text
from reports.chart import (
    ACCURACY,
    Chart,
    Level,
    below,
    curve,
    deviation,
    file_name,
    floor,
    seeds_text,
)
from reports.settings import is_dense, left_out, lines, settings


def accuracy_by_sparsity(results: Results) -> tuple[Chart, ...]:
    """Accuracy against the sparsity that was reached. Brief records suffice."""
    return tradeoff(
        results,
        "sparsity",
        "Sparsity reached (% of the prunable weights)",
        lambda row: None if row.reached_sparsity is None else 100 * row.reached_sparsity,
        log_x=False,
    )


def accuracy_by_parameters(results: Results) -> tuple[Chart, ...]:
    """Accuracy against parameters left (Lin et al., 2020, figure 3). Brief records suffice."""
    label = "Parameters left (of all layers, biases and normalisation too)"
    return tradeoff(results, "parameters", label, lambda row: row.nonzero)


def accuracy_by_macs(results: Results) -> tuple[Chart, ...]:
    """Accuracy against MACs left (Lin et al., 2020, figures 3 and 6). Brief records suffice."""
    label = "Multiply-adds left for one image"
    return tradeoff(results, "MACs", label, lambda row: row.macs)


def accuracy_by_training_macs(results: Results) -> tuple[Chart, ...]:
    """Accuracy against the theoretical cost of training. Brief records suffice."""
    label = "Multiply-adds of the training, if every zero were skipped"
    return tradeoff(results, "training MACs", label, lambda row: row.train_macs)


def tradeoff(
    results: Results,
    what: str,
    x_label: str,
    x: Callable[[Row], float | None],
    *,
    log_x: bool = True,
) -> tuple[Chart, ...]:
    """A chart of each setting in which a pruned network has an accuracy and this cost.

    Args:
        results: of a suite.
        what: word for the cost.
        x_label: what it is exactly.
        x: the cost of a row; None where no record holds it.
        log_x: equal ratios of the cost lie equally far apart.
    """
    charts = []
    for about, rows in settings(results.rows).items():
        measured = [row for row in rows if row.ok]
        shown = [row for row in measured if x(row) is not None]
        gaps = lines([row for row in rows if not row.ok])
        series = [
            curve(
                label,
                [(x(row) or 0.0, accuracies(row)) for row in found],
                gaps=[at for row in gaps.get(label, ()) if (at := x(row)) is not None],
            )
            for label, found in lines(shown).items()
        ]
        if not series:
            continue
        levels = tuple(map(level, filter(is_dense, measured)))
        begin = floor(series, levels)
        unknown = [name_text(row) for row in measured if row not in shown and not is_dense(row)]
        notes = [
            seeds_text(len(row.ok) for row in measured),
            *([f"no {what} in the records of: {'; '.join(unknown)}."] if unknown else []),
            *left_out(rows),
            *below(series, begin),
        ]
        charts.append(
            Chart(
                f"Accuracy against {what}: {about}",
                x_label,
                ACCURACY,
                tuple(series),
                log_x,
                levels=levels,
                notes=tuple(notes),
                name=file_name("accuracy-by", what.lower(), about),
                floor=begin,
            )
        )
    return tuple(charts)


def level(row: Row) -> Level:
    """The accuracy of a baseline."""
    values: Sequence[float] = accuracies(row)
    low, high = deviation(values) or (None, None)
    return Level(row.label, row.top1 or 0.0, low, high)
