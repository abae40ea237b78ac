"""What a few seeds can tell: intervals, paired comparisons, ties, and the smallest difference seen.

Few seeds hardly know their own spread. So below `ENOUGH` of them the standard deviation is pooled
over all cells of the table, and Student's t takes the place of resampling. Only finite values
count: a seed that diverged has no accuracy.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Samples = Mapping[int, float]
"""Seed -> value."""

ENOUGH = 6
"""Seeds from which resampling can tell something: two in 2^6 signs is the first p below 0.05."""

ALPHA, POWER = 0.05, 0.8

RESAMPLES = 9999
"""Of the bootstrap, and of the permutation test where 2^n signs are more: exact up to 13 seeds."""

SIMULATED = 1000
"""Pairs of cells that tell the power of the permutation test, to 1.3 %."""

TOO_SMALL = "n too small"


@dataclass(frozen=True, slots=True)
class Pooled:
    """Standard deviation of one run, pooled over cells, and its degrees of freedom."""

    sd: float
    freedom: float


@dataclass(frozen=True, slots=True)
class Interval:
    """Confidence interval of a mean."""

    low: float
    high: float
    kind: Literal["t", "BCa"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two cells compared over the seeds that both have.

    Attributes:
        difference: mean of one less the other; nan where there is no such seed.
        p: two-sided; None where nothing can be said, and `reason` says why.
        n: seeds in common.
        kind: the test; empty where none was made.
        least: the smallest p that the test can give for this n.
    """

    difference: float
    p: float | None
    n: int
    kind: Literal["paired t", "permutation", ""] = ""
    reason: str = ""
    least: float = 0.0


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for the deviation of one value.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("no value to take the mean of")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, statistics.stdev(values, mean) if math.isfinite(mean) else math.nan


def pooled_sd(samples: Iterable[Sequence[float]]) -> Pooled | None:
    """The standard deviation of one run, each cell's around its own mean.

    sqrt(sum (n_i - 1) s_i^2 / sum (n_i - 1)), with as many degrees of freedom as the sum below. A
    cell with a value that is not finite says nothing of the spread and is left out.

    Args:
        samples: the values of each cell.

    Returns:
        None where no cell has two values.
    """
    cells = [values for values in samples if len(values) > 1 and all(map(math.isfinite, values))]
    return pool((len(values) - 1, statistics.stdev(values)) for values in cells)


def pool(deviations: Iterable[tuple[float, float]]) -> Pooled | None:
    """One estimate of several: of each, its degrees of freedom and its standard deviation."""
    known = [(freedom, sd) for freedom, sd in deviations if freedom > 0]
    freedom = sum(freedom for freedom, _ in known)
    squares = math.fsum(freedom * sd**2 for freedom, sd in known)
    return Pooled(math.sqrt(squares / freedom), freedom) if freedom else None


def interval(
    values: Sequence[float], pooled: Pooled | None, level: float = 0.95
) -> Interval | None:
    """Confidence interval of the mean.

    Below `ENOUGH` values: Student's t with the pooled deviation and its degrees of freedom. From
    there on: the bias-corrected and accelerated bootstrap (Efron 1987), with a fixed random state.
    Equal values have no bootstrap distribution and take the t interval.

    Returns:
        None for one value, which is shown as one; where a value is not finite; and where the
        interval needs a pooled deviation and there is none, or it is 0.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    if len(values) >= ENOUGH and len(set(values)) > 1:
        return _bca(values, level)
    if pooled is None or pooled.sd == 0:
        return None
    half = quantile(1 - (1 - level) / 2, pooled.freedom) * pooled.sd / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return Interval(mean - half, mean + half, "t")


def compare(one: Samples, other: Samples, pooled: Pooled | None) -> Comparison:
    """Whether two cells differ, over the seeds that both have.

    Below `ENOUGH` common seeds: a t test of the mean of the paired differences. Its standard error
    is sqrt(2 / n) times the pooled deviation of one run, as if the two runs of a seed varied apart;
    what a seed does to both alike makes the true error smaller, and the test careful. Two or three
    differences would say next to nothing of their own spread. From `ENOUGH` seeds on: the paired
    permutation test, which flips the signs of the differences and assumes no distribution.

    Args:
        one: seed -> value.
        other: what it is compared with.
        pooled: of the table that both stand in.
    """
    seeds = sorted(one.keys() & other.keys())
    differences = [one[seed] - other[seed] for seed in seeds]
    n = len(seeds)
    if not n:
        return Comparison(math.nan, None, 0, reason="no common seeds")
    mean = math.fsum(differences) / n
    if not math.isfinite(mean):
        return Comparison(math.nan, None, n, reason="a value is not finite")
    if n == 1:
        return Comparison(mean, None, n, reason=TOO_SMALL, least=1.0)
    if n >= ENOUGH:
        return _permutation(differences, mean)
    if pooled is None or pooled.sd == 0:
        return Comparison(mean, None, n, reason="no spread between seeds to judge by")
    p = 2 * _upper_tail(abs(mean) / (pooled.sd * math.sqrt(2 / n)), pooled.freedom)
    return Comparison(mean, p, n, "paired t")


def holm(ps: Sequence[float]) -> list[float]:
    """P-values corrected for their number, step down (Holm 1979); in the order given.

    Raises:
        ValueError: one is not between 0 and 1.
    """
    if wrong := [p for p in ps if not 0 <= p <= 1]:
        raise ValueError(f"p-value {wrong[0]} is not between 0 and 1")
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, (len(ps) - rank) * ps[place])
        corrected[place] = min(1.0, largest)
    return corrected


def correct(comparisons: Sequence[Comparison], alpha: float = ALPHA) -> list[Comparison]:
    """A family of comparisons with Holm's correction; those without a test do not count in it.

    `n too small` goes by the corrected p too: a comparison has it where it could not come below
    `alpha` though every test of the family gave the smallest p that its n allows. Six seeds can
    tell two methods apart (2 / 2^6 = 0.031), but never three from each other (3 times that).
    """
    tested = [(place, found.p) for place, found in enumerate(comparisons) if found.p is not None]
    ps = holm([p for _, p in tested])
    least = holm([comparisons[place].least for place, _ in tested])
    corrected = list(comparisons)
    for (place, _), p, lowest in zip(tested, ps, least, strict=True):
        hopeless = lowest > alpha
        corrected[place] = replace(
            comparisons[place],
            p=None if hopeless else p,
            reason=TOO_SMALL if hopeless else "",
            least=lowest,
        )
    return corrected


def tie_groups(cells: Mapping[str, Samples], pooled: Pooled | None) -> dict[str, int]:
    """Ranks, highest mean first; what is not told apart from the best of a group shares its rank.

    All pairs are one family under Holm's correction, as the best is known only from the values. The
    rank after a group counts its members: 1, 1, 3. A name without a finite mean stands last.

    Args:
        cells: name -> seed -> value.
        pooled: of the table that they stand in.

    Returns:
        Name -> rank, best first.
    """
    means = {name: statistics.fmean(s.values()) if s else math.nan for name, s in cells.items()}
    left = sorted((name for name in cells if math.isfinite(means[name])), key=lambda n: -means[n])
    pairs = list(itertools.combinations(left, 2))
    found = correct([compare(cells[one], cells[other], pooled) for one, other in pairs])
    apart = {pair for pair, c in zip(pairs, found, strict=True) if c.p is not None and c.p <= ALPHA}
    ranks: dict[str, int] = {}
    while left:
        rank = len(ranks) + 1
        group = [name for name in left if (left[0], name) not in apart]
        ranks |= dict.fromkeys(group, rank)
        left = [name for name in left if name not in ranks]
    last = len(ranks) + 1
    return ranks | {name: last for name in cells if name not in ranks}


def smallest_detectable(
    pooled: Pooled | None,
    n: int,
    power: float = POWER,
    alpha: float = ALPHA,
    comparisons: int = 1,
) -> float | None:
    """Smallest true difference of two means that is found with this power.

    By the test that `compare` takes for n seeds, two-sided, for values that are normal: the t test
    with the pooled deviation, or from `ENOUGH` seeds on the permutation test, by simulation. Where
    signs are no longer all permuted, it is as strong as the t test of the differences alone.

    Args:
        pooled: of the table.
        n: seeds of each of the two.
        power: probability of finding it.
        alpha: level of the test.
        comparisons: in the family; Holm's correction asks the first for `alpha` over their number.

    Returns:
        None for one seed, without a spread to judge by, and where n is too small for any test.
    """
    if n < 2 or pooled is None or pooled.sd == 0:
        return None
    error = pooled.sd * math.sqrt(2 / n)
    if n < ENOUGH or 1 << n > RESAMPLES:
        freedom = pooled.freedom if n < ENOUGH else n - 1
        if n >= ENOUGH and comparisons * _least(n) > alpha:
            return None
        return findable(error, freedom, quantile(1 - alpha / comparisons / 2, freedom), power)
    extreme = math.floor(alpha / comparisons * (1 << n) / 2 + 1e-9)
    return error * _permuted_shift(n, extreme, power) if extreme else None


def findable(
    error: float, freedom: float, critical: float, power: float, floor: float = 0.0
) -> float:
    """Smallest true difference that passes `max(floor, critical * estimated error)`.

    Averages over the estimate's own scatter, a chi distribution, by its quantiles; without a floor
    it is the inverse of the noncentral t distribution.

    Args:
        error: standard error of the difference.
        freedom: of the estimate of it.
        critical: how many estimated errors the test asks for.
        power: probability of passing.
        floor: that a difference must exceed in any case.
    """
    import numpy as np
    from scipy.optimize import brentq  # type: ignore[import-untyped]
    from scipy.special import chdtri, ndtr  # type: ignore[import-untyped]

    if error == 0:
        return floor
    steps = 4000
    estimates = np.sqrt(chdtri(freedom, (np.arange(steps) + 0.5) / steps) / freedom)
    limits = np.maximum(floor / error, critical * estimates)

    def short(errors: float) -> float:
        return float(ndtr(errors - limits).mean() - power)

    return error * float(brentq(short, 0.0, float(limits.max()) + 10))


def quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def _upper_tail(t: float, freedom: float) -> float:
    from scipy.special import stdtr

    return float(stdtr(freedom, -t))


def _bca(values: Sequence[float], level: float) -> Interval:
    import numpy as np
    from scipy import stats  # type: ignore[import-untyped]

    found = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        confidence_level=level,
        n_resamples=RESAMPLES,
        method="BCa",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(found.low), float(found.high), "BCa")


def _permutation(differences: Sequence[float], mean: float) -> Comparison:
    import numpy as np
    from scipy import stats

    values = np.asarray(differences)
    found = stats.permutation_test(
        (values, np.zeros_like(values)),  # to swap d with 0 is to flip its sign
        lambda one, other, axis: np.mean(one - other, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        random_state=np.random.default_rng(0),
    )
    n = len(values)
    return Comparison(mean, float(found.pvalue), n, "permutation", least=_least(n))


@functools.cache
def _permuted_shift(n: int, extreme: int, power: float) -> float:
    """Mean difference, in its standard errors, that the exact permutation test finds this often.

    It is found where no more than `extreme` of the 2^(n - 1) pairs of opposite signs give a mean
    that is as large. The same draws serve every shift, so that power rises with it.
    """
    import numpy as np
    from scipy.optimize import brentq

    draws = np.random.default_rng(0).normal(size=(SIMULATED, n))
    half = np.arange(1 << (n - 1))[:, None] >> np.arange(n) & 1  # the last sign stays as it is
    signs = (1 - 2 * half).astype(float)
    sums, drift = draws @ signs.T, signs.sum(axis=1)

    def short(errors: float) -> float:
        means = np.abs(sums + errors / math.sqrt(n) * drift)
        as_large = (means >= means[:, :1] * (1 - 1e-9)).sum(axis=1)
        return float((as_large <= extreme).mean() - power)

    return float(brentq(short, 0.0, 100.0, xtol=1e-3))


def _least(n: int) -> float:
    """The smallest p that the permutation test can give: both signs of the one extreme."""
    return 2 / min(1 << n, RESAMPLES + 1)
