"""A run on disk: one safetensors file with every tensor, its cursor in the file's header."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from bench.errors import CheckpointError
from bench.planning import MAX_STEPS
from bench.record import Count
from bench.spec import content_hash
from bench.store import write_atomically
from bench.trainer import Cursor, Snapshot, Trainer

FORMAT = "sparsebench-checkpoint-3"

Numbers = dict[str, bool | int | float]


@dataclass(frozen=True, slots=True)
class Begun:
    """How a run's steps were computed so far; sums of another way round differently.

    Attributes:
        stack: runs that were computed as one.
        compiled: whether `torch.compile` made the passes.
        place: device, threads and torch's version.
    """

    stack: int = 1
    compiled: bool = False
    place: str = ""


def previous(path: Path) -> Path:
    """Where the checkpoint before the newest is kept."""
    return path.with_name(f"{path.name}.previous")


def kept(path: Path) -> list[Path]:
    """The files that there are of a run, the newest first."""
    return [file for file in (path, previous(path)) if file.exists()]


def place(device: torch.device) -> str:
    """Where steps are computed, as far as their bits depend on it."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    strict = ", strict" if torch.are_deterministic_algorithms_enabled() else ""
    many = "s" if threads > 1 else ""
    return f"{name}, {threads} thread{many}, torch {torch.__version__}{strict}"


def size(trainer: Trainer) -> int:
    """Bytes of a checkpoint, but for its header and what an optimizer has yet to make."""
    return sum(value.numel() * value.element_size() for value in _tensors(trainer).values())


def write(trainer: Trainer, path: Path, key: str) -> None:
    """Saves a run between two steps. The old checkpoint stays until the new one is on disk.

    Args:
        trainer: the run.
        path: the file; the one that was there is kept as `previous` names it.
        key: of the cell, checked when it is read.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    trainer.settle()
    # safetensors refuses shared storage, and keeps no memory format.
    plain = {n: v.detach().cpu().contiguous().clone() for n, v in _tensors(trainer).items()}
    slots = trainer.state.slots
    header = {
        "format": FORMAT,
        "key": key,
        "counted": str(trainer.meter.counted),
        "width": str(trainer.width),
        "compiled": str(int(trainer.hot.compiled)),
        "place": place(trainer.state.lr.device),
        "cursor": msgspec.json.encode(trainer.cursor).decode(),
        "numbers": json.dumps(trainer.optimizer_numbers()),
        "snapshots": json.dumps({n: [s.position, s.numbers] for n, s in trainer.snapshots.items()}),
        # Tensors come back sorted by name; loops over slots draw random numbers in their order.
        "slots": json.dumps({slot: list(values) for slot, values in slots.items()}),
        "layout": _layout(plain),
    }
    header["digest"] = _digest(header, plain)
    write_atomically(path, save(plain, metadata=header), previous(path))


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Everything of a run that is a tensor, as it lies there."""
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
    return tensors


def begun(path: Path, key: str) -> Begun:
    """How the run in a checkpoint is computed; its tensors are not read.

    Raises:
        CheckpointError: as of `read`.
    """
    with _named(path), safe_open(path, framework="pt") as file:
        header = _checked(file.metadata(), path, key)
        return Begun(
            int(header.get("width", 1)),
            header.get("compiled") == "1",
            header.get("place", ""),
        )


def read(trainer: Trainer, path: Path, key: str) -> None:
    """Puts a freshly built run where the checkpoint was written.

    Raises:
        CheckpointError: the file is damaged, or of another cell or version; the trainer must then
            be thrown away.
    """
    with _named(path):
        with safe_open(path, framework="pt") as file:
            header = _checked(file.metadata(), path, key)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        right = header.pop("digest", "") == _digest(header, tensors)
        # Files from before the layout was hashed have none.
        if not right or header.get("layout", _layout(tensors)) != _layout(tensors):
            raise CheckpointError(f"{path}: damaged checkpoint (its content changed).")
        _restore(trainer, header, tensors)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever a damaged file may raise, as one error that names it."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise  # the latter are the machine's fault
    except Exception as error:  # what others wrote can raise nearly anything
        raise CheckpointError(f"{path}: damaged checkpoint ({error}).") from error


def _checked(header: dict[str, str] | None, path: Path, key: str) -> dict[str, str]:
    header = header or {}
    if header.get("format") != FORMAT or header.get("key") != key:
        raise CheckpointError(f"{path}: not a checkpoint of cell {key}.")
    return header


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
    slots = msgspec.convert(json.loads(header["slots"]), type=dict[str, list[str]])
    for slot, names in slots.items():
        values = groups.get(f"slot/{slot}", {})
        state.slots[slot] = {n: _like(values[n], state.weights.get(n), device) for n in names}
    for name, value in groups.get("optimizer", {}).items():
        owner = trainer.owner_of_entry(name)
        trainer.set_optimizer_entry(name, _like(value, owner, device))
    for name, number in msgspec.convert(json.loads(header["numbers"]), type=Numbers).items():
        trainer.set_optimizer_entry(name, number)
    snapshots = msgspec.convert(
        json.loads(header["snapshots"]), type=dict[str, tuple[Count, Numbers]]
    )
    for name, (position, numbers) in snapshots.items():
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
    trainer.cursor = _fitting(msgspec.json.decode(header["cursor"], type=Cursor), trainer)


def _fitting(cursor: Cursor, trainer: Trainer) -> Cursor:
    """The cursor, once it is one of this plan.

    Raises:
        ValueError: it is not.
    """
    plan, done = trainer.plan, cursor.phase
    if not (0 <= done < len(plan) and 0 <= cursor.step <= plan[done].steps):
        raise ValueError(f"no step {cursor.step} of phase {done} is in the plan")
    before = [(phase.name, phase.steps) for phase in plan[:done]]
    if [(phase.name, phase.steps) for phase in cursor.phases] != before:
        raise ValueError(f"the phases before phase {done} are not those of the plan")
    if len(cursor.phase_seconds) != done:
        raise ValueError(f"times of {len(cursor.phase_seconds)} phases, where {done} have ended")
    if cursor.total != sum(steps for _, steps in before) + cursor.step:
        raise ValueError(f"{cursor.total} steps in all, which are not those of the phases")
    counters = (cursor.position, cursor.drawn, cursor.scored, cursor.updates)
    if not all(0 <= counter < MAX_STEPS for counter in counters):
        raise ValueError(f"{counters}: not what a run can have counted")
    return cursor


def _digest(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    return tensor_hash(tensors) + content_hash(header)


def _layout(tensors: dict[str, Tensor]) -> str:
    """Hash of types and shapes, which `tensor_hash` does not see."""
    return content_hash({name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()})


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
