"""A finished network as a folder that anybody can read: safetensors, JSON and TOML, no pickles.

weights.safetensors  parameters and buffers, by their names in the plain network
masks.safetensors    of the prunable weights, see `bench.sources.write_masks`; none where compact
network.json         what it takes to build the network and to feed it, see `Description`
recipe.toml          how it was trained, field by field; left out where its content is not known
record.json          what the cell measured
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bench import folders, recipes
from bench.checkpoint import tensor_hash
from bench.compact import Compacted, compact, rebuild
from bench.counting import Totals, count_layers, count_totals
from bench.data import Data
from bench.datasets import DATASETS, DatasetInfo
from bench.environment import environment
from bench.errors import CannotCompact, DataError, RecordError, SuiteError, UsageError
from bench.evaluate import evaluate
from bench.networks import make_model
from bench.recipes import Recipe
from bench.record import Record, decode, encode
from bench.resolve import load_arrays, load_data
from bench.sources import write_masks
from bench.spec import Scalar
from bench.store import Store, read, write_atomically
from bench.streaming import to_device

FORMAT = "sparsebench-export-1"
WEIGHTS, MASKS, NETWORK = "weights.safetensors", "masks.safetensors", "network.json"
RECIPE, RECORD = "recipe.toml", "record.json"

TOLERANCE = 1e-5
"""Largest difference between a compact network's outputs and the masked one's, over the largest
absolute output of the masked one among the same images."""

COMPARED = 64
"""Images of each kind on which the two are compared."""


@dataclass(frozen=True, slots=True)
class Description:
    """What it takes to build an exported network and to feed it.

    Attributes:
        format: `FORMAT`.
        model: name for `models.create_model`; `options`, its keywords.
        input_shape: (channels, height, width).
        classes: size of the output.
        dataset: for people; `data_hash` is its content.
        mean: per channel, of training pixels scaled to [0, 1]; `std` likewise.
        normalise: whether the network wants (pixel / 255 - mean) / std; else pixel / 255. None
            where the recipe is not known.
        weights_hash: of the tensors, see `bench.checkpoint.tensor_hash`.
        kept: of a compact network, what `bench.compact.rebuild` makes it from; None for others.
    """

    format: str
    model: str
    options: dict[str, Scalar]
    input_shape: tuple[int, int, int]
    classes: int
    dataset: str
    data_hash: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalise: bool | None
    weights_hash: str
    kept: dict[str, dict[str, list[int]]] | None = None

    @property
    def info(self) -> DatasetInfo:
        """The data set as a network sees it."""
        return DatasetInfo(self.input_shape, self.classes, self.mean, self.std, "", "")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        folder: where it lies.
        notes: what people should know.
        sizes: of the masked and of the compact network; None where nothing was cut.
    """

    folder: Path
    notes: tuple[str, ...]
    sizes: tuple[Totals, Totals] | None = None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Images of the test set that an export gets right, and that its record says.

    Attributes:
        images: in the test set.
        right: of them, now; `recorded` when the cell ended.
        comparable: whether the two must agree: the same weights on the same kind of device.
    """

    images: int
    right: int
    recorded: int
    comparable: bool

    @property
    def differs(self) -> bool:
        """Whether the export is not what was recorded."""
        return self.comparable and self.right != self.recorded


def finished(path: Path) -> tuple[Record, dict[str, Tensor]]:
    """The record in a file, and its finished network's tensors.

    Args:
        path: of the record, see `bench.store.find`.

    Raises:
        RecordError: there is no such network, or it is not the one that was measured.
    """
    record = read(path)
    if not record.weights_hash:
        raise RecordError(
            f"{path.name}: the cell is {record.status} and left no network ({record.reason})."
        )
    weights = Store(path.parent.parent, path.parent.name).weights(record.spec)
    if not weights.exists():
        raise RecordError(
            f"{weights}: the network is not here (weights are not committed). Move its record "
            f"{path} away and run the suite again: sparsebench run {record.suite}"
        )
    tensors = _tensors(weights)
    if (found := tensor_hash(tensors)) != record.weights_hash:
        raise RecordError(
            f"{weights}: not the network of {path.name} (content {found}, recorded "
            f"{record.weights_hash}). Move the record away and run the suite again."
        )
    return record, tensors


def data_info(record: Record, recipe: Recipe | None, data: Path) -> DatasetInfo:
    """Shape and classes of a cell's data; only data that no table knows are read.

    Args:
        record: of the cell.
        recipe: the cell's, which says the size of a folder's images.
        data: folder of the data sets.

    Raises:
        UsageError: they must be read and cannot be.
    """
    name = record.spec.dataset
    if name in DATASETS:
        return DATASETS[name]
    if not folders.is_folder(name):
        return load_arrays(name, data).info
    if recipe is None:
        raise UsageError(
            f"{record.spec.slug}: the size of its images stands in its recipe "
            f"{record.spec.recipe}, which is not known here; name the file by --recipe."
        )
    return load_data(name, recipe, data, Path()).info


def plain_network(
    model: str, options: Mapping[str, Scalar], info: DatasetInfo, seed: int = 0
) -> nn.Module:
    """A freshly initialised network in evaluation mode; leaves torch's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        return make_model(model, info, options, seed).eval()


def masked_network(record: Record, info: DatasetInfo, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A cell's finished network, in evaluation mode, with its exact zeros.

    Raises:
        RecordError: the model has other tensors here than it had then.
    """
    spec = record.spec
    network = plain_network(spec.model, dict(spec.model_options), info)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise RecordError(f"{spec.slug}: not a network of {spec.model} here ({error}).") from error
    return network


def cut(record: Record, network: nn.Module, info: DatasetInfo) -> Compacted:
    """The network without its dead channels.

    Raises:
        CannotCompact: it cannot be cut, or was trained with `bn_leak`.
    """
    if dict(record.spec.options).get("bn_leak"):
        raise CannotCompact(
            f"{record.spec.slug}: bn_leak leaves the normalisation behind a pruned filter as it "
            "is, so the channel still sends a constant and cannot be cut out. Train without it."
        )
    return compact(network, info.shape)


def find_recipe(record: Record, given: Path | None) -> Recipe | None:
    """The recipe that a cell was trained by; a record holds its hash only.

    Args:
        record: of the cell.
        given: file to take it from; None: look among those that come with the harness.

    Raises:
        UsageError: the file holds another recipe.
    """
    spec = record.spec
    if given is not None:
        recipe = recipes.load(given.name, "--recipe", given.parent)
        if recipe.hash != spec.recipe_hash:
            raise UsageError(
                f"--recipe {given}: another recipe than the cell's (content {recipe.hash}, "
                f"recorded {spec.recipe_hash})."
            )
        return recipe
    if spec.recipe not in recipes.names():
        return None
    recipe = recipes.load(spec.recipe, "recipe")
    return recipe if recipe.hash == spec.recipe_hash else None


def export(
    path: Path,
    out: Path | None = None,
    *,
    compacted: bool = False,
    recipe: Path | None = None,
    data: Path = Path(),
    force: bool = False,
) -> Exported:
    """Writes a cell's finished network as a folder; it is there whole, or not at all.

    Args:
        path: of the record.
        out: the folder; None: the cell's slug, here.
        compacted: write the network without its dead channels, once it was compared.
        recipe: file of the recipe, where the harness has it not.
        data: folder of the data sets, for what must be read of one.
        force: replace an export that is there.

    Raises:
        UsageError: something is missing or in the way; nothing was written.
        CannotCompact: the network cannot be made smaller, or would not compute the same.
    """
    target = out or Path(read(path).spec.slug + ("-compact" if compacted else ""))
    _check_free(target, force)
    record, tensors = finished(path)
    found = find_recipe(record, recipe)
    info = data_info(record, found, data)
    notes = list(_warnings(record, found))
    network = masked_network(record, info, tensors)
    sizes, kept = None, None
    if compacted:
        smaller = cut(record, network, info)
        notes.append(_compared(record, network, smaller.model, _images(record, info, found, data)))
        sizes = (_totals(network, info), _totals(smaller.model, info))
        if sizes[0].parameters == sizes[1].parameters:
            notes.append("no channel is dead: nothing was cut out")
        tensors = {n: t.contiguous().clone() for n, t in smaller.model.state_dict().items()}
        kept = smaller.kept
    description = _description(record, info, found, tensor_hash(tensors), kept)
    with _staged(target) as folder:
        write_atomically(folder / WEIGHTS, save(tensors))
        if not compacted:
            write_masks(folder / MASKS, _masks(record, tensors))
        write_atomically(folder / NETWORK, msgspec.json.format(msgspec.json.encode(description)))
        write_atomically(folder / RECORD, encode(record))
        if found is not None:
            write_atomically(folder / RECIPE, to_toml(found).encode())
            assert recipes.load(RECIPE, str(folder), folder).hash == found.hash
    return Exported(target, tuple(notes), sizes)


def to_toml(recipe: Recipe) -> str:
    """A recipe with every field spelled out, as `bench.recipes.load` reads it."""
    fields = {field: getattr(recipe, field) for field in Recipe.__dataclass_fields__}
    lines = [f"{field} = {_value(v)}" for field, v in fields.items() if v is not None]
    return "\n".join([*lines, ""])


def _value(value: Any) -> str:
    """TOML of a string, number, truth value, list of numbers, or options."""
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "{ " + ", ".join(f"{name} = {_value(option)}" for name, option in value) + " }"
    return msgspec.json.encode(value).decode()  # TOML writes these as JSON does


def _warnings(record: Record, recipe: Recipe | None) -> Iterator[str]:
    if record.status != "ok":
        yield f"the cell is {record.status}: {record.reason}"
    if recipe is None:
        name = record.spec.recipe
        yield (
            f"no {RECIPE}: the content of {name} ({record.spec.recipe_hash}) is not known here; "
            "name its file by --recipe"
        )


def _description(
    record: Record,
    info: DatasetInfo,
    recipe: Recipe | None,
    weights_hash: str,
    kept: dict[str, dict[str, list[int]]] | None,
) -> Description:
    spec = record.spec
    return Description(
        FORMAT,
        spec.model,
        dict(spec.model_options),
        info.shape,
        info.classes,
        spec.dataset,
        spec.data_hash,
        info.mean,
        info.std,
        None if recipe is None else recipe.normalise,
        weights_hash,
        kept,
    )


def _masks(record: Record, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {layer.name: tensors[layer.name] != 0 for layer in record.layers if layer.prunable}


def _check_free(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not force:
        raise UsageError(f"{target}: is there already; --force replaces it.")
    # Nobody's home folder is lost by a slip of the keyboard.
    if not (target / NETWORK).is_file():
        raise UsageError(f"{target}: no export lies there, so --force does not replace it.")


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place once all is written."""
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        staging.mkdir(parents=True)
        yield staging
        if target.exists():
            target.replace(old)
        staging.replace(target)
    except OSError as error:
        raise UsageError(f"{target}: cannot write there ({error}).") from error
    finally:
        if old.exists() and not target.exists():
            old.replace(target)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def largest_difference(masked: nn.Module, smaller: nn.Module, images: Tensor) -> float:
    """Between the outputs of two networks, over the largest absolute output of the first."""
    with torch.inference_mode():
        one, other = masked(images), smaller(images)
    scale = one.abs().max().clamp_min(torch.finfo(one.dtype).tiny)
    return float((one - other).abs().max() / scale)


def _compared(
    record: Record, network: nn.Module, smaller: nn.Module, images: Mapping[str, Tensor]
) -> str:
    """In words, how much two networks differ.

    Raises:
        CannotCompact: by more than `TOLERANCE`.
    """
    found = {kind: largest_difference(network, smaller, batch) for kind, batch in images.items()}
    for kind, difference in found.items():
        if not difference <= TOLERANCE:  # not a number is no agreement
            raise CannotCompact(
                f"{record.spec.slug}: on {kind}, outputs of the smaller network differ by "
                f"{difference:.1e} of the largest output; allowed: {TOLERANCE:.0e}."
            )
    kinds = " and ".join(f"{len(batch)} {kind}" for kind, batch in images.items())
    return f"on {kinds}, outputs differ by at most {max(found.values()):.1e} of the largest"


def _images(
    record: Record, info: DatasetInfo, recipe: Recipe | None, data: Path
) -> dict[str, Tensor]:
    """Random images, and test images where the data need no download."""
    noise = torch.randn(COMPARED, *info.shape, generator=torch.Generator().manual_seed(0))
    images = {"random images": noise}
    name = record.spec.dataset
    here = not info.torchvision or (data / f"{name}.npz").exists()
    if recipe is not None and here:
        with _opened(name, recipe, data, record.spec.data_hash, torch.device("cpu")) as loaded:
            images["test images"] = loaded.normalise(loaded.test.images[:COMPARED])
    return images


@contextlib.contextmanager
def _opened(
    name: str, recipe: Recipe, data: Path, content: str, device: torch.device
) -> Iterator[Data]:
    """A data set of the given content, on the device.

    Raises:
        DataError: it is missing, or has another content.
    """
    source = load_data(name, recipe, data, Path())
    if source.hash != content:
        raise DataError(
            f"{name} in {data}: other data than the cell's (content {source.hash}, recorded "
            f"{content})."
        )
    loaded = to_device(source, recipe, device, folders.cores())
    try:
        yield loaded
    finally:
        loaded.close()


def _totals(network: nn.Module, info: DatasetInfo) -> Totals:
    return count_totals(network, count_layers(network, info.shape))


def load(folder: Path | str) -> nn.Module:
    """The network of an export, in evaluation mode, on the CPU.

    Args:
        folder: that `export` wrote, compact or not.

    Raises:
        DataError: a file is missing or damaged, or the tensors are not the network's.
        SuiteError: there is no such model here.
    """
    folder = Path(folder)
    description = describe(folder)
    tensors = _tensors(folder / WEIGHTS)
    if (found := tensor_hash(tensors)) != description.weights_hash:
        raise DataError(
            f"{folder / WEIGHTS}: damaged (content {found}, {NETWORK} says "
            f"{description.weights_hash}). Export it again."
        )
    network = plain_network(description.model, description.options, description.info)
    try:
        if description.kept is not None:
            network = rebuild(network, description.input_shape, description.kept)
        network.load_state_dict(tensors)
    except (CannotCompact, KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder}: not a network of {description.model} ({error}).") from error
    return network.eval()


def describe(folder: Path) -> Description:
    """What `network.json` says.

    Raises:
        DataError: it is missing or damaged, or of another version.
    """
    path = folder / NETWORK
    try:
        raw = msgspec.json.decode(path.read_bytes())
        if isinstance(raw, dict) and raw.get("format", FORMAT) != FORMAT:
            raise DataError(f"{path}: format {raw['format']}, but this version reads {FORMAT}.")
        return msgspec.convert(raw, type=Description)
    except OSError as error:
        raise DataError(f"{path}: cannot read the export: {error.strerror}.") from error
    except msgspec.MsgspecError as error:
        raise DataError(f"{path}: damaged ({error}). Export it again.") from error


def read_record(folder: Path) -> Record:
    """The record of an export's cell.

    Raises:
        DataError: it is missing.
        RecordError: it is damaged.
    """
    path = folder / RECORD
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot read the record: {error.strerror}.") from error


def evaluate_export(folder: Path, data: Path, device: str, dataset: str | None = None) -> Evaluated:
    """Tests an export on its data set, as the cell was tested.

    Args:
        folder: that `export` wrote.
        data: folder of the data sets.
        device: as torch names it.
        dataset: name of the same data here, where it is another.

    Raises:
        UsageError: the export or the data are damaged, missing, or not those of the cell.
    """
    description, record, network = describe(folder), read_record(folder), load(folder)
    name, place = dataset or description.dataset, torch.device(device)
    recipe = _recipe_in(folder)
    with _opened(name, recipe, data, description.data_hash, place) as loaded:
        placed = network.to(place).to(memory_format=torch.channels_last)
        found = evaluate(placed, loaded.test, loaded)
        images = len(loaded.test)
    assert record.top1 is not None
    # Another device sums in another order, and so does a smaller network.
    same = description.kept is None and environment(place).device == record.environment.device
    right, recorded = (round(top1 * images / 100) for top1 in (found.top1, record.top1))
    return Evaluated(images, right, recorded, same)


def _recipe_in(folder: Path) -> Recipe:
    try:
        return recipes.load(RECIPE, str(folder), folder)
    except SuiteError as error:
        raise DataError(f"{error} Export the cell again with --recipe FILE.") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: missing, damaged, or no safetensors file ({error}).") from error
