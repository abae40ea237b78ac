"""The finished network of a cell, from its record and the weights beside it, and its data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bench import folders, recipes
from bench.checkpoint import tensor_hash
from bench.compact import Compacted, compact
from bench.data import Data
from bench.datasets import DATASETS, DatasetInfo
from bench.errors import CannotCompact, DataError, RecordError, UsageError
from bench.networks import make_model
from bench.processes import cores
from bench.recipes import Recipe
from bench.record import Record
from bench.resolve import load_arrays, load_data, make_method
from bench.spec import Scalar
from bench.store import Store, command, read
from bench.streaming import to_device


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
            f"{path} away and run the suite again: {command(record.suite)}"
        )
    tensors = read_tensors(weights)
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
        CannotCompact: it cannot be cut, or its method leaves what must not be.
    """
    spec = record.spec
    if not make_method(spec.method, dict(spec.options), spec.slug).cuttable:
        options = ", ".join(f"{name} = {value}" for name, value in spec.options)
        raise CannotCompact(
            f"{spec.slug}: {spec.method} ({options}) leaves the normalisation behind a pruned "
            "filter as it is, so the channel still sends a constant and cannot be cut out."
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


@contextlib.contextmanager
def opened(
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
    loaded = to_device(source, recipe, device, cores())
    try:
        yield loaded
    finally:
        loaded.close()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: missing, damaged, or no safetensors file ({error}).") from error
