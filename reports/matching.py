"""The records that answer a table's questions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import RecordError, UsageError
from bench.record import Record
from bench.spec import CellSpec, Options
from bench.store import Cell, Manifest, Store
from reports.aggregate import Row, aggregate
from reports.fields import kept
from reports.folders import stores
from reports.papers import PaperModel
from reports.specs import Filters, Question, TableSpec

SMALL = "small_dense"
"""Method of a spec that means the narrower dense networks of suites."""


class Ambiguous(UsageError):
    """Several rows of records fit one cell of a table, and are not the same question."""


class Contradiction(RecordError):
    """Two suites hold different results of one cell."""


@dataclass(frozen=True, slots=True)
class Found:
    """What one suite has: its rows, and failed tries of its cells."""

    suite: str
    rows: tuple[Row, ...]
    attempts: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """Rows of all suites that ask one and the same, as one row; `suites` name them."""

    suites: tuple[str, ...]
    row: Row


CONDITIONS: dict[str, Callable[[CellSpec], object]] = {
    "recipe": lambda spec: spec.recipe,
    "epochs": lambda spec: spec.budget.epochs,
    "steps": lambda spec: spec.budget.steps,
    "prunable": lambda spec: spec.prunable,
    "init": lambda spec: spec.init,
}
"""What filters can ask of a question, by the filter's name."""

CONTENTS: dict[str, Callable[[CellSpec], object]] = {
    "version of the method": lambda spec: spec.method_version,
    "content of the recipe": lambda spec: spec.recipe_hash,
    "content of the data": lambda spec: spec.data_hash,
}
"""What else may differ where names are alike; only the suite can tell it."""


def read(root: Path, spec: TableSpec, suites: Sequence[str] | None = None) -> tuple[Found, ...]:
    """What the suites under `root` have for a table; records that it has no use for stay unread.

    Args:
        root: folder of all suites' records.
        spec: the table.
        suites: names of suites; None: all of them.

    Raises:
        RecordError: there are no records, or one is damaged or was edited; names the file.
    """
    sources = stores(root) if suites is None else {name: Store(root, name) for name in suites}
    found = (from_manifest(source, source.manifest(), spec) for source in sources.values())
    return tuple(one for one in found if one.rows)


def from_manifest(source: Store, manifest: Manifest, spec: TableSpec) -> Found:
    """What one suite has for a table."""
    wanted = {(q.name, q.method) for q in questions(spec)}
    cells = tuple(cell for cell in manifest.cells if _wanted(cell, spec.dataset, wanted))
    if not cells:
        return Found(source.suite, ())
    brief = not spec.needs_layers
    specs = {cell.spec.key: cell.spec for cell in cells}.values()
    records = [r for one in specs if (r := source.get(one, brief=brief)) is not None]
    attempts = source.attempts() if len(records) < len(specs) else []
    rows = aggregate(dataclasses.replace(manifest, cells=cells), records).rows
    return Found(source.suite, rows, tuple(attempts))


def questions(spec: TableSpec) -> Iterator[Question]:
    """Every question of a table, its dense baselines included."""
    for line in spec.lines:
        yield from line
    yield from spec.baselines


def asked_method(question: Question) -> str:
    """The method that a cell's question names."""
    return "dense" if question.method == SMALL else question.method


@dataclass(frozen=True, slots=True)
class Matcher:
    """Finds the row that answers a question."""

    spec: TableSpec
    found: tuple[Found, ...]

    def row(self, question: Question) -> Row | None:
        """The row, joined over suites that ask the same; None where no suite asks it.

        Raises:
            Ambiguous: several rows with records answer it and differ; says what tells them apart.
        """
        chosen = self.chosen(question, lambda row: asks_for(row.spec, question.sparsity))
        return None if chosen is None else chosen.row

    def rounds(self, question: Question) -> tuple[Row, ...]:
        """A row for each measured round of a question of any sparsity, densest first.

        Raises:
            Ambiguous: as in `row`.
        """
        chosen = self.chosen(question, lambda _: True, without_sparsity=True)
        return () if chosen is None else rounds(chosen.row)

    def chosen(
        self, question: Question, fits: Callable[[Row], bool], without_sparsity: bool = False
    ) -> Candidate | None:
        """The one candidate for a question.

        Raises:
            Ambiguous: there are several with records.
        """
        found = self.candidates(question, fits, without_sparsity)
        if len(found) > 1 and found[0].row.finished:
            raise Ambiguous(ambiguous(self.spec, question, found))
        return found[0] if found else None

    def candidates(
        self, question: Question, fits: Callable[[Row], bool], without_sparsity: bool = False
    ) -> list[Candidate]:
        """What fits: those with records, if any, and of these those that follow the protocol."""
        rows = [
            (found.suite, row)
            for found in self.found
            for row in found.rows
            if answers(row, question, self.spec.dataset, found.suite) and fits(row)
        ]
        groups: dict[object, list[tuple[str, Row]]] = {}
        for suite, row in rows:
            neutral = dataclasses.replace(row.spec, seed=0, source=None)
            if without_sparsity:
                neutral = dataclasses.replace(neutral, sparsity=None)
            groups.setdefault((neutral, row.source), []).append((suite, row))
        candidates = [joined(group) for group in groups.values()]
        run = [one for one in candidates if one.row.finished] or candidates
        return [one for one in run if follows(one.row.spec, question.trained)] or run


def follows(spec: CellSpec, trained: PaperModel | None) -> bool:
    """Whether a cell is trained by its paper's recipe, for the paper's length."""
    return trained is not None and (spec.recipe, spec.budget) == (trained.recipe, trained.budget)


def answers(row: Row, question: Question, dataset: str, suite: str) -> bool:
    """Whether a row answers a question, but for its sparsity."""
    spec, model_options = row.spec, row.spec.model_options
    if row.smaller:
        model_options = tuple(pair for pair in model_options if pair[0] != "width")
    return (
        row.smaller == (question.method == SMALL)
        and spec.method == asked_method(question)
        and (spec.model, spec.dataset) == (question.name, dataset)
        and dict(model_options) == dict(question.model_options)
        and dict(own_options(spec)) == dict(question.options)
        and passes(spec, suite, question.filters)
    )


def own_options(spec: CellSpec) -> Options:
    """Options, but for the sparsity on which a penalty's last ranking lands."""
    return tuple(pair for pair in spec.options if spec.sparsity is not None or pair[0] != "target")


def asks_for(spec: CellSpec, sparsity: float | None) -> bool:
    """Whether a cell asks for this fraction of zeros."""
    target = dict(spec.options).get("target") if spec.sparsity is None else spec.sparsity
    if sparsity is None or target is None:
        return sparsity is target
    return math.isclose(float(target), sparsity, abs_tol=1e-9)


def passes(spec: CellSpec, suite: str, filters: Filters) -> bool:
    """Whether a question has what the filters ask for."""
    asked = {name: getattr(filters, name) for name in CONDITIONS}
    return filters.suite in (None, suite) and all(
        value is None or CONDITIONS[name](spec) == value for name, value in asked.items()
    )


def joined(group: Sequence[tuple[str, Row]]) -> Candidate:
    """Rows that ask the same, each cell of theirs once, those with records first.

    Raises:
        Contradiction: two suites have different results of one cell; names both.
    """
    if len(group) == 1:
        return Candidate((group[0][0],), group[0][1])
    cells: dict[str, tuple[CellSpec, Record | None, str]] = {}
    origins: dict[str, str] = {}
    for suite, row in group:
        skips = row.skips or (row.skipped,) * row.asked
        for key, spec, record, skip in zip(row.keys, row.specs, row.records, skips, strict=True):
            # One cell of several rounds answers rows of several sparsities.
            name = f"{key} {spec.sparsity}"
            known = cells[name][1] if name in cells else None
            if known is None:
                cells[name] = spec, record, skip
                origins[name] = suite
            elif record is not None and result(known) != result(record):
                raise Contradiction(contradiction((origins[name], known), (suite, record)))
    first = group[0][1]
    reasons = [skip for _, _, skip in cells.values()]
    row = dataclasses.replace(
        first,
        specs=tuple(spec for spec, _, _ in cells.values()),
        records=tuple(record for _, record, _ in cells.values()),
        keys=tuple(name.partition(" ")[0] for name in cells),
        skipped="; ".join(dict.fromkeys(reasons)) if all(reasons) else "",
        skips=tuple(reasons),
    )
    return Candidate(tuple(dict.fromkeys(suite for suite, _ in group)), row)


def result(record: Record) -> str:
    """What a cell came to, without its seconds; two that are no number are alike."""
    return repr((record.status, record.top1, record.top5, record.counts))


def contradiction(*told: tuple[str, Record]) -> str:
    """Which records of one cell differ, and what to do."""
    texts = [
        f"{suite}/{record.spec.slug}.json ({record.status}"
        f"{'' if record.top1 is None else f', top-1 {record.top1:.6g} %'})"
        for suite, record in told
    ]
    return (
        f"{' and '.join(texts)}: two different results of one cell. "
        "Name one suite to report on, or say which in [filters] of the spec: suite."
    )


def rounds(row: Row) -> tuple[Row, ...]:
    """One row for each number of weights that a measured phase had left, the most first."""
    records = {record.spec.key: record for record in row.finished}
    found: dict[int, dict[int, Record]] = {}
    for record in records.values():
        for index, phase in enumerate(record.phases):
            if phase.status is not None and phase.counts is not None:
                one = as_of(record, index)
                found.setdefault(kept(one), {}).setdefault(one.spec.seed, one)
    return tuple(
        dataclasses.replace(
            row,
            specs=tuple(record.spec for record in by_seed.values()),
            records=tuple(by_seed.values()),
            keys=tuple(record.spec.key for record in by_seed.values()),
            skipped="",
            skips=(),
        )
        for _, by_seed in sorted(found.items(), reverse=True)
    )


def as_of(record: Record, index: int) -> Record:
    """The record as if the cell had ended with its phase `index`."""
    phase = record.phases[index]
    return dataclasses.replace(
        record,
        status=phase.status or record.status,
        reason=phase.reason,
        top1=phase.top1,
        top5=phase.top5,
        counts=phase.counts,
        phases=record.phases[: index + 1],
        steps=phase.total,
        multiple=record.multiple * phase.total / record.steps if record.steps else record.multiple,
    )


def ambiguous(spec: TableSpec, question: Question, candidates: Sequence[Candidate]) -> str:
    """Why no row can be chosen, and what to add to the filters."""
    specs = [one.row.spec for one in candidates]
    known = {**CONDITIONS, **CONTENTS}
    differ = [name for name, value in known.items() if len({value(s) for s in specs}) > 1]
    texts = []
    for one in candidates:
        values = [(name, known[name](one.row.spec)) for name in differ]
        said = [f"{name} {value}" for name, value in values if value is not None]
        texts.append(", ".join([f"suite {'+'.join(one.suites)}", *said]))
    tell = [name for name in ("suite", *CONDITIONS) if name == "suite" or name in differ]
    place = ", ".join(filter(None, (question.column, question.model, question.target)))
    return (
        f"{spec.where}: {place}: several rows of records fit ({'; '.join(texts)}). "
        f"Say which in [filters] of the spec: {', '.join(tell)}; or name one suite to report on."
    )


def unused(found: Iterable[Found], used: Iterable[Row]) -> list[Row]:
    """Rows with records that stand in no cell of the table."""
    shown = {record.spec.key for row in used for record in row.finished}
    return [
        row
        for one in found
        for row in one.rows
        if row.finished and not any(record.spec.key in shown for record in row.finished)
    ]


def _wanted(cell: Cell, dataset: str, wanted: set[tuple[str, str]]) -> bool:
    method = cell.spec.method if cell.against is None else SMALL
    return cell.spec.dataset == dataset and (cell.spec.model, method) in wanted
