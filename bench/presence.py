"""Whether others train on the same device of this machine, so that seconds are not a cell's own.

Whoever trains a cell holds a file of the device locked: the first that nobody else holds. The
system lets go of it when the process ends, however it ends, so no file is ever stale.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
from filelock import FileLock, Timeout

FOLDER = "SPARSEBENCH_DEVICES"
"""Environment variable: another folder for the files, such as one that containers share."""

MOST = 4096
"""Cells of a device that can see each other: no `run` has more workers."""


class Presence:
    """A cell that trains on a device; others of the same user can see it until it is closed.

    Where the folder cannot be written, or its disk knows no locks, nobody is seen.

    Args:
        device: that it trains on.
    """

    def __init__(self, device: torch.device) -> None:
        self._name = _name(device)
        self._lock: FileLock | None = None
        with suppress(OSError):
            folder().mkdir(parents=True, exist_ok=True)
            self._lock = next(filter(_taken, map(self._file, range(MOST))), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """The cell no longer trains."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def crowded(self) -> bool:
        """Whether another cell trains on the device now."""
        if self._lock is None:
            return False
        with suppress(OSError):
            others = (self._file(number) for number in range(len(self._files())))
            return any(_held(lock) for lock in others if lock.lock_file != self._lock.lock_file)
        return False

    def _file(self, number: int) -> FileLock:
        # The run may be measured by one thread and closed by another.
        return FileLock(folder() / f"{self._name}-{number}.lock", thread_local=False)

    def _files(self) -> list[Path]:
        return list(folder().glob(f"{self._name}-*.lock"))


def folder() -> Path:
    """Where the files lie: on this machine, since disks may be shared by several."""
    if chosen := os.environ.get(FOLDER):
        return Path(chosen)
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""  # elsewhere, everybody has a folder
    return Path(tempfile.gettempdir()) / f"sparsebench{user}"


def _name(device: torch.device) -> str:
    """The same for all processes that have the device, whatever number it has in each."""
    if device.type != "cuda":
        return device.type
    return f"cuda-{torch.cuda.get_device_properties(device).uuid}"


def _taken(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _held(lock: FileLock) -> bool:
    """Whether somebody else holds it."""
    if _taken(lock):
        lock.release()
        return False
    return True
