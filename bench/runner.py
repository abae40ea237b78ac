"""One cell from spec to record: build, train, bake, measure. A failure is a record too."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save
from torch import nn

from bench import checkpoint, inspection, sources
from bench.capture import Captured
from bench.counting import count_layers
from bench.determinism import equal_bits, level
from bench.distributed import Pace
from bench.environment import code, environment
from bench.errors import (
    CheckpointError,
    ContractBroken,
    DataError,
    Diverged,
    NotStored,
    RankLost,
    SourceMissing,
    TimedOut,
)
from bench.evaluate import Evaluation, evaluate
from bench.initial import first_network
from bench.networks import make_model
from bench.presence import Presence
from bench.processes import end_fork, undivided
from bench.prunable import prunable_names
from bench.record import (
    SCHEMA,
    Counts,
    Execution,
    LayerCount,
    Origin,
    PhaseResult,
    Record,
    Status,
    Times,
    one_line,
    told,
)
from bench.resolve import in_budgets, load_data, make_budget, make_method
from bench.saving import Saver, check_device, check_disk
from bench.seeds import derive
from bench.sharing import SharedStep
from bench.signals import interrupted, stop_requested
from bench.stack import stackable
from bench.step import Step, set_precision
from bench.store import write_atomically
from bench.streaming import to_device
from bench.task import Event, Finished, Note, Progress, Stopped, Task
from bench.trainer import Ended, Tensors, Trainer
from methods.allocation import keep_count

PROGRESS_SECONDS = 0.5

NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
"""What torch says in plain RuntimeErrors: its allocator on the CPU, CUDA, and its libraries."""


def moments(task: Task) -> Generator[Event | Trainer, None, None]:
    """One cell, from its checkpoint if there is one, until it is measured.

    Yields:
        The trainer, whenever a step of it is due: see `Trainer.moments`. An error of that step is
        to be thrown in: it becomes the cell's record. Between steps, Progress and Note; as the last
        event Finished, or Stopped at the deadline or when `bench.signals` says so.
    """
    spec = task.cell.spec
    attempt = _Attempt(task, task.group.begin(spec.key))
    try:
        with equal_bits(task.ways.strict), undivided(attempt.process):
            yield from attempt.train()
            if attempt.stopped:
                task.group.end(attempt.number, "stopped")
                yield Stopped(spec.key, attempt.done, late=not stop_requested())
                return
            record = attempt.measure()
    except RankLost:
        raise
    except Diverged as error:
        record = attempt.record("diverged", str(error))
    except ContractBroken as error:
        record = attempt.record("invalid", str(error))
    except TimedOut as error:
        record = attempt.record("timeout", str(error))
    except (SourceMissing, NotStored, DataError) as error:
        record = attempt.record("failed", str(error))
    except BaseException as error:  # methods may raise anything
        if ends_run(error):
            raise
        reason = one_line(told(error))
        if stop_requested():
            # The signal may have ended processes that the cell needs: that is no fault of its own.
            yield Note(spec.key, f"{task.cell.label}: an error while it was to stop ({reason}).")
            task.group.end(attempt.number, "stopped", reason)
            yield Stopped(spec.key, attempt.done)
            return
        if out_of_memory(error):
            record = attempt.record("out-of-memory", reason)
        else:
            reason += attempt.resumed
            record = attempt.record("failed", reason, traceback=traceback.format_exc())
    finally:
        attempt.close()
    task.group.end(attempt.number, record.status, record.reason)
    yield Finished(spec.key, record)


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is too little memory, on the device or here."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in told(error) for text in NO_MEMORY)


def ends_run(error: BaseException) -> bool:
    """Whether it is none of a cell's own: somebody's second Ctrl-C, or what ran it was closed."""
    if isinstance(error, KeyboardInterrupt):
        return interrupted()
    if not isinstance(error, GeneratorExit):
        return False
    # Nobody raises it where a generator is closed: it begins where that waits.
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


@dataclass
class _Attempt:
    """One try at a cell.

    Attributes:
        process: number of the one that it began in; a method may fork it.
        resumed: what is to be known of an error after a resume: the file may be at fault, and the
            cell would come upon it again and again.
    """

    task: Task
    number: int = 0
    process: int = field(default_factory=os.getpid)
    stopped: bool = False
    resumed: str = ""
    source_multiple: float = 0.0
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def done(self) -> int:
        """Steps of the cell so far."""
        trainer = getattr(self, "trainer", None)
        return trainer.cursor.total if trainer else 0

    def close(self) -> None:
        """Ends the processes that decode images, if there are any."""
        if data := getattr(self, "data", None):
            data.close()
        if saver := getattr(self, "saver", None):
            saver.close()
        if presence := getattr(self, "presence", None):
            presence.close()

    def build(self, begun: checkpoint.Begun | None = None) -> None:
        """Makes the network and everything around it, as before the first step.

        Args:
            begun: how the run was computed so far, if it is to go on.
        """
        task, spec = self.task, self.task.cell.spec
        self.device = torch.device(task.device)
        arrays = load_data(spec.dataset, task.recipe, task.data, task.start)
        if arrays.hash != spec.data_hash:
            raise DataError(
                f"{spec.dataset} in {task.data} changed since the suite was resolved (content "
                f"{arrays.hash}, expected {spec.data_hash}). Run the suite again."
            )
        self.method = make_method(spec.method, dict(spec.options), spec.slug)
        self.info = arrays.info
        model = self.first_model()
        self.structure = inspection.structure(model)
        self.names = prunable_names(model, self.method, spec.prunable, spec.sparsity)
        self.close()  # of a try before this one
        self.data = to_device(arrays, task.recipe, self.device, task.decoders)
        self.budget = make_budget(spec.budget, task.recipe, len(self.data.train))
        self.density = None if spec.sparsity is None else 1 - spec.sparsity
        source = None
        if task.source is not None and spec.sparsity is not None:
            ones = {name: torch.ones_like(model.get_parameter(name)) for name in self.names}
            source, paid, length = sources.load(task.source, spec.sparsity, ones)
            self.source_multiple = in_budgets(paid, length, self.budget, task.recipe)
        self.ways = ways = task.ways
        if begun is not None:
            self.ways = ways = dataclasses.replace(ways, compiled=begun.compiled)
        set_precision(task.recipe)
        kind: Callable[..., Step] = Step
        if task.group.size > 1:
            kind = functools.partial(SharedStep, group=task.group)
        elif ways.graph and self.device.type == "cuda":
            kind = Captured
        self.trainer = Trainer(
            self.method,
            model,
            self.names,
            self.data.without_test(),
            task.recipe,
            self.budget,
            self.density,
            spec.seed,
            source=source,
            fresh=self.fresh_model,
            layers=count_layers(model, self.info.shape),
            step=functools.partial(kind, compiled=ways.compiled),
            group=task.group,
        )
        self.apart = stackable(model) if ways.stack > 1 else ""
        self.trainer.width = 1 if self.apart else ways.stack

    def first_model(self) -> nn.Module:
        """The network with the cell's first weights, on the device."""
        spec, task = self.task.cell.spec, self.task
        options, kind = dict(spec.model_options), task.recipe.initialisation
        return self.placed(
            first_network(task.init, spec.init, spec.model, self.info, options, spec.seed, kind)
        )

    def fresh_model(self, draw: int = 0) -> nn.Module:
        """A randomly initialised network, on the device; each draw differs."""
        spec, kind = self.task.cell.spec, self.task.recipe.initialisation
        seed = derive(spec.seed, "draw", draw) if draw else spec.seed
        return self.placed(make_model(spec.model, self.info, dict(spec.model_options), seed, kind))

    def placed(self, model: nn.Module) -> nn.Module:
        """The network as cells train it."""
        # Convolutions are 1.2 to 1.5 times faster with channels last; other layers do not care.
        return model.to(self.device).to(memory_format=torch.channels_last)

    def train(self) -> Iterator[Event | Trainer]:
        """Runs to the last step, saving now and then."""
        task, key = self.task, self.task.cell.spec.key
        with task.group.in_turn(f"reading {self.number}"):
            yield from self._start_or_resume()
        if task.group.leads:  # the other ranks are no neighbours
            self.presence = Presence(self.device)
        self._look_around()
        if self.apart:
            yield Note(key, f"{task.cell.label} is computed alone, not in a stack: {self.apart}.")
        if self.device.type == "cuda":
            self.trainer.width = 1  # stacks are for the CPU
        self._check_limits()
        pace = Pace(task.group)
        self.stopped, over = pace.agree(stop_requested(), self._over_time())
        if over:
            self._give_up()
        if self.stopped:
            return
        total = self.trainer.total_steps
        saver = self.saver = Saver(
            self.trainer, task.checkpoint, key, task.checkpoint_seconds, task.deadline
        )
        next_word = time.monotonic()
        for done in self._moments():
            if done is None:
                yield self.trainer
                continue
            end_fork(self.process)
            self.measure_ended()
            now = time.monotonic()
            stop, save, over = pace.agree(
                stop_requested() or saver.late(now), saver.due(now), self._over_time()
            )
            if stop:
                yield from self._save()
                self.stopped = True
                return
            if save:
                yield from self._save()
            if over:
                self._give_up()
            if now >= next_word:
                yield Progress(key, done, total)
                yield from self._uncaptured()
                next_word = now + PROGRESS_SECONDS
        self.measure_ended()

    def _start_or_resume(self) -> Iterator[Note]:
        """Builds the run, and puts it where the newest checkpoint that is whole was written."""
        task, key = self.task, self.task.cell.spec.key
        files = checkpoint.kept(task.checkpoint)
        for number, path in enumerate(files, start=1):
            try:
                begun = checkpoint.begun(path, key)
                self.build(begun)
                checkpoint.read(self.trainer, path, key)
            except CheckpointError as error:
                aside = path.with_suffix(".damaged")
                path.replace(aside)
                last = number == len(files)
                then = "the cell starts over" if last else "the one before it is tried"
                yield Note(key, f"{error} It is kept as {aside.name}; {then}.")
                continue
            yield from self._look_back(begun.place)
            self.resumed = f" (it went on at step {self.done}; to start over, delete {path})"
            return
        self.build()
        self._sign()

    def _look_back(self, began: str) -> Iterator[Note]:
        """Says where and by which code a resumed run was trained last, if not here and by this.

        Args:
            began: the place, as its checkpoint says it.
        """
        key, label = self.task.cell.spec.key, self.task.cell.label
        origins = self.trainer.cursor.origins
        if not origins:  # a checkpoint from before they were kept
            origins.append(Origin("unknown", began))
        last, here = origins[-1], self._sign()
        if began and began != here.place:
            text = f"began on {began} and goes on here, on {here.place}"
            yield Note(key, f"{label} {text}: its last digits may differ.")
        if last.commit != here.commit:
            text = f"was trained by commit {last.commit} and goes on with {here.commit}"
            yield Note(key, f"{label} {text}: its record names both.")

    def _sign(self) -> Origin:
        """Puts this code and place last among those that trained parts of the cell."""
        here = Origin(code(), checkpoint.place(self.device))
        origins = self.trainer.cursor.origins
        origins[:] = [*(one for one in origins if one != here), here]
        return here

    def _check_limits(self) -> None:
        """Room, before the first step.

        Raises:
            NotStored, torch.OutOfMemoryError: there is too little.
        """
        check_device(self.trainer)
        if math.isfinite(self.task.checkpoint_seconds):
            measured = sum(phase.measured for phase in self.trainer.plan)
            check_disk(self.trainer, self.task.checkpoint, 1 + measured)

    def _over_time(self) -> bool:
        """Whether the cell has taken too long."""
        cursor = self.trainer.cursor
        return cursor.train_seconds + cursor.eval_seconds >= self.task.timeout_seconds

    def _give_up(self) -> NoReturn:
        """Ends the cell, saved, since it has taken too long.

        Raises:
            TimedOut: always.
        """
        limit, cursor = self.task.timeout_seconds, self.trainer.cursor
        if saver := getattr(self, "saver", None):
            with suppress(NotStored):  # there is an older one, or it starts over
                saver.save()
        raise TimedOut(
            f"stopped after {limit / 60:g} minutes, at step {cursor.total} of "
            f"{self.trainer.total_steps}; with more time it goes on from there"
        )

    def _look_around(self) -> None:
        """Remembers if other cells have the device; those of this run may be between two cells."""
        presence = getattr(self, "presence", None)
        if self.task.timing == "shared" or (presence is not None and presence.crowded()):
            self.trainer.cursor.shared = True

    def _save(self) -> Iterator[Note]:
        """Writes a checkpoint; where it cannot be written, training is worth more than that."""
        self._look_around()
        try:
            self.saver.save()
        except NotStored as error:
            yield Note(self.task.cell.spec.key, f"{error}; the last checkpoint stays.")

    def _uncaptured(self) -> Iterator[Note]:
        """Says why steps are not replayed, where they should be."""
        hot, label = self.trainer.hot, self.task.cell.label
        if isinstance(hot, Captured) and hot.reason:
            text = f"{label}: its steps are not replayed as a CUDA graph: {hot.reason}."
            yield Note(self.task.cell.spec.key, text)

    def _moments(self) -> Iterator[int | None]:
        try:
            yield from self.trainer.moments()
        except Diverged:
            self.measure_ended()  # a round before the step that diverged is still a result
            raise

    def measure_ended(self) -> None:
        """Tests the networks of measured phases that have ended, before the run is saved again."""
        while self.trainer.ended:
            ended = self.trainer.ended.pop(0)
            phases = self.trainer.cursor.phases
            path = self.task.masks / f"{phases[ended.index].name}.safetensors"
            if self.task.group.leads:
                with _stored(path):
                    sources.write_masks(path, ended.masks)
            # The new networks draw initial weights that nobody uses: the run's noise must stay.
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                phases[ended.index] = self._measured(ended)

    def _measured(self, ended: Ended) -> PhaseResult:
        result = self.trainer.cursor.phases[ended.index]
        model, found = self._tested(ended.end)
        counts = self._counts(model, self._layers(model))
        asked = self.trainer.plan[ended.index].density
        if asked is not None:
            counts = dataclasses.replace(counts, target_nonzero=keep_count(counts.prunable, asked))
        elif self.density is not None and result.density == 1:
            counts = dataclasses.replace(counts, target_nonzero=counts.prunable)
        status, reason = inspection.judge(found, counts, self.info.classes)
        least = result.least
        if least is not None and ended.least is not None:
            _, at_least = self._tested(ended.least)
            least = dataclasses.replace(least, top1=at_least.top1)
        return dataclasses.replace(
            result,
            status=status,
            reason=reason,
            top1=found.top1,
            top5=found.top5,
            test_loss=found.loss if math.isfinite(found.loss) else None,
            counts=counts,
            least=least,
        )

    def _tested(self, tensors: Tensors) -> tuple[nn.Module, Evaluation]:
        """A freshly made network with these tensors, on the test set.

        Raises:
            ContractBroken: they are not those of the plain network.
        """
        # Only the tensors count: whatever else a method did to the module stays behind.
        model = self.fresh_model()
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            text = "the network has other tensors than the plain one"
            raise ContractBroken(f"{text}: {error}") from error
        with self._evaluation_clock():
            return model, evaluate(model, self.data.test, self.data, self.task.group)

    def measure(self) -> Record:
        """Everything a record holds, from the plain network that the method left.

        Raises:
            ContractBroken: the network is not the plain one.
            Diverged: its outputs are not finite.
        """
        trained = self.trainer.state.model
        if inspection.structure(trained) != self.structure:
            raise ContractBroken(
                "the finished network has other modules or tensors than the plain one"
            )
        model, found = self._tested(trained.state_dict())
        if not math.isfinite(found.loss):
            raise Diverged("the finished network's outputs are not finite")
        layers = self._layers(model)
        counts = self._counts(model, layers)
        status, reason = inspection.judge(found, counts, self.info.classes)
        chances = self.trainer.open_probability
        # Tied weights share memory, which safetensors refuses: hence the copies.
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
        if self.task.group.leads:
            with _stored(self.task.weights):
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
            expected=None if chances is None else inspection.expected(chances, layers),
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
            self._look_around()
            cursor = trainer.cursor
            common |= {
                "times": Times(
                    cursor.train_seconds,
                    cursor.update_seconds,
                    cursor.eval_seconds,
                    self.started,
                    tuple(cursor.phase_seconds),
                ),
                "steps": cursor.total,
                "extra_batches": cursor.extra_batches,
                "multiple": (cursor.total + cursor.extra_batches) / self.budget.steps
                + self.source_multiple,
                "train_macs": self._train_macs(status),
                "phases": tuple(cursor.phases),
                "curve": tuple(cursor.curve),
                "mask_updates": tuple(cursor.mask_updates),
                "last_changes": trainer.dynamics.histogram(trainer.total_steps),
                "execution": Execution(
                    "shared" if cursor.shared else "exclusive",
                    trainer.width,
                    trainer.hot.replayed,
                    self.ways.compiled and trainer.width == 1,
                    level(self.task.ways.strict, self.task.device),
                    self.task.group.size,
                    tuple(cursor.origins[:-1]),
                ),
            }
        return Record(**(common | measured))

    def _train_macs(self, status: Status) -> float:
        """Of all phases; the one that was running when the loss diverged too."""
        cursor = self.trainer.cursor
        ended = sum(phase.train_macs or 0.0 for phase in cursor.phases)
        # After an error the device may not answer any more.
        broken = status in ("failed", "out-of-memory")
        return ended if broken else ended + self.trainer.meter.end_phase(cursor.total)

    def _layers(self, model: nn.Module) -> tuple[LayerCount, ...]:
        return count_layers(model, self.info.shape, self.names, live=True)

    def _counts(self, model: nn.Module, layers: tuple[LayerCount, ...]) -> Counts:
        return inspection.counts(
            model, layers, self.names, self.method, self.density, self.info.shape
        )

    @contextmanager
    def _evaluation_clock(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.trainer.cursor.eval_seconds += time.perf_counter() - started


@contextmanager
def _stored(path: Path) -> Iterator[None]:
    """For writing a result.

    Raises:
        NotStored: it cannot be written; what was trained goes on from its last checkpoint.
    """
    try:
        yield
    except OSError as error:
        raise NotStored(f"{path}: cannot be written ({error.strerror or error})") from error
