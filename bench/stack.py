"""Small networks of equal shape, computed as one: one forward and one backward pass for all.

In a small network's step much of the time goes into calls, not into arithmetic. Stacked, the
networks share the calls: activations have a dimension more, (K, batch, units), and small products
are batched products. Everything else stays a network's own: its parameters, batches, optimizer.

`bench/PERFORMANCE.md` says what is gained, and why convolutions are not stacked: grouped ones are
no faster than one after the other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import chain
from bench.products import pays, product, worth
from bench.step import precision
from bench.trainer import Trainer

STACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    chain.FLATTEN: operator.methodcaller("flatten", 2),
}
"""What is computed between the products, on tensors (K, batch, ...)."""


def stackable(model: nn.Module) -> str:
    """Why a network cannot be stacked, in one line; empty if it can.

    Args:
        model: as the method has prepared it.
    """
    try:
        _layers(model)
    except chain.NotAChainError as error:
        return str(error)
    return ""


def group(trainer: Trainer) -> Hashable:
    """What runs must have in common to be in one stack; their methods may differ.

    Args:
        trainer: of a stackable network.
    """
    recipe = trainer.recipe
    layers = [
        layer if isinstance(layer, str) else _shape(layer) for layer in _layers(trainer.state.model)
    ]
    common = recipe.batch, recipe.precision, recipe.label_smoothing, trainer.data.info.shape
    return *layers, *common, trainer.state.lr.device.type


class Stack:
    """Places for the runs of one group.

    A run's results follow from it and the width alone: not from its place, nor from the runs in the
    other places, nor from whether there are any. An idle place is computed too, with weights of 0.

    Args:
        width: number of places, K.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._seats: list[_Seat | None] = [None] * width
        self._batch: tuple[Tensor, Tensor] | None = None

    def backward(
        self, places: Sequence[Trainer | None], penalties: Sequence[Tensor | None] = ()
    ) -> list[Tensor | None]:
        """Computes the loss of each run's next batch, and leaves its gradients.

        Args:
            places: K runs of one group, each with a step that is due; None where none sits.
            penalties: of their methods, from whoever keeps their random numbers apart; none: there
                are none.

        Returns:
            () for each place its loss, without its graph. The gradients are in `grad` of each
            network's parameters, as after `backward` of the loss itself.
        """
        self._seats = [
            seat if seat and seat.is_of(trainer) else _seated(trainer)
            for seat, trainer in zip(self._seats, places, strict=True)
        ]
        recipe = next(trainer for trainer in places if trainer).recipe
        images, labels = self._read()
        with precision(recipe, images.device):
            logits = self._logits(images)
            losses = _cross_entropies(logits, labels, recipe.label_smoothing)
        penalties = penalties or [None] * self.width
        # Each loss depends on its own network alone: the sum's gradients are the losses' own.
        roots = [losses.sum(), *(penalty for penalty in penalties if penalty is not None)]
        torch.autograd.backward(roots)
        return [
            _total(loss, penalty) if trainer else None
            for trainer, loss, penalty in zip(places, losses.detach(), penalties, strict=True)
        ]

    def _read(self) -> tuple[Tensor, Tensor]:
        """(K, batch, C, H, W) images and (K, batch) labels; an idle place has any."""
        for place, seat in enumerate(self._seats):
            if seat is None:
                continue
            batch = seat.trainer.stream.read()
            if self._batch is None:
                images, labels = (tensor.new_zeros(self.width, *tensor.shape) for tensor in batch)
                self._batch = images, labels
            for stacked, tensor in zip(self._batch, batch, strict=True):
                stacked[place] = tensor
        assert self._batch is not None
        return self._batch

    def _logits(self, x: Tensor) -> Tensor:
        """(K, batch, classes)."""
        plan = next(seat.layers for seat in self._seats if seat)
        for number, layer in enumerate(plan):
            if isinstance(layer, str):
                x = STACKED[layer](x)
            else:
                x = _product(x, [None if s is None else s.layers[number] for s in self._seats])
        return x


def _shape(layer: nn.Linear) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None


@dataclass(frozen=True)
class _Seat:
    """A run in its place, and what its network computes in a phase."""

    trainer: Trainer
    phase: int
    layers: list[Any]

    def is_of(self, trainer: Trainer | None) -> bool:
        """Whether nothing has changed."""
        return self.trainer is trainer and self.phase == trainer.cursor.phase


def _seated(trainer: Trainer | None) -> _Seat | None:
    if trainer is None:
        return None
    return _Seat(trainer, trainer.cursor.phase, _layers(trainer.state.model))


def _layers(model: nn.Module) -> list[str | nn.Linear]:
    """As `chain.layers`.

    Raises:
        NotAChainError: the network cannot be stacked.
    """
    found = chain.layers(model)
    for name, module in model.named_modules():
        if any(module is layer for layer in found):
            assert isinstance(module, nn.Linear)
            _check_noise(name, module)
    return found


def _check_noise(name: str, module: nn.Linear) -> None:
    """A stack has no random stream for each run.

    Raises:
        NotAChainError: the layer's tensors are drawn.
    """
    before = torch.get_rng_state()
    with torch.no_grad():
        _ = module.weight, module.bias
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise chain.NotAChainError(f"{name} has a weight that is drawn anew in every pass")


def _product(x: Tensor, layers: Sequence[nn.Linear | None]) -> Tensor:
    """(K, batch, out) of each place's layer; 0 where none sits.

    Args:
        x: (K, batch, in).
        layers: of one shape.
    """
    inputs, outputs, has_bias = next(_shape(layer) for layer in layers if layer)
    if x.device.type == "cpu" and pays() and worth(x[0], outputs):
        tensors = [layer.weight if layer else None for layer in layers]
        tensors += [layer.bias if layer else None for layer in layers]
        found: Tensor = _OneByOne.apply(x, *tensors)
        return found
    zeros = x.new_zeros(outputs, inputs)
    weight = torch.stack([layer.weight if layer else zeros for layer in layers])
    if not has_bias:
        return torch.bmm(weight, x.mT).mT
    bias = torch.stack([layer.bias if layer else zeros[:, 0] for layer in layers])
    # Transposed, the gradient of the weight comes in the weight's own layout.
    return torch.baddbmm(bias.unsqueeze(2), weight, x.mT).mT


class _OneByOne(torch.autograd.Function):
    """The products one after the other, by oneDNN, where that pays.

    Neither weights nor gradients are copied into one tensor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor | None) -> Tensor:
        weights, biases = tensors[: len(x)], tensors[len(x) :]
        ctx.save_for_backward(x, *weights)
        rows = zip(x, weights, biases, strict=True)
        return _stacked([w if w is None else product(a, w, b) for a, w, b in rows])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, *weights = ctx.saved_tensors
        into_weights, into_x = [], None
        for w, g, a in zip(weights, gradient, x, strict=True):
            into_weights.append(w if w is None else product(g.t(), a.t()))
        if ctx.needs_input_grad[0]:
            rows = zip(weights, gradient, strict=True)
            into_x = _stacked([w if w is None else product(g, w.t()) for w, g in rows])
        sums = gradient.sum(1)
        has_bias = ctx.needs_input_grad[1 + len(x) :]
        into_biases = [row if has else None for row, has in zip(sums, has_bias, strict=True)]
        return into_x, *into_weights, *into_biases


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    """(K, ...), 0 where there is none."""
    zeros = torch.zeros_like(next(tensor for tensor in tensors if tensor is not None))
    return torch.stack([zeros if tensor is None else tensor for tensor in tensors])


def _cross_entropies(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """(K,) mean over each place's batch, as `bench.step.data_term` has it."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    each = functional.cross_entropy(
        wide.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=smoothing
    )
    return each.view(labels.shape).mean(1)


def _total(loss: Tensor, penalty: Tensor | None) -> Tensor:
    return loss if penalty is None else loss + penalty.detach()
