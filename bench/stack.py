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
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.parametrize import type_before_parametrizations

from bench.products import pays, product, worth
from bench.step import precision
from bench.trainer import Trainer

FUNCTIONS: dict[Any, str] = {
    functional.relu: "relu",
    torch.relu: "relu",
    functional.tanh: "tanh",
    torch.tanh: "tanh",
    functional.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.flatten: "flatten",
}
MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Flatten: "flatten",
    nn.Identity: "",
    nn.Dropout: "",
}
STACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "flatten": operator.methodcaller("flatten", 2),
}
"""What is computed between the products, on tensors (K, batch, ...)."""


def stackable(model: nn.Module) -> str:
    """Why a network cannot be stacked, in one line; empty if it can.

    Args:
        model: as the method has prepared it.
    """
    try:
        _layers(model)
    except _NotStackableError as error:
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


class _NotStackableError(Exception):
    """Says why."""


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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A method's own kind of layer must be seen as one, not as what it computes.
        return isinstance(m, nn.Linear) or super().is_leaf_module(m, module_qualified_name)


def _layers(model: nn.Module) -> list[str | nn.Linear]:
    """What a network computes, in order: linear layers, and names of `STACKED`.

    Raises:
        _NotStackableError: it computes something else.
    """
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        if any(hooks) or module._backward_pre_hooks or "forward" in vars(module):
            raise _NotStackableError(f"{name or 'the network'} has a hook, or a forward of its own")
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise _NotStackableError(f"its forward pass cannot be traced ({reason})") from error
    start, *nodes, end = graph.nodes
    layers: list[str | nn.Linear] = []
    last = start
    for node in nodes:
        if node.op == "placeholder" or node.all_input_nodes != [last]:
            raise _NotStackableError(
                f"{_name(node)} is not computed from the layer before it alone"
            )
        layer = _layer(model, node)
        if isinstance(layer, nn.Linear) and "flatten" not in layers:
            raise _NotStackableError(f"{_name(node)} comes before the images are flattened")
        layers.append(layer)
        last = node
    if end.args[0] is not last:
        raise _NotStackableError("its output is not that of its last layer")
    return [layer for layer in layers if layer]


def _layer(model: nn.Module, node: fx.Node) -> str | nn.Linear:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        kind = type_before_parametrizations(module)
        if kind is nn.Linear:
            assert isinstance(module, nn.Linear)
            _check_noise(str(node.target), module)
            return module
        found = MODULES.get(kind)
        fits = not getattr(module, "p", 0)  # of Dropout
        if isinstance(module, nn.Flatten):
            fits = (module.start_dim, module.end_dim) == (1, -1)
        name = f"{node.target}, a {kind.__name__},"
    else:
        target = str(node.target)
        found = FUNCTIONS.get(node.target, target if node.op == "call_method" else None)
        options = [*node.args[1:], *(node.kwargs[k] for k in sorted(node.kwargs) if k != "inplace")]
        fits = found in STACKED and (
            options in ([1], [1, -1], [-1, 1]) if found == "flatten" else not options
        )
        name = _name(node)
    if found is None or not fits:
        raise _NotStackableError(
            f"{name} is not stacked: only linear layers are, with {', '.join(sorted(STACKED))} "
            "between them"
        )
    return found


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _check_noise(name: str, module: nn.Linear) -> None:
    """A stack has no random stream for each run.

    Raises:
        _NotStackableError: the layer's tensors are drawn.
    """
    before = torch.get_rng_state()
    with torch.no_grad():
        _ = module.weight, module.bias
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise _NotStackableError(f"{name} has a weight that is drawn anew in every pass")


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
