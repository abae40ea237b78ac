"""A Ray cluster of this machine: the same records as one process, whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import executors
from bench.cell_queue import Queue
from bench.determinism import WORKSPACE
from bench.executors import perform
from bench.ray_executor import OnRay
from bench.signals import listen, request
from bench.store import Store
from bench.task import Event, Finished, Note, Progress, Stopped, Ways
from tests.bench.cells import (
    ROOT,
    by_key,
    plan_of,
    sparsebench,
    stored,
    tasks_of,
    train,
    wait_for,
    write_suite,
)
from tests.faults.clusters import started

METHODS = "[methods.dense]\n[methods.rigl]\n[methods.dpf]\n[methods.one_shot]"


@pytest.fixture(scope="module")
def ray(one_cluster: None) -> Iterator[object]:
    """Four CPUs, whatever the machine has."""
    with started(4, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}) as library:
        yield library


def statuses(events: list[Event]) -> dict[str, str]:
    return {e.record.label: e.record.status for e in events if isinstance(e, Finished)}


def ray_workers() -> list[int]:
    """Processes that train a cell; Ray names them after what they do."""
    named = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=1) for line in named.stdout.splitlines()]
    return [int(pid) for pid, what in lines if what.startswith("ray::Worker")]


def ours(pid: int) -> bool:
    """Whether the Ray worker belongs to this process's cluster."""
    parents = []
    while pid > 1:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pid = int(stat[1])
        parents.append(pid)
    return os.getpid() in parents


def test_four_ray_workers_give_the_same_records_as_one_process(ray, tmp_path):
    suite = write_suite(tmp_path, METHODS)
    store = Store(tmp_path / "records", "tiny")
    events = list(perform(Queue(tasks_of(plan_of(suite), store), store), OnRay(threads=1)))
    assert statuses(events) == dict.fromkeys(["dense", "rigl", "dpf", "one_shot"], "ok")
    assert any(isinstance(event, Progress) for event in events)
    alone = by_key(train(suite, tmp_path / "alone"))
    assert stored(tmp_path / "records") == alone
    for path in (store.folder / "weights").iterdir():
        assert path.read_bytes() == (tmp_path / "alone/tiny/weights" / path.name).read_bytes()
    assert not list((store.folder / "locks").iterdir())


def test_workers_of_a_strict_run_have_what_cublas_needs_for_equal_bits(ray, tmp_path, monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")  # the cluster was started without it
    suite = write_suite(tmp_path)
    store = Store(tmp_path / "records", "tiny")
    for strict, value in ((False, None), (True, ":16:8")):
        (task,) = tasks_of(plan_of(suite), store, ways=Ways(strict=strict))
        (record,) = (
            event.record
            for event in perform(Queue([task], store), OnRay(threads=1))
            if isinstance(event, Finished)
        )
        assert record.status == "ok"
        assert dict(record.environment.settings).get(WORKSPACE) == value
        store.path(record.spec).unlink()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="not run: no /proc here")
@pytest.mark.faults
def test_a_ray_worker_that_is_killed_costs_a_try_of_its_cell(ray, tmp_path):
    suite = write_suite(tmp_path, METHODS, budget="{ steps = 1500, max_multiple = 1.2 }")
    store = Store(tmp_path / "records", "tiny")
    queue = Queue(tasks_of(plan_of(suite), store, checkpoint_seconds=0.1), store, retries=1)
    killed: list[int] = []
    events = []
    for event in perform(queue, OnRay(threads=1, count=2)):
        events.append(event)
        if isinstance(event, Progress) and event.done > 100 and not killed:
            killed = [pid for pid in ray_workers() if ours(pid)][:1]
            os.kill(killed[0], signal.SIGKILL)
    assert set(statuses(events).values()) == {"ok"}
    (attempt,) = store.attempts()
    assert attempt.status == "lost"
    assert "the Ray worker died" in attempt.reason
    assert len([event for event in events if isinstance(event, Note)]) == 1
    assert stored(tmp_path / "records") == by_key(train(suite, tmp_path / "alone"))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="not run: no /proc here")
@pytest.mark.faults
def test_a_ray_worker_that_hangs_is_ended_and_its_cell_goes_on_later(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "GRACE_SECONDS", -540)  # 60 of the 600 that cells may take
    suite = write_suite(tmp_path, METHODS, budget="{ steps = 1500, max_multiple = 1.2 }")
    store = Store(tmp_path / "records", "tiny")
    tasks = tasks_of(plan_of(suite), store, checkpoint_seconds=0.1, timeout_seconds=600)
    queue, label = Queue(list(tasks), store), ""
    events = []
    for event in perform(queue, OnRay(threads=1, count=1)):
        events.append(event)
        if isinstance(event, Progress) and event.done > 100 and not label:
            label = queue.taken[event.key][0].cell.label
            for pid in filter(ours, ray_workers()):
                os.kill(pid, signal.SIGSTOP)
    found = statuses(events)
    assert found.pop(label) == "timeout"
    assert set(found.values()) == {"ok"}
    assert len(found) == 3
    assert set(statuses(list(perform(Queue(list(tasks), store), OnRay(threads=1)))).values()) == {
        "ok"
    }
    assert stored(tmp_path / "records") == by_key(train(suite, tmp_path / "alone"))


def test_a_stop_has_the_cells_of_ray_workers_saved(ray, tmp_path):
    suite = write_suite(tmp_path, "[methods.dense]\n[methods.rigl]", budget="{ steps = 1_000_000 }")
    store = Store(tmp_path / "records", "tiny")
    tasks = tasks_of(plan_of(suite), store)
    events = []
    with listen():
        for event in perform(Queue(list(tasks), store), OnRay(threads=1)):
            events.append(event)
            if {e.key for e in events} == {task.cell.spec.key for task in tasks}:
                request()
    assert sum(isinstance(event, Stopped) for event in events) == 2
    assert all(task.checkpoint.exists() for task in tasks)
    assert stored(tmp_path / "records") == {}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="not run: no /proc here")
@pytest.mark.faults
def test_a_driver_that_is_killed_loses_nothing(one_cluster, tmp_path):
    pytest.importorskip("ray", reason="not run: no ray")
    suite = write_suite(tmp_path, METHODS, budget="{ steps = 1500, max_multiple = 1.2 }")
    records = tmp_path / "records"
    before = set(ray_workers())
    options = ("--records", records, "--checkpoint-seconds", "0")
    driver = sparsebench(
        "run", suite, *options, "--executor", "ray", "--workers", "2", cwd=tmp_path
    )
    try:
        wait_for(lambda: list((records / "tiny" / "checkpoints").glob("*.safetensors")), 120)
    finally:
        driver.kill()
        said = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, said
    wait_for(lambda: not set(ray_workers()) - before, 120)
    kept = stored(records)
    again = sparsebench("run", suite, *options, "--workers", "1", cwd=tmp_path)
    assert again.wait() == 0, again.communicate()
    again.communicate()
    assert stored(records) == by_key(train(suite, tmp_path / "alone"))
    assert len(kept) < 4
    assert not list((records / "tiny" / "locks").iterdir())


def test_without_ray_a_line_says_what_to_install(tmp_path):
    suite = write_suite(tmp_path)
    code = (
        "import sys; sys.modules['ray'] = None\n"
        f"sys.argv = ['sparsebench', 'run', {str(suite)!r}, '--executor', 'ray']\n"
        "from bench.cli import main; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        "sparsebench: --executor ray: Ray is not installed. Install it: pip install "
        "'sparsebench[ray]'\n"
    )
