"""How sparsity and drop fractions change over a run: pure functions of the step."""

from __future__ import annotations

import math

from methods.api import Cadence


def cubic_density(step: int, begin: int, end: int, final: float) -> float:
    """Density of the cubic ramp from dense (Zhu & Gupta, 2017, Eq. 1, with initial sparsity 0).

    s_t = s_f - s_f (1 - (t - t_0) / (t_end - t_0))^3, held at s_f from t_end on.

    Args:
        step: optimizer steps done.
        begin: step t_0 at which the ramp begins.
        end: step t_end at which it reaches `final` exactly.
        final: density 1 - s_f in (0, 1].
    """
    if step >= end:
        return final
    left = 1 - max(0, step - begin) / (end - begin)
    return 1 - (1 - final) * (1 - left**3)


def cosine_fraction(step: int, end: int, initial: float) -> float:
    """Drop fraction annealed to 0 (Evci et al., 2020, Eq. 1): alpha/2 (1 + cos(pi t / T_end))."""
    return initial / 2 * (1 + math.cos(math.pi * min(step, end) / end)) if end > 0 else 0.0


def portion(fraction: float, count: int) -> int:
    """A fraction of a count, rounded down; 0.7 of 90 is 63, not 62 by an error of the last bit."""
    return math.floor(fraction * count + 1e-9)


def spaced(every: int, span: int) -> int:
    """Steps between updates: `every`, but at most a twentieth of `span`.

    Papers quote periods for budgets of 10^4 to 10^5 steps; a shorter budget still has about 20.
    """
    return max(1, min(every, span // 20))


def ramp(begin: int, end: int, every: int) -> Cadence:
    """Updates from `begin` on, the last of them exactly at the end of the ramp.

    The end is moved down to a multiple of the period; the ramp reaches its final density at
    `ramp(...).stop - 1`.

    Args:
        begin: step of the first update.
        end: step at which the ramp should end.
        every: steps between updates, see `spaced`.
    """
    every = spaced(every, end - begin)
    return Cadence(every, begin, begin + (end - begin) // every * every + 1)
