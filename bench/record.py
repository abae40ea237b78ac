"""What one cell measured: value objects, read and written as JSON. No torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from bench.errors import RecordError, SuiteError
from bench.spec import CellSpec
from methods.allocation import keep_count

SCHEMA = 1

# Records come from other people too: what is read of them must be fit to compute with.
Count = Annotated[int, msgspec.Meta(ge=0, le=10**18)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=10**18)]
Few = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e100)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]
FileName = Annotated[str, msgspec.Meta(pattern=r"^[^/\\\x00-\x1f]+\Z", max_length=100)]
SUITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Status = Literal[
    "ok", "diverged", "invalid", "skipped", "failed", "lost", "out-of-memory", "timeout"
]
"""What became of a cell.

- `ok`: measured.
- `diverged`: a loss that is not finite, or an accuracy no better than chance.
- `invalid`: it broke a rule of measurement: density or masks off, or not the plain network.
- `skipped`: it cannot be run, and the reason is only known once it was tried.
- `failed`: an error, with its traceback.
- `lost`: the process or machine that trained it is gone.
- `out-of-memory`: there was too little memory for it.
- `timeout`: it took longer than one cell may.
"""
Timing = Literal["exclusive", "shared"]
Determinism = Literal["strict", "fast"]
FINAL: tuple[Status, ...] = ("ok", "diverged", "invalid", "skipped")
"""Statuses that answer the question. Others are kept aside, and the cell runs again next time."""


MOST_OF_REASON, MOST_OF_TRACEBACK = 500, 20_000
"""Characters that are kept; both ends of what is longer."""


def told(error: BaseException) -> str:
    """An error in words, whatever it is: its class, and what it says, if it can say it."""
    kind = type(error).__name__
    try:
        text = str(error)
    except BaseException as another:
        return f"{kind}, whose text raises {type(another).__name__}"
    return f"{kind}: {text}" if text else kind


def one_line(text: str) -> str:
    """A reason as anybody can read it: short, printable, without line breaks or double spaces."""
    text = printable(_shortened(_spaced(text), MOST_OF_REASON))
    return _spaced(_shortened(text, MOST_OF_REASON))  # what is cut at a space has two


def _spaced(text: str) -> str:
    return " ".join(text.split())


def printable(text: str) -> str:
    """Text with everything escaped that is neither printable nor the end of a line.

    Methods' errors may hold anything: a terminal obeys what it is sent, and what is not Unicode
    cannot be written.
    """
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _shortened(text: str, most: int) -> str:
    gap = " ... "
    half = (most - len(gap)) // 2
    return text if len(text) <= most else f"{text[:half]}{gap}{text[-half:]}"


@dataclass(frozen=True, slots=True)
class LayerCount:
    """One weight of the finished network: its size, non-zeros, and MACs for one image.

    Attributes:
        live: non-zeros on a path of non-zeros from the image to an output (`bench.liveness`); None
            where that was not counted.
        live_units: outputs (filters) and inputs (channels) of the layer with such a weight.
        elementwise: what convention B adds for the normalisation and activations of its output.
    """

    name: str
    shape: tuple[Count, ...]
    weights: Count
    nonzero: Count
    dense_macs: Count
    macs: Count
    prunable: bool
    live: Count | None = None
    live_units: tuple[Count, Count] | None = None
    elementwise: Count = 0


@dataclass(frozen=True, slots=True)
class Compact:
    """The network once its dead channels are cut out, as `sparsebench export --compact` does.

    Attributes:
        parameters: of the smaller network, zeros that stay in it included.
        dense_macs: multiply-adds for one image with every weight of it, by convention A.
    """

    parameters: Count
    dense_macs: Count


@dataclass(frozen=True, slots=True)
class Counts:
    """Counted on the finished plain network by code that does not know the method.

    Attributes:
        parameters: every parameter, biases and normalisation included.
        nonzero: those of them that are not zero.
        prunable: weights that the preset and the method allow to prune.
        target_nonzero: how many of those were asked to remain; None for penalty-driven methods.
        prunable_nonzero: how many remain.
        idle: remaining weights that were grown and never got a gradient (magnitude of at most
            `methods.masking.GROWN`); they are part of `prunable_nonzero`.
        dense_macs: multiply-adds for one image with every weight (convention A: convolutions,
            linear layers and attention products; no biases, normalisation or activations).
        macs: multiply-adds for one image with a non-zero weight.
        dead: prunable weights that were emptied.
        filters: (all, asked to remain, remaining) filters of the prunable weights; None but for
            filter methods.
        elementwise: what convention B adds to either count of MACs: two operations for each output
            of a normalisation, one for each of a ReLU or its kind.
        live: remaining prunable weights on a path of non-zeros from the image to an output.
        live_macs: multiply-adds for one image with a weight, prunable or not, on such a path.
        compact: the network without its dead channels; None where it cannot be cut.
    """

    parameters: Positive
    nonzero: Count
    prunable: Positive
    target_nonzero: Count | None
    prunable_nonzero: Count
    idle: Count
    dense_macs: Positive
    macs: Count
    dead: tuple[str, ...] = ()
    filters: tuple[Count, Count, Count] | None = None
    elementwise: Count | None = None
    live: Count | None = None
    live_macs: Count | None = None
    compact: Compact | None = None

    @property
    def reached_sparsity(self) -> float:
        """Fraction of zeros among the prunable weights."""
        return 1 - self.prunable_nonzero / self.prunable

    @property
    def effective_sparsity(self) -> float | None:
        """Fraction of the prunable weights that are on no path from the image to an output."""
        return None if self.live is None else 1 - self.live / self.prunable


@dataclass(frozen=True, slots=True)
class Least:
    """The network of least validation loss within a phase; found afterwards, it stops nothing.

    Attributes:
        step: of the phase.
        top1: its test accuracy in percent; None until the phase has ended.
    """

    step: Count
    validation_loss: float
    top1: Percent | None = None


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """One phase as it was trained.

    Attributes:
        density: of the masks after its last step; None where a penalty decides. What `finish` does
            comes later and shows in the counts.
        total: steps of the cell up to the end of this phase.
        status: of the network at its end, for phases that are a result of their own (the rounds of
            a lottery ticket); None for others. The fields below likewise.
        least: where the validation loss was least; None if no image is held out.
        train_macs: what the phase cost in theory, see `Record`.
    """

    name: FileName
    steps: Count
    density: Amount | None
    total: Count = 0
    status: Status | None = None
    reason: str = ""
    top1: Percent | None = None
    top5: Percent | None = None
    test_loss: float | None = None
    counts: Counts | None = None
    least: Least | None = None
    train_macs: Amount | None = None


class MaskUpdate(msgspec.Struct, frozen=True, array_like=True):
    """What one update did to the masks (Lin et al., 2020, figures 4 and 7).

    Attributes:
        step: steps of the cell done.
        density: of the new masks.
        flipped: fraction of the prunable weights whose mask changed.
        iou: kept before and after, over kept before or after.
        delta: ||w - w m||^2 / ||w||^2 of the weights before the update and the masks after it.
    """

    step: Count
    density: float
    flipped: float
    iou: float
    delta: float


@dataclass(frozen=True, slots=True)
class Expected:
    """What random gates give on average, before the finished network takes fixed ones.

    Attributes:
        l0: prunable weights that are not zero.
        macs: multiply-adds for one image, by convention A.
    """

    l0: Amount
    macs: Amount


class CurvePoint(msgspec.Struct, frozen=True, array_like=True):
    """Mean training loss since the last point; validation figures where there is a split.

    Written as a JSON array: a record holds some 200 of them.
    """

    step: Count
    train_loss: float
    validation_loss: float | None = None
    validation_top1: float | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of wall-clock, summed over all attempts that a resumed cell took.

    Attributes:
        train_seconds: training steps with their data and mask updates; no evaluation.
        update_seconds: the part of it spent in the method's cold hooks.
        eval_seconds: validation and test, and watching the masks.
        started: UTC, ISO 8601.
        phases: `train_seconds` up to the end of each phase.
    """

    train_seconds: Amount
    update_seconds: Amount
    eval_seconds: Amount
    started: str
    phases: tuple[Amount, ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """By which code a part of a cell was trained, and where.

    Attributes:
        commit: of the harness, and how files differed from it, if they did.
        place: device, threads and torch's version.
    """

    commit: str
    place: str

    def __post_init__(self) -> None:
        if not f"{self.commit}{self.place}".isprintable():
            raise ValueError(f"{self.commit!r}, {self.place!r}: not one line")

    def __str__(self) -> str:
        return f"{self.commit} ({self.place})"


@dataclass(frozen=True, slots=True)
class Execution:
    """How the steps of a cell were computed; sums round differently from one way to another.

    Attributes:
        timing: `exclusive`: no other cell had the device meanwhile, as far as could be seen, so the
            seconds are the cell's own; `shared`: others had, for a part of the time at least.
        stack: cells that were computed as one batched network (`run --stack`); 1: none but this.
        graph: whether steps were replayed as a CUDA graph.
        compiled: whether `torch.compile` made the forward and backward passes.
        determinism: whether a GPU computed with algorithms that give the same bits each time
            (`strict`), as a CPU does anyway; None in records from before that was recorded.
        devices: that trained the cell together, each on a part of every batch.
        before: other code or other places by which parts of the cell were trained, before it was
            resumed by the commit and in the place of the record's environment.
    """

    timing: Timing = "exclusive"
    stack: Few = 1
    graph: bool = False
    compiled: bool = False
    determinism: Determinism | None = None
    devices: Few = 1
    before: tuple[Origin, ...] = ()


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a cell ran, as far as it can change sums. What is not known is empty.

    Attributes:
        commit: of the harness; `dirty` says that files differed from it, `changes` how: a hash.
        kind: of the device, such as `cuda`.
        torchvision: its version; `timm` and `numpy` likewise.
        cuda: version that torch was built for, `cudnn` that it loads, `driver` of the system; all
            empty for cells on a CPU.
        capability: instructions that torch chose on the CPU, such as `AVX512`, or a GPU's compute
            capability.
        settings: environment variables that choose how sums are computed.
    """

    device: str
    threads: Few
    platform: str
    python: str
    torch: str
    sparsebench: str
    commit: str
    dirty: bool
    peak_memory_bytes: int = 0
    changes: str = ""
    kind: str = ""
    torchvision: str = ""
    timm: str = ""
    numpy: str = ""
    cuda: str = ""
    cudnn: str = ""
    driver: str = ""
    capability: str = ""
    settings: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """What one cell measured. Written once, never edited.

    Attributes:
        reason: for the status; one printable line, see `one_line`. traceback: printable too.
        top1: test accuracy in percent of the finished network after the last step; never the best
            epoch. top5 likewise, for more than 5 classes.
        steps: optimizer steps over all phases.
        extra_batches: batches that the method computed besides (scores, growth).
        multiple: (steps + extra_batches) / steps of the budget; plus the source's, if it has one.
        train_macs: multiply-adds of the whole training if every zero were skipped, forward and
            backward, all images (`bench.meter`); None in records from before it was counted.
        weights_hash: of the finished network's parameters and buffers.
        expected: for methods with random gates.
        mask_updates: up to 200 of them, evenly chosen, and what else changed the masks after the
            first step: a ranking before fine-tuning, or a last one.
        last_changes: prunable weights whose mask changed for the last time in each fiftieth of the
            training; those whose mask never changed are in none.
        execution: how it was computed; None in records from before that was recorded.
    """

    schema: int
    suite: str
    label: str
    spec: CellSpec
    status: Status
    environment: Environment
    times: Times
    reason: str = ""
    top1: Percent | None = None
    top5: Percent | None = None
    test_loss: float | None = None
    counts: Counts | None = None
    layers: tuple[LayerCount, ...] = ()
    steps: Count = 0
    extra_batches: Count = 0
    multiple: Amount = 0.0
    train_macs: Amount | None = None
    phases: tuple[PhaseResult, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    weights_hash: str = ""
    expected: Expected | None = None
    mask_updates: tuple[MaskUpdate, ...] = ()
    last_changes: tuple[Count, ...] = ()
    traceback: str = ""
    execution: Execution | None = None

    def __post_init__(self) -> None:
        """Has its texts fit to be shown and written, whoever made them."""
        if self.reason:
            object.__setattr__(self, "reason", one_line(self.reason))
        if self.traceback:
            text = _shortened(self.traceback.expandtabs(4), MOST_OF_TRACEBACK)
            object.__setattr__(self, "traceback", _shortened(printable(text), MOST_OF_TRACEBACK))


def landed(record: Record, sparsity: float) -> Record:
    """The record as if the cell had ended with the phase that landed on a sparsity.

    A cell of several rounds answers for every sparsity that one of them landed on. Where none did,
    because the cell diverged before, the record says so without any figure.
    """
    for index, phase in enumerate(record.phases):
        counts = phase.counts
        if counts is None or phase.status is None:
            continue
        if counts.target_nonzero == keep_count(counts.prunable, 1 - sparsity):
            times = dataclasses.replace(record.times, train_seconds=record.times.phases[index])
            return dataclasses.replace(
                record,
                status=phase.status,
                reason=phase.reason,
                top1=phase.top1,
                top5=phase.top5,
                test_loss=phase.test_loss,
                counts=counts,
                steps=phase.total,
                train_macs=_sum(phase.train_macs for phase in record.phases[: index + 1]),
                multiple=record.multiple * phase.total / record.steps,
                times=times,
            )
    return dataclasses.replace(record, top1=None, top5=None, test_loss=None, counts=None)


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum; None where a value is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def encode(record: Record) -> bytes:
    """JSON of a record on one line, keys in the order of the fields."""
    return msgspec.json.encode(record) + b"\n"


def decode(text: bytes, where: str) -> Record:
    """The record in `text`.

    Raises:
        RecordError: it is not JSON, of another schema, or has wrong fields; names `where`.
    """
    advice = "Move it away and run the suite again."
    try:
        raw = msgspec.json.decode(text)
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            origin = " (a newer sparsebench wrote it: update)" if newer else ""
            raise RecordError(
                f"{where}: schema {schema}, but this version reads {SCHEMA}{origin}. {advice}"
            )
        return agreeing(msgspec.convert(raw, type=Record))
    except (msgspec.MsgspecError, SuiteError, ValueError, RecursionError) as error:
        raise RecordError(f"{where}: damaged record ({error}). {advice}") from error


def agreeing(record: Record) -> Record:
    """A record as it was read, once its parts fit each other.

    Raises:
        ValueError: they do not, or a name is more than one line.
    """
    timed = min(len(record.times.phases), record.steps and len(record.phases))
    if any(phase.counts for phase in record.phases[timed:]):
        raise ValueError("a phase has counts, but the record has no steps, or no time of it")
    if not SUITE_NAME.fullmatch(record.suite):
        raise ValueError(f"suite = {record.suite!r} is no name")
    if not record.label.isprintable():
        raise ValueError(f"label = {record.label!r} is not one line")
    return record
