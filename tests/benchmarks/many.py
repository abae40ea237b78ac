"""Thousands of records as a large study leaves them, of about 15 kB each.

Networks of 3 to 54 layers, curves of 200 points, 100 mask updates, rounds of lottery tickets,
some cells that diverged. Nothing is trained: the figures are drawn, but their number and their
digits are those of real cells.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.record import (
    SCHEMA,
    Compact,
    Counts,
    CurvePoint,
    Environment,
    LayerCount,
    MaskUpdate,
    PhaseResult,
    Record,
    Times,
    encode,
)
from bench.spec import BudgetSpec, CellSpec, Options
from bench.store import Cell, Manifest, Store
from methods.allocation import keep_count

SUITE = "many"
SEEDS = 10
STEPS = 20_000
LAYERS = {"lenet_300_100": 3, "resnet20": 22, "wrn28_2": 29, "timm:resnet50": 54}
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99)
STATIC = ("snip", "grasp", "synflow", "random_pruning", "magnitude_at_init", "one_shot")
DYNAMIC = ("rigl", "set", "dpf", "gradual", "granet", "sparse_momentum", "dsr", "deepr", "mest")
ENVIRONMENT = Environment(
    *("AMD EPYC", 1, "Linux x86_64", "3.11.7", "2.15.0+cu132", "0.1.0"),
    *("b95530d75c9beeb62dd06cc8844e3e68827c597a", False, 875_503_616),
)


@dataclass(frozen=True)
class Many:
    """A store with its records, and the questions that they answer."""

    store: Store
    specs: tuple[CellSpec, ...]


def fill(root: Path, count: int = 10_000) -> Many:
    """Writes `count` records and the suite that asks for them under `root`."""
    store = Store(root, SUITE)
    store.folder.mkdir(parents=True)
    specs = tuple(itertools.islice(questions(), count))
    for spec in specs:  # without the store's fsync, which is measured elsewhere
        store.path(spec).write_bytes(encode(record(spec)))
    cells = tuple(Cell(label(spec), spec, STEPS, 1.0, 100) for spec in specs)
    store.put_manifest(Manifest(SUITE, "Many cells", cells))
    return Many(store, specs)


def questions() -> Iterator[CellSpec]:
    """Every method with every option, model, sparsity and seed."""
    variants: list[tuple[str, Options]] = [(name, ()) for name in STATIC]
    variants += [(name, (("every", every),)) for name in DYNAMIC for every in (10, 100)]
    variants += [("lottery_ticket", ())]
    for (method, options), model, sparsity, seed in itertools.product(
        variants, LAYERS, SPARSITIES, range(SEEDS)
    ):
        yield CellSpec(
            method=method,
            model=model,
            dataset="cifar10",
            recipe="dpf-resnet",
            sparsity=sparsity,
            seed=seed,
            budget=BudgetSpec(epochs=30),
            recipe_hash="2d9c71d38c29",
            data_hash="47ef77565eff",
            options=options,
        )


def other() -> CellSpec:
    """A question that is not among them."""
    return dataclasses.replace(next(questions()), seed=SEEDS)


def label(spec: CellSpec) -> str:
    """The row's name; a grid says its options."""
    options = ", ".join(f"{name}={value}" for name, value in spec.options)
    return f"{spec.method}[{options}]" if options else spec.method


def record(spec: CellSpec) -> Record:
    """What such a cell would leave; the same for the same question."""
    draw = random.Random(spec.key)  # a string, so that the draw is the same in every process
    diverged = draw.random() < 0.01
    layers = tuple(lines(spec, draw))
    found = totals(layers)
    rounds = 5 if spec.method == "lottery_ticket" else 1
    points = range(STEPS // 200, STEPS + 1, STEPS // 200)
    updates = points[::2] if spec.method in DYNAMIC else ()
    top1 = round(draw.uniform(88, 94), 2)
    return Record(
        schema=SCHEMA,
        suite=SUITE,
        label=label(spec),
        spec=spec,
        status="diverged" if diverged else "ok",
        environment=ENVIRONMENT,
        times=Times(
            *(draw.uniform(500, 900), draw.uniform(0, 9), draw.random(), "2026-11-21T05:58:04Z"),
            phases=tuple(draw.uniform(100, 900) for _ in range(rounds)),
        ),
        reason="the loss of step 120 is not finite" if diverged else "",
        top1=None if diverged else top1,
        top5=None if diverged else min(100.0, top1 + 6),
        test_loss=None if diverged else draw.uniform(0.2, 0.6),
        counts=found,
        layers=layers,
        steps=STEPS,
        extra_batches=draw.randrange(200),
        multiple=1 + draw.random() / 100,
        train_macs=found.dense_macs * 3.0 * STEPS * 128,
        phases=tuple(
            PhaseResult(f"round {number}", STEPS // rounds, 0.8**number, STEPS, "ok", "", top1)
            for number in range(1, rounds + 1)
        ),
        curve=tuple(
            CurvePoint(step, _six(draw), _six(draw), round(100 * draw.random(), 2))
            for step in points
        ),
        weights_hash=f"{draw.getrandbits(48):012x}",
        mask_updates=tuple(
            MaskUpdate(step, 1 - (spec.sparsity or 0), _six(draw), _six(draw), _six(draw))
            for step in updates
        ),
        last_changes=tuple(draw.randrange(5000) for _ in range(50)) if updates else (),
    )


def lines(spec: CellSpec, draw: random.Random) -> Iterator[LayerCount]:
    """The layers of the network, all of them pruned alike."""
    for number in range(LAYERS[spec.model]):
        shape = (64, 16 << draw.randrange(3), 3, 3)
        weights = shape[0] * shape[1] * 9
        left = keep_count(weights, 1 - (spec.sparsity or 0))
        name, area = f"layers.{number}.convolution.weight", 256
        yield LayerCount(
            *(name, shape, weights, left, weights * area, left * area, True),
            live=left - draw.randrange(9),
            live_units=(64, shape[1]),
            elementwise=3 * 64 * area,
        )


def totals(layers: tuple[LayerCount, ...]) -> Counts:
    """What the lines add up to, without biases and normalisation."""
    weights, left = sum(line.weights for line in layers), sum(line.nonzero for line in layers)
    macs, sparse = sum(line.dense_macs for line in layers), sum(line.macs for line in layers)
    return Counts(
        *(weights, left, weights, left, left, 0, macs, sparse),
        elementwise=sum(line.elementwise for line in layers),
        live=sum(line.live or 0 for line in layers),
        live_macs=sparse,
        compact=Compact(weights, macs),
    )


def _six(draw: random.Random) -> float:
    """A fraction with the six digits that records keep."""
    return float(f"{draw.random():.6g}")
