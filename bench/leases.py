"""Which runner trains a cell: leases as files, for runners that share only a folder. No torch.

The lease of NAME is the file `NAME.1`. Only one runner can create it; from then on its owner
appends a byte now and then: the beat. Where the file has stayed as it is for some time, by the
clock of whoever looks, or where its owner ran on this machine and is gone, the other may create
`NAME.2`, which again only one can, and so on; the highest number holds. So no clocks of two
machines are compared, no file is ever written over, and the file system need know no locks.
"""

from __future__ import annotations

import json
import os
import platform
import re
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

STALE_SECONDS = 120.0
"""After so long without a beat a lease may be taken over: far longer than disks shared by network
keep others from seeing what was written."""

NUMBER = re.compile("[1-9][0-9]{0,8}")
"""How a lease's file ends. Whatever else ends in digits is not ours."""

FOLDER = b"a folder"
"""Stands for the content of one that bears a lease's name: nobody holds it."""

BEATS = 8
"""Beats that an owner has before its lease goes stale."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A file that says whose a cell is.

    Attributes:
        name: of the lease, without its number.
        number: how often it was taken over, from 1 on.
        owner: the file's first line, which no other lease has.
        descriptor: of the open file. Beats go to the file that was created, also where another
            bears its name by now.
    """

    name: Path
    number: int
    owner: bytes
    descriptor: int

    @property
    def path(self) -> Path:
        """The file."""
        return _file(self.name, self.number)

    def held(self) -> bool:
        """Whether nobody else has taken it over."""
        content = _content(self.path)
        mine = content is not None and content.startswith(self.owner)
        return mine and not _file(self.name, self.number + 1).exists()

    def beat(self) -> None:
        """Says that the owner is there.

        Raises:
            OSError: the file system does not take it.
        """
        os.write(self.descriptor, b".")
        os.fsync(self.descriptor)  # others see it once it is on the shared disk


class Leases:
    """The leases of one runner, which a thread keeps alive until they are given back.

    Args:
        stale_seconds: after so long without a beat others' leases are taken over; all runners of a
            folder should agree on it.
    """

    def __init__(self, stale_seconds: float | None = None) -> None:
        self.stale_seconds = STALE_SECONDS if stale_seconds is None else stale_seconds
        self._own: list[Lease] = []
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Gives everything back."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        for lease in list(self._own):
            self.release(lease)

    def acquire(self, name: Path) -> Lease | None:
        """The lease of a name; None where another runner has it, or was faster.

        Raises:
            OSError: its folder cannot be written.
        """
        name.parent.mkdir(parents=True, exist_ok=True)
        number = max(_numbers(name), default=0)
        stale = self._stale(_file(name, number)) if number else None
        if number and stale is None:
            return None
        lease = _create(name, number + 1)
        if lease is None:
            return None
        # What it was decided on may be gone: given back and taken anew, or overtaken.
        found = _numbers(name)
        if max(found, default=0) != lease.number or (
            number and _content(_file(name, number)) != stale
        ):
            _give_up(lease)
            return None
        for lower in found:
            if lower < lease.number:
                with suppress(OSError):  # it does no harm: the highest number holds
                    _file(name, lower).unlink()
        self._keep(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """Gives a lease back; nothing happens to that of another who has taken it over."""
        with self._lock:  # no beat meanwhile
            self._own.remove(lease)
            os.close(lease.descriptor)
        if lease.held():
            lease.path.unlink(missing_ok=True)

    def _stale(self, path: Path) -> bytes | None:
        """The content of a lease that may be taken over; None of any other."""
        content = _content(path)
        if content in (None, FOLDER) or _is_orphan(content):
            return content
        now = time.monotonic()
        seen, since = self._seen.get(path, (None, now))
        if seen != content:
            self._seen[path] = (content, now)
            return None
        return content if now - since >= self.stale_seconds else None

    def _keep(self, lease: Lease) -> None:
        with self._lock:
            self._own.append(lease)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        while not self._closed.wait(self.stale_seconds / BEATS):
            with self._lock:
                for lease in self._own:
                    # Whether the lease is still held is asked before anything is written.
                    with suppress(OSError):
                        lease.beat()


def _file(name: Path, number: int) -> Path:
    return name.with_name(f"{name.name}.{number}")


def _numbers(name: Path) -> list[int]:
    """Numbers of a name's files. Few files lie in the folder: those of cells that are trained."""
    start = f"{name.name}."
    with os.scandir(name.parent) as entries:
        ends = [entry.name.removeprefix(start) for entry in entries if entry.name.startswith(start)]
    return [int(end) for end in ends if NUMBER.fullmatch(end)]


def _content(path: Path) -> bytes | None:
    """What a file holds; None where it is gone, or cannot be read at the moment."""
    try:
        return path.read_bytes()
    except OSError:
        return FOLDER if path.is_dir() else None


def _create(name: Path, number: int) -> Lease | None:
    """A new file; None where it exists."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
    try:
        descriptor = os.open(_file(name, number), flags, 0o666)
    except FileExistsError:
        return None
    pid = os.getpid()
    owner = {"id": uuid.uuid4().hex, "machine": _machine(), "pid": pid, "started": _stat(pid)[1]}
    lease = Lease(name, number, json.dumps(owner).encode() + b"\n", descriptor)
    try:
        os.write(descriptor, lease.owner)
        os.fsync(descriptor)
    except OSError:
        _give_up(lease)
        raise
    return lease


def _give_up(lease: Lease) -> None:
    os.close(lease.descriptor)
    lease.path.unlink(missing_ok=True)


def _is_orphan(content: bytes) -> bool:
    """Whether the owner is known to be gone: a process of this machine that has ended.

    A runner that was killed need not be waited for.
    """
    try:
        owner = json.loads(content.partition(b"\n")[0])
        machine, pid, started = owner["machine"], owner["pid"], owner["started"]
    except (ValueError, TypeError, KeyError, RecursionError):  # not written yet, or not ours
        return False
    return machine == _machine() and isinstance(pid, int) and not _runs(pid, started)


@cache
def _machine() -> str:
    """What processes share that see each other's numbers: one boot, and one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}"


def _runs(pid: int, started: str) -> bool:
    """Whether a process is there, as far as can be told; not another one of its number."""
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):  # the latter: no process can have it
            return False
        except PermissionError:  # somebody else's
            pass
    state, now = _stat(pid)
    return state not in "ZX" and now in (started, "")


def _stat(pid: int) -> tuple[str, str]:
    """A process's state and when it began; empty where the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "?", ""
    state, *others = stat.rpartition(")")[2].split()
    return state, others[18]
