"""What a table can show of a cell: one measured figure each, and its like in a paper."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from bench.record import LayerCount, Least, PhaseResult, Record
from reports.aggregate import Row
from reports.papers import PublishedCell

Value = Callable[[Record, Record], float | None]
"""A figure of a record, and of the dense one of its seed where `of` is not `row`."""


@dataclass(frozen=True, slots=True)
class Field:
    """One figure.

    Attributes:
        header: of its column.
        value: of one seed; None where it was not measured.
        published: the text of its like in a paper; empty where there is none.
        form: how one is written; empty: with the digits of the table.
        better: which of several is best; empty: none is.
        of: whose figure it is: the row's own, its dense network's, or both's of the same seed.
        counted: known of seeds that are not `ok`, too, and shown without a deviation.
        deviates: a paper's deviation belongs to it.
        layers: it needs the records' layers, which brief ones lack.
        words: a text instead of a number.
        percent: it lies between 0 and 100.
        pooled: its noise is that of a table's accuracies, in points.
    """

    header: str
    value: Value
    published: Callable[[PublishedCell], str]
    form: str = ""
    better: Literal["higher", "lower", ""] = ""
    of: Literal["row", "dense", "both"] = "row"
    counted: bool = False
    deviates: bool = False
    layers: bool = False
    words: Callable[[Sequence[Record]], str] | None = None
    percent: bool = False
    pooled: bool = False

    def samples(self, row: Row | None, dense: Row | None) -> dict[int, float]:
        """The figure of each seed that has it."""
        own, base = self.by_seed(row), self.by_seed(dense)
        pairs = {
            "row": {seed: (record, record) for seed, record in own.items()},
            "dense": {seed: (record, record) for seed, record in base.items()},
            "both": {seed: (own[seed], base[seed]) for seed in own if seed in base},
        }[self.of]
        values = {seed: self.value(*pair) for seed, pair in pairs.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def by_seed(self, row: Row | None) -> dict[int, Record]:
        """The records that it is taken from."""
        records = () if row is None else row.measured if self.counted else row.ok
        return {record.spec.seed: record for record in records}


def error(record: Record, _: Record) -> float | None:
    """Percent of the test images that are told wrong."""
    return None if record.top1 is None else 100 - record.top1


def apart(header: str, figure: Literal["top1", "top5"]) -> Field:
    """An accuracy less the dense network's."""

    def value(record: Record, dense: Record) -> float | None:
        own, base = getattr(record, figure), getattr(dense, figure)
        return None if own is None or base is None else own - base

    def published(cell: PublishedCell) -> str:
        return less(getattr(cell, figure), getattr(cell, f"dense_{figure}"))

    return Field(header, value, published, form="+.2f", better="higher", of="both")


def reached(record: Record, _: Record) -> float | None:
    """Percent of all parameters that are zero: biases and normalisation count."""
    counts = record.counts
    return None if counts is None else 100 * (1 - counts.nonzero / counts.parameters)


def remaining(record: Record, _: Record) -> float | None:
    """P_m: percent of all weights that masks keep; those that are never pruned count.

    Source: Frankle & Carbin, 2019, section 2; biases and normalisation do not count.
    """
    counts, weights = record.counts, sum(layer.weights for layer in record.layers)
    if counts is None or not weights:
        return None
    pruned = counts.prunable - kept(record)
    return 100 * (1 - pruned / weights)


def kept(record: Record) -> int:
    """Prunable weights that the masks of the last phase keep."""
    assert record.counts is not None
    phase = last(record)
    density = phase.density if phase else None
    return (
        record.counts.prunable_nonzero
        if density is None
        else round(density * record.counts.prunable)
    )


def last(record: Record) -> PhaseResult | None:
    """The phase with which the cell ended, or the row's round: a ticket's record has later ones."""
    ended = [phase for phase in record.phases if phase.total <= record.steps]
    return ended[-1] if ended else None


def early_step(record: Record, _: Record) -> float | None:
    """Step of least validation loss in the last phase."""
    phase = last(record)
    return phase.least.step if phase and phase.least else None


def early_accuracy(record: Record, _: Record) -> float | None:
    """Test accuracy at that step."""
    phase = last(record)
    return phase.least.top1 if phase and phase.least else None


def first_early(record: Record) -> Least | None:
    """Early stopping in a ticket's first round, which is the dense network's training."""
    return next((phase.least for phase in record.phases if phase.least), None)


def gain(record: Record, _: Record) -> float | None:
    """Accuracy of a ticket's round less that of its first, the dense network's, at those steps."""
    own, first = early_accuracy(record, record), first_early(record)
    return None if own is None or first is None or first.top1 is None else own - first.top1


def earlier(record: Record, _: Record) -> float | None:
    """Percent of its first round's steps by which a ticket's round is sooner at early stopping."""
    own, first = early_step(record, record), first_early(record)
    return None if own is None or first is None or not first.step else 100 * (1 - own / first.step)


def compression(record: Record, _: Record) -> float | None:
    """Prunable weights over those that are not zero."""
    counts = record.counts
    left = counts.prunable_nonzero if counts else 0
    return counts.prunable / left if counts and left else None


def parameters(record: Record, _: Record) -> float | None:
    """Millions of parameters that are not zero."""
    return None if record.counts is None else record.counts.nonzero / 1e6


def macs(record: Record, _: Record) -> float | None:
    """Multiply-adds left for one image."""
    return None if record.counts is None else record.counts.macs


def expected_macs(record: Record, _: Record) -> float | None:
    """Multiply-adds for one image that random gates leave on average."""
    return None if record.expected is None else record.expected.macs


def architecture(records: Sequence[Record]) -> str:
    """Units that each layer has left, such as `219-214-100`; the mean over seeds.

    As Louizos et al. (2018) write it: inputs of linear layers, filters of convolutions.
    """
    found = [[units(layer) for layer in record.layers if layer.prunable] for record in records]
    known = [[n for n in layers if n is not None] for layers in found if None not in layers]
    if not known or not known[0]:
        return ""
    return "-".join(f"{statistics.fmean(column):.0f}" for column in zip(*known, strict=True))


def units(layer: LayerCount) -> int | None:
    """Inputs of a linear layer, filters of a convolution, that live; None where not counted."""
    if layer.live_units is None:
        return None
    filters, inputs = layer.live_units
    return inputs if len(layer.shape) == 2 else filters


def less(first: str, second: str) -> str:
    """The difference of two published figures, with all of their digits."""
    return f"{Decimal(first) - Decimal(second):+}" if first and second else ""


def other(percent: str) -> str:
    """An accuracy that was published as an error, or the other way round."""
    return str(100 - Decimal(percent)) if percent else ""


FIELDS: dict[str, Field] = {
    "accuracy": Field(
        "top-1 %",
        lambda record, _: record.top1,
        lambda cell: cell.top1 or other(cell.error),
        better="higher",
        deviates=True,
        percent=True,
        pooled=True,
    ),
    "error": Field(
        "error %",
        error,
        lambda c: c.error or other(c.top1),
        better="lower",
        deviates=True,
        percent=True,
        pooled=True,
    ),
    "dense": Field(
        "dense top-1 %",
        lambda record, _: record.top1,
        lambda c: c.dense_top1,
        of="dense",
        percent=True,
        pooled=True,
    ),
    "difference": apart("difference", "top1"),
    "top5": Field(
        "top-5 %", lambda record, _: record.top5, lambda c: c.top5, better="higher", percent=True
    ),
    "dense_top5": Field(
        "dense top-5 %",
        lambda record, _: record.top5,
        lambda c: c.dense_top5,
        of="dense",
        percent=True,
    ),
    "difference_top5": apart("difference of top-5", "top5"),
    "reached": Field(
        "reached ratio %", reached, lambda c: c.reached.removesuffix("%"), ".1f", counted=True
    ),
    "parameters": Field(
        "parameters left, millions", parameters, lambda c: c.parameters, ".2f", counted=True
    ),
    "macs": Field("MACs left", macs, lambda _: "", ",.0f", counted=True),
    "expected_macs": Field("MACs expected", expected_macs, lambda _: "", ",.0f", counted=True),
    "architecture": Field(
        "architecture",
        lambda *_: None,
        lambda c: c.architecture,
        counted=True,
        layers=True,
        words=architecture,
    ),
    "remaining": Field("P_m %", remaining, lambda _: "", ".1f", counted=True, layers=True),
    "early_step": Field("early-stopping iteration", early_step, lambda _: "", ",.0f"),
    "early_accuracy": Field("top-1 % there", early_accuracy, lambda _: "", percent=True),
    "gain": Field("gain at early stopping", gain, lambda c: c.gain, "+.2f", better="higher"),
    "earlier": Field("earlier than dense, %", earlier, lambda c: c.earlier, ".0f", better="higher"),
    "compression": Field(
        "compression", compression, lambda c: c.compression, ".0f", better="higher", counted=True
    ),
    "multiple": Field(
        "budget multiple", lambda record, _: record.multiple, lambda _: "", ".2f", counted=True
    ),
}
"""Every figure that a table's spec may name."""
