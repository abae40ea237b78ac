"""What a suite measured when it was last found good: value objects in JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.errors import RecordError, SuiteError
from bench.spec import CellSpec
from bench.store import Store
from reports.aggregate import CellStatus, Row, aggregate

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class BaselineCell:
    """One seed of a row; the counts are those of its finished network."""

    seed: int
    key: str
    status: CellStatus
    nonzero: int | None = None
    macs: int | None = None


@dataclass(frozen=True, slots=True)
class BaselineRow:
    """One row: its question with the first seed, and accuracy over the `n` seeds that were `ok`."""

    label: str
    spec: CellSpec
    n: int
    top1: float | None
    deviation: float | None
    cells: tuple[BaselineCell, ...]

    def __post_init__(self) -> None:
        if (self.n > 0) != (self.top1 is not None) or (self.n > 1) != (self.deviation is not None):
            raise ValueError("n, top1 and deviation do not fit together")


@dataclass(frozen=True, slots=True)
class Baseline:
    """All rows of a suite that had a record."""

    schema: int
    suite: str
    rows: tuple[BaselineRow, ...]


def write_baseline(root: Path, suite: str) -> bytes:
    """The suite's records as a baseline. Rows that were not run are left out.

    Raises:
        RecordError: no cell of the suite has finished, or a record is damaged; names the file.
    """
    store = Store(root, suite)
    rows = aggregate(store.manifest(), store.records(brief=True)).rows
    baseline = Baseline(SCHEMA, suite, tuple(summary(row) for row in rows if row.finished))
    if not baseline.rows:
        advice = f"Run the suite first: sparsebench run {suite}"
        raise RecordError(f"{store.folder}: no finished cell to make a baseline of. {advice}")
    return msgspec.json.format(msgspec.json.encode(baseline), indent=1) + b"\n"


def read_baseline(text: bytes, where: str, suite: str) -> Baseline:
    """The baseline in `text`.

    Raises:
        RecordError: it is damaged, of another schema or of another suite; names `where`.
    """
    advice = f"Restore it, or write it again: sparsebench baseline {suite}"
    try:
        baseline = msgspec.json.decode(text, type=Baseline)
    except (msgspec.MsgspecError, SuiteError) as error:
        raise RecordError(f"{where}: damaged baseline ({error}). {advice}") from error
    if (baseline.schema, baseline.suite) != (SCHEMA, suite):
        raise RecordError(
            f"{where}: baseline of suite {baseline.suite!r}, schema {baseline.schema}; "
            f"expected {suite!r}, schema {SCHEMA}. {advice}"
        )
    return baseline


def question(label: str, spec: CellSpec) -> tuple[str, CellSpec]:
    """What a row is found by in a baseline.

    Seeds, versions and contents are left out: a baseline also answers whether a new version of a
    method, on other seeds, still does as well.
    """
    neutral = dataclasses.replace(spec, seed=0, method_version=1, recipe_hash="", data_hash="")
    return label, neutral


def pooled_deviation(rows: Sequence[BaselineRow]) -> float | None:
    """Standard deviation over seeds, pooled over rows; None where no row has two seeds."""
    spreads = [(row.n - 1, row.deviation) for row in rows if row.deviation is not None]
    freedom = sum(weight for weight, _ in spreads)
    squares = sum(weight * deviation**2 for weight, deviation in spreads)
    return math.sqrt(squares / freedom) if freedom else None


def summary(row: Row) -> BaselineRow:
    """A row as the baseline keeps it."""
    cells = []
    for spec, record, status in zip(row.specs, row.records, row.statuses, strict=True):
        counts = record.counts if record else None
        sizes = (counts.nonzero, counts.macs) if counts else (None, None)
        cells.append(BaselineCell(spec.seed, spec.key, status, *sizes))
    return BaselineRow(row.label, row.spec, len(row.ok), row.top1, row.deviation, tuple(cells))
