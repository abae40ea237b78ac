"""Both passes of a chain of linear layers, written out.

In a small network's step autograd's records take as long as a third of the products. Here the same
operations of torch are called in the same order without them, so losses and gradients are
autograd's to the last bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from bench import chain
from bench.products import WORTH, pays, plain_linear, product
from methods.parametrizations import MaskSTE

aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda gradient, output: aten.threshold_backward.default(gradient, output, 0),
    "tanh": aten.tanh_backward.default,
    "sigmoid": aten.sigmoid_backward.default,
}
"""From the gradient of an output, and the output."""

OURS = ("torch.nn.", "models.", "bench.")
"""Packages whose networks compute the same in every step. What others' code decides while it runs
would be read off once."""


def written_out(model: nn.Module, batch: int, smoothing: float) -> Passes | None:
    """The passes of a network; None where autograd must compute them.

    Args:
        model: as the method has prepared it.
        batch: images of each batch.
        smoothing: of the labels.
    """
    modules = list(model.modules())
    parameters = list(model.parameters())
    usual = (
        all(_known(module) for module in modules)
        and all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
        and all(p.device.type == "cpu" and not _hooked(p) for p in parameters)
    )
    if not usual:
        return None
    try:
        layers = chain.layers(model)
    except chain.NotAChainError:
        return None
    weights = [p for layer in layers if isinstance(layer, nn.Linear) for p in layer.parameters()]
    if not weights or len(set(map(id, weights))) < len(weights):
        return None  # a weight of two layers has the sum of their gradients
    return Passes(model, layers, batch, smoothing)


def _known(module: nn.Module) -> bool:
    if type(module) is MaskSTE:
        return True
    if is_parametrized(module):
        found: Any = module.parametrizations
        only = list(found) == ["weight"] and len(found.weight) == 1
        if not (only and type(found.weight[0]) is MaskSTE):
            return False
    return type(module).__module__.startswith(OURS)


class _Block:
    """A linear layer and what is computed from its outputs.

    Args:
        layer: the layer.
        fast: whether its products are by oneDNN.

    Attributes:
        trained: what the optimizer sees as the weight; where it is masked, the mask's gradient is
            straight through.
    """

    def __init__(self, layer: nn.Linear, fast: bool) -> None:
        self.fast = fast
        self.activations: list[str] = []
        self.trained, self.bias = layer.weight, layer.bias
        self._mask: Tensor | None = None
        if is_parametrized(layer):
            masked: Any = layer.parametrizations
            self.trained, self._mask = masked.weight.original, masked.weight[0].mask

    def forward(self, x: Tensor) -> _Kept:
        """(B, in) -> (B, out) after the layer, and after each activation."""
        weight, bias, names = self.trained, self.bias, self.activations
        if self._mask is not None:
            weight = weight * self._mask
        if not self.fast:
            found = [plain_linear(x, weight, bias)]
        elif names and names[0] == "relu":
            # Written where the product is, so that there is one tensor for both.
            found = [product(x, weight, bias, "relu")] * 2
            names = names[1:]
        else:
            found = [product(x, weight, bias)]
        for name in names:
            found.append(ACTIVATIONS[name](found[-1]))
        return _Kept(x, weight, found)

    def backward(self, gradient: Tensor, kept: _Kept, into_x: bool) -> Tensor:
        """Leaves the gradients of the layer; (B, in) of its inputs where that is wanted."""
        for name, output in zip(reversed(self.activations), reversed(kept.outputs), strict=False):
            gradient = GRADIENTS[name](gradient, output)
        x, turned = kept.x, gradient.t()
        _add(self.trained, product(turned, x.t()) if self.fast else turned @ x)
        if self.bias is not None:
            _add(self.bias, gradient.sum(0))
        if not into_x:
            return gradient
        return product(gradient, kept.weight.t()) if self.fast else gradient @ kept.weight


class _Kept(NamedTuple):
    """Of a block's forward pass: (B, in), the weight (out, in), and (B, out) several times."""

    x: Tensor
    weight: Tensor
    outputs: list[Tensor]


class Passes:
    """Computes the loss of a batch, then the gradients.

    Args:
        model: of which the layers are.
        layers: as of `chain.layers`.
        batch: images of each batch.
        smoothing: of the labels.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str | nn.Linear], batch: int, smoothing: float
    ) -> None:
        self.model, self.smoothing = model, smoothing
        self._parts = list(model.modules()), list(model.parameters())
        first = next(n for n, layer in enumerate(layers) if isinstance(layer, nn.Linear))
        self._before = [str(name) for name in layers[:first]]
        self._blocks: list[_Block] = []
        for layer in layers[first:]:
            if isinstance(layer, nn.Linear):
                fast = pays() and batch * layer.weight.numel() >= WORTH
                self._blocks.append(_Block(layer, fast))
            elif layer != chain.FLATTEN:  # what is flat already
                self._blocks[-1].activations.append(layer)
        self._one = torch.ones(())
        self._of_loss: tuple[Tensor, ...] = ()
        self._kept: list[_Kept] = []

    def intact(self) -> bool:
        """Whether the network still computes the same."""
        modules, parameters = list(self.model.modules()), list(self.model.parameters())
        return (
            _same(modules, self._parts[0])
            and _same(parameters, self._parts[1])
            and not any(map(chain.hooked, modules))
            and not any(map(_hooked, parameters))
        )

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """() loss; what `backward` needs is kept until then.

        Args:
            images: (B, C, H, W).
            labels: (B,).
        """
        x = images
        for name in self._before:
            x = x.flatten(1) if name == chain.FLATTEN else ACTIVATIONS[name](x)
        self._kept = []
        for block in self._blocks:
            self._kept.append(block.forward(x))
            x = self._kept[-1].outputs[-1]
        if self.smoothing:
            return self._smoothed(x, labels)
        logs = torch.log_softmax(x, 1)
        loss: Tensor
        loss, weight = aten.nll_loss_forward.default(logs, labels, None, 1, -100)
        self._of_loss = logs, labels, weight
        return loss

    @torch.no_grad()
    def backward(self) -> None:
        """Leaves the gradients of that loss, as autograd's `backward` does."""
        gradient = self._gradient_of_loss()
        for number in reversed(range(len(self._blocks))):
            gradient = self._blocks[number].backward(gradient, self._kept[number], number > 0)
        self._kept = []

    def _smoothed(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of smoothed labels, whose many parts are left to autograd."""
        with torch.enable_grad():
            leaf = logits.requires_grad_()
            loss = functional.cross_entropy(leaf, labels, label_smoothing=self.smoothing)
        self._of_loss = leaf, loss
        return loss.detach()

    def _gradient_of_loss(self) -> Tensor:
        """(B, classes)."""
        if self.smoothing:
            leaf, loss = self._of_loss
            return torch.autograd.grad(loss, leaf)[0]
        logs, labels, weight = self._of_loss
        found = aten.nll_loss_backward.default(self._one, logs, labels, None, 1, -100, weight)
        gradient: Tensor = torch._log_softmax_backward_data(found, logs, 1, logs.dtype)
        return gradient


def _hooked(parameter: nn.Parameter) -> bool:
    """Whether autograd would call somebody with its gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _same(one: Sequence[object], other: Sequence[object]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))
