"""Where the time of a training step goes, and what a method costs beside dense.

Cells are built and trained as `run` does it, but in memory: nothing is stored. A cell and a dense
one of the same network take turns, A B B A, so that a drift of the machine meets both alike.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from bench.capture import WARM_UP
from bench.contestant import CUT, EAGER, GRAPH, STAGES, Contestant
from bench.environment import environment
from bench.errors import CellError, UsageError
from bench.finished import find_recipe
from bench.initial import PRETRAINED, RANDOM
from bench.record import Environment
from bench.resolve import Plan
from bench.store import Cell, Manifest, read
from bench.task import Task, Ways

DENSE = "dense"
LEAST_ROUNDS, MOST_ROUNDS, LEAST_SLICE = 10, 60, 20
"""Turns of each of the two cells, as many as the time allows with so many steps in each."""

RARE_ROUNDS = 3
"""Rounds in which what comes now and then is timed too."""

WINDOW, SETTLED, SLICE = 200, 200, 10
"""Of a drift: steps of a window, those before the first one, and those of a turn."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one figure a round."""
        lower, median, upper = np.percentile(values, [25, 50, 75])
        return cls(float(median), float(lower), float(upper))


@dataclass(frozen=True, slots=True)
class Profile:
    """One cell; times in microseconds per step.

    Attributes:
        label: the row's name in the suite; `model`, `sparsity`: what was trained.
        phase: of the plan that was measured, the first in which the method is at work.
        first: step of that phase from which on it was, counted from 0; `steps`, how many were.
        stages: by name, see `STAGES`.
        step: a whole step without any watch in it, plus what comes now and then.
        unattributed: of `step`, what is in no stage.
        every: steps between updates of the masks; None: there are none.
        update: time of one; `start`, of the phase's start. Both are in `stages`, divided.
        own: what only the method does: hot hooks, updates and start.
        dense: a whole step of the dense cell, likewise.
        steady: ratio of the two, updates and starts left out; `ratio`: with them. Both without
            evaluation, each of times of the same round.
        replayed: `ratio`, of steps replayed as a CUDA graph; None: they were not.
        replayed_step: `step`, likewise.
    """

    label: str
    model: str
    sparsity: float | None
    phase: str
    first: int
    steps: int
    stages: dict[str, float]
    step: float
    unattributed: float
    every: int | None
    update: float
    start: float
    own: float
    dense: float
    steady: Spread
    ratio: Spread
    replayed: Spread | None = None
    replayed_step: float | None = None


@dataclass(frozen=True, slots=True)
class Drift:
    """Whether steps become slower after pruning.

    Attributes:
        label: the row's name in the suite; `model`, `sparsity`: what was trained.
        phase: of the plan, from whose start steps count; updates come at their own cadence.
        early: time over that of dense, in the `WINDOW` steps after `SETTLED`.
        late: likewise in as many steps after `after`.
        change: the medians' ratio, late over early.
    """

    label: str
    model: str
    sparsity: float | None
    phase: str
    early: Spread
    late: Spread
    after: int
    change: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured, and where.

    Attributes:
        environment: device, threads and versions.
        rows: one for each method and model, of one kind.
        notes: what was left out and why.
    """

    environment: Environment
    rows: tuple[Profile | Drift, ...]
    notes: tuple[str, ...]


def of_record(path: Path, recipe: Path | None, data: Path) -> Plan:
    """A plan of one cell, from its record.

    Args:
        path: of the record.
        recipe: file of the cell's recipe, where it is none of those that come with the harness.
        data: folder of the data sets.

    Raises:
        UsageError: the record does not say all that is needed.
    """
    record = read(path)
    spec, known = record.spec, find_recipe(record, recipe)
    if known is None:
        raise UsageError(
            f"{spec.slug}: its recipe {spec.recipe} is not known here; name the file by --recipe."
        )
    kind = spec.init.partition("-")[0]  # behind it is the hash, see `bench.initial.content`
    if kind not in (RANDOM, PRETRAINED):
        raise UsageError(f"{spec.slug}: starts from a file of weights; profile its suite.")
    if spec.source is not None:
        raise UsageError(f"{spec.slug}: starts from the masks of another cell; allowed: others.")
    cell = Cell(record.label, spec, record.steps, record.multiple, len(record.mask_updates))
    manifest = Manifest(record.suite, record.suite, (cell,))
    return Plan(manifest, spec.dataset, known, data, kind)


def profile(
    plan: Plan, cells: Sequence[Cell], device: str, seconds: float, *, graph: bool = True
) -> Measured:
    """Takes the steps of each method's first cell apart.

    Args:
        plan: of the suite.
        cells: of it; of each method and model the first one is measured.
        device: as torch names it.
        seconds: of training for each, setting up and evaluation not counted.
        graph: steps are replayed as a CUDA graph too, on a GPU.
    """

    def one(reference: Contestant, arm: Contestant) -> Profile:
        return _profile(reference, arm, seconds)

    return _each(plan, cells, device, graph, one)


def drift(
    plan: Plan, cells: Sequence[Cell], device: str, after: int, *, graph: bool = True
) -> Measured:
    """Looks whether steps become slower in the course of `after` steps after pruning.

    Args:
        plan: of the suite.
        cells: of it; of each method and model the first one is measured.
        device: as torch names it.
        after: steps; more than those of the first window.
        graph: steps are replayed as a CUDA graph, on a GPU.

    Raises:
        UsageError: too few steps.
    """
    least = SETTLED + WINDOW
    if after < least:
        raise UsageError(
            f"--drift {after}: give at least {least} steps; the first window ends there."
        )

    def one(reference: Contestant, arm: Contestant) -> Drift:
        return _drift(reference, arm, after)

    return _each(plan, cells, device, graph, one, after + WINDOW)


def _each(
    plan: Plan,
    cells: Sequence[Cell],
    device: str,
    graph: bool,
    one: Callable[[Contestant, Contestant], Profile | Drift],
    steps: int = 0,
) -> Measured:
    """Lets every method take turns with a dense cell of the same network.

    Args:
        plan: of the suite.
        cells: of it.
        device: as torch names it.
        graph: steps are replayed as a CUDA graph, on a GPU.
        one: what they do.
        steps: see `Contestant`; then every method meets a dense cell that has just begun too, else
            one dense cell meets all.
    """
    rows: list[Profile | Drift] = []
    notes: list[str] = []

    def started(cell: Cell) -> Contestant:
        return Contestant(task_of(cell, plan, device, graph=graph), steps)

    place = torch.device(device)
    # Not the device's first stream, on which no graph can be recorded.
    stream = torch.cuda.Stream(place) if place.type == "cuda" else None  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream), ExitStack() as whole:
        for group in _by_model(cells, notes):
            reference: Contestant | None = None
            for cell in group:
                name = f"{cell.label}, {cell.spec.model}"
                try:
                    with ExitStack() as turn:
                        if reference is None or steps:
                            keeper = turn if steps else whole
                            reference = keeper.enter_context(closing(started(_dense(group))))
                        arm = turn.enter_context(closing(started(cell)))
                        rows.append(one(reference, arm))
                        notes += [f"{name}: {note}" for note in arm.notes()]
                except CellError as error:
                    notes.append(f"{name}: not measured: {error}")
                else:
                    print(name, file=sys.stderr)
    return Measured(environment(place), tuple(rows), tuple(notes))


def _by_model(cells: Sequence[Cell], notes: list[str]) -> list[list[Cell]]:
    """The first cell of each method, by network."""
    groups: dict[object, dict[str, Cell]] = {}
    for cell in cells:
        spec = cell.spec
        reason = cell.skipped
        if cell.against is not None:
            reason = "a dense network of another width; it is its own reference"
        if spec.source is not None:
            reason = "it starts from the masks of another cell"
        if reason:
            notes.append(f"{cell.label}, {spec.model}: not measured: {reason}")
        else:
            groups.setdefault((spec.model, spec.model_options), {}).setdefault(cell.label, cell)
    notes[:] = dict.fromkeys(notes)
    return [list(group.values()) for group in groups.values()]


def _dense(group: Sequence[Cell]) -> Cell:
    """The dense cell among those of one network; one is made where there is none."""
    for cell in group:
        if cell.spec.method == DENSE:
            return cell
    first = group[0]
    spec = replace(
        first.spec, method=DENSE, options=(), sparsity=None, source=None, method_version=1
    )
    return replace(first, label=DENSE, spec=spec, sparsity=None)


def task_of(cell: Cell, plan: Plan, device: str, *, graph: bool) -> Task:
    """What `run` makes of a cell, but that it has nowhere to write and never need."""
    nowhere = Path(os.devnull)  # no folder can be made in it
    return Task(
        cell=cell,
        suite=plan.manifest.suite,
        recipe=plan.recipe,
        data=plan.data,
        checkpoint=nowhere / "checkpoint",
        weights=nowhere / "weights",
        masks=nowhere / "masks",
        device=device,
        checkpoint_seconds=math.inf,
        deadline=math.inf,
        init=plan.init,
        start=plan.start,
        ways=Ways(graph=graph),
    )


@dataclass(frozen=True, slots=True)
class _Turns:
    """What two cells took; seconds.

    Attributes:
        whole: (dense, other) per step, by way and round.
        stages: of the other, by round; `rare` likewise, and `rare_dense` of the dense one.
        steps: of the other, in all.
    """

    whole: dict[str, list[tuple[float, float]]]
    stages: list[dict[str, float]]
    rare: list[dict[str, float]]
    rare_dense: list[dict[str, float]]
    steps: int


def _take_turns(reference: Contestant, arm: Contestant, seconds: float) -> _Turns:
    ways = list(arm.ways)
    for way in ways:
        for contestant in (reference, arm):
            contestant.steps(WARM_UP + 2, way)
    arm.stages(1)
    affordable = seconds / (1 + len(ways)) / arm.steps(2)
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(affordable / LEAST_SLICE)))
    count = max(1, round(affordable / rounds))
    found = _Turns({way: [] for way in ways}, [], [], [], (1 + len(ways)) * count * rounds)
    for number in range(rounds):
        for way in ways:
            steps = functools.partial(Contestant.steps, count=count, way=way)
            found.whole[way].append(_pair(steps, reference, arm, number))
        found.stages.append(arm.stages(count))
        if number < RARE_ROUNDS:
            found.rare.append(arm.rare())
            found.rare_dense.append(reference.rare())
    return found


def _profile(reference: Contestant, arm: Contestant, seconds: float) -> Profile:
    turns = _take_turns(reference, arm, seconds)
    rare, evaluation = medians(turns.rare), arm.evaluation()
    divided = arm.divided(rare)
    extra = sum(divided.values())
    dense_extra = sum(reference.divided(medians(turns.rare_dense)).values())
    stages = medians(turns.stages)
    whole = {way: statistics.median(own for _, own in pairs) for way, pairs in turns.whole.items()}
    unattributed = whole[EAGER] - sum(stages.values())
    for stage, spent in {**divided, "evaluation": evaluation}.items():
        stages[stage] += spent

    def ratio(way: str) -> Spread:
        pairs = turns.whole[way]
        return Spread.of([(own + extra) / (dense + dense_extra) for dense, own in pairs])

    replayed = arm.plain.replayed and reference.plain.replayed
    dense = statistics.median(dense for dense, _ in turns.whole[EAGER])
    cell, micro = arm.task.cell, 1e6
    return Profile(
        label=cell.label,
        model=cell.spec.model,
        sparsity=cell.asked,
        phase=arm.phase.name,
        first=arm.first,
        steps=turns.steps,
        stages={name: micro * spent for name, spent in stages.items()},
        step=micro * (whole[EAGER] + extra + evaluation),
        unattributed=micro * unattributed,
        every=arm.every,
        update=micro * rare["update"],
        start=micro * arm.start_alone(rare),
        own=micro * (stages["hot hooks"] + stages["updates"] + stages["phase start"]),
        dense=micro * (dense + dense_extra),
        steady=Spread.of([own / dense for dense, own in turns.whole[EAGER]]),
        ratio=ratio(EAGER),
        replayed=ratio(GRAPH) if replayed else None,
        replayed_step=micro * (whole[GRAPH] + extra + evaluation) if replayed else None,
    )


def _drift(reference: Contestant, arm: Contestant, after: int) -> Drift:
    early, late = [], []
    for number in range((after + WINDOW) // SLICE):
        dense, own = _pair(lambda who: who.really(SLICE), reference, arm, number)
        if SETTLED <= number * SLICE < SETTLED + WINDOW:
            early.append(own / dense)
        if number * SLICE >= after:
            late.append(own / dense)
    spec = arm.task.cell
    first, last = Spread.of(early), Spread.of(late)
    change = last.median / first.median
    return Drift(
        spec.label, spec.spec.model, spec.asked, arm.phase.name, first, last, after, change
    )


def _pair(
    measure: Callable[[Contestant], float], reference: Contestant, arm: Contestant, number: int
) -> tuple[float, float]:
    """Figures of the dense cell and of the other, one after the other; who is first alternates."""
    if number % 2:
        own = measure(arm)
        return measure(reference), own
    dense = measure(reference)
    return dense, measure(arm)


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure over the rounds."""
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def table(measured: Measured) -> str:
    """Markdown: tables of each model, and what must be known to read them."""
    models = dict.fromkeys(row.model for row in measured.rows)
    parts = []
    for model in models:
        profiles = [r for r in measured.rows if r.model == model and isinstance(r, Profile)]
        drifts = [r for r in measured.rows if r.model == model and isinstance(r, Drift)]
        tables = [_stages_table(profiles), _overheads_table(profiles)] if profiles else []
        tables += [_drifts_table(drifts)] if drifts else []
        parts += [f"## {model}", *tables]
    where = measured.environment
    notes = [
        f"device: {where.device}; threads: {where.threads}; torch: {where.torch}; "
        f"python: {where.python}.",
        *_legend(measured.rows),
        *measured.notes,
    ]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in notes)])


def _stages_table(rows: Sequence[Profile]) -> str:
    return _markdown(
        [
            {"method": _name(row)}
            | {stage: _share(row.stages[stage], row.step) for stage in STAGES}
            | {"unattributed": _share(row.unattributed, row.step), "step": f"{row.step:,.1f}"}
            for row in rows
        ]
    )


def _overheads_table(rows: Sequence[Profile]) -> str:
    lines = []
    for row in rows:
        line = {
            "method": _name(row),
            "measured": f"{row.phase} from {row.first}, {row.steps} steps",
            "update every": "" if row.every is None else str(row.every),
            "one update, us": "" if row.every is None else f"{row.update:,.0f}",
            "phase start, us": f"{row.start:,.0f}",
            "own": _share(row.own, row.dense),
            "steps / dense": _ratio(row.steady),
            "all / dense": _ratio(row.ratio),
        }
        if any(row.replayed for row in rows):
            line["replayed, us"] = f"{row.replayed_step:,.1f}" if row.replayed_step else ""
            line["replayed / dense"] = _ratio(row.replayed) if row.replayed else ""
        lines.append(line)
    return _markdown(lines)


def _drifts_table(rows: Sequence[Drift]) -> str:
    return _markdown(
        [
            {
                "method": _name(row),
                "phase": row.phase,
                f"steps {SETTLED} to {SETTLED + WINDOW} / dense": _ratio(row.early),
                f"steps {row.after} to {row.after + WINDOW} / dense": _ratio(row.late),
                "late / early": f"{row.change:.3f}",
            }
            for row in rows
        ]
    )


def _legend(rows: Sequence[Profile | Drift]) -> Iterator[str]:
    """What the columns are."""
    if any(isinstance(row, Profile) for row in rows):
        yield (
            "stages: microseconds per step and percent of the step; step: a whole one without "
            "watches, and what comes now and then; unattributed: what is in no stage."
        )
        yield (
            "updates, phase start, a new order of the data, the curve and evaluation are timed by "
            "themselves and divided by their period: every update's, the steps of the phase, of "
            "an epoch, between two points, and of the run."
        )
        yield (
            "measured: the first phase that prunes or updates masks, in the middle of it or of its "
            f"updates; phases before it are cut to {CUT} steps."
        )
        yield (
            "own: hot hooks, updates and phase start, in percent of a step of dense; a penalty's "
            "backward pass and gates inside the network count as backward and forward."
        )
        yield (
            "/ dense: median of the ratios of slices that took turns, and their quartiles; `steps` "
            "without what comes now and then, `all` with it but for evaluation. Dense itself meets "
            "another dense cell: how far its ratio is from 1 is noise."
        )
    if any(isinstance(row, Drift) for row in rows):
        yield (
            "steps are counted from the start of the first phase that prunes or updates masks, for "
            f"dense from its own first; phases before it are cut to {CUT} steps, and it is as long "
            "as need be. Updates come as planned."
        )
        yield (
            f"/ dense: median of the ratios of slices of {SLICE} steps that took turns, and their "
            "quartiles."
        )


def _name(row: Profile | Drift) -> str:
    return row.label if row.sparsity is None else f"{row.label} {100 * row.sparsity:g} %"


def _share(part: float, whole: float) -> str:
    return f"{part:,.1f} ({100 * part / whole:.1f} %)"


def _ratio(found: Spread) -> str:
    return f"{found.median:.3f} ({found.lower:.3f} to {found.upper:.3f})"


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
