"""What the record says about how masks change."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bench import checkpoint
from bench.dynamics import Dynamics, compared
from bench.record import MaskUpdate, decode, encode
from bench.store import Store
from methods.api import Cadence, Phase, SparsityMethod
from methods.dpf import DPF
from tests.bench.cells import train, train_one, write_recipe, write_suite
from tests.tiny import TINY_RECIPE, copied, hand_state, tiny_trainer, watch_updates
from tests.tiny import train as train_to_end


@dataclass(frozen=True)
class Toggle(SparsityMethod):
    """Every third step flips one mask: of the weight that has the number of the update."""

    def plan(self, budget, density):
        return (Phase("train", budget.steps, updates=Cadence(3)),)

    def update(self, run):
        mask = run.state.masks["fc2.weight"].view(-1)
        index = run.step // 3 % 4
        mask[index] = 1 - mask[index]


def values(**tensors):
    return {name: torch.tensor(numbers) for name, numbers in tensors.items()}


def test_the_lost_part_of_the_weights_by_hand():
    # Lin et al.: ||w - m w||^2 / ||w||^2; 3-4-5.
    found = compared(values(w=[1.0, 1.0]), values(w=[0.0, 1.0]), values(w=[3.0, -4.0]), 7)
    assert found == MaskUpdate(step=7, density=0.5, flipped=0.5, iou=0.5, delta=9 / 25)
    kept = compared(values(w=[1.0, 1.0]), values(w=[1.0, 1.0]), values(w=[3.0, -4.0]), 7)
    assert kept == MaskUpdate(7, 1, 0, 1, 0)


def test_flips_and_overlap_by_hand_over_two_layers():
    # Kept before: a0 a1 b0 b1; after: a0 a2 b1. Three of six flip; two of five are common.
    found = compared(
        values(a=[[1.0, 1.0], [0.0, 0.0]], b=[1.0, 1.0]),
        values(a=[[1.0, 0.0], [1.0, 0.0]], b=[0.0, 1.0]),
        values(a=[[5.0, -1.0], [2.0, 1.0]], b=[1.0, 0.0]),
        3,
    )
    # Of 25 + 1 + 4 + 1 + 1 + 0 the squares of a1, a3 and b0 are lost.
    assert found == MaskUpdate(3, 0.5, 0.5, 0.4, 3 / 32)


def test_weights_of_zeros_have_lost_nothing():
    found = compared(values(w=[1.0, 1.0]), values(w=[0.0, 1.0]), values(w=[0.0, 0.0]), 0)
    assert found.delta == 0
    nothing = compared(values(w=[1.0]), values(w=[0.0]), values(w=[2.0]), 0)
    assert (nothing.density, nothing.iou, nothing.delta) == (0, 0, 1)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_have_no_figures(broken):
    assert compared(values(w=[1.0]), values(w=[1.0]), values(w=[broken]), 0) is None


def test_a_cell_whose_loss_is_gone_between_two_updates_has_a_record_that_can_be_read(tmp_path):
    # An update that keeps all does not look at the weights: the ramp's first level is a long one.
    recipe = write_recipe(tmp_path, "batch = 64\nlr = 1e4\nmomentum = 0.9\ndrops = [0.5, 0.75]")
    budget = "{ epochs = 20 }"
    path = write_suite(tmp_path, "[methods.dpf]\nevery = 2", recipe=recipe, budget=budget)
    record = train_one(path, tmp_path / "records")
    assert record.status == "diverged"
    assert record.mask_updates
    assert decode(encode(record), "") == record


def test_each_weight_has_the_step_of_its_last_change():
    trainer = train_to_end(tiny_trainer(Toggle(), steps=20))
    # Updates before the steps 1, 4, 7, 10, 13, 16, 19: the weights 0 1 2 3 0 1 2.
    changes = trainer.dynamics.last_change
    assert changes["fc2.weight"].view(-1)[:5].tolist() == [13, 16, 19, 10, 0]
    assert sum(int(change.count_nonzero()) for change in changes.values()) == 4
    assert [update.step for update in trainer.cursor.mask_updates] == list(range(0, 20, 3))
    flipped = float(f"{1 / 12_448:.6g}")
    assert {update.flipped for update in trainer.cursor.mask_updates} == {flipped}
    # 50 parts of 20 steps: step 10 begins at 9 / 20 = 22.5 / 50, and so on.
    histogram = trainer.dynamics.histogram(20)
    assert {part: count for part, count in enumerate(histogram) if count} == {
        22: 1,
        30: 1,
        37: 1,
        45: 1,
    }


def test_the_histogram_by_hand():
    state = hand_state({"v": [[0.0, 0.0], [0.0, 0.0]], "w": [0.0, 0.0]})
    dynamics = Dynamics([Phase("train", 100, updates=Cadence(1))], state)
    dynamics.last_change["v"].copy_(torch.tensor([[1, 2], [3, 100]]))
    dynamics.last_change["w"].copy_(torch.tensor([0, 51]))  # one never changed
    histogram = dynamics.histogram(100)
    assert len(histogram) == 50
    assert (histogram[0], histogram[1], histogram[25], histogram[49]) == (2, 1, 1, 1)
    assert sum(histogram) == 5


@pytest.mark.parametrize(
    ("updates", "every", "kept"), [(1, 1, 1), (200, 1, 200), (201, 2, 101), (1000, 5, 200)]
)
def test_at_most_200_updates_are_kept_but_every_change_counts(updates, every, kept):
    state = hand_state({"w": torch.arange(1, 1001.0)})
    dynamics = Dynamics([Phase("train", updates, updates=Cadence(1))], state)
    assert dynamics.every == every
    points = []
    for step in range(updates):
        with dynamics.watch(state, step, step, points):
            state.masks["w"][step] = 0
    assert [point.step for point in points] == list(range(0, updates, every))
    assert len(points) == kept
    changes = dynamics.last_change["w"].tolist()
    assert changes == [*range(1, updates + 1), *[0] * (1000 - updates)]


def test_updates_are_counted_over_all_phases():
    phases = [
        Phase("one", 150, updates=Cadence(1)),
        Phase("two", 100),
        Phase("three", 300, updates=Cadence(2, start=100)),
    ]
    assert Dynamics(phases, hand_state({"w": [1.0]})).every == 2  # 150 + 100


def test_the_figures_of_a_dpf_run_are_those_of_its_masks():
    recipe = dataclasses.replace(TINY_RECIPE, lr=0.2, drops=())
    trainer = tiny_trainer(DPF(every=4, end=1.0), density=0.2, steps=80, recipe=recipe)
    log = watch_updates(trainer)
    before_finish = {}
    for step in trainer.run():
        if step == 80:
            before_finish = copied(trainer.dynamics.last_change)
    found = trainer.cursor.mask_updates
    # The last ranking, in `finish`, is one more.
    assert [update.step for update in found] == [*(update.step for update in log), 80]
    assert found[-1].flipped > 0
    last = {name: np.zeros(mask.shape, int) for name, mask in trainer.state.masks.items()}
    for seen, update in zip(log, found[:-1], strict=True):
        old, new, weights = (
            np.concatenate([tensors[name].numpy().ravel() for name in seen.masks])
            for tensors in (seen.old_masks, seen.masks, seen.old_weights)
        )
        assert update.density == pytest.approx(new.mean(), rel=1e-5)
        assert update.flipped == pytest.approx((old != new).mean(), rel=1e-5)
        both, either = ((old + new) == 2).sum(), ((old + new) > 0).sum()
        assert update.iou == pytest.approx(both / either, rel=1e-5)
        lost = (weights.astype(float) ** 2)[new == 0].sum() / (weights.astype(float) ** 2).sum()
        assert update.delta == pytest.approx(lost, rel=1e-5)
        for name, mask in seen.masks.items():
            last[name][(mask != seen.old_masks[name]).numpy()] = seen.step + 1
    for name, change in before_finish.items():
        np.testing.assert_array_equal(change.numpy(), last[name])
    # It prunes while it trains.
    assert found[0].delta == 0 < found[-1].delta < 1


def test_the_record_holds_the_dynamics(tmp_path):
    methods = "[methods.dpf]\n[methods.dense]\n[methods.random]"
    records = tmp_path / "records"
    dpf, dense, random = train(write_suite(tmp_path, methods), records)
    assert [update.step for update in dpf.mask_updates] == [*range(0, 44, 2), 44]
    # The ramp ends at step 33 of 44: 0.1 + 0.9 / 33^3 of 50,200 weights are 5,021.
    assert dpf.mask_updates[16].density == float(f"{5021 / 50_200:.6g}")
    # The last ranking is that of the finished network.
    assert dpf.mask_updates[-1].density == 0.1
    assert len(dpf.last_changes) == 50
    # All but those that were never pruned have changed.
    assert 0.9 * 50_200 <= sum(dpf.last_changes) < 50_200
    parts = {part for part, count in enumerate(dpf.last_changes) if count}
    flips = [update.step for update in dpf.mask_updates if update.flipped]
    assert parts == {min(step * 50 // 44, 49) for step in flips}
    for still in (dense, random):
        assert (still.mask_updates, still.last_changes) == ((), ())
    kept = {record.label: record for record in Store(records, "tiny").records()}
    assert kept["dpf"].mask_updates == dpf.mask_updates
    assert kept["dpf"].last_changes == dpf.last_changes


@pytest.mark.parametrize("cut", [1, 4, 11, 39, 42])
def test_a_resumed_run_has_the_same_dynamics(cut, tmp_path):
    method = DPF(every=2, finetune=0.25)
    whole = tiny_trainer(method, model="conv", density=0.3, steps=40)
    for step in whole.run():
        if step == cut:
            checkpoint.write(whole, tmp_path / "cut", "0123456789ab")
    resumed = tiny_trainer(method, model="conv", density=0.3, steps=40)
    checkpoint.read(resumed, tmp_path / "cut", "0123456789ab")
    train_to_end(resumed)
    # Nothing changed after fine-tuning had begun with its own ranking.
    assert [update.step for update in whole.cursor.mask_updates] == [*range(0, 40, 2), 40]
    assert resumed.cursor.mask_updates == whole.cursor.mask_updates
    assert resumed.cursor.updates == whole.cursor.updates == 20
    for name, change in whole.dynamics.last_change.items():
        assert torch.equal(resumed.dynamics.last_change[name], change)
        assert change.any()
    assert resumed.dynamics.histogram(30) == whole.dynamics.histogram(30)


def test_watching_changes_nothing_but_the_clock(tmp_path):
    record = train_one(write_suite(tmp_path, "[methods.dpf]\nevery = 1"), tmp_path / "records")
    assert len(record.mask_updates) == 45  # with the last ranking
    assert record.times.eval_seconds > 0
