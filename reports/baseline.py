"""What a suite measured when it was last found good: value objects in JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.errors import RecordError, SuiteError, UsageError
from bench.record import Environment
from bench.spec import CellSpec
from bench.store import Store, suites
from reports.aggregate import CellStatus, Row, aggregate, asked_text, model_text
from reports.footnotes import plural
from reports.tolerance import POWER, tolerances

SCHEMA = 2
READABLE = (1, SCHEMA)
"""Schema 1 has no times; all else is alike."""

FEW = 5
"""Seeds below which a baseline is warned of."""


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
    """One row: its question with the first seed, and means over the `n` seeds that were `ok`.

    Attributes:
        top1: accuracy in percent; its standard deviation over seeds is `deviation`.
        seconds: of training, for one seed; None in a baseline of schema 1.
    """

    label: str
    spec: CellSpec
    n: int
    top1: float | None
    deviation: float | None
    cells: tuple[BaselineCell, ...]
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.n > 0) != (self.top1 is not None) or (self.n > 1) != (self.deviation is not None):
            raise ValueError("n, top1 and deviation do not fit together")
        if self.n != sum(cell.status == "ok" for cell in self.cells):
            raise ValueError("n is not the number of cells that are ok")
        figures = (self.top1, self.deviation, self.seconds)
        if not all(figure is None or math.isfinite(figure) for figure in figures):
            raise ValueError("top1, deviation and seconds must be finite")


@dataclass(frozen=True, slots=True)
class Baseline:
    """All rows of a suite that had a record.

    Attributes:
        places: what it was measured on, as `place` has it; times compare within one only.
    """

    schema: int
    suite: str
    rows: tuple[BaselineRow, ...]
    places: tuple[str, ...] = ()


def make_baseline(root: Path, suite: str) -> Baseline:
    """The suite's records as a baseline. Rows that were not run are left out.

    Raises:
        RecordError: no cell of the suite has finished, or a record is damaged; names the file.
    """
    store = Store(root, suite)
    rows = aggregate(store.manifest(), store.records(brief=True)).rows
    finished = [row for row in rows if row.finished]
    if not finished:
        advice = f"Run the suite first: sparsebench run {suite}"
        raise RecordError(f"{store.folder}: no finished cell to make a baseline of. {advice}")
    return Baseline(SCHEMA, suite, tuple(map(summary, finished)), places(finished))


def write_baseline(root: Path, suite: str) -> bytes:
    """The suite's records as the content of a baseline file, see `make_baseline`."""
    return encode(make_baseline(root, suite))


def encode(baseline: Baseline) -> bytes:
    """The content of a baseline file."""
    return msgspec.json.format(msgspec.json.encode(baseline), indent=1) + b"\n"


def read_baseline(text: bytes, where: str, suite: str | None = None) -> Baseline:
    """The baseline in `text`.

    Args:
        text: content of a baseline file.
        where: name of that file, for messages.
        suite: that it must be of; None: it names its own.

    Raises:
        RecordError: it is damaged, of another schema or of another suite; names `where`.
    """
    advice = f"Restore it, or write it again: sparsebench baseline {suite or ''}".rstrip()
    try:
        baseline = msgspec.json.decode(text, type=Baseline)
    except (msgspec.MsgspecError, SuiteError, ValueError, RecursionError) as error:
        raise RecordError(f"{where}: damaged baseline ({error}). {advice}") from error
    if baseline.schema not in READABLE or baseline.suite != (suite or baseline.suite):
        raise RecordError(
            f"{where}: baseline of suite {baseline.suite!r}, schema {baseline.schema}; "
            f"expected {suite or baseline.suite!r}, schema {' or '.join(map(str, READABLE))}. "
            f"{advice}"
        )
    return baseline


def only_suite(root: Path) -> str:
    """The one suite that has records under `root`.

    Raises:
        UsageError: there is none, or more than one.
    """
    names = suites(root)
    if len(names) != 1:
        found = f"records of {len(names)} suites ({', '.join(names)})" if names else "no records"
        raise UsageError(f"{root}: {found}; name the suite: sparsebench baseline SUITE")
    return names[0]


def question(label: str, spec: CellSpec) -> tuple[str, CellSpec]:
    """What a row is found by in a baseline.

    Seeds, versions and contents are left out, and with them the key of the cell that masks come
    from: a baseline also answers whether a new version of a method still does as well.
    """
    neutral = dataclasses.replace(
        spec, seed=0, method_version=1, recipe_hash="", data_hash="", source=None
    )
    return label, neutral


def summary(row: Row) -> BaselineRow:
    """A row as the baseline keeps it."""
    cells = []
    answers = zip(row.specs, row.keys, row.records, row.statuses, strict=True)
    for spec, key, record, status in answers:
        counts = record.counts if record else None
        sizes = (counts.nonzero, counts.macs) if counts else (None, None)
        cells.append(BaselineCell(spec.seed, key, status, *sizes))
    seconds = row.train_seconds
    return BaselineRow(
        row.label, row.spec, len(row.ok), row.top1, row.deviation, tuple(cells), seconds
    )


def places(rows: list[Row]) -> tuple[str, ...]:
    """What rows were measured on, each place once."""
    return tuple(sorted({place(record.environment) for row in rows for record in row.finished}))


def place(environment: Environment) -> str:
    """The part of an environment that seconds depend on most."""
    return f"{environment.device}, {environment.threads} threads, torch {environment.torch}"


def reach(baseline: Baseline) -> Iterator[str]:
    """What a check can see with as many seeds as the baseline has, in words."""
    rows = [row for row in baseline.rows if row.n]
    # A check has seeds of its own to know the noise from.
    spreads = [(row.n, row.deviation) for row in rows]
    suite, of_rows = tolerances(spreads, spreads)
    if suite.noise is None:
        yield (
            "smallest drop that a check can find: not known, as no row has two seeds; "
            f"it allows {suite.floor:g} points"
        )
        return
    told = f"smallest drop that a check can find (probability {POWER:.0%}"
    held = list(zip(rows, of_rows, strict=True))
    for n in sorted({row.n for row, tolerance in held if tolerance is suite}):
        drop = suite.smallest_drop(n, n)
        seeds = plural(n, "seed")
        sigma = f"one run has sigma {suite.noise.sd:.3f}"
        yield f"{told}, {seeds} on both sides): {drop:.2f} points; {sigma}"
    for row, tolerance in held:
        if tolerance is not suite:
            drop = tolerance.smallest_drop(row.n, row.n)
            name = f"{row.label}, {model_text(row.spec)}, {asked_text(row.spec)}"
            found = drop is not None and row.top1 is not None and drop < row.top1
            yield f"{name}, spreads more: {f'{drop:.2f} points' if found else 'finds none'}"


def shortcomings(baseline: Baseline) -> Iterator[str]:
    """What makes a baseline a poor one, in words."""
    few = [row.n for row in baseline.rows if row.n < FEW]
    if few:
        yield (
            f"{len(few)} of {len(baseline.rows)} rows have fewer than {FEW} seeds that are ok "
            f"(least: {min(few)}); a check can miss what more would find"
        )
    wrong = [cell.status for row in baseline.rows for cell in row.cells if cell.status != "ok"]
    if wrong:
        counted = ", ".join(f"{wrong.count(status)} {status}" for status in dict.fromkeys(wrong))
        yield f"not every cell is ok ({counted}); their seeds are in no mean"
