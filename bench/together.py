"""Cells of one process, side by side: each goes on to its next step, then all are computed.

On a CPU small networks are computed as one (`bench.stack`). On a GPU each has a stream of its own,
and its graph is replayed there while the others' are too. A cell draws its random numbers from its
own state of the process's generators, so that it never notices its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch

from bench import checkpoint
from bench.packing import SETTLED, Fixed, Packing
from bench.runner import ends_run, moments
from bench.stack import Stack, group, stackable
from bench.step import precision
from bench.task import Event, Task
from bench.trainer import Trainer

Take = Callable[[Task | None], Task | None]
"""Gives the next cell, if there is one; while others run, one that can be computed with them."""


def run_cell(task: Task) -> Generator[Event, None, None]:
    """Trains one cell by itself; events as of `bench.runner.moments`."""
    left = [task]
    yield from run_cells(lambda _: left.pop() if left else None, Fixed(1))


def run_cells(take: Take, packing: Packing) -> Generator[Event, None, None]:
    """Trains cells until there is none to take and none under way.

    Args:
        take: asked whenever one more may begin.
        packing: says whether one may.

    Yields:
        The events of all.
    """
    running: list[_Cell] = []
    stacks = _Stacks()
    newest: _Cell | None = None
    try:
        while True:
            while packing.admits(len(running), newest.steps if newest else SETTLED):
                task = take(running[0].task if running else None)
                if task is None:
                    break
                alone = packing == Fixed(1)
                # One that goes on may have begun in a stack.
                new = task.ways.stack == 1 and not checkpoint.kept(task.checkpoint)
                if alone and new and task.device == "cpu":
                    yield from _by_itself(task)
                    continue
                newest = _Cell(task, alone)
                running.append(newest)
            if not running:
                return
            for cell in running:
                yield from cell.advance()
            if any(cell.ended for cell in running):
                newest = None if newest and newest.ended else newest
                running = [cell for cell in running if not cell.ended]
                torch.cuda.empty_cache()  # on a GPU, what they leave is free for the next
                stacks.keep([cell.trainer for cell in running])
            stacks.compute(running)
    finally:
        for cell in running:
            cell.moments.close()


def _by_itself(task: Task) -> Iterator[Event]:
    """A cell that nothing runs beside: nothing need be kept apart, which small networks notice."""
    error: BaseException | None = None
    with closing(moments(task)) as run:
        while True:
            moment = run.throw(error) if error else next(run, None)
            error = None
            if isinstance(moment, Trainer):
                try:
                    moment.compute()
                except BaseException as found:
                    if ends_run(found):
                        raise
                    error = found
            elif moment is None:
                return
            else:
                yield moment


@dataclass
class _Cell:
    """A cell under way, with what of the process is its own.

    Attributes:
        alone: nothing else runs in this process, so nothing need be kept apart.
        trainer: of which a step is due.
        error: of that step.
        steps: that were due so far, in this process.
        noise: state of the CPU's random generator.
    """

    task: Task
    alone: bool
    trainer: Trainer | None = None
    error: BaseException | None = None
    ended: bool = False
    steps: int = 0
    noise: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.moments = moments(self.task)
        self.device = torch.device(self.task.device)
        # Not the device's first stream: what is recorded there waits for all others.
        self.gpu = _OnGpu(self.device) if self.device.type == "cuda" else None

    def advance(self) -> Iterator[Event]:
        """Goes on to the next step that is due, or to the end."""
        self.trainer = None
        while self.trainer is None:
            with self.own():
                error, self.error = self.error, None
                moment = self.moments.throw(error) if error else next(self.moments, None)
            if moment is None:
                self.ended = True
                return
            if isinstance(moment, Trainer):
                self.trainer = moment
                self.steps += 1
            else:
                yield moment

    def compute(self) -> None:
        """Computes the step that is due, by itself."""
        assert self.trainer is not None
        with self.caught(), self.own():
            self.trainer.compute()

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Keeps an error for the cell, whose record it will be."""
        try:
            yield
        except BaseException as error:
            if ends_run(error):
                raise
            self.error = error

    @contextmanager
    def own(self) -> Iterator[None]:
        """The cell's stream and random numbers."""
        if self.gpu is not None:
            with self.gpu.own(), self._own_noise():
                yield
        elif self.alone:
            yield
        else:
            with self._own_noise():
                yield

    @contextmanager
    def _own_noise(self) -> Iterator[None]:
        if self.noise is not None:
            torch.set_rng_state(self.noise)
        try:
            yield
        finally:
            self.noise = torch.get_rng_state()


class _OnGpu:
    """What a cell has of a GPU for itself.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        # Not the device's first stream, on which no graph can be recorded.
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        self.generator = torch.cuda.default_generators[index]
        # A state of its own, not numbers that are put back: graphs keep hold of their state, and
        # read where they stand in it while others do the same.
        self.noise = self.generator.clone_state()

    @contextmanager
    def own(self) -> Iterator[None]:
        """Its stream, and its state of the device's random generator."""
        before = self.generator.graphsafe_get_state()
        self.generator.graphsafe_set_state(self.noise)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            self.noise = self.generator.graphsafe_get_state()
            self.generator.graphsafe_set_state(before)


@dataclass
class _Stack:
    """Places of cells that are computed as one; a cell keeps its place."""

    kind: Hashable
    stack: Stack
    places: list[Trainer | None]


class _Stacks:
    """Computes what is due: stacked where cells are to be, else one after the other."""

    def __init__(self) -> None:
        self.stacks: list[_Stack] = []

    def keep(self, trainers: Sequence[Trainer | None]) -> None:
        """Frees the places of all others."""
        for stack in self.stacks:
            stack.places = [place if place in trainers else None for place in stack.places]
        self.stacks = [stack for stack in self.stacks if any(stack.places)]

    def compute(self, cells: Sequence[_Cell]) -> None:
        """Computes the step of every cell."""
        wide: dict[Trainer, _Cell] = {}
        for cell in cells:
            assert cell.trainer is not None
            with cell.caught():
                if cell.trainer.width > 1 and self._seat(cell.trainer):
                    wide[cell.trainer] = cell
                else:
                    cell.compute()
        for stack in self.stacks:
            started = time.perf_counter()
            seated = [wide.get(trainer) if trainer else None for trainer in stack.places]
            _compute_as_one(stack.stack, seated)
            share = (time.perf_counter() - started) / max(1, sum(map(bool, seated)))
            for trainer in filter(None, stack.places):
                trainer.cursor.train_seconds += share

    def _seat(self, trainer: Trainer) -> bool:
        """Gives a newcomer a place, in a new stack if need be; False if it cannot be stacked.

        Raises:
            RuntimeError: it could before.
        """
        seated = any(trainer in stack.places for stack in self.stacks)
        if trainer.step == 0 and (reason := stackable(trainer.state.model)):
            if trainer.cursor.total:
                raise RuntimeError(
                    f"in phase {trainer.phase.name} the network cannot be computed in a stack any "
                    f"more: {reason}; run the cell without --stack"
                )
            trainer.width = 1
            return False
        if not seated:
            self._place((trainer.width, group(trainer)), trainer)
        return True

    def _place(self, kind: Hashable, trainer: Trainer) -> None:
        for stack in self.stacks:
            if stack.kind == kind and None in stack.places:
                stack.places[stack.places.index(None)] = trainer
                return
        places: list[Trainer | None] = [trainer, *[None] * (trainer.width - 1)]
        self.stacks.append(_Stack(kind, Stack(trainer.width), places))


def _compute_as_one(stack: Stack, cells: Sequence[_Cell | None]) -> None:
    """Computes a stack's step; an error of the passes is every cell's, one of a hook its own."""
    penalties = [_penalty(cell) if cell else None for cell in cells]
    places = [cell.trainer if cell and cell.error is None else None for cell in cells]
    if not any(places):
        return
    try:
        losses = stack.backward(places, penalties)
    except BaseException as error:
        if ends_run(error):
            raise
        for cell in filter(None, cells):
            cell.error = cell.error or error
        return
    for one, loss in zip(cells, losses, strict=True):
        if one and one.trainer and loss is not None:
            with one.caught(), one.own():
                one.trainer.hot.finish(loss)


def _penalty(cell: _Cell) -> torch.Tensor | None:
    """The method's penalty, drawn from the cell's own random numbers; an error is the cell's."""
    trainer = cell.trainer
    assert trainer is not None
    with cell.caught(), cell.own(), precision(trainer.recipe, trainer.state.lr.device):
        return trainer.method.penalty(trainer.state)
    return None
