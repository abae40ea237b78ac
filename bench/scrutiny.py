"""Runs looked at from outside: what they leave, and what a method may not do on the way."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.trainer import Trainer
from bench.trial import Witness
from methods.allocation import keep_count
from methods.api import Phase, Shape

SIZED = ("density", "filters")
"""Kinds of methods that are given a density."""


@dataclass
class Outcome:
    """Everything that a finished run leaves, apart from times."""

    tensors: dict[str, Tensor]
    counters: dict[str, object]

    def differences(self, other: Outcome) -> list[str]:
        """Names of what is not the same, bit for bit."""
        common = self.tensors.keys() & other.tensors.keys()
        found = [n for n in self.tensors if n not in common] + [
            n
            for n, tensor in other.tensors.items()
            if n not in common or not _same(self.tensors[n], tensor)
        ]
        return found + [n for n, value in self.counters.items() if value != other.counters[n]]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def outcome(trainer: Trainer) -> Outcome:
    """What a run left; to be taken after its end."""
    state, cursor = trainer.state, trainer.cursor
    tensors = {f"model {name}": tensor for name, tensor in state.model.state_dict().items()}
    tensors |= {f"mask {name}": mask for name, mask in state.masks.items()}
    tensors |= {f"optimizer {n}": tensor for n, tensor in trainer.optimizer_tensors().items()}
    tensors |= slot_tensors(trainer)
    tensors |= {
        f"snapshot {name} {n}": tensor
        for name, snapshot in trainer.snapshots.items()
        for n, tensor in (snapshot.model | snapshot.optimizer).items()
    }
    tensors |= {f"last change {name}": t for name, t in trainer.dynamics.last_change.items()}
    tensors |= {"lr": state.lr, "progress": state.progress}
    tensors |= {"generator": trainer.generator.get_state(), "global": torch.get_rng_state()}
    counters: dict[str, object] = {
        name: getattr(cursor, name)
        for name in (
            *("phase", "step", "position", "total", "extra_batches", "curve", "phases"),
            *("updates", "mask_updates"),
        )
    }
    counters["numbers"] = trainer.optimizer_numbers()
    counters["snapshots"] = {n: (s.position, s.numbers) for n, s in trainer.snapshots.items()}
    return Outcome({name: t.detach().clone() for name, t in tensors.items()}, counters)


def slot_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The method's own tensors, as `slot <slot> <name>`."""
    slots = trainer.state.slots
    return {
        f"slot {slot} {name}": t for slot, values in slots.items() for name, t in values.items()
    }


def run_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of a run that is written, and never replaced."""
    state = trainer.state
    tensors: dict[str, Tensor] = {"lr": state.lr, "progress": state.progress}
    tensors |= {f"mask {name}": mask for name, mask in state.masks.items()}
    tensors |= {f"weight {name}": weight for name, weight in state.weights.items()}
    tensors |= {f"parameter {name}": p for name, p in state.model.named_parameters()}
    tensors |= {f"buffer {name}": buffer for name, buffer in state.model.named_buffers()}
    return tensors | slot_tensors(trainer)


def held(trainer: Trainer) -> dict[str, Tensor]:
    """`run_tensors` as they lie now; while these are kept, nothing else can lie there."""
    return {name: tensor.detach() for name, tensor in run_tensors(trainer).items()}


def replaced(before: Mapping[str, Tensor], trainer: Trainer) -> list[str]:
    """Names of tensors that are gone, or lie elsewhere, since `before = held(trainer)`.

    Tensors that were not there are named too, but for what the first step of a phase finds.
    """
    now = run_tensors(trainer)
    found = [n for n, t in before.items() if n not in now or now[n].data_ptr() != t.data_ptr()]
    return found if trainer.step == 1 else [*found, *(n for n in now if n not in before)]


def cuts(plan: Sequence[Phase]) -> list[int]:
    """Steps done at the cuts: none, and the first, a middle and the last step of each phase."""
    inside = {
        start + step
        for start, phase in _starts(plan)
        for step in (1, phase.steps // 2, phase.steps)
        if 1 <= step <= phase.steps
    }
    return sorted({0} | inside)


def few_cuts(plan: Sequence[Phase]) -> list[int]:
    """The first, two inner and the last step of each phase; of many phases, an inner one of each.

    The distances are such that a counter of a small period is not at 0 at all of them.
    """
    if len(plan) > 3:
        return sorted(
            {
                start + min(phase.steps, (phase.steps + 1 + number % 2) // 2)
                for number, (start, phase) in enumerate(_starts(plan))
            }
        )
    return sorted(
        {
            start + step
            for start, phase in _starts(plan)
            for step in (1, 2 * phase.steps // 5, 2 * phase.steps // 5 + 3, phase.steps)
            if 1 <= step <= phase.steps
        }
    )


def _starts(plan: Sequence[Phase]) -> Iterator[tuple[int, Phase]]:
    """Each phase with the steps done before it."""
    ends = itertools.accumulate(phase.steps for phase in plan)
    return zip([0, *ends], plan, strict=False)


def network_weight(model: nn.Module, name: str) -> Tensor:
    """The weight that the forward pass uses, behind the method's parametrization if it has one."""
    path, _, tensor = name.rpartition(".")
    weight: Tensor = getattr(model.get_submodule(path), tensor)
    return weight.detach()


def differences_from_plain(
    model: nn.Module, fresh: nn.Module, shape: Shape = (3, 16, 16)
) -> list[str]:
    """In words, how a finished network is not the plain one with other numbers.

    Args:
        model: what a method left.
        fresh: the same architecture, untouched; it takes the numbers over.
        shape: (channels, height, width) of an image.
    """
    found = []
    modules, plain = dict(model.named_modules()), dict(fresh.named_modules())
    for name in modules.keys() | plain.keys():
        place = name or "the network"
        if name not in plain:
            found.append(f"a module {name} is left that the plain network does not have")
        elif name not in modules:
            found.append(f"the module {name} is gone")
        elif type(modules[name]) is not type(plain[name]):
            kinds = [type(one[name]).__name__ for one in (modules, plain)]
            found.append(f"{place} is a {kinds[0]}, in the plain network a {kinds[1]}")
    tensors, expected = model.state_dict(keep_vars=True), fresh.state_dict(keep_vars=True)
    tensors |= dict(model.named_buffers())
    expected |= dict(fresh.named_buffers())
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in expected:
            found.append(f"a tensor {name} is left that the plain network does not have")
        elif name not in tensors:
            found.append(f"the tensor {name} is gone")
        elif tensors[name].shape != expected[name].shape:
            shapes = [tuple(one[name].shape) for one in (tensors, expected)]
            found.append(f"{name} has the shape {shapes[0]}, in the plain network {shapes[1]}")
        elif isinstance(expected[name], nn.Parameter) != isinstance(tensors[name], nn.Parameter):
            found.append(f"{name} is a parameter in one of them and a buffer in the other")
        elif not tensors[name].isfinite().all():
            found.append(f"{name} is not finite")
    if found:
        return found
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found += [
        f"{name or 'the network'} has a hook left"
        for name, module in modules.items()
        if any(getattr(module, hook) for hook in hooks)
    ]
    fresh.load_state_dict(model.state_dict())
    if not found and not _compute_the_same(model, fresh, shape):
        found.append("it computes something else than the plain network with the same tensors")
    return found


def _compute_the_same(model: nn.Module, plain: nn.Module, shape: Shape) -> bool:
    batch = torch.linspace(-2, 2, 2 * math.prod(shape)).view(2, *shape)
    with torch.no_grad():
        first, second = model.eval()(batch), plain.eval()(batch)
    # Sums are taken in the order of the memory layout, which a parametrization may have changed.
    return torch.allclose(first, second, rtol=1e-3, atol=1e-5)


def watched(
    trainer: Trainer, witness: Witness, save: Callable[[int], None]
) -> dict[str, list[str]]:
    """Trains to the end, and tells the first fault of each check on the way.

    Args:
        trainer: that has not begun.
        witness: stands over its method.
        save: is called with the number of steps done, from 0 on.

    Raises:
        TypeError: the method keeps something else than tensors in its slots.
    """
    sized = trainer.method.controls in SIZED
    faults: dict[str, list[str]] = {"same tensors": []}
    if sized:
        faults["masks hold"] = []
    before, groups = held(trainer), param_groups(trainer)
    witness.attend(trainer)
    save(0)
    for done in trainer.run():
        trainer.state.check_slots()
        if not faults["same tensors"] and (names := replaced(before, trainer)):
            text = f"after step {done} another tensor stands for the {listed(names)}"
            faults["same tensors"].append(f"{text}: write in place")
        if trainer.step == 1:  # slots are made as a phase begins
            before = held(trainer)
        if sized and not faults["masks hold"]:
            faults["masks hold"] += [f"{leak} after step {done}" for leak in leaks(trainer)][:1]
        save(done)
    witness.leave()
    if sized and not faults["masks hold"]:
        faults["masks hold"] += witness.leaks
    if trainer.method.controls == "density" and not faults["masks hold"]:
        unused = [f"no training pass calls the module of {name}" for name in witness.unused]
        faults["masks hold"] += unused[:1]
    faults["metered"] = []
    if passes := witness.unmetered:
        faults["metered"] += [f"it computes {passes} forward passes that nobody meters"]
    now = param_groups(trainer)
    if odd := [n for n in {**groups, **now} if not _equal(groups.get(n), now.get(n))]:
        faults["resume"] = [f"{odd[0]} of the optimizer changes: state outside TrainState"]
    return faults


def param_groups(trainer: Trainer) -> dict[str, Any]:
    """What the optimizer's groups hold beside parameters and the run's learning rate: copies."""
    found: dict[str, Any] = {}
    for index, group in enumerate(trainer.state.optimizer.param_groups):
        for key, value in group.items():
            name = f"param_groups[{index}][{key!r}]"
            if key == "params":
                found[name] = list(map(id, value))
            else:
                found[name] = "lr" if value is trainer.state.lr else copy.deepcopy(value)
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _same(one, other)
    return type(one) is type(other) and bool(one == other)


def leaks(trainer: Trainer) -> Iterator[str]:
    """Masks that are none, and weights of the forward pass outside them."""
    state = trainer.state
    for name, mask in state.masks.items():
        if not ((mask == 0) | (mask == 1)).all():
            yield f"the mask of {name} holds other values than 0 and 1"
        elif trainer.method.controls == "filters":  # their weights may move between updates
            rows = mask.flatten(1)
            if not (rows == rows[:, :1]).all():
                yield f"the mask of {name} prunes parts of filters"
        else:
            outside = network_weight(state.model, name)[mask == 0]
            if count := int(outside.count_nonzero()):
                yield f"{name} has {count} non-zero weights outside its mask"


def finished(trainer: Trainer, fresh: nn.Module) -> dict[str, list[str]]:
    """What is wrong with what a run left.

    Args:
        trainer: at its end.
        fresh: the plain network, untouched.
    """
    model, masks = trainer.state.model, trainer.state.masks
    faults = {"plain network": differences_from_plain(model, fresh, trainer.input_shape)}
    for ended in trainer.ended:
        if ended.end.keys() != fresh.state_dict().keys():
            name = trainer.plan[ended.index].name
            faults["plain network"].append(f"the measured phase {name!r} ends with another one")
    filters = trainer.method.controls == "filters"
    promised = trainer.density  # where the cell sets it, the method has no say
    if trainer.method.controls not in SIZED:
        promised = trainer.method.final_density(None)
    if promised is None or faults["plain network"]:
        return faults
    kept, left, total = 0, 0, 0
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        if filters:
            weight, mask = weight.flatten(1).any(1), mask.flatten(1).any(1)
        total, left = total + mask.numel(), left + int(weight.count_nonzero())
        kept += int(mask.count_nonzero())
    expected, kind = keep_count(total, promised), "filters" if filters else "weights"
    asked = f"of {total} prunable {kind}, but {expected} were asked for"
    faults["density exact"] = []
    if left != expected:
        faults["density exact"].append(f"{left} are not zero {asked} (density {promised:g})")
    elif kept != expected:
        faults["density exact"].append(f"the masks keep {kept} {asked} (density {promised:g})")
    return faults


def marks(kind: type) -> dict[str, object]:
    """The values of a class and of its module that could hold state, each by what tells a change.

    What differs from an earlier answer has been written since.
    """
    found: dict[str, object] = {}
    scope = vars(sys.modules.get(kind.__module__, object))
    for holder, values in ((f"{kind.__name__}.", vars(kind)), ("global ", scope)):
        for name, value in values.items():
            if not name.startswith("__"):
                content = repr(value)[:1000] if isinstance(value, list | dict | set) else ""
                found[holder + name] = id(value), content
    return found


def attributes(trainer: Trainer) -> set[str]:
    """Attributes of all that a method may write on; those new since the start may hold state."""
    options = {field.name for field in dataclasses.fields(trainer.method)}
    found = {f"attribute {name!r} of the method" for name in vars(trainer.method).keys() - options}
    found |= {f"attribute {name!r} of the optimizer" for name in vars(trainer.state.optimizer)}
    for name, parameter in trainer.state.model.named_parameters():
        found |= {
            f"attribute {attribute!r} of the parameter {name}" for attribute in vars(parameter)
        }
    for name, module in trainer.state.model.named_modules():
        found |= {f"attribute {attribute!r} of the module {name}" for attribute in vars(module)}
    return found


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
