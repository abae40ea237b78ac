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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from bench.channels import Channels, number
from bench.counting import count_layers, count_totals
from bench.errors import CannotCompact
from bench.liveness import PathMode, indicators, is_path, plain_evaluation
from bench.record import Compact
from methods.functional import call_with

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
    channels = number(graph, values)
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
    channels = number(graph, _watch(graph, input_shape, with_paths=False))
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
            output = call_with(watched, weights, image)
        ends = [end.sum() for end in tree_leaves(output) if is_path(end)]
        for value in tree_leaves(list(watched.values.values())):
            if is_path(value):
                value.retain_grad()
        if ends:
            torch.autograd.backward(ends)
    return watched.values


def _alive(channels: Channels, groups: Tensor, values: Mapping[fx.Node, Any]) -> Tensor:
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


def _cut(graph: fx.GraphModule, channels: Channels, stays: Tensor) -> None:
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
    for index, (node, (old, new, before)) in enumerate(channels.pads.items()):
        source = torch.full((len(new),), -1)
        source[before : before + len(old)] = torch.where(stays[old], stays[old].cumsum(0) - 1, -1)
        _place(graph, node, source[stays[new]], int(stays[old].sum()), f"_source_{index}")
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
    if tensor is None or bool(stays.all()):  # another module may have the same tensor
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
