"""Real processes that are told to stop, or killed while they write a checkpoint: nothing is lost.

Each command is a process of its own; its workers are others. What it leaves is compared with a run
that was never disturbed, to the last bit.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import pytest

from bench import checkpoint, saving
from bench.distributed import Group
from bench.runner import moments
from bench.signals import listen, request
from bench.store import Store
from bench.task import Note, Stopped
from bench.trainer import Trainer
from tests.bench.cells import (
    Command,
    plan_of,
    stored,
    tasks_of,
    train,
    wait_for,
    write_suite,
)
from tests.faults.test_kill import check, children, runs, saved, small

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Heard(Command):
    """A command that heeds Ctrl-C, whatever started the tests."""

    def __init__(
        self, *arguments: str | Path, output: Path, prepare: Callable[[], None] | None = None
    ) -> None:
        super().__init__(*arguments, output=output, prepare=functools.partial(_hear, prepare))


def _hear(prepare: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare is not None:
        prepare()


def begun(records: Path, cells: int) -> bool:
    """Whether so many cells train or are done; leases come with the first and go with the last."""
    return (
        len(list((records / "tiny" / "checkpoints").glob("*.safetensors"))) + len(stored(records))
        >= cells
    )


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGTERM, 1),
        (signal.SIGINT, 2),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.faults),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.faults),
    ],
)
def test_a_run_that_is_told_to_stop_saves_every_cell_and_goes_on(number, workers, tmp_path):
    path = small(tmp_path)
    undisturbed, records = tmp_path / "undisturbed", tmp_path / "records"
    train(path, undisturbed)
    arguments = ("run", path, "--records", records, "--workers", str(workers))

    run = Heard(*arguments, "--checkpoint-seconds", "0.2", output=tmp_path / "output.txt")
    wait_for(lambda: begun(records, workers) or not run.process.is_alive(), seconds=120)
    helpers = children(run.process.pid) if Path("/proc/self/task").exists() else []
    before = saved(records)
    os.kill(run.process.pid, number)
    assert run.wait() == 128 + number, run.said
    assert "Saved and stopped. The same command goes on." in run.said
    wait_for(lambda: not any(map(runs, helpers)))
    assert len(stored(records)) < 3  # it did not train to the end
    after = saved(records)
    assert after
    for cell, steps in before.items():
        assert after.get(cell, 0) > steps or (records / "tiny" / f"{cell}.json").exists()
    assert not (records / "tiny" / "attempts").exists()

    again = Command(*arguments, output=tmp_path / "output.txt")
    assert again.wait() == 0, again.said
    check(records, undisturbed)


def _slow_to_save() -> None:
    write = checkpoint.write

    def slowly(*arguments: object) -> None:
        Path("saving").touch()
        time.sleep(60)
        write(*arguments)  # type: ignore[arg-type]

    checkpoint.write = slowly


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_does_not_wait_for_the_saving(number, tmp_path, monkeypatch):
    path = write_suite(tmp_path, budget="{ epochs = 4000 }")  # stopped long before its end
    records = tmp_path / "records"
    arguments = ("run", path, "--records", records, "--workers", "1")
    monkeypatch.chdir(tmp_path)
    run = Heard(*arguments, output=tmp_path / "output.txt", prepare=_slow_to_save)
    wait_for(lambda: list(records.glob("tiny/locks/*")), seconds=60)
    time.sleep(0.5)
    os.kill(run.process.pid, number)
    wait_for(lambda: Path("saving").exists())
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait(30) == 128 + number, run.said
    assert "Stopped. The same command goes on from the last checkpoints." in run.said


class Watched(Group):
    """A group of one that remembers what it tells the others of the ends of cells."""

    told: ClassVar[list[tuple[str, str]]] = []

    def end(self, number: int, status: str, reason: str = "") -> None:
        self.told.append((status, reason))


def test_ranks_beside_a_cell_that_goes_wrong_while_it_stops_are_told_that_it_has(tmp_path):
    """Else they would wait for it until their patience is over."""
    store = Store(tmp_path / "records", "tiny")
    (task,) = tasks_of(plan_of(write_suite(tmp_path)), store, group=Watched())
    with listen(), closing(moments(task)) as run:
        assert isinstance(next(run), Trainer)
        request()
        assert isinstance(run.throw(RuntimeError("a pipe broke")), Note)
        assert isinstance(next(run), Stopped)
        assert Watched.told == [("stopped", "RuntimeError: a pipe broke")]


STAGES = ["open", "fsync", "hardlink_to", "replace", "names"]
"""Of writing a checkpoint: nothing, everything but its name, the old one's second name, its own
name, and the folder on disk."""


def _killed_in(stage: str, count: int) -> None:
    """Has this process killed in the `count`-th checkpoint it writes, as `kill -9` does."""
    writes = 0
    write, open_, fsync = checkpoint.write, Path.open, os.fsync
    hardlink_to, replace = Path.hardlink_to, Path.replace

    def here(name: str) -> None:
        if writes == count and name == stage:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(*arguments: object) -> None:
        nonlocal writes
        writes += 1
        write(*arguments)  # type: ignore[arg-type]

    def opened(self: Path, *arguments: object, **options: object) -> object:
        file = open_(self, *arguments, **options)  # type: ignore[call-overload]
        if self.suffix == ".tmp" and writes == count and stage == "open":
            file.write(b"half")
            file.flush()
            here("open")
        return file

    def synced(descriptor: int) -> None:
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")  # noqa: PTH112
        if not is_folder:
            here("fsync")
        fsync(descriptor)
        if is_folder:
            here("names")

    def linked(self: Path, target: Path) -> None:
        here("hardlink_to")
        hardlink_to(self, target)

    def replaced(self: Path, target: Path) -> Path:
        here("replace")
        return replace(self, target)

    saving.checkpoint.write = counted  # type: ignore[assignment]
    os.fsync = synced  # type: ignore[assignment]
    Path.open, Path.hardlink_to, Path.replace = opened, linked, replaced  # type: ignore


class KilledIn:
    """To be called in the process that is to be killed."""

    def __init__(self, stage: str, count: int) -> None:
        self.stage, self.count = stage, count

    def __call__(self) -> None:
        _killed_in(self.stage, self.count)


def test_a_run_killed_in_every_stage_of_writing_a_checkpoint_loses_nothing(tmp_path):
    path = write_suite(
        tmp_path,
        "[methods.rigl]\n[methods.dpf]\n[methods.one_shot]",
        budget="{ epochs = 5, max_multiple = 1.2 }",
    )
    undisturbed, records = tmp_path / "undisturbed", tmp_path / "records"
    train(path, undisturbed)
    arguments = ("run", path, "--records", records, "--workers", "1", "--checkpoint-seconds", "0")
    for number, stage in enumerate(STAGES * 2):
        before = saved(records)
        run = Heard(
            *arguments, output=tmp_path / "output.txt", prepare=KilledIn(stage, 3 + 4 * number)
        )
        assert run.wait() == -signal.SIGKILL, run.said
        after = saved(records)
        assert sum(after.values()) > sum(before.values()) or len(stored(records))
        assert "damaged" not in run.said
    last = Command(*arguments, output=tmp_path / "output.txt")
    assert last.wait() == 0, last.said
    check(records, undisturbed)
    assert Store(records, "tiny").attempts() == []
