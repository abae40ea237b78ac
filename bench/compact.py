"""The physically smaller network: dead channels cut out, together with the inputs that they feed.

A channel goes if it is zero whatever the image, or if no output reads it. Channels that a network
ties together, such as the two summands of a residual block, go together or not at all. The network
is traced with `torch.fx`; every channel of every value gets a number, numbers that can only go
together are united, and what `bench.liveness` finds alive stays. Where a channel's place matters,
as for normalisation over channels, for grouped convolutions that are not depthwise and for
operations that are not known here, all channels stay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map

from bench.counting import count_layers, count_totals
from bench.errors import CannotCompact
from bench.liveness import PathMode, indicators, is_path, plain_evaluation
from bench.record import Compact

TOLERANCE = 1e-2
"""Largest difference of outputs, relative to the largest, that TF32 on a GPU can explain."""

Kept = Mapping[str, Mapping[str, Sequence[int]]]
"""Layer -> `outputs` and `inputs` -> indices that stay."""


@dataclass(frozen=True, slots=True)
class Compacted:
    """A smaller network.

    Attributes:
        model: for inference; parameters have the names that they had.
        kept: what `rebuild` needs, as plain data: for each convolution and linear layer the
            `outputs` and `inputs` that stayed.
    """

    model: nn.Module
    kept: dict[str, dict[str, list[int]]]


def compact(model: nn.Module, input_shape: Sequence[int]) -> Compacted:
    """The network without its dead channels; in evaluation mode its outputs are the same.

    Each layer keeps at least one output. The network that is given stays as it is.

    Args:
        model: plain.
        input_shape: (channels, height, width), or whatever one example has.

    Raises:
        CannotCompact: its forward pass cannot be traced, multiplies activations with each other as
            attention does, or would not compute the same; says where.
    """
    graph = _traced(model)
    values = _watch(graph, input_shape, with_paths=True)
    channels = _number(graph, values)
    groups = channels.groups()
    alive = _alive(channels, groups, values)
    kept = {
        name: {"outputs": _places(alive, groups[o]), "inputs": _places(alive, groups[i])}
        for name, (o, i) in channels.layers.items()
    }
    _cut(graph, channels, alive[groups])
    _check(model, graph, input_shape)
    return Compacted(graph, kept)


def compact_counts(model: nn.Module, input_shape: Sequence[int]) -> Compact | None:
    """What is left of a network without its dead channels; None where nothing can be cut."""
    try:
        smaller = compact(model, input_shape).model
    except Exception:  # an exotic operation must not cost a trained network its record
        return None
    totals = count_totals(smaller, count_layers(smaller, input_shape))
    return Compact(totals.parameters, totals.dense_macs)


def rebuild(model: nn.Module, input_shape: Sequence[int], kept: Kept) -> nn.Module:
    """The smaller network again, from a freshly created one; its weights are for loading.

    Args:
        model: of the architecture that was compacted; stays as it is.
        input_shape: of one example, the same as then.
        kept: of the `Compacted`.

    Raises:
        CannotCompact: the network is another one than was compacted.
    """
    graph = _traced(model)
    channels = _number(graph, _watch(graph, input_shape, with_paths=False))
    groups = channels.groups()
    alive = torch.ones(len(groups), dtype=torch.bool)
    if kept.keys() != channels.layers.keys():
        raise CannotCompact("the layers of the compact network are not those of this model.")
    for name, sides in channels.layers.items():
        for side, numbers in zip(("outputs", "inputs"), sides, strict=True):
            places = torch.tensor(kept[name][side], dtype=torch.long)
            if not len(places) or int(places.max()) >= len(numbers) or int(places.min()) < 0:
                raise CannotCompact(
                    f"{name}: keeps {side} up to {max(kept[name][side], default='none')}, but this "
                    f"model has {len(numbers)}."
                )
            gone = torch.ones(len(numbers), dtype=torch.bool)
            gone[places] = False
            alive[groups[numbers[gone]]] = False
    _cut(graph, channels, alive[groups])
    return graph


class _Tracer(fx.Tracer):
    """Enters every module but those whose parameters this file knows how to cut, or nobody."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Linear | _ConvNd | _BatchNorm):
            return True
        own = m.__module__.startswith("torch.nn") and "container" not in m.__module__
        return own and any(True for _ in m.parameters())


def _traced(model: nn.Module) -> fx.GraphModule:
    root = copy.deepcopy(model).eval()
    tracer = _Tracer()
    try:
        return fx.GraphModule(root, tracer.trace(root))
    except Exception as error:  # whatever a forward pass does with values that it does not get
        reason = " ".join(str(error).split())
        raise CannotCompact(
            f"{type(model).__name__}: torch.fx cannot trace its forward pass ({reason})."
        ) from error


class _Watched(nn.Module):
    """A traced network whose every value is kept."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph
        self.values: dict[fx.Node, Any] = {}

    def forward(self, x: Tensor) -> Any:
        values = self.values

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                values[n] = super().run_node(n)
                return values[n]

        return Recorder(self.graph).run(x)


def _watch(
    graph: fx.GraphModule, input_shape: Sequence[int], with_paths: bool
) -> dict[fx.Node, Any]:
    """The value of every node; as `bench.liveness` has it, with gradients, or as it is."""
    watched = _Watched(graph)
    first = next(graph.parameters(), torch.empty(0))
    if not with_paths:
        with torch.no_grad():
            watched(torch.ones(1, *input_shape, device=first.device, dtype=first.dtype))
        return watched.values
    with torch.inference_mode(False), torch.enable_grad(), plain_evaluation(watched):
        weights = indicators(watched)
        real = {weights[name]: value.detach() for name, value in watched.named_parameters()}
        image = torch.ones(1, *input_shape, device=first.device, requires_grad=True)
        with torch.backends.cudnn.flags(enabled=False), PathMode(real):
            output = torch.func.functional_call(watched, weights, (image,))
        ends = [end.sum() for end in tree_leaves(output) if is_path(end)]
        for value in tree_leaves(list(watched.values.values())):
            if is_path(value):
                value.retain_grad()
        if ends:
            torch.autograd.backward(ends)
    return watched.values


@dataclass
class _Channels:
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
        numbers = torch.arange(self.count, self.count + count)
        self.count += count
        if pinned:
            self.pin(numbers)
        return numbers

    def unite(self, left: Tensor, right: Tensor) -> None:
        self.pairs.append(torch.unique(torch.stack([left.flatten(), right.flatten()]), dim=1))

    def pin(self, numbers: Tensor) -> None:
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


def _number(graph: fx.GraphModule, values: Mapping[fx.Node, Any]) -> _Channels:
    """Numbers the channels of every value."""
    channels = _Channels()
    for node in graph.graph.nodes:
        numbers = _node(graph, channels, node, values[node])
        assert not isinstance(numbers, Tensor) or numbers.shape == values[node].shape, node
        channels.of[node] = numbers
    return channels


def _node(graph: fx.GraphModule, channels: _Channels, node: fx.Node, value: Any) -> Any:
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


def _opaque(channels: _Channels, value: Any) -> Any:
    return tree_map(lambda x: channels.opaque(x.shape) if isinstance(x, Tensor) else x, value)


def _module(
    channels: _Channels, name: str, module: nn.Module, numbers: Tensor, value: Any
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


def _same(channels: _Channels, node: fx.Node, value: Any, numbers: Any, *_: Any, **__: Any) -> Any:
    others = [x for x in (*_, *__.values()) if isinstance(x, Tensor)]
    return None if others or not isinstance(numbers, Tensor) else numbers.expand(value.shape)


def _joined(channels: _Channels, node: fx.Node, value: Any, left: Any, right: Any, **_: Any) -> Any:
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
    channels: _Channels, node: fx.Node, value: Any, numbers: Tensor, *_: Any, **__: Any
) -> Any:
    """Pooling and resizing: every position of the result has the channels of the input."""
    if not isinstance(value, Tensor) or value.dim() < 3:
        return None
    return _along(channels.vector(numbers, 1), value.shape)


def _pad(
    channels: _Channels,
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
    channels: _Channels, node: fx.Node, value: Any, tensors: Sequence[Tensor], dim: int = 0
) -> Any:
    dim %= value.dim()
    shared = [d for d in range(value.dim()) if d != dim]
    for d in shared:
        if all(x.stride(d) == 0 for x in tensors):
            tensors = [x.narrow(d, 0, 1) for x in tensors]
    return torch.cat(list(tensors), dim).expand(value.shape)


def _structural(channels: _Channels, node: fx.Node, value: Any, *args: Any, **kwargs: Any) -> Any:
    """What moves elements, and does not depend on how many channels there are."""
    return _call(node, args, kwargs)


def _reshaped(
    channels: _Channels, node: fx.Node, value: Any, numbers: Tensor, *size: Any, **__: Any
) -> Any:
    """Only what would be right for fewer channels, too: a flattening, or other dimensions of 1."""
    result = _call(node, (numbers, *size), {})
    literal = tree_leaves(node.args[1:])
    flat = result.dim() == 2 and literal[-1] == -1
    moved = [n for n in numbers.shape if n > 1] == [n for n in result.shape if n > 1]
    fixed = any(isinstance(n, int) and n not in (-1, 1) for n in literal)
    return result if (flat or moved) and not fixed else None


def _reduced(
    channels: _Channels,
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


def _getitem(channels: _Channels, node: fx.Node, value: Any, source: Any, index: Any) -> Any:
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


def _plain(channels: _Channels, node: fx.Node, value: Any, *args: Any, **kwargs: Any) -> Any:
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


def _alive(channels: _Channels, groups: Tensor, values: Mapping[fx.Node, Any]) -> Tensor:
    """(groups,) whether somewhere a value that is not zero is read; a layer keeps at least one."""
    alive = torch.zeros(len(groups), dtype=torch.bool)
    for node, numbers in channels.of.items():
        value = values[node]
        if isinstance(numbers, Tensor) and is_path(value) and value.grad is not None:
            used = ((value != 0) & (value.grad != 0)).cpu()
            alive[groups[torch.unique(numbers[used])]] = True
    if channels.pinned:
        alive[groups[torch.cat(channels.pinned)]] = True
    sides = [side for sides in channels.layers.values() for side in sides]
    known = torch.zeros_like(alive)
    for side in sides:
        known[groups[side]] = True
        if not alive[groups[side]].any():
            alive[groups[side[0]]] = True
    return alive | ~known


def _places(alive: Tensor, groups: Tensor) -> list[int]:
    places: list[int] = alive[groups].nonzero().flatten().tolist()
    return places


def _cut(graph: fx.GraphModule, channels: _Channels, stays: Tensor) -> None:
    """Slices the layers in place.

    Args:
        graph: traced, its own copy of the model.
        channels: its numbers.
        stays: (count,) whether a number stays.
    """
    with torch.no_grad():
        for name, (outputs, inputs) in channels.layers.items():
            _cut_layer(graph.get_submodule(name), stays[outputs], stays[inputs])
        for name, numbers in channels.norms.items():
            norm = graph.get_submodule(name)
            assert isinstance(norm, _BatchNorm)
            for key in ("weight", "bias", "running_mean", "running_var"):
                _slice(norm, key, 0, stays[numbers])
            norm.num_features = int(stays[numbers].sum())
    for number, (node, (old, new, before)) in enumerate(channels.pads.items()):
        source = torch.full((len(new),), -1)
        source[before : before + len(old)] = torch.where(stays[old], stays[old].cumsum(0) - 1, -1)
        _place(graph, node, source[stays[new]], int(stays[old].sum()), f"_source_{number}")
    graph.recompile()


def _place(graph: fx.GraphModule, node: fx.Node, source: Tensor, inputs: int, name: str) -> None:
    """Makes a padding put each channel of what is left at its place.

    Args:
        graph: traced.
        node: the padding.
        source: for each channel of the result that of the input, or -1 for zeros.
        inputs: how many channels the input has.
        name: of a buffer that may be needed.
    """
    pad: Any = node.args[1]
    spatial = pad[:-2]  # amounts come last dimension first
    whole = torch.arange(inputs)
    before = int((source >= 0).int().argmax()) if inputs else 0
    if torch.equal(source[source >= 0], whole) and torch.equal(
        source[before : before + inputs], whole
    ):
        behind = len(source) - inputs - before
        node.args = (node.args[0], (*spatial, before, behind), *node.args[2:])
        return
    graph.register_buffer(name, torch.where(source < 0, inputs, source), persistent=False)
    node.args = (node.args[0], (*spatial, 0, 1), *node.args[2:])  # one channel of zeros, at the end
    with graph.graph.inserting_after(node):
        index = graph.graph.get_attr(name)
    with graph.graph.inserting_after(index):
        placed = graph.graph.call_method("index_select", (node, 1, index))
    node.replace_all_uses_with(placed, delete_user_cb=lambda user: user is not placed)


def _cut_layer(layer: nn.Module, outputs: Tensor, inputs: Tensor) -> None:
    transposed = isinstance(layer, _ConvNd) and layer.transposed
    depthwise = isinstance(layer, _ConvNd) and layer.groups > 1
    _slice(layer, "weight", 1 if transposed else 0, outputs)
    if not depthwise:
        _slice(layer, "weight", 0 if transposed else 1, inputs)
    _slice(layer, "bias", 0, outputs)
    sizes = int(outputs.sum()), int(inputs.sum())
    if isinstance(layer, _ConvNd):
        layer.out_channels, layer.in_channels = sizes
        layer.groups = sizes[1] if depthwise else 1
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = sizes


def _slice(module: nn.Module, name: str, dim: int, stays: Tensor) -> None:
    tensor = getattr(module, name)
    if tensor is None:
        return
    part = tensor.index_select(dim, stays.nonzero().flatten().to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        part = nn.Parameter(part, requires_grad=tensor.requires_grad)
    setattr(module, name, part)


def _check(model: nn.Module, smaller: nn.Module, input_shape: Sequence[int]) -> None:
    """Refuses a network that computes something else, for a reason that nobody thought of."""
    first = next(model.parameters(), torch.empty(0))
    wave = torch.sin(torch.arange(math.prod(input_shape), dtype=torch.float32))
    image = wave.view(1, *input_shape).to(first)
    try:
        with torch.no_grad(), plain_evaluation(model):
            asked, found = model(image), smaller(image)
    except RuntimeError as error:
        raise CannotCompact(
            f"{type(model).__name__}: what is left does not fit together ({error})."
        ) from error
    same = asked.shape == found.shape and torch.allclose(
        asked, found, rtol=0, atol=TOLERANCE * float(asked.abs().max().clamp_min(1e-6))
    )
    if not same:
        raise CannotCompact(
            f"{type(model).__name__}: without its dead channels it would compute something else."
        )
