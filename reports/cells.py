"""The value objects of a table: cells, lines, and the grid that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from bench.errors import SuiteError
from reports import papers
from reports.aggregate import CellStatus, Row
from reports.fields import Field
from reports.specs import Question
from reports.statistics import Interval, mean_sd


@dataclass(frozen=True, slots=True)
class Figure:
    """What a paper prints: its digits are kept.

    Attributes:
        text: empty where it has no figure.
        failed: its training did not converge.
        unverified: remembered of the paper, not read in it.
    """

    text: str = ""
    deviation: str = ""
    failed: bool = False
    unverified: bool = False

    @property
    def value(self) -> Decimal | None:
        """The figure as a number; None where it is none."""
        try:
            return papers.decimal(self.text) if self.text else None
        except SuiteError:
            return None


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of ours, and the paper's.

    Attributes:
        samples: seed -> value, of the seeds that count.
        statuses: of every seed asked for; empty where no suite asks.
        form: how a value is written.
        counted: the same for every seed, so that no deviation is shown.
        words: a text instead of a number.
        is_baseline: it is the dense network's, which every table has.
        reasons: what differs from the paper's protocol.
        letters: where there is a published figure, one for each reason, or for "same protocol".
        rank: among those it is compared with; 1 is best. None where it is not compared.
        best: shown in bold.
        interval: of the mean, where statistics were asked for.
    """

    samples: Mapping[int, float] = field(default_factory=dict)
    statuses: tuple[CellStatus, ...] = ()
    form: str = ".2f"
    counted: bool = False
    words: str = ""
    is_baseline: bool = False
    published: Figure = Figure()
    reasons: tuple[str, ...] = ()
    letters: tuple[str, ...] = ()
    rank: int | None = None
    best: bool = False
    interval: Interval | None = None

    @property
    def mean(self) -> float | None:
        """Over seeds; None where none counts."""
        return mean_sd(list(self.samples.values()))[0] if self.samples else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None below two, and of what is counted."""
        if self.counted or not self.samples:
            return None
        return mean_sd(list(self.samples.values()))[1]

    @property
    def difference(self) -> float | None:
        """Ours less the published figure."""
        value, mean = self.published.value, self.mean
        return None if value is None or mean is None else mean - float(value)

    @property
    def is_comparable(self) -> bool:
        """Whether it can be best: a mean of survivors cannot."""
        return bool(self.samples) and not {"diverged", "invalid"} & set(self.statuses)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table: what names it, and its cells."""

    words: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table before it is written.

    Attributes:
        name: of its spec.
        heads: of the columns that name a line.
        columns: headers of the others.
        notes: what stands below it.
        published_notes: what does, in their place, where published figures are shown.
    """

    name: str
    title: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    published_notes: tuple[str, ...]

    @property
    def has_records(self) -> bool:
        """Whether any cell was run, dense networks aside."""
        own = (cell for cell in self.cells() if not cell.is_baseline)
        return any(set(cell.statuses) - {"missing", "skipped"} for cell in own)

    @property
    def has_published(self) -> bool:
        """Whether any cell has a published figure."""
        return any(cell.letters for cell in self.cells())

    def cells(self) -> Iterator[Cell]:
        """All of them."""
        for line in self.lines:
            yield from line.cells


@dataclass(frozen=True, slots=True)
class Asked:
    """One figure of a line: the question behind it, and the rows that answer it.

    Attributes:
        dense: the dense network's row; None where no suite asks for it.
    """

    field: Field
    question: Question
    row: Row | None
    dense: Row | None

    @property
    def shown(self) -> Row | None:
        """The row whose statuses the cell has."""
        return self.dense if self.field.of == "dense" else self.row


Plan = list[tuple[tuple[str, ...], list[Asked]]]
"""Of each line, what names it and what is asked."""
