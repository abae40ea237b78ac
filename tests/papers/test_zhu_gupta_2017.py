"""Zhu & Gupta, 2017, arXiv:1710.01878: prune along a cubic ramp while training."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bench.errors import SuiteError
from bench.resolve import make_method
from methods.allocation import keep_count
from methods.api import Budget
from methods.gradual import GradualMagnitude
from methods.schedules import cubic_density
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


@pytest.mark.parametrize(
    ("step", "nonzeros"),
    [
        # 10,000 weights to 1,000 over 800 steps: 10,000 (1 - 0.9 (1 - (1 - t/800)^3))
        (0, 10_000),
        (80, 7_561),  # sparsity 0.2439
        (200, 4_797),  # 0.5203125: 4796.875
        (400, 2_125),  # 0.7875
        (600, 1_141),  # 0.8859375: 1140.625
        (800, 1_000),
    ],
)
def test_the_masks_follow_the_cubic_ramp(step, nonzeros):
    method = GradualMagnitude(every=40, end=0.8)
    budget = Budget(1000, 100, 3200)
    (phase,) = method.plan(budget, 0.1)
    assert phase.updates.due(step)
    state = hand_state({"w": torch.arange(1, 10_001.0)})
    method.update(FakeRun(state, budget=budget, phase=phase, step=step))
    assert nonzero(state.masks) == {"w": nonzeros}
    assert bool(state.masks["w"][-nonzeros:].all())  # the largest


@pytest.mark.parametrize(
    ("drops", "steps", "last"),
    [
        ((0.5, 0.75), 40_000, 30_000),  # 225 of 300 epochs
        ((0.3, 0.6, 0.8), 40_000, 24_000),  # 120 of 200 epochs
        ((), 40_000, 30_000),
        ((0.5, 0.75), 24, 18),
        ((0.5, 0.75), 2, 1),
        ((0.5, 0.75), 1, 0),
    ],
)
def test_the_last_prune_comes_at_the_second_drop_of_the_learning_rate(drops, steps, last):
    (phase,) = GradualMagnitude().plan(Budget(steps, 10, 320, drops), 0.1)
    assert [step for step in range(steps) if phase.updates.due(step)][-1] == last


def test_the_end_can_be_set():
    (phase,) = GradualMagnitude(begin=0.1, end=0.5).plan(Budget(4000, 10, 320), 0.1)
    due = [step for step in range(4000) if phase.updates.due(step)]
    assert (due[0], due[-1]) == (400, 2000)
    assert len(due) == 21  # every 80 steps: at most a twentieth of the ramp


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("density", [0.02, 0.1])
def test_masks_only_lose_weights_and_land_on_the_target_exactly(density, model, scope):
    trainer = tiny_trainer(GradualMagnitude(scope=scope), model=model, density=density, steps=40)
    total = sum(mask.numel() for mask in trainer.state.masks.values())
    before = copied(trainer.state.masks)
    path = []
    for step in trainer.run():
        masks = copied(trainer.state.masks)
        for name, mask in masks.items():
            assert bool((mask <= before[name]).all())
            assert torch.equal(trainer.state.weights[name] != 0, mask != 0)
        count = sum(nonzero(masks).values())
        # Before step t the ramp of 30 steps was at t - 1, counted from 0.
        assert count == keep_count(total, cubic_density(step - 1, 0, 30, density))
        path.append(count)
        before = masks
    assert path[0] == total
    assert path[20] > path[30] == keep_count(total, density) == path[-1]
    assert trainer.cursor.extra_batches == 0


def test_each_prune_removes_the_smallest_of_what_is_left():
    def flat(tensors):
        return np.concatenate([tensors[name].numpy().reshape(-1) for name in tensors])

    trainer = tiny_trainer("gradual", steps=40)
    log = watch_updates(trainer)
    train(trainer)
    removed = []
    for update in log:
        size, old, new = (
            np.abs(flat(update.old_weights)),
            flat(update.old_masks),
            flat(update.masks),
        )
        pruned = size[(old == 1) & (new == 0)]
        removed.append(pruned.size)
        assert not pruned.size or pruned.max() <= size[new == 1].min()
    # The first is at density 1, and the last has 0.9 / 30^3 of 12,448 to remove: not one weight.
    assert len(removed) == 31
    assert [index for index, count in enumerate(removed) if count == 0] == [0, 30]
    assert sum(removed) == 12_448 - 1_245


def test_uniform_scope_prunes_every_layer_alike():
    trainer = train(tiny_trainer(GradualMagnitude(scope="uniform"), density=0.25))
    expected = {"fc1.weight": 3072, "fc2.weight": 32, "classifier.weight": 8}
    assert nonzero(trainer.state.masks) == expected


def test_a_pruned_weight_has_no_momentum_when_it_is_pruned():
    trainer = tiny_trainer("gradual")
    log = watch_updates(trainer)
    train(trainer)
    for update in log[1:]:  # before the first step there is no momentum
        for name, mask in update.masks.items():
            momentum = update.memory[name]["momentum_buffer"]
            assert not momentum[mask == 0].any()
            assert momentum[mask == 1].any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_pruned_weights_stay_zero_under_momentum_and_weight_decay(weight_decay):
    recipe = dataclasses.replace(TINY_RECIPE, weight_decay=weight_decay)
    trainer = tiny_trainer(GradualMagnitude(), model="conv", recipe=recipe)
    for _ in trainer.run():
        for name, weight in trainer.state.weights.items():
            assert not weight.detach()[trainer.state.masks[name] == 0].any()


def test_a_ramp_that_ends_before_it_begins_is_refused():
    method = GradualMagnitude(begin=0.5, end=0.4)
    with pytest.raises(ValueError, match="the ramp ends at step 40, but begins at step 50"):
        method.plan(Budget(100, 10, 320), 0.1)


@pytest.mark.parametrize("options", [{"begin": 1.0}, {"end": 0.0}, {"end": 1.5}, {"every": 0}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(SuiteError, match="lies outside"):
        make_method("gradual", options, "here")


def test_a_ramp_to_the_end_of_training_leaves_a_step_to_train():
    trainer = train(tiny_trainer(GradualMagnitude(end=1.0)))
    assert sum(nonzero(trainer.state.weights).values()) == 1245


def test_the_forward_pass_after_a_prune_sees_the_pruned_network():
    trainer = tiny_trainer("gradual", steps=24)
    seen = []

    def look(*_):
        pairs = zip(trainer.state.weights.values(), trainer.state.masks.values(), strict=True)
        seen.append(all(bool((weight[mask == 0] == 0).all()) for weight, mask in pairs))

    trainer.state.model.register_forward_pre_hook(look)
    train(trainer)
    assert len(seen) == 24
    assert all(seen)


# Fine-tuning (Lin et al., 2020, report gradual pruning with and without it).


def test_finetuning_comes_on_top_and_costs_a_fifth():
    budget = Budget(300, 10, 320, (0.5, 0.75))
    (alone,) = GradualMagnitude().plan(budget, 0.1)
    train_phase, finetune = GradualMagnitude(finetune=0.2).plan(budget, 0.1)
    assert train_phase == alone
    assert (finetune.name, finetune.steps, finetune.updates) == ("finetune", 60, None)
    assert finetune.density is None
    assert train_phase.steps + finetune.steps == 1.2 * budget.steps


def test_finetuning_trains_the_masks_of_the_ramp_with_a_rate_of_its_own():
    trainer = tiny_trainer(GradualMagnitude(finetune=0.5, finetune_lr=0.2), model="conv", steps=40)
    rates, masks, before = [], {}, {}
    for step in trainer.run():
        if step == 40:
            masks, before = copied(trainer.state.masks), copied(trainer.state.weights)
        if step == 41:
            # Nesterov from a memory of zero: the buffer is g + decay w, the step 1.9 times it.
            for name, weight in trainer.state.weights.items():
                buffer = trainer.state.optimizer.state[weight]["momentum_buffer"]
                moved = (before[name] - 0.2 * 0.05 * 1.9 * buffer) * masks[name]
                torch.testing.assert_close(weight.detach(), moved, rtol=0, atol=1e-7)
                assert not torch.equal(weight.detach(), before[name])
        if step > 40:
            rates.append(float(trainer.state.lr))
            for name, weight in trainer.state.weights.items():
                assert torch.equal(trainer.state.masks[name], masks[name])
                assert torch.equal(weight != 0, masks[name] != 0)
    expected = 0.05 * 0.2 * (1 + np.cos(np.pi * np.arange(20) / 20)) / 2
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert sum(nonzero(masks).values()) == keep_count(1432, 0.1)


def test_the_run_before_finetuning_is_the_run_without_it():
    weights = {}
    trainer = tiny_trainer(GradualMagnitude(finetune=0.2), model="conv", steps=40)
    for step in trainer.run():
        if step == 40:
            weights = copied(trainer.state.weights)
    alone = train(tiny_trainer("gradual", model="conv", steps=40))
    assert all(torch.equal(weights[n], weight) for n, weight in alone.state.weights.items())
