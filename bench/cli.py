"""`sparsebench`: the one place where everything meets. A command imports what it needs."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bench import cell_commands, count_command, processes, reporting, signals
from bench.arguments import AsJson, Data, Device, Only, Recipe, Records, Suite, data_folder
from bench.errors import BenchError, UsageError
from bench.listing import Table, conflicts, listing
from bench.output import print_json, print_table

if TYPE_CHECKING:
    from bench.launch import Settings
    from bench.resolve import Plan
    from bench.store import Cell as Asked
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
app.add_typer(cell_commands.app)
app.add_typer(count_command.app)
app.add_typer(reporting.app)

INTERRUPTED = 130


@app.command("list")
def list_(what: Table, as_json: AsJson = False) -> None:
    """Show what there is: methods, models, data sets, recipes or suites."""
    rows = listing(what)
    if as_json:
        print_json(rows)
    else:
        print_table(rows)
    for conflict in conflicts(what):
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
    cells = launch.chosen(launch.without_lost(resolved, store), only)
    for cell in cells:
        spec = cell.spec
        record = None if cell.skipped else store.get(spec, brief=True)
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
        print_json(rows)
        return
    for row in rows:
        row.pop("done")
    print_table(rows)
    missing = {row["key"] for row in rows if row["status"] == "to do"}
    every = {row["key"] for row in rows}
    print(f"\n{len(every)} cells, {len(missing)} to do; records in {store.folder}")
    if resolved.controls:
        steps = {cell.spec.key: cell.steps for cell in sorted(cells, key=lambda cell: cell.steps)}
        added = [count for key, count in steps.items() if key in resolved.controls]
        total = sum(steps.values())
        print(f"controls add {len(added)} of the cells, and {sum(added)} of their {total} steps")
    for text in dict.fromkeys(f"{c.label}: {c.skipped}" for c in cells if c.skipped):
        print(f"skipped: {text}")


@app.command()
def run(
    suite: Suite,
    data: Data = None,
    records: Records = Path("records"),
    device: Device = "auto",
    workers: Annotated[
        int,
        typer.Option(
            min=0, max=4096, help="Cells trained side by side; 0: a CPU core each, or 1 a GPU."
        ),
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads per cell.")] = 1,
    only: Only = None,
    limit_minutes: Annotated[
        float | None, typer.Option(help="Save and stop after so many minutes (exit status 5).")
    ] = None,
    checkpoint_seconds: Annotated[
        float, typer.Option(min=0, help="Time between checkpoints of a cell.")
    ] = 60,
    cell_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            help="What a cell may take, in all tries together; then it is saved and given up.",
        ),
    ] = None,
    decoders: Annotated[
        int,
        typer.Option(min=0, help="Processes per cell that decode image files; 0: as cores allow."),
    ] = 0,
    stack: Annotated[
        int,
        typer.Option(min=1, max=64, help="Small cells computed as one network, on the CPU."),
    ] = 1,
    cells_per_device: Annotated[
        str, typer.Option(metavar="N|auto", help="Cells at a time on a GPU; auto: as many as fit.")
    ] = "1",
    graph: Annotated[
        bool | None,
        typer.Option(
            "--graph/--no-graph",
            help="Replay steps as a CUDA graph, on a GPU. [default: where it can be done]",
        ),
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile forward and backward passes (torch.compile).")
    ] = False,
    determinism: Annotated[
        Literal["strict", "fast"] | None,
        typer.Option(
            help="strict: a GPU computes the same bits each time, slower. [default: fast; a CPU is "
            "strict anyway]"
        ),
    ] = None,
    retries: Annotated[
        int,
        typer.Option(
            min=0,
            max=1000,
            help="How often a cell that was lost or ran out of memory is tried again, with fewer "
            "cells side by side.",
        ),
    ] = 1,
    strict: Annotated[
        bool, typer.Option("--strict", help="Save and stop at the first cell that is not ok.")
    ] = False,
    executor: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Who trains: processes of this machine, or a Ray cluster."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster. [default: RAY_ADDRESS, else one is started here]"),
    ] = None,
) -> None:
    """Train the cells of a suite that have no record yet, and print the suite's table.

    Exit status: 0 done, 1 a cell failed, 2 usage, 5 stopped by --limit-minutes with cells left,
    130 or 143 saved and stopped by Ctrl-C or SIGTERM (a second one does not wait for the saving).
    """
    started = time.monotonic()
    if limit_minutes is not None and not limit_minutes > 0:
        raise UsageError(f"--limit-minutes {limit_minutes}: must be above 0.")
    if cell_timeout is not None and not cell_timeout > 0:
        raise UsageError(f"--cell-timeout {cell_timeout}: must be above 0.")
    with signals.at_once():
        # Under torchrun this process is itself the worker.
        local = executor == "local" and "TORCHELASTIC_RUN_ID" not in os.environ
        if local and processes.likely(workers, device):
            processes.begin_early()
        from bench import suite as suites

        suites.load(suite)  # a wrong name is told before torch is imported

        from bench import distributed, launch
        from bench.determinism import wants_strict
        from bench.task import Ways

        group = distributed.meet(device)
        with group.in_turn("resolving"):
            plan, store = _resolve(suite, data, records, quiet=not group.leads)
        cells = launch.chosen(plan, only)
        device = group.device or launch.usable_device(device, executor, address)
    deadline = math.inf
    if limit_minutes is not None:
        limit = 60 * limit_minutes
        # What came so far counts, but cells have a minute in any case, or as much as was asked for;
        # less what is left to do when they have stopped.
        deadline = max(started + limit, time.monotonic() + min(limit, 60)) - min(2, limit / 10)
    settings = launch.Settings(
        device,
        workers,
        threads,
        deadline,
        checkpoint_seconds,
        decoders,
        launch.places(cells_per_device),
        Ways(
            stack,
            graph if graph is not None else group.size == 1,
            compile_,
            wants_strict(determinism, device),
        ),
        retries=retries,
        strict=strict,
        executor=executor,
        cell_timeout=math.inf if cell_timeout is None else 60 * cell_timeout,
        group=group,
    )
    late = _trained(plan, store, cells, settings)
    cells = launch.chosen(launch.without_lost(plan, store), only)
    reporting.print_report(records, [store.suite])
    status = launch.verdict(store, cells, late)
    if status == launch.CELLS_LEFT:
        left = launch.left(store, cells)
        print(f"Time is up, cells left: {left}. The same command goes on.", file=sys.stderr)
    raise typer.Exit(status)


@app.command()
def profile(
    what: Annotated[
        str, typer.Argument(metavar="SUITE|CELL", help="A suite, or a cell that has a record.")
    ],
    data: Data = None,
    records: Records = Path("records"),
    recipe: Recipe = None,
    device: Device = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    only: Only = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Seconds of training for each method.")
    ] = 3.0,
    drift: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS", help="Instead: whether steps are slower so many steps after pruning."
        ),
    ] = None,
    graph: Annotated[bool, typer.Option(help="Measure replayed CUDA graphs too, on a GPU.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show where the time of a step goes, and each method's overhead against dense, in turns.

    Nothing is stored. A suite's first sparsity and seed are measured; --only chooses others.
    """
    from bench import launch, profiling
    from bench import suite as suites
    from bench.process_settings import set_up_process
    from bench.store import find

    if what in suites.names() or what.endswith(".toml"):
        plan, _ = _resolve(what, data, records)
    else:
        plan = profiling.of_record(find(records, what), recipe, data_folder(data))
    cells = launch.chosen(plan, only)
    device = launch.usable_device(device)
    set_up_process(threads)
    if drift is None:
        measured = profiling.profile(plan, cells, device, seconds, graph=graph)
    else:
        measured = profiling.drift(plan, cells, device, drift, graph=graph)
    if as_json:
        print_json(measured)
    else:
        print(profiling.table(measured))


@app.command()
def doctor(
    data: Data = None,
    records: Records = Path("records"),
    as_json: AsJson = False,
) -> None:
    """Check device, versions, data, records and room, and say what is wrong and how to mend it.

    Exit status: 0 fine, 1 something is wrong.
    """
    from bench import doctor as checks

    findings = checks.examine(checks.Places(data_folder(data), records))
    wrong = any(finding.state == "wrong" for finding in findings)
    if as_json:
        print_json({"ok": not wrong, "findings": findings})
    else:
        print(checks.table(findings))
    raise typer.Exit(1 if wrong else 0)


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
    from bench.process_settings import set_up_process

    set_up_process(threads=1)
    report = check_method(load(method))
    if as_json:
        print_json({"method": report.method, "ok": report.ok, "findings": report.findings})
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
        text = " ".join(str(error).split())
        if text.endswith("..") and not text.endswith("..."):  # others' words had their own
            text = text[:-1]
        print("sparsebench:", text, file=sys.stderr)
        status: int | str | None = error.exit_code
    except SystemExit as ended:
        status = ended.code
    processes.end_soon(status if isinstance(status, int) else status is not None)
    sys.exit(status)


def _trained(plan: Plan, store: Store, cells: list[Asked], settings: Settings) -> bool:
    """Trains what is missing; whether time was up. Does not return where it was told to stop.

    Raises:
        typer.Exit: a signal came, or another process of the group goes on from here.
    """
    from bench import launch

    status = 0
    try:
        with signals.listen():
            try:
                late = launch.train(plan, store, cells, settings)
            except OSError as error:
                raise BenchError(f"{store.folder}: cannot write there ({error}).") from error
            finally:
                status = signals.exit_status()
                settings.group.close()
            if not settings.group.leads:
                raise typer.Exit
            if status := signals.exit_status():
                print("Saved and stopped. The same command goes on.", file=sys.stderr)
                raise typer.Exit(status)
            return late
    except KeyboardInterrupt:  # a second signal, wherever it came
        print("Stopped. The same command goes on from the last checkpoints.", file=sys.stderr)
        raise typer.Exit(status or INTERRUPTED) from None


def _resolve(
    suite: str, data: Path | None, records: Path, *, quiet: bool = False
) -> tuple[Plan, Store]:
    from bench import suite as suites
    from bench.store import Store

    loaded = suites.load(suite)  # a wrong name is told before torch is imported
    from bench.resolve import resolve

    resolved = resolve(loaded, data_folder(data))
    for note in () if quiet else resolved.notes:
        print(f"sparsebench: {note}.", file=sys.stderr)
    return resolved, Store(records, resolved.manifest.suite)
