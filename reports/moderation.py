"""Rows that differ in spread: whether they do, and what each can borrow from the others.

A few seeds hardly know their own spread. Where all rows have the same, pooling makes one good
estimate of many poor ones; where they do not, each row's own is drawn towards the typical one, the
less the more the rows differ: Smyth 2004, "Linear models and empirical Bayes methods for assessing
differential expression in microarray experiments" (the method of limma).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reports.statistics import Pooled, pool

UNEQUAL, OUTLYING = 0.01, 0.05
"""P-values below which rows differ in spread: of Bartlett's test, and of the row that stands out.

The first sees rows that all differ a little, the second one or two among many that are alike."""

WIDE = 0.05
"""P-value below which a row spreads too widely to be drawn towards the typical one."""

LEAST = 0.01
"""Of the median variance, below which none counts: rounded accuracies can agree by chance."""


def estimates(
    own: Sequence[Pooled | None], once: Sequence[Pooled]
) -> tuple[list[Pooled | None], Pooled | None]:
    """The standard deviation of one run of each row, and the typical one where rows differ.

    Where they do not, all have the pooled one. Where they do, each has its own, moderated; a row
    that spreads much more than is typical has its own alone, as drawing it down raises alarms.

    Args:
        own: of each row; None where it has no two seeds.
        once: of the rows, with the degrees of freedom that no earlier row has.

    Returns:
        None for every row where none has two seeds.
    """
    together = pool((one.freedom, one.sd) for one in once)
    typical = prior(once) if differ(once) else None
    if together is None or typical is None:
        return [together] * len(own), None
    rest = together.freedom
    return [
        one
        if one and exceeds(one, Pooled(typical.sd, max(1, rest - one.freedom))) < WIDE
        else moderate(one, typical, rest)
        for one in own
    ], typical


def differ(sds: Sequence[Pooled]) -> bool:
    """Whether rows differ in spread by more than chance."""
    return equal_spread(sds) < UNEQUAL or none_outlying(sds) < OUTLYING


def exceeds(own: Pooled, known: Pooled) -> float:
    """P-value of the F test that a row spreads no more than what is known."""
    from scipy.special import fdtrc  # type: ignore[import-untyped]

    if known.sd == 0:
        return float(own.sd == 0)
    return float(fdtrc(own.freedom, known.freedom, (own.sd / known.sd) ** 2))


def none_outlying(sds: Sequence[Pooled]) -> float:
    """P-value of Cochran's test (1941) that no row spreads more than the rest.

    By the F test of each against the others, corrected for their number (Sidak 1967).
    """
    known = _raised(sds)
    if len(known) < 2:
        return 1.0
    freedom = math.fsum(one.freedom for one in known)
    squares = math.fsum(one.freedom * one.sd**2 for one in known)
    least = 1.0
    for one in known:
        others = freedom - one.freedom
        rest = max(0.0, squares - one.freedom * one.sd**2) / others
        least = min(least, exceeds(one, Pooled(math.sqrt(rest), others)))
    return float(1 - (1 - least) ** len(known))


def equal_spread(sds: Sequence[Pooled]) -> float:
    """P-value of Bartlett's test (1937) that these deviations estimate the same one.

    The corrected statistic of `scipy.stats.bartlett`, which takes values and not deviations. 1
    where there is nothing to tell apart.
    """
    from scipy.special import chdtrc

    known = _raised(sds)
    if len(known) < 2:
        return 1.0
    total = math.fsum(one.freedom for one in known)
    pooled = math.fsum(one.freedom * one.sd**2 for one in known) / total
    apart = math.fsum(one.freedom * math.log(pooled / one.sd**2) for one in known)
    inverse = math.fsum(1 / one.freedom for one in known) - 1 / total
    return float(chdtrc(len(known) - 1, max(0.0, apart) / (1 + inverse / (3 * (len(known) - 1)))))


def prior(sds: Sequence[Pooled]) -> Pooled | None:
    """The typical deviation, and how many degrees of freedom it is worth to a row.

    From the mean and variance of the logarithms of the variances (Smyth 2004, section 6.2).

    Returns:
        None where they scatter no more than estimates of one variance do.
    """
    import numpy as np
    from scipy.special import digamma, polygamma

    known = _raised(sds)
    if len(known) < 2:
        return None
    halves = np.array([one.freedom / 2 for one in known])
    logs = np.array([2 * math.log(one.sd) for one in known]) - digamma(halves) + np.log(halves)
    excess = float(logs.var(ddof=1) - polygamma(1, halves).mean())
    if excess <= 0:
        return None
    half = _inverse_trigamma(excess)
    center = float(logs.mean() + digamma(half)) - math.log(half)
    return Pooled(math.exp(center / 2), 2 * half)


def moderate(own: Pooled | None, typical: Pooled, most: float) -> Pooled:
    """A row's variance, weighed by degrees of freedom with the typical one (Smyth 2004, eq. 6.1).

    Args:
        own: of the row; None where it has no two seeds.
        typical: see `prior`.
        most: degrees of freedom of all rows together, more than which no row can know.
    """
    if own is None:
        return Pooled(typical.sd, min(typical.freedom, most))
    freedom = own.freedom + typical.freedom
    squares = own.freedom * own.sd**2 + typical.freedom * typical.sd**2
    return Pooled(math.sqrt(squares / freedom), min(freedom, most))


def _raised(sds: Sequence[Pooled]) -> list[Pooled]:
    """Those that are known, none so small that its logarithm would outweigh all others."""
    known = [one for one in sds if one.freedom > 0]
    scattered = sorted(one.sd for one in known if one.sd > 0)
    if not scattered:
        return []
    least = math.sqrt(LEAST) * scattered[len(scattered) // 2]
    return [Pooled(max(one.sd, least), one.freedom) for one in known]


def _inverse_trigamma(value: float) -> float:
    """Where the trigamma function has this value, by Newton's method (Smyth 2004, appendix)."""
    from scipy.special import polygamma

    found = 0.5 + 1 / value
    for _ in range(50):
        here = float(polygamma(1, found))
        step = here * (1 - here / value) / float(polygamma(2, found))
        found += step
        if -step / found < 1e-8:
            break
    return found
