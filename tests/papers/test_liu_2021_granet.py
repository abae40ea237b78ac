"""Liu et al., 2021, arXiv:2106.10404: gradual pruning that rewires on the way."""

from __future__ import annotations

import pytest
import torch

from methods.allocation import allocate, keep_count
from methods.api import Budget, Phase
from methods.granet import GraNet
from methods.masking import GROWN
from tests.tiny import (
    FakeRun,
    copied,
    hand_state,
    momentum_of,
    nonzero,
    tiny_trainer,
    train,
    watch_updates,
)


def updated(state, step, *, density, gradients, initial=0.5, steps=1000, **options):
    method = GraNet(initial=initial, every=1, **options)
    run = FakeRun(
        state,
        Budget(steps, 100, 3200),
        density,
        Phase("train", steps, density=initial),
        step,
        dense_gradients=gradients,
    )
    with torch.no_grad():
        method.update(run)
    return run


def test_one_update_by_hand():
    # At the end of the ramp 0.5 of 8 weights are to stay: 0.1 and 0.2 are pruned. Then half of the
    # cosine's 0.5 (step 500 of 1000) of the 4 left is one weight, 0.3; among 0.1, 0.2, 0.3 and the
    # two empty places the gradient is largest at 0.2, which was pruned and starts at zero.
    state = hand_state(
        {"w": [0.9, 0.1, -0.8, 0.2, 0.3, 0.7, 0.0, 0.0]},
        {"w": [1.0, 1, 1, 1, 1, 1, 0, 0]},
        {"w": [1.0, 2, 3, 4, 5, 6, 7, 8]},
    )
    gradient = torch.tensor([9.0, 1, 9, -5, 2, 9, 3, 4])
    run = updated(state, 500, density=0.5, gradients={"w": gradient}, initial=0.75, end=0.5)
    assert state.masks["w"].tolist() == [1, 0, 1, 1, 0, 1, 0, 0]
    torch.testing.assert_close(
        state.weights["w"].data, torch.tensor([0.9, 0, -0.8, GROWN, 0, 0.7, 0, 0])
    )
    assert momentum_of(state, "w").tolist() == [1, 0, 3, 0, 0, 6, 0, 0]
    assert run.asked == [(1, True)]


def test_pruning_ranks_all_layers_together_and_rewiring_each_by_itself():
    # 100 of 200 stay, all in `large`; each layer then rewires within itself.
    small, large = torch.linspace(0.01, 0.1, 100), torch.linspace(1, 2, 100)
    state = hand_state({"small": small, "large": large})
    gradients = {"small": torch.ones(100), "large": torch.ones(100)}
    updated(state, 100, density=0.5, gradients=gradients, initial=1.0, end=0.1)
    assert nonzero(state.masks) == {"small": 0, "large": 100}


@pytest.mark.parametrize(
    ("initial", "step", "kept"),
    [
        # Of 1000 weights, from D_i to 0.1 over 400 steps: 0.1 + (D_i - 0.1) (1 - t / 400)^3.
        (0.5, 0, 500),
        (0.5, 100, 269),  # 0.1 + 0.4 * 0.421875 = 0.26875
        (0.5, 200, 150),
        (0.5, 399, 100),
        (0.5, 400, 100),
        (0.5, 900, 100),
        (1.0, 100, 480),  # 0.1 + 0.9 * 0.421875 = 0.4796875
        (1.0, 200, 213),  # 0.2125, half up
    ],
)
def test_density_follows_the_cubic_schedule_from_the_initial_density(initial, step, kept):
    active = round(1000 * initial)
    weight = torch.cat([torch.arange(1.0, active + 1), torch.zeros(1000 - active)])
    state = hand_state({"w": weight}, {"w": (weight != 0).float()})
    updated(state, step, density=0.1, gradients={"w": weight}, initial=initial, end=0.4)
    assert int(state.masks["w"].sum()) == kept


@pytest.mark.parametrize(("step", "dropped"), [(0, 50), (250, 42), (500, 25), (750, 7), (999, 0)])
def test_the_rewired_fraction_falls_along_a_cosine(step, dropped):
    # 0.25 (1 + cos(pi t / 1000)) of 100: 50, 42.68, 25, 7.32 and 0.0002, rounded down.
    weight = torch.cat([torch.arange(1.0, 101), torch.zeros(100)])
    mask = (weight != 0).float()
    state = hand_state({"w": weight}, {"w": mask})
    updated(state, step, density=0.5, gradients={"w": 1 - mask}, end=0.1)
    assert int(state.masks["w"][:100].sum()) == 100 - dropped
    assert int(state.masks["w"].sum()) == 100


def test_the_published_schedule():
    # 160 epochs of 391 steps: 62,560; pruned until 110 epochs, 43,010, moved down to 43,000.
    method, budget = GraNet(), Budget(62_560, 391, 50_000)
    (phase,) = method.plan(budget, 0.1)
    due = [step for step in range(62_560) if phase.updates.due(step)]
    assert due == list(range(1000, 62_560, 1000))
    assert method.ramp(budget) == (1000, 43_000)
    assert phase.density == 0.5


@pytest.mark.parametrize("stop", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 24, 1000])
def test_the_last_prune_is_an_update_that_runs(steps, stop):
    method, budget = GraNet(stop=stop), Budget(steps, 10, 320)
    (phase,) = method.plan(budget, 0.1)
    assert phase.updates.due(method.ramp(budget)[1])
    assert method.ramp(budget)[1] < steps


def test_a_cell_denser_than_the_initial_density_starts_at_its_own():
    (phase,) = GraNet().plan(Budget(1000, 100, 3200), 0.8)
    assert phase.density == 0.8


def test_masks_are_erk_at_the_start_or_as_the_scope_says():
    for scope, spread in (("global", "erk"), ("uniform", "uniform")):
        trainer = tiny_trainer(GraNet(scope=scope), model="conv", steps=40)
        next(trainer.run())
        shapes = {name: tuple(mask.shape) for name, mask in trainer.state.masks.items()}
        assert nonzero(trainer.state.masks) == allocate(shapes, 0.5, spread)


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("initial", [0.5, 1.0])
def test_real_runs_land_on_the_target_and_rewire_to_the_end(initial, scope):
    trainer = tiny_trainer(GraNet(initial=initial, scope=scope), model="conv", steps=40)
    log = watch_updates(trainer)
    train(trainer)
    end = round(0.6875 * 40)
    assert [update.step for update in log] == list(range(1, 40))
    rewired = 0
    for update in log:
        level = 0.1 + (initial - 0.1) * max(0, 1 - update.step / end) ** 3
        count = sum(nonzero(update.masks).values())
        assert count == keep_count(1432, level)
        if update.step > end:
            assert nonzero(update.masks) == nonzero(update.old_masks)
            rewired += sum(
                int((mask > update.old_masks[name]).sum()) for name, mask in update.masks.items()
            )
    assert rewired > 0
    assert trainer.cursor.extra_batches == len(log)


def test_what_grows_has_the_largest_gradient_outside_what_is_kept():
    trainer = tiny_trainer(GraNet(), model="conv", steps=40)
    gradients, plain = [], trainer.gradients

    def watched(batches=1, *, augmented=True):
        gradients.append(copied(plain(batches, augmented=augmented)))
        return gradients[-1]

    trainer.gradients = watched
    log = watch_updates(trainer)
    train(trainer)
    grown = 0
    for update, found in zip(log, gradients, strict=True):
        for name, mask in update.masks.items():
            new = (mask == 1) & (update.old_masks[name] == 0)
            if new.any() and (mask == 0).any():
                assert found[name].abs()[new].min() >= found[name].abs()[mask == 0].max()
                grown += int(new.sum())
    assert grown > 50


def test_the_defaults_are_the_published_ones():
    method = GraNet()
    assert (method.every, method.initial, method.drop_fraction) == (1000, 0.5, 0.5)
    assert method.end == 110 / 160
    assert method.scope == "global"
