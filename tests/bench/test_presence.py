"""Runs that train on one device see each other, and their records say so."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys

import pytest
import torch

from bench import presence, signals
from bench.presence import Presence
from bench.store import Store
from bench.task import Stopped
from bench.together import run_cell
from tests.bench.cells import ROOT, plan_of, tasks_of, write_suite
from tests.bench.test_runner import asked_after

CPU, OTHER = torch.device("cpu"), torch.device("meta")

HOLD = """
import torch
from bench.presence import Presence
with Presence(torch.device("cpu")):
    print("here", flush=True)
    input()
"""


@pytest.fixture
def task(tmp_path):
    """A cell of 44 steps."""
    plan = plan_of(write_suite(tmp_path))
    (task,) = tasks_of(plan, Store(tmp_path / "records", "tiny"))
    return task


def timing(task):
    *_, last = run_cell(task)
    return last.record.execution.timing


def stop_after(steps, task, monkeypatch):
    with monkeypatch.context() as patched, signals.listen():
        asked_after(patched, steps)
        *_, stopped = run_cell(task)
    assert stopped == Stopped(task.cell.spec.key, steps)


def test_cells_on_a_device_see_each_other_until_they_leave():
    with Presence(CPU) as first:
        assert not first.crowded()
        with Presence(CPU) as second, Presence(CPU) as third:
            first.close()
            assert second.crowded()
            assert third.crowded()
            second.close()
            assert not third.crowded()
            with Presence(CPU):
                assert third.crowded()


def test_cells_on_another_device_are_not_seen():
    with Presence(CPU) as here, Presence(OTHER) as there:
        assert not here.crowded()
        assert not there.crowded()


def test_who_has_left_sees_nobody():
    with Presence(CPU), Presence(CPU) as left:
        left.close()
        left.close()
        assert not left.crowded()


def test_another_process_is_seen_until_it_is_killed():
    command = [sys.executable, "-c", HOLD]
    pipe = subprocess.PIPE
    with Presence(CPU) as here, subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe) as run:
        assert run.stdout.readline() == b"here\n"
        assert here.crowded()
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not here.crowded()


def test_a_folder_that_cannot_be_written_shows_nobody(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(presence.FOLDER, str(tmp_path / "file" / "folder"))
    with Presence(CPU), Presence(CPU) as here:
        assert not here.crowded()


def test_a_folder_that_goes_away_shows_nobody(tmp_path, monkeypatch):
    with Presence(CPU), Presence(CPU) as here:
        monkeypatch.setenv(presence.FOLDER, str(tmp_path / "gone"))
        assert not here.crowded()


def test_each_user_has_a_folder(monkeypatch):
    monkeypatch.delenv(presence.FOLDER)
    mine = presence.folder()
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert presence.folder() != mine


def test_a_cell_beside_another_run_says_that_its_seconds_are_not_its_own(task):
    with Presence(CPU):
        assert timing(task) == "shared"


def test_a_cell_with_nobody_on_its_device_has_its_own_seconds(task):
    with Presence(OTHER):
        assert timing(task) == "exclusive"


@pytest.mark.parametrize("when", range(4), ids=["begin", "saved", "resumed", "end"])
def test_another_run_at_any_time_is_remembered(when, task, monkeypatch):
    seen = iter([number == when for number in range(4)])
    monkeypatch.setattr(Presence, "crowded", lambda _: next(seen))
    stop_after(7, task, monkeypatch)
    assert timing(task) == "shared"
    assert not list(seen)


def test_beside_another_cell_of_its_run_is_remembered_when_it_goes_on_alone(task, monkeypatch):
    stop_after(7, dataclasses.replace(task, timing="shared"), monkeypatch)
    assert timing(task) == "shared"
