"""A method that leaves threads or processes behind, or never comes back: the run still ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from bench import executors, launch
from tests.bench.cells import ROOT, wait_for
from tests.faults.test_hooks import attempts, completed, suite_of
from tests.faults.test_kill import children

FAULTS = pytest.mark.faults


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        ("forks and leaves", "1"),
        ("thread", "1"),
        pytest.param("thread", "2", marks=FAULTS),
        pytest.param("forks", "2", marks=FAULTS),
        pytest.param("forks", "1", marks=FAULTS),
        pytest.param("forks and leaves", "2", marks=FAULTS),
    ],
)
def test_what_a_method_leaves_running_keeps_nobody_from_the_end(kind, workers, place):
    if place.real and kind != "thread":
        pytest.skip("not run: that commands begin alike is tried with a thread")
    suite = suite_of(place, "update")
    place.fault.write_text(f"{kind}, once")
    run = place.run(suite, "--workers", workers)
    try:
        assert run.wait() == 0, run.said
    finally:
        run.kill()
    assert not place.fault.exists()
    assert run.said.count("[2/2]") == 1  # a fork has not gone on as a second run
    assert "Traceback" not in run.said
    assert not attempts(place)
    completed(place, suite)


@FAULTS
@pytest.mark.parametrize(
    ("kind", "codes"),
    [
        ("forks and dies", {-9}),
        ("closes and hangs", {-9}),
        # It dies of the next file that it misses, or waits for one of which git has the number.
        ("closes", {1, -9}),
    ],
)
def test_a_worker_whose_end_cannot_be_heard_is_missed(kind, codes, place):
    if place.real:
        pytest.skip("not run: workers begin alike whatever has begun the command")
    suite = suite_of(place, "update")
    place.fault.write_text(f"{kind}, once")
    run = place.run(suite, "--workers", "2")
    try:
        assert run.wait() == 0, run.said
    finally:
        run.kill()
        with suppress(FileNotFoundError):
            os.kill(int(place.fault.with_suffix(".pid").read_text()), signal.SIGKILL)
    died = re.findall(r"the worker process died \(exit code (.*?)\); it is tried again", run.said)
    assert len(died) == 1
    assert int(died[0]) in codes
    assert attempts(place)["update"].status == "lost"
    completed(place, suite)


def _impatient() -> None:
    executors.LATE_SECONDS = launch.LATE_SECONDS = 2


@pytest.mark.parametrize(
    ("workers", "minutes"), [("1", "0.02"), pytest.param("2", "0.3", marks=FAULTS)]
)
def test_the_limit_of_time_holds_also_where_a_step_hangs(workers, minutes, place):
    if place.real:
        pytest.skip("not run: half a minute of patience is for people")
    suite = suite_of(place, "edit_gradients")
    place.fault.write_text("hangs, training")
    limit = ("--limit-minutes", minutes, "--workers", workers)
    run = place.run(suite, *limit, also=_impatient)
    try:
        assert run.wait() == 5, run.said
    finally:
        run.kill()
    assert "a step or its data hangs" in run.said
    assert "on from the last checkpoints." in run.said or "from its last checkpoint." in run.said
    assert "Traceback" not in run.said
    assert not attempts(place)
    completed(place, suite)


def imports_torch(pid: int) -> bool:
    """Whether a process is at it, or has."""
    with suppress(OSError):
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="not Linux")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_while_it_imports_ends_it_without_a_traceback(workers, place):
    """All processes of a terminal get it, so that of the workers does too."""
    suite = suite_of(place, "update")
    command = subprocess.Popen(
        [sys.executable, "-m", "bench", "run", suite, "--workers", workers],
        cwd=place.folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(place.folder / "site")])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    watched = children if workers == "2" else lambda pid: [pid]
    wait_for(lambda: any(map(imports_torch, watched(command.pid))))
    os.killpg(command.pid, signal.SIGINT)
    _, said = command.communicate(timeout=60)  # ends with the last of the processes
    assert command.returncode == -signal.SIGINT
    assert said == ""
