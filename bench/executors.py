"""Many cells: in this process, or in worker processes of which a crash costs one cell.

Only the caller's process writes the store. It holds a lock per cell while the cell trains, so two
runners on one machine share a suite without doing a cell twice.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from filelock import FileLock, Timeout

from bench.environment import environment
from bench.record import FINAL, SCHEMA, Record, Times
from bench.runner import Event, Finished, Stopped, Task, run_cell, set_up_process
from bench.store import Store

BUSY_SECONDS = 0.5
"""Pause before another look, when other runners hold all that is left."""


def execute(
    tasks: Sequence[Task], store: Store, workers: int, threads: int
) -> Generator[Event, None, None]:
    """Runs cells and writes their records; skips those that another runner finished meanwhile.

    Args:
        tasks: the cells in the order in which they should start.
        store: takes the records.
        workers: processes; 1 trains in this one.
        threads: per process.
    """
    queue = _Queue(list(tasks), store)
    if workers == 1:
        set_up_process(threads)
        events = _in_this_process(queue)
    else:
        events = _in_workers(queue, min(workers, len(tasks)), threads)
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

    def take(self) -> Task | None:
        """The next cell that no other runner holds; None if there is none at the moment."""
        for task in list(self.tasks):
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


def _in_this_process(queue: _Queue) -> Generator[Event, None, None]:
    while queue.tasks:
        task = queue.take()
        if task is not None:
            yield from run_cell(task)
        elif queue.tasks:
            time.sleep(BUSY_SECONDS)


@dataclass
class _Worker:
    process: Any
    connection: Connection
    task: Task | None = None


def _in_workers(queue: _Queue, count: int, threads: int) -> Generator[Event, None, None]:
    workers = [_start_worker(threads) for _ in range(count)]
    try:
        while True:
            for index, worker in enumerate(workers):
                if worker.task is None and (task := queue.take()) is not None:
                    if not worker.process.is_alive():
                        workers[index] = worker = _start_worker(threads)
                    worker.task = task
                    worker.connection.send(task)
            busy = {worker.connection: worker for worker in workers if worker.task is not None}
            if not busy and not queue.tasks:
                return
            if not busy:
                time.sleep(BUSY_SECONDS)
            for connection in wait(list(busy), timeout=BUSY_SECONDS):
                assert isinstance(connection, Connection)
                worker = busy[connection]
                event = _receive(worker)
                if isinstance(event, Finished | Stopped):
                    worker.task = None
                yield event
    finally:
        for worker in workers:
            worker.connection.close()
            if worker.task is not None:
                worker.process.terminate()
            worker.process.join()


def _receive(worker: _Worker) -> Event:
    """The worker's next event; a worker that died gives its cell a failed record."""
    task = worker.task
    assert task is not None
    try:
        event: Event = worker.connection.recv()
        return event
    except (EOFError, OSError):
        worker.process.join()
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
        return Finished(task.cell.spec.key, record)


def _start_worker(threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    # No daemon, since these may have no children, such as those that decode images.
    process = context.Process(target=_work, args=(there, threads))
    process.start()
    there.close()
    return _Worker(process, here)


def _work(connection: Connection, threads: int) -> None:
    """A worker: takes tasks and sends events until its parent closes the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    set_up_process(threads)
    try:
        while True:
            with closing(run_cell(connection.recv())) as events:
                for event in events:
                    connection.send(event)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
