"""A grid as markdown, LaTeX (booktabs), HTML or CSV."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, get_args

from bench.errors import UnknownName
from reports.cells import Cell, Grid
from reports.markdown import section

Format = Literal["markdown", "latex", "html", "csv"]

NONE_PUBLISHED = "published: no cell of this table has a number of the paper."
"""Note of a table whose published figures were asked for in vain."""

WHOSE = "figures"
"""Header of the column that tells ours from the published ones."""


@dataclass(frozen=True, slots=True)
class Text:
    """What stands in a cell, before a format escapes it."""

    text: str
    bold: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A grid as text: the first `words` of the headers name the lines, the others hold figures."""

    title: str
    words: int
    headers: tuple[str, ...]
    lines: tuple[tuple[Text, ...], ...]
    notes: tuple[str, ...]


def render(grid: Grid, form: str, published: bool = False) -> str:
    """The table in a format.

    Args:
        grid: what `reports.grid.build` made.
        form: one of `Format`. CSV has a line for each cell, numbers as they are, and the published
            ones always.
        published: each line is followed by the paper's figures and the differences, where any.

    Raises:
        UnknownName: there is no such format.
    """
    if form == "csv":
        return as_csv(grid)
    if form not in FORMATS:
        raise UnknownName("--format", "format", form, get_args(Format))
    table = tabled(grid, published and grid.has_published)
    if published and not grid.has_published:
        table = dataclasses.replace(table, notes=(*table.notes, NONE_PUBLISHED))
    return FORMATS[form](table)


def tabled(grid: Grid, published: bool) -> Table:
    """The texts of a grid."""
    lines: list[tuple[Text, ...]] = []
    for line in grid.lines:
        words = [Text(word) for word in line.words]
        mine = [Text(ours(cell), cell.best) for cell in line.cells]
        if not published:
            lines.append((*words, *mine))
            continue
        lines.append((*words, Text("ours"), *mine))
        if any(cell.letters for cell in line.cells):
            lines.append((*words, Text("published"), *(Text(printed(c)) for c in line.cells)))
        if any(cell.difference is not None for cell in line.cells):
            lines.append((*words, Text("difference"), *(Text(difference(c)) for c in line.cells)))
    heads = (*grid.heads, *([WHOSE] if published else []))
    notes = grid.published_notes if published else grid.notes
    return Table(grid.title, len(heads), (*heads, *grid.columns), tuple(lines), notes)


def ours(cell: Cell) -> str:
    """Our figure: mean, deviation and interval, then what went wrong."""
    parts = [cell.words] if cell.words else []
    if cell.mean is not None:
        spread = cell.form.removeprefix("+")
        text = format(cell.mean, cell.form)
        if cell.deviation is not None:
            text += f" ± {cell.deviation:{spread}}"
        if cell.interval is not None:
            text += f" [{cell.interval.low:{spread}}, {cell.interval.high:{spread}}]"
        parts.append(text)
    for status, mark in (("diverged", "*"), ("invalid", "invalid")):
        if count := cell.statuses.count(status):
            is_all = mark == "*" and count == len(cell.statuses)
            parts.append(mark if is_all else f"{mark} {count} of {len(cell.statuses)}")
    return ", ".join(parts) or "-"


def printed(cell: Cell) -> str:
    """The published figure, in its own digits, with the letters of its notes."""
    figure = cell.published
    if not figure.text and not figure.failed:
        return "-"
    text = "*" if figure.failed else figure.text
    text += f" ± {figure.deviation}" if figure.deviation else ""
    text += " ?" if figure.unverified else ""
    return f"{text} ({','.join(cell.letters)})"


def difference(cell: Cell) -> str:
    """Ours less the published one, with its digits."""
    value = cell.published.value
    if cell.difference is None or value is None:
        return "-"
    # Adding zero turns the -0.0 that rounding may leave into 0.0.
    return f"{round(cell.difference, digits(value)) + 0.0:+.{digits(value)}f}"


def digits(value: Decimal) -> int:
    """Decimals of a published figure; at least one, as 94 may be compared with 94.4."""
    return max(1, -int(value.as_tuple().exponent))


def as_markdown(table: Table) -> str:
    """A section with a pipe table and a list of notes."""

    def text(one: Text) -> str:
        return f"**{markdown(one.text)}**" if one.bold else markdown(one.text)

    lines = [[text(one) for one in line] for line in table.lines]
    headers = [markdown(name) for name in table.headers]
    return section(table.title, headers, lines, headers[: table.words], table.notes)


def markdown(text: str) -> str:
    """Text of a cell, with what would end the cell or its line escaped."""
    return text.replace("|", "\\|").replace("\n", " ")


def as_latex(table: Table) -> str:
    """A `table` environment for the package booktabs; models stand apart a little."""

    def text(one: Text) -> str:
        return rf"\textbf{{{latex(one.text)}}}" if one.bold else latex(one.text)

    def rows() -> Iterator[str]:
        for before, line in zip([None, *table.lines], table.lines, strict=False):
            if before is not None and before[0] != line[0]:
                yield r"\addlinespace"
            yield " & ".join(map(text, line)) + r" \\"

    columns = "l" * table.words + "r" * (len(table.headers) - table.words)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex(table.title)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(latex, table.headers)) + r" \\",
            r"\midrule",
            *rows(),
            r"\bottomrule",
            r"\end{tabular}",
            *([r"\par\medskip\footnotesize\raggedright"] if table.notes else []),
            *(rf"{latex(note)}\par" for note in table.notes),
            r"\end{table}",
            "",
        ]
    )


LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "`": "'",
        "±": r"$\pm$",
        "×": r"$\times$",
        "–": "--",
    }
)


def latex(text: str) -> str:
    """Text with what LaTeX would read as commands escaped."""
    # A bracket at the start of a line would be read as an option of the line break before it.
    return text.translate(LATEX).replace("[", "{[}").replace("]", "{]}")


def as_html(table: Table) -> str:
    """A `section` with a plain table and a list; no styles, no scripts."""

    def text(one: Text) -> str:
        escaped = html.escape(one.text)
        return f"<strong>{escaped}</strong>" if one.bold else escaped

    def row(line: Sequence[Text]) -> str:
        heads = "".join(f'<th scope="row">{text(one)}</th>' for one in line[: table.words])
        return f"<tr>{heads}{''.join(f'<td>{text(one)}</td>' for one in line[table.words :])}</tr>"

    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.headers)
    return "\n".join(
        [
            "<section>",
            f"<h2>{html.escape(table.title)}</h2>",
            "<table>",
            f"<thead><tr>{heads}</tr></thead>",
            "<tbody>",
            *map(row, table.lines),
            "</tbody>",
            "</table>",
            "<ul>",
            *(f"<li>{html.escape(note)}</li>" for note in table.notes),
            "</ul>",
            "</section>",
            "",
        ]
    )


FORMATS: dict[str, Callable[[Table], str]] = {
    "markdown": as_markdown,
    "latex": as_latex,
    "html": as_html,
}


def as_csv(grid: Grid) -> str:
    """A line for each cell; an empty field is not known."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", *grid.heads, "column", *NUMBERS])
    for line in grid.lines:
        for column, cell in zip(grid.columns, line.cells, strict=True):
            values = [get(cell) for get in NUMBERS.values()]
            writer.writerow([grid.name, *line.words, column, *values])
    return out.getvalue()


NUMBERS: dict[str, Callable[[Cell], object]] = {
    "text": lambda cell: ours(cell),
    "mean": lambda cell: cell.mean,
    "sd": lambda cell: cell.deviation,
    "n": lambda cell: len(cell.samples),
    "asked": lambda cell: len(cell.statuses),
    "diverged": lambda cell: cell.statuses.count("diverged"),
    "invalid": lambda cell: cell.statuses.count("invalid"),
    "low": lambda cell: cell.interval and cell.interval.low,
    "high": lambda cell: cell.interval and cell.interval.high,
    "rank": lambda cell: cell.rank,
    "published": lambda cell: "" if cell.published.value is None else cell.published.text,
    "published text": lambda cell: (
        "did not converge" if cell.published.failed else cell.published.text
    ),
    "published sd": lambda cell: cell.published.deviation,
    "unverified": lambda cell: "yes" if cell.published.unverified else "",
    "difference": lambda cell: cell.difference,
    "protocol": lambda cell: ("; ".join(cell.reasons) or "same") if cell.letters else "",
}
"""Columns of the CSV form beside those that name a cell."""
