"""Cells side by side in one process leave what each leaves alone, bit for bit; on both devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import together
from bench.launch import Settings, train
from bench.packing import Fixed, Packing, packing
from bench.record import Record
from bench.resolve import Plan
from bench.store import Store
from bench.task import Finished, Ways
from bench.together import run_cells
from methods import METHODS
from tests.bench.cells import by_key, plan_of, tasks_of, toml, write_recipe
from tests.bench.devices import on_devices, settled

SOURCED = "ticket_control"
"""Its cells come after those of their source, so never beside them."""

NAMES = [name for name in METHODS if name != SOURCED]

WIDE = [name for name in NAMES if METHODS[name].controls != "filters"]
FILTERS = [name for name in NAMES if METHODS[name].controls == "filters"]

RECIPE = """
batch = 32
lr = 0.05
momentum = 0.9
weight_decay = 5e-4
"""


@on_devices
def test_cells_side_by_side_are_those_alone(device, tmp_path):
    plan = plan_of(suite(tmp_path, WIDE, steps=16))
    with settled(device):
        alone = cells(plan, tmp_path / "alone", device, Fixed(1))
        beside = cells(plan, tmp_path / "beside", device, Fixed(3))
    assert {record.spec.method for record in beside} == set(WIDE)
    assert all(record.weights_hash for record in beside)
    assert by_key(beside) == by_key(alone)
    assert recorded(beside) == {device == "cuda"}


@on_devices
def test_networks_with_normalisation_and_noise_side_by_side(device, tmp_path):
    names = [*FILTERS, "l0"]
    plan = plan_of(suite(tmp_path, names, steps=3, models='["resnet20"]', dataset='"synthetic"'))
    with settled(device):
        alone = cells(plan, tmp_path / "alone", device, Fixed(1))
        beside = cells(plan, tmp_path / "beside", device, Fixed(3))
    assert by_key(beside) == by_key(alone)


@on_devices
def test_noise_beside_noise_is_that_alone(device, tmp_path):
    # Long enough for graphs to be replayed beside one another many times.
    steps = 200 if device == "cuda" else 12
    plan = plan_of(
        suite(tmp_path, ["deepr", "l0", "variational_dropout"], steps, seeds="[0, 1, 2]")
    )
    with settled(device):
        alone = cells(plan, tmp_path / "alone", device, Fixed(1))
        beside = cells(plan, tmp_path / "beside", device, Fixed(9))
    assert by_key(beside) == by_key(alone)


@pytest.mark.gpu
def test_as_many_cells_as_fit_are_packed_on_a_gpu(tmp_path, monkeypatch):
    most = 0
    plain = together._Stacks.compute

    def compute(stacks: together._Stacks, running: list[together._Cell]) -> None:
        nonlocal most
        most = max(most, len(running))
        plain(stacks, running)

    monkeypatch.setattr(together._Stacks, "compute", compute)
    plan = plan_of(suite(tmp_path, ["dense", "rigl"], steps=300, seeds="[0, 1, 2]"))
    records = cells(plan, tmp_path / "records", "cuda", packing(0, torch.device("cuda")))
    assert len(records) == 6
    assert all(record.weights_hash for record in records)
    assert most > 1


@on_devices
def test_a_cell_alone_says_that_its_times_are_its_own(device, tmp_path):
    assert timings(tmp_path, Settings(device, workers=1)) == {"exclusive"}


@on_devices
def test_cells_that_share_a_device_say_so(device, tmp_path):
    if device == "cuda":
        settings = Settings(device, workers=1, places=2)
    else:
        settings = Settings(device, workers=1, ways=Ways(stack=2))
    assert timings(tmp_path, settings) == {"shared"}


@pytest.mark.gpu
def test_a_cell_without_a_graph_says_so(tmp_path):
    plan = plan_of(suite(tmp_path, ["dense"], steps=8))
    graph, eager = (
        cells(plan, tmp_path / str(on), "cuda", Fixed(1), Ways(graph=on)) for on in (True, False)
    )
    assert recorded(graph) == {True}
    assert recorded(eager) == {False}


def suite(folder: Path, names: list[str], steps: int, **fields: str) -> Path:
    """Cells of each method; rounds of lottery tickets may take their time."""
    text = toml(
        "\n".join(f"[methods.{name}]" for name in names),
        budget=f"{{ steps = {steps}, max_multiple = 40 }}",
        recipe=write_recipe(folder, RECIPE),
        **fields,
    )
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


def cells(
    plan: Plan, records: Path, device: str, places: Packing, ways: Ways | None = None
) -> list[Record]:
    """Trains every cell in this process."""
    left = tasks_of(plan, Store(records, plan.manifest.suite), device=device, ways=ways or Ways())
    events = run_cells(lambda _: left.pop(0) if left else None, places)
    return [event.record for event in events if isinstance(event, Finished)]


def recorded(records: list[Record]) -> set[bool]:
    """Whether steps were replayed as a graph."""
    return {record.execution.graph for record in records if record.execution}


def timings(folder: Path, settings: Settings) -> set[str]:
    """What the records of a run of two cells say of their times."""
    plan = plan_of(suite(folder, ["dense", "rigl"], steps=6))
    store = Store(folder / "records", plan.manifest.suite)
    train(plan, store, list(plan.manifest.cells), settings)
    records = list(store.records())
    assert len(records) == 2
    return {record.execution.timing for record in records if record.execution}
