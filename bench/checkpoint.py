"""A run on disk: one safetensors file with every tensor, its cursor in the file's header."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bench.errors import CheckpointError
from bench.store import write_atomically
from bench.trainer import Cursor, Snapshot, Trainer

FORMAT = "sparsebench-checkpoint-1"


def write(trainer: Trainer, path: Path, key: str) -> None:
    """Saves a run between two steps. The old checkpoint stays until the new one is on disk.

    Args:
        trainer: the run.
        path: the file.
        key: of the cell, checked when it is read.
    """
    state = trainer.state
    tensors: dict[str, Tensor] = {
        "losses": trainer.losses,
        "rng/method": trainer.generator.get_state(),
        "rng/cpu": torch.get_rng_state(),
    }
    if state.lr.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(state.lr.device)
    tensors |= _prefixed("model", state.model.state_dict())
    tensors |= _prefixed("mask", state.masks)
    tensors |= _prefixed("optimizer", trainer.optimizer_tensors())
    for slot, values in state.slots.items():
        tensors |= _prefixed(f"slot/{slot}", values)
    for name, snapshot in trainer.snapshots.items():
        tensors |= _prefixed(f"snapshot/{name}/model", snapshot.model)
        tensors |= _prefixed(f"snapshot/{name}/optimizer", snapshot.optimizer)
    header = {
        "format": FORMAT,
        "key": key,
        "cursor": msgspec.json.encode(trainer.cursor).decode(),
        "scalars": json.dumps(_optimizer_scalars(trainer)),
        "snapshots": json.dumps({n: s.position for n, s in trainer.snapshots.items()}),
    }
    # safetensors refuses shared storage, and keeps no memory format.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    header["digest"] = tensor_hash(plain)
    write_atomically(path, save(plain, metadata=header))


def read(trainer: Trainer, path: Path, key: str) -> None:
    """Puts a freshly built run where the checkpoint was written.

    Raises:
        CheckpointError: the file is damaged, or of another cell or version; the trainer must then
            be thrown away.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT or header.get("key") != key:
            raise CheckpointError(f"{path}: not a checkpoint of cell {key}.")
        if header.get("digest") != tensor_hash(tensors):
            raise CheckpointError(f"{path}: damaged checkpoint (its content changed).")
        _restore(trainer, header, tensors)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({error}).") from error


def _restore(trainer: Trainer, header: dict[str, str], tensors: dict[str, Tensor]) -> None:
    state = trainer.state
    device = state.lr.device
    groups = _grouped(tensors)
    state.model.load_state_dict(groups["model"])
    for name, mask in state.masks.items():
        mask.copy_(groups["mask"][name])
    trainer.losses.copy_(tensors["losses"])
    for slot, values in groups.items():
        if slot.startswith("slot/"):
            state.slots[slot.removeprefix("slot/")] = {n: v.to(device) for n, v in values.items()}
    optimized = trainer.optimized()
    scalars: dict[str, Any] = json.loads(header["scalars"])
    for name, value in (groups.get("optimizer", {}) | scalars).items():
        index, _, buffer = name.partition(".")
        parameter = optimized[int(index)]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            # Memory format decides the order of sums, so it must be the parameter's.
            value = torch.empty_like(parameter).copy_(value)
        elif isinstance(value, Tensor):
            value = value.to(device)
        state.optimizer.state[parameter][buffer] = value
    for name, position in json.loads(header["snapshots"]).items():
        trainer.snapshots[name] = Snapshot(
            {n: v.to(device) for n, v in groups[f"snapshot/{name}/model"].items()},
            {n: v.to(device) for n, v in groups.get(f"snapshot/{name}/optimizer", {}).items()},
            position,
        )
    trainer.generator.set_state(tensors["rng/method"])
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], device)
    trainer.cursor = msgspec.json.decode(header["cursor"], type=Cursor)


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """32 hex digits of names and bytes of tensors on the CPU, whatever the order of names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}//{name}": value for name, value in tensors.items()}


def _grouped(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, separator, rest = name.partition("//")
        if separator:
            groups.setdefault(group, {})[rest] = value
    return groups


def _optimizer_scalars(trainer: Trainer) -> dict[str, Any]:
    """Plain numbers that some optimizers keep beside their tensors."""
    return {
        f"{index}.{key}": value
        for index, parameter in enumerate(trainer.optimized())
        for key, value in trainer.state.optimizer.state.get(parameter, {}).items()
        if isinstance(value, int | float | bool)
    }
