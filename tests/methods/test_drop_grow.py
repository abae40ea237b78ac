"""Drop and grow, on layers small enough to work by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.drop_grow import drop_and_grow, smallest
from methods.masking import GROWN
from methods.rigl import RigL
from methods.sparse_evolution import SET
from tests.tiny import FakeRun, hand_state, momentum_of

G = torch.tensor(GROWN).item()  # as float32 holds it


# index         0    1    2    3    4    5    6    7
# mask          1    1    1    1    0    0    0    0
# weight       .5  -.1   .3  -.9    0    0    0    0      dropped in the order 1, 2, 0, 3
# gradient     .2  -.8   .1   .9  -.4   .3  -.7   .6      grown by its magnitude
# momentum      1    2    3    4    5    6    7    8
MASK = [1.0, 1, 1, 1, 0, 0, 0, 0]
WEIGHT = [0.5, -0.1, 0.3, -0.9, 0, 0, 0, 0]
GRADIENT = [0.2, -0.8, 0.1, 0.9, -0.4, 0.3, -0.7, 0.6]
MOMENTUM = [1.0, 2, 3, 4, 5, 6, 7, 8]

TABLE = [
    # Nothing dropped; what pruned weights had gathered of momentum is cleared.
    (0.0, [1, 1, 1, 1, 0, 0, 0, 0], [0.5, -0.1, 0.3, -0.9, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0, 0, 0]),
    # int(0.24 * 4) = 0.
    (0.24, [1, 1, 1, 1, 0, 0, 0, 0], [0.5, -0.1, 0.3, -0.9, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0, 0, 0]),
    # Drops 1. Of 1 (.8), 4, 5, 6 (.7), 7 the largest is 1 itself: it was never gone.
    (0.25, [1, 1, 1, 1, 0, 0, 0, 0], [0.5, -0.1, 0.3, -0.9, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0, 0, 0]),
    # Drops 1, 2. Grows 1 (.8) and 6 (.7).
    (0.5, [1, 1, 0, 1, 0, 0, 1, 0], [0.5, -0.1, 0, -0.9, 0, 0, G, 0], [1, 2, 0, 4, 0, 0, 0, 0]),
    # Drops 1, 2, 0. Grows 1 (.8), 6 (.7), 7 (.6).
    (0.75, [0, 1, 0, 1, 0, 0, 1, 1], [0, -0.1, 0, -0.9, 0, 0, G, G], [0, 2, 0, 4, 0, 0, 0, 0]),
    # int(0.99 * 4) = 3: as above.
    (0.99, [0, 1, 0, 1, 0, 0, 1, 1], [0, -0.1, 0, -0.9, 0, 0, G, G], [0, 2, 0, 4, 0, 0, 0, 0]),
]


@pytest.mark.parametrize(("fraction", "mask", "weight", "momentum"), TABLE)
@pytest.mark.parametrize("shape", [(8,), (2, 4), (2, 1, 2, 2)])
def test_rigl_rewires_a_layer_as_worked_by_hand(shape, fraction, mask, weight, momentum):
    def shaped(values):
        return torch.tensor(values, dtype=torch.float32).reshape(shape)

    state = hand_state({"w": shaped(WEIGHT)}, {"w": shaped(MASK)}, {"w": shaped(MOMENTUM)})
    # At step 0 the cosine stands at drop_fraction.
    run = FakeRun(state, step=0, dense_gradients={"w": shaped(GRADIENT)})
    with torch.no_grad():
        RigL(drop_fraction=fraction).update(run)
    assert torch.equal(state.masks["w"], shaped(mask))
    assert torch.equal(state.weights["w"].detach(), shaped(weight))
    assert torch.equal(momentum_of(state, "w"), shaped(momentum))


def test_a_channels_last_layer_is_rewired_like_any_other():
    rng = np.random.default_rng(0)
    shape = (6, 5, 3, 3)
    mask = (rng.random(shape) < 0.3).astype(np.float32)
    # Coarse values: ties, which go by the index whatever the memory layout.
    weight = mask * np.round(rng.normal(size=shape), 1)
    gradient = torch.from_numpy(np.round(rng.normal(size=shape), 1).astype(np.float32))
    momentum = rng.normal(size=shape)
    found = []
    for channels_last in (False, True):
        state = hand_state({"w": weight}, {"w": mask}, {"w": momentum}, channels_last=channels_last)
        layout = state.weights["w"].stride()
        with torch.no_grad():
            RigL(drop_fraction=0.4).update(FakeRun(state, dense_gradients={"w": gradient}))
        assert state.weights["w"].stride() == layout
        found.append((state.masks["w"], state.weights["w"].detach(), momentum_of(state, "w")))
    for plain, last in zip(*found, strict=True):
        assert torch.equal(plain, last)
    assert not torch.equal(found[0][0], torch.from_numpy(mask))


def test_a_full_layer_gets_back_what_it_drops():
    # No position is free but the dropped ones: nothing changes, the momentum neither.
    state = hand_state({"w": [3.0, -1, 2]}, momentum={"w": [1.0, 2, 3]})
    run = FakeRun(state, dense_gradients={"w": torch.tensor([9.0, 0, 1])})
    with torch.no_grad():
        RigL(drop_fraction=0.7).update(run)
    assert state.masks["w"].tolist() == [1, 1, 1]
    assert state.weights["w"].tolist() == [3, -1, 2]
    assert momentum_of(state, "w").tolist() == [1, 2, 3]


def test_an_empty_layer_stays_empty():
    state = hand_state({"w": [0.0, 0, 0]}, {"w": [0.0, 0, 0]}, {"w": [1.0, 2, 3]})
    run = FakeRun(state, dense_gradients={"w": torch.tensor([9.0, 0, 1])})
    with torch.no_grad():
        RigL(drop_fraction=0.7).update(run)
    assert state.masks["w"].tolist() == [0, 0, 0]
    assert state.weights["w"].tolist() == [0, 0, 0]


def test_a_layer_with_no_gradient_still_regrows_its_number():
    # All scores are equal: the lowest free positions. 0 is kept, so 1 and 2.
    state = hand_state({"w": [5.0, 0, 0, 1, 2, 0]}, {"w": [1.0, 0, 0, 1, 1, 0]})
    run = FakeRun(state, dense_gradients={"w": torch.zeros(6)})
    with torch.no_grad():
        RigL(drop_fraction=0.67).update(run)
    assert state.masks["w"].tolist() == [1, 1, 1, 0, 0, 0]


def test_a_gradient_that_is_not_a_number_is_refused():
    state = hand_state({"w": WEIGHT}, {"w": MASK})
    run = FakeRun(state, dense_gradients={"w": torch.full((8,), torch.nan)})
    with torch.no_grad(), pytest.raises(ArithmeticError):
        RigL().update(run)


def test_drop_and_grow_takes_any_choice_of_what_to_drop():
    # Drops the largest weight, 3; grows the highest score outside 0, 1, 2, which is 5.
    state = hand_state({"w": WEIGHT}, {"w": MASK})
    dropped = torch.tensor([False, False, False, True, False, False, False, False])
    scores = torch.tensor([9.0, 9, 9, 1, 2, 8, 3, 4])
    with torch.no_grad():
        drop_and_grow(state, "w", dropped, scores)
    assert state.masks["w"].tolist() == [1, 1, 1, 0, 0, 1, 0, 0]
    assert state.weights["w"].tolist() == torch.tensor([0.5, -0.1, 0.3, 0, 0, G, 0, 0]).tolist()


def test_scores_below_zero_still_rank_above_what_is_kept():
    state = hand_state({"w": [5.0, 1, 0, 0]}, {"w": [1.0, 1, 0, 0]})
    dropped = torch.tensor([False, True, False, False])
    with torch.no_grad():
        drop_and_grow(state, "w", dropped, torch.tensor([-1.0, -9, -8, -7]))
    assert state.masks["w"].tolist() == [1, 0, 0, 1]


def test_a_grown_weight_counts_as_non_zero_but_changes_nothing():
    state = hand_state({"w": WEIGHT}, {"w": MASK})
    run = FakeRun(state, dense_gradients={"w": torch.tensor(GRADIENT)})
    with torch.no_grad():
        RigL(drop_fraction=0.5).update(run)
    weight = state.weights["w"].detach()
    assert int(weight.count_nonzero()) == 4
    assert float(torch.tensor(1.0) + weight[6]) == 1.0


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        # Active: 0 (.5), 1 (.1), 3 (.1), 4 (.2). Of the equal 1 and 3, the higher index goes first:
        # the lower one is kept.
        (0, [0, 0, 0, 0, 0]),
        (1, [0, 0, 0, 1, 0]),
        (2, [0, 1, 0, 1, 0]),
        (3, [0, 1, 0, 1, 1]),
        (4, [1, 1, 0, 1, 1]),
    ],
)
def test_the_smallest_active_weights_are_dropped(count, expected):
    weight = torch.tensor([-0.5, 0.1, 0.0, -0.1, 0.2])
    mask = torch.tensor([1.0, 1, 0, 1, 1])
    assert smallest(weight, mask, count).int().tolist() == expected


def test_active_weights_of_value_zero_are_dropped_before_others():
    weight = torch.tensor([0.0, 0.3, 0.0, 0.1])
    mask = torch.tensor([0.0, 1, 1, 1])
    assert smallest(weight, mask, 1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("method", [RigL(), SET(), SET(per_sign=True)], ids=["rigl", "set", "sign"])
def test_the_number_of_non_zeros_of_random_layers_does_not_change(method):
    rng = np.random.default_rng(0)
    for _ in range(30):
        shape = tuple(int(n) for n in rng.integers(1, 12, size=2))
        mask = (rng.random(shape) < rng.random()).astype(np.float32)
        weight = mask * (rng.normal(size=shape) + 1e-3)
        state = hand_state({"w": weight}, {"w": mask}, {"w": rng.normal(size=shape)})
        gradient = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
        with torch.no_grad():
            method.update(FakeRun(state, dense_gradients={"w": gradient}))
        found = state.masks["w"]
        assert set(found.unique().tolist()) <= {0.0, 1.0}
        assert int(found.sum()) == int(mask.sum())
        # Exactly the active weights are not zero, and no pruned weight has momentum.
        assert torch.equal((state.weights["w"] != 0).float(), found)
        assert not momentum_of(state, "w")[found == 0].any()


def test_the_plan_updates_from_the_first_period_until_stop():
    # 1000 steps: from 100 on, while below 750.
    run = FakeRun(hand_state({"w": WEIGHT}))
    (phase,) = RigL(every=25).plan(run.budget, 0.1)
    assert phase.density == 0.1
    updates = [step for step in range(1000) if phase.updates.due(step)]
    assert updates == list(range(25, 750, 25))


def test_a_method_that_stops_at_once_never_updates():
    run = FakeRun(hand_state({"w": WEIGHT}))
    (phase,) = RigL(stop=0.0).plan(run.budget, 0.1)
    assert phase.updates.count(1000) == 0
