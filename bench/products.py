"""Products of linear layers by oneDNN, where torch's choice for a processor is a slow one.

On a CPU torch multiplies float32 matrices by MKL, which on AMD's processors takes up to twice as
long as oneDNN, which comes with torch too and which torch's compiler uses. Nothing is rounded but
the sums, in another order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

WORTH = 1_000_000
"""Multiply-adds from which on the detour pays: it costs some microseconds itself."""

plain_linear: Callable[..., Tensor] = functional.linear


@functools.cache
def pays() -> bool:
    """Whether this processor is one of those, and torch has the operator."""
    return available() and _maker() == "AuthenticAMD"


def available() -> bool:
    """Whether torch has the operator, which it keeps for its own compiler."""
    mkldnn: Any = torch.backends.mkldnn
    return bool(mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _maker() -> str:
    """Of the processor, as Linux names it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return names[0] if names else ""


def worth(x: Tensor, units: int) -> bool:
    """Whether a layer's product should take the detour.

    Args:
        x: its inputs, (..., inputs).
        units: its outputs.
    """
    return (
        x.dtype == torch.float32
        and x.numel() * units >= WORTH
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `functional.linear` of torch, for training on a CPU."""
    if input.dim() == 2 and input.device.type == "cpu" and worth(input, len(weight)):
        found: Tensor = _Linear.apply(input, weight, bias)
        return found
    return plain_linear(input, weight, bias)


@contextmanager
def in_layers() -> Iterator[None]:
    """Has layers use it; they look it up where torch has its own."""
    before = functional.linear
    functional.linear = linear
    try:
        yield
    finally:
        functional.linear = before


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """A times B transposed and the bias, (N, M); then ReLU where the activation is `relu`.

    Args:
        a: (N, D).
        b: (M, D).
        bias: (M,).
        activation: `relu`, or `none`.
    """
    found: Tensor = _operator()(a, b, bias, activation, [], "")
    return found


@functools.cache
def _operator() -> Callable[..., Tensor]:
    """The one overload: to have it chosen takes some microseconds of every call."""
    found: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return found


class _Linear(torch.autograd.Function):
    # With a `setup_context`, as torch.func wants it, every call would take 20 microseconds more.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        into_x, into_weight, into_bias = ctx.needs_input_grad
        # The operator has no gradient of its own, for those who differentiate once more.
        times = _plain_product if torch.is_grad_enabled() else product
        return (
            times(gradient, weight.t()) if into_x else None,
            times(gradient.t(), x.t()) if into_weight else None,
            gradient.sum(0) if into_bias else None,
        )


def _plain_product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.t()
