"""The cells that a run has yet to train: who may have them, and what becomes of their results."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from bench.errors import RecordError
from bench.leases import Lease, Leases
from bench.live import name
from bench.record import FINAL, Record, Status
from bench.signals import stop_requested
from bench.sources import usable
from bench.store import Store
from bench.sweep import leftovers
from bench.task import Elsewhere, Event, Finished, Note, Stopped, Task

FINE: tuple[Status, ...] = ("ok", "skipped")
"""What no exit status tells of."""

AGAIN: tuple[Status, ...] = ("lost", "out-of-memory")
"""What may go better with fewer cells side by side. What `failed` would fail again, and a `timeout`
would take as long once more: those wait for the next run."""


@dataclass
class Queue:
    """Cells to do, each under a lease from the moment it is taken until its record is written.

    Attributes:
        tasks: that nobody here has taken, in the order in which they should start.
        store: takes the records.
        leases: of this runner.
        retries: how often a cell that was lost or ran out of memory is tried again.
        strict: nothing more begins once a cell has ended otherwise than well.
        taken: cells under way, by their keys.
        again: cells to be tried again, once all others are done.
        crowd: the most cells that were side by side when one of those went wrong.
        tries: of each cell, that went wrong.
        elsewhere: cells that other runners have finished, which nobody has been told yet.
        robbed: another runner has taken over a cell that was under way here.
        broken: the run is to stop, for it is strict.
    """

    tasks: list[Task]
    store: Store
    leases: Leases = field(default_factory=Leases)
    retries: int = 0
    strict: bool = False
    taken: dict[str, tuple[Task, Lease]] = field(default_factory=dict)
    again: list[Task] = field(default_factory=list)
    crowd: int = 0
    tries: Counter[str] = field(default_factory=Counter)
    elsewhere: list[Elsewhere] = field(default_factory=list)
    robbed: bool = False
    broken: bool = False

    def __enter__(self) -> Self:
        self.leases.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Lets other runners have everything."""
        self.leases.__exit__(*error)

    def take(self, like: Task | None = None) -> Task | None:
        """The next cell that no other runner holds; None if there is none at the moment.

        Args:
            like: cells that run beside this one are to have its network and data, if any can.
        """
        for task in sorted(self.tasks, key=lambda task: not _alike(task, like)):
            spec = task.cell.spec
            if stop_requested() or time.monotonic() >= task.deadline:
                self.clear()
                return None
            if not self._ready(task):
                continue
            lease = self.leases.acquire(self.store.lock(spec))
            if lease is None:
                continue
            self.tasks.remove(task)
            self.taken[spec.key] = (task, lease)
            found = self.store.get(spec)
            if found is None:
                return task
            self.release(spec.key)
            self.elsewhere.append(Elsewhere(spec.key, found))
        return None

    def news(self) -> Iterator[Elsewhere]:
        """What other runners have finished since this was last asked."""
        while self.elsewhere:
            yield self.elsewhere.pop(0)

    def settle(self, event: Event) -> Iterator[Event]:
        """Does what an event asks for; what people should see of it."""
        if event.key in self.taken and not self.taken[event.key][1].held():
            yield from self._drop(event.key)
        elif isinstance(event, Finished):
            yield from self._finish(event)
        else:
            if isinstance(event, Stopped):
                self.release(event.key)
                if event.late:  # what would begin now could not be saved in time
                    self.clear()
            yield event

    def release(self, key: str) -> Task:
        """Lets other runners have the cell."""
        task, lease = self.taken.pop(key)
        self.leases.release(lease)
        return task

    def clear(self) -> None:
        """Nothing more is to begin."""
        self.tasks.clear()
        self.again.clear()

    def restart(self) -> None:
        """Puts back what is under way here, for what ran it has been closed."""
        self.tasks[:0] = [self.release(key) for key in list(self.taken)]
        self.robbed = False

    def next_round(self) -> int:
        """Goes on with the cells to be tried again.

        Returns:
            How many were side by side when one of them went wrong; 0 where there are none.
        """
        crowd, self.crowd = self.crowd, 0
        self.tasks += self.again
        self.again.clear()
        return crowd

    def _ready(self, task: Task) -> bool:
        """Whether there are masks to start from, for a cell that starts from another's.

        Where there will be none, as the source has failed, the cell is given up.
        """
        source = task.cell.spec.source
        if source is None:
            return True
        if source in self.taken or source in _keys(self.tasks):
            return False
        if task.source is not None and usable(task.cell, task.source):
            return True
        self.tasks.remove(task)
        if source in _keys(self.again):
            self.again.append(task)
        return False

    def _drop(self, key: str) -> Iterator[Event]:
        """A result that another runner has, or will have, is not written a second time."""
        self.robbed = True
        task = self.release(key)
        self.tasks.append(task)
        yield Stopped(key, 0)
        yield Note(
            key,
            f"{name(task.cell)}: this runner gave no sign of life for too long, and another has "
            "taken the cell over.",
        )

    def _finish(self, event: Finished) -> Iterator[Event]:
        task, _ = self.taken[event.key]
        record = event.record
        try:
            self.store.put(record)
        except RecordError:
            if self.store.get(record.spec) is None:
                raise
            yield from self._drop(event.key)
            return
        # What broken code saved is no start for mended code; whatever else went wrong was not the
        # fault of what was saved.
        if record.status in FINAL or (record.status == "failed" and record.traceback):
            for left in leftovers(self.store, record.spec):
                left.unlink(missing_ok=True)
        crowd = len(self.taken)
        self.release(event.key)
        if record.status in AGAIN and self.tries[event.key] < self.retries and not self.broken:
            yield from self._try_again(task, record, crowd)
            return
        if self.strict and record.status not in FINE:
            self.broken = True
            self.clear()
        yield event

    def _try_again(self, task: Task, record: Record, crowd: int) -> Iterator[Event]:
        key = record.spec.key
        self.tries[key] += 1
        self.again.append(task)
        self.crowd = max(self.crowd, crowd)
        yield Stopped(key, 0)
        again = "again at the end" + ", with fewer cells side by side" * (crowd > 1)
        yield Note(
            key,
            f"{name(record)}: {record.status}: {record.reason}; it is tried {again} "
            f"({self.tries[key]} of {self.retries}).",
        )


def _keys(tasks: list[Task]) -> set[str]:
    return {task.cell.spec.key for task in tasks}


def _alike(task: Task, other: Task | None) -> bool:
    """Whether two cells have the same network and data; without another there is no difference."""
    return other is None or _network(task) == _network(other)


def _network(task: Task) -> tuple[object, ...]:
    spec = task.cell.spec
    return spec.model, spec.model_options, spec.dataset
