"""`sparsebench`: the one place where everything meets. A command imports what it needs."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bench import processes, reporting, signals
from bench.arguments import AsJson, Cell, Data, Device, Only, Recipe, Records, Suite
from bench.errors import BenchError, SuiteError, UnknownName, UsageError
from bench.listing import Table, conflicts, listing
from bench.reporting import print_json

if TYPE_CHECKING:
    from torch import nn

    from bench.launch import Settings
    from bench.record import LayerCount
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
app.add_typer(reporting.app)

INTERRUPTED = 130


@app.command("list")
def list_(what: Table, as_json: AsJson = False) -> None:
    """Show what there is: methods, models, data sets, recipes or suites."""
    rows = listing(what)
    if as_json:
        print_json(rows)
    else:
        _print_table(rows)
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
    _print_table(rows)
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
def export(
    cell: Cell,
    records: Records = Path("records"),
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write. [default: the cell's name]")
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Cut out the channels that are dead.")
    ] = False,
    recipe: Recipe = None,
    data: Data = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an export.")] = False,
) -> None:
    """Write a cell's finished network as a folder: safetensors, bit-packed masks, recipe, record.

    A compact network is written only if its outputs are those of the masked one.
    """
    from bench.export import export as write
    from bench.process_settings import set_up_process
    from bench.store import find

    path = find(records, cell)
    set_up_process(threads=1)
    folder = _data_folder(data)
    written = write(path, out, compacted=compact, recipe=recipe, data=folder, force=force)
    for note in written.notes:
        print(f"sparsebench: {note}.", file=sys.stderr)
    if written.sizes:
        names = ("with its zeros", "compact")
        _print_table(
            [
                {"network": name, "parameters": f"{s.parameters:,}", "MACs": f"{s.dense_macs:,}"}
                for name, s in zip(names, written.sizes, strict=True)
            ]
        )
    print(written.folder)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A folder that `export` wrote.")],
    data: Data = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="The same data under another name, such as imagefolder:PATH."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Test an export on its data set, and compare with its record.

    Exit status: 0 as recorded, 1 not (the same weights on the same device), 2 usage.
    """
    from bench import launch
    from bench.exported import evaluate_export, read_record
    from bench.process_settings import set_up_process

    set_up_process(read_record(folder).environment.threads)  # sums depend on it
    device = launch.usable_device(device)
    found = evaluate_export(folder, _data_folder(data), device, dataset)
    for name, right in (("now", found.right), ("recorded", found.recorded)):
        share = 100 * right / found.images
        print(f"{name + ':':10}{share:.2f} %, {right:,} of {found.images:,} images")
    if not found.comparable:
        print("A compact network, or another device: a few images may differ.")
    raise typer.Exit(1 if found.differs else 0)


@app.command()
def latency(
    cell: Cell,
    records: Records = Path("records"),
    recipe: Recipe = None,
    data: Data = None,
    device: Device = "auto",
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Images per call; repeatable. [default: 1 and 64]"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    rounds: Annotated[
        int | None,
        typer.Option(min=6, help="Turns of each network. [default: what fits in 10 s]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time inference of a cell's network: dense, masked, compact, and 2:4 where a GPU has it."""
    from bench import launch
    from bench.latency import latency as measure
    from bench.latency import table
    from bench.process_settings import set_up_process
    from bench.store import find

    path = find(records, cell)
    set_up_process(threads)
    device = launch.usable_device(device)
    measured = measure(path, _data_folder(data), device, batch or [1, 64], rounds, recipe)
    if as_json:
        print_json(measured)
    else:
        print(table(measured))


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
        plan = profiling.of_record(find(records, what), recipe, _data_folder(data))
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
    sparsity: Annotated[
        float | None,
        typer.Option(help="Count as if so many of the prunable weights were zero, such as 0.9."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(help="How the layers share what is left: erk, er or uniform. [default: erk]"),
    ] = None,
    prunable: Annotated[
        str, typer.Option(help="Preset of prunable weights, as `prunable` in a suite.")
    ] = "all",
    as_json: AsJson = False,
) -> None:
    """Count a model's parameters and multiply-adds, layer by layer, dense and at a sparsity.

    MACs A are multiply-adds of weights and attention; B adds two operations for each output of a
    normalisation and one for each of a ReLU or its kind.
    """
    from dataclasses import asdict

    from bench.counting import count_totals, with_kept
    from bench.prunable import PRESETS
    from methods.allocation import allocate
    from models import is_known, names_like

    shape = _shape(input_shape)
    scope = _allocation(sparsity, scope)
    if not is_known(model):
        raise UnknownName("", "model", model, names_like(model))
    if prunable not in PRESETS:
        raise UnknownName("--prunable", "preset", prunable, PRESETS)
    options = dict(_option(text) for text in option or [])
    try:
        # Without values no weight is drawn and nothing is computed; not every model can do that.
        network, layers = _counted(model, shape, classes, options, prunable, sparsity, "meta")
    except Exception:
        try:
            network, layers = _counted(model, shape, classes, options, prunable, sparsity, "cpu")
        except Exception as error:  # the model may be anyone's
            reason = str(error) or type(error).__name__
            raise SuiteError(f"model {model} with images of {input_shape}: {reason}.") from error
    if scope and sparsity is not None:
        shapes = {line.name: line.shape for line in layers if line.prunable}
        layers = with_kept(layers, allocate(shapes, 1 - sparsity, scope))
    else:
        layers = with_kept(layers, {line.name: line.weights for line in layers if line.weights})
    totals = count_totals(network, layers)
    zeros = sum(line.weights - line.nonzero for line in layers if line.prunable)
    weights = sum(line.weights for line in layers if line.prunable)
    found = {
        "model": model,
        "input": list(shape),
        "preset": prunable,
        "sparsity": sparsity,
        "scope": scope,
        **asdict(totals),
        "nonzero": totals.parameters - zeros,
        "prunable": weights,
        "prunable_nonzero": weights - zeros,
        "reached_sparsity": zeros / weights,
        "sparsity_of_all": zeros / totals.parameters,
        "mac_fraction": totals.macs / totals.dense_macs,
        "dense_macs_b": totals.dense_macs + totals.elementwise,
        "macs_b": totals.macs + totals.elementwise,
    }
    if as_json:
        print_json(found | {"layers": layers})
        return
    _print_table([_count_row(layer, sparsity is not None) for layer in layers])
    print()
    _print_table([{"total": name, "": text} for name, text in _count_totals(found)])


def _counted(
    model: str,
    shape: tuple[int, int, int],
    classes: int | None,
    options: dict[str, Any],
    preset: str,
    sparsity: float | None,
    device: str,
) -> tuple[nn.Module, tuple[LayerCount, ...]]:
    """A network and its lines."""
    import torch

    from bench.counting import count_layers
    from bench.prunable import prunable_names
    from methods.dense import Dense
    from models import create_model

    with torch.device(device):
        network = create_model(model, shape, classes, **options)
    names = prunable_names(network, Dense(), preset, sparsity)
    layers = count_layers(network, shape, names)
    if device == "meta" and any(line.weights and not line.dense_macs for line in layers):
        # An older torch lets an image shrink to nothing there; on the CPU it says what is wrong.
        raise ValueError("a layer computes nothing")
    return network, layers


def _allocation(
    sparsity: float | None, scope: str | None
) -> Literal["er", "erk", "uniform"] | None:
    """The rule that gives each layer its share; None where nothing is pruned."""
    if sparsity is None:
        if scope is not None:
            raise UsageError(f"--scope {scope}: give --sparsity too, such as 0.9.")
        return None
    if not 0 <= sparsity < 1:
        raise UsageError(f"--sparsity {sparsity:g}: must be at least 0 and below 1.")
    if scope == "global":
        raise UsageError(
            "--scope global: ranks the weights of all layers together, which only a trained "
            "network has. Allowed: er, erk, uniform."
        )
    if scope in (None, "er", "erk", "uniform"):
        return scope or "erk"  # type: ignore[return-value]
    raise UnknownName("--scope", "scope", str(scope), ("er", "erk", "uniform"))


def _count_row(layer: LayerCount, sparse: bool) -> dict[str, str]:
    row = {
        "layer": layer.name,
        "shape": "x".join(map(str, layer.shape)),
        "weights": f"{layer.weights:,}",
    }
    if sparse:
        density = f"{layer.nonzero / layer.weights:.4f}" if layer.weights else ""
        row |= {"left": f"{layer.nonzero:,}", "density": density}
    row["MACs A"] = f"{layer.dense_macs:,}"
    if sparse:
        row["sparse MACs A"] = f"{layer.macs:,}"
    return row | {"B adds": f"{layer.elementwise:,}"}


def _count_totals(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is printed of the totals, with words for names."""
    for name in ("parameters", "weights", "conv_weights", "shortcut_weights", "norm", "bias"):
        yield name.replace("_", " "), f"{found[name]:,}"
    yield f"prunable ({found['preset']})", f"{found['prunable']:,}"
    yield "MACs A", f"{found['dense_macs']:,}"
    yield "MACs B", f"{found['dense_macs_b']:,}"
    if found["sparsity"] is None:
        return
    yield "prunable left", f"{found['prunable_nonzero']:,}"
    yield "sparsity of the prunable", f"{found['reached_sparsity']:.6f}"
    yield "parameters left", f"{found['nonzero']:,}"
    yield "sparsity of all parameters", f"{found['sparsity_of_all']:.6f}"
    yield "sparse MACs A", f"{found['macs']:,}"
    yield "sparse MACs B", f"{found['macs_b']:,}"
    yield "fraction of MACs A", f"{found['mac_fraction']:.4f}"


@app.command()
def reproduce(
    cell: Cell,
    records: Records = Path("records"),
    suite: Annotated[
        str | None, typer.Option("--suite", help="The cell's suite, where its file is elsewhere.")
    ] = None,
    recipe: Recipe = None,
    data: Data = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1. [default: as recorded]")
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Train the cell again, and compare with the record.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="With --run: folder of the records. [default: none is kept]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the command that makes a record again, and what differs from where it was made.

    With --run, exit status 0 if accuracy, counts and weights are equal to the last bit, 1 if not.
    """
    import tempfile

    from bench import reproduce as again
    from bench.store import find

    if out is not None and not run:
        raise UsageError(f"--out {out}: is for --run.")
    path = find(records, cell)
    sources = again.Sources(suite, recipe, _data_folder(data), device)
    found = again.describe(path, sources)
    differences = None
    if run:
        with tempfile.TemporaryDirectory(prefix="sparsebench-") as scratch:
            differences = again.run_again(path, sources, out or Path(scratch))
    if as_json:
        print_json({"here": found, "measured": differences})
    else:
        print(again.text(found, differences))
    raise typer.Exit(1 if differences else 0)


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

    findings = checks.examine(checks.Places(_data_folder(data), records))
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

    resolved = resolve(loaded, _data_folder(data))
    for note in () if quiet else resolved.notes:
        print(f"sparsebench: {note}.", file=sys.stderr)
    return resolved, Store(records, resolved.manifest.suite)


def _data_folder(data: Path | None) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return data or cache / "sparsebench"


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


def _print_table(rows: list[dict[str, Any]]) -> None:
    from tabulate import tabulate

    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
