"""Does a suite still measure what it did? Records against a baseline, knowing their noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from bench.errors import RecordError
from bench.store import Store
from reports.aggregate import CellStatus, Row, aggregate, asked_text, model_text, options_text
from reports.baseline import (
    Baseline,
    BaselineRow,
    places,
    question,
    read_baseline,
    write_baseline,
)
from reports.footnotes import plural, unsaid_options
from reports.outcome import DEFAULTS, EXIT_CODES, Limits, Line, Outcome, Status, number
from reports.tolerance import UNKNOWN, Tolerance, spreads, tolerances

Tries = Mapping[str, CellStatus]
NO_TRIES: Tries = MappingProxyType({})

WRONG: tuple[CellStatus, ...] = ("invalid", "failed", "lost", "out-of-memory", "timeout")
"""Statuses that no baseline excuses; a try that failed has one of them."""

__all__ = ["Limits", "Line", "Outcome", "check", "judge", "write_baseline"]


def check(
    root: Path,
    suite: str | None,
    baseline: bytes,
    where: str = "baseline",
    limits: Limits = DEFAULTS,
) -> Outcome:
    """Compares a suite's records with a baseline, see `judge`.

    Args:
        root: folder of all suites' records.
        suite: the suite's name; None: the baseline names it.
        baseline: content of the baseline file.
        where: name of that file, for messages.
        limits: what may be lost.

    Raises:
        RecordError: the baseline or a record is damaged, or the baseline has no times to hold the
            records to; names the file.
    """
    before = read_baseline(baseline, where, suite)
    if limits.time is not None and any(row.n and row.seconds is None for row in before.rows):
        advice = f"Write it again: sparsebench baseline {before.suite} --out FILE"
        raise RecordError(f"{where}: no times for --time-tolerance in this baseline. {advice}")
    store = Store(root, before.suite)
    if root.is_dir() and not store.folder.is_dir():
        return judge(before, (), limits=limits)  # all of it is missing
    rows = aggregate(store.manifest(), store.records(brief=True)).rows
    return judge(before, rows, last_tries(store), limits)


def judge(
    before: Baseline,
    rows: Sequence[Row],
    tries: Tries = NO_TRIES,
    limits: Limits = DEFAULTS,
) -> Outcome:
    """Holds rows to a baseline: the decision of `sparsebench check`.

    Counts must be equal, seed by seed. A mean accuracy may not fall by more than the suite's
    tolerance, or that of its own row, see `tolerances`. Every seed of the baseline must be there,
    and none may have failed or be invalid; one that diverged in the baseline may diverge again.

    Args:
        before: the baseline.
        rows: of the suite now.
        tries: status of the last failed try of cells that have one, by key.
        limits: what may be lost.
    """
    now = {question(row.label, row.spec): row for row in rows}
    pairs = [(base, now.pop(question(base.label, base.spec), None)) for base in before.rows]
    found_now = iter(spreads((ok_keys(row), row.deviation) for _, row in pairs if row))
    suite, of_rows = tolerances(
        spreads((base.ok_keys, base.deviation) for base in before.rows),
        [next(found_now) if row else UNKNOWN for _, row in pairs],
        limits.floor,
    )
    lines = [
        line(base, row, tries, held, limits)
        for (base, row), held in zip(pairs, of_rows, strict=True)
    ]
    lines += [new(row, tries) for row in now.values()]
    found = {one.status for one in lines}
    status: Status = next((status for status in EXIT_CODES if status in found), "nothing")
    where = (before.places, places(list(rows)))
    return Outcome(before.suite, status, tuple(lines), suite, limits, where)


def last_tries(store: Store) -> dict[str, CellStatus]:
    """Status of the last failed try of each cell that has some, by key."""
    return {record.spec.key: record.status for record in store.attempts()}


def line(
    base: BaselineRow,
    row: Row | None,
    tries: Tries,
    tolerance: Tolerance,
    limits: Limits,
) -> Line:
    """One row of the baseline, judged."""
    if row is None:
        return Line(
            *named(base),
            status="nothing",
            reasons=("missing",),
            n_before=base.n,
            before=base.top1,
            seconds_before=base.seconds,
        )
    allowed = tolerance.allowed(base.n, len(row.ok)) if base.n and row.ok else None
    found = statuses(row, tries)
    reasons: dict[Status, list[str]] = {
        "failed": list(broken(base, found)),
        "regressed": [*worse(base, row, allowed), *slower(base, row, limits.time)],
        "nothing": list(absent(base, found)),
    }
    status: Status | None = next((status for status in reasons if reasons[status]), "fine")
    texts = [text for of_status in reasons.values() for text in of_status]
    if status == "fine" and base.top1 is None:
        status, texts = None, ["not compared: no seed of the baseline is ok"]
    keys = {spec.seed: key for spec, key in zip(row.specs, row.keys, strict=True)}
    return Line(
        *named(base),
        status=status,
        reasons=tuple(texts),
        n_before=base.n,
        n=len(row.ok),
        before=base.top1,
        now=row.top1,
        allowed=allowed,
        sigma=tolerance.noise.sd if tolerance.noise and allowed is not None else None,
        seconds_before=base.seconds,
        seconds=row.train_seconds,
        other_keys=any(keys.get(cell.seed, cell.key) != cell.key for cell in base.cells),
    )


def ok_keys(row: Row) -> list[str]:
    """Keys of the cells whose accuracy counts."""
    return [key for key, status in zip(row.keys, row.statuses, strict=True) if status == "ok"]


def new(row: Row, tries: Tries) -> Line:
    """A row that the baseline does not have: it matters only where it went wrong."""
    wrong = tuple(
        f"seed {seed} {status}" for seed, status in statuses(row, tries).items() if status in WRONG
    )
    return Line(
        *named(row),
        status="failed" if wrong else None,
        reasons=("new", *wrong),
        n=len(row.ok),
        now=row.top1,
        seconds=row.train_seconds,
    )


def statuses(row: Row, tries: Tries) -> dict[int, CellStatus]:
    """Status of each seed, telling one that failed from one that was never tried."""
    return {
        spec.seed: tries.get(key, status) if status == "missing" else status
        for spec, key, status in zip(row.specs, row.keys, row.statuses, strict=True)
    }


def broken(base: BaselineRow, found: dict[int, CellStatus]) -> Iterator[str]:
    """Cells that went wrong. One that diverged in the baseline too measures what it did."""
    known = {cell.seed for cell in base.cells if cell.status == "diverged"}
    for seed, status in found.items():
        if status in WRONG or (status == "diverged" and seed not in known):
            yield f"seed {seed} {status}"


def worse(base: BaselineRow, row: Row, allowed: float | None) -> Iterator[str]:
    """Counts that changed at all, and an accuracy that fell by more than noise."""
    now = {record.spec.seed: record.counts for record in row.ok}
    for cell in base.cells:
        if cell.status != "ok" or cell.seed not in now:
            continue
        counts = now[cell.seed]
        left, macs = (counts.nonzero, counts.macs) if counts else (None, None)
        if left != cell.nonzero:
            yield f"seed {cell.seed}: parameters left {cell.nonzero} -> {left}"
        if macs != cell.macs:
            yield f"seed {cell.seed}: MACs {cell.macs} -> {macs}"
    if base.top1 is None or row.top1 is None or allowed is None:
        return
    # Written so that an accuracy that is not a number is worse than any.
    if not row.top1 >= base.top1 - allowed:
        yield "accuracy fell"


def slower(base: BaselineRow, row: Row, tolerance: float | None) -> Iterator[str]:
    """Training that takes longer than the caller lets it."""
    if tolerance is None or base.seconds is None or not row.ok:
        return
    now = row.train_seconds
    if now is None or not now <= base.seconds * (1 + tolerance):
        yield f"slower: {number(base.seconds)} s -> {number(now)} s"


def absent(base: BaselineRow, found: dict[int, CellStatus]) -> Iterator[str]:
    """Seeds of the baseline that were not run."""
    never = ("missing", "skipped")
    known = [cell.seed for cell in base.cells if cell.status not in never]
    lost = [seed for seed in known if found.get(seed, "missing") in never]
    if lost:
        yield f"not run: {plural(len(lost), 'seed')} of the baseline"


def named(row: Row | BaselineRow) -> tuple[str, str, str]:
    """What names a row: method, model and sparsity."""
    unsaid = unsaid_options(row.label, row.spec)
    label = f"{row.label} ({options_text(unsaid)})" if unsaid else row.label
    return label, model_text(row.spec), asked_text(row.spec)
