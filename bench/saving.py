"""When a cell that trains is saved, and when it has to stop so that there is time for that."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

import torch

from bench import checkpoint
from bench.errors import NotStored
from bench.trainer import Trainer

DISK_SPEED = 100e6
"""Bytes a second that are expected of a disk before anything was written to it."""

SAFETY = 1.5
"""Seconds that are kept for saving, over those that the last time took."""

WARM_UP = 5
"""Steps of which some are slow in a way that does not come again: compiled, recorded, paged in."""

COPIES = 3
"""Checkpoints on disk while one is written: the former, the newest, and that one."""

_expected: dict[str, float] = {}  # all cells of this process are saved at the end, in turn


class Saver:
    """Writes a cell's checkpoints.

    Args:
        trainer: the run.
        path: of the checkpoint.
        key: of the cell.
        seconds: between checkpoints.
        deadline: of `time.monotonic`, at which everything must be saved; infinity: never.
    """

    def __init__(
        self, trainer: Trainer, path: Path, key: str, seconds: float, deadline: float
    ) -> None:
        self._trainer, self._path, self._key = trainer, path, key
        self._seconds, self._deadline = seconds, deadline
        self._due = time.monotonic() + seconds
        self._before = math.inf
        self._slowest = 0.0
        self._steps = 0
        _expected[key] = checkpoint.size(trainer) / DISK_SPEED

    def close(self) -> None:
        """Nothing is going to be saved any more."""
        _expected.pop(self._key, None)

    def late(self, now: float) -> bool:
        """Whether there is no time for another step; to be asked after each.

        Args:
            now: of `time.monotonic`.
        """
        if self._deadline == math.inf:
            return False
        # A step now and then is a long one: it looks at validation images, or updates the masks.
        last = now - self._before
        self._before = now
        self._steps += 1
        if self._steps > WARM_UP:
            last = self._slowest = max(self._slowest, last)
        return now + max(0.0, last) + SAFETY * sum(_expected.values()) >= self._deadline

    def due(self, now: float) -> bool:
        """Whether the last checkpoint, or the start, is long enough ago."""
        return now >= self._due

    def save(self) -> None:
        """Writes a checkpoint.

        Raises:
            NotStored: it cannot be written; the last one is as it was.
        """
        started = time.monotonic()
        try:
            if self._trainer.group.leads:
                checkpoint.write(self._trainer, self._path, self._key)
        except OSError as error:
            raise NotStored(
                f"{self._path}: cannot be written ({error.strerror or error})"
            ) from error
        finally:
            self._before = now = time.monotonic()
            self._due = now + self._seconds
            _expected[self._key] = now - started


def check_disk(trainer: Trainer, path: Path, masks: int) -> None:
    """Refuses a cell whose files would not fit on the disk.

    Args:
        trainer: the cell, before its first step.
        path: of its checkpoint; the rest lies on the same disk.
        masks: how many times its masks are kept.

    Raises:
        NotStored: says how much is missing.
    """
    weights = sum(p.numel() * p.element_size() for p in trainer.state.model.parameters())
    bits = sum(mask.numel() for mask in trainer.state.masks.values()) // 8
    # Optimizers make up to two tensors of the weights' size, of which none is there yet.
    needed = COPIES * (checkpoint.size(trainer) + 2 * weights) + weights + masks * bits
    folder = next(folder for folder in path.parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NotStored(
            f"{folder}: the disk has {_readable(free)} left, and the cell's checkpoints, weights "
            f"and masks need {_readable(needed)}. Make room, and run the suite again"
        )


def check_device(trainer: Trainer) -> None:
    """Refuses a cell of which not even weights, gradients and optimizer fit on the GPU.

    Raises:
        torch.OutOfMemoryError: says how much is missing.
    """
    device = trainer.state.lr.device
    if device.type != "cuda":
        return
    weights = sum(p.numel() * p.element_size() for p in trainer.state.model.parameters())
    needed = 2 * weights  # weights and masks are there; gradients and momentum are not
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    if free < needed:
        raise torch.OutOfMemoryError(
            f"{device} has {_readable(free)} left, and gradients and momentum alone need "
            f"{_readable(needed)}. End what else uses it, or give another --device"
        )


def _readable(count: int) -> str:
    """Bytes, as people say them."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"
