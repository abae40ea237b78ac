"""Stretches of work, timed on the device that does it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up stretches of work; on a GPU without waiting for any of them.

    There, what the host spends says nothing: it only gives orders. Events in the device's own queue
    are read when somebody asks.

    Args:
        device: that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times what is inside; what ends in an error is not counted."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record(torch.cuda.current_stream(self.device))
        yield
        end.record(torch.cuda.current_stream(self.device))
        self._events.append((start, end))

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        taken, self._seconds = self._seconds, 0.0
        return taken


def wait_for(device: torch.device) -> None:
    """Returns once the device has done what it was told here; other streams go on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
