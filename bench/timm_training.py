"""timm's optimizers and learning-rate schedules, for recipes that name one."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import timm.optim
import timm.scheduler
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.errors import SuiteError, UnknownName

Keywords = tuple[tuple[str, Any], ...]
"""Names and values, sorted by name."""

# timm says which types it has, but not that these names are its own.
_optim: Any = timm.optim
_scheduler: Any = timm.scheduler

TICKS = 10**9
"""Length of a run to timm's schedules, whose points in time are integers.

timm decays one tick before a milestone; of so many, that is the tolerance of our own schedules.
"""

SCHEDULERS: MappingProxyType[str, Any] = MappingProxyType(
    {
        "cosine": _scheduler.CosineLRScheduler,
        "multistep": _scheduler.MultiStepLRScheduler,
        "poly": _scheduler.PolyLRScheduler,
        "step": _scheduler.StepLRScheduler,
        "tanh": _scheduler.TanhLRScheduler,
    }
)

OURS = {
    "decay_rate": "factor",
    "decay_t": "drops",
    "initialize": "nothing",
    "optimizer": "optimizer",
    "t_in_epochs": "the budget",
    "t_initial": "the budget",
    "warmup_lr_init": "warmup_from",
    "warmup_t": "warmup",
}
"""Keywords of timm's schedules that other fields of the recipe fill."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A learning-rate schedule of timm over a whole run.

    Attributes:
        name: `cosine`, `tanh`, `poly`, `step` or `multistep`.
        lr: base learning rate.
        drops: milestones of `multistep` as fractions of the run; the period of `step`.
        factor: what each of them multiplies the rate by.
        warmup: fraction of the run in which the rate rises to `lr`, in place of the schedule, from
            `warmup_from` of it.
        options: more keywords of timm's class. `noise_range_t` is given in fractions of the run.
            The run holds all of `cycle_limit` cycles, and the warm-up before them where
            `warmup_prefix` puts it there.
    """

    name: str
    lr: float
    drops: tuple[float, ...] = ()
    factor: float = 0.1
    warmup: float = 0.0
    warmup_from: float = 0.0
    options: Keywords = ()

    def lr_at(self, fraction: float) -> float:
        """Learning rate when `fraction` of the run is done."""
        scheduler = _made(self)
        scheduler.step(round(fraction * TICKS))
        return float(scheduler.optimizer.param_groups[0]["lr"])

    def check(self, where: str) -> None:
        """Refuses what cannot work, before anything trains.

        Args:
            where: place in the input, for errors.

        Raises:
            SuiteError: there is none of that name, or its keywords are wrong.
        """
        place = f"{where}: schedule = 'timm:{self.name}'"
        if self.name == "plateau":
            raise SuiteError(
                f"{place}: it looks at a metric, and the rate here follows from the step alone."
            )
        if self.name not in SCHEDULERS:
            raise UnknownName(f"{where}: schedule", "schedule of timm", self.name, SCHEDULERS)
        allowed = inspect.signature(SCHEDULERS[self.name]).parameters.keys()
        for option, _ in self.options:
            if option in OURS:
                raise SuiteError(f"{place}: schedule_options.{option}: {OURS[option]} fills it.")
            if option not in allowed:
                raise UnknownName(place, "keyword", option, allowed - OURS.keys())
        if self.name == "step" and len(self.drops) != 1:
            raise SuiteError(f"{place}: give one drop: the time from each decay to the next.")
        if self.name not in ("step", "multistep") and self.drops:
            raise SuiteError(f"{place}: drops = {list(self.drops)}: it has none; leave them out.")
        try:
            rates = [self.lr_at(tenths / 10) for tenths in range(11)]
        except (AssertionError, ArithmeticError, TypeError, ValueError) as error:
            raise SuiteError(f"{place}: {str(error) or 'timm refuses the options'}.") from error
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise SuiteError(f"{place}: the rates {rates} must be at least 0 and finite.")


def check_optimizer(name: str, options: Keywords, momentum: float, where: str) -> None:
    """Refuses an optimizer that cannot work, before anything trains.

    Args:
        name: timm's.
        options: more keywords of its class.
        momentum: the recipe's.
        where: place in the input, for errors.

    Raises:
        SuiteError: there is none of that name, its keywords are wrong, or it cannot be resumed.
    """
    known: list[str] = _optim.list_optimizers()
    if name not in known:
        raise UnknownName(f"{where}: optimizer", "optimizer of timm", name, known)
    place, info = f"{where}: optimizer = 'timm:{name}'", _optim.get_optimizer_info(name)
    if info.second_order:
        raise SuiteError(
            f"{place}: it needs the graph of the gradients, and a step here keeps none. Take a "
            "first-order optimizer."
        )
    if isinstance(info.opt_class, str):
        package = info.opt_class.partition(".")[0]
        raise SuiteError(f"{place}: it is of the package {package}, which is not used here.")
    if momentum and not info.has_momentum:
        raise SuiteError(f"{place}: momentum = {momentum}: it takes none; leave it out.")
    if ours := {"lr", "momentum", "weight_decay"} & dict(options).keys():
        raise SuiteError(
            f"{place}: optimizer_options.{min(ours)}: {min(ours)} is a field of the recipe itself."
        )
    if fault := unfit(name, options, momentum):
        raise SuiteError(f"{place}: {fault}.")


def build(
    groups: list[Any],
    *,
    name: str,
    options: Keywords,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Optimizer:
    """An optimizer of timm over parameters, or over torch's parameter groups.

    Args:
        groups: a group may set what differs.
        name: timm's.
        options: more keywords.
        lr: base learning rate; some scale their weight decay by what is left of it.
        momentum: for those that have one.
        weight_decay: of groups that set none.
    """
    keywords: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, **dict(options)}
    if _optim.get_optimizer_info(name).has_momentum:
        keywords["momentum"] = momentum
    made: Optimizer = _optim.get_optimizer_class(name, bind_defaults=True)(groups, **keywords)
    return made


@functools.lru_cache(maxsize=256)
def unfit(name: str, options: Keywords, momentum: float) -> str | None:
    """Why an optimizer of timm cannot be used; None: it can.

    Some steps on small tensors tell: a run must be resumed from tensors and numbers that the
    optimizer keeps for each parameter, and from what it adds to its groups.
    """
    try:
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng([]):
            return next(_faults(name, options, momentum), None)
    except Exception as error:  # whatever timm's classes raise at wrong keywords
        return f"timm says: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _faults(name: str, options: Keywords, momentum: float) -> Iterator[str]:
    parameters = [nn.Parameter(torch.full(shape, 0.5)) for shape in ((4, 3, 3, 3), (8, 6), (8,))]
    settings: dict[str, Any] = {"lr": 0.1, "momentum": momentum, "weight_decay": 1e-4}
    optimizer = build(list(parameters), name=name, options=options, **settings)
    attributes = vars(optimizer).keys() - vars(torch.optim.SGD(parameters, lr=0.1)).keys()
    if attributes:
        yield f"it keeps {min(attributes)} on itself, which no checkpoint holds"
    rate = torch.tensor(0.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    still = not _moves(optimizer, parameters)
    rate.fill_(0.1)
    if not (still and _moves(optimizer, parameters)):
        yield "it does not follow the learning rate, so a schedule has no hold on it"
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, Tensor):
            yield f"it keeps {parameter!r} for no parameter, which no checkpoint holds"
        for key, value in state.items():
            if not isinstance(value, Tensor | int | float):
                yield f"it keeps {key}, a {type(value).__name__}, which no checkpoint holds"


def _moves(optimizer: Optimizer, parameters: list[nn.Parameter]) -> bool:
    """Whether any parameter moves in two steps."""
    before = [parameter.detach().clone() for parameter in parameters]
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.full(parameter.shape, 0.25)
        optimizer.step()
    return any(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


@functools.lru_cache(maxsize=16)
def _made(schedule: Schedule) -> Any:
    """A schedule that ends at TICKS, all its cycles and warm-up included."""
    kind = SCHEDULERS[schedule.name]
    allowed = inspect.signature(kind).parameters.keys()
    options = {key: _in_ticks(key, value) for key, value in schedule.options}
    warm = round(schedule.warmup * TICKS)
    warmth = {"warmup_t": warm, "warmup_lr_init": schedule.lr * schedule.warmup_from}
    milestones = [round(drop * TICKS) for drop in schedule.drops]
    own: dict[str, Any] = {
        "decay_t": milestones[0] if schedule.name == "step" else milestones,
        "decay_rate": schedule.factor,
        "t_initial": TICKS,
        "warmup_prefix": False,
        **options,
    }
    keywords = {key: value for key, value in own.items() if key in allowed}

    def made(**more: Any) -> Any:
        # The base rate's only holder: a schedule writes its rates into an optimizer.
        holder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=schedule.lr)
        return kind(holder, **{**keywords, **more})

    if "t_initial" not in allowed:
        return made(**warmth)
    cycles = made().get_cycle_length()
    left = TICKS - (warm if own["warmup_prefix"] else 0)
    return made(**warmth, t_initial=left * TICKS // cycles)


def _in_ticks(key: str, value: Any) -> Any:
    """Points in time among timm's keywords are given as fractions of the run."""
    if key != "noise_range_t":
        return value
    values = [round(point * TICKS) for point in (value if isinstance(value, tuple) else (value,))]
    return values if len(values) > 1 else values[0]
