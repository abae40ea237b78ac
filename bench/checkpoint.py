"""A run on disk: one safetensors file with every tensor, its cursor in the file's header."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bench.errors import CheckpointError
from bench.spec import content_hash
from bench.store import write_atomically
from bench.trainer import Cursor, Snapshot, Trainer

FORMAT = "sparsebench-checkpoint-3"


def write(trainer: Trainer, path: Path, key: str) -> None:
    """Saves a run between two steps. The old checkpoint stays until the new one is on disk.

    Args:
        trainer: the run.
        path: the file.
        key: of the cell, checked when it is read.
    """
    trainer.settle()
    state = trainer.state
    tensors: dict[str, Tensor] = {
        "losses": trainer.losses,
        "meter": torch.stack([trainer.meter.total, trainer.meter.rate]),
        "rng/method": trainer.generator.get_state(),
        "rng/cpu": torch.get_rng_state(),
    }
    if state.lr.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(state.lr.device)
    tensors |= _prefixed("model", state.model.state_dict())
    tensors |= _prefixed("mask", state.masks)
    tensors |= _prefixed("optimizer", trainer.optimizer_tensors())
    tensors |= _prefixed("change", trainer.dynamics.last_change)
    for slot, values in state.slots.items():
        tensors |= _prefixed(f"slot/{slot}", values)
    for name, snapshot in trainer.snapshots.items():
        tensors |= _prefixed(f"snapshot/{name}/model", snapshot.model)
        tensors |= _prefixed(f"snapshot/{name}/optimizer", snapshot.optimizer)
    header = {
        "format": FORMAT,
        "key": key,
        "counted": str(trainer.meter.counted),
        "width": str(trainer.width),
        "cursor": msgspec.json.encode(trainer.cursor).decode(),
        "numbers": json.dumps(trainer.optimizer_numbers()),
        "snapshots": json.dumps({n: [s.position, s.numbers] for n, s in trainer.snapshots.items()}),
        # Tensors come back sorted by name; loops over slots draw random numbers in their order.
        "slots": json.dumps({slot: list(values) for slot, values in state.slots.items()}),
    }
    # safetensors refuses shared storage, and keeps no memory format.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    header["digest"] = _digest(header, plain)
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
        if header.pop("digest", "") != _digest(header, tensors):
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
    for name, change in trainer.dynamics.last_change.items():
        change.copy_(groups["change"][name])
    trainer.losses.copy_(tensors["losses"])
    trainer.meter.total.copy_(tensors["meter"][0])
    trainer.meter.rate.copy_(tensors["meter"][1])
    trainer.meter.counted = int(header["counted"])
    trainer.width = int(header.get("width", 1))  # sums of another width round differently
    for slot, names in json.loads(header["slots"]).items():
        values = groups.get(f"slot/{slot}", {})
        state.slots[slot] = {n: _like(values[n], state.weights.get(n), device) for n in names}
    for name, value in groups.get("optimizer", {}).items():
        owner = trainer.owner_of_entry(name)
        trainer.set_optimizer_entry(name, _like(value, owner, device))
    for name, number in json.loads(header["numbers"]).items():
        trainer.set_optimizer_entry(name, number)
    for name, (position, numbers) in json.loads(header["snapshots"]).items():
        trainer.snapshots[name] = Snapshot(
            {n: v.to(device) for n, v in groups[f"snapshot/{name}/model"].items()},
            {n: v.to(device) for n, v in groups.get(f"snapshot/{name}/optimizer", {}).items()},
            numbers,
            position,
        )
    trainer.generator.set_state(tensors["rng/method"])
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], device)
    trainer.cursor = msgspec.json.decode(header["cursor"], type=Cursor)


def _digest(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    return tensor_hash(tensors) + content_hash(header)


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """32 hex digits of names and bytes of tensors on the CPU, whatever the order of names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _like(value: Tensor, owner: Tensor | None, device: torch.device) -> Tensor:
    """A tensor in its owner's memory format, where it has its shape: the format orders sums."""
    if owner is None or owner.shape != value.shape:
        return value.to(device)
    return torch.empty_like(owner, dtype=value.dtype, requires_grad=False).copy_(value)


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}//{name}": value for name, value in tensors.items()}


def _grouped(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, separator, rest = name.partition("//")
        if separator:
            groups.setdefault(group, {})[rest] = value
    return groups
