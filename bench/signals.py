"""A wish to stop, by a signal: remembered here, and looked up between steps. No torch.

SIGINT (Ctrl-C), SIGTERM (a cluster that wants its machine back) and SIGHUP (the terminal is gone)
say that a run is to save and leave. The first one is only remembered, so that every cell finishes
its step and writes its checkpoint; in the command's own process a second one ends it at once.

The command wraps what trains in `listen()`. A worker calls `follow()` once, before its first cell:
from then on SIGTERM (which its parent sends it, or a message after which it calls
`request(signal.SIGTERM)`) has its cells save and yield Stopped, and it takes no more of them; a
worker that is to end at once is killed. Whoever hands out cells asks `stop_requested()` first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)

_received = 0  # the first signal's number; 0: none came


def stop_requested() -> bool:
    """Whether cells are to save and stop; cheap enough for every step."""
    return _received != 0


def exit_status() -> int:
    """What shells expect of a process that a signal has ended, 130 for SIGINT, 143 for SIGTERM.

    0 where nobody asked to stop.
    """
    return 128 + _received if _received else 0


def request(number: int = signal.SIGTERM) -> None:
    """Asks to stop, as if a signal of this number had come; the first one counts."""
    global _received
    _received = _received or int(number)


def interrupted() -> bool:
    """Whether a KeyboardInterrupt may be somebody's Ctrl-C; else what a cell runs has raised it."""
    return stop_requested() or signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextmanager
def listen() -> Iterator[None]:
    """Remembers signals to stop while it lasts; then handlers and memory are as they were before.

    What is read of the wish is to be read inside. A second signal raises KeyboardInterrupt, so
    that workers and displays are closed; a third is the system's own and ends the process as it
    stands. Signals that are ignored, as by `nohup`, stay so. Elsewhere than in the main thread,
    where no handler can be set, only `request` counts.
    """
    global _received
    before, _received = _received, 0
    former = _install(_first_or_second)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _received = before


@contextmanager
def at_once() -> Iterator[None]:
    """Ctrl-C ends the process without a word while this lasts, for there is nothing to save.

    Else it is told by a traceback from the depth of an import, or by what a library makes of it.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def follow() -> None:
    """For workers, once and for good: SIGTERM asks to stop, however often it comes.

    SIGINT and SIGHUP reach every process of a terminal, and the parent decides what they mean.
    """
    global _received
    _received = 0  # a forked process has its parent's
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _remember)


def _install(handler: Handler) -> dict[int, Handler]:
    """Sets a handler where signals are not ignored; the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    deaf = (signal.SIG_IGN, None)  # None: not Python's to set back
    heard = [number for number in SIGNALS if signal.getsignal(number) not in deaf]
    return {number: signal.signal(number, handler) for number in heard}


def _remember(number: int, frame: FrameType | None) -> None:
    request(number)


def _first_or_second(number: int, frame: FrameType | None) -> None:
    if not stop_requested():
        request(number)
        return
    for one in SIGNALS:
        if signal.getsignal(one) is _first_or_second:
            signal.signal(one, signal.SIG_DFL)
    raise KeyboardInterrupt
