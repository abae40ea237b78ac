"""What one cell measured: value objects, read and written as JSON. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from bench.errors import RecordError, SuiteError
from bench.spec import CellSpec

SCHEMA = 1

Status = Literal["ok", "diverged", "invalid", "failed"]
FINAL: tuple[Status, ...] = ("ok", "diverged", "invalid")
"""Statuses that answer the question. A `failed` cell is kept aside and run again next time."""


@dataclass(frozen=True, slots=True)
class LayerCount:
    """One weight of the finished network: its size, non-zeros, and MACs for one image."""

    name: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    dense_macs: int
    macs: int
    prunable: bool


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
    """

    parameters: int
    nonzero: int
    prunable: int
    target_nonzero: int | None
    prunable_nonzero: int
    idle: int
    dense_macs: int
    macs: int
    dead: tuple[str, ...] = ()

    @property
    def reached_sparsity(self) -> float:
        """Fraction of zeros among the prunable weights."""
        return 1 - self.prunable_nonzero / self.prunable


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """One phase as it was trained.

    Attributes:
        density: of the masks after its last step; None where a penalty decides. What `finish` does
            comes later and shows in the counts.
    """

    name: str
    steps: int
    density: float | None


class CurvePoint(msgspec.Struct, frozen=True, array_like=True):
    """Mean training loss since the last point; validation figures where there is a split.

    Written as a JSON array: a record holds some 200 of them.
    """

    step: int
    train_loss: float
    validation_loss: float | None = None
    validation_top1: float | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of wall-clock, summed over all attempts that a resumed cell took.

    Attributes:
        train_seconds: training steps with their data and mask updates; no evaluation.
        update_seconds: the part of it spent in the method's cold hooks.
        eval_seconds: validation and test.
        started: UTC, ISO 8601.
    """

    train_seconds: float
    update_seconds: float
    eval_seconds: float
    started: str


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a cell ran. `commit` is the harness's; `dirty` says that files differed from it."""

    device: str
    threads: int
    platform: str
    python: str
    torch: str
    sparsebench: str
    commit: str
    dirty: bool
    peak_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """What one cell measured. Written once, never edited.

    Attributes:
        top1: test accuracy in percent of the finished network after the last step; never the best
            epoch. top5 likewise, for more than 5 classes.
        steps: optimizer steps over all phases.
        extra_batches: batches that the method computed besides (scores, growth).
        multiple: (steps + extra_batches) / steps of the budget.
        weights_hash: of the finished network's parameters and buffers.
    """

    schema: int
    suite: str
    label: str
    spec: CellSpec
    status: Status
    environment: Environment
    times: Times
    reason: str = ""
    top1: float | None = None
    top5: float | None = None
    test_loss: float | None = None
    counts: Counts | None = None
    layers: tuple[LayerCount, ...] = ()
    steps: int = 0
    extra_batches: int = 0
    multiple: float = 0.0
    phases: tuple[PhaseResult, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    weights_hash: str = ""
    traceback: str = ""


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
            raise RecordError(
                f"{where}: schema {schema}, but this version reads {SCHEMA}. {advice}"
            )
        return msgspec.convert(raw, type=Record)
    except (msgspec.MsgspecError, SuiteError) as error:
        raise RecordError(f"{where}: damaged record ({error}). {advice}") from error
