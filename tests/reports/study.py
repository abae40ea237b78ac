"""Two small suites with curves and layers, for the page; one of them tries to run a script."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from bench.record import CurvePoint, Environment, LayerCount, MaskUpdate, PhaseResult, Record
from bench.spec import CellSpec
from bench.store import Cell, Manifest, Store
from tests.reports.records import counts, record, spec

POINTS = 120
HOSTILE = (
    "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script>&"
)
ACCURACY = {("rigl", 0.9): 97.0, ("rigl", 0.98): 95.0, ("set", 0.9): 96.0, ("set", 0.98): 96.5}


def measured(of: CellSpec, top1: float, suite: str, label: str) -> Record:
    """A record with a curve of `POINTS`, two layers and a mask update every tenth step."""
    steps = range(10, 10 * POINTS + 1, 10)
    left = counts(of.sparsity).prunable_nonzero
    return dataclasses.replace(
        record(of, top1, label=label, steps=10 * POINTS),
        suite=suite,
        curve=tuple(CurvePoint(step, 2 / step, 1 / 3) for step in steps),
        mask_updates=tuple(MaskUpdate(step, 0.1, 1 / step, 0.5, 0.2) for step in steps),
        layers=(
            LayerCount("fc1.weight", (60, 10), 600, left // 2, 150_000, 15_000, True),
            LayerCount("fc2.weight", (10, 20), 200, left - left // 2, 50_000, 5_000, True),
        ),
    )


def study(root: Path) -> Path:
    """Writes both suites; `demo` has two methods, two sparsities and two seeds."""
    asked = [spec(method, sparsity, seed) for method, sparsity in ACCURACY for seed in (0, 1)]
    not_run = spec("snip", 0.9)
    demo = [
        measured(of, ACCURACY[of.method, of.sparsity or 0.0] + of.seed, "demo", of.method)
        for of in asked
    ]
    write(root, "demo", "Demonstration", demo, not_run)
    write(root, "hostile", HOSTILE, [hostile()])
    return root


def hostile() -> Record:
    """A record each of whose texts would run a script, were it markup."""
    of = spec("rigl", 0.9, dataset=HOSTILE, recipe=HOSTILE, options=(("scope", HOSTILE),))
    one = measured(of, 90.0, "hostile", HOSTILE)
    place = Environment(HOSTILE, 1, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, dirty=False)
    return dataclasses.replace(
        one,
        status="diverged",
        reason=HOSTILE,
        environment=place,
        phases=(
            PhaseResult("round-0", 600, 0.5, 600, "ok", top1=89.0, counts=counts(0.5)),
            PhaseResult("round-1", 600, 0.1, 1200, "diverged", HOSTILE),
        ),
        times=dataclasses.replace(one.times, phases=(6.0, 12.0)),
        top1=math.nan,
        test_loss=math.nan,
        weights_hash=HOSTILE,
        layers=tuple(dataclasses.replace(layer, name=HOSTILE) for layer in one.layers),
        counts=counts(0.9, dead=(HOSTILE,)),
    )


def write(root: Path, suite: str, title: str, records: list[Record], *more: CellSpec) -> None:
    """A suite that asks for these cells, and for `more` that have no record."""
    store = Store(root, suite)
    cells = [Cell(one.label, one.spec, 100, 1.0, 0) for one in records]
    cells += [Cell(of.method, of, 100, 1.0, 0) for of in more]
    store.put_manifest(Manifest(suite, title, tuple(cells)))
    for one in records:
        store.put(one)
