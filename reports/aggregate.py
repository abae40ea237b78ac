"""A suite's records joined with the cells it asked for: one row per question, over its seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.record import FINAL, Counts, Record, Status, landed
from bench.spec import CellSpec, Options
from bench.store import Cell, Manifest

CellStatus = Status | Literal["missing"]


@dataclass(frozen=True, slots=True)
class Row:
    """One question with all its seeds.

    Accuracy comes from `ok` seeds alone. Sizes and times come from them too, or from every finished
    seed where none is `ok`, so that a row that went wrong still shows what it was.

    Attributes:
        label: the row's name.
        specs: one per seed asked for, with the row's sparsity.
        records: the final record of each as the row sees it, or None where it was not run.
        keys: of the cells that answer it, one per seed.
        skipped: why it cannot be run; empty where it can.
        source: the row whose masks it starts from; empty for most.
        smaller: a narrower dense network stands for the sparse one.
        skips: for each seed, why it cannot be run, or nothing; empty where that is `skipped`.
    """

    label: str
    specs: tuple[CellSpec, ...]
    records: tuple[Record | None, ...]
    keys: tuple[str, ...] = ()
    skipped: str = ""
    source: str = ""
    smaller: bool = False
    skips: tuple[str, ...] = ()

    @property
    def controls_source(self) -> bool:
        """Whether the suite's `controls` have made it for its source; its label says so."""
        return bool(self.source) and self.label.startswith(f"{self.source}: ")

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
        absent: list[CellStatus] = [
            "skipped" if reason else "missing"
            for reason in self.skips or (self.skipped,) * self.asked
        ]
        pairs = zip(self.records, absent, strict=True)
        return tuple(status if record is None else judged(record) for record, status in pairs)

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
    def effective_sparsity(self) -> float | None:
        """Fraction of the prunable weights that are on no path from the image to an output."""
        return mean_count(self, lambda counts: counts.effective_sparsity)

    @property
    def compact_parameters(self) -> float | None:
        """Parameters of the network without its dead channels."""
        return mean_count(
            self, lambda counts: counts.compact.parameters if counts.compact else None
        )

    @property
    def compact_macs(self) -> float | None:
        """Multiply-adds for one image of the network without its dead channels."""
        return mean_count(
            self, lambda counts: counts.compact.dense_macs if counts.compact else None
        )

    @property
    def train_macs(self) -> float | None:
        """Multiply-adds of the whole training if every zero were skipped."""
        return mean([record.train_macs for record in self.measured])

    @property
    def dead(self) -> tuple[str, ...]:
        """Layers that were emptied in any finished seed."""
        names = (name for record in self.finished if record.counts for name in record.counts.dead)
        return tuple(dict.fromkeys(names))

    @property
    def idle(self) -> float | None:
        """Weights that are kept but hold nothing, see `Counts.idle`."""
        return mean_count(self, lambda counts: counts.idle)

    @property
    def mostly_idle(self) -> bool:
        """Whether more than a tenth of what is kept holds nothing."""
        kept = mean_count(self, lambda counts: counts.prunable_nonzero)
        return self.idle is not None and kept is not None and self.idle > kept / 10

    @property
    def of_filters(self) -> bool:
        """Whether the sparsity asked for is that of filters."""
        return any(r.counts is not None and r.counts.filters for r in self.finished)

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
    """Joins the rows that a suite asks for with its records, by key."""
    found = {record.spec.key: record for record in records if record.status in FINAL}
    keys = [cell.spec.key for cell in manifest.cells]  # a hash each
    # A control may share the cell of a row of the suite: that row is the one to name.
    named = zip(keys, (cell.label for cell in manifest.cells), strict=True)
    labels = dict(sorted(named, key=lambda pair: ": " not in pair[1]))
    questions: dict[tuple[str, CellSpec], list[tuple[str, Cell]]] = {}
    for key, cell in zip(keys, manifest.cells, strict=True):
        # Seeds of one row have sources of different keys.
        spec = dataclasses.replace(asked_spec(cell), seed=0, source=None)
        questions.setdefault((cell.label, spec), []).append((key, cell))
    rows = tuple(joined(label, asked, found, labels) for (label, _), asked in questions.items())
    return Results(rows, len(found.keys() - labels.keys()))


def joined(
    label: str,
    asked: Sequence[tuple[str, Cell]],
    found: Mapping[str, Record],
    labels: Mapping[str, str],
) -> Row:
    """One row with the records of its seeds."""
    skips = tuple(cell.skipped or why_skipped(found.get(key)) for key, cell in asked)
    first = asked[0][1]
    return Row(
        label,
        tuple(asked_spec(cell) for _, cell in asked),
        tuple(as_seen(cell, found.get(key)) for key, cell in asked),
        tuple(key for key, _ in asked),
        together(skips),
        labels.get(first.spec.source or "", ""),
        first.against is not None,
        skips,
    )


def why_skipped(record: Record | None) -> str:
    """Why a cell turned out not to be runnable once it was tried; empty where it did not."""
    if record is None or record.status != "skipped":
        return ""
    return record.reason or "its record gives no reason"


def together(skips: Sequence[str]) -> str:
    """Why none of a row's seeds can be run; empty where one can."""
    return "; ".join(dict.fromkeys(skips)) if all(skips) else ""


def asked_spec(cell: Cell) -> CellSpec:
    """The question of a row: a cell that answers several has the sparsity of this one."""
    options = tuple((name, value) for name, value in cell.spec.options if name != "also")
    return dataclasses.replace(cell.spec, sparsity=cell.asked, options=options)


def as_seen(cell: Cell, record: Record | None) -> Record | None:
    """The record as the row sees it: the round that landed there, ratios against the full width."""
    if record is None or cell.skipped or record.status == "skipped":
        return None
    if cell.against is not None:
        counts = record.counts and dataclasses.replace(
            record.counts,
            parameters=cell.against.parameters,
            prunable=cell.against.prunable,
            prunable_nonzero=cell.against.kept,
            dense_macs=cell.against.dense_macs,
        )
        return dataclasses.replace(record, counts=counts)
    return record if cell.sparsity is None else landed(record, cell.sparsity)


def judged(record: Record) -> Status:
    """Status of a record; one without a finite accuracy is not `ok`, whatever it says."""
    if record.status == "ok" and (record.top1 is None or not math.isfinite(record.top1)):
        return "invalid"
    return record.status


def accuracies(row: Row) -> list[float]:
    """Accuracy in percent of each `ok` seed."""
    return [record.top1 for record in row.ok if record.top1 is not None]


def mean(values: Sequence[float | None]) -> float | None:
    """Arithmetic mean; None of nothing, and where a value is not known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def mean_count(row: Row, value: Callable[[Counts], float | None]) -> float | None:
    """Mean of a counted value over the measured seeds that have counts."""
    return mean([value(record.counts) for record in row.measured if record.counts is not None])


def asked_text(spec: CellSpec) -> str:
    """The sparsity in percent that the cell asks for; `penalty` where it cannot ask."""
    if spec.sparsity is not None:
        return f"{100 * spec.sparsity:.6g}"
    target = dict(spec.options).get("target")
    return "penalty" if target is None else f"{100 * float(target):.6g} by top-k"


def model_text(spec: CellSpec) -> str:
    """The model as tables name it, such as `resnet20 (width=2)`."""
    options = options_text(spec.model_options)
    return f"{spec.model} ({options})" if options else spec.model


def full_model(row: Row, rows: Sequence[Row]) -> str:
    """The row's model; for a narrower network, the one that its ratios count against."""
    if not row.smaller:
        return model_text(row.spec)
    wide = [o for o in rows if not o.smaller and but_width(o) == but_width(row)]
    same = [other for other in wide if parameters(other) == parameters(row)]
    return model_text((same or wide)[0].spec) if wide else wide_model(row)


def wide_model(row: Row) -> str:
    """The row's model; of a narrower network, the one without its width."""
    if not row.smaller:
        return model_text(row.spec)
    return model_text(dataclasses.replace(row.spec, model_options=but_width(row)[1]))


def but_width(row: Row) -> tuple[str, Options]:
    """The row's model without its width."""
    spec = row.spec
    return spec.model, tuple((name, value) for name, value in spec.model_options if name != "width")


def parameters(row: Row) -> float | None:
    """Parameters of the network that the row's ratios count against."""
    return mean_count(row, lambda counts: counts.parameters)


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
