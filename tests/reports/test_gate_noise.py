"""How often the gate is wrong: simulated through the decision of `sparsebench check`.

12 rows of 5 seeds on both sides, as a nightly run has. For normal noise of known size, a drop of
3 sigma in a mean is 4.74 standard errors of the difference; that noise stays below the limit in 98
suites of 100 and the drop passes it in 95 of 100 leaves little room, and none for a sigma that only
the baseline tells (48 degrees of freedom) or for a plain limit of three standard errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.special import chdtri, ndtr

from bench.record import Record
from reports.aggregate import Row
from reports.baseline import SCHEMA, Baseline, make_baseline, summary
from reports.regress import Limits, judge
from reports.statistics import Pooled
from reports.tolerance import Tolerance
from tests.reports.records import SUITE, record, spec

ROWS, SEEDS, CALLS = 12, 5, 1000
RECORDS = [[record(spec(f"m{row}", seed=seed)) for seed in range(SEEDS)] for row in range(100)]
KEYS = [tuple(one.spec.key for one in row) for row in RECORDS]
COMMITTED = Path(__file__).parents[2] / "reports" / "records"
Values = Sequence[Sequence[float]]


def rows(values: Values) -> list[Row]:
    """Rows of these accuracies; (ROWS, SEEDS) or fewer of both."""
    return [row_of(RECORDS[i], KEYS[i], found) for i, found in enumerate(values)]


def row_of(records: list[Record], keys: tuple[str, ...], values: Sequence[float]) -> Row:
    measured = [dataclasses.replace(r, top1=v) for r, v in zip(records, values, strict=False)]
    specs = tuple(one.spec for one in measured)
    return Row(records[0].label, specs, tuple(measured), keys[: len(measured)])


def exits(before: Values, now: Values, limits: Limits) -> int:
    """Exit status of a check of `now` against a baseline of `before`."""
    baseline = Baseline(SCHEMA, SUITE, tuple(map(summary, rows(before))))
    return judge(baseline, rows(now), limits=limits).exit_code


def alarms(
    drop: float, sigma: float, calls: int = CALLS, limits: Limits | None = None, seed: int = 0
) -> int:
    """Checks of noise that exit 1, where one row's mean lies `drop` sigma lower than it did."""
    draws = np.random.default_rng(seed).normal(95.0, sigma, (calls, 2, ROWS, SEEDS))
    draws[:, 1, 0] -= drop * sigma
    limits = limits or Limits()
    found = [exits(before, now, limits) for before, now in draws.tolist()]
    assert set(found) <= {0, 1}
    return found.count(1)


def test_noise_alone_seldom_fails_a_suite() -> None:
    assert alarms(0.0, sigma=0.3) <= 0.02 * CALLS


def test_a_drop_of_three_sigma_in_one_row_is_found() -> None:
    assert alarms(3.0, sigma=0.3) >= 0.95 * CALLS


def test_the_rates_do_not_hang_on_the_draws() -> None:
    # integrated over the scatter of sigma's estimate, for which 1,000 calls are a small sample
    freedom = 2 * ROWS * (SEEDS - 1)
    tolerance = Tolerance(Pooled(0.3, freedom), ROWS)
    estimates = np.sqrt(chdtri(freedom, (np.arange(20_000) + 0.5) / 20_000) / freedom)
    limits = tolerance.critical * estimates
    assert 1 - (ndtr(limits) ** ROWS).mean() <= 0.02
    shift = 3 / np.sqrt(1 / SEEDS + 1 / SEEDS)
    assert 1 - (ndtr(limits) ** (ROWS - 1) * ndtr(limits - shift)).mean() >= 0.95


@pytest.mark.parametrize("drop", [0.0, 3.0])
@pytest.mark.parametrize("sigma", [0.05, 2.0])
def test_small_and_large_noise_are_judged_alike(sigma: float, drop: float) -> None:
    # the same draws, only scaled; the default floor lies below what noise of 0.05 points explains
    assert alarms(drop, sigma, calls=100) == alarms(drop, 0.3, calls=100)


def test_a_floor_above_three_sigma_hides_them_as_it_is_meant_to() -> None:
    calls = 100
    assert alarms(3.0, sigma=0.01, calls=calls) < 0.1 * calls
    assert alarms(3.0, sigma=0.01, calls=calls, limits=Limits(floor=0.0)) > 0.85 * calls


def unequal_alarms(
    sigmas: Sequence[float], seeds: int = SEEDS, drop: float = 0.0, calls: int = 400
) -> float:
    """Part of the checks of noise that exit 1, where rows differ in spread."""
    shape = (calls, 2, len(sigmas), seeds)
    draws = np.random.default_rng(7).normal(50.0, np.array(sigmas)[:, None], shape)
    draws[:, 1, 0] -= drop * sigmas[0]
    return [exits(before, now, Limits()) for before, now in draws.tolist()].count(1) / calls


# What remains are suites in which the two rows happen not to stand out: no test can know them
@pytest.mark.parametrize(("seeds", "most"), [(5, 0.05), (3, 0.10)])
def test_two_rows_of_three_times_the_noise_seldom_fail_a_suite(seeds: int, most: float) -> None:
    assert unequal_alarms([0.1] * 10 + [0.3] * 2, seeds) <= most


def test_rows_of_many_kinds_of_noise_seldom_fail_a_suite() -> None:
    sigmas = np.exp(np.linspace(np.log(0.05), np.log(5.0), ROWS)).tolist()
    assert unequal_alarms(sigmas) <= 0.03


def committed_noise() -> list[float]:
    """Standard deviations of the rows of a committed suite of 3 seeds."""
    rows = make_baseline(COMMITTED, "mnist-lenet").rows
    return [row.deviation for row in rows if row.deviation is not None]


def test_noise_as_that_of_the_committed_records_seldom_fails_a_suite() -> None:
    sigmas = committed_noise()
    assert len(sigmas) > 80
    assert unequal_alarms(sigmas, seeds=3, calls=60) <= 0.04


def test_a_large_drop_of_a_calm_row_is_found_among_noisy_ones() -> None:
    assert unequal_alarms([0.1] * 10 + [0.5] * 2, drop=4.0) >= 0.95


def test_a_row_that_spreads_widely_does_not_hide_the_drop_of_another() -> None:
    calls, sigma = 100, 0.3
    draws = np.random.default_rng(5).normal(95.0, sigma, (calls, 2, ROWS, SEEDS))
    draws[:, 1, 0] -= 4 * sigma
    draws[:, 1, 1] += (
        np.array([-30, 20, -10, 25, 5]) * sigma
    )  # what broke, its mean a little higher
    found = [exits(before, now, Limits()) for before, now in draws.tolist()]
    assert found.count(1) >= 0.95 * calls


def test_the_limit_is_that_of_a_t_test_corrected_for_the_number_of_rows() -> None:
    one, twelve = (Tolerance(Pooled(0.3, 96), count) for count in (1, ROWS))
    assert stats.t.sf(one.critical, 96) == pytest.approx(0.018)
    assert 1 - stats.t.cdf(twelve.critical, 96) ** ROWS == pytest.approx(0.018)
