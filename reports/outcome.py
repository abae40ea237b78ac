"""The answer of a check: value objects, the table for people and the same for programs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bench.errors import UsageError
from reports.footnotes import plural
from reports.markdown import section
from reports.tolerance import Tolerance

Status = Literal["fine", "regressed", "failed", "nothing"]
EXIT_CODES: dict[Status, int] = {"failed": 3, "regressed": 1, "nothing": 4, "fine": 0}
"""Worst first: a suite is as bad as its worst row."""

SHOWN = 100
"""Rows up to which a table shows those that are fine too: a comment holds 65,536 characters."""

WORDS = {"method", "model", "verdict"}
FIGURES = ("sparsity asked %", "n", "baseline", "now", "difference", "allowed", "train seconds")
HEADERS = ("method", "model", *FIGURES, "verdict")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the caller of a check sets.

    Attributes:
        floor: points of accuracy that a row may always fall; None for the tolerance's own.
        time: fraction by which training may take longer, such as 0.25; None: times do not matter.
    """

    floor: float | None = None
    time: float | None = None

    def __post_init__(self) -> None:
        for option, value in {"--floor": self.floor, "--time-tolerance": self.time}.items():
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{option} {value}: must be a finite number, 0 or more.")


DEFAULTS = Limits()


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the baseline beside the row that answers the same question now.

    Attributes:
        method: label, with the options.
        asked: sparsity in percent, as tables name it.
        status: None where the row is shown and holds the suite to nothing.
        reasons: for the status, in words.
        n_before: seeds that are ok in the baseline; `n` now.
        before: mean accuracy in percent in the baseline; `now` now.
        allowed: points that the mean may fall; None where no means are compared.
        seconds_before: mean training seconds of a seed in the baseline; `seconds` now.
        other_keys: a seed has another key than in the baseline.
        sigma: standard deviation of one run that `allowed` goes by; None where none is known.
    """

    method: str
    model: str
    asked: str
    status: Status | None
    reasons: tuple[str, ...]
    n_before: int = 0
    n: int = 0
    before: float | None = None
    now: float | None = None
    allowed: float | None = None
    seconds_before: float | None = None
    seconds: float | None = None
    other_keys: bool = False
    sigma: float | None = None

    @property
    def difference(self) -> float | None:
        """Points that the mean rose."""
        return None if self.before is None or self.now is None else self.now - self.before

    @property
    def unbounded(self) -> bool:
        """Whether no accuracy is low enough to have fallen by more than is allowed."""
        if self.allowed is None or self.before is None:
            return False
        return self.allowed >= self.before


@dataclass(frozen=True, slots=True)
class Outcome:
    """Answer of a check.

    Attributes:
        tolerance: what the means were held to; where rows differ in spread, a typical one.
        places: what the baseline was measured on, and what the records were.
    """

    suite: str
    status: Status
    lines: tuple[Line, ...]
    tolerance: Tolerance
    limits: Limits
    places: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def exit_code(self) -> int:
        """Exit status of the command line."""
        return EXIT_CODES[self.status]

    @property
    def table(self) -> str:
        """A markdown table of every row, fit for a comment on a pull request."""
        shown = self.lines
        if len(shown) > SHOWN:
            shown = tuple(line for line in shown if line.status != "fine")
        title = f"{self.suite}: {self.status}"
        return section(title, HEADERS, [cells(line) for line in shown], WORDS, notes(self))

    def as_dict(self) -> dict[str, object]:
        """The same for programs; see `Line` and `Tolerance` for the names."""
        sigma = self.tolerance.noise
        rows = [dataclasses.asdict(one) | {"difference": one.difference} for one in self.lines]
        return {
            "suite": self.suite,
            "status": self.status,
            "exit_code": self.exit_code,
            "sigma": sigma.sd if sigma else None,
            "freedom": sigma.freedom if sigma else 0,
            "critical": None if self.tolerance.differ else self.tolerance.critical,
            "floor": self.tolerance.floor,
            "rows_differ_in_spread": self.tolerance.differ,
            "time_tolerance": self.limits.time,
            "rows": rows,
        }


def cells(line: Line) -> list[str]:
    """One line of the table."""
    allowed = "any" if line.unbounded else number(None if line.allowed is None else -line.allowed)
    figures = [number(line.before), number(line.now), number(line.difference, "+"), allowed]
    seconds = f"{number(line.seconds_before)} -> {number(line.seconds)}"
    verdict = "; ".join(line.reasons) or "fine"
    seeds = f"{line.n_before} -> {line.n}"
    return [line.method, line.model, line.asked, seeds, *figures, seconds, verdict]


def number(value: float | None, sign: str = "") -> str:
    """Two decimals, or the mark for what was not measured."""
    return "-" if value is None else format(value, f"{sign}.2f")


def notes(outcome: Outcome) -> Iterator[str]:
    """What the columns mean and what limits the comparison."""
    counted = Counter(line.status or "not compared" for line in outcome.lines)
    parts = ", ".join(f"{count} {status}" for status, count in counted.items())
    yield f"{plural(len(outcome.lines), 'row')}: {parts or 'nothing to compare'}."
    if len(outcome.lines) > SHOWN and counted["fine"]:
        yield "rows that are fine are not shown."
    yield "n: seeds that are ok, in the baseline -> now; accuracy is their mean."
    yield allowed_note(outcome)
    if any(line.unbounded for line in outcome.lines):
        yield "any: noise explains a fall by more than the accuracy itself; no drop can be found."
    yield "parameters left and MACs must be equal, seed by seed."
    yield from time_notes(outcome)
    if other := sum(line.other_keys for line in outcome.lines):
        rows = plural(other, "row")
        yield f"{rows} with other keys than in the baseline: a version, recipe or data changed."


def allowed_note(outcome: Outcome) -> str:
    """How the column `allowed` comes about."""
    tolerance = outcome.tolerance
    noise, floor = tolerance.noise, f"{tolerance.floor:g} points"
    if noise is None:
        return f"allowed: {floor}; no row of the baseline has two seeds to know noise from."
    if noise.sd == 0:
        return f"allowed: {floor}; the seeds of every row of the baseline agree, so no noise shows."
    if not tolerance.differ:
        return (
            f"allowed: the larger of {floor} and {tolerance.critical:.2f} sigma sqrt(1/n + 1/m); "
            f"sigma, of one run, pooled over the rows: {noise.sd:.3f} "
            f"({noise.freedom:g} degrees of freedom)."
        )
    sigmas = [line.sigma for line in outcome.lines if line.sigma is not None]
    # No row has one where none has a seed that is ok both then and now.
    span = f" ({min(sigmas):.3f} to {max(sigmas):.3f})" if sigmas else ""
    return (
        f"allowed: the larger of {floor} and c sigma sqrt(1/n + 1/m); the rows differ in spread, "
        f"so each has its own sigma, of one run{span}: that of its seeds and, where this is not "
        f"far wider, with the weight of {noise.freedom:.1f} degrees of freedom the typical "
        f"{noise.sd:.3f} (Smyth 2004); c is the quantile of Student's t with the degrees of "
        f"freedom of both."
    )


def time_notes(outcome: Outcome) -> Iterator[str]:
    """What the column of seconds is held to, and whether it compares at all."""
    if outcome.limits.time is None:
        yield "train seconds, of one seed: shown, held to nothing (see --time-tolerance)."
    else:
        yield f"train seconds, of one seed: may rise by {outcome.limits.time:.0%}."
    before, now = outcome.places
    if before and now and before != now:
        yield f"measured on {' and '.join(now)}; the baseline on {' and '.join(before)}."
