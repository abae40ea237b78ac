"""Schedules of density and drop fraction, and when updates are due."""

from __future__ import annotations

import itertools
import math

import pytest

from methods.api import Budget, Cadence
from methods.schedules import cosine_fraction, cubic_density, ramp, spaced


@pytest.mark.parametrize(
    ("step", "sparsity"),
    [
        # s_f = 0.9: 0.9 (1 - (1 - progress)^3)
        (0, 0.0),
        (100, 0.2439),  # 0.9 (1 - 0.729)
        (250, 0.5203125),  # 0.9 (1 - 0.421875)
        (500, 0.7875),  # 0.9 (1 - 0.125)
        (750, 0.8859375),  # 0.9 (1 - 0.015625)
        (1000, 0.9),
        (5000, 0.9),
    ],
)
@pytest.mark.parametrize("begin", [0, 300])
def test_the_cubic_ramp_takes_its_published_values(step, sparsity, begin):
    density = cubic_density(begin + step, begin, begin + 1000, 0.1)
    assert 1 - density == pytest.approx(sparsity, abs=1e-12)


def test_the_cubic_ramp_is_dense_until_it_begins_and_exact_from_its_end():
    assert cubic_density(0, 10, 20, 0.1) == 1.0
    assert cubic_density(10, 10, 20, 0.1) == 1.0
    for final in (0.1, 1 - 0.9, 0.05, 1 / 3):
        assert cubic_density(20, 10, 20, final) == final
        assert cubic_density(10**6, 10, 20, final) == final


@pytest.mark.parametrize("final", [0.01, 0.1, 0.5, 1.0])
def test_the_cubic_ramp_never_gains_density(final):
    path = [cubic_density(step, 7, 93, final) for step in range(120)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(path))
    assert min(path) == final


def test_a_ramp_of_no_length_is_at_its_end():
    assert cubic_density(0, 0, 0, 0.1) == 0.1


@pytest.mark.parametrize(
    ("step", "fraction"),
    [
        # T_end = 75, alpha = 0.3: 0.15 (1 + cos(pi t / 75))
        (0, 0.3),
        (25, 0.225),  # cos(60 degrees) = 1/2
        (37.5, 0.15),  # cos(90 degrees) = 0
        (50, 0.075),  # cos(120 degrees) = -1/2
        (75, 0.0),
        (90, 0.0),
    ],
)
def test_the_cosine_falls_from_alpha_to_zero(step, fraction):
    assert cosine_fraction(step, 75, 0.3) == pytest.approx(fraction, abs=1e-15)


def test_a_cosine_of_no_length_is_zero():
    assert cosine_fraction(0, 0, 0.3) == 0.0


@pytest.mark.parametrize(
    ("every", "span", "expected"),
    [(100, 75_000, 100), (100, 2_000, 100), (100, 1_999, 99), (100, 60, 3), (100, 7, 1), (3, 7, 1)],
)
def test_a_short_budget_keeps_twenty_updates(every, span, expected):
    assert spaced(every, span) == expected


def test_updates_begin_at_start_and_stop_before_stop():
    cadence = Cadence(every=3, start=2, stop=11)
    assert [step for step in range(20) if cadence.due(step)] == [2, 5, 8]
    assert [step for step in range(20) if Cadence(4).due(step)] == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("start", [0, 3, 30])
@pytest.mark.parametrize("stop", [None, 0, 5, 20, 24, 40])
def test_the_count_of_updates_is_the_number_of_steps_at_which_one_is_due(every, start, stop):
    cadence = Cadence(every, start, stop)
    assert cadence.count(24) == sum(cadence.due(step) for step in range(24))


@pytest.mark.parametrize(
    ("begin", "end", "every"),
    [(0, 18, 100), (0, 750, 100), (0, 87_750, 100), (13, 14, 5), (10, 1017, 16), (0, 20, 1)],
)
def test_a_ramp_ends_with_an_update_at_most_one_period_before_its_end(begin, end, every):
    cadence = ramp(begin, end, every)
    assert cadence.stop is not None
    last = cadence.stop - 1
    due = [step for step in range(end + 2 * cadence.every) if cadence.due(step)]
    assert due[0] == begin
    assert due[-1] == last
    assert end - cadence.every < last <= end


def test_the_end_of_a_ramp_that_is_a_multiple_of_its_period_is_kept():
    assert ramp(0, 800, 40) == Cadence(40, 0, 801)
    assert ramp(100, 900, 40) == Cadence(40, 100, 901)


@pytest.mark.parametrize(
    ("drops", "step"),
    [
        ((0.5, 0.75), 225),  # ResNets of Lin et al.: 225 of 300 epochs
        ((0.3, 0.6, 0.8), 180),  # WideResNets: 120 of 200 epochs, here 180 of 300
        ((0.5,), 225),  # fewer than two: three quarters
        ((), 225),
    ],
)
def test_the_second_drop_is_the_recipes_or_three_quarters(drops, step):
    assert Budget(300, 1, 50_000, drops).second_drop() == step


def test_the_cosine_is_symmetric_about_its_middle():
    for step in range(51):
        both = cosine_fraction(step, 100, 0.4) + cosine_fraction(100 - step, 100, 0.4)
        assert math.isclose(both, 0.4, rel_tol=1e-12)
