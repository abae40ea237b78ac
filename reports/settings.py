"""Rows that may share a figure: one model, data set, recipe, budget, preset and initial weights."""

from __future__ import annotations

from collections.abc import Sequence

from reports.aggregate import Row, full_model, name_text
from reports.by_sparsity import line_name
from reports.footnotes import CONDITIONS, varies


def settings(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each setting, by a text such as `lenet_300_100 on mnist`."""
    told = [name for name, text in CONDITIONS.items() if varies(rows, text)]
    if len({row.spec.dataset for row in rows}) > 1 and "data set" in told:
        told.remove("data set")  # its name, which is told anyway, is shorter than its hash
    found: dict[str, list[Row]] = {}
    for row in rows:
        texts = [CONDITIONS[name](row.spec) for name in told]
        about = ", ".join([f"{full_model(row, rows)} on {row.spec.dataset}", *texts])
        found.setdefault(about, []).append(row)
    return found


def is_dense(row: Row) -> bool:
    """Whether the row is a baseline: the whole network, nothing of it pruned."""
    return row.spec.method == "dense" and not row.smaller


def lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each method by its name in a legend; baselines are in none."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if not is_dense(row):
            found.setdefault(line_name(row), []).append(row)
    return found


def left_out(rows: Sequence[Row]) -> list[str]:
    """One note for each status that keeps seeds out of a figure.

    Every row is named, unless all are alike.
    """
    notes = []
    for status, said in (("diverged", "diverged"), ("invalid", "invalid"), ("missing", "not run")):
        counts = [(row, row.statuses.count(status)) for row in rows]
        named = [f"{name_text(row)} ({n} of {row.asked} seeds)" for row, n in counts if n]
        alike = {(n, row.asked) for row, n in counts}
        if named and len(rows) > 1 and len(alike) == 1:
            n, asked = alike.pop()
            notes.append(f"{said}, so not drawn: {n} of {asked} seeds of every row.")
        elif named:
            notes.append(f"{said}, so not drawn: {'; '.join(named)}.")
    return notes
