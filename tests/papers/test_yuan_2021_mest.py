"""Yuan et al., 2021, arXiv:2110.14032: elastic mutation, with and without the soft memory bound."""

from __future__ import annotations

import pytest
import torch

from methods.allocation import allocate, keep_count
from methods.api import Budget, Cadence, Phase
from methods.masking import GROWN
from methods.mest import MEST
from tests.tiny import (
    FakeRun,
    hand_state,
    momentum_of,
    nonzero,
    tiny_trainer,
    train,
    watch_updates,
)

PHASE = Phase("train", 1000, updates=Cadence(10, 10, 751))


def updated(state, targets, *, step=10, **options):
    state.slots["mest"] = {"counts": torch.tensor(targets)}
    run = FakeRun(state, phase=PHASE, step=step)
    with torch.no_grad():
        MEST(**options).update(run)
    return run


class GrowsAtTheEnd(MEST):
    """Chance replaced by the place, to have an update that can be written down."""

    def grow_scores(self, run):
        return {name: torch.arange(mask.numel()) * 1.0 for name, mask in run.state.masks.items()}


def test_one_update_by_hand():
    # lambda = 0.1: 0.5 + 0, 0.1 + 0.9, 0.4 + 0.4, 0.3 + 0.1, 0.6 + 0: of 5, a fifth goes, -0.3.
    # The gradient of masked weights is large, and plays no part.
    state = hand_state(
        {"w": [0.5, 0.1, 0.4, -0.3, 0.6, 0.0, 0.0]},
        {"w": [1.0, 1, 1, 1, 1, 0, 0]},
        {"w": [1.0, 2, 3, 4, 5, 6, 7]},
    )
    state.slots["mest"] = {"counts": torch.tensor([5])}
    gradient = torch.tensor([0.0, -9, -4, 1, 0, 99, 99])
    run = FakeRun(state, phase=PHASE, step=10, dense_gradients={"w": gradient})
    with torch.no_grad():
        GrowsAtTheEnd(gradient_weight=0.1).update(run)
    assert run.asked == [(1, True)]
    assert state.masks["w"].tolist() == [1, 1, 1, 0, 1, 0, 1]
    torch.testing.assert_close(
        state.weights["w"].data, torch.tensor([0.5, 0.1, 0.4, 0, 0.6, 0, GROWN])
    )
    assert momentum_of(state, "w").tolist() == [1, 2, 3, 0, 5, 0, 0]


def test_by_magnitude_alone_no_batch_is_drawn():
    state = hand_state({"w": [0.5, 0.1, 0.4, -0.3, 0.6, 0.0]}, {"w": [1.0, 1, 1, 1, 1, 0]})
    run = updated(state, [5], gradient_weight=0.0)
    assert run.asked == []
    assert state.masks["w"][[0, 2, 3, 4]].all()


def test_growth_is_uniform_outside_what_is_kept():
    # 400 of 500 stay; 100 go to 600 places: a sixth of the 100 just dropped may come back.
    weight = torch.cat([torch.arange(1.0, 501), torch.zeros(500)])
    state = hand_state({"w": weight}, {"w": (weight != 0).float()})
    updated(state, [500], gradient_weight=0.0)
    assert state.masks["w"][100:500].all()
    assert int(state.masks["w"].sum()) == 500
    assert 4 < int(state.masks["w"][:100].sum()) < 30  # 16.7 +- 3.5
    assert torch.equal(state.weights["w"].data[:100], weight[:100] * state.masks["w"][:100])


def test_the_soft_bound_first_grows_and_then_drops():
    # 10 active, the target of the layer: nothing goes, and a fifth is grown on top.
    weight = torch.cat([torch.arange(1.0, 11), torch.zeros(90)])
    state = hand_state({"w": weight}, {"w": (weight != 0).float()})
    updated(state, [10], soft_bound=True, gradient_weight=0.0)
    assert int(state.masks["w"].sum()) == 12
    assert state.masks["w"][:10].all()
    # Next time the two smallest of the twelve go, the two that are still at zero; two more grow.
    with torch.no_grad():
        state.weights["w"][3] = 100.0
    updated(state, [10], soft_bound=True, gradient_weight=0.0, step=20)
    assert int(state.masks["w"].sum()) == 12
    assert state.masks["w"][:10].all()
    # At the last update they go and none grows.
    updated(state, [10], soft_bound=True, gradient_weight=0.0, step=750)
    assert state.masks["w"].tolist() == [1.0] * 10 + [0.0] * 90


def test_the_soft_bound_ends_at_the_size_of_the_layer():
    weight = torch.arange(1.0, 11)
    mask = torch.tensor([0.0] + [1.0] * 9)
    state = hand_state({"w": weight * mask}, {"w": mask})
    updated(state, [9], soft_bound=True, gradient_weight=0.0, drop_fraction=0.5)
    assert int(state.masks["w"].sum()) == 10


@pytest.mark.parametrize(
    ("step", "fraction"), [(10, 0.2), (560, 0.2), (570, 0.1), (740, 0.1), (750, 0.0)]
)
def test_the_mutated_fraction_halves_and_ends(step, fraction):
    # Epochs 90 and 120 of 160: 0.5625 and 0.75 of the run.
    run = FakeRun(hand_state({"w": [1.0]}), phase=PHASE, step=step)
    assert MEST().fraction(run) == fraction


def test_the_published_schedule():
    (phase,) = MEST().plan(Budget(125_120, 782, 50_000), 0.1)  # 160 epochs in batches of 64
    due = [step / 782 for step in range(125_120) if phase.updates.due(step)]
    assert due == list(range(5, 121, 5))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 24, 1000])
@pytest.mark.parametrize("stop", [0.0, 0.75, 1.0])
def test_the_last_update_runs_wherever_there_are_any(steps, stop):
    (phase,) = MEST(stop=stop).plan(Budget(steps, 10, 320), 0.1)
    due = [step for step in range(steps) if phase.updates.due(step)]
    assert not due or due[-1] == phase.updates.stop - 1
    assert len(due) >= min(20, round(stop * steps) - 1)


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("soft", [False, True])
def test_real_runs_end_at_the_target_of_each_layer(soft, model):
    trainer = tiny_trainer(MEST(soft_bound=soft), model=model, density=0.2, steps=40)
    shapes = {name: tuple(mask.shape) for name, mask in trainer.state.masks.items()}
    targets = allocate(shapes, 0.2, "uniform")
    log = watch_updates(trainer)
    train(trainer)
    assert nonzero(trainer.state.masks) == targets
    assert sum(targets.values()) == keep_count({"mlp": 12_448, "conv": 1432}[model], 0.2)
    assert [update.step for update in log] == list(range(1, 31))
    moved = 0
    for update in log:
        # Until 0.75 * 30 a fifth, then a tenth, then nothing.
        fraction = 0.2 if update.step < 22.5 else 0.1 if update.step < 30 else 0.0
        for name, target in targets.items():
            surplus = int(fraction * target + 1e-9) if soft else 0
            assert nonzero(update.masks)[name] == target + surplus
            moved += int((update.masks[name] > update.old_masks[name]).sum())
    assert moved > 100
    # The last update of EM has nothing to rank.
    assert trainer.cursor.extra_batches == (30 if soft else 29)


def test_the_defaults_are_those_of_the_published_scripts():
    method = MEST()
    assert (method.drop_fraction, method.stop, method.scope) == (0.2, 0.75, "uniform")
    assert method.every == 5 * 782
    assert not method.soft_bound
