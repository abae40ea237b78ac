"""An exported network: a folder that anybody can read, safetensors, JSON and TOML, no pickles.

weights.safetensors  parameters and buffers, by their names in the plain network
masks.safetensors    of the prunable weights, see `bench.sources.write_masks`; none where compact
network.json         what it takes to build the network and to feed it, see `Description`
recipe.toml          how it was trained, field by field; left out where its content is not known
record.json          what the cell measured
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import nn

from bench import recipes
from bench.checkpoint import tensor_hash
from bench.compact import rebuild
from bench.datasets import DatasetInfo
from bench.environment import environment
from bench.errors import CannotCompact, DataError, SuiteError
from bench.evaluate import evaluate
from bench.finished import opened, plain_network, read_tensors
from bench.recipes import Recipe
from bench.record import Record, decode
from bench.spec import Scalar

FORMAT = "sparsebench-export-1"
WEIGHTS, MASKS, NETWORK = "weights.safetensors", "masks.safetensors", "network.json"
RECIPE, RECORD = "recipe.toml", "record.json"


@dataclass(frozen=True, slots=True)
class Description:
    """What it takes to build an exported network and to feed it.

    Attributes:
        format: `FORMAT`.
        cell: key of the cell.
        model: name for `models.create_model`; `options`, its keywords.
        input_shape: (channels, height, width).
        classes: size of the output.
        dataset: for people; `data_hash` is its content.
        mean: per channel, of training pixels scaled to [0, 1]; `std` likewise.
        normalise: whether the network wants (pixel / 255 - mean) / std; else pixel / 255; `unit`:
            image / its length; `mean_image`: pixel / 255, less the mean of the images to train on.
            None where the recipe is not known.
        weights_hash: of the tensors, see `bench.checkpoint.tensor_hash`.
        kept: of a compact network, what `bench.compact.rebuild` makes it from; None for others.
    """

    format: str
    cell: str
    model: str
    options: dict[str, Scalar]
    input_shape: tuple[int, int, int]
    classes: int
    dataset: str
    data_hash: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalise: bool | Literal["unit", "mean_image"] | None
    weights_hash: str
    kept: dict[str, dict[str, list[int]]] | None = None

    @property
    def info(self) -> DatasetInfo:
        """The data set as a network sees it."""
        return DatasetInfo(self.input_shape, self.classes, self.mean, self.std, "", "")


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
    tensors = read_tensors(folder / WEIGHTS)
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
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
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
    if record.spec.key != description.cell or record.top1 is None:
        raise DataError(
            f"{folder / RECORD}: of cell {record.spec.key}, but the network is of "
            f"{description.cell}. Export it again."
        )
    name, place = dataset or description.dataset, torch.device(device)
    recipe = _recipe_in(folder)
    with opened(name, recipe, data, description.data_hash, place) as loaded:
        placed = network.to(place).to(memory_format=torch.channels_last)
        found = evaluate(placed, loaded.test, loaded)
        images = len(loaded.test)
    # Another device sums in another order, and so does a smaller network.
    same = description.kept is None and environment(place).device == record.environment.device
    right, recorded = (round(top1 * images / 100) for top1 in (found.top1, record.top1))
    return Evaluated(images, right, recorded, same)


def _recipe_in(folder: Path) -> Recipe:
    try:
        return recipes.load(RECIPE, str(folder), folder)
    except SuiteError as error:
        raise DataError(f"{error} Export the cell again with --recipe FILE.") from error
