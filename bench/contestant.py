"""A cell that trains in one phase of its plan for as long as it is asked to, and what it times.

What comes now and then (an update of the masks, a new epoch's order, a point of the curve) is left
out of the steps that are timed: the cursor is moved to where it falls due, it is timed by itself,
and its time is divided by its period.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from bench.capture import Captured
from bench.clock import Stopwatch
from bench.data import Split
from bench.errors import CellError
from bench.evaluate import chunk_size, evaluate
from bench.optimize import Advance
from bench.resolve import load_data
from bench.runner import moments
from bench.step import Step
from bench.task import Finished, Task
from bench.trainer import Trainer
from methods.api import Phase, SparsityMethod

EAGER, GRAPH = "eager", "graph"

STAGES = (
    *("data", "forward", "backward", "hot hooks", "optimizer"),
    *("updates", "phase start", "harness", "evaluation"),
)
"""Parts of a step. What comes now and then is in them, divided by its period."""

RARE = 10
"""What comes more often than every so many steps, updates aside, is part of every step."""

CUT = 20
"""Steps that are left of the phases before the one that is measured."""


class Contestant:
    """A cell that trains in one phase of its plan for as long as it is asked to.

    Between calls a step is due, as `Trainer.moments` has it.

    Args:
        task: the cell.
        steps: so many will be trained from the phase's start, with updates as they come; it is
            lengthened if need be. 0: the cursor goes to the middle of the phase.

    Attributes:
        trainer: of the cell.
        phase: that is measured, as the method planned it.
        first: step of it that is measured first.
        every: steps between updates of the masks; None: there are none.
        ways: how steps can be computed; `plain` is that of `run`.
        between: seconds between two ordinary steps, as `stages` found last.
        start: seconds of the phase's start; with its first update, if `updated_at_start`.

    Raises:
        CellError: the cell cannot be trained; says why.
    """

    def __init__(self, task: Task, steps: int = 0) -> None:
        self.task = task
        self._moments = moments(task)
        self.trainer = self._next()
        plan = self.trainer.plan
        index = at_work(plan)
        self.phase = plan[index]
        self.offset = sum(phase.steps for phase in plan[:index])
        self._set_plans(plan, index, steps)
        self.trainer.plan = self.full if steps else self.quiet
        self.start = self._train_up_to(index)
        self.plain = self.trainer.hot
        self.ways = {EAGER: self.plain}
        if isinstance(self.plain, Captured):
            trainer = self.trainer
            step = Step(trainer.method, trainer.state, trainer.stream, trainer.recipe)
            self.ways = {EAGER: step, GRAPH: self.plain}
        self.watched = Watched(self.trainer)
        self._clock, self._between = Stopwatch(self.device), Stopwatch(self.device)
        self.between = 0.0
        if not steps:
            self.go(self.first)

    def _set_plans(self, plan: Sequence[Phase], index: int, steps: int) -> None:
        """Makes the plan with updates and the one without, and says which steps are measured."""
        updates, length = self.phase.updates, max(self.phase.steps, steps, 2)
        short = [replace(_unmeasured(phase), steps=min(CUT, phase.steps)) for phase in plan[:index]]
        here = replace(_unmeasured(self.phase), steps=length)
        self.full = (*short, here, *plan[index + 1 :])
        self.quiet = (*short, replace(here, updates=None), *plan[index + 1 :])
        dues = [step for step in range(length) if updates is not None and updates.due(step)]
        self._dues = itertools.cycle(dues[len(dues) // 2 :])
        self.every = updates.every if updates is not None and dues else None
        self.updated_at_start = index == 0 and 0 in dues
        middle = dues[len(dues) // 2] if dues else length // 2
        self.first = 0 if steps else min(middle, length - 2)

    def _train_up_to(self, index: int) -> float:
        """Seconds of the start of the phase, which is trained up to."""
        before = 0.0
        while self.trainer.cursor.phase < index:
            before = self._cold()[0]
            self.step()
        return self._cold()[0] - before

    @property
    def device(self) -> torch.device:
        """That computes."""
        return self.trainer.state.lr.device

    def close(self) -> None:
        """Ends the run, wherever it is; nothing is written."""
        self._moments.close()

    def notes(self) -> Iterator[str]:
        """What should be known beside the figures."""
        if isinstance(self.plain, Captured) and not self.plain.replayed:
            yield f"not replayed as a CUDA graph: {self.plain.reason}"

    def _next(self) -> Trainer:
        """Goes on until a step is due."""
        for event in self._moments:
            if isinstance(event, Trainer):
                return event
            if isinstance(event, Finished):
                raise CellError(event.record.reason or "its training ended")
        raise CellError("its training ended")

    def _cold(self) -> tuple[float, float]:
        """Seconds so far in cold hooks, and in looks at masks and at validation images."""
        self.trainer.settle()
        return self.trainer.cursor.update_seconds, self.trainer.cursor.eval_seconds

    def go(self, step: int) -> None:
        """Moves the cursor to a step of the phase."""
        self.trainer.cursor.step = step
        self.trainer.cursor.total = self.offset + step

    def step(self) -> None:
        """Computes the step that is due, and goes on until the next one is."""
        self.trainer.compute()
        self._next()

    def _watched_step(self) -> None:
        self.trainer.compute()
        with self._between.running():
            self._next()

    def steps(self, count: int, way: str = EAGER) -> float:
        """Seconds per step of some ordinary ones, computed in one of `ways`."""
        self._steps(count, self.ways[way], self.step)
        return self._clock.take() / count

    def stages(self, count: int) -> dict[str, float]:
        """Seconds per step in each stage, of some ordinary steps."""
        self._steps(count, self.watched, self._watched_step)
        self._clock.take()
        found = self.watched.take()
        between = self._between.take()
        self.between = between / count
        found["harness"] += between
        return {stage: spent / count for stage, spent in found.items()}

    def _steps(self, count: int, hot: Step, step: Callable[[], None]) -> None:
        trainer = self.trainer
        while count:
            if trainer.cursor.step + 2 >= self.quiet[trainer.cursor.phase].steps:
                self.go(self.first)
            if self._something_is_due():
                trainer.hot = self.plain
                self.step()
                continue
            trainer.hot = hot
            with self._clock.running():
                step()
            count -= 1
        trainer.hot = self.plain

    def really(self, count: int) -> float:
        """Seconds per step of so many, with everything that comes now and then."""
        for _ in range(count):
            with self._clock.running():
                self.step()
        return self._clock.take() / count

    def _something_is_due(self) -> bool:
        """Whether something comes after the step that is due, besides another step."""
        cursor = self.trainer.cursor
        return any(
            (done + 1) % period == 0
            for done, period in ((cursor.position, self.epoch), (cursor.total, self.interval))
            if period >= RARE
        )

    @property
    def epoch(self) -> int:
        """Steps between two orders of the data."""
        return self.trainer.stream.steps_per_epoch

    @property
    def interval(self) -> int:
        """Steps between two points of the curve."""
        return len(self.trainer.losses)

    def rare(self) -> dict[str, float]:
        """Seconds of what comes now and then, each by itself."""
        cursor = self.trainer.cursor
        found = dict.fromkeys(("order", "curve", "update", "watching"), 0.0)
        self.go(self.first)
        if self.epoch >= RARE:
            cursor.position += self.epoch - 1 - cursor.position % self.epoch
            found["order"] = self._between_steps()[0]
        self.go(self.first)
        if self.interval >= RARE:
            cursor.total += self.interval - 1 - cursor.total % self.interval
            whole, _, looked = self._between_steps()
            found["curve"] = whole - looked
        if self.every is not None:
            found["update"], found["watching"] = self._update()
        self.go(self.first)
        return found

    def _update(self) -> tuple[float, float]:
        """Seconds of an update of the masks, and of the harness's looks at it."""
        whole, kept = {}, self.trainer.dynamics.every
        self.trainer.plan = self.full
        for number in {0, kept - 1}:  # of every so many updates, the first is looked at closely
            self.go(next(self._dues) - 1)
            self.trainer.cursor.updates = number
            whole[number] = self._between_steps()
        self.trainer.plan = self.quiet
        updates = [hooks for _, hooks, _ in whole.values()]
        rest = {number: all_ - hooks for number, (all_, hooks, _) in whole.items()}
        return statistics.mean(updates), (rest[0] + (kept - 1) * rest[kept - 1]) / kept

    def _between_steps(self) -> tuple[float, float, float]:
        """Seconds that come between two steps beside `between`; in cold hooks; and in looks."""
        self.trainer.compute()
        before = self._cold()
        with self._clock.running():
            self._next()
        whole, after = self._clock.take() - self.between, self._cold()
        return whole, after[0] - before[0], after[1] - before[1]

    def divided(self, rare: Mapping[str, float]) -> dict[str, float]:
        """Seconds per step, by stage, of what `rare` found and of the phase's start."""
        every = self.every or 1
        return {
            "data": rare["order"] / self.epoch,
            "harness": rare["curve"] / self.interval + rare["watching"] / every,
            "updates": rare["update"] / every,
            "phase start": self.start_alone(rare) / self.phase.steps,
        }

    def start_alone(self, rare: Mapping[str, float]) -> float:
        """Seconds of the phase's start without an update."""
        return max(0.0, self.start - rare["update"] * self.updated_at_start)

    def evaluation(self) -> float:
        """Seconds of a run's looks at validation and test images, per step of it."""
        trainer, task = self.trainer, self.task
        validation = trainer.data.validation
        split = validation if len(validation) else trainer.data.train
        count = min(len(split), chunk_size(trainer.data.info.shape))
        some = Split(split.images[:count], split.labels[:count])
        evaluate(trainer.state.model, some, trainer.data)
        with self._clock.running():
            evaluate(trainer.state.model, some, trainer.data)
        trainer.state.model.train()
        arrays = load_data(task.cell.spec.dataset, task.recipe, task.data, task.start)
        images = evaluated(trainer, len(arrays.y_test))
        return self._clock.take() / count * images / trainer.total_steps


def at_work(plan: Sequence[Phase]) -> int:
    """Index of the first phase that prunes or updates masks; else of the first with steps."""
    for index, phase in enumerate(plan):
        prunes = phase.density is not None and phase.density < 1
        updates = phase.updates is not None and phase.updates.count(phase.steps) > 0
        if phase.steps and (prunes or updates):
            return index
    return next(index for index, phase in enumerate(plan) if phase.steps)


def _unmeasured(phase: Phase) -> Phase:
    return replace(phase, measured=False, validate_every=None)


def evaluated(trainer: Trainer, test: int) -> int:
    """Images that a run evaluates: at points of the curve, at looks, and after measured phases.

    Args:
        trainer: of the run, at whatever step; its plan may have been cut.
        test: images of the test set.
    """
    plan, steps = trainer.method.plan(trainer.budget, trainer.density), trainer.total_steps
    epochs = -(-steps // trainer.stream.steps_per_epoch)
    looks = min(-(-steps // len(trainer.losses)), epochs)
    looks += sum(-(-phase.steps // phase.validate_every) for phase in plan if phase.validate_every)
    tests = 1 + sum(1 + bool(phase.validate_every) for phase in plan if phase.measured)
    return looks * len(trainer.data.validation) + tests * test


class Watched(Step):
    """Computes steps as `Step` does, with a watch on every part.

    Args:
        trainer: of the run; its own step is left as it is.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.method, trainer.state, trainer.stream, trainer.recipe)
        names = ("data", "forward", "penalty", "backward", "finish", "hot hooks", "optimizer")
        self.watches = {name: Stopwatch(self.device) for name in names}
        self.method: Any = _Hooks(trainer.method, self.watches)
        self._advance = _Advance(trainer.state.optimizer, self.watches["optimizer"])
        self._watched = trainer

    def compute(self) -> None:
        """One step, by the passes that the run's own would take."""
        watches = self.watches
        self._passes = self._watched.hot._passes
        with watches["data"].running():
            images, labels = self.stream.read()
        with watches["forward"].running():
            loss = self.forward(images, labels)
        with watches["backward"].running():
            self.backward(loss)
        with watches["finish"].running():
            self.finish(loss)

    def take(self) -> dict[str, float]:
        """Seconds in each stage since the last call; all that is no step is 0."""
        spent = {name: watch.take() for name, watch in self.watches.items()}
        found = dict.fromkeys(STAGES, 0.0) | {n: s for n, s in spent.items() if n in STAGES}
        found["forward"] -= spent["penalty"]
        found["hot hooks"] += spent["penalty"]
        found["harness"] = spent["finish"] - spent["hot hooks"] - spent["optimizer"]
        return found


class _Hooks:
    """The hot hooks of a method, timed."""

    def __init__(self, method: SparsityMethod, watches: Mapping[str, Stopwatch]) -> None:
        self.penalty = timed(method.penalty, watches["penalty"])
        self.edit_gradients = timed(method.edit_gradients, watches["hot hooks"])
        self.project = timed(method.project, watches["hot hooks"])


class _Advance(Advance):
    """The optimizer's step, with a watch that runs while it does."""

    def __init__(self, optimizer: Optimizer, watch: Stopwatch) -> None:
        super().__init__(optimizer)
        self.watch = watch

    def __call__(self) -> None:
        with self.watch.running():
            super().__call__()


def timed(function: Callable[..., Any], watch: Stopwatch) -> Callable[..., Any]:
    """The function, with a watch that runs while it does."""

    def run(*args: Any, **options: Any) -> Any:
        with watch.running():
            return function(*args, **options)

    return run
