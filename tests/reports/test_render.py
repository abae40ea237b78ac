"""Tables of papers as a reader sees them.

The golden files are compared exactly. After a wanted change, write them again and read what moved:

    python -m tests.reports.test_render
"""

from __future__ import annotations

import csv
import io
import re
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench.errors import UnknownName
from reports import specs
from reports.cells import Cell, Figure, Grid, Line
from reports.grid import build
from reports.render import difference, latex, ours, printed, render
from reports.statistics import Interval
from tests.reports.published import everything, found, with_trouble

FOLDER = Path(__file__).parents[1] / "golden" / "tables"

TABLES = [f"dpf-table{number}" for number in range(1, 6)]

GOLDEN = {f"{name}.md": (name, "markdown", True) for name in TABLES} | {
    "dpf-table2.tex": ("dpf-table2", "latex", False),
    "dpf-table2.html": ("dpf-table2", "html", True),
    "dpf-table2.csv": ("dpf-table2", "csv", False),
}
"""File -> table, format, and whether published figures are shown."""


def grid(name: str) -> Grid:
    """A paper's table, most of it filled; some of its cells went wrong."""
    spec = specs.load(name)
    return build(spec, [with_trouble(everything(spec))])


def rendered(file: str) -> str:
    name, form, published = GOLDEN[file]
    return render(grid(name), form, published)


@pytest.mark.parametrize("file", GOLDEN)
def test_table_is_the_golden_one(file):
    assert rendered(file) == (FOLDER / file).read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [text.strip().strip("*").strip() for text in line.strip().strip("|").split("|")]


def published_texts(name: str) -> set[tuple[str, ...]]:
    """(model, target, column, figure) of every published cell in the markdown table."""
    header, _, *lines = (
        line for line in render(grid(name), "markdown", True).splitlines() if line.startswith("|")
    )
    heads = [text.strip() for text in header.strip().strip("|").split("|")]
    first = heads.index("figures")
    return {
        (*(t.strip() for t in line.strip("|").split("|")[:first]), column, text.strip())
        for line in lines
        if cells(line)[first] == "published"
        for column, text in zip(
            heads[first + 1 :], line.strip("|").split("|")[first + 1 :], strict=True
        )
        if text.strip() != "-"
    }


@pytest.mark.parametrize("name", [name for name in TABLES if name != "dpf-table3"])
def test_published_column_is_the_papers_text_to_the_last_digit(name):
    expected = {
        (q.model, q.target, q.column, "*" if c.failed else f"{c.top1} ± {c.deviation}")
        for line in specs.load(name).lines
        for q in line
        if (c := q.published)
    }
    shown = {(*key, re.sub(r" \([a-z,]+\)$", "", text)) for *key, text in published_texts(name)}
    assert shown == expected
    assert len(expected) > 30


def test_published_figures_of_imagenet_are_the_papers_text_to_the_last_digit():
    headers = {
        "dense top-1 %": "dense_top1",
        "top-1 %": "top1",
        "dense top-5 %": "dense_top5",
        "top-5 %": "top5",
        "reached ratio %": "reached",
        "parameters left, millions": "parameters",
    }
    expected = {
        (q.target, q.column, header, getattr(q.published, field).removesuffix("%"))
        for (q,) in specs.load("dpf-table3").lines
        for header, field in headers.items()
    }
    shown = {
        (target, method, header, re.sub(r" \([a-z,]+\)$", "", text))
        for _, target, method, header, text in published_texts("dpf-table3")
        if header in headers
    }
    assert shown == expected


def test_counts_of_resnet50_are_the_papers():
    texts = {
        line.words[1:]: [ours(cell) for cell in line.cells[-2:]]
        for line in grid("dpf-table3").lines
    }
    # Lin et al. print 73.5 and 82.6; our count of the first is 73.42.
    assert texts["90%", "DPF"] == ["82.6", "4.45"]
    assert texts["80%", "DPF"] == ["73.4, invalid 1 of 3", "6.79, invalid 1 of 3"]


def cell(*values: float, **more: object) -> Cell:
    statuses = ("ok",) * len(values)
    return Cell(dict(enumerate(values)), **{"statuses": statuses, **more})


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (cell(90.0, 91.0, 92.0), "91.00 ± 1.00"),
        (cell(90.126), "90.13"),
        (cell(90.0, 91.0, counted=True), "90.50"),
        (cell(), "-"),
        (cell(statuses=("missing",) * 3), "-"),
        (cell(statuses=("diverged",) * 3), "*"),
        (cell(statuses=("diverged", "missing")), "* 1 of 2"),
        (cell(90.0, 92.0, statuses=("ok", "ok", "diverged")), "91.00 ± 1.41, * 1 of 3"),
        (cell(90.0, statuses=("ok", "invalid")), "90.00, invalid 1 of 2"),
        (cell(words="219-214-100", statuses=("ok",)), "219-214-100"),
        (cell(-1.0, -2.0, form="+.2f"), "-1.50 ± 0.71"),
        (cell(12345.0, form=",.0f"), "12,345"),
        (cell(90.0, 92.0, interval=Interval(88.0, 94.0, "t")), "91.00 ± 1.41 [88.00, 94.00]"),
    ],
)
def test_our_figure_says_what_was_measured_and_what_went_wrong(shown, text):
    assert ours(shown) == text


@pytest.mark.parametrize(
    ("figure", "letters", "text"),
    [
        (Figure("92.40", "0.10"), ("a",), "92.40 ± 0.10 (a)"),
        (Figure("92.40"), ("a", "c"), "92.40 (a,c)"),
        (Figure(failed=True), ("b",), "* (b)"),
        (Figure("1.4", unverified=True), ("b",), "1.4 ? (b)"),
        (Figure(), (), "-"),
    ],
)
def test_a_published_figure_keeps_its_digits_and_has_its_notes(figure, letters, text):
    assert printed(Cell(published=figure, letters=letters)) == text


def test_a_difference_has_the_digits_of_the_published_figure():
    assert difference(cell(92.35, published=Figure("92.40"))) == "-0.05"
    assert difference(cell(95.0, published=Figure("94"))) == "+1.0"
    assert difference(cell(published=Figure("94"))) == "-"
    assert difference(cell(95.0, words="1-2", published=Figure("219-214-100"))) == "-"


def small(*texts: str, notes: tuple[str, ...] = ()) -> Grid:
    line = Line(texts[:1], tuple(Cell(words=text) for text in texts[1:]))
    return Grid("x", texts[0], ("model",), texts[1:], (line,), notes, notes)


HOSTILE = "a|b & 50% $x$ #1 m_p {c} ~ ^ \\ <i>\"'</i> ±"


def test_latex_has_no_character_that_latex_reads_as_a_command():
    text = render(small("LeNet", HOSTILE, notes=("`*`: [low, high]",)), "latex")
    body = next(line for line in text.splitlines() if line.startswith("LeNet &"))
    assert body == (
        r"LeNet & a\textbar{}b \& 50\% \$x\$ \#1 m\_p \{c\} \textasciitilde{} \textasciicircum{} "
        r"\textbackslash{} \textless{}i\textgreater{}"
        + "\"'"
        + r"\textless{}/i\textgreater{} $\pm$ \\"
    )
    assert "'*': {[}low, high{]}" in text
    assert all(name in text for name in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert latex("90.88 ± 0.07") == r"90.88 $\pm$ 0.07"


class Reader(HTMLParser):
    """Collects the texts of cells, and checks that every tag is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data))


def test_html_escapes_every_text_and_closes_every_tag():
    reader = Reader()
    reader.feed(render(small("LeNet", HOSTILE, notes=(HOSTILE,)), "html"))
    assert not reader.open
    assert [tag for tag, text in reader.texts if text == HOSTILE] == ["th", "td", "li"]
    assert "i" not in {tag for tag, _ in reader.texts}


def test_html_of_a_papers_table_has_a_cell_for_each_of_the_grid():
    reader, table = Reader(), grid("dpf-table2")
    reader.feed(render(table, "html"))
    shown = [text for tag, text in reader.texts if tag in ("td", "strong")]
    assert shown == [ours(one) for one in table.cells()]


def test_markdown_keeps_a_bar_in_a_cell_from_ending_it():
    assert "a\\|b & 50%" in render(small("LeNet", HOSTILE), "markdown")


def test_markdown_keeps_a_bar_in_a_header_from_ending_it():
    line = Line(("LeNet",), (Cell(words="1"),))
    text = render(Grid("x", "t", ("model",), ("a|b\nc",), (line,), (), ()), "markdown")
    rows = [one for one in text.splitlines() if one.startswith("|")]
    assert rows[0] == "| model   |   a\\|b c |"
    assert {one.replace("\\|", "").count("|") for one in rows} == {3}


def test_what_a_paper_writes_in_words_is_no_number_in_csv():
    line = Line(("LeNet",), (cell(words="9-65", published=Figure("219-214-100")),))
    text = render(Grid("x", "t", ("model",), ("a",), (line,), (), ()), "csv")
    (found,) = csv.DictReader(io.StringIO(text))
    assert (found["published"], found["published text"]) == ("", "219-214-100")
    assert found["text"] == "9-65"


def test_best_cells_are_bold_in_every_format_but_csv():
    table = Grid("x", "t", ("m",), ("c",), (Line(("l",), (cell(1.0, best=True),)),), (), ())
    assert "**1.00**" in render(table, "markdown")
    assert r"\textbf{1.00}" in render(table, "latex")
    assert "<strong>1.00</strong>" in render(table, "html")
    assert "**" not in render(table, "csv")


def test_csv_has_raw_numbers_that_give_the_table_again():
    table = grid("dpf-table4")
    lines = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert len(lines) == sum(len(line.cells) for line in table.lines)
    for line, one in zip(lines, table.cells(), strict=True):
        assert line["published"] == ("" if one.published.failed else one.published.text)
        assert line["published text"] == (
            "did not converge" if one.published.failed else one.published.text
        )
        assert line["text"] == ours(one)
        assert line["published sd"] == one.published.deviation
        assert int(line["n"]) == len(one.samples)
        if one.mean is None:
            assert line["mean"] == line["difference"] == ""
        else:
            assert float(line["mean"]) == one.mean
        if line["difference"]:
            found = float(line["mean"]) - float(Decimal(line["published"]))
            assert float(line["difference"]) == found
        assert bool(line["protocol"]) == bool(one.letters)


def test_a_table_without_published_figures_is_shown_as_it_is():
    spec = specs.load("lth-lenet")
    table = build(spec, [found([])])
    assert render(table, "markdown", True).count("figures") == 0
    said = "published: no cell of this table has a number of the paper."
    assert said in render(table, "markdown", True)
    assert said not in render(table, "markdown")
    assert said not in render(grid("dpf-table2"), "markdown", True)


def test_an_unknown_format_is_refused():
    with pytest.raises(UnknownName, match=r"no such format: 'word'.*Known: csv, html, latex, mark"):
        render(small("LeNet", "x"), "word")


if __name__ == "__main__":
    for file in GOLDEN:
        (FOLDER / file).write_text(rendered(file), encoding="utf-8")
