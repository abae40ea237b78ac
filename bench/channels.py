"""Numbers for the channels of a traced network: which of them can only go together.

Every channel of every value gets a number. What an operation ties together is united, such as the
two summands of a residual block; what it needs as it is, or what is not known here, is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map

from bench.errors import CannotCompact
from methods.functional import shared


@dataclass
class Channels:
    """Numbers of channels, and what is known about them.

    Attributes:
        count: of numbers given out.
        pairs: (2, n) numbers that can only go together.
        pinned: numbers that stay.
        layers: name of a convolution or linear layer -> numbers of its outputs and inputs.
        norms: name of a batch normalisation -> numbers of its channels.
        pads: node of a padding with channels -> numbers of its input and of its result, and how
            many of these stand before the old ones.
        of: node -> numbers, in the shape of its value; or a value that is no tensor.
    """

    count: int = 0
    pairs: list[Tensor] = field(default_factory=list)
    pinned: list[Tensor] = field(default_factory=list)
    layers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    pads: dict[fx.Node, tuple[Tensor, Tensor, int]] = field(default_factory=dict)
    of: dict[fx.Node, Any] = field(default_factory=dict)

    def fresh(self, count: int, pinned: bool = False) -> Tensor:
        """(count,) numbers that were not given out before."""
        numbers = torch.arange(self.count, self.count + count)
        self.count += count
        if pinned:
            self.pin(numbers)
        return numbers

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Numbers at the same place, in tensors of one shape, can only go together."""
        self.pairs.append(torch.unique(torch.stack([left.flatten(), right.flatten()]), dim=1))

    def pin(self, numbers: Tensor) -> None:
        """They all stay."""
        self.pinned.append(torch.unique(_slim(numbers)))

    def opaque(self, shape: Sequence[int]) -> Tensor:
        """Numbers of a value about whose channels nothing is known."""
        return self.fresh(1, pinned=True).view([1] * len(shape)).expand(tuple(shape))

    def vector(self, numbers: Tensor, dim: int) -> Tensor:
        """The numbers along a dimension; they stay if they differ along the others."""
        rows = _slim(numbers, dim).movedim(dim, 0).flatten(1)
        if bool((rows != rows[:, :1]).any()):
            self.pin(rows)
        return rows[:, 0]

    def groups(self) -> Tensor:
        """(count,) the group that each number belongs to, by the least number in it."""
        first, second = torch.cat([torch.empty(2, 0, dtype=torch.long), *self.pairs], 1)
        groups = torch.arange(self.count)
        while True:
            least = torch.minimum(groups[first], groups[second])
            lower = groups.scatter_reduce(0, first, least, "amin")
            lower = lower.scatter_reduce(0, second, least, "amin")
            lower = lower[lower]  # so that long chains take few rounds
            if torch.equal(lower, groups):
                return groups
            groups = lower


def _slim(numbers: Tensor, *keep: int) -> Tensor:
    """One of each along the dimensions that only repeat, but for those to keep."""
    for dim, stride in enumerate(numbers.stride()):
        if stride == 0 and dim not in keep:
            numbers = numbers.narrow(dim, 0, 1)
    return numbers


def _along(vector: Tensor, shape: Sequence[int], dim: int = 1) -> Tensor:
    """A number for each channel, repeated over a shape."""
    view = [1] * len(shape)
    view[dim] = -1
    return vector.view(view).expand(tuple(shape))


def number(graph: fx.GraphModule, values: Mapping[fx.Node, Any]) -> Channels:
    """Numbers the channels of every value."""
    channels = Channels()
    for node in graph.graph.nodes:
        numbers = _node(graph, channels, node, values[node])
        assert not isinstance(numbers, Tensor) or numbers.shape == values[node].shape, node
        channels.of[node] = numbers
    # What one layer could lose of a tensor, another that shares it may need.
    for name in (name.rpartition(".")[0] for names in shared(graph) for name in names):
        norm = channels.norms.get(name)
        for numbers in channels.layers.get(name, () if norm is None else (norm,)):
            channels.pin(numbers)
    return channels


def _node(graph: fx.GraphModule, channels: Channels, node: fx.Node, value: Any) -> Any:
    if node.op == "placeholder":
        if not isinstance(value, Tensor):
            return value  # an argument at its default
        dim = min(1, value.dim() - 1)
        return _along(channels.fresh(value.shape[dim], pinned=True), value.shape, dim)
    if node.op == "get_attr":
        return channels.opaque(value.shape) if isinstance(value, Tensor) else value
    args: Any
    kwargs: Any
    args, kwargs = fx.map_arg((node.args, node.kwargs), channels.of.__getitem__)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if node.op == "output":
        for tensor in tensors:
            channels.pin(tensor)
        return None
    if node.op == "call_module":
        name, module = str(node.target), graph.get_submodule(str(node.target))
        kind = type(module).__name__
        result = _module(channels, name, module, args[0], value)
    else:
        target: Any = node.target
        kind = (target if isinstance(target, str) else target.__name__).strip("_")
        if not tensors:
            # Sizes and the like, computed from the numbers as they would be from the values.
            return _opaque(channels, value) if _has_tensor(value) else value
        rule = _RULES.get(kind)
        result = rule(channels, node, value, *args, **kwargs) if rule else None
    if kind in _PRODUCTS:
        raise CannotCompact(
            f"{node.name}: {kind} multiplies activations with each other, as attention does; no "
            f"channel of them can be cut."
        )
    if result is None:
        for tensor in tensors:
            channels.pin(tensor)
        result = _opaque(channels, value)
    return result


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _opaque(channels: Channels, value: Any) -> Any:
    return tree_map(lambda x: channels.opaque(x.shape) if isinstance(x, Tensor) else x, value)


def _module(
    channels: Channels, name: str, module: nn.Module, numbers: Tensor, value: Any
) -> Tensor | None:
    """Numbers behind a layer; None where it is not known what the layer does with its channels."""
    if not _is_plain(module):
        return None
    if isinstance(module, _BatchNorm):
        along = channels.vector(numbers, 1)
        channels.unite(channels.norms.setdefault(name, along), along)
        return numbers
    dim = 1 if isinstance(module, _ConvNd) else value.dim() - 1
    inputs = channels.vector(numbers, dim)
    outputs = channels.fresh(value.shape[dim])
    if isinstance(module, _ConvNd) and module.groups > 1:
        if module.groups != module.in_channels or module.transposed:
            return None
        channels.unite(inputs.repeat_interleave(len(outputs) // len(inputs)), outputs)
    # A layer that is used again is cut once.
    first = channels.layers.setdefault(name, (outputs, inputs))
    channels.unite(torch.cat(first), torch.cat([outputs, inputs]))
    return _along(outputs, value.shape, dim)


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer's weight is its parameter, one slice for each channel."""
    if {name for name, _ in module.named_parameters()} - {"weight", "bias"}:
        return False
    if isinstance(module, _BatchNorm):
        return True
    own = type(module).__mro__[: type(module).__mro__.index(_base(module))]
    # Subclasses of others may pad on their own; they may not compute a weight.
    return not own or type(module).__name__ in {"Conv2dSame"}


def _base(module: nn.Module) -> type[nn.Module]:
    return next((kind for kind in _KINDS if isinstance(module, kind)), nn.Module)


_KINDS: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


Rule = Callable[..., Any]


def _same(channels: Channels, node: fx.Node, value: Any, numbers: Any, *_: Any, **__: Any) -> Any:
    others = [x for x in (*_, *__.values()) if isinstance(x, Tensor)]
    return None if others or not isinstance(numbers, Tensor) else numbers.expand(value.shape)


def _joined(channels: Channels, node: fx.Node, value: Any, left: Any, right: Any, **_: Any) -> Any:
    """Sums and products element by element: what meets goes together."""
    if not isinstance(right, Tensor):
        return left
    if not isinstance(left, Tensor):
        return right
    wide = max(left.dim(), right.dim())
    left, right = (x[(None,) * (wide - x.dim())] for x in (left, right))
    for dim in range(wide):
        if all(x.stride(dim) == 0 or x.shape[dim] == 1 for x in (left, right)):
            left, right = left.narrow(dim, 0, 1), right.narrow(dim, 0, 1)
    if left.shape == right.shape:
        channels.unite(left, right)
    elif right.numel() == 1:  # one number for all channels, such as a map over positions
        return left.expand(value.shape)
    elif left.numel() == 1:
        return right.expand(value.shape)
    else:
        return None
    return left.expand(value.shape)


def _spatial(
    channels: Channels, node: fx.Node, value: Any, numbers: Tensor, *_: Any, **__: Any
) -> Any:
    """Pooling and resizing: every position of the result has the channels of the input."""
    if not isinstance(value, Tensor) or value.dim() < 3:
        return None
    return _along(channels.vector(numbers, 1), value.shape)


def _pad(
    channels: Channels,
    node: fx.Node,
    result: Any,
    numbers: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Any:
    spatial = 2 * (numbers.dim() - 2)  # amounts come last dimension first
    if not any(pad[spatial:]) and spatial:
        return _along(channels.vector(numbers, 1), result.shape)
    if mode != "constant" or value or len(pad) != spatial + 2 or min(pad[spatial:]) < 0:
        return None
    if len(node.args) < 2 or node.all_input_nodes != [node.args[0]]:
        return None  # computed from sizes, which will be others
    # The channels of the result have numbers of their own: an old one that is gone can still be
    # filled by what is added to it, as in the shortcuts of ResNets of option A.
    old = channels.vector(numbers, 1)
    new = channels.fresh(result.shape[1])
    channels.pads[node] = (old, new, pad[spatial])
    return _along(new, result.shape)


def _cat(
    channels: Channels, node: fx.Node, value: Any, tensors: Sequence[Tensor], dim: int = 0
) -> Any:
    dim %= value.dim()
    shared = [d for d in range(value.dim()) if d != dim]
    for d in shared:
        if all(x.stride(d) == 0 for x in tensors):
            tensors = [x.narrow(d, 0, 1) for x in tensors]
    return torch.cat(list(tensors), dim).expand(value.shape)


def _structural(channels: Channels, node: fx.Node, value: Any, *args: Any, **kwargs: Any) -> Any:
    """What moves elements, and does not depend on how many channels there are."""
    return _call(node, args, kwargs)


def _reshaped(
    channels: Channels, node: fx.Node, value: Any, numbers: Tensor, *size: Any, **__: Any
) -> Any:
    """Only what would be right for fewer channels, too: a flattening, or other dimensions of 1."""
    result = _call(node, (numbers, *size), {})
    literal = tree_leaves(node.args[1:])
    flat = result.dim() == 2 and literal[-1] == -1
    moved = [n for n in numbers.shape if n > 1] == [n for n in result.shape if n > 1]
    fixed = any(isinstance(n, int) and n not in (-1, 1) for n in literal)
    return result if (flat or moved) and not fixed else None


def _reduced(
    channels: Channels,
    node: fx.Node,
    value: Any,
    numbers: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    **_: Any,
) -> Any:
    """Means over positions; not over channels, whose number would be another one."""
    if dim is None:
        return None
    dims = [d % numbers.dim() for d in (dim if isinstance(dim, Sequence) else [dim])]
    slim = _slim(numbers)
    low, high = slim.amin(dims, keepdim=True), slim.amax(dims, keepdim=True)
    if not torch.equal(low, high):
        return None
    low = low.expand([1 if d in dims else n for d, n in enumerate(numbers.shape)])
    return low if keepdim else low.reshape(value.shape)


def _getitem(channels: Channels, node: fx.Node, value: Any, source: Any, index: Any) -> Any:
    if not isinstance(source, Tensor):
        return source[index]
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, slice | int) for part in parts):
        return None
    for dim, part in enumerate(parts):
        if part != slice(None) and dim > 0:
            first = source.narrow(dim, 0, 1)
            if source.stride(dim) and not bool((source == first).all()):
                return None  # a place among the channels, and it would be another one
    return source[index]


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def _plain(channels: Channels, node: fx.Node, value: Any, *args: Any, **kwargs: Any) -> Any:
    return None if _has_tensor(value) else value


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_rules(
        _same,
        "relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish tanh hardswish sigmoid "
        "hardsigmoid softplus abs neg sqrt exp clamp dropout dropout1d dropout2d dropout3d "
        "alpha_dropout contiguous clone detach to float type half double bfloat16 pow square",
    ),
    **_rules(_joined, "add iadd radd sub isub mul imul rmul div truediv itruediv maximum minimum"),
    **_rules(
        _spatial,
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d interpolate",
    ),
    **_rules(_structural, "flatten permute transpose movedim unsqueeze"),
    **_rules(_reshaped, "view reshape squeeze"),
    **_rules(_reduced, "mean sum amax amin"),
    **_rules(_plain, "size dim numel getattr"),
    "cat": _cat,
    "concat": _cat,
    "pad": _pad,
    "getitem": _getitem,
}
"""Function or method -> the numbers behind it; None where all channels must stay."""

_PRODUCTS = {
    *("matmul", "bmm", "mm", "einsum", "baddbmm", "scaled_dot_product_attention"),
    *("MultiheadAttention", "multi_head_attention_forward"),
}
