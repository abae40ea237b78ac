"""Networks that are a chain of linear layers, as what they compute: read off their own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils.parametrize import type_before_parametrizations

FLATTEN = "flatten"

ACTIVATIONS = frozenset({"relu", "tanh", "sigmoid"})
"""What may come after a linear layer."""

FUNCTIONS: dict[Any, str] = {
    functional.relu: "relu",
    torch.relu: "relu",
    functional.tanh: "tanh",
    torch.tanh: "tanh",
    functional.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.flatten: FLATTEN,
}
MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Flatten: FLATTEN,
    nn.Identity: "",
    nn.Dropout: "",
}


class NotAChainError(Exception):
    """Says why, in one line."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A method's own kind of layer must be seen as one, not as what it computes.
        return isinstance(m, nn.Linear) or super().is_leaf_module(m, module_qualified_name)


def layers(model: nn.Module) -> list[str | nn.Linear]:
    """What a network computes, in order: linear layers, and names of `ACTIVATIONS` or `FLATTEN`.

    Raises:
        NotAChainError: it computes something else.
    """
    for name, module in model.named_modules():
        if hooked(module):
            raise NotAChainError(f"{name or 'the network'} has a hook, or a forward of its own")
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise NotAChainError(f"its forward pass cannot be traced ({reason})") from error
    start, *nodes, end = graph.nodes
    found: list[str | nn.Linear] = []
    last = start
    for node in nodes:
        if node.op == "placeholder" or node.all_input_nodes != [last]:
            raise NotAChainError(f"{_name(node)} is not computed from the layer before it alone")
        layer = _layer(model, node)
        if isinstance(layer, nn.Linear) and FLATTEN not in found:
            raise NotAChainError(f"{_name(node)} comes before the images are flattened")
        found.append(layer)
        last = node
    if end.args[0] is not last:
        raise NotAChainError("its output is not that of its last layer")
    return [layer for layer in found if layer]


def _layer(model: nn.Module, node: fx.Node) -> str | nn.Linear:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        kind = type_before_parametrizations(module)
        if kind is nn.Linear:
            assert isinstance(module, nn.Linear)
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
        fits = found in (*ACTIVATIONS, FLATTEN) and (
            options in ([1], [1, -1], [-1, 1]) if found == FLATTEN else not options
        )
        name = _name(node)
    if found is None or not fits:
        raise NotAChainError(
            f"{name} is not stacked: only linear layers are, with "
            f"{', '.join(sorted({*ACTIVATIONS, FLATTEN}))} between them"
        )
    return found


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def hooked(module: nn.Module) -> bool:
    """Whether a module computes more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any((*hooks, module._backward_pre_hooks)) or "forward" in vars(module)
