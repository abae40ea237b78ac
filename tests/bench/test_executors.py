"""Many cells: worker processes, crashes, other runners on the same folder, a limit of time."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import executors
from bench.cell_queue import Queue
from bench.checkpoint import FORMAT
from bench.cli import main
from bench.errors import RecordError
from bench.executors import execute
from bench.leases import Leases
from bench.store import Store
from bench.task import Elsewhere, Event, Finished, Progress, Stopped
from tests.bench.cells import (
    Command,
    by_key,
    forking,
    plan_of,
    stored,
    tasks_of,
    train,
    write_suite,
)

METHODS = "[methods.dense]\n[methods.rigl]\n[methods.dpf]\n[methods.one_shot]"


@pytest.fixture
def quick_workers(monkeypatch):
    """Workers that need not load torch; how the real ones start is tested in `tests/faults`."""
    context = forking()
    monkeypatch.setattr(executors.processes, "context", lambda: context)


def run(*arguments: str | float | Path) -> int:
    """The command line in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["sparsebench", "run", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def finished(events: list[Event]) -> dict[str, str]:
    """Status of each cell by its label."""
    return {e.record.label: e.record.status for e in events if isinstance(e, Finished)}


def test_two_workers_give_the_same_records_as_one_process(tmp_path, quick_workers):
    suite = write_suite(tmp_path, METHODS)
    alone = train(suite, tmp_path / "one", workers=1)
    side_by_side = train(suite, tmp_path / "two", workers=2)
    assert len(side_by_side) == 4
    assert by_key(side_by_side) == by_key(alone)
    assert stored(tmp_path / "two") == stored(tmp_path / "one") == by_key(alone)
    assert not list((tmp_path / "two").rglob("*.tmp"))
    assert [path for path in (tmp_path / "two").rglob("checkpoints/*") if path.is_file()] == []


def test_a_worker_that_is_killed_costs_its_cell_and_no_other(tmp_path, quick_workers):
    suite = write_suite(tmp_path, METHODS, budget="{ epochs = 20, max_multiple = 1.2 }")
    store = Store(tmp_path / "records", "tiny")
    tasks = tasks_of(plan_of(suite), store)
    started: list[executors._Worker] = []

    def remembered(*arguments) -> executors._Worker:
        started.append(start(*arguments))
        return started[-1]

    start = executors._start_worker
    victim = ""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(executors, "_start_worker", remembered)
        events = []
        for event in execute(tasks, store, workers=2, threads=1):
            events.append(event)
            if not victim and isinstance(event, Progress):
                (worker,) = (w for w in started if event.key in w.tasks)
                victim = worker.tasks[event.key].cell.label
                os.kill(worker.process.pid, signal.SIGKILL)
    statuses = finished(events)
    assert statuses.pop(victim) == "lost"
    assert set(statuses.values()) == {"ok"}
    assert len(statuses) == 3
    assert len(started) == 3  # another took its place
    assert not any(worker.process.is_alive() for worker in started)

    (attempt,) = (store.folder / "attempts").iterdir()
    assert "the worker process died (exit code -9)" in attempt.read_text()
    # The cell is still to do, and is the only one.
    assert [record.label for record in train(suite, tmp_path / "records")] == [victim]
    assert len(stored(tmp_path / "records")) == 4


def test_a_worker_whose_parent_is_gone_stops_in_the_middle_of_its_cell(tmp_path, quick_workers):
    suite = write_suite(tmp_path, budget="{ steps = 1_000_000 }")
    (task,) = tasks_of(plan_of(suite), Store(tmp_path / "records", "tiny"))
    worker = executors._start_worker(threads=1)
    assert worker.connection.recv() == executors._Wanted(None)
    worker.connection.send(task)
    assert isinstance(worker.connection.recv(), Progress)
    worker.connection.close()
    worker.process.join(10)
    assert worker.process.exitcode == 0


def _leave_thread(*given: object) -> None:
    threading.Thread(target=time.sleep, args=(10**6,)).start()


def _raise(*given: object) -> None:
    _leave_thread()
    raise GeneratorExit


def _work(serve: Callable[..., None]) -> None:
    executors._serve = serve
    executors._work(None, 1, 1, "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(("serve", "code"), [(_leave_thread, 0), (_raise, 1)])
def test_a_worker_ends_whatever_a_method_has_left_running_in_it(serve, code):
    process = forking().Process(target=_work, args=(serve,))
    process.start()
    process.join(60)
    found = process.exitcode
    process.kill()
    assert found == code


def test_two_runners_at_once_train_each_cell_once(tmp_path):
    suite = write_suite(tmp_path, METHODS, budget="{ epochs = 10, max_multiple = 1.2 }")
    arguments = ("run", suite, "--records", tmp_path / "records", "--workers", "1")
    runners = [Command(*arguments, output=tmp_path / f"{number}.txt") for number in range(2)]
    assert [one.wait() for one in runners] == [0, 0], [one.said for one in runners]
    lines = [line for one in runners for line in one.said.splitlines() if line.startswith("[")]
    labels = sorted(line.split("] ")[1].split()[0] for line in lines)
    assert labels == ["dense", "dpf", "one_shot", "rigl"]
    assert stored(tmp_path / "records") == by_key(train(suite, tmp_path / "alone"))
    assert not (tmp_path / "records" / "tiny" / "attempts").exists()


def test_a_cell_that_another_runner_holds_is_waited_for_and_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "BUSY_SECONDS", 0.01)
    suite = write_suite(tmp_path, METHODS)
    records = by_key(train(suite, tmp_path / "other"))
    store = Store(tmp_path / "records", "tiny")
    tasks = tasks_of(plan_of(suite), store)
    held = tasks[1].cell.spec
    others = Leases()
    lease = others.acquire(store.lock(held))
    assert lease is not None
    trained = []
    waits = []

    def wait(seconds: float) -> None:
        # All but the held cell are done by now; the other runner finishes at the second look.
        waits.append(len(trained))
        if len(waits) == 2:
            store.put(Store(tmp_path / "other", "tiny").get(held))
            others.release(lease)

    monkeypatch.setattr(time, "sleep", wait)
    for event in execute(tasks, store, workers=1, threads=1):
        if isinstance(event, Finished):
            trained.append(event.record.label)
    assert trained == ["dense", "dpf", "one_shot"]
    assert waits[:2] == [3, 3]
    assert stored(tmp_path / "records") == records


def test_a_cell_that_was_finished_meanwhile_is_not_trained_again(tmp_path):
    suite = write_suite(tmp_path, METHODS)
    store = Store(tmp_path / "records", "tiny")
    tasks = tasks_of(plan_of(suite), store)
    train(suite, tmp_path / "records")
    events = list(execute(tasks, store, workers=1, threads=1))
    assert [type(event) for event in events] == [Elsewhere] * 4


def test_a_damaged_record_that_appears_meanwhile_ends_the_run(tmp_path):
    suite = write_suite(tmp_path, METHODS)
    store = Store(tmp_path / "records", "tiny")
    tasks = tasks_of(plan_of(suite), store)
    path = store.path(tasks[1].cell.spec)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(RecordError, match="damaged record"):
        list(execute(tasks, store, workers=1, threads=1))
    assert path.read_text() == "{"


def test_a_deadline_saves_the_run_and_the_next_one_ends_like_an_undisturbed_one(tmp_path):
    suite = write_suite(tmp_path, METHODS)
    wanted = by_key(train(suite, tmp_path / "undisturbed"))
    records = tmp_path / "records"
    store = Store(records, "tiny")
    now = 0.0

    def clock() -> float:
        """Every look at the clock takes a second: cells stop in the middle of their steps."""
        nonlocal now
        now += 1
        return now

    rounds = 0
    kinds: set[str] = set()
    while len(stored(records)) < 4:
        rounds += 1
        assert rounds < 40
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(time, "monotonic", clock)
            tasks = tasks_of(plan_of(suite), store, deadline=now + 31)
            events = list(execute(tasks, store, workers=1, threads=1))
        kinds |= {type(event).__name__ for event in events}
        for event in events:
            if isinstance(event, Stopped):
                checkpoint = next(t.checkpoint for t in tasks if t.cell.spec.key == event.key)
                assert FORMAT.encode() in checkpoint.read_bytes()
                assert 0 < event.done <= 52
        assert sum(isinstance(event, Stopped) for event in events) <= 1
    assert {"Stopped", "Finished"} <= kinds
    assert rounds >= 6  # some 184 steps of at most 31 seconds each
    assert stored(records) == wanted
    assert not list((store.folder / "checkpoints").iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_the_limit_of_time_ends_with_status_5_and_loses_nothing(
    workers, tmp_path, capsys, quick_workers
):
    suite = write_suite(
        tmp_path, "[methods.rigl]\n[methods.dpf]", budget="{ epochs = 120, max_multiple = 1.2 }"
    )
    records = tmp_path / "records"
    seconds, status, stops = 0.3, 5, 0
    while status == 5:
        limit = ("--limit-minutes", seconds / 60)
        status = run(suite, "--records", records, "--workers", workers, *limit)
        said = capsys.readouterr().err
        if status == 5:
            stops += 1
            assert f"Time is up, cells left: {2 - len(stored(records))}." in said
            assert not (records / "tiny" / "attempts").exists()
        seconds *= 2  # a busy machine needs some of it to get going
    assert (status, stops > 0) == (0, True)
    assert "cells left" not in said
    assert stored(records) == by_key(train(suite, tmp_path / "undisturbed"))
    assert not list((records / "tiny" / "checkpoints").iterdir())


def test_workers_do_not_outnumber_the_cells(tmp_path, monkeypatch, quick_workers):
    started = []
    start = executors._start_worker
    monkeypatch.setattr(
        executors, "_start_worker", lambda *given: started.append(given) or start(*given)
    )
    suite = write_suite(tmp_path, METHODS)
    store = Store(tmp_path / "records", "tiny")
    tasks = tasks_of(plan_of(suite), store)
    assert len(finished(list(execute(tasks[:3], store, workers=8, threads=1)))) == 3
    assert len(started) == 3


@pytest.mark.parametrize("seconds", [60, -31])
def test_a_worker_that_has_not_saved_long_after_the_limit_of_time_is_given_up(seconds, tmp_path):
    store = Store(tmp_path / "records", "tiny")
    deadline = time.monotonic() + seconds
    (task,) = tasks_of(plan_of(write_suite(tmp_path)), store, deadline=deadline)
    key = task.cell.spec.key
    worker = executors._Worker(process=None, connection=None, tasks={key: task})
    events = executors._hung(worker)
    if seconds == 60:
        assert events == []
        return
    note, stopped = events
    assert "not saved 30 seconds after the limit of time" in note.text
    assert stopped == Stopped(key, 0, late=True)


def test_a_word_about_a_cell_that_a_worker_does_not_have_is_not_passed_on():
    worker = executors._Worker(process=None, connection=None)
    for event in (Finished("its key", record=None), Stopped("its key", 0)):
        assert list(executors._passed_on(event, worker, Queue([], store=None))) == []


def test_a_failed_cell_does_not_keep_its_lease(tmp_path):
    suite = write_suite(tmp_path)
    store = Store(tmp_path / "records", "tiny")
    (task,) = tasks_of(plan_of(suite), store)
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    bad = dataclasses.replace(task, weights=blocked / "weights.safetensors")
    assert finished(list(execute([bad], store, 1, 1))) == {"dense": "failed"}
    assert not list(store.lock(task.cell.spec).parent.iterdir())
