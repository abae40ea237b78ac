"""A record made again: the command, what differs here from where it was made, and the comparison.

What stands in a record may be anybody's. So the command names only variables that choose kernels,
quotes every word, and nothing is run but the harness itself.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import folders, launch, recipes
from bench import suite as suites
from bench.datasets import DATASETS
from bench.determinism import wants_strict
from bench.environment import SETTINGS, environment
from bench.errors import BenchError, UsageError
from bench.finished import find_recipe
from bench.initial import PRETRAINED
from bench.profiling import of_record
from bench.recipes import Recipe
from bench.record import Environment, Execution, Record
from bench.resolve import Plan, load_data, resolve
from bench.store import Store, read
from bench.task import Ways

FOLDER = "reproduced"
"""Where the printed command writes: beside the records, not over them."""

APART = ("settings", "threads", "dirty", "changes", "peak_memory_bytes")
"""Fields of an environment that are compared in their own way, or not at all."""

OF_GPUS = ("cuda", "cudnn", "driver")

MEASURED = ("status", "top1", "top5", "steps", "counts", "weights_hash")
"""Fields of a record that must be equal."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same."""

    what: str
    recorded: str
    here: str


@dataclass(frozen=True, slots=True)
class Sources:
    """Where what a record only names is looked for.

    Attributes:
        suite: a suite's name or file; None: the record's own, or that file in this folder.
        recipe: file of the cell's recipe; None: one that comes with the harness, or the suite's.
        data: folder of the data sets.
        device: as torch names it; None: of the recorded kind.
    """

    suite: str | None
    recipe: Path | None
    data: Path
    device: str | None


@dataclass(frozen=True, slots=True)
class Reproduction:
    """How to make a record again.

    Attributes:
        command: to type.
        differences: between there and here.
        unknown: what the record does not say, as it is from before that was recorded.
    """

    command: str
    differences: tuple[Difference, ...]
    unknown: tuple[str, ...]


def describe(path: Path, sources: Sources) -> Reproduction:
    """What it takes to make a record again here; trains and downloads nothing.

    Args:
        path: of the record, see `bench.store.find`.
        sources: where to look.

    Raises:
        RecordError: the record is damaged.
        UsageError: the device cannot be used here.
    """
    record = read(path)
    here = environment(torch.device(launch.usable_device(_device(record, sources))))
    there = record.environment
    unknown = [
        name
        for name in _compared()
        if getattr(there, name) in ("", "unknown")
        and (name not in OF_GPUS or _kind(there) != "cpu")
    ]
    if record.execution is None:
        unknown.append("ways of computing")
    found = (*_elsewhere(record, here), *_asked(record, sources))
    return Reproduction(_command(record, sources), found, tuple(unknown))


def run_again(path: Path, sources: Sources, scratch: Path) -> tuple[Difference, ...]:
    """Trains the cell of a record anew, and compares.

    Args:
        path: of the record.
        sources: where to look.
        scratch: folder of records to write into.

    Returns:
        What differs; nothing where the two are equal to the last bit.

    Raises:
        UsageError: the question cannot be asked here; nothing was trained.
    """
    record = read(path)
    device = launch.usable_device(_device(record, sources))
    plan = _plan(record, path, sources)
    cells = [cell for cell in plan.manifest.cells if cell.spec.key == record.spec.key]
    if not cells:
        raise UsageError(_another_question(record, plan))
    how = record.execution or Execution()
    if how.devices > 1:
        raise UsageError(
            f"{record.spec.slug}: {how.devices} devices trained it together; type the command that "
            "is shown without --run, and `sparsebench compare` the records."
        )
    strict = device != "cpu" and wants_strict(how.determinism, device)
    ways = Ways(stack=how.stack, graph=how.graph, compiled=how.compiled, strict=strict)
    settings = launch.Settings(device, workers=1, threads=record.environment.threads, ways=ways)
    store = Store(scratch, plan.manifest.suite)
    launch.train(plan, store, cells, settings)
    made = store.get(record.spec) or next(
        (one for one in reversed(store.attempts()) if one.spec.key == record.spec.key), None
    )
    if made is None:
        raise UsageError(f"{record.spec.slug}: has no record yet; stopped before it ended.")
    return tuple(_measured(record, made))


def _command(record: Record, sources: Sources) -> str:
    """The command that trains the cell as it was trained."""
    how, kind = record.execution or Execution(), _kind(record.environment)
    start = ["sparsebench"]
    if how.devices > 1:
        start = ["torchrun", "--nproc-per-node", str(how.devices), "-m", "bench"]
    words = [*start, "run", _suite(record, sources) or f"{record.suite}.toml"]
    words += ["--only", record.spec.slug, "--records", FOLDER, "--data", str(sources.data)]
    words += ["--device", sources.device or kind, "--threads", str(record.environment.threads)]
    words += ["--stack", str(how.stack)] if how.stack > 1 else []
    words += ["--compile"] if how.compiled else []
    if kind != "cpu":
        words += [] if how.graph else ["--no-graph"]
        words += ["--determinism", how.determinism] if how.determinism else []
    variables = [f"{name}={value}" for name, value in _variables(record.environment)]
    return shlex.join([*(["env", *variables] if variables else []), *words])


def _variables(there: Environment) -> Iterator[tuple[str, str]]:
    """Recorded settings; a record of somebody else's could name any other variable."""
    for name, value in there.settings:
        if SETTINGS.fullmatch(name) and name.isidentifier() and value.isprintable():
            yield name, value


def _compared() -> list[str]:
    return [field.name for field in dataclasses.fields(Environment) if field.name not in APART]


def _elsewhere(record: Record, here: Environment) -> Iterator[Difference]:
    """What differs in the machine, its software and the harness."""
    there = record.environment
    for name in _compared():
        recorded, found = getattr(there, name), getattr(here, name)
        if recorded not in ("", "unknown", found):
            yield Difference(name, str(recorded), str(found) or "none")
    if (there.dirty, there.changes) != (here.dirty, here.changes):
        yield Difference("changes to the commit", _changes(there), _changes(here))
    for origin in record.execution.before if record.execution else ():
        yield Difference("trained in part by", str(origin), "all by one, in one place")
    recorded, found = dict(_variables(there)), dict(here.settings)
    for name in sorted(recorded.keys() | found.keys() if there.numpy else ()):
        if recorded.get(name) != found.get(name):
            unset = "not set"
            yield Difference(name, recorded.get(name, unset), found.get(name, unset))


def _changes(where: Environment) -> str:
    return (where.changes or "some") if where.dirty else "none"


def _asked(record: Record, sources: Sources) -> Iterator[Difference]:
    """Whether recipe and data have the recorded contents here."""
    spec = record.spec
    suite = _suite(record, sources)
    if suite is None:
        yield Difference("suite", record.suite, "not here: name its file by --suite")
    try:
        recipe = _recipe(record, sources)
    except BenchError as error:
        yield Difference("recipe", spec.recipe_hash, str(error))
        return
    if recipe is None:
        yield Difference("recipe", f"{spec.recipe} ({spec.recipe_hash})", "not here: give --recipe")
    elif recipe.hash != spec.recipe_hash:
        yield Difference("recipe", spec.recipe_hash, recipe.hash)
    if recipe is not None:
        found = _data_hash(spec.dataset, recipe, sources.data, _start(suite))
        if found != spec.data_hash:
            yield Difference(f"data ({spec.dataset})", spec.data_hash, found)


def _data_hash(name: str, recipe: Recipe, data: Path, start: Path) -> str:
    """Hash of a data set's content, or why there is none; downloads nothing."""
    if _to_download(name, data):
        return f"{data / f'{name}.npz'}: not here, the command downloads it"
    try:
        return load_data(name, recipe, data, start).hash
    except BenchError as error:
        return str(error)


def _to_download(name: str, data: Path) -> bool:
    """Whether a data set would have to be downloaded first."""
    known = DATASETS.get(name)
    return bool(known and known.torchvision) and not (data / f"{name}.npz").exists()


def _recipe(record: Record, sources: Sources) -> Recipe | None:
    """The recipe by the recorded name: given, of the harness, or beside the suite."""
    name = record.spec.recipe
    if sources.recipe is not None or not name.endswith(".toml"):
        known = find_recipe(record, sources.recipe)
        return recipes.load(name, "recipe") if known is None and name in recipes.names() else known
    suite = _suite(record, sources)
    # The name is the record's: a file is read only where the user has said which suite is meant.
    return None if suite is None else _suites_recipe(suite)


def _suites_recipe(suite: str) -> Recipe:
    """The recipe that a suite names."""
    loaded = suites.load(suite)
    return recipes.load(loaded.recipe, f"{loaded.where}: recipe", loaded.folder)


def _start(suite: str | None) -> Path:
    return Path() if suite is None else suites.load(suite).folder


def _suite(record: Record, sources: Sources) -> str | None:
    """The suite's name or file; None where it is not here.

    A file in this folder may have the name of a suite that comes with the harness: of the two, that
    which asks for the record's cell.
    """
    if sources.suite is not None:
        return sources.suite
    file = f"{record.suite}.toml"
    found = [record.suite] if record.suite in suites.names() else []
    found += [file] if Path(file).is_file() else []
    if len(found) == 2 and not _asks(found[0], record, sources) and _asks(file, record, sources):
        return file
    return found[0] if found else None


def _asks(suite: str, record: Record, sources: Sources) -> bool:
    """Whether a suite has the record's cell; False where that takes a download."""
    try:
        loaded = suites.load(suite)
        if loaded.init == PRETRAINED or _to_download(loaded.dataset, sources.data):
            return False
        cells = resolve(loaded, sources.data).manifest.cells
    except BenchError:
        return False
    return any(cell.spec.key == record.spec.key for cell in cells)


def _plan(record: Record, path: Path, sources: Sources) -> Plan:
    """The suite's cells; those of a record that says all by itself, where the suite is not here."""
    suite = _suite(record, sources)
    if suite is not None:
        return resolve(suites.load(suite), sources.data)
    if folders.is_folder(record.spec.dataset):
        raise UsageError(f"{record.suite}: images lie beside the suite; name its file by --suite.")
    return of_record(path, sources.recipe, sources.data)


def _another_question(record: Record, plan: Plan) -> str:
    """Why no cell of a suite has the record's key: in what the nearest differs."""
    spec, name = record.spec, plan.manifest.suite
    near = [
        cell.spec
        for cell in plan.manifest.cells
        if cell.label == record.label
        and (cell.spec.model, cell.spec.seed) == (spec.model, spec.seed)
    ]
    texts = [
        f"{field} is {getattr(other, field)!r}, recorded {getattr(spec, field)!r}"
        for other in near[:1]
        for field in (one.name for one in dataclasses.fields(spec))
        if getattr(other, field) != getattr(spec, field)
    ]
    why = "; ".join(texts) or f"it has no row {record.label!r} with this model and seed"
    return f"suite {name} no longer asks for {spec.slug}: {why}. Nothing was trained."


def _device(record: Record, sources: Sources) -> str:
    return sources.device or _kind(record.environment)


def _kind(there: Environment) -> str:
    """Kind of the recorded device; records from before that was in them have its name only."""
    if there.kind:
        return "cuda" if there.kind == "cuda" else "cpu"
    return "cuda" if there.device.startswith(("NVIDIA", "Tesla", "AMD Instinct")) else "cpu"


def _measured(record: Record, made: Record) -> Iterator[Difference]:
    for name in MEASURED:
        yield from _unequal(name, getattr(record, name), getattr(made, name))


def _unequal(name: str, recorded: Any, made: Any) -> Iterator[Difference]:
    """Counts are compared one by one, so that the table stays readable."""
    if dataclasses.is_dataclass(recorded) and type(recorded) is type(made):
        for field in dataclasses.fields(recorded):
            yield from _unequal(
                f"{name}.{field.name}", getattr(recorded, field.name), getattr(made, field.name)
            )
    elif recorded != made:
        yield Difference(name, str(recorded), str(made))


def table(found: Sequence[Difference], here: str = "here") -> str:
    """Differences for people."""
    from tabulate import tabulate

    rows = [(one.what, one.recorded, one.here) for one in found]
    headers = ("what", "recorded", here)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def text(found: Reproduction, measured: Sequence[Difference] | None) -> str:
    """A reproduction for people; `measured` is what a new training gave otherwise, if there was."""
    parts = [found.command]
    if found.differences:
        parts.append(table(found.differences))
    else:
        parts.append("Nothing that was recorded differs here.")
    if found.unknown:
        parts.append(f"The record does not say: {', '.join(found.unknown)}.")
    if measured:
        parts.append(table(measured, "made again"))
    elif measured is not None:
        parts.append("Made again: accuracy, counts and weights are equal to the last bit.")
    return "\n\n".join(parts)
