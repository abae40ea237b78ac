"""Does a suite still measure what it did? Records against a baseline, knowing their noise."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.store import Store
from reports.aggregate import CellStatus, Row, aggregate, asked_text, model_text, options_text
from reports.baseline import (
    BaselineRow,
    pooled_deviation,
    question,
    read_baseline,
    write_baseline,
)
from reports.footnotes import plural
from reports.markdown import section

__all__ = ["FLOOR", "Outcome", "check", "write_baseline"]

FLOOR = 0.5
"""Points of accuracy that a row may always fall: a few seeds can agree by chance."""

Status = Literal["fine", "regressed", "failed", "nothing"]
EXIT_CODES: dict[Status, int] = {"failed": 3, "regressed": 1, "nothing": 4, "fine": 0}
"""Worst first: a suite is as bad as its worst row."""

WORDS = {"method", "model", "verdict"}
FIGURES = ("sparsity asked %", "n", "baseline", "now", "difference", "allowed")
HEADERS = ("method", "model", *FIGURES, "verdict")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Answer of a check: its status, and a markdown table of every row."""

    status: Status
    table: str

    @property
    def exit_code(self) -> int:
        """Exit status of the command line."""
        return EXIT_CODES[self.status]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row of the baseline, and the row that answers the same question now.

    Attributes:
        statuses: of each seed asked for now; `failed` where there are only failed attempts.
        allowed: points that the mean accuracy may fall.
    """

    base: BaselineRow
    row: Row | None
    statuses: dict[int, CellStatus]
    allowed: float

    def verdict(self) -> tuple[Status | None, str]:
        """Status and reason; no status where the baseline has nothing to hold the row to."""
        if self.base.top1 is None:
            return None, "not compared: no seed of the baseline is ok"
        if self.row is None:
            return "nothing", "missing"
        reasons: dict[Status, list[str]] = {
            "failed": list(self.broken()),
            "regressed": list(self.worse(self.base.top1, self.row)),
            "nothing": list(self.missing()),
        }
        status: Status = next((status for status in reasons if reasons[status]), "fine")
        return status, "; ".join(text for texts in reasons.values() for text in texts) or "fine"

    def broken(self) -> Iterator[str]:
        """Cells that went wrong, unless they did so in the baseline too."""
        known = {cell.seed for cell in self.base.cells if cell.status not in ("ok", "missing")}
        for seed, status in self.statuses.items():
            if status not in ("ok", "missing") and seed not in known:
                yield f"seed {seed} {status}"

    def worse(self, before: float, row: Row) -> Iterator[str]:
        """Counts that changed at all, and an accuracy that fell by more than noise."""
        now = {record.spec.seed: record.counts for record in row.ok}
        for cell in self.base.cells:
            if cell.status != "ok" or cell.seed not in now:
                continue
            counts = now[cell.seed]
            left, macs = (counts.nonzero, counts.macs) if counts else (None, None)
            if left != cell.nonzero:
                yield f"seed {cell.seed}: parameters left {cell.nonzero} -> {left}"
            if macs != cell.macs:
                yield f"seed {cell.seed}: MACs {cell.macs} -> {macs}"
        # Written so that an accuracy that is not a number is worse than any.
        if row.top1 is not None and not row.top1 >= before - self.allowed:
            yield "accuracy fell"

    def missing(self) -> Iterator[str]:
        """Seeds of the baseline that the suite asks for and that were not run."""
        known = {cell.seed for cell in self.base.cells if cell.status != "missing"}
        if absent := [seed for seed in known if self.statuses.get(seed) == "missing"]:
            yield f"not run: {plural(len(absent), 'seed')} of the baseline"
        elif "ok" not in self.statuses.values():
            yield "no seed is ok"


def check(
    root: Path, suite: str, baseline: bytes, where: str = "baseline", floor: float = FLOOR
) -> Outcome:
    """Compares a suite's records with a baseline.

    Counts must be equal, seed by seed. The mean accuracy may not fall by more than
    `max(floor, 3 * sigma * sqrt(1/n + 1/m))`, with sigma pooled over the baseline's rows, and n and
    m the numbers of seeds then and now.

    Args:
        root: folder of all suites' records.
        suite: the suite's name.
        baseline: content of the baseline file.
        where: name of that file, for messages.
        floor: points of accuracy that a row may always fall.

    Raises:
        RecordError: the baseline or a record is damaged; names the file.
    """
    before = read_baseline(baseline, where, suite)
    store = Store(root, suite)
    rows = aggregate(store.manifest(), store.records(brief=True)).rows
    now = {question(row.label, row.spec): row for row in rows}
    sigma = pooled_deviation(before.rows)
    comparisons = []
    for base in before.rows:
        row = now.pop(question(base.label, base.spec), None)
        allowed = tolerance(base, row, sigma or 0.0, floor)
        comparisons.append(Comparison(base, row, statuses(store, row), allowed))
    found = {comparison.verdict()[0] for comparison in comparisons}
    status: Status = next((status for status in EXIT_CODES if status in found), "nothing")
    lines = [compared(comparison) for comparison in comparisons]
    lines += [new(row) for row in now.values()]
    below = notes(comparisons, sigma, floor)
    return Outcome(status, section(f"{suite}: {status}", HEADERS, lines, WORDS, below))


def tolerance(base: BaselineRow, row: Row | None, sigma: float, floor: float) -> float:
    """Points that the mean may fall: three standard errors of the difference of two means."""
    if row is None or not row.ok or base.n == 0:
        return floor
    return max(floor, 3 * sigma * math.sqrt(1 / base.n + 1 / len(row.ok)))


def statuses(store: Store, row: Row | None) -> dict[int, CellStatus]:
    """Status of each seed, telling one that failed from one that was never tried."""
    found: dict[int, CellStatus] = {}
    for spec, status in zip(row.specs, row.statuses, strict=True) if row else ():
        attempts = (store.folder / "attempts").glob(f"{glob.escape(spec.slug)}-*.json")
        found[spec.seed] = "failed" if status == "missing" and any(attempts) else status
    return found


def named(row: Row | BaselineRow) -> list[str]:
    """The cells that name a row."""
    options = options_text(row.spec.options)
    label = f"{row.label} ({options})" if options else row.label
    return [label, model_text(row.spec), asked_text(row.spec)]


def compared(comparison: Comparison) -> list[str]:
    """One line of the table."""
    base, row = comparison.base, comparison.row
    before, now = base.top1, row.top1 if row else None
    difference = None if before is None or now is None else now - before
    seeds = f"{base.n} -> {len(row.ok) if row else 0}"
    figures = [number(before), number(now), number(difference, "+"), number(-comparison.allowed)]
    return [*named(base), seeds, *figures, comparison.verdict()[1]]


def new(row: Row) -> list[str]:
    """The line of a row that the baseline does not have."""
    return [*named(row), f"0 -> {len(row.ok)}", "-", number(row.top1), "-", "-", "new"]


def number(value: float | None, sign: str = "") -> str:
    """Points with two decimals, or the mark for one that was not measured."""
    return "-" if value is None else format(value, f"{sign}.2f")


def notes(comparisons: Sequence[Comparison], sigma: float | None, floor: float) -> Iterator[str]:
    """What the columns mean and what limits the comparison."""
    yield "n: seeds that are ok, in the baseline -> now; accuracy is their mean."
    if sigma is None:
        yield f"allowed: {floor:g} points; no row of the baseline has two seeds to know noise from."
    else:
        yield (
            f"allowed: the larger of {floor:g} points and 3 sigma sqrt(1/n + 1/m); "
            f"sigma, pooled over the baseline's rows: {sigma:.3f}."
        )
    yield "parameters left and MACs must be equal, seed by seed."
    if other := sum(changed(comparison) for comparison in comparisons):
        rows = plural(other, "row")
        yield f"{rows} with other keys than in the baseline: a version, recipe or data changed."


def changed(comparison: Comparison) -> bool:
    """Whether a seed has another key than in the baseline."""
    now = {spec.seed: spec.key for spec in comparison.row.specs} if comparison.row else {}
    return any(now.get(cell.seed, cell.key) != cell.key for cell in comparison.base.cells)
