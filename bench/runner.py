"""One cell from spec to record: build, train, bake, measure. A failure is a record too."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from bench import checkpoint
from bench.counting import count_layers, count_totals
from bench.data import to_device
from bench.environment import environment
from bench.errors import CheckpointError, ContractBroken, DataError, Diverged
from bench.evaluate import evaluate
from bench.prunable import prunable_names
from bench.recipes import Recipe
from bench.record import SCHEMA, Counts, LayerCount, Record, Status, Times
from bench.resolve import load_arrays, make_budget, make_method, make_model
from bench.store import Cell, write_atomically
from bench.trainer import Trainer
from methods.allocation import keep_count
from methods.masking import GROWN

PROGRESS_SECONDS = 0.5
CHANCE_FACTOR = 1.5
"""A final accuracy below this multiple of chance counts as diverged: the papers' `*`."""


@dataclass(frozen=True, slots=True)
class Task:
    """A cell with all that a process needs to run it.

    Attributes:
        data: folder of the data sets.
        checkpoint: file of the unfinished run; `weights`, of the finished network.
        device: as torch names it.
        checkpoint_seconds: wall-clock between checkpoints.
        deadline: Unix time at which to save and stop; infinity: never.
    """

    cell: Cell
    suite: str
    recipe: Recipe
    data: Path
    checkpoint: Path
    weights: Path
    device: str
    checkpoint_seconds: float
    deadline: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Steps done of a cell that is training."""

    key: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something that people should know, while the cell goes on."""

    key: str
    text: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """The deadline came; the run is saved."""

    key: str
    done: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The cell has its record."""

    key: str
    record: Record


Event = Progress | Note | Stopped | Finished


def set_up_process(threads: int) -> None:
    """Settings that a process takes before its first cell.

    Args:
        threads: of the CPU. Sums depend on it, so it is recorded; 1 gives the same bits anywhere
            on one kind of processor.
    """
    torch.set_num_threads(threads)
    # Weights that shrink to denormals make steps 2 to 3 times slower.
    torch.set_flush_denormal(True)


def run_cell(task: Task) -> Iterator[Event]:
    """Trains one cell, from its checkpoint if there is one, and measures it.

    Yields:
        Progress, then as the last event Finished, or Stopped at the deadline.
    """
    spec = task.cell.spec
    attempt = _Attempt(task)
    try:
        yield from attempt.train()
        if attempt.stopped:
            yield Stopped(spec.key, attempt.trainer.cursor.total)
            return
        record = attempt.measure()
    except Diverged as error:
        record = attempt.record("diverged", str(error))
    except ContractBroken as error:
        record = attempt.record("invalid", str(error))
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line
        record = attempt.record("failed", reason, traceback=traceback.format_exc())
    yield Finished(spec.key, record)


@dataclass
class _Attempt:
    """One try at a cell."""

    task: Task
    stopped: bool = False
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def build(self) -> None:
        """Makes the network and everything around it, as before the first step."""
        task, spec = self.task, self.task.cell.spec
        self.device = torch.device(task.device)
        arrays = load_arrays(spec.dataset, task.data)
        if arrays.hash != spec.data_hash:
            raise DataError(
                f"{spec.dataset} in {task.data} changed since the suite was resolved (content "
                f"{arrays.hash}, expected {spec.data_hash}). Run the suite again."
            )
        self.method = make_method(spec.method, dict(spec.options), spec.slug)
        self.info = arrays.info
        model = self.fresh_model()
        self.structure = _structure(model)
        self.names = prunable_names(model, self.method, spec.prunable)
        self.data = to_device(arrays, task.recipe, self.device)
        self.budget = make_budget(spec.budget, task.recipe, len(self.data.train))
        self.density = None if spec.sparsity is None else 1 - spec.sparsity
        self.trainer = Trainer(
            self.method,
            model,
            self.names,
            self.data.without_test(),
            task.recipe,
            self.budget,
            self.density,
            spec.seed,
        )

    def fresh_model(self) -> nn.Module:
        """The network as the cell's seed initialises it, on the device."""
        spec = self.task.cell.spec
        model = make_model(spec.model, self.info, dict(spec.model_options), spec.seed)
        # Convolutions are 1.2 to 1.5 times faster with channels last; other layers do not care.
        return model.to(self.device).to(memory_format=torch.channels_last)

    def train(self) -> Iterator[Event]:
        """Runs to the last step, saving now and then."""
        task, key = self.task, self.task.cell.spec.key
        self.build()
        if task.checkpoint.exists():
            try:
                checkpoint.read(self.trainer, task.checkpoint, key)
            except CheckpointError as error:
                aside = task.checkpoint.with_suffix(".damaged")
                task.checkpoint.replace(aside)
                yield Note(key, f"{error} It is kept as {aside.name}; the cell starts over.")
                self.build()
        total = self.trainer.total_steps
        now = time.time()
        next_save, next_word = now + task.checkpoint_seconds, now
        for done in self.trainer.run():
            now = time.time()
            if now >= task.deadline and done < total:
                checkpoint.write(self.trainer, task.checkpoint, key)
                self.stopped = True
                return
            if now >= next_save:
                checkpoint.write(self.trainer, task.checkpoint, key)
                next_save = time.time() + task.checkpoint_seconds
            if now >= next_word:
                yield Progress(key, done, total)
                next_word = now + PROGRESS_SECONDS

    def measure(self) -> Record:
        """Everything a record holds, from the plain network that the method left.

        Raises:
            ContractBroken: the network is not the plain one.
            Diverged: its outputs are not finite.
        """
        trained = self.trainer.state.model
        if _structure(trained) != self.structure:
            raise ContractBroken(
                "the finished network has other modules or tensors than the plain one"
            )
        # Only the tensors count: whatever else a method did to the module stays behind.
        model = self.fresh_model()
        model.load_state_dict(trained.state_dict())
        with self._evaluation_clock():
            found = evaluate(model, self.data.test, self.data)
        if not math.isfinite(found.loss):
            raise Diverged("the finished network's outputs are not finite")
        layers = count_layers(model, self.data.info.shape, self.names)
        counts = self._counts(model, layers)
        status: Status = "ok"
        reason = ""
        chance = 100 / self.data.info.classes
        if counts.target_nonzero not in (None, counts.prunable_nonzero):
            status = "invalid"
            reason = (
                f"{counts.prunable_nonzero} prunable weights are not zero, but "
                f"{counts.target_nonzero} were asked for"
            )
        elif found.top1 < CHANCE_FACTOR * chance:
            status = "diverged"
            reason = f"accuracy {found.top1:.2f} % is under {CHANCE_FACTOR} times chance"
        # Tied weights share memory, which safetensors refuses: hence the copies.
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
        write_atomically(self.task.weights, save(tensors))
        return self.record(
            status,
            reason,
            top1=found.top1,
            top5=found.top5,
            test_loss=found.loss,
            counts=counts,
            layers=layers,
            weights_hash=checkpoint.tensor_hash(tensors),
        )

    def record(self, status: Status, reason: str, **measured: Any) -> Record:
        """A record of this try, with whatever was measured."""
        trainer = getattr(self, "trainer", None)
        device = torch.device(self.task.device)
        common: dict[str, Any] = {
            "schema": SCHEMA,
            "suite": self.task.suite,
            "label": self.task.cell.label,
            "spec": self.task.cell.spec,
            "status": status,
            "reason": reason,
            "environment": environment(device),
            "times": Times(0.0, 0.0, 0.0, self.started),
        }
        if trainer is not None:
            cursor = trainer.cursor
            common |= {
                "times": Times(
                    cursor.train_seconds, cursor.update_seconds, cursor.eval_seconds, self.started
                ),
                "steps": cursor.total,
                "extra_batches": cursor.extra_batches,
                "multiple": (cursor.total + cursor.extra_batches) / self.budget.steps,
                "phases": tuple(cursor.phases),
                "curve": tuple(cursor.curve),
            }
        return Record(**(common | measured))

    def _counts(self, model: nn.Module, layers: tuple[LayerCount, ...]) -> Counts:
        totals = count_totals(model, layers)
        weights = {name: model.get_parameter(name).detach() for name in self.names}
        prunable = sum(weight.numel() for weight in weights.values())
        target = None
        if self.method.controls == "density" and self.density is not None:
            target = keep_count(prunable, self.density)
        nonzero = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
        grown = sum(int((weight.abs() <= GROWN).sum()) for weight in weights.values())
        zeros = prunable - sum(nonzero.values())
        return Counts(
            parameters=totals.parameters,
            nonzero=totals.nonzero,
            prunable=prunable,
            target_nonzero=target,
            prunable_nonzero=sum(nonzero.values()),
            idle=grown - zeros,
            dense_macs=totals.dense_macs,
            macs=totals.macs,
            dead=tuple(name for name, count in nonzero.items() if count == 0),
        )

    @contextmanager
    def _evaluation_clock(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.trainer.cursor.eval_seconds += time.perf_counter() - started


def _structure(model: nn.Module) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Module types and tensor shapes by name; what a method may not change."""
    modules = {name: type(module).__qualname__ for name, module in model.named_modules()}
    return modules, {name: tuple(value.shape) for name, value in model.state_dict().items()}
