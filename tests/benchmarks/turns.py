"""Loops that take turns: each lives in a process of its own and computes only when it is told to.

Nothing is shared but the processor, whose load and clock change over minutes; so contestants run in
slices of a few seconds, one after the other, and are compared within each round.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Tick = Callable[[int], None]
"""Called after each step with the images that it took."""

Loop = Callable[[Tick], None]
"""Sets itself up and computes steps for ever; a function of a module, or a partial of one."""


@dataclass(frozen=True)
class Rates:
    """Images per second of each contestant, one figure a round; rounds are comparable."""

    of: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Images per second."""
        return statistics.median(self.of[name])

    def ratio(self, name: str, to: str) -> float:
        """Median over the rounds of one contestant's rate over another's."""
        pairs = zip(self.of[name], self.of[to], strict=True)
        return statistics.median(one / other for one, other in pairs)


def race(
    loops: Mapping[str, Loop], rounds: int, seconds: float, *, cpu_time: bool = False
) -> Rates:
    """Lets the contestants run in turns.

    Args:
        loops: name -> loop.
        rounds: slices of each, besides a first one that warms it up.
        seconds: of a slice.
        cpu_time: counts the seconds that the processor spent on a contestant, not those that went
            by: where others use the machine too.
    """
    found: dict[str, list[float]] = {name: [] for name in loops}
    with ExitStack() as stack:
        live = {name: stack.enter_context(started(loop, cpu_time)) for name, loop in loops.items()}
        for number in range(rounds + 1):
            for name, run in live.items():
                rate = run(seconds)
                if number:
                    found[name].append(rate)
            print(f"round {number} of {rounds}", file=sys.stderr)
    return Rates({name: tuple(rates) for name, rates in found.items()})


@contextmanager
def started(loop: Loop, cpu_time: bool = False) -> Iterator[Callable[[float], float]]:
    """A live contestant: a function that lets it run for some seconds; gives images per second."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_live, args=(loop, there, cpu_time), daemon=False)
    process.start()
    there.close()

    def run(seconds: float) -> float:
        try:
            here.send(seconds)
            images, taken = here.recv()
        except (EOFError, OSError):
            process.join(timeout=5)
            raise RuntimeError(f"the loop {loop} ended (exit code {process.exitcode})") from None
        return float(images / taken)

    try:
        yield run
    finally:
        here.close()
        process.join(timeout=5)
        process.kill()
        process.join()


def _live(loop: Loop, connection: Connection, cpu_time: bool) -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        loop(_Slices(connection, time.process_time if cpu_time else time.perf_counter))
    except _Over:
        return


class _Over(KeyboardInterrupt):
    """Nobody listens any more; no error that a loop may catch and record."""


class _Slices:
    """Counts what a loop has done, and holds it up between its slices."""

    def __init__(self, connection: Connection, clock: Callable[[], float]) -> None:
        self.connection, self.clock = connection, clock
        self.images, self.started, self.seconds = 0, 0.0, -1.0

    def __call__(self, images: int) -> None:
        self.images += images
        taken = self.clock() - self.started
        if taken < self.seconds:
            return
        try:
            if self.seconds >= 0:  # else it has just set itself up
                self.connection.send((self.images, taken))
            self.seconds = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise _Over from None
        self.images, self.started = 0, self.clock()


@contextmanager
def counted_steps(tick: Tick, batch: int) -> Iterator[None]:
    """Has every step of any optimizer of this process counted."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def after(optimizer: Any, args: Any, kwargs: Any) -> None:
        tick(batch)

    handle = register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        handle.remove()
