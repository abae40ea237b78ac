"""Who trains a run's cells: this process, or worker processes; `bench.ray_executor` is a third.

A worker that crashes costs the cells in it. Only the caller's process writes the store's records.
It holds a lease per cell while the cell trains, so runners that share a folder do no cell twice.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from bench import processes, signals
from bench.cell_queue import Queue
from bench.environment import environment
from bench.live import name
from bench.packing import packing
from bench.process_settings import set_up_process
from bench.record import SCHEMA, Record, Status, Times
from bench.store import Store
from bench.task import Event, Finished, Note, Stopped, Task
from bench.together import Take, run_cells

BUSY_SECONDS = 0.5
"""Pause before another look, when other runners hold all that is left."""

GRACE_SECONDS = 120.0
"""What a worker may be silent for beyond the time that its cell may take: building, compiling and
saving do not count for the cell, and say nothing."""

LATE_SECONDS = 30.0
"""What may pass beyond the limit of time until what is under way is saved: a long step, or a test
of the network. Then it hangs."""

END_SECONDS = 10.0
"""What a worker has to end by itself once nobody listens; then it is killed."""


class Executor(Protocol):
    """Trains the cells of a queue."""

    def run(self, queue: Queue) -> Generator[Event, None, None]:
        """Takes cells until there are none, and passes a wish to stop on to those under way.

        Each ends with a Finished or Stopped. Closing the generator ends what is under way at once.
        """
        ...

    def fewer(self, crowd: int) -> Executor:
        """One with half as many cells side by side on a device, itself where it has but one.

        Args:
            crowd: how many there were.
        """
        ...


def execute(
    tasks: Sequence[Task],
    store: Store,
    workers: int,
    threads: int,
    places: int = 1,
    **options: Any,
) -> Generator[Event, None, None]:
    """Runs cells on this machine and writes their records.

    Args:
        tasks: the cells in the order in which they should start.
        store: takes the records.
        workers: processes; 1 trains in this one.
        threads: per process.
        places: cells at a time in each process; 0: as many as fit on its GPU.
        options: `retries` and `strict`, see `bench.cell_queue.Queue`.
    """
    executor = local(min(workers, len(tasks)), threads, places)
    return perform(Queue(list(tasks), store, **options), executor)


def perform(queue: Queue, executor: Executor) -> Generator[Event, None, None]:
    """Runs the cells of a queue and writes their records, those to be tried again at the end.

    Cells that another runner finishes meanwhile are left out.
    """
    with queue:
        while queue.tasks:
            with closing(executor.run(queue)) as events:
                for event in events:
                    yield from queue.settle(event)
                    yield from queue.news()
                    if queue.broken or queue.robbed:
                        break
                if queue.broken:
                    yield from _saved(queue, events)
                    return
            yield from queue.news()
            if queue.robbed:
                # Who was silent for so long lost all its leases; cells go on from checkpoints.
                queue.restart()
            elif crowd := queue.next_round():
                executor = executor.fewer(crowd)


def _saved(queue: Queue, events: Iterator[Event]) -> Iterator[Event]:
    """Has what is under way saved, as for a signal, but the run is not said to have had one."""
    with signals.listen():
        signals.request()
        for event in events:
            yield from queue.settle(event)


def local(workers: int, threads: int, places: int = 1) -> Executor:
    """The executor for so many processes of this machine."""
    return InThisProcess(threads, places) if workers == 1 else Workers(workers, threads, places)


@dataclass(frozen=True, slots=True)
class InThisProcess:
    """No process but this one.

    Attributes:
        threads: of the CPU.
        places: cells at a time; 0: as many as fit on the GPU.
    """

    threads: int
    places: int = 1

    def run(self, queue: Queue) -> Generator[Event, None, None]:
        """See `Executor`."""
        set_up_process(self.threads)
        device = torch.device(queue.tasks[0].device)
        while queue.tasks:
            with closing(run_cells(patient(queue.take), packing(self.places, device))) as events:
                yield from events
            if queue.tasks:
                time.sleep(BUSY_SECONDS)

    def fewer(self, crowd: int) -> InThisProcess:
        """See `Executor`."""
        return dataclasses.replace(self, places=max(1, (self.places or crowd) // 2))


@dataclass(frozen=True, slots=True)
class Workers:
    """Worker processes; when one dies or hangs, another takes its place.

    Attributes:
        count: of processes.
        threads: of each.
        places: cells at a time in each; 0: as many as fit on its GPU.
    """

    count: int
    threads: int
    places: int = 1

    def run(self, queue: Queue) -> Generator[Event, None, None]:
        """See `Executor`."""
        device = queue.tasks[0].device
        count = min(self.count, len(queue.tasks))
        workers = [self.start(device) for _ in range(count)]
        try:
            while queue.tasks or any(worker.tasks for worker in workers):
                if signals.stop_requested():
                    queue.clear()
                    _have_saved(workers)
                by_connection = {worker.connection: worker for worker in workers}
                for connection in wait(list(by_connection), timeout=BUSY_SECONDS):
                    assert isinstance(connection, Connection)
                    worker = by_connection[connection]
                    try:
                        event = connection.recv()
                    except (EOFError, OSError):
                        workers[workers.index(worker)] = self.start(device)
                        yield from _lost(worker, queue)
                        continue
                    worker.heard = time.monotonic()
                    if isinstance(event, _Wanted):
                        _answer(worker, None if worker.leaving else queue.take(event.like))
                    else:
                        yield from _passed_on(event, worker, queue)
                for worker in list(workers):
                    if _gone(worker):
                        events = _lost(worker, queue)
                    elif hung := _hung(worker):
                        worker.process.kill()
                        events = iter(hung)
                    elif worker.leaving and not worker.tasks:
                        events = iter(())
                    else:
                        continue
                    workers[workers.index(worker)] = self.start(device)
                    worker.connection.close()  # one that is well ends by itself
                    yield from events
        finally:
            for worker in workers:
                worker.connection.close()
                if worker.tasks:
                    worker.process.kill()
            _see_end(workers)

    def start(self, device: str) -> _Worker:
        """A new process."""
        return _start_worker(self.threads, self.places, device)

    def fewer(self, crowd: int) -> Workers:
        """See `Executor`. Cells of one process share a device; on a CPU, those of all do."""
        places = self.places or -(-crowd // self.count)
        if places > 1:
            return dataclasses.replace(self, places=places // 2)
        return dataclasses.replace(self, places=1, count=max(1, self.count // 2))


def patient(take: Take) -> Take:
    """Asks in vain now and then only, while other cells run: asking takes longer than a step."""
    asked = -math.inf

    def asking(like: Task | None) -> Task | None:
        nonlocal asked
        if like is not None and time.monotonic() - asked < BUSY_SECONDS:
            return None
        task = take(like)
        asked = -math.inf if task else time.monotonic()
        return task

    return asking


@dataclass
class _Worker:
    """A process.

    Attributes:
        tasks: its cells, by their keys.
        told: it was asked to save and stop.
        leaving: somebody else asked it to.
        heard: when it last said something, of `time.monotonic`.
    """

    process: Any
    connection: Connection
    tasks: dict[str, Task] = field(default_factory=dict)
    told: bool = False
    leaving: bool = False
    heard: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A worker has room for a cell; the answer is a task, or None."""

    like: Task | None


def _answer(worker: _Worker, task: Task | None) -> None:
    if task is not None:
        worker.tasks[task.cell.spec.key] = task
    with suppress(OSError):  # a worker that died is noticed when it is listened to
        worker.connection.send(task)


def _have_saved(workers: Sequence[_Worker]) -> None:
    """Asks those that train to save and stop; one that has no task need not be asked."""
    for worker in workers:
        if worker.tasks and not worker.told:
            worker.process.terminate()  # see `bench.signals.follow`
            worker.told = True


def _passed_on(event: Event, worker: _Worker, queue: Queue) -> Iterator[Event]:
    """What a worker said; where only it was told to stop, its cells go on in another."""
    if event.key not in worker.tasks:
        return  # what is over can end no second time
    task = worker.tasks.pop(event.key) if isinstance(event, Finished | Stopped) else None
    yield event
    asked = worker.told or signals.stop_requested()
    if isinstance(event, Stopped) and not event.late and not asked:
        assert task is not None
        worker.leaving = True
        queue.tasks.insert(0, task)
        text = "its worker process alone was told to stop; it goes on in another"
        yield Note(event.key, f"{name(task.cell)}: {text}.")


def hangs(heard: float, tasks: Iterable[Task]) -> bool:
    """Whether what trains cells has been silent for longer than they may take.

    Args:
        heard: when it last said something, of `time.monotonic`.
        tasks: the cells.
    """
    limit = max((task.timeout_seconds for task in tasks), default=math.inf)
    return time.monotonic() - heard > limit + GRACE_SECONDS


def _hung(worker: _Worker) -> list[Event]:
    """What is to be said of the cells of a worker that hangs; nothing of another's."""
    tasks = list(worker.tasks.values())
    if hangs(worker.heard, tasks):
        return [silent(task) for task in tasks]
    late = min((task.deadline for task in tasks), default=math.inf) + LATE_SECONDS
    if time.monotonic() < late:
        return []
    return [event for task in tasks for event in _late(task)]


def _late(task: Task) -> tuple[Note, Stopped]:
    """Of a cell that was not saved at the limit of time."""
    key = task.cell.spec.key
    text = f"not saved {LATE_SECONDS:g} seconds after the limit of time, and its process was ended"
    then = "a step or its data hangs; the cell goes on from its last checkpoint"
    return Note(key, f"{name(task.cell)}: {text}: {then}."), Stopped(key, 0, late=True)


def silent(task: Task) -> Finished:
    """The record of a cell whose process hangs."""
    minutes = (task.timeout_seconds + GRACE_SECONDS) / 60
    text = f"its process said nothing for {minutes:.3g} minutes, and was ended: a step or its data"
    return ended(task, "timeout", f"{text} hangs; the cell goes on from its last checkpoint")


def _gone(worker: _Worker) -> bool:
    """Whether it died unheard, as where processes that a method made hold its end of the pipe."""
    if worker.process.exitcode is None or worker.connection.poll():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(worker.process.pid, 0)  # the server that should know of it may itself have died
    except ProcessLookupError:
        return True
    return False


def _see_end(workers: Iterable[_Worker]) -> None:
    """Waits for workers, which end at the same time; one that does not is killed."""
    end = time.monotonic() + END_SECONDS
    for worker in workers:
        worker.process.join(max(0, end - time.monotonic()))
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join(END_SECONDS)


def _lost(worker: _Worker, queue: Queue) -> Iterator[Event]:
    """A worker that died loses its cells; at least one, or it might go on so."""
    _see_end([worker])
    if not worker.tasks and (task := queue.take()) is not None:
        worker.tasks[task.cell.spec.key] = task
    for task in worker.tasks.values():
        code = worker.process.exitcode
        yield ended(task, "lost", f"the worker process died (exit code {code})")


def ended(task: Task, status: Status, reason: str, traceback: str = "") -> Finished:
    """The record of a cell that its process could not write itself."""
    device = torch.device(task.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device("cpu")  # the GPU was another machine's
    record = Record(
        schema=SCHEMA,
        suite=task.suite,
        label=task.cell.label,
        spec=task.cell.spec,
        status=status,
        environment=environment(device),
        times=Times(0.0, 0.0, 0.0, ""),
        reason=reason,
        traceback=traceback,
    )
    return Finished(task.cell.spec.key, record)


def _start_worker(threads: int, places: int = 1, device: str = "cpu") -> _Worker:
    context = processes.context()
    here, there = context.Pipe()
    # No daemon, since these may have no children, such as those that decode images.
    process = context.Process(target=_work, args=(there, threads, places, device))
    process.start()
    there.close()
    return _Worker(process, here)


def _end_with_parent() -> None:
    """Ends this process at once when its parent has: the next run begins its cells anew.

    What it still wrote would come between that run and the checkpoints it reads.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(connection: Connection, threads: int, places: int, device: str) -> None:
    """A worker; ends at once whatever a method did, so that nobody waits for what it left."""
    status = 1
    try:
        _serve(connection, threads, places, device)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        processes.end_at_once(status)


def _serve(connection: Connection, threads: int, places: int, device: str) -> None:
    """Asks for tasks and sends events until the parent closes the pipe, or is gone."""
    signals.follow()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    processes.lock_bars_here()
    set_up_process(threads)

    def take(like: Task | None) -> Task | None:
        connection.send(_Wanted(like))
        task: Task | None = connection.recv()
        return task

    try:
        while True:
            with closing(run_cells(patient(take), packing(places, torch.device(device)))) as events:
                for event in events:
                    connection.send(event)
            time.sleep(BUSY_SECONDS / 5)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
