"""Processes that end themselves by SIGKILL in the middle of what they do, and say where.

A `Site` is named by what is under way and by the system call that never comes: `checkpoint rename`.
An order in a folder outside of the store names the site, and how often it is passed before. Who
gets there first takes the order, so that it costs one process, and dies. In that folder too lie a
log of what cells went through, and for each process what it is doing at the moment, which others
may look at while it is stopped.
"""

from __future__ import annotations

import builtins
import functools
import io
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode

from bench import checkpoint, executors, ray_executor, runner, together
from bench.task import Task
from bench.trainer import Trainer
from tests.bench.cells import Command

LAYOUT = "iii"
"""Whether steps are computed, and nothing else is done; steps done, and of how many."""


@dataclass(frozen=True)
class Desk:
    """The folder of orders, of the log, and of what processes are doing."""

    folder: Path

    @property
    def order(self) -> Path:
        """Its number, a site, and how often that is passed before; gone once somebody took it."""
        return self.folder / "order"

    def want(self, number: int, site: str, before: int) -> None:
        """Gives an order."""
        new = self.folder / "new"
        new.write_text(f"{number},{site},{before}")
        new.rename(self.order)

    def withdraw(self) -> bool:
        """Takes the order away, to die by it or because nobody will; only one can."""
        try:
            self.order.unlink()
        except FileNotFoundError:
            return False
        return True

    def training(self, pid: int) -> tuple[int, int] | None:
        """Steps done of how many, where a process is between a cell's first and last step."""
        found = self.status(pid).read_bytes()
        if len(found) < struct.calcsize(LAYOUT):  # it is about to say
            return None
        now, done, total = struct.unpack(LAYOUT, found)
        return (done, total) if now else None

    def pids(self) -> list[int]:
        """Processes that say what they are doing, or did."""
        return [int(path.name) for path in (self.folder / "status").glob("*")]

    def clear(self) -> None:
        """Forgets processes: workers of a driver that was killed may live for a moment more."""
        for pid in self.pids():
            self.status(pid).unlink()

    def status(self, pid: int) -> Path:
        """What a process is doing, in `LAYOUT`."""
        return self.folder / "status" / str(pid)

    def note(self, *words: object) -> None:
        """A line of the log; whole lines, whoever writes."""
        descriptor = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
        os.close(descriptor)

    def notes(self) -> list[list[str]]:
        """The log, in words."""
        path = self.folder / "log"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


class Doomed(Command):
    """`sparsebench` of which each process that trains or writes records heeds orders."""

    def __init__(self, *arguments: str | Path, output: Path, desk: Desk) -> None:
        super().__init__(*arguments, output=output, prepare=functools.partial(_doom, desk))


def _doom(desk: Desk) -> None:
    executors._work = functools.partial(_doomed_work, desk)  # type: ignore[assignment]

    class Worker(ray_executor.Worker):
        def __init__(self, threads: int) -> None:
            heed(desk)
            super().__init__(threads)

    # Ray sends a class that is defined in a function whole, with the desk.
    ray_executor.Worker = Worker  # type: ignore[misc]
    heed(desk)


def _doomed_work(desk: Desk, *arguments: Any) -> None:
    from bench.executors import _work

    heed(desk)
    _work(*arguments)


def heed(desk: Desk) -> None:
    """From now on this process says what it does, and dies where an order wants it to."""
    _Heeding(desk).begin()


class _Heeding:
    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.order = ""
        self.passed = 0
        self.key = ""
        path = desk.status(os.getpid())
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(struct.calcsize(LAYOUT)))
        with path.open("r+b") as file:
            self.status = mmap.mmap(file.fileno(), 0)

    def begin(self) -> None:
        self._watch_files()
        self._watch_cells()

    def at(self, site: str) -> None:
        """Dies, if that is the order."""
        try:
            order = self.desk.order.read_text()
        except FileNotFoundError:
            return
        if order != self.order:
            self.order, self.passed = order, 0
        _, wanted, before = order.split(",")
        if site != wanted:
            return
        self.passed += 1
        if self.passed <= int(before) or not self.desk.withdraw():
            return
        self.desk.note("killed", os.getpid(), site)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def _watch_files(self) -> None:
        fsync, open_ = os.fsync, io.open

        def synced(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
            if path.is_dir():
                fsync(descriptor)
                self.at(f"{_what(path / 'x')} names")
                return
            self.at(f"{_what(path)} sync")
            fsync(descriptor)

        def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = open_(path, mode, *arguments, **options)
            if not set(mode) & set("wax") or not isinstance(path, str | Path):
                return file
            what = _what(Path(path))
            return _Torn(file, functools.partial(self.at, f"{what} half")) if what else file

        os.fsync, io.open, builtins.open = synced, opened, opened  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Before the system does it. A name is given: renamed, linked; or it is taken away."""
        if event in ("os.rename", "os.link"):
            if what := _what(Path(arguments[1])):
                self.at(f"{what} {event.removeprefix('os.')}")
        elif event == "os.remove":
            path = Path(arguments[0])
            what = _what(path)
            if what == "record" and path.name.endswith(f".{os.getpid()}.new"):
                record = path.with_name(path.name[1:].rpartition(".json.")[0] + ".json")
                if record.exists() and record.samefile(path):
                    self.desk.note("record", os.getpid(), record.stem.rpartition("-")[2])
                self.at("record unlink")
            elif what == "checkpoint" and path.suffix == ".safetensors":
                self.at("finish checkpoint")
            elif what == "lease":
                self.at("finish lease")

    def _watch_cells(self) -> None:
        moments, steps, write = together.moments, Trainer.moments, checkpoint.write
        make_method, evaluate = runner.make_method, runner.evaluate

        def watched(task: Task) -> Generator[Any, None, None]:
            self.key = task.cell.spec.key
            # Where the record lies, seen from the weights of the cell.
            record = task.weights.parent.parent / f"{task.weights.stem}.json"
            self.desk.note("begun", os.getpid(), self.key, record.exists())
            yield from moments(task)

        def stepped(trainer: Trainer) -> Iterator[int | None]:
            total = trainer.total_steps
            self.desk.note("from", os.getpid(), self.key, trainer.cursor.total)
            try:
                for done in steps(trainer):
                    now = trainer.cursor.total
                    struct.pack_into(LAYOUT, self.status, 0, 0 < now < total, now, total)
                    yield done
            finally:
                self.busy()
            self.desk.note("trained", os.getpid(), self.key)

        def written(trainer: Trainer, *arguments: Any) -> None:
            busy = self.busy()
            write(trainer, *arguments)
            self.busy(busy)

        def made(*arguments: Any) -> Any:
            method = make_method(*arguments)
            update, finish = method.update, method.finish

            def updated(run: Any) -> None:
                self.busy()
                self.at("update begin")
                with _Counted(functools.partial(self.at, "update middle")):
                    update(run)
                self.at("update end")
                # It is training again once the step that is due has been told of.

            def finished(run: Any) -> None:
                self.at("finish hook")
                finish(run)

            object.__setattr__(method, "update", updated)  # methods are frozen
            object.__setattr__(method, "finish", finished)
            return method

        def tested(*arguments: Any) -> Any:
            self.at("finish test")
            return evaluate(*arguments)

        together.moments = watched  # type: ignore[assignment]
        Trainer.moments = stepped  # type: ignore[method-assign]
        checkpoint.write = written
        runner.make_method, runner.evaluate = made, tested

    def busy(self, training: int = 0) -> int:
        """Says that something else is done than steps; whether steps were computed before."""
        before = struct.unpack_from("i", self.status)[0]
        struct.pack_into("i", self.status, 0, training)
        return int(before)


def _what(path: Path) -> str:
    """What a file of the store is; empty for others, and for the list of cells."""
    match path.parent.name:
        case "checkpoints":
            return "checkpoint"
        case "weights":
            return "weights"
        case "locks":
            return "lease"
        case "tiny":
            return "record" if ".json" in path.name and "suite.json" not in path.name else ""
    return ""


class _Torn:
    """A file of whose content half is there when the process dies."""

    def __init__(self, file: Any, dies: Any) -> None:
        self._file, self._dies = file, dies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._dies()
        return half + int(self._file.write(content[half:]))


class _Counted(TorchFunctionMode):
    """Has something done before each operation of torch."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self._before = before

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self._before()
        return function(*args, **(kwargs or {}))
