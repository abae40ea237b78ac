"""What one cell leaves for another: masks on disk, and what a source gives at a sparsity."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from bench.errors import SourceMissing
from bench.record import Counts, Environment, PhaseResult, Record, Times, landed
from bench.sources import SourceFiles, load, read_masks, write_masks
from bench.spec import BudgetSpec
from bench.store import Store
from tests.bench.cells import spec

SHAPES = {"conv.weight": (3, 1, 3, 3), "fc.weight": (5, 7)}  # 27 and 35: not whole bytes
TOTAL = 62


def masks_of(kept, seed=0, shapes=SHAPES):
    """Random masks with `kept` ones in all."""
    sizes = [int(torch.Size(shape).numel()) for shape in shapes.values()]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    flat = torch.zeros(sum(sizes))
    flat[order[:kept]] = 1
    parts = zip(shapes.items(), torch.split(flat, sizes), strict=True)
    return {name: part.reshape(shape) for (name, shape), part in parts}


ONES = masks_of(TOTAL)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("kept", [0, 1, 31, TOTAL])
def test_masks_come_back_as_they_were(kept, tmp_path):
    masks, path = masks_of(kept, seed=kept), tmp_path / "folder" / "masks.safetensors"
    write_masks(path, masks)
    assert same(read_masks(path, ONES), masks)


def test_masks_come_back_in_the_type_and_layout_that_is_asked_for(tmp_path):
    shape = {"conv.weight": (4, 3, 3, 3)}
    masks = masks_of(50, shapes=shape)
    path = tmp_path / "masks.safetensors"
    # Layout in memory plays no part in what is written.
    write_masks(path, {n: m.to(memory_format=torch.channels_last) for n, m in masks.items()})
    like = {n: m.double() for n, m in masks.items()}
    found = read_masks(path, like)["conv.weight"]
    assert found.dtype == torch.float64
    assert torch.equal(found, like["conv.weight"])


def test_a_byte_holds_eight_weights(tmp_path):
    path = tmp_path / "masks.safetensors"
    write_masks(path, {"w": torch.ones(1000, 800)})
    assert path.stat().st_size == pytest.approx(100_000, abs=200)


def counts(kept):
    return Counts(100, 38 + kept, TOTAL, kept, kept, 0, 1000, 10 * kept)


def rounds(**changes):
    """A record of a dense training of 10 steps, and rounds to 50 % and 75 %."""
    phases = (
        PhaseResult("start", 0, 1.0, 0),
        PhaseResult("round-0", 10, 1.0, 10, "ok", top1=90.0, counts=counts(62)),
        PhaseResult("round-1", 10, 0.5, 20, "ok", top1=80.0, counts=counts(31)),
        PhaseResult("round-2", 10, 0.25, 30, "ok", top1=70.0, counts=counts(16)),
    )
    fields = {
        "schema": 1,
        "suite": "tiny",
        "label": "ticket",
        "spec": spec(method="lottery_ticket", sparsity=0.75, budget=BudgetSpec(steps=10)),
        "status": "ok",
        "environment": Environment("cpu", 1, "", "", "", "", "", dirty=False),
        "times": Times(6.0, 0.6, 0.1, "", (0.0, 1.0, 3.0, 6.0)),
        "top1": 70.0,
        "counts": counts(16),
        "steps": 30,
        "multiple": 3.0,
        "phases": phases,
    }
    return Record(**fields | changes)


def files_of(folder, record, weights=None, masks=()):
    """A source on disk: its record, its finished network, masks of its phases."""
    store = Store(folder, "tiny")
    store.put(record)
    files = SourceFiles(
        store.path(record.spec), store.weights(record.spec), store.masks(record.spec)
    )
    if weights is not None:
        files.weights.parent.mkdir(parents=True)
        save_file(weights, files.weights)
    for name, mask in dict(masks).items():
        write_masks(files.masks / f"{name}.safetensors", mask)
    return files


BY_ROUND = {f"round-{r}": masks_of(kept, seed=r) for r, kept in enumerate((62, 31, 16))}


def test_a_source_of_rounds_gives_the_masks_and_the_cost_of_the_round_that_landed(tmp_path):
    files = files_of(tmp_path, rounds(), masks=BY_ROUND)
    for sparsity, name, cost in ((0.0, "round-0", 1), (0.5, "round-1", 2), (0.75, "round-2", 3)):
        source, multiple, length = load(files, sparsity, ONES)
        assert same(source.masks, BY_ROUND[name])
        assert multiple == pytest.approx(cost)
        assert length == rounds().spec.budget


def test_an_ordinary_source_gives_the_zeros_of_its_finished_network(tmp_path):
    record = rounds(phases=(PhaseResult("train", 30, 0.25, 30),), multiple=1.2)
    mask = masks_of(16)
    weights = {n: -0.5 * m for n, m in mask.items()} | {"fc.bias": torch.ones(5)}
    source, multiple, _ = load(files_of(tmp_path, record, weights), 0.75, ONES)
    assert same(source.masks, mask)
    assert multiple == 1.2


def test_the_last_round_can_be_had_from_the_finished_network_the_others_cannot(tmp_path):
    last = BY_ROUND["round-2"]
    files = files_of(tmp_path, rounds(), weights={n: 0.5 * m for n, m in last.items()})
    assert same(load(files, 0.75, ONES)[0].masks, last)
    with pytest.raises(SourceMissing, match=r"round-1\.safetensors.*Move its record .*\.json away"):
        load(files, 0.5, ONES)


def test_a_source_that_diverged_later_still_gives_the_rounds_it_had(tmp_path):
    stopped = rounds(status="diverged", reason="the loss is nan", counts=None, top1=None, steps=20)
    stopped = dataclasses.replace(stopped, phases=stopped.phases[:3], multiple=2.0)
    files = files_of(tmp_path, stopped, masks=BY_ROUND)
    source, multiple, _ = load(files, 0.5, ONES)
    assert same(source.masks, BY_ROUND["round-1"])
    assert multiple == 2.0
    with pytest.raises(SourceMissing, match=r"is diverged: the loss is nan$"):
        load(files, 0.75, ONES)


def test_a_round_that_went_wrong_is_no_source(tmp_path):
    guess = dataclasses.replace(rounds().phases[2], status="diverged", reason="it guesses")
    phases = (*rounds().phases[:2], guess, rounds().phases[3])
    files = files_of(tmp_path, rounds(phases=phases), masks=BY_ROUND)
    with pytest.raises(SourceMissing, match=r"is diverged: it guesses$"):
        load(files, 0.5, ONES)
    assert same(load(files, 0.75, ONES)[0].masks, BY_ROUND["round-2"])


def test_a_source_without_a_record_is_named(tmp_path):
    place = tmp_path / "rigl-x.json"
    with pytest.raises(SourceMissing, match=r"the source rigl-x has no record\."):
        load(SourceFiles(place, tmp_path / "weights", tmp_path / "masks"), 0.5, ONES)


@pytest.mark.parametrize("what", ["nothing", "garbage", "another network"])
def test_a_source_whose_network_is_not_here_says_what_to_do(what, tmp_path):
    record = rounds(phases=(PhaseResult("train", 30, 0.25, 30),))
    weights = {"other": torch.ones(3)} if what == "another network" else None
    files = files_of(tmp_path, record, weights)
    if what == "garbage":
        files.weights.parent.mkdir()
        files.weights.write_bytes(b"garbage")
    message = rf"{files.weights.name}: the source's network is not here .* {files.record.name} away"
    with pytest.raises(SourceMissing, match=message):
        load(files, 0.75, ONES)


def test_damaged_masks_say_so(tmp_path):
    files = files_of(tmp_path, rounds(), masks=BY_ROUND)
    (files.masks / "round-1.safetensors").write_bytes(b"garbage")
    with pytest.raises(SourceMissing, match="the source's network is not here"):
        load(files, 0.5, ONES)


def test_a_record_cut_to_a_round_is_that_of_a_cell_that_ended_there():
    record = rounds()
    cut = landed(record, 0.5)
    assert (cut.status, cut.top1, cut.counts, cut.steps) == ("ok", 80.0, counts(31), 20)
    assert cut.multiple == pytest.approx(2.0)
    assert cut.times.train_seconds == 3.0
    assert landed(record, 0.0).top1 == 90.0
    # The last round is the cell itself.
    last = landed(record, 0.75)
    assert (last.top1, last.steps, last.multiple) == (70.0, 30, 3.0)
    assert last.times.train_seconds == record.times.train_seconds


def test_a_record_that_never_landed_there_has_no_figures():
    cut = landed(rounds(status="diverged", reason="why"), 0.9)
    assert (cut.status, cut.reason) == ("diverged", "why")
    assert (cut.top1, cut.top5, cut.test_loss, cut.counts) == (None, None, None, None)
