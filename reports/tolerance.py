"""How far a mean may fall before it is more than the noise of the seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reports.statistics import Pooled, findable, pool, quantile

ALARM = 0.018
"""Probability that noise alone fails a suite, however many rows it has."""

POWER = 0.95
"""Probability with which the smallest drop that is told is found."""

FLOOR = 0.05
"""Points that a mean may always fall: seeds that agree exactly do not agree on every machine."""

BLIND = 0.5
"""Points that a mean may fall where no row has two seeds to know noise from."""

SUSPECT = 0.001
"""P-value from which down a row spreads more than the suite does, by the F test."""

Deviation = tuple[int, float | None]
"""Number of a row's values, and their standard deviation; None below two."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What every row of a suite may lose.

    The means of n and m seeds differ by noise with the standard error sigma sqrt(1/n + 1/m). Rows
    may fall by as many of these as Student's t, with sigma's degrees of freedom, exceeds in any of
    `rows` comparisons with probability `ALARM` (Sidak 1967): a fixed three standard errors would
    raise a false alarm the more often the more rows there are and the fewer seeds tell sigma.

    Attributes:
        noise: standard deviation of one run; None where no row of the baseline has two seeds.
        rows: that are compared.
        least: points that a mean may always fall; None takes `FLOOR`, or `BLIND` without noise.
    """

    noise: Pooled | None
    rows: int
    least: float | None = None

    @property
    def floor(self) -> float:
        """Points that a mean may always fall."""
        return self.least if self.least is not None else BLIND if self.noise is None else FLOOR

    @property
    def critical(self) -> float:
        """Standard errors that a mean may fall; 0 without noise."""
        if self.noise is None:
            return 0.0
        return quantile((1 - ALARM) ** (1 / max(1, self.rows)), self.noise.freedom)

    def error(self, n: int, m: int) -> float:
        """Standard error of the difference of two means, in points."""
        return self.noise.sd * math.sqrt(1 / n + 1 / m) if self.noise else 0.0

    def allowed(self, n: int, m: int) -> float:
        """Points that the mean of m seeds may lie below that of n."""
        return max(self.floor, self.critical * self.error(n, m))

    def smallest_drop(self, n: int, m: int) -> float | None:
        """Points that a mean has to fall to be found with probability `POWER`; None: not known."""
        if self.noise is None:
            return None
        error, freedom = self.error(n, m), self.noise.freedom
        return findable(error, freedom, self.critical, POWER, self.floor)


def noise(before: Iterable[Deviation], now: Iterable[Deviation] = ()) -> Pooled | None:
    """Standard deviation of one run, pooled over the rows of the baseline and of now.

    Now's rows double the degrees of freedom, without which 5 seeds of 12 rows could not both keep
    quiet and find a drop of 3 sigma. But what broke must not widen its own tolerance: a row of now
    that spreads more than the baseline does, by an F test, is left out.

    Returns:
        None where no row of the baseline has two seeds.
    """
    known = pool(_freedoms(before))
    if known is None:
        return None
    sound = [(freedom, sd) for freedom, sd in _freedoms(now) if _p(freedom, sd, known) >= SUSPECT]
    return pool([(known.freedom, known.sd), *sound])


def tolerances(
    before: Sequence[Deviation], now: Sequence[Deviation], least: float | None = None
) -> tuple[Tolerance, list[Tolerance]]:
    """The suite's tolerance, and that of each row: the suite's, or a `wild` row's own.

    Args:
        before: of each row of the baseline.
        now: of the rows that answer them; (0, None) for one that is missing.
        least: points that a mean may always fall, see `Tolerance`.
    """
    rows = sum(bool(n and m) for (n, _), (m, _) in zip(before, now, strict=True))
    apart = wild(before)
    calm = [place for place in range(len(before)) if place not in apart]
    sigma = noise([before[place] for place in calm], [now[place] for place in calm])
    suite = Tolerance(sigma, rows, least)
    own = {place: noise([before[place]], [now[place]]) for place in apart}
    return suite, [
        Tolerance(own[place], rows, least) if place in apart else suite
        for place in range(len(before))
    ]


def wild(deviations: Sequence[Deviation]) -> set[int]:
    """Places of the rows that spread more than the suite does, by an F test, the worst first.

    One such row would hide what the others lose, and raise false alarms itself: it is no part of
    the suite's sigma and is held to its own.
    """
    calm = {place: (n - 1, sd) for place, (n, sd) in enumerate(deviations) if sd is not None}
    found: set[int] = set()
    while (known := pool(calm.values())) is not None:
        suspects = {place: _p(*of_row, known) for place, of_row in calm.items()}
        worst = min(suspects, key=suspects.__getitem__)
        if suspects[worst] >= SUSPECT:
            break
        found.add(worst)
        del calm[worst]
    return found


def _freedoms(deviations: Iterable[Deviation]) -> list[tuple[int, float]]:
    return [(n - 1, sd) for n, sd in deviations if sd is not None]


def _p(freedom: int, sd: float, known: Pooled) -> float:
    """Probability that a row spreads this much, or more, by chance."""
    from scipy.special import fdtrc  # type: ignore[import-untyped]

    if known.sd == 0:
        return float(sd == 0)
    return float(fdtrc(freedom, known.freedom, (sd / known.sd) ** 2))
