"""Parameters, non-zeros and multiply-adds of a plain module, counted without knowing its method.

One image runs through the network, and every product that PyTorch executes is seen. Convention A:
one multiply-add (MAC) per weight and position, for convolutions, linear layers and attention; none
for biases, normalisation, activations and pooling. Convention B adds two operations for each output
of a normalisation (one where it has no parameters) and one for each of a ReLU or its kind: the
216M, 848M and 3366M of DPF's wide ResNets (Lin et al., 2020, arXiv:2006.07253, table 2). Recurrent
layers, and normalisation that a model writes out by hand, are not seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bench.liveness import live_weights, plain_evaluation
from bench.record import LayerCount
from methods.functional import call_with

ACTIVATIONS = "activations"
"""Name of the line for products that no parameter enters, such as queries with keys."""

NORMALISATIONS = {
    **dict.fromkeys(
        (
            "native_batch_norm",
            "cudnn_batch_norm",
            "miopen_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_no_update",
            "native_group_norm",
        ),
        1,
    ),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), 2),
}
"""Operation -> which of its arguments is the scale."""

RECTIFIERS = frozenset(
    (
        *("relu", "hardtanh", "leaky_relu", "_prelu_kernel", "elu", "gelu", "silu", "mish"),
        *("hardswish", "threshold"),
    )
)
"""ReLU and its kind; ReLU6 runs as `hardtanh`, SELU and CELU as `elu`."""


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
        elementwise: what convention B adds to either.
        live: weights on a live path; None where the lines do not tell.
        live_macs: multiply-adds for one image with a live weight.
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
    elementwise: int
    live: int | None
    live_macs: int | None


def count_layers(
    model: nn.Module,
    input_shape: Sequence[int],
    prunable: Collection[str] = (),
    *,
    live: bool = False,
) -> tuple[LayerCount, ...]:
    """One line for each weight that enters a product, and for each prunable parameter.

    A weight that is used twice has its MACs twice; a weight that the forward computes from a
    parameter counts with the non-zeros that the product used. Products without a parameter are
    summed in a last line called `ACTIVATIONS`, which has no weights. Normalisation and activations
    belong to the line in front of them. Modes and buffers of the model are left as they were.

    Args:
        model: on any device; called in evaluation mode with one image of zeros. On the device
            `meta`, where weights have no values, all of them count.
        input_shape: (channels, height, width), or whatever one example has.
        prunable: names of parameters, as in `model.named_parameters()`.
        live: also finds the weights on a live path, at several times the cost; the fields are None
            where a network cannot be followed.

    Raises:
        ValueError: a prunable name is not that of a parameter.
    """
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(prunable) - parameters.keys()):
        raise ValueError(f"prunable: the model has no parameter {', '.join(unknown)}")
    products = _Products(parameters)
    first = next(iter(parameters.values()), torch.empty(0))
    with torch.no_grad(), plain_evaluation(model), sdpa_kernel(SDPBackend.MATH):
        image = torch.zeros(1, *input_shape, dtype=first.dtype, device=first.device)
        products.origin[image] = None
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with products:
            call_with(model, buffers, image)
    alive = _alive(model, input_shape) if live else None
    lines = [
        LayerCount(
            name=name,
            shape=tuple(parameter.shape),
            weights=parameter.numel(),
            nonzero=_nonzero(parameter),
            dense_macs=products.dense_macs[name],
            macs=products.macs[name],
            prunable=name in prunable,
            live=int(alive[name].sum()) if alive else None,
            live_units=_live_units(model, name, alive[name]) if alive else None,
            elementwise=products.elementwise[name],
        )
        for name, parameter in parameters.items()
        if name in products.dense_macs or name in prunable
    ]
    dense_macs, elementwise = products.dense_macs[""], products.elementwise[""]
    if dense_macs or elementwise:
        rest = (0, 0, dense_macs, products.macs[""], False)
        lines.append(LayerCount(ACTIVATIONS, (), *rest, elementwise=elementwise))
    return tuple(lines)


def with_kept(layers: Sequence[LayerCount], kept: Mapping[str, int]) -> tuple[LayerCount, ...]:
    """The lines as if so many weights of each named layer were left.

    Args:
        layers: of the dense network.
        kept: name -> how many weights are left.
    """
    return tuple(
        dataclasses.replace(
            line,
            nonzero=kept[line.name],
            macs=line.dense_macs // line.weights * kept[line.name],
        )
        if line.name in kept
        else line
        for line in layers
    )


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
    live = [line.live for line in layers if line.dense_macs and line.live is not None]
    return Totals(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        nonzero=sum(map(_nonzero, model.parameters())),
        weights=sum(weights.values()),
        conv_weights=sum(line.weights for line in conv),
        shortcut_weights=sum(line.weights for line in conv if _is_shortcut(line)),
        norm=norm,
        bias=bias,
        dense_macs=sum(line.dense_macs for line in layers),
        macs=sum(line.macs for line in layers),
        elementwise=sum(line.elementwise for line in layers),
        live=sum(live) if live else None,
        live_macs=sum(map(_live_macs, layers)) if live else None,
    )


def _nonzero(tensor: Tensor) -> int:
    return tensor.numel() if tensor.is_meta else int(tensor.count_nonzero())


def _alive(model: nn.Module, input_shape: Sequence[int]) -> dict[str, Tensor] | None:
    try:
        return live_weights(model, input_shape)
    except Exception:  # an exotic operation must not cost a trained network its record
        return None


def _live_macs(line: LayerCount) -> int:
    """Each weight of a layer is used equally often; products without a weight are all live."""
    if line.live is None or not line.weights:
        return line.macs
    return line.dense_macs // line.weights * line.live


def _live_units(model: nn.Module, name: str, live: Tensor) -> tuple[int, int] | None:
    """Outputs and inputs of a layer with a live weight; a group has inputs of its own."""
    if live.dim() < 2:
        return None
    owner = model.get_submodule(name.rpartition(".parametrizations.")[0] or name.rpartition(".")[0])
    groups = getattr(owner, "groups", 1) if isinstance(owner, _ConvNd) else 1
    # (groups, outputs, inputs of a group), the last two the other way round where transposed
    grouped = live.reshape(groups, -1, live.shape[1], live[0, 0].numel()).any(3)
    rows, columns = int(grouped.any(2).sum()), int(grouped.any(1).sum())
    transposed = isinstance(owner, _ConvNd) and owner.transposed
    return (columns, rows) if transposed else (rows, columns)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums multiply-adds by the parameter they use, and elementwise operations by the one in front.

    A weight is followed from its parameter through views, casts, masks and normalisation: `origin`
    maps a tensor to the name of the parameter it was computed from, to "" for a constant, and to
    None for what depends on the image. Tensors that are not in there are constants. `front` maps
    what depends on the image to the parameter of the last product on its way.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = {"": 0} | {name: value.numel() for name, value in parameters.items()}
        self.origin: MutableMapping[Tensor, str | None] = WeakTensorKeyDictionary()
        self.origin.update({value: name for name, value in parameters.items()})
        self.front: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()
        self.dense_macs: Counter[str] = Counter()
        self.macs: Counter[str] = Counter()
        self.elementwise: Counter[str] = Counter()

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
        op = func.overloadpacket.__name__.rstrip("_")
        front = next((self.front[value] for value in inputs if value in self.front), "")
        if product := _product(op, args, result):
            front = self._add(*product)
            origin = None if origin is None else ""
        elif origin is None and (operations := _elementwise(op, args)):
            self.elementwise[front] += operations
        for value in _tensors(result):
            self.origin[value] = origin
            if origin is None:
                self.front[value] = front
        return result

    def _add(self, dense_macs: int, operands: Sequence[Tensor]) -> str:
        """Adds a product to the counts of its weight, and returns the weight's name or ""."""
        constants = self._constants(operands)
        parameters = [pair for pair in constants if pair[1]]
        weight, name = next(iter(parameters + constants), (None, ""))
        self.dense_macs[name] += dense_macs
        if weight is None:
            self.macs[name] += dense_macs
        elif dense_macs:
            self.macs[name] += dense_macs // weight.numel() * _nonzero(weight)
        return name

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


def _elementwise(op: str, args: Any) -> int:
    """Operations that convention B counts besides products."""
    if op in NORMALISATIONS:
        return int(args[0].numel()) * (1 if args[NORMALISATIONS[op]] is None else 2)
    return int(args[0].numel()) if op in RECTIFIERS else 0


def _is_shortcut(line: LayerCount) -> bool:
    named = "shortcut" in line.name or "downsample" in line.name
    return named and math.prod(line.shape[2:]) == 1


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
