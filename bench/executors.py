"""Many cells: in this process, or in worker processes, of which a crash costs the cells in it.

Only the caller's process writes the store. It holds a lock per cell while the cell trains, so two
runners on one machine share a suite without doing a cell twice.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from filelock import FileLock, Timeout

from bench import processes
from bench.environment import environment
from bench.packing import packing
from bench.record import FINAL, SCHEMA, Record, Times
from bench.runner import Event, Finished, Stopped, Task, set_up_process
from bench.store import Store
from bench.together import Take, run_cells

BUSY_SECONDS = 0.5
"""Pause before another look, when other runners hold all that is left."""


def execute(
    tasks: Sequence[Task], store: Store, workers: int, threads: int, places: int = 1
) -> Generator[Event, None, None]:
    """Runs cells and writes their records; skips those that another runner finished meanwhile.

    Args:
        tasks: the cells in the order in which they should start.
        store: takes the records.
        workers: processes; 1 trains in this one.
        threads: per process.
        places: cells at a time in each process; 0: as many as fit on its GPU.
    """
    queue = _Queue(list(tasks), store)
    if workers == 1:
        set_up_process(threads)
        events = _in_this_process(queue, places)
    else:
        events = _in_workers(queue, min(workers, len(tasks)), threads, places)
    with closing(events):
        for event in events:
            if isinstance(event, Finished):
                queue.finish(event)
            elif isinstance(event, Stopped):
                queue.release(event.key)
            yield event


@dataclass
class _Queue:
    """Cells to do, each locked from the moment it is taken until its record is written."""

    tasks: list[Task]
    store: Store
    taken: dict[str, tuple[Task, ExitStack]] = field(default_factory=dict)

    def take(self, like: Task | None = None) -> Task | None:
        """The next cell that no other runner holds; None if there is none at the moment.

        Args:
            like: cells that run beside this one are to have its network and data, if any have.
        """
        same = [task for task in self.tasks if like is None or _network(task) == _network(like)]
        for task in same or list(self.tasks):
            spec = task.cell.spec
            if time.time() >= task.deadline:
                self.tasks.clear()
                return None
            path = self.store.lock(spec)
            path.parent.mkdir(parents=True, exist_ok=True)
            stack = ExitStack()
            try:
                stack.enter_context(FileLock(path, timeout=0))
            except Timeout:
                continue
            self.tasks.remove(task)
            if self.store.get(spec) is not None:
                stack.close()
                continue
            self.taken[spec.key] = (task, stack)
            return task
        return None

    def finish(self, event: Finished) -> None:
        """Writes the record; the unfinished run is no longer needed."""
        task, _ = self.taken[event.key]
        self.store.put(event.record)
        # What broken code saved is no start for mended code; a worker that died was not at fault.
        if event.record.status in FINAL or event.record.traceback:
            # A process killed while it wrote leaves its temporary file behind.
            for left in task.checkpoint.parent.glob(f"*{task.checkpoint.name}*"):
                left.unlink(missing_ok=True)
        self.release(event.key)

    def release(self, key: str) -> None:
        """Lets other runners have the cell."""
        self.taken.pop(key)[1].close()


def _network(task: Task) -> tuple[Any, ...]:
    spec = task.cell.spec
    return spec.model, spec.model_options, spec.dataset


def _in_this_process(queue: _Queue, places: int) -> Generator[Event, None, None]:
    device = torch.device(queue.tasks[0].device)
    while queue.tasks:
        take = _patient(queue.take)
        with closing(run_cells(take, packing(places, device))) as events:
            yield from events
        if queue.tasks:
            time.sleep(BUSY_SECONDS)


def _patient(take: Take) -> Take:
    """Asks in vain now and then only, while other cells run: asking takes longer than a step."""
    asked = -math.inf

    def patient(like: Task | None) -> Task | None:
        nonlocal asked
        if like is not None and time.monotonic() - asked < BUSY_SECONDS:
            return None
        task = take(like)
        asked = -math.inf if task else time.monotonic()
        return task

    return patient


@dataclass
class _Worker:
    process: Any
    connection: Connection
    tasks: dict[str, Task] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A worker has room for a cell; the answer is a task, or None."""

    like: Task | None


def _in_workers(
    queue: _Queue, count: int, threads: int, places: int
) -> Generator[Event, None, None]:
    device = queue.tasks[0].device
    workers = [_start_worker(threads, places, device) for _ in range(count)]
    try:
        while queue.tasks or any(worker.tasks for worker in workers):
            by_connection = {worker.connection: worker for worker in workers}
            for connection in wait(list(by_connection), timeout=BUSY_SECONDS):
                assert isinstance(connection, Connection)
                worker = by_connection[connection]
                try:
                    event = connection.recv()
                except (EOFError, OSError):
                    workers[workers.index(worker)] = _start_worker(threads, places, device)
                    yield from _lost(worker, queue)
                    continue
                if isinstance(event, _Wanted):
                    _answer(worker, queue.take(event.like))
                    continue
                if isinstance(event, Finished | Stopped):
                    del worker.tasks[event.key]
                yield event
    finally:
        for worker in workers:
            worker.connection.close()
            if worker.tasks:
                worker.process.terminate()
        for worker in workers:  # they end at the same time
            worker.process.join()


def _answer(worker: _Worker, task: Task | None) -> None:
    if task is not None:
        worker.tasks[task.cell.spec.key] = task
    with suppress(OSError):  # a worker that died is noticed when it is listened to
        worker.connection.send(task)


def _lost(worker: _Worker, queue: _Queue) -> Iterator[Event]:
    """A worker that died gives its cells failed records; at least one, or it might go on so."""
    worker.process.join()
    if not worker.tasks and (task := queue.take()) is not None:
        worker.tasks[task.cell.spec.key] = task
    for task in worker.tasks.values():
        reason = f"the worker process died (exit code {worker.process.exitcode})"
        record = Record(
            schema=SCHEMA,
            suite=task.suite,
            label=task.cell.label,
            spec=task.cell.spec,
            status="failed",
            environment=environment(torch.device(task.device)),
            times=Times(0.0, 0.0, 0.0, ""),
            reason=reason,
        )
        yield Finished(task.cell.spec.key, record)


def _start_worker(threads: int, places: int = 1, device: str = "cpu") -> _Worker:
    context = processes.context()
    here, there = context.Pipe()
    # No daemon, since these may have no children, such as those that decode images.
    process = context.Process(target=_work, args=(there, threads, places, device))
    process.start()
    there.close()
    return _Worker(process, here)


def _work(connection: Connection, threads: int, places: int, device: str) -> None:
    """A worker: asks for tasks and sends events until its parent closes the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    set_up_process(threads)

    def take(like: Task | None) -> Task | None:
        connection.send(_Wanted(like))
        task: Task | None = connection.recv()
        return task

    try:
        while True:
            with closing(
                run_cells(_patient(take), packing(places, torch.device(device)))
            ) as events:
                for event in events:
                    connection.send(event)
            time.sleep(BUSY_SECONDS / 5)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
