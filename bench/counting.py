"""Parameters, non-zeros and multiply-adds of a plain module, counted without knowing its method.

One image runs through the network, and every product that PyTorch executes is seen. Convention A:
one multiply-add (MAC) per weight and position, for convolutions, linear layers and attention; none
for biases, normalisation, activations and pooling. Recurrent layers are not seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bench.record import LayerCount

ACTIVATIONS = "activations"
"""Name of the line for products that no parameter enters, such as queries with keys."""


@dataclass(frozen=True, slots=True)
class Totals:
    """A whole network; parameters that several modules share count once.

    Attributes:
        parameters: every parameter.
        nonzero: those of them that are not zero.
        weights: of convolutions and linear layers.
        conv_weights: those of them with a kernel, that is with more than two dimensions.
        shortcut_weights: those of 1x1 convolutions with `shortcut` or `downsample` in their name.
        norm: parameters of normalisation layers.
        bias: biases outside of normalisation layers.
        dense_macs: multiply-adds for one image with every weight.
        macs: multiply-adds for one image with a non-zero weight.
    """

    parameters: int
    nonzero: int
    weights: int
    conv_weights: int
    shortcut_weights: int
    norm: int
    bias: int
    dense_macs: int
    macs: int


def count_layers(
    model: nn.Module, input_shape: Sequence[int], prunable: Collection[str] = ()
) -> tuple[LayerCount, ...]:
    """One line for each weight that enters a product, and for each prunable parameter.

    A weight that is used twice has its MACs twice; a weight that the forward computes from a
    parameter counts with the non-zeros that the product used. Products without a parameter are
    summed in a last line called `ACTIVATIONS`, which has no weights. Modes and buffers of the model
    are left as they were.

    Args:
        model: on any device; called in evaluation mode with one image of zeros.
        input_shape: (channels, height, width), or whatever one example has.
        prunable: names of parameters, as in `model.named_parameters()`.

    Raises:
        ValueError: a prunable name is not that of a parameter.
    """
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(prunable) - parameters.keys()):
        raise ValueError(f"prunable: the model has no parameter {', '.join(unknown)}")
    products = _Products(parameters)
    first = next(iter(parameters.values()), torch.empty(0))
    with torch.no_grad(), _plain_evaluation(model):
        image = torch.zeros(1, *input_shape, dtype=first.dtype, device=first.device)
        products.origin[image] = None
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with products:
            torch.func.functional_call(model, buffers, (image,))
    lines = [
        LayerCount(
            name=name,
            shape=tuple(parameter.shape),
            weights=parameter.numel(),
            nonzero=int(parameter.count_nonzero()),
            dense_macs=products.dense_macs[name],
            macs=products.macs[name],
            prunable=name in prunable,
        )
        for name, parameter in parameters.items()
        if name in products.dense_macs or name in prunable
    ]
    if dense_macs := products.dense_macs[""]:
        lines.append(LayerCount(ACTIVATIONS, (), 0, 0, dense_macs, products.macs[""], False))
    return tuple(lines)


def count_totals(model: nn.Module, layers: Sequence[LayerCount]) -> Totals:
    """Sums over a network and its lines from `count_layers`."""
    weights = {line.name: line.weights for line in layers if line.dense_macs}
    conv = [line for line in layers if line.dense_macs and len(line.shape) > 2]
    norm = bias = 0
    for path, parameter in model.named_parameters():
        owner, _, name = path.rpartition(".")
        if path in weights:
            continue
        if "Norm" in type(model.get_submodule(owner)).__name__:  # timm's are not torch's classes
            norm += parameter.numel()
        elif name.endswith("bias"):
            bias += parameter.numel()
    return Totals(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        nonzero=sum(int(parameter.count_nonzero()) for parameter in model.parameters()),
        weights=sum(weights.values()),
        conv_weights=sum(line.weights for line in conv),
        shortcut_weights=sum(line.weights for line in conv if _is_shortcut(line)),
        norm=norm,
        bias=bias,
        dense_macs=sum(line.dense_macs for line in layers),
        macs=sum(line.macs for line in layers),
    )


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums multiply-adds by the parameter they use.

    A weight is followed from its parameter through views, casts, masks and normalisation: `origin`
    maps a tensor to the name of the parameter it was computed from, to "" for a constant, and to
    None for what depends on the image. Tensors that are not in there are constants.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = {"": 0} | {name: value.numel() for name, value in parameters.items()}
        self.origin: MutableMapping[Tensor, str | None] = WeakTensorKeyDictionary()
        self.origin.update({value: name for name, value in parameters.items()})
        self.dense_macs: Counter[str] = Counter()
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, convolutions and linear layers arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        names = [name for _, name in self._constants(inputs)]
        origin = None
        if len(names) == len(inputs):
            # A gain or a mask may join the weight: the largest of the parameters is the weight.
            origin = max(names, key=self.size.__getitem__, default="")
        if product := _product(func.overloadpacket.__name__.rstrip("_"), args, result):
            self._add(*product)
            origin = None if origin is None else ""
        for value in _tensors(result):
            self.origin[value] = origin
        return result

    def _add(self, dense_macs: int, operands: Sequence[Tensor]) -> None:
        constants = self._constants(operands)
        parameters = [pair for pair in constants if pair[1]]
        weight, name = next(iter(parameters + constants), (None, ""))
        self.dense_macs[name] += dense_macs
        if weight is None:
            self.macs[name] += dense_macs
        elif dense_macs:
            self.macs[name] += dense_macs // weight.numel() * int(weight.count_nonzero())

    def _constants(self, values: Sequence[Tensor]) -> list[tuple[Tensor, str]]:
        """Those that do not depend on the image, with the parameter they come from or ""."""
        origins = [(value, self.origin.get(value, "")) for value in values]
        return [(value, name) for value, name in origins if name is not None]


def _product(op: str, args: Any, result: Any) -> tuple[int, Sequence[Tensor]] | None:
    """Dense MACs of an operation and the tensors that may be its weight, likeliest first."""
    if op in {"convolution", "_convolution"}:
        weight, transposed = args[1], args[6]
        # Each weight once per output position; a transposed convolution scatters from its input.
        map_ = args[0] if transposed else result
        return map_.numel() // map_.shape[1] * weight.numel(), [weight]
    if op.startswith("_scaled_dot_product"):  # a kernel that the model itself insists on
        query, key, value = args[:3]
        pairs = query.numel() // query.shape[-1] * key.shape[-2]
        return pairs * (query.shape[-1] + value.shape[-1]), []
    if op in {"mm", "bmm", "mv"}:
        left, right = args[:2]
    elif op in {"addmm", "baddbmm", "addmv"}:
        left, right = args[1:3]
    else:
        return None
    return left.numel() * (right.shape[-1] if right.dim() > 1 else 1), [right, left]


def _is_shortcut(line: LayerCount) -> bool:
    named = "shortcut" in line.name or "downsample" in line.name
    return named and math.prod(line.shape[2:]) == 1


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _plain_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without the fused kernels, in which products would be hidden or padded."""
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model.eval()
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        model.train(modes[model])  # modules may act on the call, for instance drop a cache
        for module, training in modes.items():
            module.training = training
