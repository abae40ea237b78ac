"""Presets of weights that a suite lets the methods prune."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from bench.errors import SuiteError
from methods.api import SparsityMethod


def _every(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _ConvNd)


def _convolutions(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd)


PRESETS: dict[str, Callable[[nn.Module], bool]] = {
    "all": _every,  # every convolution and linear layer (SNIP, sparse momentum)
    "dpf": _convolutions,  # every convolution, the first and the shortcuts too (Lin et al., 2020)
}
"""Name -> whether a module's weight counts. Biases and normalisation never do."""


def prunable_names(model: nn.Module, method: SparsityMethod, preset: str) -> tuple[str, ...]:
    """Weights that both the preset and the method allow, in the model's order.

    Raises:
        SuiteError: there are none.
    """
    chosen = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if PRESETS[preset](module)
    }
    allowed = set(method.prunable(model))
    names = tuple(name for name, _ in model.named_parameters() if name in chosen & allowed)
    if not names:
        raise SuiteError(
            f"prunable = {preset!r} leaves {type(model).__name__} no weight that "
            f"{type(method).__name__} can prune. Presets: {', '.join(PRESETS)}."
        )
    return names
