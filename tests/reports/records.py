"""Small records whose every figure can be worked out by hand.

The network has 1,000 parameters, 800 of them prunable, and 200,000 dense MACs, all of them in the
prunable weights. At 90 % sparsity, 80 prunable weights are left, 280 parameters and 20,000 MACs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bench.record import SCHEMA, Counts, Environment, Execution, Record, Times
from bench.spec import BudgetSpec, CellSpec
from bench.store import Cell, Manifest, Store

SUITE = "demo"
PARAMETERS, PRUNABLE, DENSE_MACS = 1000, 800, 200_000
ENVIRONMENT = Environment("cpu", 1, "Linux", "3.11", "2.15", "0.1", "abc1234", dirty=False)


def spec(
    method: str = "rigl", sparsity: float | None = 0.9, seed: int = 0, **more: Any
) -> CellSpec:
    """A question; `more` are other fields of `CellSpec`."""
    fields: dict[str, Any] = {
        "model": "lenet",
        "dataset": "digits",
        "recipe": "plain",
        "budget": BudgetSpec(epochs=10),
        "recipe_hash": "aaaa",
        "data_hash": "bbbb",
    }
    return CellSpec(method=method, sparsity=sparsity, seed=seed, **fields | more)


def counts(sparsity: float | None = 0.9, **more: Any) -> Counts:
    """Counts of a network that reached this sparsity exactly."""
    density = 1 - (sparsity or 0.0)
    left = round(PRUNABLE * density)
    figures = Counts(
        parameters=PARAMETERS,
        nonzero=PARAMETERS - PRUNABLE + left,
        prunable=PRUNABLE,
        target_nonzero=left,
        prunable_nonzero=left,
        idle=0,
        dense_macs=DENSE_MACS,
        macs=round(DENSE_MACS * density),
    )
    return dataclasses.replace(figures, **more)


def record(of: CellSpec, top1: float | None = 98.0, **more: Any) -> Record:
    """The record of a cell; `more` are other fields of `Record`."""
    fields: dict[str, Any] = {
        "label": of.method,
        "status": "ok",
        "environment": ENVIRONMENT,
        "times": Times(12.0, 1.0, 0.5, "2025-01-01T00:00:00Z"),
        "counts": counts(of.sparsity),
        "multiple": 1.0,
        "execution": Execution(),
    }
    return Record(schema=SCHEMA, suite=SUITE, spec=of, top1=top1, **fields | more)


def manifest(*specs: CellSpec, label: str = "", title: str = "Demonstration") -> Manifest:
    """A suite that asks for these cells; each is labelled by its method, or all by `label`."""
    cells = (Cell(label or of.method, of, steps=100, multiple=1.0, updates=0) for of in specs)
    return Manifest(SUITE, title, tuple(cells))


def fill(root: Path, asked: Manifest, *records: Record) -> Store:
    """Writes a suite and its records under `root`."""
    store = Store(root, SUITE)
    store.put_manifest(asked)
    for one in records:
        store.put(one)
    return store
