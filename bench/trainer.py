"""The only training loop. It knows phases and hooks, and no method's name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bench.data import BatchStream, Data
from bench.errors import Diverged
from bench.evaluate import evaluate
from bench.recipes import Recipe
from bench.record import CurvePoint, PhaseResult
from bench.seeds import derive
from methods.api import (
    Budget,
    OptimizerSettings,
    Phase,
    Scores,
    SparsityMethod,
    TrainState,
)
from methods.masking import NoOrderError

CURVE_POINTS = 200
"""A record keeps at most so many points of the training curve."""


@dataclass
class Cursor:
    """Where a run stands and what it cost. With the run's tensors, all that a resume needs.

    Attributes:
        phase: index in the plan; `step` counts within it.
        position: of the next batch in the training stream; a rewind sets it back.
        total: optimizer steps done, all phases.
        drawn: batches that the method asked for; `scored`: its forward passes outside training.
        train_seconds: wall-clock of training, data and hooks; the hooks' part is `update_seconds`.
    """

    phase: int = 0
    step: int = 0
    position: int = 0
    total: int = 0
    drawn: int = 0
    scored: int = 0
    train_seconds: float = 0.0
    update_seconds: float = 0.0
    eval_seconds: float = 0.0
    curve: list[CurvePoint] = field(default_factory=list)
    phases: list[PhaseResult] = field(default_factory=list)

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

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    numbers: dict[str, float]
    position: int


def forward(
    model: nn.Module, method: SparsityMethod, state: TrainState, x: Tensor, y: Tensor
) -> Tensor:
    """() loss of one batch: the data term and the method's penalty. Compiles as one graph."""
    loss = functional.cross_entropy(model(x), y)
    penalty = method.penalty(state)
    return loss if penalty is None else loss + penalty


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
    ) -> None:
        self.method, self.data, self.recipe = method, data, recipe
        self.budget, self.density, self.seed = budget, density, seed
        self.plan = method.plan(budget, density)
        self.total_steps = sum(phase.steps for phase in self.plan)
        self.cursor = Cursor()
        self.snapshots: dict[str, Snapshot] = {}
        self.generator = torch.Generator().manual_seed(derive(seed, "method"))
        self.stream = BatchStream(data, recipe, seed, "order")
        self._own_streams: dict[bool, BatchStream] = {}

        torch.manual_seed(derive(seed, "noise"))  # dropout and gates
        parameters = dict(model.named_parameters())
        masks = {name: torch.ones_like(parameters[name].detach()) for name in names}
        weights = method.prepare(model, masks)
        pruned = set(map(id, weights.values()))
        others = {name: p for name, p in model.named_parameters() if id(p) not in pruned}
        device = data.train.labels.device
        lr = torch.tensor(recipe.lr, device=device)
        settings = OptimizerSettings(
            recipe.optimizer, recipe.momentum, recipe.nesterov, recipe.weight_decay, recipe.betas
        )
        optimizer = method.optimizer(weights, others, lr, settings)
        progress = torch.zeros((), device=device)
        self.state = TrainState(model, weights, masks, optimizer, lr, progress)

        # Losses stay on the device until a point of the curve is due: no wait in the step.
        interval = max(1, -(-self.total_steps // CURVE_POINTS))
        self.losses = torch.zeros(interval, device=device)

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
        cursor = self.cursor
        self.state.model.train()
        while True:
            if cursor.step == 0:
                with self._training_clock():
                    self._enter()
            while cursor.step < self.phase.steps:
                with self._training_clock():
                    self._train_step()
                if cursor.total % len(self.losses) == 0 or cursor.total == self.total_steps:
                    self._add_curve_point()
                yield cursor.total
            self._leave()
            if cursor.phase == len(self.plan) - 1:
                break
            cursor.phase += 1
            cursor.step = 0
        with self._training_clock(), self._cold_hook():
            self.method.finish(self)

    def batches(self, count: int, *, augmented: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches from the method's own stream; they are metered."""
        if augmented not in self._own_streams:
            self._own_streams[augmented] = BatchStream(
                self.data, self.recipe, self.seed, "method", augmented=augmented
            )
        for _ in range(count):
            position = self.cursor.drawn
            self.cursor.drawn += 1
            yield self._own_streams[augmented].batch(position)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.data.info.shape

    def logits(self, images: Tensor) -> Tensor:
        """Outputs (B, classes); normalisation statistics and the noise of training stay."""
        model = self.state.model
        # The forward pass writes its statistics into copies, and draws noise of its own.
        copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(derive(self.seed, "scoring", self.cursor.scored))
            self.cursor.scored += 1
            outputs: Tensor = functional_call(model, copies, (images,))
            return outputs

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Data term, from `logits`."""
        with torch.enable_grad():
            return functional.cross_entropy(self.logits(images), labels)

    def gradients(self, batches: int = 1, *, augmented: bool = True) -> Scores:
        """Mean gradient of the data term over extra batches, for every weight, masked or not."""
        weights = self.state.weights
        total: Scores = {}
        for images, labels in self.batches(batches, augmented=augmented):
            found = torch.autograd.grad(self.loss(images, labels), list(weights.values()))
            for name, gradient in zip(weights, found, strict=True):
                total[name] = total[name] + gradient if name in total else gradient
        return {name: gradient / batches for name, gradient in total.items()}

    def _train_step(self) -> None:
        """One optimizer step, the same for all methods, with the update due before it."""
        cursor, state, method, phase = self.cursor, self.state, self.method, self.phase
        if phase.updates is not None and phase.updates.due(cursor.step):
            with self._cold_hook():
                method.update(self)
                method.project(state)  # the coming forward pass sees the new masks
        else:
            self._set_clock()
        images, labels = self.stream.batch(cursor.position)
        loss = forward(state.model, method, state, images, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            method.edit_gradients(state)
            state.optimizer.step()
            method.project(state)
            self.losses[cursor.total % len(self.losses)] = loss.detach()
        state.optimizer.zero_grad(set_to_none=True)
        cursor.step += 1
        cursor.position += 1
        cursor.total += 1

    def _set_clock(self) -> None:
        """Learning rate and progress of the coming step; after the last, those of the end."""
        self.state.lr.fill_(self._lr())
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
        with self._cold_hook():
            self.method.start_phase(self)
            if self.phase.rewind_to is not None:
                self._rewind(self.snapshots[self.phase.rewind_to])
            self.method.project(self.state)

    def _leave(self) -> None:
        phase, cursor = self.phase, self.cursor
        if phase.save_as is not None:
            self.snapshots[phase.save_as] = self._snapshot()
        masks = self.state.masks.values()
        kept = sum(int(mask.count_nonzero()) for mask in masks)
        # Where a penalty decides, there are no masks to speak of.
        density = None if self.density is None else kept / sum(mask.numel() for mask in masks)
        cursor.phases.append(PhaseResult(phase.name, phase.steps, density))

    def _snapshot(self) -> Snapshot:
        model = {name: value.clone() for name, value in self.state.model.state_dict().items()}
        optimizer = {name: value.clone() for name, value in self.optimizer_tensors().items()}
        return Snapshot(model, optimizer, self.optimizer_numbers(), self.cursor.position)

    def _rewind(self, snapshot: Snapshot) -> None:
        self.state.model.load_state_dict(snapshot.model)
        # A snapshot from before the first step has no optimizer state: then there is none to keep.
        for name, value in self.optimizer_tensors().items():
            value.copy_(snapshot.optimizer[name]) if name in snapshot.optimizer else value.zero_()
        for name in self.optimizer_numbers():
            self.set_optimizer_entry(name, snapshot.numbers.get(name, 0))
        self.cursor.position = snapshot.position

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's memory, by number of parameter and name of buffer."""
        return {
            f"{index}.{key}": value
            for index, parameter in enumerate(self.optimized())
            for key, value in self.state.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def optimizer_numbers(self) -> dict[str, float]:
        """Plain numbers that some optimizers keep beside their tensors."""
        return {
            f"{index}.{key}": value
            for index, parameter in enumerate(self.optimized())
            for key, value in self.state.optimizer.state.get(parameter, {}).items()
            if isinstance(value, int | float)
        }

    def set_optimizer_entry(self, name: str, value: Tensor | float) -> None:
        """Writes one entry of the optimizer's memory, named as `optimizer_tensors` names it."""
        index, _, key = name.partition(".")
        self.state.optimizer.state[self.optimized()[int(index)]][key] = value

    def optimized(self) -> list[nn.Parameter]:
        """The optimizer's parameters in its own order."""
        return [p for group in self.state.optimizer.param_groups for p in group["params"]]

    def _add_curve_point(self) -> None:
        cursor = self.cursor
        size = len(self.losses)
        count = cursor.total % size or size
        losses = self.losses[:count]
        finite = torch.isfinite(losses)
        if not finite.all():
            step = cursor.total - count + int(finite.int().argmin()) + 1
            raise Diverged(f"the loss of step {step} of {self.total_steps} is not finite")
        epoch_ended = cursor.position // self.budget.steps_per_epoch
        epoch_before = (cursor.position - count) // self.budget.steps_per_epoch
        due = epoch_ended > epoch_before or cursor.total == self.total_steps
        found = None
        if due and len(self.data.validation):
            started = time.perf_counter()
            found = evaluate(self.state.model, self.data.validation, self.data)
            self.state.model.train()
            cursor.eval_seconds += time.perf_counter() - started
        cursor.curve.append(
            CurvePoint(
                cursor.total,
                _rounded(float(losses.double().mean())),
                _rounded(found.loss) if found else None,
                found.top1 if found else None,
            )
        )

    @contextmanager
    def _training_clock(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.cursor.train_seconds += time.perf_counter() - started

    @contextmanager
    def _cold_hook(self) -> Iterator[None]:
        started = time.perf_counter()
        self._set_clock()
        try:
            with torch.no_grad():
                yield
        except NoOrderError as error:
            raise Diverged(f"after step {self.cursor.total}: {error}") from error
        self.cursor.update_seconds += time.perf_counter() - started


def _rounded(value: float) -> float:
    """Six digits: a curve is looked at, and records are kept small."""
    return float(f"{value:.6g}")
