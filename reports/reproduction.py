"""The reproduction score: which published figures come out here, and why the others do not."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import msgspec

from bench.errors import SuiteError
from reports import papers, specs
from reports.aggregate import CellStatus, Row
from reports.fields import FIELDS
from reports.footnotes import MARKS, plural
from reports.markdown import section
from reports.matching import Matcher, asked_method, asks_for, read
from reports.papers import PublishedCell
from reports.protocol import reasons
from reports.specs import Question, TableSpec
from reports.suite_table import marks

FLOOR = Decimal("0.5")
"""Points by which a mean may always differ from a published figure."""

SCORED = ("accuracy", "error", "gain")
"""Figures of tables that are compared, in points; a published cell has one of them at most."""

UNSCORED = ("earlier", "compression")
"""Figures that are shown beside ours and do not count: no tolerance in points fits them."""

UNVERIFIED = "the figure is remembered of the paper, not checked against it"

EXPLANATIONS = Path(__file__).parent / "explanations.toml"

Status = Literal["within", "outside", "no accuracy", "not scored", "another protocol", "not run"]

RUN: tuple[Status, ...] = ("within", "outside", "no accuracy")
"""Of cells that count: run by the same protocol."""

SHOWN: tuple[Status, ...] = (*RUN, "not scored")
"""Of cells that stand below the score."""


class Explanation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a figure does not come out, found after it was run; names as in a table's spec."""

    table: str
    model: str
    method: str
    text: str
    target: str = ""
    figure: str = ""

    @property
    def name(self) -> str:
        """What it explains."""
        parts = (self.table, self.method, self.model, self.target, self.figure)
        return ", ".join(filter(None, parts))

    def explains(self, one: Attempt) -> bool:
        """Whether it is of this figure; one without a target is for all of a method's."""
        return (
            (self.table, self.model, self.method) == (one.table, one.model, one.method)
            and self.target in ("", one.target)
            and self.figure in ("", one.figure)
        )


class Explanations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file of all of them."""

    explanation: tuple[Explanation, ...] = ()

    def explained(self, found: Sequence[Attempt]) -> Iterator[Attempt]:
        """The figures with their explanations, of several the one that says more of where.

        Raises:
            SuiteError: one is of no published figure; names it.
        """
        for one in self.explanation:
            if not any(one.explains(attempt) for attempt in found):
                where = f"{EXPLANATIONS.name}: {one.name}"
                raise SuiteError(f"{where}: no published figure is called so.")
        for attempt in found:
            fits = [one for one in self.explanation if one.explains(attempt)]
            best = max(fits, key=lambda one: (one.target, one.figure), default=None)
            yield dataclasses.replace(attempt, explanation=best.text if best else "")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One published figure, and what came out here.

    Attributes:
        table: name of the table that shows it.
        figure: `accuracy` in percent, `error`, or `gain` in points; or a name in `UNSCORED`.
        published: as it is printed.
        tolerance: points by which the mean may differ: 0.5, or two published deviations; None for
            what is not in points.
        seeds: that have a figure.
        reasons: why ours follows another protocol; none where it is the same.
        explanation: why the figure does not come out.
        statuses: of the seeds that were asked for; none where no row fits.
    """

    table: str
    dataset: str
    model: str
    method: str
    target: str
    figure: str
    published: Decimal
    tolerance: Decimal | None
    mean: float | None
    deviation: float | None
    seeds: int
    status: Status
    reasons: tuple[str, ...]
    explanation: str = ""
    statuses: tuple[CellStatus, ...] = ()

    @property
    def difference(self) -> float | None:
        """Ours less the published one, in the figure's unit."""
        return None if self.mean is None else self.mean - float(self.published)

    @property
    def name(self) -> str:
        """The cell in words."""
        return ", ".join(filter(None, (self.table, self.method, self.model, self.target)))


@dataclass(frozen=True, slots=True)
class Score:
    """What came of every published figure."""

    attempts: tuple[Attempt, ...]

    @property
    def run(self) -> int:
        """Figures that were run by the same protocol."""
        return sum(one.status in RUN for one in self.attempts)

    @property
    def within(self) -> int:
        """Those of them whose mean lies within the tolerance."""
        return sum(one.status == "within" for one in self.attempts)

    @property
    def score(self) -> float | None:
        """The share of these; None while nothing was run."""
        return self.within / self.run if self.run else None

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "run": self.run,
            "within": self.within,
            "score": self.score,
            "cells": [as_dict(one) for one in self.attempts],
        }


def as_dict(one: Attempt) -> dict[str, Any]:
    """A figure for programs; numbers in its unit, null where there is none."""
    return {
        "table": one.table,
        "dataset": one.dataset,
        "model": one.model,
        "method": one.method,
        "target": one.target,
        "figure": one.figure,
        "published": float(one.published),
        "tolerance": None if one.tolerance is None else float(one.tolerance),
        "mean": one.mean,
        "deviation": one.deviation,
        "seeds": one.seeds,
        "diverged": one.statuses.count("diverged"),
        "invalid": one.statuses.count("invalid"),
        "difference": one.difference,
        "status": one.status,
        "reasons": list(one.reasons),
        "explanation": one.explanation,
    }


def reproduction(records: Path) -> Score:
    """Every published figure of our tables, each once, beside what records have.

    Args:
        records: folder of all suites' records.

    Raises:
        RecordError: there are none, or one is damaged or was edited; names the file.
    """
    known = papers.convert(papers.read(EXPLANATIONS), Explanations, EXPLANATIONS.name)
    seen: set[tuple[str, PublishedCell, str]] = set()
    found = [one for spec in tables() for one in attempts(spec, records, seen)]
    return Score(tuple(known.explained(found)))


def tables() -> Iterator[TableSpec]:
    """The tables that have published figures."""
    for name in specs.names():
        spec = specs.load(name)
        if spec.table is not None and spec.table.cells:
            yield spec


def attempts(
    spec: TableSpec, records: Path, seen: set[tuple[str, PublishedCell, str]]
) -> Iterator[Attempt]:
    """The figures of one table that no table before it had."""
    assert spec.paper is not None
    assert spec.table is not None
    matcher = Matcher(spec, read(records, spec))
    for question in (question for line in spec.lines for question in line):
        cell = question.published
        if cell is None:
            continue
        shown = [f for f in spec.figures if FIELDS[f].published(cell)]
        scored = [f for f in SCORED if f in shown][:1]
        for figure in (*scored, *(f for f in UNSCORED if f in shown)):
            # An accuracy in one table may stand as an error in another.
            place = (spec.paper.arxiv, cell, figure if figure in UNSCORED else "")
            if place not in seen:
                seen.add(place)
                yield attempt(spec, question, figure, matcher)


def closest(spec: TableSpec, question: Question, matcher: Matcher) -> tuple[Row | None, list[str]]:
    """The row that answers a published figure, and what differs from the paper's protocol.

    Of several the one that differs least.
    """
    found = matcher.candidates(question, lambda row: asks_for(row.spec, question.sparsity))
    known = [(one.row, list(reasons(spec, question, one.row))) for one in found]
    if not known:
        return None, list(reasons(spec, question, None))
    row, why = min(known, key=lambda pair: len(pair[1]))
    if row.finished and sum(len(others) == len(why) for _, others in known) > 1:
        suites = " and ".join(dict.fromkeys(suite for one in found for suite in one.suites))
        why.append(f"several rows of {suites} fit")
    return row, why


def attempt(spec: TableSpec, question: Question, figure: str, matcher: Matcher) -> Attempt:
    """One figure beside its row."""
    cell = question.published
    assert cell is not None
    row, why = closest(spec, question, matcher)
    if cell.unverified:
        why.insert(0, UNVERIFIED)
    published = papers.decimal(FIELDS[figure].published(cell))
    allowed = max(FLOOR, 2 * papers.decimal(cell.deviation or "0"))
    tolerance = None if figure in UNSCORED else allowed
    values = list(FIELDS[figure].samples(row, None).values())
    mean = statistics.fmean(values) if values else None
    return Attempt(
        table=spec.name,
        dataset=spec.dataset,
        model=question.model,
        method=question.column,
        target="" if asked_method(question) == "dense" else question.target,
        figure=figure,
        published=published,
        tolerance=tolerance,
        mean=mean,
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        seeds=len(values),
        status=status(row, why, mean, published, tolerance),
        reasons=tuple(why),
        statuses=() if row is None else row.statuses,
    )


def status(
    row: Row | None,
    why: Sequence[str],
    mean: float | None,
    published: Decimal,
    tolerance: Decimal | None,
) -> Status:
    """What came of a figure; a row of which some seed diverged or is invalid has no accuracy."""
    if row is None or not row.finished:
        return "not run"
    if why:
        return "another protocol"
    if tolerance is None:
        return "not scored"
    if mean is None or any(record.status != "ok" for record in row.finished):
        return "no accuracy"
    # Written with ten digits, so that a difference of exactly the tolerance is within it.
    apart = abs(round(Decimal(mean), 10) - published)
    return "within" if apart <= tolerance else "outside"


def report(score: Score) -> str:
    """The score in markdown, and below it the figures that were run by another protocol."""
    other = [one for one in score.attempts if one.status == "another protocol"]
    if not other:
        return board(score)
    lines = [[*line(one), "; ".join(one.reasons)] for one in other]
    headers = [*CELL, *FIGURES, "what differs"]
    title = "Published figures that were run by another protocol"
    below = section(title, headers, lines, {*CELL, headers[-1]}, lost(other))
    return "\n".join([board(score), below])


def board(score: Score) -> str:
    """The score in markdown, with the figures that it is taken from."""
    if score.score is None:
        return f"## {heading(score)}\n\n- {waiting(score)}.\n"
    headers, lines = table(score)
    return section(heading(score), headers, lines, {*CELL, "status"}, notes(score))


def heading(score: Score) -> str:
    """The score in a line."""
    if score.score is None:
        return "Reproduction score: not run"
    return f"Reproduction score: {100 * score.score:.0f} % ({score.within} of {score.run})"


def table(score: Score) -> tuple[list[str], list[list[str]]]:
    """Headers and lines of the figures that were run."""
    lines = [[*line(one), one.status] for one in score.attempts if one.status in SHOWN]
    return [*CELL, *FIGURES, "status"], lines


CELL = ("table", "model", "method", "target")
"""Headers of a cell's names; `line` begins with them."""

FIGURES = ("figure", "published", "tolerance", "ours", "n", "difference")
"""Headers of what `line` shows after these."""


def line(one: Attempt) -> list[str]:
    """A figure in a table."""
    mean = "" if one.mean is None else f"{one.mean:.2f}"
    if one.deviation is not None:
        mean += f" ± {one.deviation:.2f}"
    ours = ", ".join(filter(None, (mean, *marks(one.statuses)))) or "-"
    apart = "-" if one.difference is None else f"{one.difference:+.2f}"
    cell = [one.table, one.model, one.method, one.target]
    allowed = "-" if one.tolerance is None else str(one.tolerance)
    return [*cell, one.figure, str(one.published), allowed, ours, str(one.seeds), apart]


MEANINGS = {
    "accuracy": "accuracy, error: last step on the test set.",
    "gain": "gain: accuracy above the dense network's, both at the step of least validation loss.",
    "earlier": "earlier: % of the dense network's steps by which that step is sooner; not scored.",
    "compression": "compression: prunable weights over those left; not scored.",
}


def notes(score: Score) -> Iterator[str]:
    """How the score is taken, and why figures do not come out."""
    ran = [one for one in score.attempts if one.status in SHOWN]
    yield (
        "score: of the published figures that were run by the same protocol, the share whose mean "
        "over seeds lies within max(0.5 points, 2 published standard deviations). Whether the "
        "protocol is the same was decided for each of them before it was first run."
    )
    yield "ours: mean ± standard deviation over n seeds."
    yield "target: sparsity, or the part of the weights that is left, as the paper's table has it."
    yield from lost(ran)
    figures = {"accuracy" if one.figure == "error" else one.figure for one in ran}
    yield from (text for figure, text in MEANINGS.items() if figure in figures)
    if any(one.figure == "gain" and abs(one.published) <= FLOOR for one in ran):
        yield f"a gain of {FLOOR} points or less is within the tolerance even where there is none."
    for one in ran:
        if one.explanation or one.status not in ("within", "not scored"):
            yield f"{one.name}: {one.explanation or 'not explained yet'}."
    yield f"{waiting(score)}."


def lost(shown: Sequence[Attempt]) -> Iterator[str]:
    """What the marks of seeds without a figure mean."""
    statuses = {status for one in shown for status in one.statuses}
    yield from (text for status, text in MARKS.items() if status in statuses)


def waiting(score: Score) -> str:
    """How many figures were not run, or by another protocol only."""
    counts = Counter(one.status for one in score.attempts)
    on = Counter(one.dataset for one in score.attempts if one.status == "not run")
    where = ", ".join(f"{name} {count}" for name, count in sorted(on.items()))
    return (
        f"of {plural(len(score.attempts), 'published figure')} {counts['not run']} were not run"
        f"{f' ({where})' if where else ''}, and {counts['another protocol']} by another protocol "
        "only (`sparsebench reproduction` lists these)"
    )
