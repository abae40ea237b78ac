"""A run on disk: one safetensors file with every tensor, its cursor in the file's header."""

from __future__ import annotations

import hashlib
import itertools
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

from bench import fitting
from bench.errors import CheckpointError
from bench.optimize import MEMORY
from bench.record import Count, Few
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
        place = header.get("place", "")
        if not place.isprintable():
            raise ValueError(f"{place!r} is no place")
        return Begun(_width(header), header.get("compiled") == "1", place)


def read(trainer: Trainer, path: Path, key: str) -> None:
    """Puts a freshly built run where the checkpoint was written.

    Raises:
        CheckpointError: the file is damaged, or of another cell or version; the trainer must then
            be thrown away.
    """
    with _named(path):
        with safe_open(path, framework="pt") as file:
            header = _checked(file.metadata(), path, key)
            # Copies: what is mapped keeps a deleted file on the disk, and dies with one cut short.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
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
        lacking = "lacks " if isinstance(error, KeyError) else ""
        reason = "".join(c for c in " ".join(str(error).split()) if c.isprintable())
        raise CheckpointError(f"{path}: damaged checkpoint ({lacking}{reason}).") from error


def _checked(header: dict[str, str] | None, path: Path, key: str) -> dict[str, str]:
    header = header or {}
    found = header.get("format", "")
    if found != FORMAT and found.startswith(FORMAT.rpartition("-")[0]):
        raise CheckpointError(
            f"{path}: not a checkpoint of cell {key} that this version of sparsebench reads: its "
            f"format is {found[:100]!r}, not {FORMAT!r}."
        )
    if found != FORMAT or header.get("key") != key:
        raise CheckpointError(f"{path}: not a checkpoint of cell {key}.")
    return header


def _width(header: dict[str, str]) -> int:
    return msgspec.convert(int(header.get("width", 1)), type=Few)


def _restore(trainer: Trainer, header: dict[str, str], tensors: dict[str, Tensor]) -> None:
    state = trainer.state
    groups = _grouped(tensors)
    state.model.load_state_dict(groups["model"])
    for name, mask in state.masks.items():
        fitting.fill(mask, fitting.of_zeros_and_ones(groups["mask"][name], name), name)
    for name, change in trainer.dynamics.last_change.items():
        fitting.fill(change, groups["change"][name], name)
    fitting.fill(trainer.losses, tensors["losses"], "losses")
    meter = torch.stack([trainer.meter.total, trainer.meter.rate])
    fitting.fill(meter, fitting.spent(tensors["meter"]), "meter")
    trainer.meter.total.copy_(meter[0])
    trainer.meter.rate.copy_(meter[1])
    trainer.meter.counted = msgspec.convert(int(header["counted"]), type=Count)
    trainer.width = _width(header)  # sums of another width round differently
    slots = msgspec.convert(json.loads(header["slots"]), type=dict[str, list[str]])
    device = state.lr.device
    for slot, names in slots.items():
        values = groups.get(f"slot/{slot}", {})
        state.slots[slot] = {n: _like(values[n], state.weights.get(n), device) for n in names}
    numbers = msgspec.convert(json.loads(header["numbers"]), type=Numbers)
    _restore_optimizer(trainer, groups.get("optimizer", {}), numbers)
    snapshots = msgspec.convert(
        json.loads(header["snapshots"]), type=dict[str, tuple[Count, Numbers]]
    )
    for name, (position, numbers) in snapshots.items():
        found = Snapshot(
            {n: v.to(device) for n, v in groups[f"snapshot/{name}/model"].items()},
            {n: v.to(device) for n, v in groups.get(f"snapshot/{name}/optimizer", {}).items()},
            numbers,
            position,
        )
        trainer.snapshots[name] = fitting.snapshot(found, trainer, name)
    trainer.generator.set_state(tensors["rng/method"])
    torch.set_rng_state(tensors["rng/cpu"])
    if device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], device)
    cursor = msgspec.json.decode(header["cursor"], type=Cursor)
    trainer.cursor = fitting.cursor(cursor, trainer)


def _restore_optimizer(trainer: Trainer, tensors: dict[str, Tensor], numbers: Numbers) -> None:
    fitting.memory(trainer, {**tensors, **numbers})
    optimizer, device = trainer.state.optimizer, trainer.state.lr.device
    for name, value in tensors.items():
        owner = trainer.owner_of_entry(name)
        trainer.set_optimizer_entry(name, _like(value, owner, device))
    for name, number in numbers.items():
        trainer.set_optimizer_entry(name, number)
    # Where it remembers something of one parameter, its kernels want it of all; it begins at 0.
    for group in optimizer.param_groups:
        if any(optimizer.state.get(p) for p in group["params"]):
            for key, p in itertools.product(MEMORY.get(type(optimizer), ()), group["params"]):
                zeros = torch.zeros_like(p) if key != "step" else torch.zeros((), device=device)
                optimizer.state[p].setdefault(key, zeros)


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
