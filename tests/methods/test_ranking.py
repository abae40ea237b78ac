"""The k-th largest score, by the way that is taken on a GPU: exact for every value and dtype."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from methods.api import TrainState
from methods.drop_grow import drop_and_grow, part_of, smallest
from methods.masking import magnitudes, surviving, write_masks
from methods.ranking import EXACT, kth_largest, ones, radix_select, topk_mask
from methods.schedules import portion
from tests.hot import NoWaiting
from tests.methods.test_masking import Elsewhere
from tests.tiny import hand_state, momentum_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def awkward(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Up to 400 values: of all sizes or with many ties; infinities, and zeros of both signs."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 400))
    values = rng.normal(size=size) * 10.0 ** rng.integers(-45, 38, size=size)
    if seed % 2:
        values = np.round(rng.normal(size=size), 1)
    values[rng.random(size) < 0.1] = -np.inf
    values[rng.random(size) < 0.05] = np.inf
    values[rng.random(size) < 0.1] = 0.0
    values[rng.random(size) < 0.1] = -0.0
    return torch.from_numpy(values).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(20))
def test_radix_selection_finds_what_a_sort_finds(seed, dtype):
    flat = awkward(seed, dtype)
    ordered = flat.sort(descending=True).values
    for k in {1, (len(flat) + 9) // 10, (len(flat) + 1) // 2, len(flat)}:
        expected = ordered[k - 1]
        assert radix_select(flat, k).dtype == dtype
        assert torch.equal(radix_select(flat, k), expected)
        assert torch.equal(radix_select(flat, torch.tensor(k)), expected)
        assert torch.equal(kth_largest(flat, k), expected)


def test_a_value_that_is_not_a_number_ranks_first_where_nobody_can_say_so():
    assert radix_select(torch.tensor([1.0, torch.nan, torch.inf]), 1).isnan()
    assert radix_select(torch.tensor([1.0, torch.nan, torch.inf]), 2) == torch.inf


def test_neighbours_in_the_last_bit_are_told_apart():
    start = torch.tensor(0.1).view(torch.int32)
    flat = (start + torch.arange(5000, dtype=torch.int32)).view(torch.float32)
    shuffled = flat[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    for k in (1, 2, 1234, 4999, 5000):
        assert torch.equal(radix_select(shuffled, k), flat[5000 - k])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_are_the_same_on_either_way(seed, dtype):
    scores = awkward(seed, dtype)
    for keep in {0, 1, len(scores) // 3, len(scores)}:
        found = topk_mask(scores.as_subclass(Elsewhere), torch.tensor(keep))
        assert torch.equal(found.as_subclass(torch.Tensor), topk_mask(scores, keep))


def elsewhere(change: Callable[[TrainState], None], state: TrainState) -> None:
    """The way of a GPU is taken, and may not wait; states are made before."""
    with torch.no_grad(), NoWaiting():
        change(state)


@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_an_update_of_masks_on_a_gpu_does_not_wait(scope):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape) for name, shape in {"a": (30, 20), "b": (9,)}.items()}

    def update(state: TrainState) -> None:
        write_masks(state, surviving(state, magnitudes(state)), 0.3, scope)

    expected, found = hand_state(weights), hand_state(weights)
    update(expected)
    elsewhere(update, found)
    assert sum(int(mask.sum()) for mask in found.masks.values()) == round(0.3 * 609)
    for name, mask in expected.masks.items():
        assert torch.equal(found.masks[name], mask)


def test_rewiring_a_layer_on_a_gpu_does_not_wait():
    rng = np.random.default_rng(1)
    mask = (rng.random((12, 40)) < 0.3).astype(np.float32)
    weight, growth = mask * rng.normal(size=mask.shape), rng.normal(size=mask.shape)
    scores = torch.from_numpy(growth.astype(np.float32))

    def rewire(state: TrainState) -> None:
        where = state.masks["w"]
        dropped = smallest(state.weights["w"], where, part_of(0.3, where))
        drop_and_grow(state, "w", dropped, scores)

    expected, found = (hand_state({"w": weight}, {"w": mask}, {"w": growth}) for _ in range(2))
    with torch.no_grad():
        rewire(expected)
    elsewhere(rewire, found)
    assert torch.equal(found.masks["w"], expected.masks["w"])
    assert torch.equal(found.weights["w"], expected.weights["w"])
    assert torch.equal(momentum_of(found, "w"), momentum_of(expected, "w"))
    assert not torch.equal(expected.masks["w"], torch.from_numpy(mask))


@pytest.mark.parametrize("count", [0, 1, 7, 10, 90, 1001])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.7, 1 / 3])
def test_a_part_is_rounded_as_a_number_and_as_a_tensor_alike(count, fraction):
    mask = (torch.arange(1001) < count).float()
    assert int(part_of(fraction, mask)) == portion(fraction, count)


def test_ones_are_counted_exactly_beyond_the_integers_of_float32():
    assert int(ones(torch.ones(1).expand(EXACT + 1))) == EXACT + 1
    assert int(ones(torch.tensor([1.0, 0, 1]))) == 2
    assert int(ones(torch.tensor([True, False]))) == 1
