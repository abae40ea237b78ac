"""`sparsebench`: the one place where everything meets. A command imports what it needs."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.errors import BenchError, RecordError, SuiteError, UnknownName, UsageError
from bench.listing import Table, listing

if TYPE_CHECKING:
    from bench.resolve import Plan
    from bench.store import Store

app = typer.Typer(
    name="sparsebench",
    help="Compare sparsity methods: train every (method, model, sparsity, seed) cell of a suite "
    "under one budget, and print the table.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

new = typer.Typer(help="Write a starting file.", no_args_is_help=True)
app.add_typer(new, name="new")

INTERRUPTED = 130

Suite = Annotated[str, typer.Argument(help="A built-in suite (see `list suites`) or a TOML file.")]
Records = Annotated[Path, typer.Option("--records", help="Folder of the records.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar="SPARSEBENCH_DATA",
        help="Folder of the data sets, <name>.npz each. [default: ~/.cache/sparsebench]",
    ),
]
Only = Annotated[
    str | None,
    typer.Option("--only", help="Only cells whose label or file name matches, such as 'rigl*'."),
]


@app.command("list")
def list_(what: Table, as_json: AsJson = False) -> None:
    """Show what there is: methods, models, data sets, recipes or suites."""
    rows = listing(what)
    if as_json:
        _print_json(rows)
    else:
        _print_table(rows)
    if what is Table.methods:
        from methods import conflicts

        for conflict in conflicts():
            print(f"sparsebench: {conflict}.", file=sys.stderr)


@app.command("plan")
def plan_(
    suite: Suite,
    data: Data = None,
    records: Records = Path("records"),
    only: Only = None,
    as_json: AsJson = False,
) -> None:
    """Show a suite's cells: keys, done or not, planned steps, budget multiple. Trains nothing."""
    resolved, store = _resolve(suite, data, records)

    from bench import launch

    rows = []
    for cell in launch.chosen(resolved, only):
        spec = cell.spec
        record = None if cell.skipped else store.get(spec)
        rows.append(
            {
                "key": spec.key,
                "label": cell.label,
                "method": spec.method,
                "model": spec.model,
                "sparsity": cell.asked,
                "seed": spec.seed,
                "steps": cell.steps,
                "multiple": round(cell.multiple, 4),
                "updates": cell.updates,
                "status": record.status if record else "skipped" if cell.skipped else "to do",
                "done": record is not None,
            }
        )
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        row.pop("done")
    _print_table(rows)
    missing = {row["key"] for row in rows if row["status"] == "to do"}
    every = {row["key"] for row in rows}
    print(f"\n{len(every)} cells, {len(missing)} to do; records in {store.folder}")


@app.command()
def run(
    suite: Suite,
    data: Data = None,
    records: Records = Path("records"),
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU where there is one.")
    ] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, help="Cells trained side by side; 0: a CPU core each, or 1 a GPU.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads per cell.")] = 1,
    only: Only = None,
    limit_minutes: Annotated[
        float | None, typer.Option(help="Save and stop after so many minutes (exit status 5).")
    ] = None,
    checkpoint_seconds: Annotated[
        float, typer.Option(min=0, help="Time between checkpoints of a cell.")
    ] = 60,
) -> None:
    """Train the cells of a suite that have no record yet, and print the suite's table.

    Exit status: 0 done, 1 a cell failed, 2 usage, 5 stopped by --limit-minutes with cells left.
    """
    started = time.time()
    if limit_minutes is not None and not limit_minutes > 0:
        raise UsageError(f"--limit-minutes {limit_minutes}: must be above 0.")
    deadline = math.inf if limit_minutes is None else started + 60 * limit_minutes
    plan, store = _resolve(suite, data, records)

    from bench import launch

    cells = launch.chosen(plan, only)
    settings = launch.Settings(
        launch.usable_device(device), workers, threads, deadline, checkpoint_seconds
    )
    try:
        launch.train(plan, store, cells, settings)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from the last checkpoints.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        raise BenchError(f"{store.folder}: cannot write there ({error}).") from error
    _print_report(records, [store.suite])
    status = launch.verdict(store, cells, deadline)
    if status == launch.CELLS_LEFT:
        left = launch.left(store, cells)
        print(f"Time is up, cells left: {left}. The same command goes on.", file=sys.stderr)
    raise typer.Exit(status)


@app.command()
def show(
    cell: Annotated[str, typer.Argument(help="A key, its beginning, or a record's file name.")],
    records: Records = Path("records"),
    as_json: AsJson = False,
) -> None:
    """Show one record: what was asked, measured, and where."""
    from bench.store import find, read
    from reports.record_page import record_page

    record = read(find(records, cell))
    if as_json:
        _print_json(record)
    else:
        print(record_page(record))


@app.command()
def count(
    model: Annotated[str, typer.Argument(help="A model (see `list models`) or timm:NAME.")],
    input_shape: Annotated[
        str, typer.Option("--input", help="Channels x height x width, such as 3x32x32.")
    ],
    classes: Annotated[
        int | None,
        typer.Option(min=1, help="Classes. [default: the model's own for timm, else 10]"),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the model, such as shortcut=B; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count a model's parameters and multiply-adds, layer by layer."""
    from dataclasses import asdict

    from bench.counting import count_layers, count_totals
    from models import create_model, is_known, names_like

    shape = _shape(input_shape)
    if not is_known(model):
        raise UnknownName("", "model", model, names_like(model))
    options = dict(_option(text) for text in option or [])
    try:
        network = create_model(model, shape, classes, **options)
        layers = count_layers(network, shape)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise SuiteError(f"model {model} with images of {input_shape}: {error}.") from error
    totals = asdict(count_totals(network, layers))
    if as_json:
        _print_json({"model": model, "input": list(shape), **totals, "layers": layers})
        return
    rows = [
        {
            "layer": layer.name,
            "shape": "x".join(map(str, layer.shape)),
            "weights": f"{layer.weights:,}",
            "MACs": f"{layer.dense_macs:,}",
        }
        for layer in layers
    ]
    _print_table(rows)
    print()
    # Non-zeros of a network that was not trained say nothing.
    shown = {name: value for name, value in totals.items() if name not in {"nonzero", "macs"}}
    _print_table([{"total": name, "": f"{value:,}"} for name, value in shown.items()])


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
        _print_report(records, names or None)
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


@app.command()
def conform(
    method: Annotated[
        str, typer.Argument(help="A method (see `list methods`), FILE.py or FILE.py:Class.")
    ],
    as_json: AsJson = False,
) -> None:
    """Try whether a method keeps the rules of the interface, and say in words what it breaks.

    Exit status: 0 it conforms, 1 it does not, 2 usage.
    """
    from bench.conformance import check_method
    from bench.interface import load
    from bench.runner import set_up_process

    set_up_process(threads=1)
    report = check_method(load(method))
    if as_json:
        _print_json({"method": report.method, "ok": report.ok, "findings": report.findings})
    else:
        print(report.text)
    raise typer.Exit(0 if report.ok else 1)


@new.command("method")
def new_method(
    name: Annotated[str, typer.Argument(help="In small letters, such as my_method.")],
    to: Annotated[
        Path, typer.Option("--to", help="Folder to write into; a clone or any.")
    ] = Path(),
) -> None:
    """Write a starting file for a method, and its test. It runs as it is."""
    from bench.starter import write_method

    print(write_method(name, to))


def main() -> None:
    """Entry point; errors meant for the user become one line and an exit status."""
    try:
        app()
    except BenchError as error:
        print("sparsebench:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)


def _resolve(suite: str, data: Path | None, records: Path) -> tuple[Plan, Store]:
    from bench import suite as suites
    from bench.store import Store

    loaded = suites.load(suite)  # a wrong name is told before torch is imported
    from bench.resolve import resolve

    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    resolved = resolve(loaded, data or cache / "sparsebench")
    return resolved, Store(records, resolved.manifest.suite)


def _print_report(records: Path, names: list[str] | None) -> None:
    from reports.tables import report as render

    print(render(records, names))


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise SuiteError(f"--input {text}: give channels x height x width, such as 3x32x32.")
    channels, height, width = map(int, parts)
    return channels, height, width


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise SuiteError(f"--option {text}: give name=value, such as shortcut=B.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _print_json(value: object) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=1).decode())


def _print_table(rows: list[dict[str, Any]]) -> None:
    from tabulate import tabulate

    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
