"""Weights that the forward pass sees as a function of what the optimizer sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from methods.functional import shared


class _StraightThrough(torch.autograd.Function):
    """Forward w * m; backward the identity on w (Bengio et al., 2013)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class MaskSTE(nn.Module):
    """The network computes with masked weights; the gradient reaches all of them.

    Args:
        mask: the run's mask tensor itself, so that writing it changes the forward pass.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        # The harness checkpoints the masks; once is enough.
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Masked weight, same shape."""
        return _StraightThrough.apply(weight, self.mask)  # type: ignore[no-any-return]


def require_untied(model: nn.Module, name: str) -> None:
    """Checks that one module alone uses a weight, for what changes how a module computes.

    Args:
        model: plain.
        name: of the weight.

    Raises:
        TypeError: another module uses it too, and would go on as before.
    """
    for users in shared(model):
        if name in users:
            raise TypeError(
                f"{' and '.join(users)} are one weight, which this method cannot prune (those that "
                "hold pruned weights at zero can)"
            )


def attach(model: nn.Module, name: str, parametrization: nn.Module) -> nn.Parameter:
    """Parametrizes one weight.

    Args:
        model: the plain network; the weight's module is changed in place.
        name: the weight's name, such as `stem.weight`.
        parametrization: module from the optimizer's tensor to the weight.

    Returns:
        The tensor that the optimizer sees.

    Raises:
        TypeError: another module uses the same weight.
    """
    require_untied(model, name)
    path, _, tensor = name.rpartition(".")
    module = model.get_submodule(path)
    parametrize.register_parametrization(module, tensor, parametrization)
    found: Any = module.parametrizations[tensor]  # type: ignore[index]
    found.attached = True
    assert isinstance(found.original, nn.Parameter)
    return found.original


def bake(model: nn.Module) -> None:
    """Replaces every weight that `attach` parametrized by its value; the model's own stay."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for tensor, found in list(module.parametrizations.items()):  # type: ignore[operator,union-attr]
                if getattr(found, "attached", False):
                    parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
