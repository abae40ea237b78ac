"""The only training loop. It knows phases and hooks, and no method's name."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.clock import Stopwatch, wait_for
from bench.data import BatchStream, Data
from bench.distributed import ALONE, Group
from bench.dynamics import Dynamics
from bench.errors import Diverged
from bench.evaluate import Evaluation, evaluate
from bench.meter import Meter
from bench.prunable import shapes
from bench.recipes import TIMM_PREFIX, Recipe
from bench.record import (
    Amount,
    Count,
    CurvePoint,
    LayerCount,
    Least,
    MaskUpdate,
    Origin,
    PhaseResult,
)
from bench.seeds import derive
from bench.sharing import whole_batch_norm
from bench.step import Step, data_term, precision
from methods.api import (
    Budget,
    OptimizerSettings,
    Phase,
    Scores,
    Shape,
    Source,
    SparsityMethod,
    TrainState,
)
from methods.functional import call_with
from methods.masking import NoOrderError, fill_zeros, reset_optimizer

CURVE_POINTS = 200
"""A record keeps at most so many points of the training curve."""

GROUP = "group"
"""Before the number of an optimizer's group, in names of what it remembers."""

LEAST = "least validation loss"
"""Name of the snapshot that a look at the validation loss takes; no plan may use it."""

Tensors = dict[str, Tensor]


@dataclass
class Cursor:
    """Where a run stands and what it cost. With the run's tensors, all that a resume needs.

    Attributes:
        phase: index in the plan; `step` counts within it.
        position: of the next batch in the training stream; a rewind sets it back.
        total: optimizer steps done, all phases.
        drawn: batches that the method asked for; `scored`: its forward passes outside training.
        updates: mask updates done; `mask_updates` are those that are kept.
        least: least validation loss in this phase.
        train_seconds: wall-clock of training, data and hooks; the hooks' part is `update_seconds`.
        shared: whether other cells had the device for a part of it.
        origins: by which code and where its parts were trained; each once, the last one last.
        phase_seconds: `train_seconds` at the end of each phase.
    """

    phase: Count = 0
    step: Count = 0
    position: Count = 0
    total: Count = 0
    drawn: Count = 0
    scored: Count = 0
    updates: Count = 0
    least: Least | None = None
    train_seconds: Amount = 0.0
    update_seconds: Amount = 0.0
    eval_seconds: Amount = 0.0
    shared: bool = False
    origins: list[Origin] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    phases: list[PhaseResult] = field(default_factory=list)
    phase_seconds: list[Amount] = field(default_factory=list)
    mask_updates: list[MaskUpdate] = field(default_factory=list)

    @property
    def extra_batches(self) -> int:
        """What the method computed besides the steps: a batch that is used twice counts twice."""
        return max(self.drawn, self.scored)


@dataclass
class Snapshot:
    """What a rewind restores: parameters and buffers, optimizer state, position in the data.

    Attributes:
        model: copy of the model's state.
        optimizer: copies of the optimizer's tensors; `numbers` are what it keeps beside them.
        position: of the next batch.
    """

    model: Tensors
    optimizer: Tensors
    numbers: dict[str, float]
    position: int


@dataclass(frozen=True)
class Ended:
    """A measured phase that has ended, for the runner to test.

    Attributes:
        index: in the plan.
        end: the plain network's tensors after the last step; `least`, at the least validation loss.
        masks: copies.
    """

    index: int
    end: Tensors
    least: Tensors | None
    masks: Tensors


def optimizer_settings(recipe: Recipe) -> OptimizerSettings:
    """The recipe's optimizer."""
    factory = None
    if recipe.optimizer.startswith(TIMM_PREFIX):
        from bench.timm_training import build

        name = recipe.optimizer.removeprefix(TIMM_PREFIX)
        factory = functools.partial(build, name=name, options=recipe.optimizer_options)
    return OptimizerSettings(
        recipe.optimizer,
        recipe.momentum,
        recipe.nesterov,
        recipe.weight_decay,
        recipe.betas,
        factory,
    )


class Trainer:
    """Trains one network by one method; implements `methods.api.Run`.

    Args:
        method: the method.
        model: a freshly made network on the device; it is trained in place.
        names: the weights that the method prunes.
        data: images on the same device.
        recipe: optimizer, schedule, batch, augmentation.
        budget: length of one ordinary run.
        density: the target; None for penalty-driven methods.
        seed: of data order, augmentation, the method's choices and noise.
        source: what the cell's source left, if it names one.
        fresh: makes a plain network from the number of a draw, on the device.
        layers: of the plain dense network, counted: what the training costs in theory.
        step: computes the steps, see `bench.step`.
        group: the ranks that train it together; batches are this one's share of them.

    Attributes:
        hot: computes a step.
        width: runs that are computed as one, see `bench.stack`; 1: this one alone.
        ended: measured phases that nobody has looked at yet.
        group_options: that each of the optimizer's groups was made with.
        open_probability: the method's, at the end of training.
    """

    def __init__(
        self,
        method: SparsityMethod,
        model: nn.Module,
        names: Sequence[str],
        data: Data,
        recipe: Recipe,
        budget: Budget,
        density: float | None,
        seed: int,
        *,
        source: Source | None = None,
        fresh: Callable[[int], nn.Module] | None = None,
        layers: Sequence[LayerCount] = (),
        step: Callable[..., Step] = Step,
        group: Group = ALONE,
    ) -> None:
        self.method, self.data, self.recipe = method, data, recipe
        self.density, self.seed, self.group = density, seed, group
        self.source, self._fresh = source, fresh
        parameters = dict(model.named_parameters())
        self.budget = dataclasses.replace(budget, shapes=shapes(model, names))
        self.plan = method.plan(self.budget, density)
        self.total_steps = sum(phase.steps for phase in self.plan)
        self.cursor = Cursor()
        self.snapshots: dict[str, Snapshot] = {}
        self.generator = torch.Generator().manual_seed(derive(seed, "method"))
        self._share = group.rank, group.size
        self.stream = BatchStream(data, recipe, seed, "order", share=self._share)
        self._own_streams: dict[bool, BatchStream] = {}

        torch.manual_seed(derive(seed, "noise"))  # dropout and gates
        masks = {name: torch.ones_like(parameters[name].detach()) for name in names}
        weights = method.prepare(model, masks, data.info.shape)
        pruned = set(map(id, weights.values()))
        others = {name: p for name, p in model.named_parameters() if id(p) not in pruned}
        device = data.train.labels.device
        lr = torch.tensor(recipe.lr, device=device)
        optimizer = method.optimizer(weights, others, lr, optimizer_settings(recipe))
        # What an optimizer adds to its groups as it goes is memory too.
        self.group_options = [frozenset(group) for group in optimizer.param_groups]
        progress = torch.zeros((), device=device)
        self.state = TrainState(model, weights, masks, optimizer, lr, progress)

        self.hot = step(method, self.state, self.stream, recipe)
        self.width = 1
        self._updates = Stopwatch(device)
        self._rate: float | None = None

        # Losses stay on the device until a point of the curve is due: no wait in the step.
        interval = max(1, -(-self.total_steps // CURVE_POINTS))
        self.losses = torch.zeros(interval, device=device)
        self._losses = self.losses.unbind()
        self.dynamics = Dynamics(self.plan, self.state)
        self.meter = Meter(method, self.state, layers, recipe.batch)
        self.ended: list[Ended] = []
        self.open_probability: Scores | None = None

    @property
    def phase(self) -> Phase:
        """The phase that is running."""
        return self.plan[self.cursor.phase]

    @property
    def step(self) -> int:
        """Optimizer steps done in this phase."""
        return self.cursor.step

    def run(self) -> Iterator[int]:
        """Trains to the end, from wherever the cursor stands.

        Yields:
            The number of steps done, after each step. Between steps the run may be saved, or left.

        Raises:
            Diverged: a loss was not finite; names the step.
        """
        for done in self.moments():
            if done is None:
                self.compute()
            else:
                yield done

    def moments(self) -> Iterator[int | None]:
        """The same, for those who compute the steps themselves.

        Yields:
            None when a step is due: it must be computed before the run goes on, by `compute` or as
            `compute` does it. Then the number of steps done.
        """
        cursor = self.cursor
        self.state.model.train()
        while True:
            if cursor.step == 0:
                with self._training_clock():
                    self._enter()
            while cursor.step < self.phase.steps:
                started = time.perf_counter()  # a context would cost as much as the rest
                self._prepare_step()
                cursor.train_seconds += time.perf_counter() - started
                yield None
                self._count_step()
                if cursor.total % len(self.losses) == 0 or cursor.total == self.total_steps:
                    self._add_curve_point()
                self._look()
                yield cursor.total
            self._leave()
            if cursor.phase == len(self.plan) - 1:
                break
            cursor.phase += 1
            cursor.step = 0
        with self._training_clock(), self._watched(planned=False), self._cold_hook():
            self.open_probability = self.method.open_probability(self.state)
            self.method.finish(self)
        self._check(everything=True)
        self.settle()

    def compute(self) -> None:
        """Computes the step that is due."""
        started = time.perf_counter()
        self.hot.compute()
        self.cursor.train_seconds += time.perf_counter() - started

    def settle(self) -> None:
        """Brings the cursor's times up to date, before it is saved; waits for the device."""
        with self._training_clock():
            wait_for(self.state.lr.device)
        self.cursor.update_seconds += self._updates.take()

    def fresh_weights(self, draw: int) -> Tensors:
        """Parameters and buffers of the plain network, initialised anew; random streams stay."""
        assert self._fresh is not None
        with torch.random.fork_rng(self._rng_devices(self.state.lr.device)):
            return self._fresh(draw).state_dict()

    def batches(self, count: int, *, augmented: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches from the method's own stream; they are metered."""
        if augmented not in self._own_streams:
            self._own_streams[augmented] = BatchStream(
                self.data,
                self.recipe,
                self.seed,
                "method",
                augmented=augmented,
                share=self._share,
            )
        for _ in range(count):
            position = self.cursor.drawn
            self.cursor.drawn += 1
            yield self._own_streams[augmented].batch(position)

    @property
    def input_shape(self) -> Shape:
        """(channels, height, width) of one image."""
        return self.data.info.shape

    def logits(self, images: Tensor) -> Tensor:
        """Outputs (B, classes); normalisation statistics and the noise of training stay."""
        model = self.state.model
        # The forward pass writes its statistics into copies, and draws noise of its own.
        copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.enable_grad():
            copies |= self.group.leaves(dict(model.named_parameters()))
        with torch.enable_grad(), torch.random.fork_rng(self._rng_devices(images.device)):
            torch.manual_seed(derive(self.seed, "scoring", self.cursor.scored))
            self.cursor.scored += 1
            self.meter.add_scoring(self, self.group.size * len(images))
            with precision(self.recipe, images.device), whole_batch_norm(self.group, fused=False):
                outputs: Tensor = call_with(model, copies, images)
            # In half precision, what a method computes from them would be lost.
            return outputs.float() if outputs.dtype == torch.bfloat16 else outputs

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Data term, from `logits`."""
        with torch.enable_grad():
            smoothing = self.recipe.label_smoothing
            return self.group.mean(data_term(self.logits(images), labels, smoothing))

    def gradients(self, batches: int = 1, *, augmented: bool = True) -> Scores:
        """Mean gradient of the data term over extra batches, for every weight, masked or not."""
        weights = self.state.weights
        total: Scores = {}
        for images, labels in self.batches(batches, augmented=augmented):
            found = torch.autograd.grad(self.loss(images, labels), list(weights.values()))
            for name, gradient in zip(weights, found, strict=True):
                total[name] = total[name] + gradient if name in total else gradient
        return {name: gradient / batches for name, gradient in total.items()}

    def _prepare_step(self) -> None:
        """What comes before a step: the update that is due, the rate, the next batch's place."""
        cursor, phase = self.cursor, self.phase
        if phase.updates is not None and phase.updates.due(cursor.step):
            with self._watched(planned=True), self._cold_hook():
                self.method.update(self)
                self.method.project(self.state)  # the coming forward pass sees the new masks
            self._check()
        else:
            self._set_clock()
        self.stream.seek(cursor.position)

    def _count_step(self) -> None:
        cursor = self.cursor
        self._losses[cursor.total % len(self._losses)].copy_(self.hot.loss)
        cursor.step += 1
        cursor.position += 1
        cursor.total += 1

    def _set_clock(self) -> None:
        """Learning rate and progress of the coming step; after the last, those of the end."""
        rate = self._lr()
        if rate != self._rate:  # seldom, in most schedules
            self.state.lr.fill_(rate)
            self._rate = rate
        self.state.progress.fill_(self.cursor.total / max(1, self.total_steps))

    def _lr(self) -> float:
        """The recipe's rate in the phase's window, or the phase's own schedule."""
        phase = self.phase
        fraction = self.cursor.step / max(1, phase.steps)
        if phase.lr is not None:
            return self.recipe.lr * phase.lr.factor(fraction)
        low, high = phase.lr_window
        return self.recipe.lr_at(low + fraction * (high - low))

    def _enter(self) -> None:
        with self._watched(planned=False), self._cold_hook():
            self.method.start_phase(self)
            if self.phase.rewind_to is not None:
                self._rewind(self.snapshots[self.phase.rewind_to])
            self.method.project(self.state)
        self._check()
        self.hot.begin()

    def _leave(self) -> None:
        phase, cursor = self.phase, self.cursor
        self.settle()  # what comes now waits for the device, and is no training
        self._check(everything=True)
        if phase.save_as is not None:
            self.snapshots[phase.save_as] = self._snapshot()
        masks = self.state.masks
        kept = sum(int(mask.count_nonzero()) for mask in masks.values())
        total = sum(mask.numel() for mask in masks.values())
        # Where a penalty decides, there are no masks to speak of.
        density = None if self.density is None else kept / total
        if phase.measured:
            self.ended.append(self._ended())
        result = PhaseResult(
            phase.name,
            phase.steps,
            density,
            cursor.total,
            least=cursor.least,
            train_macs=self.meter.end_phase(cursor.total),
        )
        cursor.least = None
        cursor.phases.append(result)
        cursor.phase_seconds.append(cursor.train_seconds)

    def _ended(self) -> Ended:
        least = self.snapshots.pop(LEAST, None)
        masks = {name: mask.clone() for name, mask in self.state.masks.items()}
        networks = [self._snapshot().model, *([least.model] if least else [])]
        for network in networks:
            if masks.keys() <= network.keys():  # else the runner says that it is not the plain one
                fill_zeros(network, masks)
        return Ended(self.cursor.phase, networks[0], networks[1] if least else None, masks)

    def _snapshot(self) -> Snapshot:
        model = {name: value.clone() for name, value in self.state.model.state_dict().items()}
        optimizer = {name: value.clone() for name, value in self.optimizer_tensors().items()}
        return Snapshot(model, optimizer, self.optimizer_numbers(), self.cursor.position)

    def _rewind(self, snapshot: Snapshot) -> None:
        self.state.model.load_state_dict(snapshot.model)
        # A snapshot from before the first step has no optimizer state: then there is none to keep.
        if not snapshot.optimizer:
            reset_optimizer(self.state)
        for name, value in self.optimizer_tensors().items():
            value.copy_(snapshot.optimizer[name]) if name in snapshot.optimizer else value.zero_()
        for name in self.optimizer_numbers():
            self.set_optimizer_entry(name, snapshot.numbers.get(name, 0))
        self.cursor.position = snapshot.position

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's memory, by number of parameter, or of group, and name of buffer."""
        return {name: v for name, v in self._optimizer_memory() if isinstance(v, Tensor)}

    def optimizer_numbers(self) -> dict[str, float]:
        """Plain numbers that some optimizers keep beside their tensors."""
        return {name: v for name, v in self._optimizer_memory() if isinstance(v, int | float)}

    def _optimizer_memory(self) -> Iterator[tuple[str, Any]]:
        optimizer = self.state.optimizer
        for index, parameter in enumerate(self.optimized()):
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{index}.{key}", value
        for index, group in enumerate(optimizer.param_groups):
            for key in sorted(group.keys() - self.group_options[index]):
                yield f"{GROUP}{index}.{key}", group[key]

    def set_optimizer_entry(self, name: str, value: Tensor | float) -> None:
        """Writes one entry of the optimizer's memory, named as `optimizer_tensors` names it."""
        owner, _, key = name.partition(".")
        optimizer = self.state.optimizer
        if owner.startswith(GROUP):
            optimizer.param_groups[int(owner.removeprefix(GROUP))][key] = value
        else:
            optimizer.state[self.optimized()[int(owner)]][key] = value

    def owner_of_entry(self, name: str) -> nn.Parameter | None:
        """The parameter that an entry of the optimizer's memory is of; None: a whole group."""
        owner = name.partition(".")[0]
        return None if owner.startswith(GROUP) else self.optimized()[int(owner)]

    def optimized(self) -> list[nn.Parameter]:
        """The optimizer's parameters in its own order."""
        return [p for group in self.state.optimizer.param_groups for p in group["params"]]

    def _look(self) -> None:
        """Keeps the network of the least validation loss, where the phase asks for it."""
        every, cursor = self.phase.validate_every, self.cursor
        if not every or not len(self.data.validation):
            return
        if cursor.step % every and cursor.step != self.phase.steps:
            return
        loss = self._validate().loss
        # One that is not finite is no least; a record could not hold it either.
        if loss < (cursor.least.validation_loss if cursor.least else math.inf):
            cursor.least = Least(cursor.step, loss)
            self.snapshots[LEAST] = dataclasses.replace(self._snapshot(), optimizer={}, numbers={})

    def _validate(self) -> Evaluation:
        self.settle()
        started = time.perf_counter()
        found = evaluate(self.state.model, self.data.validation, self.data, self.group)
        self.state.model.train()
        self.cursor.eval_seconds += time.perf_counter() - started
        return found

    def _add_curve_point(self) -> None:
        cursor = self.cursor
        size = len(self.losses)
        count = cursor.total % size or size
        with self._training_clock():
            losses = self.losses[:count].cpu()  # a GPU has done all these steps now, not before
        finite = torch.isfinite(losses)
        self._check()  # masks may change in steps too
        if not finite.all():
            step = cursor.total - count + int(finite.int().argmin()) + 1
            raise Diverged(f"the loss of step {step} of {self.total_steps} is not finite")
        epoch_ended = cursor.position // self.budget.steps_per_epoch
        epoch_before = (cursor.position - count) // self.budget.steps_per_epoch
        due = epoch_ended > epoch_before or cursor.total == self.total_steps
        found = None
        if due and len(self.data.validation):
            found = self._validate()
        cursor.curve.append(
            CurvePoint(
                cursor.total,
                _rounded(float(losses.double().mean())),
                _rounded(found.loss) if found else None,
                found.top1 if found else None,
            )
        )

    def _check(self, everything: bool = False) -> None:
        """Compares the masks of all ranks, and the network if asked to.

        Raises:
            RanksDiffer: they have come to different ones.
        """
        if self.group.size == 1:
            return
        cursor, tensors = self.cursor, {f"mask of {n}": m for n, m in self.state.masks.items()}
        if everything:
            tensors |= self.state.model.state_dict()
        where = f"after step {cursor.total}, phase {self.phase.name}, mask update {cursor.updates}"
        self.group.check(tensors, where)

    @staticmethod
    def _rng_devices(device: torch.device) -> list[torch.device]:
        """Devices whose random streams a fork must keep, beside the CPU's."""
        return [device] if device.type == "cuda" else []

    @contextmanager
    def _watched(self, planned: bool) -> Iterator[None]:
        """Compares the masks before and after; what was not planned counts if it changed some.

        The first masks of a run are not a change.
        """
        cursor, dynamics = self.cursor, self.dynamics
        if not dynamics.last_change or (not planned and cursor.total == 0):
            yield
            return
        index = cursor.updates if planned else 0
        with dynamics.watch(self.state, cursor.total, index, cursor.mask_updates):
            yield
        if planned:
            cursor.updates += 1
        elif not cursor.mask_updates[-1].flipped:
            cursor.mask_updates.pop()
        cursor.train_seconds -= dynamics.seconds  # the harness's own curiosity
        cursor.eval_seconds += dynamics.seconds

    @contextmanager
    def _training_clock(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.cursor.train_seconds += time.perf_counter() - started

    @contextmanager
    def _cold_hook(self) -> Iterator[None]:
        with self._updates.running():
            self._set_clock()
            self.meter.settle(self.cursor.total)
            try:
                with torch.no_grad():
                    yield
            except NoOrderError as error:
                raise Diverged(f"after step {self.cursor.total}: {error}") from error
        self.state.check_slots()
        self.meter.refresh(self)
        self.hot.changed()


def _rounded(value: float) -> float:
    """Six digits: a curve is looked at, and records are kept small."""
    return float(f"{value:.6g}")
