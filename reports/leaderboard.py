"""The leaderboard in markdown: a table a model, the method that does best overall on top."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.errors import UsageError
from bench.store import Store
from reports import reproduction
from reports.aggregate import Row, aggregate, full_model, mean
from reports.by_sparsity import cell, grouped, multiples, place, reached_notes
from reports.folders import stores
from reports.footnotes import (
    MARKS,
    chosen,
    environments,
    idle,
    penalties,
    plural,
    shared_conditions,
)
from reports.markdown import section
from reports.suite_table import WORDS

BEGIN, END = "<!-- leaderboard: begin -->", "<!-- leaderboard: end -->"
"""The lines of a document between which it stands."""

Line = Mapping[str, Row]
"""The rows of one method on one model, by the sparsity asked for."""


def leaderboard(root: Path) -> str:
    """The tables of all suites under a folder of records, and which published figures came out.

    The same text for the same records.

    Raises:
        RecordError: there are none, or one is damaged; names the file.
    """
    tables = [board for store in stores(root).values() for board in boards(store)]
    return "\n".join([*tables, reproduction.board(reproduction.reproduction(root))])


def boards(store: Store) -> Iterator[str]:
    """The tables of one suite, one for each model."""
    manifest = store.manifest()
    rows = aggregate(manifest, store.records(brief=True)).rows
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(full_model(row, rows), []).append(row)
    for model, found in models.items():
        title = f"{manifest.title or manifest.suite} ({manifest.suite}, {model})"
        yield board(title, found)


def board(title: str, rows: Sequence[Row]) -> str:
    """One table with what it needs to be read."""
    told, found = grouped(rows)
    lines = {key[1:]: line for key, line in found.items()}  # all of one model
    columns = sorted({text for line in lines.values() for text in line}, key=place)
    best = {key: bests(key, told, columns, lines) for key in lines}
    gaps = {key: behind(line, best[key]) for key, line in lines.items()}
    ordered = sorted(lines, key=lambda key: rank(lines[key], gaps[key]))
    table = [
        [
            *key,
            seeds(lines[key].values()),
            *(shown(lines[key], text, best[key][text]) for text in columns),
            "" if (gap := gaps[key]) is None else f"{gap:.2f}",
            multiples(dict(lines[key])),
        ]
        for key in ordered
    ]
    headers = ["method", *told, "n", *columns, "behind the best", "budget multiple"]
    return section(f"{title}: top-1 % by sparsity %", headers, table, WORDS, notes(rows))


def bests(
    key: tuple[str, ...],
    told: Sequence[str],
    columns: Sequence[str],
    lines: Mapping[tuple[str, ...], Line],
) -> dict[str, float | None]:
    """The best of each column among the lines that a line is measured with.

    They share its conditions but for the prunable weights, which papers compare across.
    """

    def shared(one: tuple[str, ...]) -> list[str]:
        return [text for name, text in zip(told, one[1:], strict=True) if name != "prunable"]

    alike = [line for other, line in lines.items() if shared(other) == shared(key)]
    return {text: best_of(text, alike) for text in columns}


def best_of(text: str, lines: Iterable[Line]) -> float | None:
    """The best mean accuracy of a column in which methods meet at one sparsity."""
    found = [line[text].top1 for line in lines if text in line]
    known = [value for value in found if value is not None]
    return max(known) if text != "penalty" and len(known) > 1 else None


def behind(line: Line, best: Mapping[str, float | None]) -> float | None:
    """Points behind the best of each column, averaged over those that the method has.

    None where one of its cells has no accuracy: who fails at the hardest sparsity gains nothing.
    """
    found = [(best[text], row.top1) for text, row in line.items()]
    return mean([None if own is None else top - own for top, own in found if top is not None])


def rank(line: Line, gap: float | None) -> tuple[bool, float]:
    """Dense networks first, then by the gap; what met no other method stands last."""
    dense = all(row.spec.method == "dense" and not row.smaller for row in line.values())
    return (not dense, math.inf if gap is None else gap)


def shown(line: Line, text: str, best: float | None) -> str:
    """A cell, bold where it is the best of its column."""
    if text not in line:
        return ""
    found = cell(line[text])
    return f"**{found}**" if best is not None and line[text].top1 == best else found


def seeds(rows: Iterable[Row]) -> str:
    """Seeds with a record, from the fewest to the most."""
    counts = sorted({len(row.finished) for row in rows})
    return " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """What the figures are, where they come from, and what their marks mean."""
    yield (
        "accuracy on the test set after the last step, mean ± standard deviation over n seeds; "
        "bold: the highest mean of a column that several methods have, which a few seeds need not "
        "tell from the next."
    )
    yield (
        "behind the best: points behind the highest mean of such a column, averaged over those "
        "that the method has; the order of the table. Empty where it has none, or no accuracy in "
        "one of them."
    )
    yield "budget multiple: batches of the training over those of the budget."
    yield from shared_conditions(rows)
    yield from environments(rows)
    yield from chosen(rows)
    yield from penalties(rows)
    yield from reached_notes(rows)
    yield from idle(rows)
    statuses = [status for row in rows for status in row.statuses]
    yield from (text for status, text in MARKS.items() if status in statuses)
    if dead := sum(bool(row.dead) for row in rows):
        yield f"dead: a layer was emptied, in {plural(dead, 'row')}."
    # One cell may answer several rows: a lottery ticket has a round for each sparsity.
    pairs = (pair for row in rows for pair in zip(row.keys, row.statuses, strict=True))
    absent = {key for key, status in pairs if status in ("missing", "skipped")}
    # A row that is skipped may have the key of the cell that it would be a variant of.
    if missing := absent - {record.spec.key for row in rows for record in row.finished}:
        yield f"`-`: not run; {plural(len(missing), 'cell')} without a record."


def placed(document: str, text: str, where: str) -> str:
    """A document with the text between its two marks.

    Raises:
        UsageError: the marks are not there, once each and in order; names `where`.
    """
    lines = document.split("\n")
    marks = [number for number, line in enumerate(lines) if line in (BEGIN, END)]
    if [lines[number] for number in marks] != [BEGIN, END]:
        raise UsageError(
            f"{where}: no place for the leaderboard; it stands between the lines `{BEGIN}` and "
            f"`{END}`, each there once."
        )
    first, last = marks
    return "\n".join([*lines[: first + 1], "", *text.strip().split("\n"), "", *lines[last:]])
