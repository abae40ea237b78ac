"""One cell on several devices: processes that train it together, and agree on everything.

Each rank is a process with a device of its own, started by `torchrun`. All have the whole network,
the same masks and the same random numbers. Each computes the passes of its share of every batch;
what the optimizer and the method see is the mean of the gradients, which has the same bits on all
ranks, and so has all that follows from it. That it does is checked, see `Group.check`.

DistributedDataParallel is not used: it wraps the network, which methods change, and its hooks fire
in every backward pass, also in those of a method's own scores.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from bench.errors import RankLost, RanksDiffer, UsageError
from bench.signals import stop_requested

FINE = ("ok", "diverged", "invalid", "skipped", "stopped")
"""Ends of a cell to which ranks come after the same work, so that none need be waited for long."""

LONG = timedelta(days=7)
"""To wait for work of the first rank that has no limit; `torchrun` ends those whose leader dies."""

ASK_SECONDS, ASK_STEPS = 1.0, 1000
"""At most so long the ranks go on without asking each other whether one of them is to stop."""

PATIENCE, GRACE = 600.0, 20.0
"""Seconds, see `Group`."""

HURRY_SECONDS = 5.0
"""What is left to wait for others by one that is to stop: theirs too may have been ended, and
`torchrun` kills after 30 seconds whoever stays."""

LOOK_SECONDS = 0.01
"""Pause before another look whether there is word of others; one wait would hear no signal."""


@dataclass(frozen=True, slots=True)
class Group:
    """The processes that train a cell together, seen from one of them.

    The default is a process by itself, for which everything here does nothing.

    Attributes:
        rank: number of this process; the first, 0, leads: it alone writes files and decides.
        size: of the group.
        device: of this process, as torch names it; empty for one by itself.
        patience: seconds in which the others must come to where this one waits.
        grace: seconds in which they must fail too, when this one has.
        store: what they leave word in.
    """

    rank: int = 0
    size: int = 1
    device: str = ""
    patience: float = PATIENCE
    grace: float = GRACE
    store: Any = field(default=None, repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def part(self, count: int) -> range:
        """Which of `count` things in a row are this rank's; all have as many, give or take one."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def add(self, tensor: Tensor) -> None:
        """Writes the sum over the ranks over a tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Writes the mean over the ranks over tensors, in one message."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in tensors]
        parts = torch.split(flat.div_(self.size), sizes)
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks; it can be differentiated, as often as wanted."""
        return tensor if self.size == 1 else _mean(tensor)

    def leaves(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same values; gradients that autograd finds of them are the mean over the ranks.

        Empty for a process by itself, whose own parameters do.
        """
        if self.size == 1:
            return {}
        return {name: _SameValues.apply(p) for name, p in parameters.items()}

    def check(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Compares tensors that must have the same bits on all ranks, by a hash of each.

        Args:
            tensors: by name, in the same order on all ranks.
            where: the moment, for the error.

        Raises:
            RanksDiffer: names the first tensor and rank that differ from the first rank's.
        """
        if self.size == 1 or not tensors:
            return
        own = torch.stack([checksum(tensor) for tensor in tensors.values()]).cpu()
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        for rank, other in enumerate(found):
            if not torch.equal(other, found[0]):
                name = list(tensors)[int((other != found[0]).int().argmax())]
                raise RanksDiffer(
                    f"{where}: {name} on rank {rank} is not that of rank 0. A hook may depend on "
                    "what differs from one process to another; random numbers come from "
                    "run.generator or torch's own generators, and scores from gradients of the "
                    "run's own loss or logits."
                )

    @contextmanager
    def in_turn(self, what: str) -> Iterator[None]:
        """The first rank does what is inside before the others: what it leaves, they find.

        Args:
            what: is done; unique in the group's life.
        """
        if self.size > 1 and not self.leads:
            self._await([f"done/{what}"], LONG, HURRY_SECONDS)
        try:
            yield
        finally:
            if self.size > 1 and self.leads:
                self.store.set(f"done/{what}", "1")

    def begin(self, key: str) -> int:
        """A cell begins; the first rank lets the others know.

        Returns:
            Its number in the group's life, from 1 on; 0 for a process by itself.
        """
        if self.size == 1:
            return 0
        if not self.leads:
            return int(self.store.add("cells", 0))
        return self._tell(key)

    def close(self) -> None:
        """The first rank has no more cells; nobody talks any more."""
        if self.size > 1:
            if self.leads:
                self._tell(None)
            dist.destroy_process_group()

    def cells(self) -> Iterator[str]:
        """For the other ranks: the key of each cell that the first begins."""
        for number in itertools.count(1):
            try:
                self._await([f"cell/{number}"], LONG, HURRY_SECONDS)
                told = json.loads(self.store.get(f"cell/{number}"))
            except RuntimeError as error:
                if stop_requested():
                    return
                raise RankLost("rank 0 died; the same command goes on.") from error
            if told is None:
                return
            yield told

    def end(self, number: int, status: str, reason: str = "") -> None:
        """A cell ends here; waits until it has on all ranks, in the same way.

        Args:
            number: as `begin` gave it.
            status: of its record, or `stopped`.
            reason: of that status. Of `stopped` an error: others are not waited for then, who may
                have been ended by the same signal.

        Raises:
            RankLost: it did not: the cell has no record then, and its checkpoint stays.
        """
        if self.size == 1:
            return
        word = json.dumps([status, reason])
        if status == "stopped" and reason:
            with suppress(RuntimeError):  # what they leave word in may be gone as well
                self.store.set(f"end/{number}/{self.rank}", word)
            return
        self.store.set(f"end/{number}/{self.rank}", word)
        keys = [f"end/{number}/{rank}" for rank in range(self.size)]
        seconds, hurry = self.grace, HURRY_SECONDS
        if status in FINE:  # the first rank may be writing, and where all have stopped it saves
            seconds, hurry = self.patience, self.patience if status == "stopped" else self.grace
        try:
            self._await(keys, timedelta(seconds=seconds), hurry)
        except RuntimeError as error:
            raise self._lost(number, keys) from error
        ends = {json.loads(self.store.get(key))[0] for key in keys}
        # A rank that another one left alone fails too, but that is not the cell's fault.
        if len(ends) > 1 or self.store.check([f"lost/{number}"]):
            raise self._lost(number, keys)

    def _await(self, keys: Sequence[str], limit: timedelta, hurry: float) -> None:
        """Waits until others have left word.

        Args:
            keys: of it.
            limit: to wait.
            hurry: seconds that are left of it once this process is to stop.

        Raises:
            RuntimeError: they have not.
        """
        end = time.monotonic() + limit.total_seconds()
        hurries = False
        while not self.store.check(list(keys)):
            now = time.monotonic()
            if stop_requested() and not hurries:
                hurries, end = True, min(end, now + hurry)
            if now >= end:
                raise RuntimeError("waited in vain for the other processes")
            time.sleep(LOOK_SECONDS)

    def _lost(self, number: int, keys: Sequence[str]) -> RankLost:
        """What became of the ranks; lets the others know that this one waits no longer."""
        self.store.set(f"lost/{number}", "1")
        told = []
        for rank, key in enumerate(keys):
            if self.store.check([key]):
                status, reason = json.loads(self.store.get(key))
                told.append(f"rank {rank}: {status}" + (f" ({reason})" if reason else ""))
            else:
                told.append(f"rank {rank} died or hangs")
        return RankLost(
            f"the ranks did not end the cell together. {'; '.join(told)}. The same command goes "
            "on from the last checkpoint."
        )

    def _tell(self, what: str | None) -> int:
        number = int(self.store.add("cells", 1))
        self.store.set(f"cell/{number}", json.dumps(what))
        return number


ALONE = Group()


class Pace:
    """Has all ranks decide alike after a step, though their clocks and signals are not the same.

    A wish of any rank is all ranks'. They ask each other now and then only, after as many steps as
    the first one says.

    Args:
        group: the ranks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._wishes: tuple[bool, ...] = ()
        self._left, self._steps = 0, 1
        self._asked = time.monotonic()

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """After each step: which of these things are to be done now.

        Args:
            wishes: of this rank, at this step; as many at each step.
        """
        if self._group.size == 1:
            return wishes
        self._wishes = tuple(map(operator.or_, self._wishes or wishes, wishes))
        self._left -= 1
        if self._left > 0:
            return (False,) * len(wishes)
        return self._ask()

    def _ask(self) -> tuple[bool, ...]:
        now, steps = time.monotonic(), 0.0
        if self._group.leads:
            speed = self._steps / max(1e-9, now - self._asked)
            # It grows bit by bit: the first steps of a cell are no measure.
            steps = max(1, min(ASK_SECONDS * speed, 2 * self._steps, ASK_STEPS) // 1)
        # On the CPU, so that no GPU is waited for.
        told = torch.tensor([steps, *map(float, self._wishes)])
        dist.all_reduce(told, dist.ReduceOp.MAX)
        steps, *agreed = told.tolist()
        self._left = self._steps = int(steps)
        self._asked, self._wishes = now, ()
        return tuple(map(bool, agreed))


def launched() -> bool:
    """Whether `torchrun` has started this process beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def meet(device: str) -> Group:
    """The group that `torchrun` has started this process in; alone without it.

    Raises:
        UsageError: as of `join`.
    """
    return join(device) if launched() else ALONE


def join(
    device: str, url: str = "env://", patience: float = PATIENCE, grace: float = GRACE
) -> Group:
    """Meets the other processes; once in a process.

    Args:
        device: `cpu`; `cuda`, of which each process of a machine has another; `auto`.
        url: where they meet, as torch has it; by default where `torchrun` says.
        patience: of the group; so is `grace`.
        grace: see there.

    Raises:
        UsageError: there are not as many devices.
    """
    device = own_device(device)
    limit = timedelta(seconds=patience)
    store, rank, size = next(iter(rendezvous(url, timeout=limit)))
    # What is agreed on lies on the CPU, and never waits for a GPU.
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=limit
    )
    return Group(rank, size, device, patience, grace, store)


def own_device(asked: str) -> str:
    """The device of this process among those of its machine.

    Raises:
        UsageError: there is none for it.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cpu":
        return asked
    if asked != "cuda":
        raise UsageError(
            f"--device {asked}: with torchrun give auto, cpu or cuda; each process has its own GPU."
        )
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise UsageError(
            f"--device cuda: process {number + 1} of this machine has no GPU, there are {there}; "
            "start torchrun with as many processes per node."
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def checksum(tensor: Tensor) -> Tensor:
    """() int64, a hash of a tensor's bits in their places; does not wait for the device."""
    found = tensor.detach().contiguous().view(-1).view(torch.uint8).long()
    place = torch.arange(1, found.numel() + 1, device=found.device)
    # Products overflow, which mixes; the shift brings the upper bits to where the sum has them.
    place = place * -7046029254386353131
    place = (place ^ (place >> 29)) * -4658895280553007687
    return ((found + 1) * (place ^ (place >> 32))).sum()


def _mean(tensor: Tensor) -> Tensor:
    found: Tensor = _Mean.apply(tensor)
    return found


class _Mean(torch.autograd.Function):
    """The mean over the ranks, which is its own gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return torch.empty_like(tensor).copy_(total.div_(dist.get_world_size()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _mean(gradients[0])


class _SameValues(torch.autograd.Function):
    """A tensor as it is; its gradient is the mean over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _mean(gradients[0])
