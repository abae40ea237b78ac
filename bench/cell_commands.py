"""The commands of one finished cell: its network as a folder, its accuracy, speed, once more."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.arguments import AsJson, Cell, Data, Device, Recipe, Records, data_folder
from bench.errors import UsageError
from bench.output import print_json, print_table

app = typer.Typer(rich_markup_mode=None)


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
    folder = data_folder(data)
    written = write(path, out, compacted=compact, recipe=recipe, data=folder, force=force)
    for note in written.notes:
        print(f"sparsebench: {note}.", file=sys.stderr)
    if written.sizes:
        names = ("with its zeros", "compact")
        print_table(
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
    found = evaluate_export(folder, data_folder(data), device, dataset)
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
    measured = measure(path, data_folder(data), device, batch or [1, 64], rounds, recipe)
    if as_json:
        print_json(measured)
    else:
        print(table(measured))


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
    sources = again.Sources(suite, recipe, data_folder(data), device)
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
