"""Cells on a Ray cluster, or on a local one that is started for the run.

A Ray worker trains one cell at a time and streams its events to the driver, which alone writes the
store's records. Checkpoints and networks are written where they are trained, so all machines need
the folders of records and of data sets under the same paths.
"""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import executors, signals
from bench.cell_queue import Queue
from bench.determinism import WORKSPACE, WORKSPACES
from bench.errors import UsageError
from bench.executors import ended
from bench.process_settings import set_up_process
from bench.task import Event, Finished, Stopped, Task
from bench.together import run_cell

OBJECT_STORE_BYTES = 100 * 2**20
"""Of a local cluster; events are all that is sent, and this is about the least that Ray takes."""


class Worker:
    """What runs in a Ray worker. Ray gives each call a thread, so `stop` can come in between.

    Args:
        threads: of the CPU.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def train(self, task: Task, seconds: float) -> Iterator[Event | None]:
        """One cell; None as soon as it begins, for Ray may have it wait for room.

        Args:
            task: the cell.
            seconds: that are left of the run, since clocks of machines differ.
        """
        yield None
        set_up_process(self.threads)  # flushing denormals is a thread's own matter
        yield from run_cell(dataclasses.replace(task, deadline=time.monotonic() + seconds))

    def stop(self) -> None:
        """Has the cell saved."""
        signals.request()


def connect(address: str | None = None) -> None:
    """Connects this process with a cluster, once.

    Args:
        address: of the cluster, as Ray takes it; None: that in `RAY_ADDRESS`, else one is started
            on this machine.

    Raises:
        UsageError: there is no Ray, or no such cluster, or it does not let us in.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        if address:
            _knock(address)
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="error",
            **({} if address else local),
        )
    except (RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        where = f"--address {address}" if address else "--executor ray"
        reason = " ".join(str(error).split()).rstrip(".")
        # Ray shows an address its token only where it is told to, and does not say so.
        unheard = type(error) is ConnectionError and not os.environ.get("RAY_AUTH_MODE")
        hint = " If it asks for a token, set RAY_AUTH_MODE=token." if address and unheard else ""
        raise UsageError(f"{where}: no Ray cluster can be used ({reason}).{hint}") from error


def _knock(address: str) -> None:
    """Raises OSError where nobody answers: Ray would ask for two minutes before it says so."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass


def has_gpus() -> bool:
    """Whether the cluster has any."""
    return bool(_ray().cluster_resources().get("GPU", 0))


@dataclass(frozen=True, slots=True)
class OnRay:
    """Ray workers, each with a cell at a time.

    Attributes:
        threads: of each worker; as many CPUs are asked for.
        places: workers that share a GPU.
        count: workers at most; 0: as many as the cluster has room for.
    """

    threads: int
    places: int = 1
    count: int = 0

    def run(self, queue: Queue) -> Generator[Event, None, None]:
        """See `bench.executors.Executor`."""
        running: dict[Any, _Running] = {}
        idle: list[Any] = []
        resources = self.resources(queue.tasks[0].device)
        take = executors.patient(queue.take)
        options = resources | surroundings(queue.tasks[0])
        actor = _ray().remote(num_cpus=self.threads, max_concurrency=2, **options)(Worker)
        try:
            while queue.tasks or running:
                if signals.stop_requested():
                    queue.clear()
                    _have_saved(running)
                while len(running) < self.room(resources) and (task := take(_one_of(running))):
                    handle = idle.pop() if idle else actor.remote(self.threads)
                    one = _start(handle, task)
                    running[one.stream] = one
                yield from _heard(running, idle)
        finally:
            for handle in [*idle, *(one.handle for one in running.values())]:
                _ray().kill(handle)

    def resources(self, device: str) -> dict[str, float]:
        """What a worker needs besides CPUs."""
        return {"num_gpus": 0 if device == "cpu" else 1 / self.places}

    def room(self, resources: dict[str, float]) -> int:
        """Workers that the cluster can hold, machines that have joined it meanwhile included."""
        found = _ray().cluster_resources()
        room = int(found.get("CPU", 0)) // self.threads
        if gpus := resources["num_gpus"]:
            room = min(room, round(found.get("GPU", 0) / gpus))
        return max(1, min(room, self.count or room))

    def fewer(self, crowd: int) -> OnRay:
        """See `bench.executors.Executor`."""
        if self.places > 1:
            return dataclasses.replace(self, places=self.places // 2)
        return dataclasses.replace(self, count=max(1, crowd // 2))


@dataclass
class _Running:
    """A cell under way.

    Attributes:
        handle: of the Ray worker.
        stream: of its events.
        over: its last event has come.
        told: it was asked to save and stop.
        heard: when it last said something, of `time.monotonic`; infinity: it has yet to begin.
    """

    handle: Any
    stream: Any
    task: Task
    over: bool = False
    told: bool = False
    heard: float = math.inf


def surroundings(task: Task) -> dict[str, Any]:
    """What Ray is to set where a worker starts: cuBLAS reads its variable once, at its start.

    Machines of a cluster need not have what this one has in its environment.
    """
    if not task.ways.strict:
        return {}
    value = os.environ.get(WORKSPACE, WORKSPACES[0])
    return {"runtime_env": {"env_vars": {WORKSPACE: value}}}


def _one_of(running: dict[Any, _Running]) -> Task | None:
    return next((one.task for one in running.values()), None)


def _start(handle: Any, task: Task) -> _Running:
    left = task.deadline - time.monotonic()
    stream = handle.train.options(num_returns="streaming").remote(_absolute(task), left)
    return _Running(handle, stream, task)


def _heard(running: dict[Any, _Running], idle: list[Any]) -> Iterator[Event]:
    """The next event of a worker, if one comes soon; workers that are done become idle."""
    if not running:
        time.sleep(executors.BUSY_SECONDS)
        return
    ready, _ = _ray().wait(list(running), timeout=executors.BUSY_SECONDS)
    for stream in ready:
        one = running[stream]
        try:
            event = _ray().get(next(stream))
        except StopIteration:
            del running[stream]
            idle.append(one.handle)
            continue
        except _ray().exceptions.RayError as error:
            del running[stream]
            _ray().kill(one.handle)
            if not one.over:
                yield _wrong(one.task, error)
            continue
        one.heard = time.monotonic()
        if event is not None:
            one.over = isinstance(event, Finished | Stopped)
            yield event
    for stream, one in list(running.items()):
        if not one.over and executors.hangs(one.heard, [one.task]):
            del running[stream]
            _ray().kill(one.handle)
            yield executors.silent(one.task)


def _have_saved(running: dict[Any, _Running]) -> None:
    """Asks those that train to save and stop; the worker is not used again."""
    for one in running.values():
        if not one.told:
            one.handle.stop.remote()
            one.told = True


def _wrong(task: Task, error: Exception) -> Finished:
    """The record of a cell whose Ray worker ended otherwise than with an event."""
    exceptions = _ray().exceptions
    text = str(error).strip()
    if isinstance(error, exceptions.RayTaskError):  # before the cell's own record: an import, say
        return ended(task, "failed", text.splitlines()[-1], text)
    if isinstance(error, exceptions.OutOfMemoryError):
        return ended(task, "out-of-memory", "Ray ended the worker, for memory was short")
    first = text.splitlines()[0] if text else type(error).__name__
    return ended(task, "lost", f"the Ray worker died ({type(error).__name__}: {first})")


def _absolute(task: Task) -> Task:
    """With paths that mean the same in every worker."""
    source = task.source and dataclasses.replace(
        task.source,
        record=task.source.record.absolute(),
        weights=task.source.weights.absolute(),
        masks=task.source.masks.absolute(),
    )
    changes: dict[str, Path] = {
        name: getattr(task, name).absolute()
        for name in ("data", "checkpoint", "weights", "masks", "start")
    }
    return dataclasses.replace(task, source=source, **changes)  # type: ignore[arg-type]


def _ray() -> Any:
    """The library, which few need and takes seconds to import.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UsageError(
            "--executor ray: Ray is not installed. Install it: pip install 'sparsebench[ray]'"
        ) from error
    return ray
