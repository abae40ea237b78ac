"""Masks from scores: exact counts, ties, values without order; pruning; optimizer memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from methods.allocation import allocate, keep_count
from methods.masking import (
    MaskedMethod,
    clear_buffers,
    kth_largest,
    magnitudes,
    random_scores,
    reset_optimizer,
    topk_mask,
    write_masks,
)
from tests.tiny import FakeRun, copied, hand_state, momentum_of, nonzero

SHAPES = {"conv": (6, 4, 3, 3), "shortcut": (6, 4, 1, 1), "fc": (5, 6)}  # 216 + 24 + 30 = 270


def reference(scores: np.ndarray, keep: int) -> np.ndarray:
    """The same mask by a stable sort of the whole array."""
    mask = np.zeros(scores.size, scores.dtype)
    mask[np.argsort(-scores.reshape(-1), kind="stable")[:keep]] = 1
    return mask.reshape(scores.shape)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        # scores 2 3 1 3 2 2: in order, ties to the lower index: 1 3 0 4 5 2
        (0, [0, 0, 0, 0, 0, 0]),
        (1, [0, 1, 0, 0, 0, 0]),
        (2, [0, 1, 0, 1, 0, 0]),
        (3, [1, 1, 0, 1, 0, 0]),
        (4, [1, 1, 0, 1, 1, 0]),
        (5, [1, 1, 0, 1, 1, 1]),
        (6, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_equal_scores_go_to_the_lower_index(keep, expected):
    assert topk_mask(torch.tensor([2.0, 3, 1, 3, 2, 2]), keep).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [1, 2, 5, 10**6])
def test_the_mask_is_that_of_a_stable_sort(values, dtype):
    # Few distinct values: ties everywhere.
    rng = np.random.default_rng(values)
    for size in (1, 2, 7, 100, 1001):
        scores = torch.from_numpy(rng.integers(0, values, size).astype(np.float64)).to(dtype)
        for keep in {0, 1, size // 3, size // 2, size - 1, size}:
            mask = topk_mask(scores, keep)
            assert mask.dtype == dtype
            assert int(mask.sum()) == keep
            np.testing.assert_array_equal(mask.numpy(), reference(scores.numpy(), keep))


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a GPU, so that the way taken there is tested without one."""

    device = property(lambda _: torch.device("cuda"))


@pytest.mark.parametrize("values", [1, 2, 5, 10**6])
def test_the_way_without_a_wait_for_the_device_gives_the_same_mask(values):
    rng = np.random.default_rng(values)
    for size in (1, 2, 7, 100, 1001):
        scores = rng.integers(0, values, size).astype(np.float32)
        scores[rng.random(size) < 0.2] = -np.inf
        for keep in {0, 1, size // 3, size // 2, size - 1, size}:
            mask = topk_mask(torch.from_numpy(scores).as_subclass(Elsewhere), keep)
            found = mask.as_subclass(torch.Tensor).numpy()
            np.testing.assert_array_equal(found, reference(scores, keep))


def test_scores_of_any_shape_give_a_mask_of_that_shape():
    scores = torch.arange(24.0).reshape(2, 3, 2, 2)
    mask = topk_mask(scores, 5)
    assert mask.shape == scores.shape
    assert torch.equal(mask, (scores >= 19).float())


def test_ties_of_a_channels_last_weight_go_by_the_index_and_not_by_the_memory():
    scores = torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)
    mask = topk_mask(scores, 7)
    # In memory the channel runs fastest; the index runs over the columns first.
    assert mask.contiguous().flatten().tolist() == [1] * 7 + [0] * 17


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_score_that_is_not_a_number_is_refused(position, keep):
    scores = torch.tensor([0.5, 0.1, 0.7, 0.2])
    scores[position] = math.nan
    with pytest.raises(ArithmeticError, match="not a number"):
        topk_mask(scores, keep)


def test_minus_infinity_is_kept_only_when_nothing_else_is_left():
    scores = torch.tensor([-math.inf, 0.0, -5.0, -math.inf, 3.0])
    assert topk_mask(scores, 2).tolist() == [0, 1, 0, 0, 1]
    assert topk_mask(scores, 3).tolist() == [0, 1, 1, 0, 1]
    assert topk_mask(scores, 4).tolist() == [1, 1, 1, 0, 1]


def test_plus_infinity_is_kept_first():
    assert topk_mask(torch.tensor([1.0, math.inf, 2.0, math.inf]), 2).tolist() == [0, 1, 0, 1]


def test_scores_are_not_written():
    scores = torch.tensor([3.0, 1.0, 2.0])
    topk_mask(scores, 2)
    assert scores.tolist() == [3, 1, 2]


def test_the_kth_largest_counts_equal_values():
    flat = torch.tensor([5.0, 1, 5, 3])
    assert [float(kth_largest(flat, k)) for k in (1, 2, 3, 4)] == [5, 5, 3, 1]


def random_state(seed: int, *, channels_last: bool = False):
    rng = np.random.default_rng(seed)
    weights = {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    return hand_state(weights, channels_last=channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_global_masks_are_the_top_of_all_layers_together(density, channels_last):
    state = random_state(1, channels_last=channels_last)
    tensors = {name: id(mask) for name, mask in state.masks.items()}
    write_masks(state, magnitudes(state), density, "global")
    flat = np.concatenate([np.abs(w.detach().numpy()).reshape(-1) for w in state.weights.values()])
    expected = reference(flat, keep_count(270, density))
    found = np.concatenate([mask.numpy().reshape(-1) for mask in state.masks.values()])
    np.testing.assert_array_equal(found, expected)
    assert {name: id(mask) for name, mask in state.masks.items()} == tensors


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scope", ["uniform", "er", "erk"])
def test_masks_per_layer_are_the_top_of_each_layer(scope, density, channels_last):
    state = random_state(2, channels_last=channels_last)
    write_masks(state, magnitudes(state), density, scope)
    counts = allocate(SHAPES, density, scope)
    for name, weight in state.weights.items():
        expected = reference(np.abs(weight.detach().numpy()), counts[name])
        np.testing.assert_array_equal(state.masks[name].numpy(), expected)
    assert sum(nonzero(state.masks).values()) == keep_count(270, density)


def test_ties_between_layers_go_to_the_earlier_layer():
    state = hand_state({"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [2.0, 1.0]})
    write_masks(state, magnitudes(state), 0.5, "global")
    assert {n: m.tolist() for n, m in state.masks.items()} == {
        "a": [1, 1],
        "b": [0, 0],
        "c": [1, 0],
    }


def test_magnitudes_forget_the_sign_and_do_not_follow_gradients():
    state = hand_state({"a": [-3.0, 2.0, -0.0]})
    scores = magnitudes(state)
    assert scores["a"].tolist() == [3, 2, 0]
    assert not scores["a"].requires_grad
    assert state.weights["a"].tolist() == [-3, 2, -0.0]


def test_random_scores_come_from_the_methods_own_stream_alone():
    state = random_state(3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = random_scores(FakeRun(state, generator=torch.Generator().manual_seed(7)))
    torch.manual_seed(6)
    again = random_scores(FakeRun(state, generator=torch.Generator().manual_seed(7)))
    other = random_scores(FakeRun(state, generator=torch.Generator().manual_seed(8)))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)
    for name, scores in first.items():
        assert scores.shape == SHAPES[name]
        assert torch.equal(scores, again[name])
        assert not torch.equal(scores, other[name])


# Pruning.


def test_a_pruned_weight_is_not_revived_by_a_larger_score():
    # 0 and 3 are pruned; they would now rank first and second. Of the others 2 (5) and 5 (4) stay.
    # weight  9  1  5  8  2 -4
    # mask    0  1  1  0  1  1
    state = hand_state({"w": [9.0, 1, 5, 8, 2, -4]}, {"w": [0.0, 1, 1, 0, 1, 1]})
    MaskedMethod().prune(FakeRun(state), 2 / 6)
    assert state.masks["w"].tolist() == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
def test_pruning_in_steps_only_takes_away(scope):
    state = random_state(4)
    method = MaskedMethod(scope=scope)
    noise = torch.Generator().manual_seed(0)
    before = copied(state.masks)
    for density in (0.9, 0.6, 0.6, 0.3, 0.1):
        for weight in state.weights.values():  # training moves everything, pruned weights too
            weight.data.add_(torch.randn(weight.shape, generator=noise))
        method.prune(FakeRun(state), density)
        assert sum(nonzero(state.masks).values()) == keep_count(270, density)
        assert all(bool((state.masks[name] <= before[name]).all()) for name in before)
        before = copied(state.masks)


def test_pruning_clears_the_momentum_of_pruned_weights_alone():
    state = hand_state({"w": [4.0, 1, 3, 2]}, momentum={"w": [10.0, 20, 30, 40]})
    MaskedMethod().prune(FakeRun(state), 0.5)
    assert state.masks["w"].tolist() == [1, 0, 1, 0]
    assert momentum_of(state, "w").tolist() == [10, 0, 30, 0]


def test_projection_zeroes_pruned_weights_in_place():
    state = hand_state({"a": [4.0, -1], "b": [[3.0], [-2.0]]}, {"a": [1, 0], "b": [[0], [1]]})
    address = state.weights["a"].data_ptr()
    with torch.no_grad():
        MaskedMethod().project(state)
    assert state.weights["a"].tolist() == [4, 0]
    assert state.weights["b"].tolist() == [[0], [-2]]
    assert state.weights["a"].data_ptr() == address


def test_adams_moments_are_cleared_and_its_count_of_steps_is_not():
    state = hand_state({"w": [1.0, 2, 3]})
    weight = state.weights["w"]
    state.optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.grad = torch.tensor([1.0, 1, 1])
    state.optimizer.step()
    clear_buffers(state, {"w": torch.tensor([1.0, 0, 1])})
    memory = state.optimizer.state[weight]
    assert (memory["exp_avg"] != 0).tolist() == [True, False, True]
    assert (memory["exp_avg_sq"] != 0).tolist() == [True, False, True]
    assert int(memory["step"]) == 1


def test_before_the_first_step_there_is_no_memory_to_clear():
    state = hand_state({"w": [1.0, 2]})
    clear_buffers(state, {"w": torch.tensor([1.0, 0])})
    reset_optimizer(state)
    assert not state.optimizer.state.get(state.weights["w"])


def test_a_reset_optimizer_remembers_nothing_and_keeps_its_tensors():
    state = hand_state({"w": [1.0, 2, 3]})
    weight = state.weights["w"]
    state.optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.grad = torch.tensor([1.0, 1, 1])
    state.optimizer.step()
    memory = state.optimizer.state[weight]
    addresses = {key: value.data_ptr() for key, value in memory.items()}
    reset_optimizer(state)
    assert all(not value.any() for value in memory.values())
    assert {key: value.data_ptr() for key, value in memory.items()} == addresses
