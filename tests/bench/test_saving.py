"""When a cell is saved, when it must stop so that there is time for that, and whether it fits."""

from __future__ import annotations

import errno
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import checkpoint, saving
from bench.errors import NotStored
from bench.saving import SAFETY, WARM_UP, Saver, check_disk
from tests.tiny import tiny_trainer


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The clock of `saving`; saving itself takes two seconds of it, and writes nothing."""
    clock = Clock()

    def write(*_: object) -> None:
        clock.now += 2

    monkeypatch.setattr(saving, "time", clock)
    monkeypatch.setattr(checkpoint, "write", write)
    monkeypatch.setattr(saving, "_expected", {})
    return clock


def saver(key: str = "key", seconds: float = 60.0, deadline: float = 1100.0) -> Saver:
    return Saver(tiny_trainer("dense"), Path("file"), key, seconds, deadline)


def test_a_checkpoint_is_due_so_long_after_the_last_was_written(clock):
    one = saver()
    assert not one.due(1059)
    assert one.due(1060)
    clock.now = 1060
    one.save()
    assert not one.due(1121)  # it took until 1062
    assert one.due(1122)


def late_at(one: Saver, clock: Clock, seconds: float) -> float:
    """Time at which a cell of such steps stops."""
    while not one.late(clock.now):
        clock.now += seconds
    return clock.now


def test_steps_stop_before_the_deadline_by_one_step_and_what_saving_took(clock):
    one = saver()
    one.save()
    assert saving._expected == {"key": 2.0}
    stopped = late_at(one, clock, 0.5)
    assert stopped + 0.5 + 2 * SAFETY == pytest.approx(1100, abs=0.5)
    assert stopped + 0.5 + 2 * SAFETY >= 1100 > stopped + 2 * SAFETY


def test_a_long_step_now_and_then_is_foreseen_but_not_those_of_the_start(clock):
    one = saver()
    one.save()
    for seconds in [30, *[0.1] * WARM_UP, 7]:  # compiled at first; looked at validation images
        assert not one.late(clock.now)
        clock.now += seconds
    assert late_at(one, clock, 0.1) == pytest.approx(1100 - 7 - 2 * SAFETY, abs=0.2)


def test_all_cells_of_the_process_are_to_be_saved_in_time(clock):
    cells = [saver(str(number)) for number in range(4)]
    for one in cells:
        one.save()
    cells[3].close()
    assert late_at(cells[0], clock, 0.5) == pytest.approx(1100 - 0.5 - 3 * 2 * SAFETY, abs=0.5)


def test_before_anything_was_saved_a_slow_disk_is_assumed(clock, monkeypatch):
    monkeypatch.setattr(checkpoint, "size", lambda _: 10 * saving.DISK_SPEED)
    assert late_at(saver(), clock, 0.5) == pytest.approx(1100 - 0.5 - 10 * SAFETY, abs=0.5)


def test_without_a_deadline_no_cell_is_late(clock):
    assert not saver(deadline=math.inf).late(1e12)


def test_what_cannot_be_written_is_named_and_tried_again_later(clock, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write", refuse)
    one = saver()
    clock.now = 1070
    with pytest.raises(NotStored, match=r"^file: cannot be written \(No space left on device\)$"):
        one.save()
    assert not one.due(1129)
    assert one.due(1130)


def test_a_disk_that_is_too_full_is_told_before_the_first_step(tmp_path, monkeypatch):
    trainer = tiny_trainer("rigl")
    path = tmp_path / "not" / "yet" / "file"
    check_disk(trainer, path, masks=1)
    usage = SimpleNamespace(free=1500)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(NotStored, match=rf"^{tmp_path}: the disk has 1\.5 kB left, and the cell's"):
        check_disk(trainer, path, masks=1)
    # What is asked for covers what is written: three checkpoints of a run that has begun.
    for _ in trainer.run():
        pass
    usage.free = 3 * checkpoint.size(trainer)
    with pytest.raises(NotStored):
        check_disk(tiny_trainer("rigl"), path, masks=1)


@pytest.mark.gpu
def test_a_gpu_that_is_too_full_is_told_before_the_first_step(monkeypatch):
    trainer = tiny_trainer("rigl")
    state = SimpleNamespace(model=trainer.state.model, lr=torch.zeros((), device="cuda"))
    saving.check_device(SimpleNamespace(state=state))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)
    with pytest.raises(torch.OutOfMemoryError, match="cuda:0 has 0 bytes left"):
        saving.check_device(SimpleNamespace(state=state))  # type: ignore[arg-type]
