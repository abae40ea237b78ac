"""A table's spec and the records that answer it, joined into a grid of cells."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.store import Store
from reports.aggregate import Row
from reports.cells import Asked, Cell, Figure, Grid, Line, Plan
from reports.fields import FIELDS, Field
from reports.grid_notes import Below, lettered, notes
from reports.matching import Ambiguous, Contradiction, Found, Matcher, from_manifest, read
from reports.papers import PublishedCell
from reports.protocol import reasons
from reports.ranking import noises, ranked, sizes, widest
from reports.specs import Question, TableSpec, load, names

__all__ = ["Found", "Grid", "build", "filled"]


def build(spec: TableSpec, records: Path | Iterable[Found], statistics: bool = False) -> Grid:
    """A table with what records have for it.

    Args:
        spec: the table.
        records: folder of all suites' records, or what was found in some.
        statistics: also tells which differences are more than noise.

    Raises:
        RecordError: a record is damaged or was edited, or two suites hold different results of one
            cell; names the files.
        UsageError: several rows of records fit one cell; says what tells them apart.
    """
    found = read(records, spec) if isinstance(records, Path) else tuple(records)
    plan = planned(spec, Matcher(spec, found))
    cells, letters = lettered([[cell_of(spec, asked) for asked in line] for _, line in plan])
    noise = noises(plan, cells) if statistics else None
    cells = ranked(spec, plan, cells, noise)
    below = Below(
        spec,
        found,
        [asked for _, line in plan for asked in line],
        [cell for line in cells for cell in line],
        letters,
        noise,
        tuple(sizes(spec, plan, cells)),
        widest(plan, cells) if statistics else ((), 0.0),
    )
    is_grid = spec.layout == "methods"
    return Grid(
        name=spec.name,
        title=spec.title,
        heads=heads(spec),
        columns=spec.columns if is_grid else tuple(FIELDS[name].header for name in spec.columns),
        lines=tuple(Line(words, tuple(line)) for (words, _), line in zip(plan, cells, strict=True)),
        notes=tuple(notes(below, published=False)),
        published_notes=tuple(notes(below, published=True)),
    )


def filled(sources: Iterable[Store]) -> Iterator[Grid]:
    """Every table of ours that these suites have more for than dense networks.

    One that is ambiguous, or for which two suites have different results of a cell, is left out:
    it takes a spec with filters of its own.

    Raises:
        RecordError: a record is damaged or was edited; names the file.
    """
    manifests = [(source, source.manifest()) for source in sources]
    for name in names():
        spec = load(name)
        found = [one for s, m in manifests if (one := from_manifest(s, m, spec)).rows]
        if any(row.finished for one in found for row in one.rows):
            with contextlib.suppress(Ambiguous, Contradiction):
                grid = build(spec, found)
                if grid.has_records:
                    yield grid


def heads(spec: TableSpec) -> tuple[str, ...]:
    """Headers of the columns that name a line."""
    named = ("model", spec.heading, "" if spec.layout == "methods" else "method")
    return tuple(filter(None, named))


def planned(spec: TableSpec, matcher: Matcher) -> Plan:
    """What stands in each line; a question of rounds has a line for each."""
    plan: Plan = []
    cache: dict[object, Row | None] = {}

    def row(question: Question) -> Row | None:
        sought = question.sought
        if sought not in cache:
            cache[sought] = matcher.row(question) if question.method else None
        return cache[sought]

    for line, baseline in zip(spec.lines, spec.baselines, strict=True):
        dense = row(baseline) if any(FIELDS[n].of != "row" for n in spec.figures) else None
        first = line[0]
        words = (first.model, *([first.target] if spec.heading else []))
        if spec.layout == "methods":
            figure = FIELDS[spec.figure]
            plan.append((words, [Asked(figure, one, row(one), dense) for one in line]))
            continue
        rows: Sequence[Row | None] = [None]
        if spec.layout == "rounds":
            rows = matcher.rounds(first) or [None]
        elif first.method:
            rows = [row(first)]
        for one in rows:
            asked = [Asked(FIELDS[name], first, one, dense) for name in spec.columns]
            plan.append(((*words, first.column), asked))
    return plan


def cell_of(spec: TableSpec, asked: Asked) -> Cell:
    """The cell of a figure."""
    figure, question, row = asked.field, asked.question, asked.shown
    words = figure.words(row.measured) if figure.words and row else ""
    return Cell(
        samples=figure.samples(asked.row, asked.dense),
        statuses=row.statuses if row else (),
        form=figure.form or f".{spec.digits}f",
        counted=figure.counted,
        words=words,
        is_baseline=question.method == "dense" or figure.of == "dense",
        published=shown_figure(figure, question.published),
        reasons=tuple(reasons(spec, question, row)),
    )


def shown_figure(figure: Field, cell: PublishedCell | None) -> Figure:
    """What a paper prints of a figure; nothing where it prints none."""
    if cell is None:
        return Figure()
    if cell.failed:
        return Figure(failed=True)
    text = figure.published(cell)
    return (
        Figure(text, cell.deviation * figure.deviates, unverified=cell.unverified)
        if text
        else Figure()
    )
