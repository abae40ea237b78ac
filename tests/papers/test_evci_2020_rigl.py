"""Evci et al., 2020, arXiv:1911.11134: drop by magnitude, grow by gradient.

The update itself is worked by hand in `tests/methods/test_drop_grow.py`; here it is looked at in
real runs, with when it acts and how much.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from bench.errors import SuiteError
from bench.resolve import make_method
from methods.allocation import allocate, keep_count
from methods.api import Budget, Phase
from methods.masking import GROWN
from methods.rigl import RigL
from tests.tiny import (
    TINY_RECIPE,
    FakeRun,
    copied,
    hand_state,
    nonzero,
    tiny_trainer,
    train,
    watch_updates,
)


def watch_gradients(trainer):
    """A list that fills with the gradients that the method asks for."""
    log = []
    plain = trainer.gradients

    def gradients(batches=1, *, augmented=True):
        found = plain(batches, augmented=augmented)
        log.append(copied(found))
        return found

    trainer.gradients = gradients
    return log


@pytest.mark.parametrize(
    ("step", "fraction"),
    [
        # T_end = 0.75 * 1000: 0.15 (1 + cos(pi t / 750))
        (0, 0.3),
        (250, 0.225),
        (375, 0.15),
        (500, 0.075),
        (750, 0.0),
        (900, 0.0),
    ],
)
def test_the_dropped_fraction_falls_along_a_cosine_to_the_end_of_updates(step, fraction):
    run = FakeRun(hand_state({"w": [1.0]}), step=step)
    assert RigL().fraction(run) == pytest.approx(fraction, abs=1e-12)


def test_the_number_dropped_is_rounded_down():
    # 100 active weights of 200, at f = 0.15 (1 + cos(pi t / 750)):
    # t = 300: 0.15 * 1.309017 = 0.19635: 19; t = 700: 0.15 * 0.021852 = 0.0033: none.
    weight = torch.cat([torch.arange(1, 101.0), torch.zeros(100)])
    mask = torch.cat([torch.ones(100), torch.zeros(100)])
    for step, count in ((0, 30), (300, 19), (375, 15), (700, 0)):
        # The gradient is large where the mask is 0: all that is dropped moves there.
        state = hand_state({"w": weight}, {"w": mask})
        run = FakeRun(state, step=step, dense_gradients={"w": 1 - mask})
        with torch.no_grad():
            RigL().update(run)
        assert int(state.masks["w"][:100].sum()) == 100 - count
        assert state.masks["w"][:count].sum() == 0
        assert state.masks["w"][100 : 100 + count].sum() == count
        assert int(state.masks["w"].sum()) == 100


def test_updates_come_every_hundred_steps_until_three_quarters_of_the_budget():
    (phase,) = RigL().plan(Budget(97_656, 390, 50_000), 0.1)  # 250 epochs of Evci et al.
    due = [step for step in range(97_656) if phase.updates.due(step)]
    assert due == list(range(100, 73_242, 100))
    assert phase.density == 0.1


def test_a_short_budget_updates_more_often():
    # 200 steps: updates until 150, every min(100, 150 // 20) = 7 steps.
    (phase,) = RigL().plan(Budget(200, 10, 320), 0.1)
    assert [step for step in range(200) if phase.updates.due(step)] == list(range(7, 150, 7))


@pytest.mark.parametrize("scope", ["uniform", "erk"])
@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_each_layer_keeps_its_number_of_non_zeros_in_every_step(density, model, scope):
    trainer = tiny_trainer(RigL(scope=scope), model=model, density=density)
    shapes = {name: tuple(mask.shape) for name, mask in trainer.state.masks.items()}
    expected = allocate(shapes, density, scope)
    for _ in trainer.run():
        assert nonzero(trainer.state.masks) == expected
        for name, weight in trainer.state.weights.items():
            assert torch.equal(weight != 0, trainer.state.masks[name] != 0)
    total = sum(mask.numel() for mask in trainer.state.masks.values())
    assert sum(expected.values()) == keep_count(total, density)


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_in_a_real_run_the_smallest_are_dropped_and_the_largest_gradients_grown(model):
    trainer = tiny_trainer("rigl", model=model, density=0.2, steps=40)
    log, gradients = watch_updates(trainer), watch_gradients(trainer)
    train(trainer)
    assert len(log) == len(gradients)
    grown_in_all = regrown_in_all = 0
    for update, dense in zip(log, gradients, strict=True):
        fraction = 0.15 * (1 + math.cos(math.pi * update.step / 30))
        for name in update.masks:
            weight, gradient = (
                tensor.numpy().reshape(-1) for tensor in (update.old_weights[name], dense[name])
            )
            old, new = (
                mask[name].numpy().reshape(-1) == 1 for mask in (update.old_masks, update.masks)
            )
            count = int(fraction * old.sum())
            active = np.flatnonzero(old)
            order = active[np.argsort(np.abs(weight[active]), kind="stable")]
            kept = np.zeros_like(old)
            kept[order[count:]] = True
            free = np.flatnonzero(~kept)
            grown = free[np.argsort(-np.abs(gradient[free]), kind="stable")[:count]]
            expected = kept.copy()
            expected[grown] = True
            np.testing.assert_array_equal(new, expected)
            # What stayed or came back keeps its value; what is new is zero, as far as it counts.
            after = update.weights[name].numpy().reshape(-1)
            values = np.where(expected & old, weight, np.where(expected, np.float32(GROWN), 0))
            np.testing.assert_array_equal(after, values)
            momentum = update.memory[name]["momentum_buffer"].numpy().reshape(-1)
            assert not momentum[~(expected & old)].any()
            assert not (expected & old).any() or momentum[expected & old].any()
            grown_in_all += int((new & ~old).sum())
            regrown_in_all += int(old[grown].sum())
    assert grown_in_all > 50
    assert regrown_in_all > 5


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_the_gradient_is_dense_and_that_of_the_sparse_network(model):
    trainer = tiny_trainer("rigl", model=model)
    seen = []
    batches = trainer.batches

    def watched(count, *, augmented=True):
        for images, labels in batches(count, augmented=augmented):
            seen.append((images, labels, copy.deepcopy(trainer.state.model)))
            yield images, labels

    trainer.batches = watched
    gradients = watch_gradients(trainer)
    train(trainer)
    assert len(seen) == len(gradients) > 10
    for (images, labels, network), found in list(zip(seen, gradients, strict=True))[::5]:
        network.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        for name, gradient in found.items():
            weight = network.get_parameter(name)
            torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-7)
            assert gradient[weight == 0].any()


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("steps", [24, 40])
def test_extra_batches_are_metered_once_for_each_update(steps, batches):
    trainer = train(tiny_trainer(RigL(batches=batches), steps=steps))
    updates = len(range(1, round(0.75 * steps)))
    assert trainer.plan[0].updates.count(steps) == updates
    assert trainer.cursor.extra_batches == batches * updates
    assert trainer.cursor.total == steps


def test_several_batches_are_averaged():
    trainer = tiny_trainer(RigL(batches=2))
    single = []
    plain = trainer.loss

    def watched(images, labels):
        single.append((images, labels))
        return plain(images, labels)

    trainer.loss = watched
    with torch.no_grad():
        both = trainer.gradients(2)
    assert not torch.equal(single[0][0], single[1][0])
    for name, gradient in both.items():
        weight = trainer.state.weights[name]
        parts = []
        for images, labels in single:
            loss = functional.cross_entropy(trainer.state.model(images), labels)
            parts.append(torch.autograd.grad(loss, weight)[0])
        torch.testing.assert_close(gradient, (parts[0] + parts[1]) / 2)


def test_the_growth_batch_is_augmented_as_in_training():
    run = FakeRun(hand_state({"w": [1.0, 2]}), dense_gradients={"w": torch.ones(2)})
    with torch.no_grad():
        RigL(batches=4).update(run)
    assert run.asked == [(4, True)]


def test_the_growth_batch_leaves_running_statistics_and_training_order_alone():
    trainer = train(tiny_trainer("rigl", model="conv"))
    assert int(trainer.state.model.norm1.num_batches_tracked) == 24
    assert trainer.cursor.position == 24


def test_masks_are_random_at_first_and_follow_the_seed():
    masks = []
    for seed in (0, 0, 1):
        trainer = tiny_trainer("rigl", seed=seed)
        next(trainer.run())  # no update before step 1
        masks.append(copied(trainer.state.masks))
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    assert any(not torch.equal(mask, masks[2][name]) for name, mask in masks[0].items())


def test_there_is_no_update_at_step_zero_nor_from_the_end_on():
    trainer = tiny_trainer("rigl", steps=40)
    log = watch_updates(trainer)
    fixed = {}
    for step in trainer.run():
        if step >= 30:
            fixed = fixed or copied(trainer.state.masks)
            assert all(torch.equal(trainer.state.masks[name], mask) for name, mask in fixed.items())
    assert [update.step for update in log] == list(range(1, 30))


def test_if_asked_the_random_mask_is_rewired_before_step_zero():
    # 40 steps: updates below 30, every max(1, 30 // 20) = 1; the first drops 0.3 of each layer.
    trainer = tiny_trainer(RigL(from_start=True), steps=40)
    log, gradients = watch_updates(trainer), watch_gradients(trainer)
    train(trainer)
    assert [update.step for update in log] == list(range(30))
    assert trainer.cursor.extra_batches == 30
    for name, mask in log[0].masks.items():
        old, weight = log[0].old_masks[name] != 0, log[0].old_weights[name].abs()
        count = int(0.3 * int(old.sum()))
        kept = old & (weight > weight[old].sort().values[count - 1])
        assert (mask[kept] == 1).all()
        gradient, grown = gradients[0][name].abs(), (mask != 0) & ~kept
        assert int(grown.sum()) == count
        assert gradient[grown].min() >= gradient[mask == 0].max()
    # 250 epochs of Evci et al.: the published code's first updates.
    (phase,) = RigL(from_start=True).plan(Budget(97_656, 390, 50_000), 0.1)
    assert [step for step in range(250) if phase.updates.due(step)] == [0, 100, 200]


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_with_adam_grown_weights_begin_without_either_moment(optimizer):
    recipe = dataclasses.replace(
        TINY_RECIPE, optimizer=optimizer, lr=1e-3, momentum=0.0, nesterov=False
    )
    trainer = tiny_trainer("rigl", recipe=recipe)
    log = watch_updates(trainer)
    train(trainer)
    grown = 0
    for update in log:
        for name, mask in update.masks.items():
            new = (mask == 1) & (update.old_masks[name] == 0)
            for key in ("exp_avg", "exp_avg_sq"):
                assert not update.memory[name][key][new | (mask == 0)].any()
            assert int(update.memory[name]["step"]) == update.step
            grown += int(new.sum())
    assert grown > 50


@pytest.mark.parametrize(
    "options", [{"drop_fraction": 1.0}, {"stop": 1.1}, {"every": 0}, {"batches": 0}]
)
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(SuiteError, match="lies outside"):
        make_method("rigl", options, "here")


def test_the_defaults_are_the_papers():
    method = RigL()
    assert (method.every, method.stop, method.drop_fraction) == (100, 0.75, 0.3)
    assert (method.scope, method.batches) == ("erk", 1)
    assert isinstance(method.plan(Budget(100, 10, 320), 0.1)[0], Phase)
