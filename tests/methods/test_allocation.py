"""Counts per layer: exact integers, and the published densities of ER and ERK."""

from __future__ import annotations

import math

import numpy as np
import pytest

from methods.allocation import Shape, allocate, apportion, keep_count
from models import create_model

LENET: dict[str, Shape] = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
CONVNET: dict[str, Shape] = {
    "stem": (8, 3, 3, 3),
    "conv": (16, 8, 3, 3),
    "depthwise": (16, 1, 3, 3),
    "shortcut": (16, 8, 1, 1),
    "fc": (4, 16),
}
SCOPES = ("uniform", "er", "erk")
DENSITIES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 1 / 3, 0.5, 0.7, 0.9, 0.99, 0.999, 1.0)


def sizes_of(shapes: dict[str, Shape]) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("total", "density", "expected"),
    [
        (266_200, 0.1, 26_620),
        (10, 0.25, 3),  # 2.5 rounds up
        (10, 0.35, 4),  # 3.5 rounds up too: not half to even
        (10, 0.449, 4),
        (10, 1.0, 10),
        (10, 0.04, 0),
        (45, 1 - 0.9, 5),  # 4.5, though the floating point product is a little less
    ],
)
def test_a_density_asks_for_the_nearest_integer_with_halves_up(total, density, expected):
    assert keep_count(total, density) == expected


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shapes", [LENET, CONVNET], ids=["lenet", "convnet"])
def test_counts_sum_to_the_target_and_fit_their_layers(shapes, scope, density):
    sizes = sizes_of(shapes)
    counts = allocate(shapes, density, scope)
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == keep_count(sum(sizes.values()), density)
    assert all(0 <= counts[name] <= sizes[name] for name in shapes)


@pytest.mark.parametrize("scope", SCOPES)
def test_counts_of_random_networks_sum_to_the_target(scope):
    rng = np.random.default_rng(0)
    for _ in range(200):
        shapes: dict[str, Shape] = {}
        for layer in range(rng.integers(1, 12)):
            channels = tuple(int(n) for n in rng.integers(1, 40, size=2))
            kernel = (int(rng.integers(1, 6)),) * 2 if rng.random() < 0.6 else ()
            shapes[f"layer{layer}"] = channels + kernel
        density = float(rng.choice([rng.random(), *DENSITIES]))
        sizes = sizes_of(shapes)
        counts = allocate(shapes, density, scope)
        assert sum(counts.values()) == keep_count(sum(sizes.values()), density)
        assert all(0 <= counts[name] <= sizes[name] for name in shapes)
        assert all(isinstance(count, int) for count in counts.values())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shapes", [LENET, CONVNET], ids=["lenet", "convnet"])
def test_density_one_keeps_everything(shapes, scope):
    assert allocate(shapes, 1.0, scope) == sizes_of(shapes)


def test_uniform_gives_every_layer_the_density_but_for_rounding():
    # LeNet at 0.1: 23,520 + 3,000 + 100 are integers already.
    assert allocate(LENET, 0.1, "uniform") == {"fc1": 23_520, "fc2": 3_000, "fc3": 100}
    for density in DENSITIES:
        for name, count in allocate(CONVNET, density, "uniform").items():
            assert abs(count - density * sizes_of(CONVNET)[name]) < 1


def test_er_gives_each_layer_epsilon_times_the_sum_of_its_units():
    # Units: 300 + 784 = 1084, 100 + 300 = 400, 10 + 100 = 110; together 1594.
    # 7970 weights are 5 * 1594, so epsilon = 5 and no layer saturates (5 * 110 < 1000).
    counts = allocate(LENET, 7_970 / 266_200, "er")
    assert counts == {"fc1": 5 * 1084, "fc2": 5 * 400, "fc3": 5 * 110}


def test_er_leaves_the_kernel_out_and_erk_takes_it_in():
    # Two layers of 72 weights: a is 3x3 with 2 -> 4 channels, b is linear with 9 -> 8.
    # er:  a (4 + 2) / (4 * 2) = 3/4,    b (8 + 9) / 72 = 17/72.  Shares a : b = 54 : 17.
    # erk: a (4 + 2 + 3 + 3) / 72 = 1/6, b 17/72.                 Shares a : b = 12 : 17.
    shapes: dict[str, Shape] = {"a": (4, 2, 3, 3), "b": (8, 9)}
    assert allocate(shapes, 71 / 144, "er") == {"a": 54, "b": 17}
    assert allocate(shapes, 29 / 144, "erk") == {"a": 12, "b": 17}


def test_erk_on_lenet_300_100_at_sparsity_90_percent():
    # raw: 1084/235200, 400/30000, 110/1000. All three share 26,620: epsilon = 26620/1594 = 16.7,
    # and 16.7 * 0.11 > 1, so fc3 is dense. The rest: epsilon = 25620 / 1484 = 17.2642;
    # fc1 = 17.2642 * 1084 = 18714.4, fc2 = 17.2642 * 400 = 6905.7.
    counts = allocate(LENET, 1 - 0.9, "erk")
    assert counts == {"fc1": 18_714, "fc2": 6_906, "fc3": 1_000}


def test_erk_saturates_layer_after_layer():
    # Units a 1+1 of 1 weight (raw 2), b 1+2 of 2 (raw 1.5), c 10+10 of 100 (raw 0.2).
    # Target 52 of 103: epsilon = 52/25 -> a dense; 51/23 * 1.5 > 1 -> b dense; c has 49 = 52 - 3.
    shapes: dict[str, Shape] = {"a": (1, 1), "b": (1, 2), "c": (10, 10)}
    assert allocate(shapes, 52 / 103, "erk") == {"a": 1, "b": 2, "c": 49}


def test_erk_on_resnet20_at_sparsity_90_percent():
    model = create_model("resnet20", (3, 32, 32), 10)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }
    counts = allocate(shapes, 1 - 0.9, "erk")
    assert sum(counts.values()) == 26_834  # 0.1 * 268,336 = 26,833.6
    # Published densities, by shape: three digits of what Evci et al.'s equation gives.
    expected = {
        (16, 3, 3, 3): 1.0,
        (16, 16, 3, 3): 0.303,
        (32, 16, 3, 3): 0.215,
        (32, 32, 3, 3): 0.139,
        (64, 32, 3, 3): 0.102,
        (64, 64, 3, 3): 0.067,
        (10, 64): 1.0,
    }
    assert set(shapes.values()) == set(expected)
    for name, shape in shapes.items():
        density = counts[name] / math.prod(shape)
        assert density == pytest.approx(expected[shape], abs=6e-4), name


@pytest.mark.parametrize("scope", SCOPES)
def test_layers_of_one_shape_differ_by_at_most_one_weight(scope):
    shapes: dict[str, Shape] = {f"layer{i}": (7, 5, 3, 3) for i in range(9)}
    for density in DENSITIES:
        counts = allocate(shapes, density, scope).values()
        assert max(counts) - min(counts) <= 1


def test_the_largest_remainders_are_rounded_up():
    # Floors 1 + 2 + 3 = 6 of 8; remainders 0.2, 0.9, 0.9: the last two get one more each.
    limits = {"a": 10, "b": 10, "c": 10}
    assert apportion({"a": 1.2, "b": 2.9, "c": 3.9}, 8, limits) == {"a": 1, "b": 3, "c": 4}


def test_equal_remainders_go_to_the_earlier_layer():
    shares = {"a": 1.5, "b": 1.5, "c": 1.5, "d": 1.5}
    limits = dict.fromkeys(shares, 2)
    assert apportion(shares, 6, limits) == {"a": 2, "b": 2, "c": 1, "d": 1}


def test_a_full_layer_passes_its_remainder_on():
    # a's share of 2.9 is more than it can hold; what it cannot take goes to the others.
    assert apportion({"a": 2.9, "b": 1.1, "c": 1.0}, 5, {"a": 2, "b": 9, "c": 9}) == {
        "a": 2,
        "b": 2,
        "c": 1,
    }
