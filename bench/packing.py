"""How many cells a process trains at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

SETTLED = 20
"""Steps after which a cell has taken the memory of its training."""

SLACK = 1.5
"""Memory that must be free for one more cell, over the most that one has taken: tests differ."""

MOST = 64
"""Cells on one device at most: more would not fill it any better."""


@dataclass
class Fixed:
    """So many cells, whatever they need.

    Attributes:
        places: cells at a time.
    """

    places: int

    def admits(self, running: int, newest_steps: int) -> bool:
        """Whether one more cell may begin.

        Args:
            running: cells at present.
            newest_steps: steps done of the one that began last; those of one that ended count as
                many.
        """
        return running < self.places


@dataclass
class Packed:
    """As many cells as fit, by the memory that those before them took.

    Cells begin one by one: the next when the last has settled and what it took is known.

    Attributes:
        taken: bytes that the process holds on the device.
        free: bytes that nobody holds.
        largest: bytes that a cell took at most.
    """

    taken: Callable[[], int]
    free: Callable[[], int]
    largest: int = 0
    _before: int | None = field(default=None, repr=False)

    def admits(self, running: int, newest_steps: int) -> bool:
        """See `Fixed`."""
        if self._before is not None:
            if running and newest_steps < SETTLED:
                return False
            self.largest = max(self.largest, self.taken() - self._before)
            self._before = None
        fits = not running or (running < MOST and self.free() > SLACK * self.largest)
        if fits:
            self._before = self.taken()
        return fits


Packing = Fixed | Packed


def packing(places: int, device: torch.device) -> Packing:
    """Places of a process.

    Args:
        places: cells at a time; 0: as many as fit on the GPU.
        device: where they train.
    """
    if places:
        return Fixed(places)
    return Packed(
        lambda: torch.cuda.memory_reserved(device), lambda: torch.cuda.mem_get_info(device)[0]
    )
