"""The narrower dense network: whose width comes nearest to a sparse one's count of weights."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from bench.datasets import DATASETS
from bench.errors import SuiteError
from bench.prunable import prunable_names
from bench.small import GRID, compared, nearest_width
from methods.allocation import keep_count
from methods.dense import Dense
from models import create_model

DIGITS, CIFAR = DATASETS["digits"], DATASETS["cifar10"]


def lenet_weights(width):
    """64-300-100-10 with a factor on the hidden units, at least one."""
    first, second = (max(1, round(n * width)) for n in (300, 100))
    return 64 * first + first * second + second * 10


@functools.cache
def resnet_weights(width):
    """Convolutions and classifier of a ResNet-20 with shortcuts of kind A, counted by torch."""
    with torch.device("meta"):
        model = create_model("resnet20", CIFAR.shape, CIFAR.classes, width=width)
    return sum(model.get_parameter(n).numel() for n in prunable_names(model, Dense(), "all"))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_no_width_of_a_lenet_comes_nearer(sparsity):
    width = nearest_width("lenet_300_100", DIGITS, (), "all", sparsity)
    target = keep_count(50_200, 1 - sparsity)
    grid = [step / GRID for step in range(1, GRID + 1)]
    found = abs(lenet_weights(width) - target)
    assert found == min(abs(lenet_weights(w) - target) for w in grid)
    assert width in grid


def test_the_width_of_a_lenet_by_hand():
    # 5,020 weights are asked for. 56-19 units make 64*56 + 56*19 + 19*10 = 4,838, and 57-19 make
    # 4,921; 58-19 make 5,004, 59-20 would make 5,156.
    width = nearest_width("lenet_300_100", DIGITS, (), "all", 0.9)
    assert lenet_weights(width) == 64 * 58 + 58 * 19 + 19 * 10 == 5_004
    # Nothing is left out where nothing is asked for.
    assert nearest_width("lenet_300_100", DIGITS, (), "all", 0.0) == 1.0


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
def test_no_width_of_a_resnet_comes_nearer(sparsity):
    width = nearest_width("resnet20", CIFAR, (), "dpf", sparsity)
    # Widths beyond these are further away: the count grows with the width.
    near = [round(width + step / GRID, 6) for step in range(-15, 16)]
    # The classifier's 640 weights stay in the sparse network.
    target = 640 + keep_count(267_696, 1 - sparsity)
    assert resnet_weights(1.0) == 267_696 + 640
    assert resnet_weights(near[0]) < target < resnet_weights(near[-1])
    found = abs(resnet_weights(width) - target)
    assert found == min(abs(resnet_weights(w) - target) for w in near)
    # Weights grow with the square of the width, nearly.
    assert width == pytest.approx(math.sqrt(1 - sparsity), abs=0.04)


def test_the_suites_own_width_is_the_full_one():
    options = (("shortcut", "B"), ("width", 2.0))
    wide = nearest_width("resnet20", CIFAR, options, "dpf", 0.75)
    assert wide == pytest.approx(1.0, abs=0.02)  # half of 2
    against = compared("resnet20", CIFAR, options, 1.0, "dpf", 0.9)
    with torch.device("meta"):
        model = create_model("resnet20", CIFAR.shape, 10, shortcut="B", width=2.0)
    assert against.parameters == sum(p.numel() for p in model.parameters())
    assert against.prunable == against.parameters - sum(
        p.numel() for n, p in model.named_parameters() if "norm" in n or "classifier" in n
    )


def test_counts_at_full_width_by_hand():
    against = compared("lenet_300_100", DIGITS, (), 0.01, "all", 0.9)
    assert (against.parameters, against.prunable, against.dense_macs) == (50_610, 50_200, 50_200)
    assert against.kept == 64 * 3 + 3 * 1 + 1 * 10
    # From 99 % on the preset leaves the first layer out, in both networks.
    late = compared("lenet_300_100", DIGITS, (), 0.01, "rigl-erk", 0.99)
    assert (late.prunable, late.kept) == (31_000, 3 * 1 + 1 * 10)


def test_layers_that_stay_dense_in_the_sparse_network_count_too():
    # 95 % of VGG16-D's convolutions leave 735,523 of them and the head's 529,408 weights.
    width = nearest_width("vgg16_d", CIFAR, (), "dpf", 0.95)
    with torch.device("meta"):
        model = create_model("vgg16_d", CIFAR.shape, 10, width=width)
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    target = 529_408 + keep_count(14_710_464, 0.05)
    assert weights == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("name", ["timm:resnet18", "no_such_model"])
def test_a_model_without_a_width_is_named(name):
    with pytest.raises(SuiteError, match=f"{name} has no option `width`, so there is no smaller"):
        nearest_width(name, CIFAR, (), "all", 0.9)


def test_the_smallest_network_there_is_stands_in_for_less():
    # One unit in each layer: 64 + 1 + 10 weights, where 50 are asked for.
    width = nearest_width("lenet_300_100", DIGITS, (), "all", 0.999)
    assert lenet_weights(width) == 75
