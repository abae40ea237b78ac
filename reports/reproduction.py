"""The reproduction score: which published figures come out here, and why the others do not."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import msgspec

from reports import papers, specs
from reports.aggregate import Row
from reports.fields import FIELDS
from reports.footnotes import plural
from reports.markdown import section
from reports.matching import Ambiguous, Matcher, asked_method, read
from reports.papers import PublishedCell
from reports.protocol import reasons
from reports.specs import Question, TableSpec

FLOOR = Decimal("0.5")
"""Points by which a mean may always differ from a published figure."""

SCORED = ("accuracy", "error", "gain")
"""Figures of tables that are compared, in points; a published cell has one of them."""

UNVERIFIED = "the figure is remembered of the paper, not checked against it"

EXPLANATIONS = Path(__file__).parent / "explanations.toml"

Status = Literal["within", "outside", "no accuracy", "another protocol", "not run"]

RUN: tuple[Status, ...] = ("within", "outside", "no accuracy")
"""Of cells that count: run by the same protocol."""


class Explanation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a figure does not come out, found after it was run; names as in a table's spec."""

    table: str
    model: str
    method: str
    text: str
    target: str = ""


class Explanations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file of all of them."""

    explanation: tuple[Explanation, ...] = ()

    def find(self, table: str, question: Question) -> str:
        """The text for one cell; one without a target is for all of a method's."""
        asked = (table, question.model, question.column)
        found = (e for e in self.explanation if (e.table, e.model, e.method) == asked)
        fits = [e for e in found if e.target in ("", question.target)]
        return max(fits, key=lambda e: e.target).text if fits else ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One published figure, and what came out here.

    Attributes:
        table: name of the table that shows it.
        figure: `accuracy` in percent, `error`, or `gain` in points.
        published: as it is printed.
        tolerance: points by which the mean may differ: 0.5, or two published deviations.
        seeds: that have a figure.
        reasons: why ours follows another protocol; none where it is the same.
        explanation: why the figure does not come out.
    """

    table: str
    model: str
    method: str
    target: str
    figure: str
    published: Decimal
    tolerance: Decimal
    mean: float | None
    deviation: float | None
    seeds: int
    status: Status
    reasons: tuple[str, ...]
    explanation: str

    @property
    def difference(self) -> float | None:
        """Ours less the published one, in points."""
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
    """A figure for programs; numbers in percent or points."""
    return {
        "table": one.table,
        "model": one.model,
        "method": one.method,
        "target": one.target,
        "figure": one.figure,
        "published": float(one.published),
        "tolerance": float(one.tolerance),
        "mean": one.mean,
        "deviation": one.deviation,
        "seeds": one.seeds,
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
    seen: set[tuple[str, PublishedCell]] = set()
    return Score(tuple(one for spec in tables() for one in attempts(spec, records, known, seen)))


def tables() -> Iterator[TableSpec]:
    """The tables that have published figures."""
    for name in specs.names():
        spec = specs.load(name)
        if spec.table is not None and spec.table.cells:
            yield spec


def attempts(
    spec: TableSpec,
    records: Path,
    known: Explanations,
    seen: set[tuple[str, PublishedCell]],
) -> Iterator[Attempt]:
    """The figures of one table that no table before it had."""
    assert spec.paper is not None
    assert spec.table is not None
    matcher = Matcher(spec, read(records, spec))
    for question in (question for line in spec.lines for question in line):
        cell = question.published
        if cell is None or (place := (spec.paper.arxiv, cell)) in seen:
            continue
        figure = next((f for f in SCORED if f in spec.figures and FIELDS[f].published(cell)), "")
        if figure:
            seen.add(place)
            yield attempt(spec, question, figure, found(matcher, question), known)


def found(matcher: Matcher, question: Question) -> Row | None:
    """The row of the paper's protocol, or another; None where several others would do."""
    try:
        return matcher.row(question)
    except Ambiguous:
        return None


def attempt(
    spec: TableSpec, question: Question, figure: str, row: Row | None, known: Explanations
) -> Attempt:
    """One figure beside its row."""
    cell = question.published
    assert cell is not None
    own = (UNVERIFIED,) * cell.unverified
    published = papers.decimal(FIELDS[figure].published(cell))
    tolerance = max(FLOOR, 2 * papers.decimal(cell.deviation or "0"))
    values = list(FIELDS[figure].samples(row, None).values())
    mean = statistics.fmean(values) if values else None
    why = (*own, *reasons(spec, question, row))
    return Attempt(
        table=spec.name,
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
        reasons=why,
        explanation=known.find(spec.name, question),
    )


def status(
    row: Row | None,
    why: tuple[str, ...],
    mean: float | None,
    published: Decimal,
    tolerance: Decimal,
) -> Status:
    """What came of a figure; a row of which some seed diverged or is invalid has no accuracy."""
    if row is None or not row.finished:
        return "not run"
    if why:
        return "another protocol"
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
    return "\n".join([board(score), section(title, headers, lines, {*CELL, headers[-1]}, ())])


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
    lines = [[*line(one), one.status] for one in score.attempts if one.status in RUN]
    return [*CELL, *FIGURES, "status"], lines


CELL = ("table", "model", "method", "target")
"""Headers of a cell's names; `line` begins with them."""

FIGURES = ("figure", "published", "tolerance", "ours", "n", "difference")
"""Headers of what `line` shows after these."""


def line(one: Attempt) -> list[str]:
    """A figure in a table."""
    ours = "-" if one.mean is None else f"{one.mean:.2f}"
    if one.deviation is not None:
        ours += f" ± {one.deviation:.2f}"
    apart = "-" if one.difference is None else f"{one.difference:+.2f}"
    cell = [one.table, one.model, one.method, one.target]
    return [*cell, one.figure, str(one.published), str(one.tolerance), ours, str(one.seeds), apart]


def notes(score: Score) -> Iterator[str]:
    """How the score is taken, and why figures do not come out."""
    ran = [one for one in score.attempts if one.status in RUN]
    yield (
        "score: of the published figures that were run by the same protocol, the share whose mean "
        "over seeds lies within max(0.5 points, 2 published standard deviations). Whether the "
        "protocol is the same was decided for each figure before it was run."
    )
    yield "accuracy: last step on the test set, mean ± standard deviation over n seeds."
    if any(one.figure == "gain" for one in ran):
        yield "gain: accuracy above the dense network's, both at the step of least validation loss."
    for one in ran:
        if one.status != "within":
            yield f"{one.name}: {one.explanation or 'not explained yet'}."
    yield f"{waiting(score)}."


def waiting(score: Score) -> str:
    """How many figures were not run, or by another protocol only."""
    counts = Counter(one.status for one in score.attempts)
    return (
        f"of {plural(len(score.attempts), 'published figure')} {counts['not run']} were not run, "
        f"and {counts['another protocol']} by another protocol only "
        "(`sparsebench reproduction` lists these)"
    )
