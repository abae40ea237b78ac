"""Records for the papers' tables, made without training: one suite that asks for every cell.

A cell's seeds lie around the published figure, or around 90 where there is none, each cell with an
offset of its own so that no two means agree by chance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from bench.record import Counts, Record
from bench.spec import BudgetSpec, CellSpec
from reports.aggregate import aggregate
from reports.fields import FIELDS
from reports.grid import Found
from reports.matching import questions
from reports.specs import Question, TableSpec
from tests.reports.records import manifest, record, spec

PARAMETERS, PRUNABLE, MACS = 25_557_032, 23_454_912, 4_089_184_256
"""Of ResNet-50, whose reached ratios the paper prints."""


def cell(question: Question, dataset: str, seed: int, **more: object) -> CellSpec:
    """The cell that a question looks for, by the paper's protocol."""
    trained = question.trained
    fields = {
        "model": question.name,
        "model_options": question.model_options,
        "options": question.options,
        "dataset": dataset,
        "recipe": (trained and trained.recipe) or "plain",
        "budget": (trained and trained.budget) or BudgetSpec(epochs=10),
        "prunable": question.filters.prunable or "all",
    }
    return spec(question.method, question.sparsity, seed, **fields | more)


def counts(sparsity: float) -> Counts:
    """Counts of ResNet-50 that reached this sparsity of its convolutions exactly."""
    left = round(PRUNABLE * (1 - sparsity))
    nonzero = PARAMETERS - PRUNABLE + left
    macs = round(MACS * (1 - sparsity))
    return Counts(PARAMETERS, nonzero, PRUNABLE, left, left, 0, MACS, macs)


def measured(question: Question, of: CellSpec, number: int) -> Record:
    """The record of a cell; `number` tells the questions of a table apart."""
    published = question.published
    text = published and FIELDS["accuracy"].published(published)
    top1 = float(text or 90) + number / 1000 + (of.seed - 1) / 10
    multiple = 1 + float(dict(of.options).get("finetune", 0))
    top5 = min(99.99, top1 + 17)
    return record(of, top1, top5=top5, counts=counts(of.sparsity or 0), multiple=multiple)


def everything(table: TableSpec, seeds: int = 3, **more: object) -> list[Record]:
    """A record for each seed of each cell that we have a method for."""
    asked: dict[str, Record] = {}
    for number, question in enumerate(q for q in questions(table) if q.method):
        for seed in range(seeds):
            of = cell(question, table.dataset, seed, **more)
            asked.setdefault(of.key, measured(question, of, number))
    return list(asked.values())


def found(
    records: Iterable[Record], missing: Iterable[CellSpec] = (), suite: str = "demo"
) -> Found:
    """A suite that asks for these records' cells, and for some that have none."""
    known = list(records)
    asked = manifest(*(one.spec for one in known), *missing)
    return Found(suite, aggregate(asked, known).rows)


def with_trouble(records: list[Record]) -> Found:
    """The same, but of the second row all seeds diverged, of the third one, and so on.

    Row by row: fine; all diverged; one diverged; one invalid; not run; one seed missing; fine.
    """
    rows = list(aggregate(manifest(*(one.spec for one in records)), records).rows)
    lost = {"status": "diverged", "reason": "the loss is not finite", "top1": None}

    def changed(row: int, seeds: Iterable[int], **more: object) -> None:
        found = list(rows[row].records)
        for seed in seeds:
            found[seed] = dataclasses.replace(found[seed], **more)
        rows[row] = dataclasses.replace(rows[row], records=tuple(found))

    changed(1, range(3), **lost)
    changed(2, [1], **lost)
    changed(3, [2], status="invalid", reason="5 weights left, 4 asked for")
    rows[4] = dataclasses.replace(rows[4], records=(None,) * 3)
    rows[5] = dataclasses.replace(rows[5], records=(*rows[5].records[:2], None))
    return Found("demo", tuple(rows))
