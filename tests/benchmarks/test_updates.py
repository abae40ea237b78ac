"""Selecting the k-th largest magnitude, and a whole mask update, beside torch's own ways."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from methods.ranking import kth_largest, topk_mask
from tests.benchmarks.ratios import Beside

SIZES = {"0.27M": 270_000, "1.5M": 1_500_000, "23M": 23_000_000}
"""Weights of ResNet-20, WRN-28-2 and WRN-28-8 or ResNet-50."""

KEPT = 0.1


def by_sort(values: Tensor, k: int) -> Tensor:
    return values.sort(descending=True).values[k - 1]


def by_kthvalue(values: Tensor, k: int) -> Tensor:
    return values.kthvalue(len(values) - k + 1).values


RIVALS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "torch.sort": by_sort,
    "torch.kthvalue": by_kthvalue,
}


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest, measuring: bool) -> tuple[str, int]:
    """Its name and how many weights; fewer where nothing is measured."""
    return request.param, SIZES[request.param] if measuring else 1000


def weights_of(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def rounds(count: int) -> int:
    """So that each size takes about as long."""
    return 3 if count > 10**7 else 9


@pytest.mark.benchmark(group="k-th largest magnitude", timer=time.process_time)
@pytest.mark.parametrize("rival", RIVALS)
def test_selection(rival: str, size: tuple[str, int], beside: Beside) -> None:
    name, count = size
    values, keep, other = weights_of(count).abs(), round(KEPT * count), RIVALS[rival]
    found = beside(
        f"k-th largest: {name} / {rival}",
        lambda: kth_largest(values, keep),
        lambda: other(values, keep),
        rounds=rounds(count),
    )
    assert found == other(values, keep)


@pytest.mark.benchmark(group="whole mask update", timer=time.process_time)
@pytest.mark.parametrize("rival", RIVALS)
def test_update(rival: str, size: tuple[str, int], beside: Beside) -> None:
    name, count = size
    weights, keep, other = weights_of(count), round(KEPT * count), RIVALS[rival]

    def with_rival() -> Tensor:
        values = weights.abs()
        return (values >= other(values, keep)).to(values.dtype)  # equal values are not looked at

    mask = beside(
        f"mask update: {name} / {rival}",
        lambda: topk_mask(weights.abs(), keep),
        with_rival,
        rounds=rounds(count),
    )
    assert int(mask.sum()) == keep
