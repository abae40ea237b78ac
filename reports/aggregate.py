"""A suite's records joined with the cells it asked for: one row per question, over its seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from bench.record import FINAL, Counts, Record, Status
from bench.spec import CellSpec, Options
from bench.store import Manifest

CellStatus = Status | Literal["missing"]


@dataclass(frozen=True, slots=True)
class Row:
    """One question with all its seeds.

    Accuracy comes from `ok` seeds alone. Sizes and times come from them too, or from every finished
    seed where none is `ok`, so that a row that went wrong still shows what it was.

    Attributes:
        label: the row's name.
        specs: one per seed asked for.
        records: the final record of each, or None where it was not run.
    """

    label: str
    specs: tuple[CellSpec, ...]
    records: tuple[Record | None, ...]

    @property
    def spec(self) -> CellSpec:
        """The question, with the first seed."""
        return self.specs[0]

    @property
    def asked(self) -> int:
        """Seeds asked for."""
        return len(self.specs)

    @property
    def finished(self) -> tuple[Record, ...]:
        """Final records, whatever their status."""
        return tuple(record for record in self.records if record is not None)

    @property
    def statuses(self) -> tuple[CellStatus, ...]:
        """Status of each seed asked for."""
        return tuple("missing" if record is None else judged(record) for record in self.records)

    @property
    def ok(self) -> tuple[Record, ...]:
        """Records whose accuracy counts."""
        return tuple(record for record in self.finished if judged(record) == "ok")

    @property
    def measured(self) -> tuple[Record, ...]:
        """Records that sizes and times are taken from."""
        return self.ok or self.finished

    @property
    def top1(self) -> float | None:
        """Mean accuracy in percent; None where no seed is `ok`."""
        return mean(accuracies(self))

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1) of the accuracy; None below two seeds."""
        values = accuracies(self)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def reached_sparsity(self) -> float | None:
        """Fraction of zeros among the prunable weights."""
        return mean_count(self, lambda counts: counts.reached_sparsity)

    @property
    def total_sparsity(self) -> float | None:
        """Fraction of zeros among all parameters."""
        return mean_count(self, lambda counts: 1 - counts.nonzero / counts.parameters)

    @property
    def nonzero(self) -> float | None:
        """Parameters left, of all parameters."""
        return mean_count(self, lambda counts: counts.nonzero)

    @property
    def macs(self) -> float | None:
        """Multiply-adds left for one image."""
        return mean_count(self, lambda counts: counts.macs)

    @property
    def macs_fraction(self) -> float | None:
        """Multiply-adds left as a fraction of those of the dense network."""
        return mean_count(self, lambda counts: counts.macs / counts.dense_macs)

    @property
    def dead(self) -> tuple[str, ...]:
        """Layers that were emptied in any finished seed."""
        names = (name for record in self.finished if record.counts for name in record.counts.dead)
        return tuple(dict.fromkeys(names))

    @property
    def train_seconds(self) -> float | None:
        """Seconds of training for one seed."""
        return mean([record.times.train_seconds for record in self.measured])

    @property
    def multiple(self) -> float | None:
        """Batches that training took, over those of the budget."""
        return mean([record.multiple for record in self.measured])


@dataclass(frozen=True, slots=True)
class Results:
    """All rows of a suite, in the order in which it asks for them.

    Attributes:
        rows: one per question.
        stale: final records in the folder that the suite no longer asks for.
    """

    rows: tuple[Row, ...]
    stale: int


def aggregate(manifest: Manifest, records: Iterable[Record]) -> Results:
    """Joins the cells that a suite asks for with its records, by key."""
    found = {record.spec.key: record for record in records if record.status in FINAL}
    questions: dict[tuple[str, CellSpec], list[CellSpec]] = {}
    for cell in manifest.cells:
        question = (cell.label, dataclasses.replace(cell.spec, seed=0))
        questions.setdefault(question, []).append(cell.spec)
    rows = tuple(
        Row(label, tuple(specs), tuple(found.get(spec.key) for spec in specs))
        for (label, _), specs in questions.items()
    )
    return Results(rows, len(found.keys() - {cell.spec.key for cell in manifest.cells}))


def judged(record: Record) -> Status:
    """Status of a record; one without a finite accuracy is not `ok`, whatever it says."""
    if record.status == "ok" and (record.top1 is None or not math.isfinite(record.top1)):
        return "invalid"
    return record.status


def accuracies(row: Row) -> list[float]:
    """Accuracy in percent of each `ok` seed."""
    return [record.top1 for record in row.ok if record.top1 is not None]


def mean(values: list[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return statistics.fmean(values) if values else None


def mean_count(row: Row, value: Callable[[Counts], float]) -> float | None:
    """Mean of a counted value over the measured seeds that have counts."""
    return mean([value(record.counts) for record in row.measured if record.counts is not None])


def asked_text(spec: CellSpec) -> str:
    """The sparsity in percent that the cell asks for; `penalty` where it cannot ask."""
    return "penalty" if spec.sparsity is None else f"{100 * spec.sparsity:.6g}"


def model_text(spec: CellSpec) -> str:
    """The model as tables name it, such as `resnet20 (width=2)`."""
    options = options_text(spec.model_options)
    return f"{spec.model} ({options})" if options else spec.model


def budget_text(spec: CellSpec) -> str:
    """The budget as tables name it, such as `30 epochs`."""
    budget = spec.budget
    return f"{budget.steps} steps" if budget.epochs is None else f"{budget.epochs:g} epochs"


def options_text(options: Options) -> str:
    """Options as tables name them, such as `every=100, scope=erk`."""
    return ", ".join(f"{name}={value}" for name, value in options)


def name_text(row: Row) -> str:
    """A row as footnotes and messages name it, such as `rigl, resnet20, 95 %`."""
    unit = "" if row.spec.sparsity is None else " %"
    return f"{row.label}, {model_text(row.spec)}, {asked_text(row.spec)}{unit}"
