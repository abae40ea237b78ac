"""The table of a suite as the page embeds it: the texts of the markdown table, and what sorts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.aggregate import Row, asked_text, model_text
from reports.suite_table import columns

METHOD = "method"

VALUES: dict[str, Callable[[Row], float | None]] = {
    "sparsity asked %": lambda row: asked_number(row),
    "n": lambda row: len(row.finished),
    "top-1 %": lambda row: row.top1,
    "reached sparsity %": lambda row: row.reached_sparsity,
    "effective sparsity %": lambda row: row.effective_sparsity,
    "parameters left": lambda row: row.nonzero,
    "MACs left": lambda row: row.macs,
    "parameters once cut": lambda row: row.compact_parameters,
    "MACs once cut": lambda row: row.compact_macs,
    "training MACs": lambda row: row.train_macs,
    "train seconds": lambda row: row.train_seconds,
    "budget multiple": lambda row: row.multiple,
}
"""What a column of figures sorts by; the others hold words."""


@dataclass(frozen=True, slots=True)
class Table:
    """Columns, and a line a row.

    Attributes:
        columns: header of each, and whether it holds figures.
        rows: see `line`.
    """

    columns: tuple[tuple[str, bool], ...]
    rows: tuple[dict[str, Any], ...]


def table(rows: Sequence[Row], places: Mapping[str, int]) -> Table:
    """The rows of a suite.

    Args:
        rows: as aggregated.
        places: number of each packed cell, by its key.
    """
    texts = columns(rows)
    shown = {METHOD: texts[METHOD]} | texts  # what opens a row stands first
    headers = tuple((name, name in VALUES) for name in shown)
    return Table(headers, tuple(line(row, shown, places) for row in rows))


def line(
    row: Row, shown: Mapping[str, Callable[[Row], str]], places: Mapping[str, int]
) -> dict[str, Any]:
    """A row: its texts, what they sort by, what filters find, and the numbers of its cells."""
    return {
        "texts": [text(row) for text in shown.values()],
        "values": [finite(VALUES[name](row)) for name in shown if name in VALUES],
        "method": row.label,
        "model": model_text(row.spec),
        "sparsity": asked_text(row.spec),
        "cells": [places[key] for key in dict.fromkeys(row.keys) if key in places],
    }


def asked_number(row: Row) -> float | None:
    """The sparsity in percent that the row asks for, if it asks for one."""
    words = asked_text(row.spec).split()
    return None if words == ["penalty"] else float(words[0])


def finite(value: float | None) -> float | None:
    """A number that JSON can hold."""
    return value if value is not None and math.isfinite(value) else None
