"""From resolved cells to records: which cells, on which device, and what came of them."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

import torch

from bench.errors import UsageError
from bench.executors import execute
from bench.live import View
from bench.processes import cores
from bench.record import Timing
from bench.resolve import Plan
from bench.runner import ALONE, Finished, Note, Progress, Task, Ways
from bench.sources import SourceFiles, settled
from bench.store import Cell, Store

DONE, CELL_FAILED, CELLS_LEFT = 0, 1, 5
"""Exit statuses of a run."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a suite is run, which does not change what it measures (but for times).

    Attributes:
        device: as torch names it.
        workers: cells side by side; 0: one a CPU core, or one a GPU.
        threads: of the CPU, for each cell.
        deadline: Unix time at which to save and stop; infinity: never.
        checkpoint_seconds: wall-clock between checkpoints of a cell.
        decoders: processes of a cell that decode images; 0: the cores, shared among the workers.
        places: cells at a time on a GPU, in each process; 0: as many as fit.
        ways: how steps are computed.
    """

    device: str
    workers: int = 0
    threads: int = 1
    deadline: float = math.inf
    checkpoint_seconds: float = 60.0
    decoders: int = 0
    places: int = 1
    ways: Ways = ALONE

    def __post_init__(self) -> None:
        """Checks what goes together.

        Raises:
            UsageError: names the option.
        """
        cpu = self.device == "cpu"
        if self.ways.stack > 1 and not cpu:
            raise UsageError("--stack is for the CPU; on a GPU use --cells-per-device.")
        if self.ways.stack > 1 and self.ways.compiled:
            raise UsageError("--compile and --stack do not go together: stacks are not compiled.")
        if self.places != 1 and cpu:
            raise UsageError(
                "--cells-per-device is for GPUs; on the CPU use --workers, and --stack for small "
                "networks."
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


def usable_device(name: str) -> str:
    """The device, `auto` resolved.

    Raises:
        UsageError: torch cannot compute there.
    """
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


def train(plan: Plan, store: Store, cells: list[Cell], settings: Settings) -> None:
    """Trains the cells that have no record, seed 0 of everything first, and shows how it goes.

    Cells whose masks others start from are trained first, also where they were not chosen.
    """
    # A damaged record stops here, before anything is written; one of an older suite too.
    list(store.records(brief=True))
    plan = without_lost(plan, store)
    # Of the rows that one cell answers, the last to be reached tells how long it takes.
    by_key = {cell.spec.key: cell for cell in sorted(plan.manifest.cells, key=_steps)}
    lost = _lost(plan)
    chosen = [
        cell
        for cell in cells
        if not cell.skipped and not store.has(cell.spec) and cell.spec.key not in lost
    ]
    sources = [by_key[cell.spec.source] for cell in chosen if cell.spec.source]
    wanted = [cell.spec for cell in [*chosen, *sources] if not store.has(cell.spec)]
    missing = {spec.key: by_key[spec.key] for spec in wanted}
    ordered = sorted(missing.values(), key=lambda cell: cell.spec.seed)
    try:
        store.put_manifest(plan.manifest)
    except OSError as error:
        raise UsageError(f"--records: cannot write in {store.folder} ({error}).") from error
    if not ordered:
        return
    places = settings.places if settings.ways.stack == 1 else settings.ways.stack
    workers = settings.workers or (cores() if settings.device == "cpu" else 1)
    workers = min(workers, -(-len(ordered) // max(1, places)))
    decoders = settings.decoders or max(1, cores() // workers)
    settings = dataclasses.replace(settings, decoders=decoders)
    timing: Timing = "exclusive" if (workers, places) == (1, 1) else "shared"
    said: set[str] = set()
    with View(ordered) as view:
        for depends in (False, True):
            if depends:  # only now is it known which sources have masks to start from
                plan = without_lost(plan, store)
                store.put_manifest(plan.manifest)
            lost = _lost(plan)
            wave = [
                dataclasses.replace(_task(cell, plan, store, settings, by_key), timing=timing)
                for cell in ordered
                if (cell.spec.source is not None) == depends and cell.spec.key not in lost
            ]
            # A source that has no record by now has failed, or there was no time for it.
            ready = [task for task in wave if not task.source or task.source.record.exists()]
            if not ready:
                continue
            # Closed at once whatever happens here, so that no worker is waited for at the exit.
            events = execute(ready, store, min(workers, len(ready)), settings.threads, places)
            with closing(events) as run:
                for event in run:
                    if isinstance(event, Progress):
                        view.progress(event.key, event.done)
                    elif isinstance(event, Finished):
                        view.finish(event.key, event.record)
                    elif isinstance(event, Note) and event.text not in said:
                        said.add(event.text)
                        view.say(event.text)


def without_lost(plan: Plan, store: Store) -> Plan:
    """The plan as the records leave it: cells whose source has gone wrong are skipped."""
    cells = settled(plan.manifest.cells, store)
    return dataclasses.replace(plan, manifest=dataclasses.replace(plan.manifest, cells=cells))


def _lost(plan: Plan) -> set[str]:
    """Keys of cells whose source has gone wrong."""
    return {cell.spec.key for cell in plan.manifest.cells if cell.skipped and cell.spec.source}


def _steps(cell: Cell) -> int:
    return cell.steps


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
        source=source,
        init=plan.init,
        start=plan.start,
        decoders=settings.decoders,
        ways=settings.ways,
    )


def left(store: Store, cells: list[Cell]) -> int:
    """Cells without a final record; one that answers several rows counts once."""
    specs = {cell.spec.key: cell.spec for cell in cells if not cell.skipped}
    return sum(not store.has(spec) for spec in specs.values())


def verdict(store: Store, cells: list[Cell], deadline: float) -> int:
    """Exit status of a run that has ended."""
    found = [store.get(cell.spec, brief=True) for cell in cells if not cell.skipped]
    if None in found and time.time() >= deadline:
        return CELLS_LEFT
    fine = all(record is not None and record.status == "ok" for record in found)
    return DONE if fine else CELL_FAILED
