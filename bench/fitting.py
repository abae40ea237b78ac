"""Whether what a checkpoint holds can be of this run; all raise ValueError where it cannot.

A checksum tells damage, not intent: whoever changes a file may write the checksum that goes with
it. What is taken up unseen would end the run later, by an error that says nothing of the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from bench.optimize import MEMORY
from bench.planning import MAX_STEPS
from bench.trainer import GROUP, Cursor, Snapshot, Trainer

MAX_MACS = 1e60
"""More than any training costs; a record could not hold much more."""

ENTRY = re.compile(rf"({GROUP})?(\d{{1,9}})\.(.+)")
"""Name of what an optimizer remembers, see `Trainer.optimizer_tensors`."""


def fill(target: Tensor, value: Tensor, name: str) -> None:
    """Copies a tensor of the file into one of the run; a copy would stretch or round it."""
    target.copy_(same(value, target, name))


def same(value: Tensor, like: Tensor, name: str) -> Tensor:
    """A tensor of the file, once it has shape and type of another."""
    if (value.shape, value.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"{name} is {list(value.shape)}, {value.dtype}; that of the run {list(like.shape)}, "
            f"{like.dtype}"
        )
    return value


def of_zeros_and_ones(mask: Tensor, name: str) -> Tensor:
    """A mask, once it is one."""
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"the mask of {name} holds other numbers than 0 and 1")
    return mask


def spent(meter: Tensor) -> Tensor:
    """Multiply-adds so far and of a step, once they are numbers that a record can hold."""
    if not bool(((meter >= 0) & (meter < MAX_MACS)).all()):
        raise ValueError(f"{meter.tolist()}: not what a training can have cost")
    return meter


def memory(trainer: Trainer, entries: Mapping[str, object]) -> None:
    """What an optimizer remembers, by the names that the run gives it.

    Only of torch's own optimizers is it known which tensors that are.
    """
    groups, parameters = trainer.state.optimizer.param_groups, trainer.optimized()
    known = MEMORY.get(type(trainer.state.optimizer))
    for name, value in entries.items():
        found = ENTRY.fullmatch(name)
        group, index, key = (found[1], int(found[2]), found[3]) if found else (None, 0, "")
        if not found or index >= len(groups if group else parameters):
            raise ValueError(f"the optimizer has no {name!r}")
        if group:
            if key in trainer.group_options[index]:
                raise ValueError(f"{name!r} is an option of the optimizer, and no memory")
        elif known:
            if key not in known or not isinstance(value, Tensor):
                raise ValueError(f"the optimizer remembers no {name!r}")
            same(value, torch.zeros(()) if key == "step" else parameters[index], name)


def snapshot(found: Snapshot, trainer: Trainer, name: str) -> Snapshot:
    """What a rewind restores, once the run can go back to it."""
    now = trainer.state.model.state_dict()
    if found.model.keys() != now.keys():
        raise ValueError(f"snapshot {name!r} has other tensors than the network")
    for tensor, value in found.model.items():
        same(value, now[tensor], tensor)
    memory(trainer, {**found.optimizer, **found.numbers})
    if found.position >= MAX_STEPS:
        raise ValueError(f"snapshot {name!r} is of batch {found.position}")
    return found


def cursor(found: Cursor, trainer: Trainer) -> Cursor:
    """Where the run stands, once that is a place in its plan."""
    plan, done = trainer.plan, found.phase
    if not (done < len(plan) and found.step <= plan[done].steps):
        raise ValueError(f"no step {found.step} of phase {done} is in the plan")
    before = [(phase.name, phase.steps) for phase in plan[:done]]
    if [(phase.name, phase.steps) for phase in found.phases] != before:
        raise ValueError(f"the phases before phase {done} are not those of the plan")
    if len(found.phase_seconds) != done:
        raise ValueError(f"times of {len(found.phase_seconds)} phases, where {done} have ended")
    if found.total != sum(steps for _, steps in before) + found.step:
        raise ValueError(f"{found.total} steps in all, which are not those of the phases")
    counters = (found.position, found.drawn, found.scored, found.updates)
    if not all(counter < MAX_STEPS for counter in counters):
        raise ValueError(f"{counters}: not what a run can have counted")
    if trainer.meter.counted > found.total:
        raise ValueError(f"the cost of {trainer.meter.counted} steps, where {found.total} are done")
    lacking = {phase.save_as for phase in plan[:done]} - {None, *trainer.snapshots}
    if lacking:
        raise ValueError(f"no snapshot of phases that have ended: {', '.join(map(repr, lacking))}")
    return found
