"""Masks that a cell leaves on disk, and what another cell that names it as its source gets."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from bench.errors import SourceMissing
from bench.record import Record, landed
from bench.spec import BudgetSpec
from bench.store import Cell, Store, read, write_atomically
from methods.api import Source


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """Where a cell's source lies.

    Attributes:
        record: of the source; `weights` of its finished network; `masks`, a folder of its rounds.
    """

    record: Path
    weights: Path
    masks: Path


def write_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Writes masks, eight weights to a byte, the first in its highest bit.

    The weights' shapes are JSON under `shapes` in the file's header, so that anybody can read it:
    `numpy.unpackbits(bytes, count=weights).reshape(shape)`.
    """
    packed = {n: torch.from_numpy(np.packbits(m.cpu().numpy() != 0)) for n, m in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    write_atomically(path, save(packed, metadata={"shapes": json.dumps(shapes)}))


def read_masks(path: Path, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks as `write_masks` wrote them, with the shapes and types of `masks`."""
    found = {}
    packed = load_file(path)
    for name, like in masks.items():
        tensor = packed[name]
        bits = np.unpackbits(tensor.numpy(), count=math.prod(like.shape))
        found[name] = torch.from_numpy(bits).view(like.shape).to(like)
    return found


def load(
    files: SourceFiles, sparsity: float, masks: Mapping[str, Tensor]
) -> tuple[Source, float, BudgetSpec]:
    """What a source left at a sparsity, what it cost in budgets, and how long one of these is.

    Args:
        files: the source's.
        sparsity: of the cell that asks.
        masks: of the cell that asks; the source's get their names, shapes and types.

    Raises:
        SourceMissing: the source has no usable result, or its files are not here.
    """
    if not files.record.exists():
        raise SourceMissing(f"the source {files.record.stem} has no record.")
    record = read(files.record)
    view = _view(record, sparsity)
    if reason := _useless(view):
        raise SourceMissing(reason)
    path = files.masks / f"{_phase(record, view)}.safetensors"
    try:
        if path.exists():
            return Source(read_masks(path, masks)), view.multiple, view.spec.budget
        if view.steps != record.steps:
            raise FileNotFoundError(f"{path}: no such file")  # the finished network is sparser
        weights = load_file(files.weights)
        found = {n: (weights[n] != 0).to(m) for n, m in masks.items()}
        return Source(found), view.multiple, view.spec.budget
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SourceMissing(
            f"{files.weights}: the source's network is not here ({error}). Move its record "
            f"{files.record.name} away to have it trained again."
        ) from error


def settled(cells: Sequence[Cell], store: Store) -> tuple[Cell, ...]:
    """The cells of a suite; those whose source has ended without masks are skipped, and say why.

    Raises:
        RecordError: the record of a source is damaged.
    """
    specs = {cell.spec.key: cell.spec for cell in cells}
    waiting = [c for c in cells if c.spec.source is not None and not store.has(c.spec)]
    wanted = sorted({cell.spec.source or "" for cell in waiting})
    records = {key: store.get(specs[key], brief=True) for key in wanted}
    lost = {cell.spec.key: _loss(cell, records[cell.spec.source or ""]) for cell in waiting}
    return tuple(
        dataclasses.replace(cell, skipped=lost[cell.spec.key]) if lost.get(cell.spec.key) else cell
        for cell in cells
    )


def usable(cell: Cell, source: SourceFiles) -> bool:
    """Whether a cell's source has ended, and with masks to start from.

    Raises:
        RecordError: the record of the source is damaged.
    """
    return source.record.exists() and not _loss(cell, read(source.record, brief=True))


def _loss(cell: Cell, source: Record | None) -> str:
    asked = cell.spec.sparsity
    return "" if source is None or asked is None else _useless(_view(source, asked))


def _view(record: Record, sparsity: float) -> Record:
    """The source as a cell of this sparsity sees it: the round that landed there, else its end."""
    view = landed(record, sparsity)
    return record if view.counts is None else view


def _useless(view: Record) -> str:
    """Why there are no masks to start from; empty where there are."""
    fine = view.status == "ok"
    return "" if fine else f"the source {view.spec.slug} is {view.status}: {view.reason}"


def _phase(record: Record, view: Record) -> str:
    """The phase that a record was cut to; the last where it was not."""
    names = [phase.name for phase in record.phases if phase.total == view.steps]
    return names[-1] if names else ""
