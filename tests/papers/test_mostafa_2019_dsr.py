"""Mostafa & Wang, 2019, arXiv:1902.05967: one threshold, growth where much is left."""

from __future__ import annotations

import pytest
import torch

from methods.allocation import keep_count
from methods.api import Budget, Cadence, Phase
from methods.dsr import DSR, regrowth
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

PHASE = Phase("train", 1000, updates=Cadence(50, 50, 950))


def updated(weights, masks, threshold, momentum=None, **options):
    state = hand_state(weights, masks, momentum)
    state.slots["dsr"] = {"threshold": torch.tensor(threshold)}
    with torch.no_grad():
        DSR(**options).update(FakeRun(state, phase=PHASE, step=50))
    return state


def layer(small, large, empty):
    """`small` active weights of 0.01, `large` of 1, and empty places."""
    weight = torch.cat([torch.full((small,), 0.01), torch.ones(large), torch.zeros(empty)])
    return weight, (weight != 0).float()


def layers(*sizes):
    made = {f"l{i}": layer(*size) for i, size in enumerate(sizes)}
    return ({name: values[k] for name, values in made.items()} for k in (0, 1))


def test_one_update_by_hand():
    # H = 0.1: -0.05 and 0.09 fall; the two places that were free are all that may grow.
    state = updated(
        {"w": [0.5, -0.05, 0.0, -0.6, 0.09, 0.0]},
        {"w": [1.0, 1, 0, 1, 1, 0]},
        0.1,
        {"w": [1.0, 2, 3, 4, 5, 6]},
    )
    assert state.masks["w"].tolist() == [1, 0, 1, 1, 0, 1]
    torch.testing.assert_close(
        state.weights["w"].data, torch.tensor([0.5, 0, GROWN, -0.6, 0, GROWN])
    )
    assert momentum_of(state, "w").tolist() == [1, 0, 0, 4, 0, 0]


def test_a_weight_at_the_threshold_stays():
    state = updated({"w": [0.5, 0.25, 0.0]}, {"w": [1.0, 1, 0]}, 0.25)
    assert state.masks["w"].tolist() == [1, 1, 0]


def test_the_threshold_is_one_for_all_layers_and_growth_follows_what_is_left():
    # 30 fall in the first and none in the second; 10 and 50 are left: 30 * 1/6 and 30 * 5/6.
    state = updated(*layers((30, 10, 160), (0, 50, 150)), 0.1)
    assert nonzero(state.masks) == {"l0": 15, "l1": 75}
    assert not state.masks["l0"][:30].any()  # never what has just fallen


def test_growth_is_uniform_among_the_places_that_were_free():
    state = updated(*layers((300, 300, 400)), 0.1)
    grown = state.masks["l0"][600:]
    assert int(grown.sum()) == 300
    # 300 of 400, hypergeometric: 150 +- 4.3 in each half.
    assert abs(int(grown[:200].sum()) - 150) < 22


@pytest.mark.parametrize(
    ("left", "total", "room", "expected"),
    [
        ({"a": 10, "b": 30}, 8, {"a": 99, "b": 99}, {"a": 2, "b": 6}),
        # 10 * 1/3 each: the remainder to the first.
        ({"a": 1, "b": 1, "c": 1}, 10, {"a": 99, "b": 99, "c": 99}, {"a": 4, "b": 3, "c": 3}),
        # 40 by 5 : 3 : 2 is 20, 12, 8; a takes 5, and 15 go round by 3 : 2.
        ({"a": 50, "b": 30, "c": 20}, 40, {"a": 5, "b": 99, "c": 99}, {"a": 5, "b": 21, "c": 14}),
        # b fills up in the second round: 12 + 9 > 15, and c takes the other 6.
        ({"a": 50, "b": 30, "c": 20}, 40, {"a": 5, "b": 15, "c": 99}, {"a": 5, "b": 15, "c": 20}),
        # Nothing left to go by.
        ({"a": 0, "b": 9}, 6, {"a": 9, "b": 2}, {"a": 4, "b": 2}),
        ({"a": 3, "b": 9}, 0, {"a": 9, "b": 2}, {"a": 0, "b": 0}),
    ],
)
def test_regrowth_is_proportional_and_goes_round_again_where_a_layer_is_full(
    left, total, room, expected
):
    assert regrowth(left, total, room) == expected


def test_a_layer_below_the_threshold_keeps_its_largest_weight():
    weights = {"w": [0.02, -0.05, 0.04, 0.0, 0, 0], "v": [1.0, 1, 0, 0, 0, 0]}
    masks = {"w": [1.0, 1, 1, 0, 0, 0], "v": [1.0, 1, 0, 0, 0, 0]}
    state = updated(weights, masks, 0.1)
    # Two fall; one and two are left: 2 * 1/3 and 2 * 2/3, by largest remainder one each.
    assert state.masks["w"][:3].tolist() == [0, 1, 0]
    assert nonzero(state.masks) == {"w": 2, "v": 3}
    assert state.weights["w"].data[1] == torch.tensor(-0.05)


def test_no_more_weights_fall_than_there_are_places_free():
    # All but the largest lie below H, and two places are free: the two smallest go there.
    state = updated({"w": [0.3, 0.1, 0.4, 0.2, 0, 0]}, {"w": [1.0, 1, 1, 1, 0, 0]}, 9.0)
    assert state.masks["w"].tolist() == [1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("below", "factor"),
    # N_p = 100 of 1000 active: halved above 110, doubled below 90.
    [(111, 0.5), (110, 1.0), (100, 1.0), (90, 1.0), (89, 2.0), (0, 2.0)],
)
@pytest.mark.parametrize("options", [{"drop_fraction": 0.1}, {"dropped_weights": 100}])
def test_the_threshold_is_halved_or_doubled_outside_the_tolerance(below, factor, options):
    state = updated(*layers((below, 1000 - below, 4000)), 0.25, **options)
    assert float(state.slots["dsr"]["threshold"]) == 0.25 * factor


def test_the_threshold_grows_no_further_than_the_largest_weight():
    # The published number, which 20 active weights can never meet.
    state = updated(*layers((10, 10, 100)), 0.75, dropped_weights=20_000)
    assert float(state.slots["dsr"]["threshold"]) == 1.0


def test_the_published_number_is_seven_percent_of_the_weights_that_it_was_set_for():
    # WRN-28-2 has 1,451,520 weights in its blocks; a fifth is kept.
    assert DSR().drop_fraction * 290_304 == pytest.approx(20_000, rel=0.02)


def test_the_period_doubles_three_times_until_the_masks_are_fixed():
    method, budget = DSR(), Budget(100_000, 500, 50_000)  # 200 epochs of 500 steps
    (phase,) = method.plan(budget, 0.1)
    run = FakeRun(hand_state({"w": [1.0]}), budget=budget, phase=phase)
    acted = []
    for step in range(100_000):
        run.step = step
        if phase.updates.due(step) and not method.skipped(run):
            acted.append(step)
    assert acted[:3] == [100, 200, 300]
    epochs = [step / 500 for step in acted]
    counts = [sum(low <= e < high for e in epochs) for low, high in
              ((0, 25), (25, 80), (80, 140), (140, 190), (190, 200))]  # fmt: skip
    # 12,500 / 100 without step 0, 27,500 / 200, 30,000 / 400, 25,000 / 800, none.
    assert counts == [124, 137, 75, 31, 0]


def test_a_short_budget_has_twenty_updates_at_even_distances():
    method, budget = DSR(), Budget(1000, 100, 3200)
    (phase,) = method.plan(budget, 0.1)  # until 950, every 950 // 20 = 47 steps
    run = FakeRun(hand_state({"w": [1.0]}), budget=budget, phase=phase, step=47 * 19)
    assert phase.updates.count(1000) == 20
    assert not method.skipped(run)


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_real_runs_keep_the_total_and_never_grow_what_has_just_fallen(model, density):
    trainer = tiny_trainer(DSR(threshold=0.02), model=model, density=density)
    log = watch_updates(trainer)
    train(trainer)
    total = {"mlp": 12_448, "conv": 1432}[model]
    moved = 0
    for update in log:
        assert sum(nonzero(update.masks).values()) == keep_count(total, density)
        for name, mask in update.masks.items():
            old = update.old_masks[name] == 1
            magnitude = update.old_weights[name].abs()
            gone, new = old & (mask == 0), ~old & (mask == 1)
            stayed = old & (mask == 1)
            if gone.any():  # across the threshold, but for the largest of the layer
                others = magnitude[stayed & (magnitude < magnitude[old].max())]
                assert not others.numel() or others.min() >= magnitude[gone].max()
            assert (update.weights[name][new] == torch.tensor(GROWN)).all()
            assert not update.memory[name]["momentum_buffer"][new | (mask == 0)].any()
            moved += int(new.sum())
    assert moved > 100
    assert any(nonzero(update.masks) != nonzero(update.old_masks) for update in log)


def test_the_threshold_finds_the_number_of_weights_to_move():
    trainer = tiny_trainer(DSR(threshold=1e-6, drop_fraction=0.2), density=0.5, steps=60)
    log = watch_updates(trainer)
    train(trainer)
    moved = [
        sum(
            int(((m == 1) & (update.old_masks[name] == 0)).sum())
            for name, m in update.masks.items()
        )
        for update in log
    ]
    assert moved[0] < 100
    assert any(0.7 * 1245 < count < 1.4 * 1245 for count in moved[10:])


def test_masks_are_uniform_at_the_start():
    trainer = tiny_trainer("dsr", density=0.25)
    next(trainer.run())
    assert list(nonzero(copied(trainer.state.masks)).values()) == [3072, 32, 8]


def test_the_defaults_are_the_published_ones():
    method = DSR()
    assert (method.threshold, method.tolerance, method.every, method.stop) == (1e-3, 0.1, 100, 0.95)
    assert method.scope == "uniform"
