"""A method with a fault in one of its hooks, and what runs a suite of it: `python -m bench run`.

The method is offered by an entry point of a package that lies in a folder on PYTHONPATH, as those
of other people do. Whether the fault is there is what a file says, so it can come and go during a
run, in every process of it.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from methods.api import Controls, SparsityMethod
from methods.rigl import RigL
from tests.bench.cells import ROOT, Command
from tests.faults.test_stop import Heard

FAULT = "SPARSEBENCH_TEST_FAULT"
"""Names the file. It holds a name of `FAULTS`, and perhaps the words `once` and `training`."""

HOOKS = sorted(
    name
    for name, value in vars(SparsityMethod).items()
    if name == "__post_init__"
    or (not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)))
)
"""Of the interface itself, so that one that it gets is tried too."""


def _raise() -> None:
    raise RuntimeError("the fault\nof two lines")


def _leave() -> None:
    sys.exit("leaving")


def _no_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)  # torch's own allocator refuses


def _no_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _no_python_memory() -> None:
    bytearray(2**62)


def _hang() -> None:
    time.sleep(10**6)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _told() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _leave_thread() -> None:
    threading.Thread(target=time.sleep, args=(10**6,)).start()


def _fork() -> None:
    os.fork()


def _fork_and_leave() -> None:
    if os.fork() == 0:
        sys.exit(3)


def _fork_and_die() -> None:
    """The child keeps what was open, and its number lies beside the file that asked for it."""
    if child := os.fork():
        Path(os.environ[FAULT]).with_suffix(".pid").write_text(str(child))
        _killed()
    _hang()


def _close_all() -> None:
    os.closerange(3, 256)


def _close_and_hang() -> None:
    _close_all()
    _hang()


def _not_a_number() -> torch.Tensor:
    return torch.tensor(float("nan"))


FAULTS: dict[str, Callable[[], Any]] = {
    "raises": _raise,
    "leaves": _leave,
    "memory": _no_memory,
    "gpu memory": _no_gpu_memory,
    "python memory": _no_python_memory,
    "hangs": _hang,
    "killed": _killed,
    "told": _told,
    "thread": _leave_thread,
    "forks": _fork,
    "forks and leaves": _fork_and_leave,
    "forks and dies": _fork_and_die,
    "closes": _close_all,
    "closes and hangs": _close_and_hang,
    "nan": _not_a_number,
}


def happens() -> Any:
    """What goes wrong here and now, if anything does."""
    try:
        path = Path(os.environ[FAULT])
        kind, *words = path.read_text().split(", ")
    except (KeyError, FileNotFoundError):
        return None
    if "training" in words and not _in_training():
        return None
    if "once" in words:
        path.unlink()
    return FAULTS[kind]()


def _in_training() -> bool:
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") in ("bench.runner", "bench.together"):
            return True
        frame = frame.f_back
    return False


def _faulty(kind: type) -> type:
    """The class with every hook wrapped: the one that a cell names goes wrong."""
    for name in HOOKS:
        whole = getattr(kind, name)
        hook = whole.fget if isinstance(whole, property) else whole

        def wrong(self: Any, *given: Any, _name: str = name, _hook: Any = hook) -> Any:
            found = happens() if self.hook == _name else None
            return _hook(self, *given) if found is None else found

        wrapped: Any = functools.wraps(hook)(wrong)
        setattr(kind, name, property(wrapped) if isinstance(whole, property) else wrapped)
    return kind


@_faulty
@dataclass(frozen=True)
class Faulty(RigL):
    """RigL, one of whose hooks may go wrong."""

    hook: str = ""


@_faulty
@dataclass(frozen=True)
class FaultyPenalty(SparsityMethod):
    """Dense training, as a method that a penalty drives; one of its hooks may go wrong."""

    controls: ClassVar[Controls] = "penalty"
    hook: str = ""


@dataclass(frozen=True)
class Place:
    """A folder with a suite, in which the fault can be made and taken away.

    Attributes:
        folder: of everything.
        real: commands begin with `python -m bench`, not with a fork of what has been imported.
    """

    folder: Path
    real: bool = False

    @property
    def fault(self) -> Path:
        """The file that says what goes wrong."""
        return self.folder / "fault"

    @property
    def records(self) -> Path:
        """Folder of the records."""
        return self.folder / "records"

    def install(self) -> None:
        """Writes the package that offers the method."""
        info = self.folder / "site" / "faulty-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
        lines = [f"{name} = {__name__}:{kind}" for name, kind in OFFERED.items()]
        (info / "entry_points.txt").write_text("\n".join(["[sparsebench.methods]", *lines, ""]))

    def start(
        self, *arguments: str | Path, also: Callable[[], None] | None = None, **environment: str
    ) -> Command:
        """A command that has begun; `also` is called first, where it is forked."""
        where = environment | {FAULT: str(self.fault)}
        output = self.folder / "output.txt"
        if self.real and also is None:
            return Begun(arguments, output, str(self.folder / "site"), where)
        prepare = Prepared(str(self.folder / "site"), where, also)
        return Heard(*arguments, output=output, prepare=prepare)

    def run(
        self,
        suite: Path,
        *options: str,
        records: Path | None = None,
        also: Callable[[], None] | None = None,
        **environment: str,
    ) -> Command:
        """`sparsebench run` that has begun, with one worker unless options say otherwise."""
        given = options if "--workers" in options else (*options, "--workers", "1")
        place = ("--records", records or self.records)
        return self.start("run", suite, *place, *given, also=also, **environment)


OFFERED = {"faulty": "Faulty", "faulty_penalty": "FaultyPenalty"}


@dataclass(frozen=True)
class Prepared:
    """To be called in the command's process: what its environment is to be."""

    site: str
    environment: dict[str, str]
    also: Callable[[], None] | None = None

    def __call__(self) -> None:
        os.environ.update(self.environment)
        sys.path.append(self.site)
        # Workers import as this process does.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        if self.also is not None:
            self.also()


class Begun(Command):
    """A command that is a process of its own from the start."""

    def __init__(
        self, arguments: Any, output: Path, site: str, environment: dict[str, str]
    ) -> None:
        self.output = output
        paths = os.pathsep.join([str(ROOT), site])
        with output.open("w") as said:
            self.process: Any = subprocess.Popen(
                [sys.executable, "-m", "bench", *map(str, arguments)],
                cwd=output.parent,
                env={**os.environ, **environment, "PYTHONPATH": paths},
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    def wait(self, seconds: float = 120) -> int:
        """Exit status; minus the signal where one ended it."""
        return int(self.process.wait(seconds))

    def kill(self) -> None:
        """Ends it without a chance to save anything."""
        self.process.kill()
        self.process.wait()


def place(folder: Path, request: pytest.FixtureRequest) -> Place:
    """A place in a folder; for the fixture of this name in `conftest.py`."""
    made = Place(folder, real=getattr(request, "param", "forked") == "python -m bench")
    made.install()
    return made
