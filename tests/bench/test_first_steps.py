"""Every cell of the suites for a GPU trains its first steps: what cannot run is found here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import inspection, launch, recipes, suite
from bench.recipes import Recipe
from bench.resolve import resolve
from bench.spec import BudgetSpec
from bench.store import Store
from tests.bench.cells import digits_like

pytestmark = pytest.mark.faults

STEPS = 4
MULTIPLE = 1000.0
"""A score of 100 batches is little beside a paper's training, and much beside 4 steps."""

IMAGES, VALIDATION = 192, 64
"""In each half; of those to train on, so many to validate where the paper sets 5,000 aside."""

SUITES = [name for name in suite.names() if name.startswith("cifar10-")]


@pytest.fixture
def data(tmp_path) -> Path:
    """Noise of the size and type of CIFAR-10."""
    np.savez(tmp_path / "cifar10.npz", **digits_like(IMAGES, size=(32, 32, 3)))
    return tmp_path


@pytest.mark.parametrize("name", SUITES)
def test_every_cell_of_a_suite_trains_its_first_steps(name, data, monkeypatch):
    load = recipes.load

    def smaller(*arguments: Any) -> Recipe:
        recipe = load(*arguments)
        return dataclasses.replace(recipe, validation=VALIDATION) if recipe.validation else recipe

    monkeypatch.setattr(recipes, "load", smaller)
    monkeypatch.setattr(inspection, "CHANCE_FACTOR", 0.0)  # nothing is learnt
    asked = suite.load(name)
    short = {"budget": BudgetSpec(steps=STEPS), "max_multiple": MULTIPLE}
    questions = tuple(dataclasses.replace(q, **short) for q in asked.questions if q.seed == 0)
    plan = resolve(dataclasses.replace(asked, questions=questions), data)
    cells, store = list(plan.manifest.cells), Store(data / "records", name)
    assert not launch.train(plan, store, cells, launch.Settings("cpu", workers=1))
    records = list(store.records())
    assert {one.spec.key for one in records} == {cell.spec.key for cell in cells}
    assert [(one.label, one.status, one.reason) for one in records if one.status != "ok"] == []
