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

NO_LOCKS = (OSError, NotImplementedError)
"""What filelock raises where files cannot be made or locked."""


class Presence:
    """A cell that trains on a device; others of the same user can see it until it is closed.

    Where the folder cannot be written, or its disk knows no locks, nobody is seen.

    Args:
        device: that it trains on.
    """

    def __init__(self, device: torch.device) -> None:
        self._name = _name(device)
        self._lock: FileLock | None = None
        with suppress(*NO_LOCKS):
            folder().mkdir(parents=True, exist_ok=True)
            names = (folder() / f"{self._name}-{number}.lock" for number in range(MOST))
            self._lock = next(filter(None, map(_taken, names)), None)

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
        with suppress(*NO_LOCKS):
            others = set(folder().glob(f"{self._name}-*.lock")) - {Path(self._lock.lock_file)}
            return any(map(_held, others))
        return False


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


def _taken(path: Path) -> FileLock | None:
    """The file, locked; None where somebody else holds it."""
    lock = FileLock(path, thread_local=False)  # a run may be closed by another thread
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _held(path: Path) -> bool:
    """Whether somebody else holds it."""
    if lock := _taken(path):
        lock.release()
    return lock is None
