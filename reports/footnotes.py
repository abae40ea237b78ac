"""What stands below a table: its conditions, its marks, and every cell that went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from bench.record import Environment, Record
from bench.spec import CellSpec
from reports.aggregate import Results, Row, budget_text, judged, name_text

CONDITIONS: dict[str, Callable[[CellSpec], str]] = {
    # Contents are hashed into the key, so two rows may differ in them under one name.
    "data set": lambda spec: f"{spec.dataset} ({spec.data_hash})",
    "recipe": lambda spec: f"{spec.recipe} ({spec.recipe_hash})",
    "budget": budget_text,
    "prunable": lambda spec: spec.prunable,
}
"""What the rows of a table should share: said once below it, or a column where they differ."""

ENVIRONMENT: dict[str, Callable[[Environment], str]] = {
    "devices": lambda where: where.device,
    "threads": lambda where: str(where.threads),
    "torch": lambda where: where.torch,
    "python": lambda where: where.python,
    "sparsebench": lambda where: where.sparsebench,
    "commits": lambda where: where.commit + (" + local changes" if where.dirty else ""),
}

MARKS = {
    "diverged": "`*`: this many seeds diverged; they are not in the mean.",
    "invalid": "`invalid`: this many seeds broke a rule of measurement; they are not in the mean.",
}


def footnotes(results: Results, attempts: Sequence[Record]) -> Iterator[str]:
    """What the numbers mean, what they were measured with, and what is wrong with them."""
    rows = results.rows
    seeds = sorted({spec.seed for row in rows for spec in row.specs})
    yield f"n: seeds with a record; asked for: {', '.join(map(str, seeds)) or 'none'}."
    yield "accuracy: last step on the test set, mean ± standard deviation over seeds."
    yield "other columns: mean over the same seeds (over all finished ones where none is ok)."
    yield from shared_conditions(rows)
    yield from environments(rows)
    if any(row.spec.sparsity is None for row in rows):
        yield "`penalty`: no sparsity can be asked for; the strength of the penalty decides it."
    statuses = {status for row in rows for status in row.statuses}
    yield from (text for status, text in MARKS.items() if status in statuses)
    if "missing" in statuses or any(row.nonzero is None for row in rows):
        yield "`-`: not run, or stopped before it was measured; n shows finished/asked."
    if dead := [f"{name_text(row)}: {', '.join(row.dead)}" for row in rows if row.dead]:
        yield f"†: emptied layers ({'; '.join(dead)})."
    yield from reasons(rows)
    if attempts:
        tries = plural(len(attempts), "failed attempt")
        yield f"{tries} in `attempts/`; a cell that only failed counts as not run."
        yield from failures(rows, attempts)
    if results.stale:
        verb = "is" if results.stale == 1 else "are"
        records = plural(results.stale, "record")
        yield f"{records} of earlier versions of this suite {verb} not shown."


def shared_conditions(rows: Sequence[Row]) -> Iterator[str]:
    """One line for what was asked of all rows alike."""
    shared = {name: text for name, text in CONDITIONS.items() if rows and not varies(rows, text)}
    if shared:
        yield "; ".join(f"{name}: {text(rows[0].spec)}" for name, text in shared.items()) + "."


def environments(rows: Iterable[Row]) -> Iterator[str]:
    """One line for where the records come from."""
    places = [record.environment for row in rows for record in row.finished]
    if places:
        values = {name: sorted(set(map(text, places))) for name, text in ENVIRONMENT.items()}
        yield "; ".join(f"{name}: {', '.join(found)}" for name, found in values.items()) + "."


def reasons(rows: Iterable[Row]) -> Iterator[str]:
    """One line for each finished cell whose accuracy does not count."""
    for row in rows:
        for record in row.finished:
            if (status := judged(record)) != "ok":
                # A reason may quote an exception of several lines; a footnote has one.
                reason = " ".join(record.reason.split()) or "no finite accuracy"
                yield f"{name_text(row)}, seed {record.spec.seed}: {status}: {reason}"


def failures(rows: Iterable[Row], attempts: Iterable[Record]) -> Iterator[str]:
    """One line for each cell that only failed, with the reason of its last try."""
    last = {record.spec.key: record for record in attempts}
    for row in rows:
        done = {record.spec.key for record in row.finished}
        for spec in row.specs:
            if spec.key in last and spec.key not in done:
                reason = " ".join(last[spec.key].reason.split())
                yield f"{name_text(row)}, seed {spec.seed}: failed: {reason}"


def varies(rows: Iterable[Row], text: Callable[[CellSpec], str]) -> bool:
    """Whether rows differ in a condition."""
    return len({text(row.spec) for row in rows}) > 1


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
