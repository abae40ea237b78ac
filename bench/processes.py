"""How worker processes are made: from one that has imported torch while its parent still did.

A process that starts anew imports for three seconds; one that is forked off a server of its own,
which has no threads and has touched no GPU, begins at once and ends at once.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

LOADED = ["bench.together", "torch._dynamo"]
"""What all workers need; torch imports its compiler when an optimizer takes its first step."""


def context() -> Any:
    """As of `multiprocessing.get_context`."""
    if not _can_fork():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(LOADED)
    return found


def begin_early() -> None:
    """Has the server import what it needs, while this process does other things."""
    if _can_fork():
        context()
        forkserver.ensure_running()


def likely(workers: int, device: str) -> bool:
    """Whether a run will have worker processes, as far as can be told without torch.

    Args:
        workers: as asked for; 0: the run decides.
        device: likewise; `auto`: a GPU if there is one.
    """
    if workers or device.startswith("cuda"):
        return workers > 1
    return cores() > 1 and (device == "cpu" or not Path("/dev/nvidiactl").exists())


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _can_fork() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()
