"""Writes a finished network as a folder, whole or compact; `exported` reads it."""

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
from safetensors.torch import save
from torch import Tensor, nn

from bench import recipes
from bench.checkpoint import tensor_hash
from bench.counting import Totals, count_layers, count_totals
from bench.datasets import DatasetInfo
from bench.errors import CannotCompact, UsageError
from bench.exported import FORMAT, MASKS, NETWORK, RECIPE, RECORD, WEIGHTS, Description
from bench.finished import cut, data_info, find_recipe, finished, masked_network, opened
from bench.recipes import Recipe
from bench.record import Record, encode
from bench.sources import write_masks
from bench.store import read, write_atomically

TOLERANCE = 1e-5
"""Largest difference between a compact network's outputs and the masked one's, over the largest
absolute output of the masked one among the same images."""

COMPARED = 64
"""Images of each kind on which the two are compared."""


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
        spec.key,
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
    target = target.resolve()  # `.` and `..` have no name that one beside them could be made of
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
        with opened(name, recipe, data, record.spec.data_hash, torch.device("cpu")) as loaded:
            images["test images"] = loaded.normalise(loaded.test.images[:COMPARED])
    return images


def _totals(network: nn.Module, info: DatasetInfo) -> Totals:
    return count_totals(network, count_layers(network, info.shape))
