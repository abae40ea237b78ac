"""What becomes of results: written once, tried again with fewer cells, dropped, or the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bench import executors, signals
from bench import store as store_module
from bench.cell_queue import Queue
from bench.executors import InThisProcess, Workers, ended, perform
from bench.leases import Leases
from bench.ray_executor import OnRay
from bench.record import Status, encode
from bench.sources import SourceFiles
from bench.spec import CellSpec
from bench.store import Store
from bench.task import Event, Finished, Note, Progress, Stopped, Task
from tests.bench.cells import by_key, forking, plan_of, stored, tasks_of, train, write_suite

METHODS = "[methods.dense]\n[methods.rigl]\n[methods.dpf]\n[methods.one_shot]"
LABELS = ["dense", "dpf", "one_shot", "rigl"]


@dataclasses.dataclass(frozen=True)
class Scripted:
    """Cells end as a script says, the try after the last of it well; how many ran at a time."""

    script: dict[str, list[Status]]
    rounds: list[tuple[int, list[str]]]
    places: int = 8

    def run(self, queue: Queue) -> Generator[Event, None, None]:
        began: list[str] = []
        self.rounds.append((self.places, began))
        while queue.tasks:
            tasks = [task for _ in range(self.places) if (task := queue.take())]
            for task in tasks:
                label = task.cell.label
                began.append(label)
                left = self.script.get(label, [])
                yield Progress(task.cell.spec.key, 1, 2)
                if signals.stop_requested():
                    yield Stopped(task.cell.spec.key, 1)
                else:
                    status = left.pop(0) if left else "ok"
                    yield ended(task, status, f"as the script says: {status}")

    def fewer(self, crowd: int) -> Scripted:
        return dataclasses.replace(self, places=max(1, crowd // 2))


@pytest.fixture
def tasks(tmp_path) -> list[Task]:
    store = Store(tmp_path / "records", "tiny")
    return tasks_of(plan_of(write_suite(tmp_path, METHODS)), store)


def queue_of(tasks: list[Task], folder: Path, **options) -> Queue:
    return Queue(list(tasks), Store(folder / "records", "tiny"), **options)


def statuses(events: list[Event]) -> dict[str, str]:
    return {e.record.label: e.record.status for e in events if isinstance(e, Finished)}


def attempts(folder: Path) -> list[tuple[str, str]]:
    return [(one.label, one.status) for one in Store(folder / "records", "tiny").attempts()]


def test_what_was_lost_or_too_big_is_tried_again_at_the_end_with_half_as_many(tasks, tmp_path):
    script: dict[str, list[Status]] = {"rigl": ["lost", "out-of-memory"], "dpf": ["out-of-memory"]}
    executor = Scripted(script, [])
    events = list(perform(queue_of(tasks, tmp_path, retries=2), executor))
    assert statuses(events) == dict.fromkeys(LABELS, "ok")
    # Three were side by side when the first went wrong.
    assert executor.rounds == [
        (8, ["dense", "rigl", "dpf", "one_shot"]),
        (1, ["rigl", "dpf"]),
        (1, ["rigl"]),
    ]
    assert sorted(attempts(tmp_path)) == [
        ("dpf", "out-of-memory"),
        ("rigl", "lost"),
        ("rigl", "out-of-memory"),
    ]
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 3
    assert "rigl" in notes[0]
    said = "lost: as the script says: lost; it is tried again at the end"
    assert f"{said}, with fewer cells side by side (1 of 2)." in notes[0]


def test_a_cell_that_was_alone_is_not_said_to_have_fewer_beside_it(tasks, tmp_path):
    executor = Scripted({"rigl": ["lost"]}, [], places=1)
    events = list(perform(queue_of(tasks, tmp_path, retries=1), executor))
    (note,) = (event.text for event in events if isinstance(event, Note))
    assert note.endswith("lost: as the script says: lost; it is tried again at the end (1 of 1).")


def test_the_last_try_is_the_cells_record(tasks, tmp_path):
    executor = Scripted({"rigl": ["lost", "lost", "lost"]}, [])
    events = list(perform(queue_of(tasks, tmp_path, retries=1), executor))
    assert statuses(events)["rigl"] == "lost"
    assert attempts(tmp_path) == [("rigl", "lost")] * 2
    assert len(stored(tmp_path / "records")) == 3


@pytest.mark.parametrize("status", ["failed", "timeout"])
def test_what_would_go_as_wrong_again_waits_for_the_next_run(status, tasks, tmp_path):
    executor = Scripted({"rigl": [status]}, [])
    events = list(perform(queue_of(tasks, tmp_path, retries=5), executor))
    assert statuses(events)["rigl"] == status
    assert len(executor.rounds) == 1
    assert attempts(tmp_path) == [("rigl", status)]
    # The next run.
    assert statuses(list(perform(queue_of(tasks, tmp_path), executor))) == {"rigl": "ok"}


@pytest.mark.parametrize(
    ("status", "kept"),
    [("lost", True), ("out-of-memory", True), ("timeout", True), ("failed", False), ("ok", False)],
)
def test_what_was_saved_is_kept_where_it_was_not_at_fault(status, kept, tasks, tmp_path):
    def broken(queue: Queue) -> Iterator[Event]:
        task = queue.take()
        assert task is not None
        task.checkpoint.parent.mkdir(parents=True)
        task.checkpoint.write_bytes(b"saved")
        yield ended(task, status, "reason", traceback="Traceback")

    executor = Scripted({}, [])
    object.__setattr__(executor, "run", broken)
    list(perform(queue_of(tasks[:1], tmp_path), executor))
    assert tasks[0].checkpoint.exists() == kept


@pytest.mark.parametrize("status", ["failed", "invalid", "diverged", "lost"])
def test_a_strict_run_saves_the_others_and_stops(status, tasks, tmp_path):
    executor = Scripted({"rigl": [status]}, [], places=3)
    queue = queue_of(tasks, tmp_path, strict=True)
    events = list(perform(queue, executor))
    assert statuses(events) == {"dense": "ok", "rigl": status}
    assert [type(e).__name__ for e in events][-1] == "Stopped"
    assert queue.broken
    assert not signals.stop_requested()
    assert executor.rounds == [(3, ["dense", "rigl", "dpf"])]


def test_a_strict_run_tries_again_before_it_stops(tasks, tmp_path):
    queue = queue_of(tasks, tmp_path, strict=True, retries=1)
    assert set(statuses(list(perform(queue, Scripted({"rigl": ["lost"]}, [])))).values()) == {"ok"}
    assert not queue.broken


def test_a_cell_that_turned_out_not_to_be_runnable_stops_no_strict_run(tasks, tmp_path):
    queue = queue_of(tasks, tmp_path, strict=True)
    events = list(perform(queue, Scripted({"rigl": ["skipped"]}, [])))
    assert statuses(events) == dict.fromkeys(LABELS, "ok") | {"rigl": "skipped"}
    assert len(stored(tmp_path / "records")) == 4


TICKETS = """
[methods.dense]
[methods.lottery_ticket]
[methods.reinit]
method = "ticket_control"
source = "lottery_ticket"
"""


@pytest.fixture
def tickets(tmp_path) -> list[Task]:
    """Of two seeds, a dense network, a lottery ticket and one that starts from its masks."""
    store = Store(tmp_path / "records", "tiny")
    asked = {"seeds": "[0, 1]", "budget": "{ epochs = 1, max_multiple = 9 }"}
    plan = plan_of(write_suite(tmp_path, TICKETS, sparsities="[0.5]", **asked))
    specs = {cell.spec.key: cell.spec for cell in plan.manifest.cells}
    tasks = [with_source(task, store, specs) for task in tasks_of(plan, store)]
    return sorted(tasks, key=lambda task: task.cell.spec.seed)


def with_source(task: Task, store: Store, specs: dict[str, CellSpec]) -> Task:
    if task.cell.spec.source is None:
        return task
    spec = specs[task.cell.spec.source]
    files = SourceFiles(store.path(spec), store.weights(spec), store.masks(spec))
    return dataclasses.replace(task, source=files)


ROWS = ["dense", "lottery_ticket", "reinit"]


def test_what_starts_from_another_cell_comes_after_it_and_before_the_next_seed(tickets, tmp_path):
    executor = Scripted({}, [], places=1)
    list(perform(queue_of(tickets, tmp_path), executor))
    assert executor.rounds == [(1, ROWS * 2)]


def test_while_a_source_is_under_way_others_begin(tickets, tmp_path):
    executor = Scripted({}, [], places=3)
    list(perform(queue_of(tickets, tmp_path), executor))
    found = ["dense", "lottery_ticket", "dense", "reinit", "lottery_ticket", "reinit"]
    assert executor.rounds == [(3, found)]


def test_a_source_that_is_tried_again_takes_what_starts_from_it_along(tickets, tmp_path):
    executor = Scripted({"lottery_ticket": ["lost"]}, [], places=1)
    events = list(perform(queue_of(tickets, tmp_path, retries=1), executor))
    again = ["lottery_ticket", "reinit"]
    assert executor.rounds == [(1, ["dense", "lottery_ticket", *ROWS]), (1, again)]
    assert statuses(events) == dict.fromkeys(ROWS, "ok")


@pytest.mark.parametrize("status", ["failed", "lost", "diverged"])
def test_what_starts_from_a_cell_that_went_wrong_does_not_begin(status, tickets, tmp_path):
    executor = Scripted({"lottery_ticket": [status]}, [], places=1)
    queue = queue_of(tickets, tmp_path)
    list(perform(queue, executor))
    assert executor.rounds == [(1, ["dense", "lottery_ticket", *ROWS])]
    assert not queue.tasks


def test_one_whose_source_another_runner_trains_waits_for_it(tickets, tmp_path):
    _, source, dependent = tickets[:3]
    queue = queue_of([source, dependent], tmp_path)
    with Leases() as other:
        lease = other.acquire(queue.store.lock(source.cell.spec))
        assert lease is not None
        assert queue.take() is None
        assert queue.tasks == [source, dependent]
        found = ended(source, "ok", "by the other")
        assert isinstance(found, Finished)
        queue.store.put(found.record)
        other.release(lease)
    with queue:
        assert queue.take() == dependent
    assert [event.key for event in queue.news()] == [source.cell.spec.key]


def robbing(name: Path) -> Leases:
    """Another runner, which takes a lease over as if it were stale."""
    other = Leases(stale_seconds=0)
    assert other.acquire(name) is None
    assert other.acquire(name) is not None
    return other


@pytest.mark.parametrize("places", [1, 2])
def test_a_runner_whose_lease_was_taken_over_drops_its_result(places, tasks, tmp_path, monkeypatch):
    """And what else was under way there goes on, once the other runner has been noticed."""
    monkeypatch.setattr(executors, "BUSY_SECONDS", 0.01)
    theirs = by_key(train(tmp_path / "tiny.toml", tmp_path / "other"))
    store = Store(tmp_path / "records", "tiny")
    key = tasks[0].cell.spec.key
    other: list[Leases] = []
    written = b""
    executor = Scripted({"dense": ["invalid"]}, [], places=places)
    queue = queue_of(tasks, tmp_path)
    events = []
    with closing(perform(queue, executor)) as run:
        for event in run:
            events.append(event)
            if event.key == key and isinstance(event, Progress) and not other:
                other.append(robbing(store.lock(tasks[0].cell.spec)))
            if isinstance(event, Note) and not written:
                record = Store(tmp_path / "other", "tiny").get(tasks[0].cell.spec)
                assert record is not None
                written = store.put(record).read_bytes()
                other[0].__exit__(None, None, None)
    assert "dense" not in statuses(events)
    assert len(statuses(events)) == 3
    assert store.path(tasks[0].cell.spec).read_bytes() == written
    (note,) = (event.text for event in events if isinstance(event, Note))
    assert "no sign of life" in note
    assert stored(tmp_path / "records")[key] == theirs[key]
    assert not list((store.folder / "locks").iterdir())
    assert attempts(tmp_path) == []


def test_a_record_that_is_there_is_not_written_over_however_late_it_is_noticed(
    tasks, tmp_path, monkeypatch
):
    """A runner may be stopped in the moment between its look at the lease and its write."""
    store = Store(tmp_path / "records", "tiny")
    queue = queue_of(tasks, tmp_path)
    task = queue.take()
    assert task is not None
    theirs = ended(task, "invalid", "theirs").record
    write = store_module.write_atomically

    def late(path: Path, content: bytes) -> None:
        """Theirs comes when ours is all but there."""
        monkeypatch.setattr(store_module, "write_atomically", write)
        write(path, content)
        store.path(theirs.spec).write_bytes(encode(theirs))

    monkeypatch.setattr(store_module, "write_atomically", late)
    events = list(queue.settle(ended(task, "ok", "ours")))
    assert [type(event) for event in events] == [Stopped, Note]
    found = store.get(task.cell.spec)
    assert found is not None
    assert found.reason == "theirs"
    with queue:
        pass


def halves(executor: executors.Executor, crowd: int) -> list[executors.Executor]:
    found = []
    for _ in range(4):
        executor = executor.fewer(crowd)
        found.append(executor)
        crowd = max(1, crowd // 2)
    return found


@pytest.mark.parametrize(
    ("executor", "crowd", "wanted"),
    [
        (InThisProcess(1, 8), 8, [InThisProcess(1, n) for n in (4, 2, 1, 1)]),
        (InThisProcess(1, 0), 5, [InThisProcess(1, n) for n in (2, 1, 1, 1)]),
        (Workers(4, 1), 4, [Workers(n, 1) for n in (2, 1, 1, 1)]),
        (Workers(2, 1, 4), 8, [Workers(2, 1, 2), Workers(2, 1, 1), Workers(1, 1), Workers(1, 1)]),
        (Workers(2, 1, 0), 7, [Workers(2, 1, 2), Workers(2, 1, 1), Workers(1, 1), Workers(1, 1)]),
        (OnRay(1, 4), 8, [OnRay(1, 2), OnRay(1, 1), OnRay(1, 1, 1), OnRay(1, 1, 1)]),
        (OnRay(2), 6, [OnRay(2, 1, 3), OnRay(2, 1, 1), OnRay(2, 1, 1), OnRay(2, 1, 1)]),
    ],
)
def test_retries_have_half_the_cells_side_by_side_down_to_one(executor, crowd, wanted):
    assert halves(executor, crowd) == wanted


@pytest.mark.parametrize("kind", ["workers", "process"])
def test_a_strict_run_has_cells_side_by_side_saved(kind, tmp_path, monkeypatch):
    """For real: one cell cannot write its network; the others have a checkpoint afterwards."""
    context = forking()
    monkeypatch.setattr(executors.processes, "context", lambda: context)
    suite = write_suite(
        # Long enough for the other cell to have begun when this one fails.
        tmp_path,
        METHODS,
        budget="{ epochs = 60, max_multiple = 1.2 }",
        seeds="[0, 1]",
    )
    store = Store(tmp_path / "records", "tiny")
    long = write_suite(tmp_path, "[methods.dense]", name="long", budget="{ steps = 1_000_000 }")
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    bad = dataclasses.replace(
        tasks_of(plan_of(suite), store)[1], weights=blocked / "weights.safetensors"
    )
    (endless,) = tasks_of(plan_of(long), store)
    queue = Queue([endless, bad], store, strict=True)
    executor = Workers(2, 1) if kind == "workers" else InThisProcess(1, 2)
    events = list(perform(queue, executor))
    assert statuses(events) == {"rigl": "failed"} or list(statuses(events).values()) == ["failed"]
    (stopped,) = (event for event in events if isinstance(event, Stopped))
    assert stopped.key == endless.cell.spec.key
    assert stopped.done > 0
    assert endless.checkpoint.exists()
    assert not list((store.folder / "locks").iterdir())
