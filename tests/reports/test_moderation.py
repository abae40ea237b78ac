"""Whether rows differ in spread, and moderated variances: against scipy and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from reports.moderation import LEAST, equal_spread, estimates, moderate, none_outlying, prior
from reports.statistics import Pooled
from reports.tolerance import Spread, spreads


def test_bartletts_test_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    cells = [rng.normal(0.0, sd, n) for sd, n in [(1.0, 4), (2.0, 6), (0.5, 9)]]
    sds = [Pooled(float(cell.std(ddof=1)), len(cell) - 1) for cell in cells]
    assert equal_spread(sds) == pytest.approx(stats.bartlett(*cells).pvalue)


def test_seeds_that_agree_do_not_break_the_tests() -> None:
    assert equal_spread([Pooled(0.0, 4)] * 3) == none_outlying([Pooled(0.0, 4)] * 3) == 1.0
    raised = Pooled(LEAST**0.5, 4)
    assert equal_spread([Pooled(0.0, 4), *[Pooled(1.0, 4)] * 5]) == pytest.approx(
        equal_spread([raised, *[Pooled(1.0, 4)] * 5])
    )
    assert prior([Pooled(0.0, 4), *[Pooled(1.0, 4)] * 5]) is not None


@pytest.mark.parametrize("few", [[], [Pooled(1.0, 4)], [Pooled(1.0, 4), Pooled(2.0, 0)]])
def test_one_row_has_nothing_to_differ_from(few: list[Pooled]) -> None:
    assert equal_spread(few) == none_outlying(few) == 1.0
    assert prior(few) is None


def test_the_row_that_stands_out_is_found_as_often_as_its_level_says() -> None:
    squares = np.random.default_rng(1).chisquare(8, (400, 12)) / 8
    ps = [none_outlying([Pooled(float(s) ** 0.5, 8) for s in row]) for row in squares]
    assert np.mean(np.array(ps) < 0.05) == pytest.approx(0.05, abs=0.025)


def test_the_prior_is_that_which_the_variances_are_drawn_from() -> None:
    # variances s0^2 d0 / chi^2(d0), estimated with 8 degrees of freedom each
    rng = np.random.default_rng(2)
    squares = 0.04 * 6 / rng.chisquare(6, 3000) * rng.chisquare(8, 3000) / 8
    found = prior([Pooled(float(s) ** 0.5, 8) for s in squares])
    assert found is not None
    assert found.sd == pytest.approx(0.2, rel=0.05)
    assert found.freedom == pytest.approx(6, rel=0.15)


def test_a_moderated_variance_is_weighed_by_degrees_of_freedom() -> None:
    typical = Pooled(1.0, 4.0)
    assert moderate(Pooled(2.0, 8), typical, 100) == Pooled(pytest.approx(3.0**0.5), 12)
    assert moderate(Pooled(2.0, 8), typical, 9).freedom == 9
    assert moderate(None, typical, 100) == typical


def test_rows_alike_are_pooled_and_a_wide_one_is_on_its_own() -> None:
    calm, wide = [Pooled(1.0 + place / 10, 8) for place in range(8)], Pooled(30.0, 8)
    same, typical = estimates(calm, calm)
    assert typical is None
    assert len(set(same)) == 1
    found, typical = estimates([*calm, wide, None], [*calm, wide])
    assert typical is not None
    assert found[-2:] == [wide, typical]


def test_a_cell_that_rows_share_counts_once() -> None:
    found = spreads([("abc", 1.0), ("abc", 1.0), ("abd", 2.0), ("", None)])
    assert found == [Spread(3, 1.0, 2), Spread(3, 1.0, 0), Spread(3, 2.0, 1), Spread(0, None, 0)]
