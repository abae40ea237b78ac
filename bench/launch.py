"""From resolved cells to records: which cells, on which device, and what came of them."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import torch

from bench import ray_executor
from bench.cell_queue import FINE, Queue
from bench.distributed import Group
from bench.errors import UsageError
from bench.executors import LATE_SECONDS, Executor, InThisProcess, Workers, local, perform
from bench.live import View
from bench.process_settings import set_up_process
from bench.processes import cores, end_at_once
from bench.record import Timing
from bench.resolve import Plan
from bench.sources import SourceFiles, settled
from bench.store import Cell, Store
from bench.sweep import sweep
from bench.task import ALONE, Elsewhere, Event, Finished, Note, Progress, Stopped, Task, Ways
from bench.together import run_cell

DONE, CELL_FAILED, CELLS_LEFT = 0, 1, 5
"""Exit statuses of a run."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a suite is run, which does not change what it measures (but for times).

    Attributes:
        device: as torch names it.
        workers: cells side by side; 0: one a CPU core, or one a GPU.
        threads: of the CPU, for each cell.
        deadline: of `time.monotonic`, at which to save and stop; infinity: never.
        checkpoint_seconds: wall-clock between checkpoints of a cell.
        decoders: processes of a cell that decode images; 0: the cores, shared among the workers.
        places: cells at a time on a GPU, in each process; 0: as many as fit.
        ways: how steps are computed.
        retries: how often a cell that was lost or ran out of memory is tried again.
        strict: saves and stops once a cell has ended otherwise than well.
        executor: who trains: this machine, or Ray.
        cell_timeout: seconds that a cell may take, in all tries together; infinity: any.
        group: processes that train each cell together, see `bench.distributed`.
    """

    device: str
    workers: int = 0
    threads: int = 1
    deadline: float = math.inf
    checkpoint_seconds: float = 60.0
    decoders: int = 0
    places: int = 1
    ways: Ways = ALONE
    retries: int = 0
    strict: bool = False
    executor: Literal["local", "ray"] = "local"
    cell_timeout: float = math.inf
    group: Group = Group()  # noqa: RUF009  frozen

    def __post_init__(self) -> None:
        """Checks what goes together.

        Raises:
            UsageError: names the option.
        """
        self._check_group()
        cpu = self.device == "cpu"
        if self.ways.stack > 1 and not cpu:
            raise UsageError("--stack is for the CPU; on a GPU use --cells-per-device.")
        if self.ways.stack > 1 and self.ways.compiled:
            raise UsageError("--compile and --stack do not go together: stacks are not compiled.")
        if self.executor == "ray" and (self.ways.stack > 1 or self.places == 0):
            raise UsageError(
                "--executor ray gives each worker one cell: leave out --stack, and give "
                "--cells-per-device a number, of workers that share a GPU."
            )
        if self.places != 1 and cpu:
            raise UsageError(
                "--cells-per-device is for GPUs; on the CPU use --workers, and --stack for small "
                "networks."
            )

    def _check_group(self) -> None:
        if self.group.size == 1:
            return
        given = {
            "--workers": self.workers > 1,
            "--stack": self.ways.stack > 1,
            "--cells-per-device": self.places != 1,
            "--graph": self.ways.graph,
            "--compile": self.ways.compiled,
            "--executor ray": self.executor == "ray",
        }
        if refused := [option for option, is_given in given.items() if is_given]:
            raise UsageError(
                f"{' and '.join(refused)}: not with torchrun, under which all processes train one "
                "cell together, step by step. Leave it out, or start without torchrun."
            )


def chosen(plan: Plan, only: str | None) -> list[Cell]:
    """The cells whose label or file name matches.

    Raises:
        UsageError: none does; that is a mistake, not an empty run.
    """
    cells = list(plan.manifest.cells)
    if only is None:
        return cells
    found = [
        cell
        for cell in cells
        # A label such as `rigl[every=10]` is meant as it stands, not as a pattern.
        if only == cell.label
        or any(fnmatch.fnmatchcase(name, only) for name in (cell.label, cell.spec.slug))
    ]
    if not found:
        labels = ", ".join(dict.fromkeys(cell.label for cell in cells))
        raise UsageError(f"--only {only}: no cell has such a label or file name. Labels: {labels}.")
    return found


def usable_device(name: str, executor: str = "local", address: str | None = None) -> str:
    """The device, `auto` resolved.

    Args:
        name: as the command line has it.
        executor: see `Settings`; with `ray` the machines of the cluster matter, not this one.
        address: of the cluster; None: one is started here.

    Raises:
        UsageError: torch cannot compute there, or there is no cluster.
    """
    if executor == "ray":
        ray_executor.connect(address)
        gpus = ray_executor.has_gpus()
        if name == "auto":
            return "cuda" if gpus else "cpu"
        if name not in ("cpu", "cuda") or (name == "cuda" and not gpus):
            offered = "auto, cpu or cuda" if gpus else "auto or cpu, for the cluster has no GPU"
            raise UsageError(f"--device {name}: with --executor ray give {offered}.")
        return name
    if address is not None:
        raise UsageError(f"--address {address}: only --executor ray takes one.")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        float(torch.zeros(1, device=name))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: cannot be used here ({reason}).") from error
    return name


def places(text: str) -> int:
    """What `--cells-per-device` says; 0 for `auto`.

    Raises:
        UsageError: it is neither `auto` nor a number from 1 on.
    """
    if text == "auto":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--cells-per-device {text}: give auto or a number from 1 on.")
    return int(text)


def train(plan: Plan, store: Store, cells: list[Cell], settings: Settings) -> bool:
    """Trains the cells that have no record, seed 0 of everything first, and shows how it goes.

    Cells whose masks others start from are trained before these, also where they were not chosen.
    Of several processes that train together, the first leads.

    Returns:
        Whether time was up before all were done.

    Raises:
        UsageError: the store cannot be written, or a batch not shared.
    """
    group, batch = settings.group, plan.recipe.batch
    if batch % group.size:
        raise UsageError(
            f"batch = {batch} of the recipe cannot be shared equally by {group.size} processes; "
            "give torchrun a number that divides it."
        )
    if not group.leads:
        _follow(plan, store, settings)
        return False
    # A damaged record stops here, before anything is written; one of an older suite too.
    list(store.records(brief=True))
    plan = without_lost(plan, store)
    by_key = _by_key(plan)
    ordered = _missing(plan, store, cells, by_key)
    try:
        store.put_manifest(plan.manifest)
        sweep(store, [cell.spec for cell in plan.manifest.cells])
    except OSError as error:
        raise UsageError(f"--records: cannot write in {store.folder} ({error}).") from error
    if not ordered:
        return False
    late = False
    places = settings.places if settings.ways.stack == 1 else settings.ways.stack
    fitted = _fitted(settings, -(-len(ordered) // max(1, places)))
    timing: Timing = "exclusive" if (fitted.workers, places) == (1, 1) else "shared"
    tasks = [_task(cell, plan, store, fitted, by_key) for cell in ordered]
    tasks = [dataclasses.replace(task, timing=timing) for task in tasks]
    executor = _executor(settings, fitted.workers, places)
    queue = Queue(tasks, store, retries=settings.retries, strict=settings.strict)
    # Closed at once whatever happens here, so that no worker is waited for at the exit.
    late_end = settings.deadline if isinstance(executor, InThisProcess) else math.inf
    with (
        View(ordered, plan.recipe.batch) as view,
        _ended_late(late_end, view),
        closing(perform(queue, executor)) as events,
    ):
        for event in events:
            _show(view, event)
            late |= isinstance(event, Stopped) and event.late
    # Only now is it known which sources have masks to start from.
    store.put_manifest(without_lost(plan, store).manifest)
    if queue.broken:
        return False
    return late or time.monotonic() >= settings.deadline


def _missing(plan: Plan, store: Store, cells: list[Cell], by_key: Mapping[str, Cell]) -> list[Cell]:
    """Those of the cells, and of their sources, that have no record; seed 0 of everything first."""
    lost = _lost(plan)
    chosen = [
        cell
        for cell in cells
        if not cell.skipped and not store.has(cell.spec) and cell.spec.key not in lost
    ]
    sources = [by_key[cell.spec.source] for cell in chosen if cell.spec.source]
    wanted = [cell.spec for cell in [*chosen, *sources] if not store.has(cell.spec)]
    missing = {spec.key: by_key[spec.key] for spec in wanted}
    return sorted(missing.values(), key=lambda cell: cell.spec.seed)


def _by_key(plan: Plan) -> dict[str, Cell]:
    """Of the rows that one cell answers, the last to be reached: it tells how long that takes.

    A skipped row may hold the spec of another's cell: it stands for it only where no other does.
    """
    ordered = sorted(plan.manifest.cells, key=lambda cell: (not cell.skipped, cell.steps))
    return {cell.spec.key: cell for cell in ordered}


def _fitted(settings: Settings, most: int) -> Settings:
    """With the numbers of processes that a run is to have.

    Args:
        settings: as they were asked for; 0 for what is to be found.
        most: workers that would have something to do.
    """
    size = settings.group.size
    workers = settings.workers or (cores() if settings.device == "cpu" else 1)
    workers = 1 if size > 1 else min(workers, most)
    decoders = settings.decoders or max(1, cores() // max(workers, size))
    return dataclasses.replace(settings, workers=workers, decoders=decoders)


def _follow(plan: Plan, store: Store, settings: Settings) -> None:
    """Trains, beside the first process, the cells that it begins, until it has no more."""
    set_up_process(settings.threads)
    by_key = _by_key(plan)
    settings = dataclasses.replace(_fitted(settings, 1), deadline=math.inf)
    for key in settings.group.cells():
        task = _task(by_key[key], plan, store, settings, by_key)
        for _ in run_cell(dataclasses.replace(task, timeout_seconds=math.inf)):
            pass  # the first process decides when to stop, and shows how it goes


@contextmanager
def _ended_late(deadline: float, view: View) -> Iterator[None]:
    """Ends this process where it trains and hangs past the limit of time: nobody else could.

    Args:
        deadline: see `Settings`.
        view: says so.
    """
    if math.isinf(deadline):
        yield
        return
    over = threading.Event()
    seconds = min(deadline + LATE_SECONDS - time.monotonic(), threading.TIMEOUT_MAX)
    threading.Thread(target=_end_late, args=(over, seconds, view), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _end_late(over: threading.Event, seconds: float, view: View) -> None:
    if over.wait(seconds):
        return
    with suppress(Exception):  # nothing is to keep it from ending
        view.say(
            f"Time was up {LATE_SECONDS:g} seconds ago, and nothing is saved yet: a step or its "
            "data hangs. The same command goes on from the last checkpoints."
        )
        view.__exit__(None, None, None)  # gives the terminal back
    end_at_once(CELLS_LEFT)


def _show(view: View, event: Event) -> None:
    match event:
        case Progress():
            view.progress(event.key, event.done)
        case Finished():
            view.finish(event.key, event.record)
        case Elsewhere():
            view.finish_elsewhere(event.key, event.record)
        case Stopped():
            view.stop(event.key, event.done)
        case Note():
            view.say(event.text)


def _executor(settings: Settings, workers: int, places: int) -> Executor:
    if settings.executor == "ray":
        return ray_executor.OnRay(settings.threads, places, settings.workers)
    if settings.group.size == 1 and math.isfinite(settings.cell_timeout):
        # Only from outside can it be noticed that a step hangs.
        return Workers(workers, settings.threads, places)
    return local(workers, settings.threads, places)


def without_lost(plan: Plan, store: Store) -> Plan:
    """The plan as the records leave it: cells whose source has gone wrong are skipped."""
    cells = settled(plan.manifest.cells, store)
    return dataclasses.replace(plan, manifest=dataclasses.replace(plan.manifest, cells=cells))


def _lost(plan: Plan) -> set[str]:
    """Keys of cells whose source has gone wrong."""
    return {cell.spec.key for cell in plan.manifest.cells if cell.skipped and cell.spec.source}


def _task(
    cell: Cell, plan: Plan, store: Store, settings: Settings, by_key: Mapping[str, Cell]
) -> Task:
    source = None
    if cell.spec.source is not None:
        spec = by_key[cell.spec.source].spec
        source = SourceFiles(store.path(spec), store.weights(spec), store.masks(spec))
    return Task(
        cell=cell,
        suite=plan.manifest.suite,
        recipe=plan.recipe,
        data=plan.data,
        checkpoint=store.checkpoint(cell.spec),
        weights=store.weights(cell.spec),
        masks=store.masks(cell.spec),
        device=settings.device,
        checkpoint_seconds=settings.checkpoint_seconds,
        deadline=settings.deadline,
        timeout_seconds=settings.cell_timeout,
        source=source,
        init=plan.init,
        start=plan.start,
        decoders=settings.decoders,
        ways=settings.ways,
        group=settings.group,
    )


def left(store: Store, cells: list[Cell]) -> int:
    """Cells without a final record; one that answers several rows counts once."""
    specs = {cell.spec.key: cell.spec for cell in cells if not cell.skipped}
    return sum(not store.has(spec) for spec in specs.values())


def verdict(store: Store, cells: list[Cell], late: bool = False) -> int:
    """Exit status of a run that has ended.

    Args:
        store: of its records.
        cells: that were to be done.
        late: as `train` says it.
    """
    found = [store.get(cell.spec, brief=True) for cell in cells if not cell.skipped]
    if None in found and late:
        return CELLS_LEFT
    fine = all(record is not None and record.status in FINE for record in found)
    return DONE if fine else CELL_FAILED
