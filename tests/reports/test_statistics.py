"""Statistics of few seeds: against scipy's own tests, by hand, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from reports.statistics import (
    Comparison,
    Pooled,
    compare,
    correct,
    holm,
    interval,
    mean_sd,
    pool,
    pooled_sd,
    smallest_detectable,
    tie_groups,
)

NAN = math.nan


def seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_mean_and_sample_deviation() -> None:
    assert mean_sd([97.0, 98.0, 99.0]) == (98.0, 1.0)
    assert mean_sd([98.0]) == (98.0, None)


def test_no_value_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no value"):
        mean_sd([])


def test_a_value_that_is_no_number_shows_in_mean_and_deviation() -> None:
    assert all(map(math.isnan, mean_sd([98.0, NAN])))  # type: ignore[arg-type]


def test_the_pooled_deviation_weighs_by_degrees_of_freedom() -> None:
    # variance 4 of three values, 0 of two: (2 * 4 + 1 * 0) / 3; one value tells nothing
    found = pooled_sd([[96.0, 98.0, 100.0], [50.0, 50.0], [7.0]])
    assert found == Pooled(pytest.approx(math.sqrt(8 / 3)), 3)


def test_the_pooled_deviation_is_that_of_an_analysis_of_variance() -> None:
    cells = np.random.default_rng(0).normal([[90.0], [95.0], [97.0]], 0.5, (3, 4))
    found = pooled_sd(cells.tolist())
    between = 4 * cells.mean(axis=1).var(ddof=1)
    assert found is not None
    assert between / found.sd**2 == pytest.approx(stats.f_oneway(*cells).statistic)


@pytest.mark.parametrize("cells", [[], [[1.0]], [[1.0], [2.0]], [[1.0, NAN]]])
def test_nothing_is_pooled_where_no_cell_has_two_values(cells: list[list[float]]) -> None:
    assert pooled_sd(cells) is None


def test_pooled_estimates_can_be_pooled_again() -> None:
    first, second = [[1.0, 2.0, 4.0]], [[5.0, 5.5], [3.0, 9.0, 4.0]]
    one, two, both = pooled_sd(first), pooled_sd(second), pooled_sd(first + second)
    assert one is not None
    assert two is not None
    assert both is not None
    found = pool([(one.freedom, one.sd), (two.freedom, two.sd)])
    assert found == Pooled(pytest.approx(both.sd), both.freedom)


def test_few_values_have_a_t_interval() -> None:
    values = [97.0, 98.0, 99.0]
    found = interval(values, pooled_sd([values]))  # of one cell alone: the textbook interval
    expected = stats.t.interval(0.95, 2, 98.0, 1 / math.sqrt(3))
    assert found is not None
    assert (found.low, found.high, found.kind) == (*map(pytest.approx, expected), "t")


def test_six_values_have_a_bootstrap_interval_and_always_the_same() -> None:
    values = [97.0, 98.0, 99.0, 97.5, 98.5, 96.0]
    first = interval(values, None)
    assert first is not None
    assert first == interval(values, None)
    assert first.kind == "BCa"
    assert min(values) < first.low < sum(values) / 6 < first.high < max(values)


@pytest.mark.parametrize(
    ("values", "pooled"),
    [
        ([98.0], Pooled(1.0, 4)),  # one seed is shown as one seed
        ([98.0, 99.0], None),
        ([98.0, 99.0], Pooled(0.0, 4)),
        ([98.0, NAN], Pooled(1.0, 4)),
        ([98.0] * 6, None),
    ],
)
def test_nothing_known_is_no_interval(values: list[float], pooled: Pooled | None) -> None:
    assert interval(values, pooled) is None


def test_six_equal_values_take_the_t_interval() -> None:
    found = interval([98.0] * 6, Pooled(1.0, 30))
    assert found is not None
    assert (found.kind, found.low + found.high) == ("t", pytest.approx(196.0))


# 12 cells a table, n seeds each; 95 % of the intervals must hold the true mean
@pytest.mark.parametrize(("n", "tables"), [(2, 300), (3, 300)])
def test_t_intervals_cover_the_mean_as_often_as_they_say(n: int, tables: int) -> None:
    draws = np.random.default_rng(1).normal(0.0, 1.0, (tables, 12, n))
    hits = [
        found.low <= 0 <= found.high
        for table in draws.tolist()
        for pooled in [pooled_sd(table)]
        for cell in table
        if (found := interval(cell, pooled)) is not None
    ]
    assert len(hits) == tables * 12
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def test_bootstrap_intervals_of_eight_seeds_cover_most_means() -> None:
    # BCa is known to be short for so few values: Efron and Tibshirani 1993, chapter 14
    draws = np.random.default_rng(2).normal(0.0, 1.0, (200, 8))
    found = [interval(cell, None) for cell in draws.tolist()]
    hits = [one is not None and one.low <= 0 <= one.high for one in found]
    assert 0.85 < np.mean(hits) < 0.97


def test_a_paired_test_with_the_pooled_deviation_by_hand() -> None:
    # difference 1, standard error 0.5 sqrt(2 / 3) = 0.408: t = 2.449 with 20 degrees of freedom
    found = compare(seeds(2, 3, 4), seeds(1, 2, 3), Pooled(0.5, 20))
    assert (found.difference, found.n, found.kind) == (1.0, 3, "paired t")
    assert found.p == pytest.approx(2 * stats.t.sf(1 / (0.5 * math.sqrt(2 / 3)), 20))


def test_pooled_over_the_two_alone_it_is_students_t_test_of_two_samples() -> None:
    one, other = [97.0, 98.2, 98.9, 97.7], [96.0, 97.7, 97.1, 97.0]
    found = compare(seeds(*one), seeds(*other), pooled_sd([one, other]))
    assert found.p == pytest.approx(stats.ttest_ind(one, other).pvalue)


def test_only_common_seeds_are_compared() -> None:
    found = compare({0: 1.0, 1: 2.0, 5: 50.0}, {1: 1.0, 0: 0.5, 7: 9.0}, Pooled(1.0, 10))
    assert (found.difference, found.n) == (0.75, 2)


def test_from_six_seeds_on_signs_are_permuted() -> None:
    # all six differences have one sign: 2 of the 64 assignments are as extreme
    found = compare(seeds(2, 3, 4, 5, 6, 7), seeds(1, 1, 1, 1, 1, 1), Pooled(9.0, 10))
    assert (found.p, found.kind, found.least) == (2 / 64, "permutation", 2 / 64)


@pytest.mark.parametrize("n", [6, 9, 13])
def test_the_permutation_test_is_exact(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.4, 1.0, n)
    signs = np.array(np.meshgrid(*[[-1, 1]] * n)).reshape(n, -1)
    means = (signs * differences[:, None]).mean(axis=0)
    expected = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    found = compare(seeds(*differences), seeds(*[0.0] * n), None)
    assert found.p == pytest.approx(expected)


def test_many_seeds_are_permuted_at_random_and_always_alike() -> None:
    differences = np.random.default_rng(0).normal(0.5, 1.0, 20)
    first, second = (compare(seeds(*differences), seeds(*[0.0] * 20), None) for _ in range(2))
    assert first == second
    assert first.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)
    assert first.least == 2 / 10_000


@pytest.mark.parametrize(
    ("one", "other", "pooled", "reason"),
    [
        ({0: 1.0}, {1: 1.0}, Pooled(1.0, 4), "no common seeds"),
        ({}, {}, None, "no common seeds"),
        ({0: 1.0}, {0: 2.0}, Pooled(1.0, 4), "n too small"),
        (seeds(1, 2), seeds(3, 4), None, "no spread between seeds to judge by"),
        (seeds(1, 1), seeds(2, 2), Pooled(0.0, 4), "no spread between seeds to judge by"),
        (seeds(1, NAN), seeds(2, 2), Pooled(1.0, 4), "a value is not finite"),
    ],
)
def test_what_cannot_be_compared_says_why(
    one: dict[int, float], other: dict[int, float], pooled: Pooled | None, reason: str
) -> None:
    found = compare(one, other, pooled)
    assert (found.p, found.reason, found.kind) == (None, reason, "")


def test_equal_cells_do_not_differ() -> None:
    few, many = seeds(1, 2, 3), seeds(*[5.0] * 8)
    assert compare(few, few, Pooled(1.0, 10)).p == 1
    assert compare(many, many, None).p == 1


def test_holm_steps_down_and_never_falls() -> None:
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, then 1 * 0.04 raised to 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("wrong", [NAN, -0.1, 1.1])
def test_holm_refuses_what_is_no_p_value(wrong: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        holm([0.5, wrong])


def test_six_seeds_can_tell_two_apart_but_never_three() -> None:
    clear = compare(seeds(*range(10, 16)), seeds(*range(6)), None)
    (alone,) = correct([clear])
    assert (alone.p, alone.reason) == (2 / 64, "")
    for found in correct([clear] * 3):
        assert (found.p, found.reason, found.least) == (None, "n too small", 6 / 64)


def test_comparisons_without_a_test_are_no_part_of_the_family() -> None:
    clear = Comparison(1.0, 0.03, 3, "paired t")
    nothing = Comparison(1.0, None, 1, reason="n too small")
    assert [found.p for found in correct([nothing, clear, nothing])] == [None, 0.03, None]


def test_names_that_are_not_told_apart_share_a_rank() -> None:
    cells = {"c": seeds(90, 90, 90), "a": seeds(95, 95, 95), "b": seeds(94.9, 95, 95)}
    assert tie_groups(cells, Pooled(0.2, 30)) == {"a": 1, "b": 1, "c": 3}
    assert list(tie_groups(cells, Pooled(0.2, 30))) == ["a", "b", "c"]


def test_what_is_told_apart_has_ranks_of_its_own() -> None:
    cells = {"a": seeds(95, 95), "b": seeds(94, 94), "c": seeds(93, 93)}
    assert tie_groups(cells, Pooled(0.01, 30)) == {"a": 1, "b": 2, "c": 3}


def test_one_seed_is_never_told_apart_and_no_number_stands_last() -> None:
    cells = {"no": seeds(NAN), "none": {}, "a": seeds(99), "b": seeds(10)}
    assert tie_groups(cells, Pooled(0.1, 8)) == {"a": 1, "b": 1, "no": 3, "none": 3}


@pytest.mark.parametrize(("n", "tables"), [(3, 400), (6, 100)])
def test_equal_methods_are_seldom_told_apart(n: int, tables: int) -> None:
    draws = np.random.default_rng(3).normal(0.0, 1.0, (tables, 5, n)).tolist()
    wrong = sum(
        len(set(tie_groups({str(i): seeds(*c) for i, c in enumerate(t)}, pooled_sd(t)).values()))
        > 1
        for t in draws
    )
    assert wrong / tables <= 0.07


def test_the_smallest_detectable_difference_inverts_the_power_of_the_t_test() -> None:
    pooled = Pooled(0.4, 24)
    found = smallest_detectable(pooled, 5)
    assert found is not None
    shift = found / (0.4 * math.sqrt(2 / 5))
    power = stats.nct.sf(stats.t.ppf(0.975, 24), 24, shift)
    assert power == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(("n", "comparisons"), [(6, 1), (8, 3), (10, 15), (14, 1)])
def test_the_smallest_detectable_difference_is_found_by_the_permutation_test_as_often(
    n: int, comparisons: int
) -> None:
    sd, pairs = 0.3, 400
    found = smallest_detectable(Pooled(sd, 40), n, comparisons=comparisons)
    assert found is not None
    differences = np.random.default_rng(n).normal(found, sd * math.sqrt(2), (pairs, n))
    signs = np.array(list(itertools.product([1, -1], repeat=n)))
    as_large = np.abs(differences @ signs.T) >= np.abs(differences.sum(axis=1))[:, None] - 1e-9
    detected = as_large.mean(axis=1) * comparisons <= 0.05
    assert detected.mean() == pytest.approx(0.8, abs=0.06)
    first = compare(dict(enumerate(differences[0])), dict.fromkeys(range(n), 0.0), None)
    assert first.p == pytest.approx(as_large[0].mean(), abs=0.01)


def test_more_comparisons_and_fewer_seeds_detect_less() -> None:
    pooled = Pooled(0.4, 24)
    few, many = smallest_detectable(pooled, 3), smallest_detectable(pooled, 5)
    several = smallest_detectable(pooled, 5, comparisons=10)
    assert few is not None
    assert many is not None
    assert several is not None
    assert many < several
    assert many < few


@pytest.mark.parametrize(
    ("pooled", "n", "comparisons"),
    [(None, 5, 1), (Pooled(0.0, 8), 5, 1), (Pooled(0.4, 8), 1, 1), (Pooled(0.4, 8), 6, 3)],
)
def test_where_nothing_can_be_detected_there_is_no_difference_to_name(
    pooled: Pooled | None, n: int, comparisons: int
) -> None:
    assert smallest_detectable(pooled, n, comparisons=comparisons) is None
