"""The rows that `controls = true` adds to a suite: each method beside its controls."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.errors import SuiteError
from bench.prunable import promised
from bench.store import Cell
from bench.suite import Question
from methods import STAND_INS
from methods.api import SparsityMethod
from methods.controls import OMITTED, mask_controls

DENSE, SMALL = "dense", "small_dense"

Resolve = Callable[[Question, Cell | None], Cell]
"""The cell of a question, given that of its source."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A row that the suite itself asks for, with one seed.

    Attributes:
        method: of the question; of a stand-in, that of its cell.
        all_layers: whether the method prunes every layer that the suite's preset counts.
    """

    question: Question
    method: SparsityMethod
    cell: Cell
    all_layers: bool

    @property
    def sparse(self) -> bool:
        """Whether it is to be compared with anything: dense networks are not."""
        return self.question.method not in STAND_INS and self.method.controls != "none"

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros that it is to end with; None where nobody knows it beforehand."""
        if self.method.controls == "density":
            return self.question.sparsity
        density = promised(self.method, None)
        return None if density is None else round(1 - density, 12)

    @property
    def without_masks(self) -> str:
        """Why a sparse row has dense controls at most; empty where it has all."""
        dense = f"{DENSE} and {SMALL}" if self.sparsity else DENSE
        if self.question.source is not None:
            return f"starts from another row, so it is a control itself: only {dense}"
        if self.method.controls == "filters":
            return f"takes filters, not weights: only {dense}"
        if self.method.controls == "penalty":
            return f"a penalty decides its masks: only {dense}"
        return "" if self.all_layers else f"leaves out layers that its controls prune: only {dense}"


@dataclass(frozen=True, slots=True)
class Joined:
    """A suite's rows and their controls.

    Attributes:
        cells: in the table's order: dense ones, then each label's own and its controls.
        added: keys of the cells that only controls ask for.
        notes: which rows have fewer controls, and why.
    """

    cells: tuple[Cell, ...]
    added: frozenset[str]
    notes: tuple[str, ...]


def join(rows: Sequence[Asked], resolve: Resolve) -> Joined:
    """Adds the controls of every sparse row; one that the suite or another row has is not repeated.

    Raises:
        SuiteError: a label of the suite is that of a control, or a control cannot run.
    """
    labels = {row.question.label: row.question for row in rows}
    cells = list(_dense(rows, labels, resolve))
    for _, group in itertools.groupby(rows, key=lambda row: row.question.label):
        same = list(group)
        controls: dict[str, list[Cell]] = {}
        for row in same:
            for question in _masked(row):
                _check_label(question, labels)
                cell = resolve(question, row.cell if question.source else None)
                controls.setdefault(question.label, []).append(cell)
        cells += [row.cell for row in same]
        cells += itertools.chain.from_iterable(controls.values())
    added = {cell.spec.key for cell in cells} - {row.cell.spec.key for row in rows}
    return Joined(tuple(cells), frozenset(added), tuple(_notes(rows)))


def _dense(
    rows: Sequence[Asked], labels: Mapping[str, Question], resolve: Resolve
) -> Iterator[Cell]:
    """The dense network of each model, seed and budget, and a small one for each sparsity."""
    found = {(row.cell.spec.key, row.cell.asked) for row in rows}
    questions = [q for label in (DENSE, SMALL) for row in rows for q in _beside(row, label)]
    # Two rows differ in what a dense network does not know of; a dictionary has no hash.
    for question in {repr(_changed(q, where="", max_multiple=0)): q for q in questions}.values():
        cell = resolve(question, None)
        if (cell.spec.key, cell.asked) not in found:
            _check_label(question, labels)
            yield cell


def _beside(row: Asked, label: str) -> Iterator[Question]:
    """The dense network that a row is compared with, of full width or small."""
    sparsity = 0.0 if label == DENSE else row.sparsity
    if row.sparse and (label == DENSE or sparsity):
        yield _changed(row.question, label=label, method=label, options={}, sparsity=sparsity)


def _masked(row: Asked) -> Iterator[Question]:
    """The controls that a row's masks make; none where nothing is pruned."""
    question = row.question
    if not row.sparse or row.without_masks or not row.sparsity:
        return
    for control in mask_controls(question.method, getattr(row.method, "scope", None)):
        yield _changed(
            question,
            label=f"{question.label}: {control.name}",
            method=control.method,
            options=dict(control.options),
            source=question.label if control.from_source else None,
        )


def _changed(question: Question, **changes: Any) -> Question:
    where = f"{question.where} (controls)"
    return dataclasses.replace(question, **({"where": where, "source": None} | changes))


def _check_label(question: Question, labels: Mapping[str, Question]) -> None:
    own = labels.get(question.label)
    if own and (own.method != question.method or question.label not in (DENSE, SMALL)):
        raise SuiteError(
            f"{own.where}: {question.label!r} is the label of a control that the suite adds; "
            "choose another."
        )


def _notes(rows: Sequence[Asked]) -> Iterator[str]:
    labels: dict[str, dict[str, None]] = {}
    for row in rows:
        _, repeats = OMITTED.get(row.question.method, ((), ""))
        if row.sparse and (reason := row.without_masks or repeats):
            labels.setdefault(reason, {})[row.question.label] = None
    for reason, those in labels.items():
        yield f"controls: {', '.join(those)}: {reason}"
