"""The commands that read records and print or write what they say. None imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.arguments import AsJson, Cell, Records
from bench.errors import RecordError, UsageError

app = typer.Typer()


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
        list[str] | None, typer.Argument(help="Suites with records; all of them if none is named.")
    ] = None,
    records: Records = Path("records"),
    by_sparsity: Annotated[
        bool, typer.Option("--by-sparsity", help="Short: a line a method, a column a sparsity.")
    ] = False,
) -> None:
    """Print the markdown table of each suite that has records."""
    names = [Path(name).name.removesuffix(".toml") for name in suite or []]
    if not by_sparsity:
        print_report(records, names or None)
        return
    from bench.store import suites
    from reports.by_sparsity import by_sparsity as short

    for name in names or suites(records):
        print(short(records, name))


@app.command()
def baseline(
    suite: Annotated[str, typer.Argument(help="A suite with records.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    records: Records = Path("records"),
) -> None:
    """Write a suite's figures as a baseline for `check`."""
    from bench.store import write_atomically
    from reports.baseline import write_baseline

    content = write_baseline(records, suite)
    try:
        write_atomically(out, content)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot write there ({error}).") from error
    print(out)


@app.command()
def check(
    suite: Annotated[str, typer.Argument(help="A suite with records.")],
    against: Annotated[Path, typer.Option("--baseline", help="File that `baseline` wrote.")],
    records: Records = Path("records"),
    floor: Annotated[
        float, typer.Option(min=0, help="Points of accuracy that may always be lost.")
    ] = 0.5,
) -> None:
    """Compare a suite's records with a baseline.

    Exit status: 0 fine, 1 regressed, 2 usage, 3 cells failed, 4 nothing to compare.
    """
    from reports import regress

    try:
        text = against.read_bytes()
    except OSError as error:
        raise RecordError(f"{against}: cannot read the baseline: {error.strerror}.") from error
    outcome = regress.check(records, suite, text, str(against), floor)
    print(outcome.table)
    raise typer.Exit(outcome.exit_code)


def print_report(records: Path, names: list[str] | None) -> None:
    """Prints the tables of suites; None: of all that have records."""
    from reports.suite_table import report as render

    print(render(records, names))


def print_json(value: object) -> None:
    """Prints a value object for programs."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=1).decode())
