"""A model's forward pass with other tensors in the place of its own; who shares which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def shared(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that several modules use; one that stands twice counts once."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, own in module._parameters.items():
            if own is not None:
                users.setdefault(id(own), []).append(f"{path}.{name}" if path else name)
    return [names for names in users.values() if len(names) > 1]


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], *args: Any) -> Any:
    """What the model returns with these tensors; its own are back afterwards, the same objects.

    `torch.func.functional_call` gives a module that stands in two places its tensor twice, and so
    puts the wrong one back. Here each module is given its tensors once, and a parameter that
    several modules share is replaced in all of them.

    Args:
        model: any module.
        tensors: by the names of `model.named_parameters()` and `model.named_buffers()`; those that
            are missing stay.
        args: of the forward pass.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    given = {id(own): tensors[name] for name, own in named if name in tensors}
    placed = {
        f"{path}.{name}" if path else name: given[id(own)]
        for path, module in model.named_modules()  # each module once
        for name, own in (*module._parameters.items(), *module._buffers.items())
        if own is not None and id(own) in given
    }
    return torch.func.functional_call(model, placed, args, tie_weights=False)
