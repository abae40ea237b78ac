"""What stands below a paper's table: conditions, marks, and how ours differs from the paper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from bench.spec import CellSpec
from reports import footnotes, statistics
from reports.aggregate import Row
from reports.cells import Asked, Cell
from reports.fields import FIELDS
from reports.matching import Found, unused
from reports.ranking import Noise, figure_of
from reports.specs import Question, TableSpec
from reports.statistics import ALPHA, Pooled
from reports.suite_table import seeds as seed_text

SAME = ""
"""Stands for the same protocol among the reasons why it is another."""

NAMED = 6
"""Cells that a note names; more are counted."""

Letters = dict[str, str]
"""Reason -> letter, in the order of the table."""


def lettered(cells: Sequence[Sequence[Cell]]) -> tuple[list[list[Cell]], Letters]:
    """Cells with a letter for each of their reasons."""
    letters: Letters = {}

    def of(reason: str) -> str:
        number = len(letters)
        fresh = chr(ord("a") + number % 26) + ("" if number < 26 else str(number // 26))
        return letters.setdefault(reason, fresh)

    def marked(cell: Cell) -> Cell:
        has_figure = cell.published.text or cell.published.failed
        found = tuple(map(of, cell.reasons or (SAME,))) if has_figure else ()
        return dataclasses.replace(cell, letters=found)

    return [[marked(cell) for cell in line] for line in cells], letters


@dataclasses.dataclass(frozen=True, slots=True)
class Below:
    """All that the notes of a table are taken from.

    Attributes:
        asked: what each cell asks, in the order of `cells`.
        noise: of one run, of each figure; None without statistics.
        widest: cells that spread much more than the others, see `reports.ranking.widest`.
        families: of the cells that are compared with each other, the figure, seeds and pairs.
    """

    spec: TableSpec
    found: tuple[Found, ...]
    asked: Sequence[Asked]
    cells: Sequence[Cell]
    letters: Letters
    noise: Noise | None
    families: tuple[tuple[str, int, int], ...]
    widest: tuple[Sequence[Asked], float] = ((), 0.0)

    @property
    def used(self) -> list[tuple[Question, Row]]:
        """Every row in the table once, with the first question that it answers."""
        pairs = [(one.question, one.shown) for one in self.asked]
        return list({id(row): (question, row) for question, row in pairs if row}.values())

    @property
    def rows(self) -> list[Row]:
        """Every row in the table."""
        return [row for _, row in self.used]


def notes(below: Below, published: bool) -> Iterator[str]:
    """The notes of a table.

    Args:
        below: the table.
        published: its published figures are shown.
    """
    yield "accuracy: last step on the test set, mean ± standard deviation over seeds."
    yield from seeds(below)
    yield from conditions(below.rows)
    yield from footnotes.environments(below.rows)
    yield from footnotes.executions(below.rows, seconds=False)
    yield from multiples(below)
    yield from marks(below)
    yield from footnotes.reasons(below.rows)
    yield from (f"skipped: {text}" for text in sorted(set(footnotes.skipped(below.rows))))
    attempts = [record for one in below.found for record in one.attempts]
    yield from footnotes.failures(below.rows, attempts)
    yield from tests(below)
    yield from paper(below.spec)
    yield from protocol(below, published)
    if others := unused(below.found, below.rows):
        labels = ", ".join(dict.fromkeys(row.label for row in others))
        yield (
            f"{footnotes.plural(len(others), 'row')} of these networks and methods with other "
            f"options, targets or conditions stand in no cell: {labels}."
        )


def seeds(below: Below) -> Iterator[str]:
    """How many seeds stand behind the cells."""
    found: dict[str, list[str]] = {}
    for question, row in below.used:
        if row.finished:
            found.setdefault(seed_text(row), []).append(place(question))
    if not found:
        yield "n: no cell was run."
        return
    usual = max(found, key=lambda text: len(found[text]))
    others = [f"{text}: {some(cells)}" for text, cells in found.items() if text != usual]
    asked = sorted({spec.seed for row in below.rows for spec in row.specs})
    which = f"seeds asked for: {', '.join(map(str, asked))}"
    yield f"n = {usual}{''.join(f'; {text}' for text in others)}; {which}."


def place(question: Question) -> str:
    """A cell in words."""
    target = "" if question.method == "dense" else question.target
    return ", ".join(filter(None, (question.column, question.model, target)))


def some(texts: Sequence[str]) -> str:
    """The first of a list, and how many follow."""
    unique = list(dict.fromkeys(texts))
    more = len(unique) - NAMED
    return "; ".join(unique[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def conditions(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each condition; where networks, or methods, differ in it, with their names."""
    shared = []
    for name, text in footnotes.CONDITIONS.items():
        found = by_value(rows, text, lambda spec: spec.model)
        if sum(map(len, found.values())) > len(set().union(*found.values())):
            found = by_value(rows, text, lambda spec: spec.method)
        if len(found) == 1 and not (name == "initial weights" and "random" in found):
            shared.append(f"{name}: {next(iter(found))}")
        elif len(found) > 1:
            texts = (f"{value} ({', '.join(names)})" for value, names in found.items())
            shared.append(f"{name}: {'; '.join(texts)}")
    if shared:
        yield ". ".join(shared) + "."


def by_value(
    rows: Sequence[Row], value: Callable[[CellSpec], str], name: Callable[[CellSpec], str]
) -> dict[str, dict[str, None]]:
    """The names of rows, in order, by the value that they have."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        found.setdefault(value(row.spec), {})[name(row.spec)] = None
    return found


def multiples(below: Below) -> Iterator[str]:
    """What each method costs, over the budget of one ordinary training."""
    found: dict[str, list[float]] = {}
    for question, row in below.used:
        if row.multiple is not None:
            found.setdefault(question.column, []).append(row.multiple)
    texts = []
    for column, values in found.items():
        ends = dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values)))
        texts.append(f"{column} {' to '.join(ends)}")
    if texts:
        yield f"budget multiple: {'; '.join(texts)}."


def marks(below: Below) -> Iterator[str]:
    """The marks that stand in cells."""
    statuses = {status for cell in below.cells for status in cell.statuses}
    failed = any(cell.published.failed for cell in below.cells)
    if "diverged" in statuses or failed:
        yield "`*`: did not converge; `* 1 of 3`: of so many seeds, which are not in the mean."
    if "invalid" in statuses:
        yield footnotes.MARKS["invalid"]
    if any(not (cell.samples or cell.words) for cell in below.cells):
        yield "`-`: not run, or no such figure."
    if dead := [f"{place(q)}: {', '.join(row.dead)}" for q, row in below.used if row.dead]:
        yield f"dead: emptied layers ({some(dead)})."
    if "architecture" in below.spec.figures:
        yield (
            "architecture: inputs of linear layers and filters of convolutions with a non-zero "
            "weight on a path from the image to an output; mean over seeds."
        )
    if "remaining" in below.spec.figures:
        yield (
            "P_m: weights of convolutions and linear layers that are left, of all of them; "
            "early-stopping iteration: of least validation loss, found afterwards."
        )
    if "reached" in below.spec.figures:
        yield "reached ratio: zeros among all parameters, biases and normalisation included."
    if any(cell.best for cell in below.cells) and below.noise is None:
        yield "bold: best mean, the dense network and cells with a failed seed left out."


def tests(below: Below) -> Iterator[str]:
    """How ties were told, and what the seeds at hand could tell."""
    if below.noise is None:
        return
    if any(cell.best for cell in below.cells):
        yield (
            "bold: best mean and those not told apart from it, dense networks and cells with a "
            f"failed seed left out. Compared over common seeds, Holm-corrected, p = {ALPHA}."
        )
    known = {name: pooled for name, pooled in below.noise.items() if pooled is not None}
    if not known:
        if below.noise or not any(cell.samples for cell in below.cells):
            yield "statistics: no cell has two seeds, so that nothing is known of the noise."
        return
    pairs = zip(below.asked, below.cells, strict=True)
    ns = sorted({len(c.samples) for one, c in pairs if c.samples and figure_of(one.field) in known})
    if ns[0] < statistics.ENOUGH:
        tested = "paired t tests and " if below.families else ""
        yield (
            f"under {statistics.ENOUGH} seeds: {tested}Student's t intervals, with the "
            f"standard deviation of one run pooled over the table's cells, {deviations(known)}."
        )
    if ns[-1] >= statistics.ENOUGH:
        tested = "paired permutation tests, and " if below.families else ""
        yield f"from {statistics.ENOUGH} seeds on: {tested}BCa bootstrap intervals."
    if not below.families:
        yield "nothing is compared: no two cells of this table stand for methods side by side."
    if any(cell.interval for cell in below.cells):
        yield "in brackets: 95 % interval of the mean, of accuracies within 0 to 100 %."
    wide, ratio = below.widest
    if wide:
        much = (
            "and the others do not" if math.isinf(ratio) else f"{ratio:.1f} times as much as others"
        )
        figure = named(figure_of(wide[0].field), known)
        cells = some([place(asked.question) for asked in wide])
        yield (
            f"some cells spread {much} ({figure}{cells}): the pooled standard deviation is "
            "nobody's, and intervals and ties say little here."
        )
    found = []
    for name, n, compared in sorted(set(below.families)):
        if name in known:
            least = statistics.smallest_detectable(known[name], n, comparisons=compared)
            size = f"{named(name, known)}n = {n}, {footnotes.plural(compared, 'comparison')}"
            unit = "" if name == FIELDS["compression"].header else " points"
            text = statistics.TOO_SMALL if least is None else f"{least:.2f}{unit}"
            found.append(f"{size}: {text}")
    if found:
        yield f"smallest difference that is found with a power of 80 %: {'; '.join(found)}."


def deviations(known: Mapping[str, Pooled]) -> str:
    """The noise of each figure, with its name where there are several."""
    return "; ".join(
        f"{named(name, known)}{pooled.sd:.3f} ({pooled.freedom} degrees of freedom)"
        for name, pooled in known.items()
    )


def named(name: str, known: Mapping[str, Pooled]) -> str:
    """What tells a figure's number from those of others."""
    return f"{name}: " if len(known) > 1 else ""


def paper(spec: TableSpec) -> Iterator[str]:
    """Where the published figures are from."""
    if spec.paper is None or spec.table is None:
        return
    table = spec.table
    figures = [] if table.seeds is None else [f"{footnotes.plural(table.seeds, 'seed')}"]
    about = "; ".join(filter(None, [table.protocol, *figures]))
    yield f"paper: {spec.paper.authors}, arXiv:{spec.paper.arxiv}, {table.title}. {about}."
    if table.unsaid:
        yield f"the paper does not say: {'; '.join(table.unsaid)}."
    yield from (f"{note}." for note in table.notes)


def protocol(below: Below, published: bool) -> Iterator[str]:
    """What differs from the paper's protocol, and for which methods."""
    columns: dict[str, dict[str, None]] = {}
    for asked, cell in zip(below.asked, below.cells, strict=True):
        for reason in cell.reasons:
            columns.setdefault(reason, {})[asked.question.column] = None
    letters = below.letters if published else {}
    if SAME in letters:
        yield (
            f"({letters[SAME]}): same protocol, as far as the paper says it: network, data, "
            "recipe, budget, and which weights may be pruned."
        )
    for reason in dict.fromkeys([*letters, *columns]):
        if reason != SAME:
            letter = f"({letters[reason]}): " if reason in letters else ""
            yield f"{letter}differs from the paper ({', '.join(columns[reason])}): {reason}."
    if published and any(cell.published.unverified for cell in below.cells):
        yield "`?`: remembered of the paper, not checked against it."
    converted = any(
        one.field is FIELDS["accuracy"] and one.question.published and one.question.published.error
        for one in below.asked
    )
    if published and converted:
        yield "published as errors where the source gives errors; shown as 100 less those."
