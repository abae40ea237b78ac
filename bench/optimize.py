"""An optimizer's step on a CPU, without what torch's own looks up anew each time.

Around the fused kernel torch calls hooks, asks for the state of every parameter and sorts tensors
by device: for a small network as long as the kernel takes itself. Here the tensors are looked up
once and the same kernel is called on them, so the digits are torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as hooks

UNUSUAL = ("amsgrad", "maximize", "differentiable")
"""Options of an optimizer that are left to torch."""


class Advance:
    """Takes steps of one optimizer.

    Args:
        optimizer: SGD, Adam and AdamW take the short way where they are fused, on the CPU, and have
            no hooks; all others their own `step`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._groups: list[_Group] = []

    def __call__(self) -> None:
        """One step, from the gradients as they are. Call it where gradients are not recorded."""
        groups = self._groups = self._groups or _groups(self.optimizer)
        gradients = [[p.grad for p in group.parameters] for group in groups]
        for some in gradients:
            for gradient in some:
                if gradient is None:
                    self.optimizer.step()
                    return
        for group, some in zip(groups, gradients, strict=True):
            group.kernel(group, some)
        if not groups:
            self.optimizer.step()

    def forget(self) -> None:
        """Tensors may lie elsewhere, or options have changed."""
        self._groups = []


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of parameters and what the optimizer remembers of them, list beside list."""

    kernel: Callable[[_Group, list[Any]], None]
    options: dict[str, Any]
    parameters: list[Tensor]
    memory: dict[str, list[Tensor]]


def _groups(optimizer: Optimizer) -> list[_Group]:
    """All groups; empty if one of them is left to torch, as all are in the first step."""
    kind = next((kind for kind in KINDS if type(optimizer) is kind), None)
    if kind is None or "step" in vars(optimizer) or _hooked(optimizer):
        return []
    found = []
    for options in optimizer.param_groups:
        parameters = options["params"]
        if not parameters:  # a network without biases: the kernels want one at least
            continue
        names = [] if kind is SGD and not options["momentum"] else MEMORY[kind]
        if any(options.get(name) for name in UNUSUAL) or not options["fused"]:
            return []
        if any(p.device.type != "cpu" or p.is_complex() for p in parameters):
            return []
        states = [optimizer.state.get(p, {}) for p in parameters]
        if any(not isinstance(state.get(name), Tensor) for state in states for name in names):
            return []
        memory = {name: [state[name] for state in states] for name in names}
        found.append(_Group(KINDS[kind], options, parameters, memory))
    return found


def _hooked(optimizer: Optimizer) -> bool:
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return any((*own, hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks))


def _sgd(group: _Group, gradients: list[Tensor]) -> None:
    options = group.options
    torch._fused_sgd_(
        group.parameters,
        gradients,
        group.memory.get("momentum_buffer", []),
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        momentum=options["momentum"],
        dampening=options["dampening"],
        nesterov=options["nesterov"],
        maximize=False,
        is_first_step=False,
    )


def _adam(group: _Group, gradients: list[Tensor], kernel: Any = torch._fused_adam_) -> None:
    options, memory = group.options, group.memory
    torch._foreach_add_(memory["step"], 1)
    kernel(
        group.parameters,
        gradients,
        memory["exp_avg"],
        memory["exp_avg_sq"],
        [],
        memory["step"],
        lr=options["lr"],
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=False,
        maximize=False,
    )


def _adamw(group: _Group, gradients: list[Tensor]) -> None:
    _adam(group, gradients, torch._fused_adamw_)


KINDS: dict[type[Optimizer], Callable[[_Group, list[Any]], None]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adamw,
}
ADAMS = ["step", "exp_avg", "exp_avg_sq"]
MEMORY: dict[type[Optimizer], list[str]] = {
    SGD: ["momentum_buffer"],
    Adam: ADAMS,
    AdamW: ADAMS,
}
