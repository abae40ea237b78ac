"""How worker processes are made: from one that has imported torch while its parent still did.

A process that starts anew imports for three seconds; one that is forked off a server of its own,
which has no threads and has touched no GPU, begins at once and ends at once.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, NoReturn

THREAD_SECONDS = 3.0
"""What threads that a method has left running have to end, once the process is to."""

LOADED = ["bench.together", "torch._dynamo"]
"""What all workers need; torch imports its compiler when an optimizer takes its first step."""


def context() -> Any:
    """As of `multiprocessing.get_context`; the server of its workers is there."""
    if not _can_fork():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(LOADED)
    resource_tracker.ensure_running()  # else the server starts it, which unblocks signals
    # The server has it blocked from birth on: Ctrl-C reaches all processes of a terminal, and
    # would have one that still imports say where it was.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
    return found


def begin_early() -> None:
    """Has the server import what it needs, while this process does other things."""
    if _can_fork():
        context()


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


@contextmanager
def undivided(process: int) -> Iterator[None]:
    """For code of others, which may fork: a child that comes to its end, or fails, is ended.

    Args:
        process: number of the one that is to go on.
    """
    try:
        yield
    finally:
        end_fork(process)


def end_fork(process: int) -> None:
    """Ends this process at once and unheard, unless it is the one of this number."""
    if os.getpid() != process:
        os._exit(0)


def lock_bars_here() -> None:
    """Gives the progress bars of tqdm, which torch has, a lock of this process.

    Else it is a semaphore of the system, of which a process that ends at once leaves a complaint.
    """
    with suppress(ImportError):
        importlib.import_module("tqdm").tqdm.set_lock(threading.RLock())


def end_at_once(status: int) -> NoReturn:
    """Ends this process whatever its threads do; Python itself would wait for them."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # nobody reads it any more, say
            stream.flush()
    os._exit(status)


def end_soon(status: int) -> None:
    """Has this process end soon after its main thread, though a method has left threads running.

    Args:
        status: of its exit.
    """
    main = threading.main_thread()
    left = [one for one in threading.enumerate() if one is not main and not one.daemon]
    if left:
        threading.Thread(target=_end_after, args=(main, left, status), daemon=True).start()


def _end_after(main: threading.Thread, left: list[threading.Thread], status: int) -> None:
    main.join()
    end = time.monotonic() + THREAD_SECONDS
    for one in left:
        one.join(max(0, end - time.monotonic()))
    if any(one.is_alive() for one in left):
        end_at_once(status)


def _can_fork() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()
