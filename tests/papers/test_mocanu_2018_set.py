"""Mocanu et al., 2018, arXiv:1707.04780: drop the weights closest to zero, grow at random."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from methods.allocation import allocate, keep_count
from methods.api import Budget
from methods.masking import GROWN
from methods.sparse_evolution import SET
from tests.tiny import (
    TINY_RECIPE,
    FakeRun,
    copied,
    hand_state,
    momentum_of,
    nonzero,
    tiny_trainer,
    train,
    watch_updates,
)

# index      0    1    2    3    4    5    6    7    8    9   10   11
# weight    .1   .2   .3   .4   .5  -.6  -.7  -.8  -.9 -1.0    0    0
# Ten active weights, the positive ones smaller throughout.
WEIGHT = [0.1, 0.2, 0.3, 0.4, 0.5, -0.6, -0.7, -0.8, -0.9, -1.0, 0, 0]
MASK = [1.0] * 10 + [0, 0]


def drops(method: SET, weight=WEIGHT, mask=MASK) -> list[int]:
    run = FakeRun(hand_state({"w": weight}, {"w": mask}))
    return method.dropped(run, "w").nonzero().flatten().tolist()


def test_without_regard_to_sign_the_smallest_magnitudes_are_dropped():
    assert drops(SET(drop_fraction=0.4)) == [0, 1, 2, 3]


def test_per_sign_the_same_fraction_of_each_sign_is_dropped():
    # int(0.4 * 5) = 2 of the positive, 2 of the negative weights, each closest to zero.
    assert drops(SET(per_sign=True, drop_fraction=0.4)) == [0, 1, 5, 6]


def test_per_sign_each_count_is_rounded_down_by_itself():
    # Three positive, five negative: int(0.5 * 3) = 1 and int(0.5 * 5) = 2. Together int(4) = 4.
    weight = [0.3, 0.2, 0.1, -0.4, -0.5, -0.6, -0.7, -0.8]
    mask = [1.0] * 8
    assert drops(SET(per_sign=True, drop_fraction=0.5), weight, mask) == [2, 3, 4]
    assert drops(SET(drop_fraction=0.5), weight, mask) == [0, 1, 2, 3]


def test_per_sign_a_layer_of_one_sign_loses_its_fraction_of_that():
    weight, mask = [3.0, 1, 2, 4, 0], [1.0, 1, 1, 1, 0]
    assert drops(SET(per_sign=True, drop_fraction=0.5), weight, mask) == [1, 2]


@pytest.mark.parametrize("method", [SET(drop_fraction=0.4), SET(per_sign=True, drop_fraction=0.4)])
def test_an_update_drops_grows_and_keeps_as_worked_by_hand(method):
    # Kept without regard to sign: 4 to 9; per sign: 2, 3, 4, 7, 8, 9. Four of the other six
    # positions become active: dropped ones among them come back with their old value, those that
    # were pruned before (10, 11) start at GROWN with no momentum.
    kept = {2, 3, 4, 7, 8, 9} if method.per_sign else {4, 5, 6, 7, 8, 9}
    momentum = list(range(1, 13))
    chosen = set()
    for seed in range(40):
        state = hand_state({"w": WEIGHT}, {"w": MASK}, {"w": momentum})
        run = FakeRun(state, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            method.update(run)
        mask = state.masks["w"].tolist()
        active = {index for index, one in enumerate(mask) if one}
        assert len(active) == 10
        assert kept <= active
        chosen |= active - kept
        for index in range(12):
            old = index < 10
            value = (WEIGHT[index] if old else GROWN) if mask[index] else 0.0
            assert state.weights["w"][index].item() == pytest.approx(value, rel=1e-6)
            memory = momentum[index] if mask[index] and old else 0
            assert momentum_of(state, "w")[index].item() == memory
    assert chosen == set(range(12)) - kept  # every free position has its turn


def test_positions_to_grow_are_equally_likely():
    # One of ten active weights is dropped and one of eleven free positions grown (the dropped one
    # included), 1100 times: 100 each, deviation 9.5.
    weight = [1.0, *[2.0] * 9, *[0.0] * 10]
    mask = [1.0] * 10 + [0.0] * 10
    counts = torch.zeros(20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1100):
        state = hand_state({"w": weight}, {"w": mask})
        with torch.no_grad():
            SET(drop_fraction=0.1).update(FakeRun(state, generator=generator))
        counts += state.masks["w"]
    assert counts[1:10].tolist() == [1100] * 9
    grown = torch.cat([counts[:1], counts[10:]])
    assert float(grown.sum()) == 1100
    assert float((grown - 100).abs().max()) < 40


@pytest.mark.parametrize("per_sign", [False, True])
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_each_layer_keeps_its_number_of_non_zeros_in_every_step(model, per_sign):
    trainer = tiny_trainer(SET(per_sign=per_sign), model=model, steps=40)
    log = watch_updates(trainer)
    shapes = {name: tuple(mask.shape) for name, mask in trainer.state.masks.items()}
    expected = allocate(shapes, 0.1, "erk")
    for _ in trainer.run():
        assert nonzero(trainer.state.masks) == expected
        assert nonzero(trainer.state.weights) == expected
        for name, weight in trainer.state.weights.items():
            assert not weight.detach()[trainer.state.masks[name] == 0].any()
    # 30 steps of updates, spaced by max(1, 30 // 20) = 1, from 1 on, while below 30.
    assert [update.step for update in log] == list(range(1, 30))
    for update in log:
        assert any(not torch.equal(update.old_masks[name], update.masks[name]) for name in shapes)
    assert trainer.cursor.extra_batches == 0


@pytest.mark.parametrize("per_sign", [False, True])
def test_in_a_real_run_what_is_dropped_is_the_smallest_and_balanced_by_sign(per_sign):
    trainer = tiny_trainer(SET(per_sign=per_sign), steps=40)
    log = watch_updates(trainer)
    train(trainer)
    checked = 0
    for update in log:
        for name in update.masks:
            flat, after = (
                w[name].numpy().reshape(-1) for w in (update.old_weights, update.weights)
            )
            old, now = (m[name].numpy().reshape(-1) != 0 for m in (update.old_masks, update.masks))
            groups = [old & (flat > 0), old & (flat < 0)] if per_sign else [old]
            droppable = np.zeros_like(old)
            for group in groups:
                count = int(0.3 * group.sum())
                order = np.argsort(np.abs(flat[group]), kind="stable")
                droppable[np.flatnonzero(group)[order[:count]]] = True
            # Nothing else was lost; what was grown is new or was just dropped.
            assert not (old & ~now & ~droppable).any()
            assert (now & ~old).sum() == (old & ~now).sum()
            np.testing.assert_array_equal(after[old & now], flat[old & now])
            assert (after[now & ~old] == np.float32(GROWN)).all()
            checked += int((old & ~now).sum())
    assert checked > 1000


def test_er_masks_have_epsilon_times_the_sum_of_units():
    # Units 784 + 24 + 12 = 820. 5% of 12,448 is 622.4: 622 = 820 epsilon, epsilon = 0.75854:
    # 594.69, 18.20, 9.10; floors 594 + 18 + 9 = 621, and fc1's remainder is the largest.
    trainer = train(tiny_trainer(SET(scope="er"), density=0.05))
    expected = {"fc1.weight": 595, "fc2.weight": 18, "classifier.weight": 9}
    assert nonzero(trainer.state.weights) == expected


def test_if_asked_it_rewires_after_each_epoch_however_few_there_are():
    # 3 epochs of 50 steps; `every` would be 150 // 20 = 7. With stop = 0.75 updates end at 112.
    for stop, steps in ((1.0, [50, 100]), (0.75, [50, 100]), (0.5, [50])):
        (phase,) = SET(epochs=True, stop=stop).plan(Budget(150, 50, 3200), 0.1)
        assert [step for step in range(150) if phase.updates.due(step)] == steps
    trainer = tiny_trainer(SET(epochs=True), steps=40)  # 16 steps an epoch, until 30
    log = watch_updates(trainer)
    train(trainer)
    assert [update.step for update in log] == [16]


def test_if_asked_grown_weights_are_a_tenth_of_a_normal_number():
    # 300 of 1000 go, and 300 of the 10,300 free grow; about 300 * 300 / 10,300 = 9 of them back.
    weight = torch.cat([torch.arange(1, 1001.0), torch.zeros(10_000)])
    old = (weight != 0).float()
    state = hand_state({"w": weight}, {"w": old}, {"w": torch.ones(11_000)})
    with torch.no_grad():
        SET(grown="normal").update(FakeRun(state))
    mask, values = state.masks["w"], state.weights["w"].detach()
    new = (mask == 1) & (old == 0)
    stayed = (mask == 1) & (old == 1)
    assert int(mask.sum()) == 1000
    assert 270 < int(new.sum()) < 300
    assert torch.equal(values[stayed], weight[stayed])
    assert not values[mask == 0].any()
    # Mean and deviation of 290 numbers, four of their own deviations wide: 0.1 / sqrt(290) = 0.006.
    assert abs(float(values[new].mean())) < 0.024
    assert float(values[new].std()) == pytest.approx(0.1, abs=0.017)
    assert not momentum_of(state, "w")[new].any()


def test_masks_are_fixed_after_stop():
    trainer = tiny_trainer(SET(stop=0.5), steps=40)
    fixed = {}
    for step in trainer.run():
        if step >= 21:  # updates come before steps 1 to 19, counted from 0
            fixed = fixed or copied(trainer.state.masks)
            assert all(torch.equal(trainer.state.masks[name], mask) for name, mask in fixed.items())
    assert fixed


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_grown_weights_begin_without_memory(optimizer):
    momentum = {"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {}
    plain = dataclasses.replace(TINY_RECIPE, lr=0.01, momentum=0.0, nesterov=False)
    recipe = dataclasses.replace(plain, optimizer=optimizer, **momentum)
    keys = ["momentum_buffer"] if optimizer == "sgd" else ["exp_avg", "exp_avg_sq"]
    trainer = tiny_trainer("set", recipe=recipe)
    log = watch_updates(trainer)
    train(trainer)
    grown = 0
    for update in log:
        for name, mask in update.masks.items():
            new = (mask == 1) & (update.old_masks[name] == 0)
            assert bool((update.weights[name][new] == GROWN).all())
            assert not any(update.memory[name][key][new].any() for key in keys)
            grown += int(new.sum())
    assert grown > 100
    assert sum(nonzero(trainer.state.weights).values()) == keep_count(12_448, 0.1)


def test_seeds_decide_where_it_grows():
    masks = []
    for seed in (0, 0, 1):
        trainer = train(tiny_trainer("set", seed=seed))
        masks.append(copied(trainer.state.masks))
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    assert any(not torch.equal(mask, masks[2][name]) for name, mask in masks[0].items())
