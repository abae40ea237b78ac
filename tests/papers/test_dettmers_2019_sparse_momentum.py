"""Dettmers & Zettlemoyer, 2019, arXiv:1907.04840: momentum says where, and in which layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from methods.allocation import keep_count
from methods.api import Budget
from methods.masking import GROWN, NoOrderError
from methods.sparse_momentum import SparseMomentum, momenta
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


def updated(weights, masks, momentum, **options):
    """The state after one update at the first step, where p is the prune rate itself."""
    state = hand_state(weights, masks, momentum)
    with torch.no_grad():
        SparseMomentum(**options).update(FakeRun(state))
    return state


def layer(active, empty, momentum):
    """Weights 1, 2, ... and zeros behind them; the same momentum everywhere."""
    weight = torch.cat([torch.arange(1.0, active + 1), torch.zeros(empty)])
    return weight, (weight != 0).float(), torch.full_like(weight, momentum)


def two_layers(first, second, **options):
    layers = {"a": layer(*first), "b": layer(*second)}
    parts = ({name: values[i] for name, values in layers.items()} for i in range(3))
    return updated(*parts, **options)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_momentum_that_is_not_finite_gives_no_order(value):
    with pytest.raises(NoOrderError):
        two_layers((4, 8, value), (4, 8, 1.0))


def test_one_update_of_one_layer_by_hand():
    # 4 active, p = 0.5: 0.1 and -0.2 go. Free are 0, 2, 4 and 5 with |M| 9, 1, 3, 2: 0 and 4 grow.
    # 0 was dropped in this very update and keeps its value; 4 starts at zero.
    state = updated(
        {"w": [0.1, 0.9, -0.2, 0.8, 0.0, 0.0]},
        {"w": [1.0, 1, 1, 1, 0, 0]},
        {"w": [-9.0, 5, 1, 1, -3, 2]},
    )
    assert state.masks["w"].tolist() == [1, 1, 0, 1, 1, 0]
    torch.testing.assert_close(state.weights["w"].data, torch.tensor([0.1, 0.9, 0, 0.8, GROWN, 0]))


def test_the_momentum_of_no_weight_is_cleared():
    before = [-9.0, 5, 1, 1, -3, 2]
    state = updated(
        {"w": [0.1, 0.9, -0.2, 0.8, 0.0, 0.0]}, {"w": [1.0, 1, 1, 1, 0, 0]}, {"w": before}
    )
    assert momentum_of(state, "w").tolist() == before


def test_what_is_removed_is_shared_by_the_mean_momentum_of_active_weights():
    # 10 of 20 go in each layer; means 3 and 1: of 20, a regrows 15 and b 5.
    state = two_layers((20, 80, 3.0), (20, 80, -1.0))
    assert nonzero(state.masks) == {"a": 25, "b": 15}


def test_momentum_of_masked_weights_does_not_enter_the_share():
    weight, mask, momentum = layer(20, 80, 1.0)
    loud = torch.where(mask == 0, 100.0, momentum)
    state = updated({"a": weight, "b": weight}, {"a": mask, "b": mask}, {"a": loud, "b": momentum})
    assert nonzero(state.masks) == {"a": 20, "b": 20}


def test_shares_are_rounded_to_integers_that_keep_the_total():
    # 9 of 18 go in each of three layers; 27 by means 1 : 1 : 2 are 6.75, 6.75 and 13.5.
    layers = {name: layer(18, 82, mean) for name, mean in (("a", 1.0), ("b", 1.0), ("c", 2.0))}
    state = updated(*({name: values[i] for name, values in layers.items()} for i in range(3)))
    assert nonzero(state.masks) == {"a": 16, "b": 16, "c": 22}  # 9 kept, and 7, 7, 13


def test_a_layer_of_ten_weights_asked_for_a_hundred_gives_the_surplus_to_the_others():
    # 100 of 200 in each of b and c, and 4 of 8 in a (s = 0.2 caps p: 2 of 8) are removed: 202.
    # Means 1000 : 1 : 1: a is asked for about 201.6, and has room for 4; 99 each are left.
    layers = {
        "a": layer(8, 2, 1000.0),
        "b": layer(200, 800, 1.0),
        "c": layer(200, 800, 1.0),
    }
    state = updated(*({name: values[i] for name, values in layers.items()} for i in range(3)))
    assert nonzero(state.masks) == {"a": 10, "b": 199, "c": 199}


def test_the_surplus_is_spread_evenly_and_not_by_share():
    # 2 + 100 + 100 removed, means 1000 : 3 : 1, of 1004: a wants 201.2 and takes 4.
    # b has 0.604 and c 0.201 of their own; of the 198 left each gets half.
    layers = {"a": layer(8, 2, 1000.0), "b": layer(200, 800, 3.0), "c": layer(200, 800, 1.0)}
    state = updated(*({name: values[i] for name, values in layers.items()} for i in range(3)))
    assert nonzero(state.masks) == {"a": 10, "b": 199, "c": 199}


@pytest.mark.parametrize(
    ("active", "dropped"),
    [
        (95, 5),  # s = 0.05: 0.05 * 95 = 4.75, rounded up
        (80, 16),  # s = 0.2
        (50, 25),  # s = 0.5 = p
        (20, 10),  # s = 0.8: p
        (100, 0),  # dense
    ],
)
def test_a_dense_layer_drops_at_most_its_sparsity(active, dropped):
    # Momentum is larger where nothing is yet: what is dropped never grows again.
    weight, mask, _ = layer(active, 100 - active, 1.0)
    state = updated({"w": weight}, {"w": mask}, {"w": 1 - 0.5 * mask})
    assert not state.masks["w"][:dropped].any()
    assert state.masks["w"][dropped:active].all()
    assert int(state.masks["w"].sum()) == active


def test_without_redistribution_each_layer_regrows_what_it_lost():
    # p = 0.5: 10 of 20; b is at s = 0.25: 0.25 * 75 = 18.75, so 19.
    state = two_layers((20, 80, 9.0), (75, 25, 1.0), redistribution="none")
    assert nonzero(state.masks) == {"a": 20, "b": 75}
    assert not torch.equal(two_layers((20, 80, 9.0), (75, 25, 1.0)).masks["a"], state.masks["a"])


def test_by_size_what_is_removed_is_shared_by_the_layers_dense_sizes():
    # 10 of 20 and 5 of 10 go; of 15, 100 : 300 are 3.75 and 11.25, so 4 and 11, whatever M.
    state = two_layers((20, 80, 9.0), (10, 290, 1.0), redistribution="size")
    assert nonzero(state.masks) == {"a": 14, "b": 16}


@pytest.mark.parametrize(
    ("guard", "active", "momentum", "left"),
    [
        # b: 10 of 20 go, mean 2. a has 100 weights; p = 0.5.
        # s = 0.1, share 0.75: 9 of 90 go; of 19, 14.25 and 4.75.
        ("published", 90, 6.0, {"a": 95, "b": 15}),
        ("always", 90, 6.0, {"a": 95, "b": 15}),
        # s = 0.1, share 0.25: 45 of 90 go; of 55, 13.75 and 41.25.
        ("published", 90, 2 / 3, {"a": 59, "b": 51}),
        # Capped all the same: 9; of 19, 4.75 and 14.25.
        ("always", 90, 2 / 3, {"a": 86, "b": 24}),
        # s = 0.2 is not below 0.2, share 0.75: 40 of 80 go; of 50, 37.5 and 12.5.
        ("published", 80, 6.0, {"a": 78, "b": 22}),
        # Capped: 16; of 26, 19.5 and 6.5.
        ("always", 80, 6.0, {"a": 84, "b": 16}),
    ],
)
def test_the_published_guard_caps_a_nearly_dense_layer_only_if_it_grows(
    guard, active, momentum, left
):
    state = two_layers((active, 100 - active, momentum), (20, 80, 2.0), guard=guard)
    assert nonzero(state.masks) == left


def test_without_any_momentum_yet_each_layer_regrows_what_it_lost():
    state = two_layers((20, 80, 0.0), (60, 40, 0.0))
    assert nonzero(state.masks) == {"a": 20, "b": 60}


def test_a_layer_without_active_weights_has_no_share():
    state = two_layers((0, 50, 5.0), (20, 80, 1.0))
    assert nonzero(state.masks) == {"a": 0, "b": 20}


def test_random_growth_ignores_the_momentum():
    weight, mask, _ = layer(20, 80, 1.0)
    momentum = torch.linspace(0, 1, 100)
    by_momentum, first, second = (
        updated({"w": weight}, {"w": mask}, {"w": momentum}, growth=growth).masks["w"]
        for growth in ("momentum", "random", "random")
    )
    assert by_momentum[90:].all()
    assert torch.equal(first, second)  # the same generator
    assert 0 < int(first[90:].sum()) < 10
    assert int(first.sum()) == 20


@pytest.mark.parametrize(
    ("decay", "step", "rate"),
    [
        # Of 1000 steps: 0.25 (1 + cos(pi t / T)), and 0.5 (1 - t / T).
        ("cosine", 0, 0.5),
        ("cosine", 250, 0.4267767),
        ("cosine", 500, 0.25),
        ("cosine", 1000, 0.0),
        ("linear", 0, 0.5),
        ("linear", 250, 0.375),
        ("linear", 1000, 0.0),
    ],
)
def test_the_prune_rate_falls_to_zero(decay, step, rate):
    run = FakeRun(hand_state({"w": [1.0]}), step=step)
    assert SparseMomentum(decay=decay).rate(run) == pytest.approx(rate, abs=1e-7)


def test_updates_come_after_every_epoch_but_the_last():
    (phase,) = SparseMomentum().plan(Budget(97_500, 390, 50_000), 0.1)  # 250 epochs
    due = [step for step in range(97_500) if phase.updates.due(step)]
    assert due == [390 * epoch for epoch in range(1, 250)]


def test_few_epochs_still_have_twenty_updates():
    (phase,) = SparseMomentum().plan(Budget(1000, 250, 32_000), 0.1)  # 4 epochs
    assert [step for step in range(1000) if phase.updates.due(step)] == list(range(50, 1000, 50))


def test_of_adam_the_normalised_mean_counts():
    state = hand_state({"w": [1.0, 1, 1]})
    state.optimizer.state[state.weights["w"]] = {
        "exp_avg": torch.tensor([0.2, -0.3, 0.0]),
        "exp_avg_sq": torch.tensor([0.04, 0.01, 0.0]),
    }
    found = momenta(FakeRun(state))["w"]  # 0.2 / 0.2, 0.3 / 0.1, 0 / 1e-8
    torch.testing.assert_close(found, torch.tensor([1.0, 3.0, 0.0]))


def test_without_momentum_in_the_recipe_it_is_the_gradient_of_an_extra_batch():
    gradient = torch.tensor([0.1, -0.5])
    run = FakeRun(hand_state({"w": [1.0, 1]}), dense_gradients={"w": gradient})
    assert torch.equal(momenta(run)["w"], gradient.abs())
    assert run.asked == [(1, True)]


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, 0),
        ({"optimizer": "adam", "lr": 1e-3, "momentum": 0.0, "nesterov": False}, 0),
        ({"momentum": 0.0, "nesterov": False}, 23),
    ],
)
def test_real_runs_keep_the_total_move_weights_across_layers_and_meter_batches(changes, extra):
    trainer = tiny_trainer(
        SparseMomentum(), recipe=dataclasses.replace(TINY_RECIPE, **changes), density=0.2
    )
    log = watch_updates(trainer)
    for _ in trainer.run():
        assert sum(nonzero(trainer.state.masks).values()) == keep_count(12_448, 0.2)
    assert [update.step for update in log] == list(range(1, 24))  # 24 steps: 24 // 20 = 1
    assert trainer.cursor.extra_batches == extra
    assert any(nonzero(update.masks) != nonzero(update.old_masks) for update in log)
    for update in log:
        for name, mask in update.masks.items():
            new = (mask == 1) & (update.old_masks[name] == 0)
            assert (update.weights[name][new] == torch.tensor(GROWN)).all()


def test_in_a_real_run_the_buffer_is_dense_and_where_it_is_largest_weights_grow():
    trainer = tiny_trainer(SparseMomentum(), model="conv", density=0.2)
    log = watch_updates(trainer)
    train(trainer)
    grown = 0
    for update in log:
        for name, mask in update.masks.items():
            buffer = update.memory[name]["momentum_buffer"].abs()
            new = (mask == 1) & (update.old_masks[name] == 0)
            if new.any() and (mask == 0).any():
                assert buffer[new].min() >= buffer[mask == 0].max()
                assert buffer[mask == 0].any()
                grown += int(new.sum())
    assert grown > 50


def test_masks_are_uniform_at_the_start():
    trainer = tiny_trainer(SparseMomentum(), density=0.25)
    next(trainer.run())
    # 0.25 of 12,288, 128 and 32.
    assert list(nonzero(copied(trainer.state.masks)).values()) == [3072, 32, 8]
