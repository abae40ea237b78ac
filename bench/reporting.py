"""The commands that read records and print or write what they say. None imports torch."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.arguments import AsJson, Cell, Records, Statistics
from bench.errors import RecordError, UsageError
from bench.output import print_json

app = typer.Typer(rich_markup_mode=None)

NO_RECORDS = "{}: no records. Run a suite first: sparsebench run SUITE"


@app.command()
def show(
    cell: Cell,
    records: Records = Path("records"),
    as_json: AsJson = False,
) -> None:
    """Show one record: what was asked, measured, and where."""
    from bench.store import find, read
    from reports.record_page import record_page

    record = read(find(records, cell))
    if as_json:
        print_json(record)
    else:
        print(record_page(record))


@app.command()
def report(
    suite: Annotated[
        list[str] | None,
        typer.Argument(
            help="Suites with records; all of them if none is named. Documents, for --check and "
            "--write."
        ),
    ] = None,
    records: Records = Path("records"),
    by_sparsity: Annotated[
        bool, typer.Option("--by-sparsity", help="Short: a line a method, a column a sparsity.")
    ] = False,
    table: Annotated[
        list[str] | None,
        typer.Option("--table", help="A paper's table, such as dpf-table1, or a spec's TOML file."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="Of --table: markdown, latex, html or csv.")
    ] = "markdown",
    published: Annotated[
        bool, typer.Option("--published", help="Of --table: the paper's figures beside ours.")
    ] = False,
    statistics: Statistics = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare the marked tables of documents with the records."),
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Renew the marked tables of documents.")
    ] = False,
) -> None:
    """Print the markdown table of each suite that has records.

    With --check, exit status 1 where a table in a document is not what its command prints.
    """
    if check or write:
        check_documents([Path(name) for name in suite or []], write)
        return
    names = [Path(name).name.removesuffix(".toml") for name in suite or []]
    if table:
        print_tables(table, records, names or None, form, published, statistics == "full")
        return
    if published or statistics or form != "markdown":
        raise UsageError("--format, --published and --statistics need --table, as dpf-table1.")
    if not by_sparsity:
        print_report(records, names or None)
        return
    from bench.store import suites
    from reports.by_sparsity import by_sparsity as short

    names = names or suites(records)
    if not names:
        raise RecordError(NO_RECORDS.format(records))
    for name in names:
        print(short(records, name))


@app.command()
def figures(
    suite: Annotated[
        list[str] | None, typer.Argument(help="Suites with records; all of them if none is named.")
    ] = None,
    records: Records = Path("records"),
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("figures"),
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="Such as macs or mask-overlap; all that can be if none is."),
    ] = None,
) -> None:
    """Draw a suite's records: OUT/SUITE/NAME.svg and .png."""
    from bench.store import Store, suites
    from reports.figures import draw, write
    from reports.series import charts

    names = [Path(name).name.removesuffix(".toml") for name in suite or suites(records)]
    if not names:
        raise RecordError(NO_RECORDS.format(records))
    made = {name: charts(Store(records, name), kind or ()) for name in names}
    if not any(found for found, _ in made.values()):
        raise RecordError(next(line for _, lacking in made.values() for line in lacking))
    for name, (found, lacking) in made.items():
        for chart in found:
            try:
                paths = write(draw(chart), out / name, chart.name)
            except OSError as error:
                raise UsageError(f"--out {out}: cannot write there ({error}).") from error
            print(*paths, sep="\n")
        for line in lacking:
            typer.echo(line, err=True)


@app.command()
def baseline(
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    suite: Annotated[
        str | None, typer.Argument(help="A suite with records; needed where there are several.")
    ] = None,
    records: Records = Path("records"),
) -> None:
    """Write a suite's figures as a baseline for `check`, and say what it can find."""
    from bench.store import write_atomically
    from reports.baseline import encode, make_baseline, only_suite, reach, shortcomings

    made = make_baseline(records, suite_name(suite) or only_suite(records))
    try:
        write_atomically(out, encode(made))
    except OSError as error:
        raise UsageError(f"--out {out}: cannot write there ({error}).") from error
    print(out)
    for text in reach(made):
        print(text)
    for text in shortcomings(made):
        typer.echo(f"warning: {text}", err=True)


@app.command()
def check(
    against: Annotated[Path, typer.Option("--baseline", help="File that `baseline` wrote.")],
    suite: Annotated[
        str | None, typer.Argument(help="A suite with records. [default: the baseline's]")
    ] = None,
    records: Records = Path("records"),
    floor: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Points of accuracy that may always be lost. "
            "[default: 0.05; 0.5 where no seeds tell the noise]",
        ),
    ] = None,
    time: Annotated[
        float | None,
        typer.Option(
            "--time-tolerance",
            min=0,
            help="Fail where training takes longer by more than this fraction, such as 0.25.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a suite's records with a baseline.

    Exit status: 0 fine, 1 regressed, 2 usage, 3 cells failed or invalid, 4 nothing to compare or
    cells of the baseline missing.
    """
    from reports import regress

    limits = regress.Limits(floor, time)
    try:
        text = against.read_bytes()
    except OSError as error:
        raise RecordError(f"{against}: cannot read the baseline: {error.strerror}.") from error
    outcome = regress.check(records, suite_name(suite), text, str(against), limits)
    if as_json:
        print_json(outcome.as_dict())
    else:
        print(outcome.table)
    raise typer.Exit(outcome.exit_code)


@app.command()
def leaderboard(
    records: Records = Path("records"),
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", help="Document to put it in, between its marks."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--page", help="HTML file to write: tables, plots and every cell in it."),
    ] = None,
    title: Annotated[
        str | None, typer.Option("--title", help="Heading of the page. [default: a general one]")
    ] = None,
) -> None:
    """Show how the methods of all suites compare, in markdown or as a page for a browser."""
    from bench.store import write_atomically
    from reports import leaderboard as board

    if title is not None and page is None:
        raise UsageError(f"--title {title}: is for the page; give --page FILE.html too.")
    if markdown is None and page is None:
        print(board.leaderboard(records))
        return
    try:
        if markdown is not None:
            document = markdown.read_text(encoding="utf-8")
            text = board.placed(document, board.leaderboard(records), str(markdown))
            write_atomically(markdown, text.encode())
            print(markdown)
        if page is not None:
            from reports.page.build import TITLE
            from reports.page.build import page as build

            write_atomically(page, build(records, title or TITLE).encode())
            print(page)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read or write there ({error}).") from error


@app.command()
def reproduction(
    records: Annotated[Path, typer.Option("--records", help="Folder of the records.")] = Path(
        "reports/records"
    ),
    as_json: AsJson = False,
) -> None:
    """Tell which published figures come out, and why the others do not."""
    from reports import reproduction as found

    score = found.reproduction(records)
    if as_json:
        print_json(score.as_dict())
    else:
        print(found.report(score))


@app.command()
def compare(
    one: Annotated[
        str, typer.Argument(metavar="A", help="A folder of records, or a suite's label or method.")
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.")],
    records: Records = Path("records"),
    statistics: Statistics = None,
    as_json: AsJson = False,
) -> None:
    """Show two folders of records, or two methods of a suite, side by side."""
    from reports.compare import compare as compared
    from reports.side_by_side import as_data, side_by_side

    found = compared(records, one, other, tests=statistics == "full")
    if as_json:
        print_json(list(map(as_data, found)))
    else:
        print("\n".join(map(side_by_side, found)))


@app.command()
def merge(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SRC...", help="Folders of records, or one suite's.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of all; it may hold records already.")],
    keep_first: Annotated[
        bool,
        typer.Option(
            "--keep-first", help="Of two different records of a cell, take the first folder's."
        ),
    ] = False,
    with_weights: Annotated[
        bool, typer.Option("--with-weights", help="Copy finished networks and their masks too.")
    ] = False,
) -> None:
    """Join folders of records from several machines. Nothing is overwritten."""
    from reports.merge import merge as joined

    print(*joined(sources, out, keep_first=keep_first, with_weights=with_weights), sep="\n")


def check_documents(paths: list[Path], write: bool) -> None:
    """Prints where the tables of documents are not what the records give, or renews them.

    Raises:
        Exit: with status 1 where they differ and are not renewed.
    """
    from reports import committed

    found = committed.documents(paths, printed)
    for document in found:
        if document.difference and write:
            committed.write(document)
        elif document.difference:
            print(document.difference)
        print(f"{document.path}: {document.verdict(write)}")
    if not write and any(document.difference for document in found):
        raise typer.Exit(1)


def printed(words: Sequence[str]) -> str:
    """What one of the commands here prints; it runs in this process.

    Raises:
        UsageError: the command line is wrong, or the command does not end with status 0.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            typer.main.get_command(app).main(list(words), "sparsebench")
        except SystemExit as end:
            status = end.code
    if status:
        said = err.getvalue().strip().splitlines()
        raise UsageError(f"sparsebench {shlex.join(words)}: {said[-1] if said else status}")
    return out.getvalue()


def print_report(records: Path, names: list[str] | None) -> None:
    """Prints the tables of suites; None: of all that have records."""
    from reports.suite_table import report as render

    print(render(records, names))


def suite_name(text: str | None) -> str | None:
    """Name of a suite that may be given as its file."""
    return text and Path(text).name.removesuffix(".toml")


def print_tables(
    tables: Sequence[str],
    records: Path,
    suites: list[str] | None,
    form: str,
    published: bool,
    statistics: bool,
) -> None:
    """Prints tables of papers, by name or from a spec's file."""
    from reports import known, specs
    from reports.grid import build
    from reports.matching import read
    from reports.render import render

    for name in tables:
        spec = specs.load(name)
        known.check(spec, known.Known(*known_names()), records)
        found = read(records, spec, suites)
        grid = build(spec, found, statistics)
        for text in known.doubts(spec, found):
            typer.echo(f"{spec.where}: {text}", err=True)
        print(render(grid, form, published), end="" if form == "csv" else "\n")


def known_names() -> tuple[set[str], set[str], set[str], tuple[str, ...]]:
    """Names of methods, models and data sets, and prefixes of those given out elsewhere."""
    import methods
    import models
    from bench import datasets, folders

    known_methods = {*methods.names(), *methods.STAND_INS}
    known_datasets = {*datasets.names(), *folders.KINDS}
    prefixes = (models.TIMM_PREFIX, datasets.FOLDER_PREFIX)
    return known_methods, set(models.names()), known_datasets, prefixes
