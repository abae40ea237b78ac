"""What differs between a published figure's protocol and ours: as marked before, and as run."""

from __future__ import annotations

from collections.abc import Iterator

from bench.spec import BudgetSpec
from reports.aggregate import Row
from reports.specs import Question, TableSpec


def reasons(spec: TableSpec, question: Question, row: Row | None) -> Iterator[str]:
    """Why a published figure and ours do not follow the same protocol; nothing where they do.

    Args:
        spec: the table.
        question: a cell of it, with its published figure and the mark that this was given.
        row: our answer; one that was run for another length than the paper says so itself.
    """
    cell, trained = question.published, question.trained
    if cell is not None and cell.differs and spec.paper:
        yield spec.paper.differences[cell.differs]
    if row is None or not row.finished or trained is None:
        return
    ours, paper = row.spec, spec.table
    if trained.recipe and ours.recipe != trained.recipe:
        yield f"recipe {ours.recipe}, the paper's is {trained.recipe}"
    if trained.budget and ours.budget != trained.budget:
        yield budget(ours.budget, trained.budget)
    if paper and paper.prunable and ours.prunable not in paper.prunable:
        yield f"prunable weights: {ours.prunable}, the paper's are {' or '.join(paper.prunable)}"
    if ours.init != "random":
        yield f"initial weights: {ours.init}, the paper's are random"


def budget(ours: BudgetSpec, theirs: BudgetSpec) -> str:
    """How two lengths differ; which is shorter is known only of epochs, or of steps, in both."""
    pairs = ((ours.epochs, theirs.epochs), (ours.steps, theirs.steps))
    kinds = ["shorter" if one < other else "longer" for one, other in pairs if one and other]
    kind = kinds[0] if kinds else "another"
    return f"{kind} budget: {length(ours)}, the paper's is {length(theirs)}"


def length(budget: BudgetSpec) -> str:
    """A budget in words."""
    return f"{budget.steps:,} steps" if budget.epochs is None else f"{budget.epochs:g} epochs"
