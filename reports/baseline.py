"""What a suite measured when it was last found good: value objects in JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.errors import RecordError, SuiteError, UsageError
from bench.record import SUITE_NAME, Record
from bench.spec import CellSpec
from bench.store import Store, command, suites
from reports.aggregate import CellStatus, Row, aggregate, asked_text, model_text
from reports.footnotes import plural
from reports.tolerance import POWER, Tolerance, spreads, tolerances

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
        if not all(figure is None or 0 <= figure < math.inf for figure in figures):
            raise ValueError("top1, deviation and seconds must be finite numbers, 0 or more")
        if max(self.top1 or 0, self.deviation or 0) > 100:
            raise ValueError("top1 and deviation must be at most 100")

    @property
    def ok_keys(self) -> list[str]:
        """Keys of the cells whose accuracy counts."""
        return [cell.key for cell in self.cells if cell.status == "ok"]


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

    def __post_init__(self) -> None:
        if not SUITE_NAME.fullmatch(self.suite):
            raise ValueError(f"suite = {self.suite!r} is no name")


def make_baseline(root: Path, suite: str) -> Baseline:
    """The suite's records as a baseline. Rows that were not run are left out.

    Raises:
        RecordError: no cell of the suite has finished, or a record is damaged; names the file.
    """
    store = Store(root, suite)
    rows = aggregate(store.manifest(), store.records(brief=True)).rows
    finished = [row for row in rows if row.finished]
    if not finished:
        advice = f"Run the suite first: {command(suite)}"
        raise RecordError(f"{store.folder}: no finished cell to make a baseline of. {advice}")
    try:
        return Baseline(SCHEMA, suite, tuple(map(summary, finished)), places(finished))
    except ValueError as error:
        raise RecordError(f"{store.folder}: no baseline can be made ({error}).") from error


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
    advice = f"Restore it, or write it again: sparsebench baseline {suite or 'SUITE'} --out FILE"
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
        raise UsageError(f"{root}: {found}; name the suite: sparsebench baseline SUITE --out FILE")
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
    return tuple(sorted({place(record) for row in rows for record in row.finished}))


def place(record: Record) -> str:
    """What seconds depend on most: devices, threads, torch."""
    where, how = record.environment, record.execution
    several = f"{how.devices} devices: " if how is not None and how.devices > 1 else ""
    return f"{several}{where.device}, {where.threads} threads, torch {where.torch}"


def reach(baseline: Baseline) -> Iterator[str]:
    """What a check can see with as many seeds as the baseline has, in words."""
    rows = [row for row in baseline.rows if row.n]
    # A check has seeds of its own to know the noise from.
    known = spreads((row.ok_keys, row.deviation) for row in rows)
    suite, of_rows = tolerances(known, known)
    if suite.noise is None or suite.noise.sd == 0:
        why = "the seeds of every row agree" if suite.noise else "no row has two seeds"
        yield (
            f"smallest drop that a check can find: not known, as {why}; "
            f"it allows {suite.floor:g} points"
        )
        return
    drops = [held.smallest_drop(row.n, row.n) for row, held in zip(rows, of_rows, strict=True)]
    found = [
        (row, None if drop is None or drop >= (row.top1 or 0) else drop)
        for row, drop in zip(rows, drops, strict=True)
    ]
    for n in sorted({row.n for row in rows}):
        told = [drop for row, drop in found if row.n == n and drop is not None]
        head = f"smallest drop that a check can find (probability {POWER:.0%}, {plural(n, 'seed')}"
        yield f"{head} on both sides): {drops_text(told, suite)}"
    if lost := [name_of(row) for row, drop in found if drop is None]:
        yield f"spread too much to find any drop: {'; '.join(lost)}"


def drops_text(drops: list[float], suite: Tolerance) -> str:
    """The drops that rows of as many seeds can find, and the noise that they come from."""
    sigma = f"one run has sigma {suite.noise.sd:.3f}" if suite.noise else ""
    if not drops:
        return f"none; {sigma}"
    if not suite.differ:
        return f"{drops[0]:.2f} points; {sigma}"
    median = sorted(drops)[len(drops) // 2]
    return (
        f"{min(drops):.2f} to {max(drops):.2f} points (median {median:.2f}), as the rows differ in "
        f"spread; a typical {sigma}"
    )


def name_of(row: BaselineRow) -> str:
    """A row in one line."""
    return f"{row.label}, {model_text(row.spec)}, {asked_text(row.spec)}"


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
