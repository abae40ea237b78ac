"""How far a mean may fall before it is more than the noise of the seeds."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from reports.moderation import estimates, exceeds
from reports.statistics import Pooled, findable, pool, quantile

ALARM = 0.018
"""Probability that noise alone fails a suite, however many rows it has."""

POWER = 0.95
"""Probability with which the smallest drop that is told is found."""

FLOOR = 0.05
"""Points that a mean may always fall: seeds that agree exactly do not agree on every machine."""

BLIND = 0.5
"""Points that a mean may fall where nothing tells noise: no row has two seeds, or all agree.

A test set may be too small to show noise: one image of 200 is half a point."""

SUSPECT = 0.001
"""P-value below which a row spreads more now than it did, by the F test."""


@dataclass(frozen=True, slots=True)
class Spread:
    """What the seeds of a row tell of noise.

    Attributes:
        n: its values.
        sd: their standard deviation; None below two.
        counted: degrees of freedom that no earlier row has; rows can share cells.
    """

    n: int
    sd: float | None
    counted: int

    @property
    def own(self) -> Pooled | None:
        """The row's own estimate."""
        return None if self.sd is None else Pooled(self.sd, self.n - 1)


UNKNOWN = Spread(0, None, 0)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What rows may lose.

    The means of n and m seeds differ by noise with the standard error sigma sqrt(1/n + 1/m). Rows
    may fall by as many of these as Student's t, with sigma's degrees of freedom, exceeds in any of
    `rows` comparisons with probability `ALARM` (Sidak 1967): a fixed three standard errors would
    raise a false alarm the more often the more rows there are and the fewer seeds tell sigma.

    Attributes:
        noise: standard deviation of one run; None where no row of the baseline has two seeds.
        rows: that are compared.
        least: points that a mean may always fall; None takes `FLOOR`, or `BLIND` without noise.
        differ: the rows differ in spread, and `noise` is one row's, or the typical one.
    """

    noise: Pooled | None
    rows: int
    least: float | None = None
    differ: bool = False

    @property
    def floor(self) -> float:
        """Points that a mean may always fall."""
        known = self.noise is not None and self.noise.sd > 0
        return self.least if self.least is not None else FLOOR if known else BLIND

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
        """Points that a fall needs to be found with probability `POWER`; None: no noise known."""
        if self.noise is None or self.noise.sd == 0:
            return None
        error, freedom = self.error(n, m), self.noise.freedom
        return findable(error, freedom, self.critical, POWER, self.floor)


def spreads(rows: Iterable[tuple[Collection[str], float | None]]) -> list[Spread]:
    """What rows tell of noise, each cell counted once.

    Args:
        rows: keys of the cells that are ok, and the standard deviation of their accuracies.
    """
    seen: set[str] = set()
    found = []
    for keys, sd in rows:
        new = len(set(keys) - seen)
        seen |= set(keys)
        found.append(Spread(len(keys), sd, max(0, min(len(keys) - 1, new))))
    return found


def tolerances(
    before: Sequence[Spread], now: Sequence[Spread], least: float | None = None
) -> tuple[Tolerance, list[Tolerance]]:
    """The suite's tolerance, and that of each row: the suite's, unless rows differ in spread.

    Now's rows double the degrees of freedom, without which 5 seeds of 12 rows could not both keep
    quiet and find a drop of 3 sigma. But what broke must not widen its own tolerance: a row of now
    that spreads more than the baseline lets it, by an F test, is left out.

    Args:
        before: of each row of the baseline.
        now: of the rows that answer them; `UNKNOWN` for one that is missing.
        least: points that a mean may always fall, see `Tolerance`.
    """
    rows = sum(bool(one.n and other.n) for one, other in zip(before, now, strict=True))
    then, _ = _noise([[one] for one in before])
    sides = [
        [one, other] if _sound(other, known) else [one]
        for one, other, known in zip(before, now, then, strict=True)
    ]
    sigmas, typical = _noise(sides) if any(then) else (then, None)
    if typical is None:
        suite = Tolerance(sigmas[0] if sigmas else None, rows, least)
        return suite, [suite] * len(sigmas)
    suite = Tolerance(typical, rows, least, differ=True)
    return suite, [Tolerance(sigma, rows, least, differ=True) for sigma in sigmas]


def _noise(rows: Sequence[Sequence[Spread]]) -> tuple[list[Pooled | None], Pooled | None]:
    """See `estimates`; of each row, the sides that are pooled."""
    own = [
        pool((side.own.freedom, side.own.sd) for side in sides if side.own is not None)
        for sides in rows
    ]
    once = [
        counted
        for sides in rows
        if (counted := pool((side.counted, side.sd) for side in sides if side.sd is not None))
    ]
    return estimates(own, once)


def _sound(now: Spread, known: Pooled | None) -> bool:
    """Whether a row spreads no more than the baseline lets it."""
    return now.own is None or (known is not None and exceeds(now.own, known) >= SUSPECT)
