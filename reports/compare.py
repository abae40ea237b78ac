"""Two folders of records, or two methods of one suite: the questions that both answer, in pairs.

A question is a model, a data set and a sparsity; between folders also a label with its options. A
recipe, budget, preset or start belongs to it only where a side has several, as in a suite over
budgets. Elsewhere the sides may differ in them, and a footnote says so (`reports.side_by_side`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import store
from bench.errors import RecordError, UnknownName, UsageError
from bench.store import Store
from reports import statistics
from reports.aggregate import Row, aggregate, budget_text, options_text, wide_model
from reports.by_sparsity import sparsity_text
from reports.folders import is_records, stores
from reports.statistics import Comparison
from reports.tolerance import spreads

Fields = Mapping[str, Callable[[Row], str]]

QUESTION: Fields = {
    "model": wide_model,
    "data set": lambda row: row.spec.dataset,
    "sparsity asked %": sparsity_text,
}
"""What a line always stands for."""

OF_FOLDERS: Fields = {
    "method": lambda row: row.label,
    "options": lambda row: options_text(row.spec.options),
}
"""Part of a question where both sides have all methods."""

VARYING: Fields = {
    "recipe": lambda row: row.spec.recipe,
    "budget": lambda row: budget_text(row.spec),
    "prunable": lambda row: row.spec.prunable,
    "initial weights": lambda row: row.spec.init,
}
"""Part of a question where one side asks for several."""


@dataclass(frozen=True, slots=True)
class Side:
    """Rows that were run, under the name by which the user asked for them."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A question that both sides answer.

    Attributes:
        question: text of each field.
        chance: whether seeds alone may explain the difference; None unless that was asked for.
        corrected: the same by Holm, over all pairs of the suite.
    """

    question: dict[str, str]
    a: Row
    b: Row
    chance: Comparison | None = None
    corrected: Comparison | None = None

    @property
    def difference(self) -> float | None:
        """Points of accuracy from A to B; None where a side has none."""
        one, other = self.a.top1, self.b.top1
        return None if one is None or other is None else other - one


@dataclass(frozen=True, slots=True)
class Compared:
    """Two sides, the questions that both answer, and the rows that only one has."""

    suite: str
    a: Side
    b: Side
    pairs: tuple[Pair, ...]
    only_a: tuple[Row, ...]
    only_b: tuple[Row, ...]


def compare(root: Path, one: str, other: str, *, tests: bool = False) -> list[Compared]:
    """Two folders of records, or two labels or methods of the suites under `root`.

    Args:
        root: folder of all suites' records; not read where `one` and `other` are folders.
        one: A: a folder of records, a suite's folder in it, a label, or a method.
        other: B, what differences lead to.
        tests: adds one of each pair.

    Returns:
        One comparison for each suite that both have.

    Raises:
        UsageError: one is a folder and the other is not, or a name is not known or not clear.
        RecordError: no suite has both, or a record is damaged; names the file.
    """
    folders = [is_records(Path(name)) for name in (one, other)]
    if all(folders):
        found = _of_folders(Path(one), Path(other))
    elif any(folders):
        folder, name = (one, other) if folders[0] else (other, one)
        raise UsageError(f"compare: {folder} is a folder of records, but {name} is none.")
    else:
        found = _of_labels(root, one, other)
    return [_with_chance(one) for one in found] if tests else found


def _of_folders(one: Path, other: Path) -> list[Compared]:
    """A comparison for each suite that both folders hold, or of two suites' own folders."""
    all_a, all_b = stores(one), stores(other)
    pairs = [(all_a[name], all_b[name]) for name in all_a if name in all_b]
    if not pairs and len(all_a) == len(all_b) == 1:  # a suite and another version of it
        pairs = list(zip(all_a.values(), all_b.values(), strict=True))
    if not pairs:
        held = f"{one} has {', '.join(all_a)}; {other} has {', '.join(all_b)}"
        raise RecordError(f"compare: no suite is in both folders ({held}).")
    return [
        compared(a.suite, Side(str(a.folder), _rows(a)), Side(str(b.folder), _rows(b)), OF_FOLDERS)
        for a, b in pairs
    ]


def _of_labels(root: Path, one: str, other: str) -> list[Compared]:
    """A comparison for each suite under `root` that has both."""
    everything = {name: _rows(Store(root, name)) for name in store.suites(root)}
    for name in (one, other):
        if not any(_labels(rows, name) for rows in everything.values()):
            known = {row.label for rows in everything.values() for row in rows}
            raise UnknownName(str(root), "label, method or folder of records", name, known)
    found = []
    for suite, rows in everything.items():
        if _labels(rows, one) and _labels(rows, other):
            a, b = _side(suite, rows, one), _side(suite, rows, other)
            found.append(compared(suite, a, b, {}))
    if not found:
        raise RecordError(f"{root}: no suite has records of both {one} and {other}.")
    return found


def _rows(source: Store) -> tuple[Row, ...]:
    """Rows of a suite that were run, if only for one seed."""
    results = aggregate(source.manifest(), source.records(brief=True))
    return tuple(row for row in results.rows if row.finished)


def _labels(rows: Iterable[Row], name: str) -> list[str]:
    """Labels that a name stands for: the label itself, or those of the method."""
    labels = list(dict.fromkeys(row.label for row in rows if name in (row.label, row.spec.method)))
    return [name] if name in labels else labels


def _side(suite: str, rows: Sequence[Row], name: str) -> Side:
    """The rows of one label.

    Raises:
        UsageError: the name is that of a method with several.
    """
    labels = _labels(rows, name)
    if len(labels) > 1:
        raise UsageError(
            f"compare: {name} has several rows in {suite}; give one of {', '.join(labels)}."
        )
    return Side(name, tuple(row for row in rows if row.label in labels))


def compared(suite: str, a: Side, b: Side, fields: Fields) -> Compared:
    """Pairs the rows of two sides by question, in A's order.

    Args:
        suite: that both are of.
        a: one side.
        b: the other.
        fields: what belongs to a question besides `QUESTION`.
    """
    varying = {name: text for name, text in VARYING.items() if _varies(a, text) or _varies(b, text)}
    asked = {**fields, **QUESTION, **varying}
    of_a, of_b = dict(_by_question(a.rows, asked)), dict(_by_question(b.rows, asked))
    pairs = tuple(
        Pair(dict(zip(asked, question, strict=False)), row, of_b[question])
        for question, row in of_a.items()
        if question in of_b
    )
    only_a = tuple(row for question, row in of_a.items() if question not in of_b)
    only_b = tuple(row for question, row in of_b.items() if question not in of_a)
    return Compared(suite, a, b, pairs, only_a, only_b)


def _varies(side: Side, text: Callable[[Row], str]) -> bool:
    return len(set(map(text, side.rows))) > 1


def _by_question(rows: Sequence[Row], fields: Fields) -> Iterator[tuple[tuple[str, ...], Row]]:
    """Each row with its question; rows that it cannot tell apart pair up only with themselves."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(text(row) for text in fields.values()), []).append(row)
    for question, found in groups.items():
        for row in found:
            yield (question if len(found) == 1 else (*question, row.keys[0])), row


def _with_chance(found: Compared) -> Compared:
    """Tests every pair, its noise pooled over both sides of all of them.

    A cell that several rows share, as one that lies in both folders, tells its noise once. One that
    was run again and came out otherwise is another run, though its key is the same.
    """
    samples = [(accuracies_by_seed(pair.a), accuracies_by_seed(pair.b)) for pair in found.pairs]
    rows = [row for pair in found.pairs for row in (pair.a, pair.b)]
    pooled = statistics.pool(
        (spread.counted, spread.sd)
        for spread in spreads((_runs(row), row.deviation) for row in rows)
        if spread.sd is not None
    )
    tests = [statistics.compare(b, a, pooled) for a, b in samples]
    pairs = tuple(
        replace(pair, chance=test, corrected=corrected)
        for pair, test, corrected in zip(found.pairs, tests, statistics.correct(tests), strict=True)
    )
    return replace(found, pairs=pairs)


def _runs(row: Row) -> list[str]:
    """What tells the runs of a row from those of others."""
    return [f"{record.spec.key} {record.top1}" for record in row.ok]


def accuracies_by_seed(row: Row) -> dict[int, float]:
    """Accuracy in percent of each `ok` seed."""
    return {record.spec.seed: record.top1 for record in row.ok if record.top1 is not None}
