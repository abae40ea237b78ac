"""Presets of weights that a suite lets the methods prune."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from bench.errors import SuiteError
from methods.api import Shape, SparsityMethod
from methods.dense import Dense
from methods.functional import shared


@dataclass(frozen=True, slots=True)
class Network:
    """What a preset may ask about a network.

    Attributes:
        layers: convolutions and linear layers by name, in the model's order.
        normalised: whether it has normalisation with running statistics.
        sparsity: that the cell asks for; None if it cannot.
    """

    layers: dict[str, nn.Module]
    normalised: bool
    sparsity: float | None

    def convolution(self, name: str) -> bool:
        """Whether it is one."""
        return isinstance(self.layers[name], _ConvNd)

    def first(self, name: str) -> bool:
        """Whether it is the layer that sees the image."""
        return name == next(iter(self.layers))

    def last(self, name: str) -> bool:
        """Whether it is the one that answers."""
        return name == next(reversed(self.layers))

    def shortcut(self, name: str) -> bool:
        """Whether it is a 1x1 convolution beside a residual block."""
        layer = self.layers[name]
        return (
            isinstance(layer, _ConvNd)
            and set(layer.kernel_size) == {1}
            and any(part in SHORTCUTS for part in name.split("."))
        )


SHORTCUTS = {"shortcut", "downsample"}
"""Names of the modules beside residual blocks, in our networks and in timm's."""

IMAGENET = 1000
"""Classes."""


def _all(network: Network, name: str) -> bool:
    return True


def _dpf(network: Network, name: str) -> bool:
    return network.convolution(name)


def _lth(network: Network, name: str) -> bool:
    if network.convolution(name):
        return not network.shortcut(name)
    return not network.normalised


def _dsr(network: Network, name: str) -> bool:
    if network.convolution(name):
        return not network.first(name) and not network.shortcut(name)
    layer = network.layers[name]
    return network.last(name) and isinstance(layer, nn.Linear) and layer.out_features >= IMAGENET


def _rigl_uniform(network: Network, name: str) -> bool:
    return not network.first(name)


def _rigl_erk(network: Network, name: str) -> bool:
    return not (network.first(name) and network.sparsity is not None and network.sparsity >= 0.99)


PRESETS: dict[str, Callable[[Network, str], bool]] = {
    # Every convolution and linear layer (SNIP, sparse momentum).
    "all": _all,
    # Every convolution, the first and the shortcuts too (Lin et al., 2020).
    "dpf": _dpf,
    # Every convolution but 1x1 shortcuts; linear layers where nothing is normalised
    # (Frankle & Carbin, 2019).
    "lth": _lth,
    # Convolutions inside residual blocks; the classifier of ImageNet networks only
    # (Mostafa & Wang, 2019).
    "dsr": _dsr,
    # All layers but the first (Evci et al., 2020, uniform).
    "rigl-uniform": _rigl_uniform,
    # All layers; the first is dense from a sparsity of 99 % on (Evci et al., 2020, ERK).
    "rigl-erk": _rigl_erk,
}
"""Name -> whether a layer's weight counts. Biases and normalisation never do."""


def promised(method: SparsityMethod, density: float | None) -> float | None:
    """Density that the finished network must have, to the weight; None where none was promised.

    A method that is given a density cannot take it back; one that a penalty drives may name one.
    """
    if method.controls == "density":
        return density
    return method.final_density(density) if method.controls == "penalty" else None


def prunable_names(
    model: nn.Module, method: SparsityMethod, preset: str, sparsity: float | None = None
) -> tuple[str, ...]:
    """Weights that both the preset and the method allow, in the model's order.

    Args:
        model: plain.
        method: whose `prunable` is asked.
        preset: name in `PRESETS`.
        sparsity: that the cell asks for; None where a penalty decides, or the method's target.

    Raises:
        SuiteError: there are none.
    """
    if sparsity is None and (density := promised(method, None)) is not None:
        sparsity = 1 - density
    layers: dict[str, nn.Module] = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)
    }
    normalised = any(isinstance(module, _NormBase) for module in model.modules())
    network = Network(layers, normalised, sparsity)
    chosen = {
        f"{name}.weight" if name else "weight" for name in layers if PRESETS[preset](network, name)
    }
    allowed = set(method.prunable(model))
    names = tuple(name for name, _ in model.named_parameters() if name in chosen & allowed)
    if not names:
        computed = ", ".join(parametrised(model))
        why = f" Computed by a parametrisation, so no weights: {computed}." if computed else ""
        name = type(method).__name__
        what = "no weight" if isinstance(method, Dense) else f"no weight that {name} can prune"
        raise SuiteError(
            f"prunable = {preset!r} leaves {type(model).__name__} {what}. Presets: "
            f"{', '.join(PRESETS)}.{why}"
        )
    return names


def check_shared(
    model: nn.Module, method: SparsityMethod, names: Sequence[str], shape: Shape
) -> None:
    """Checks that a method can prune weights that several modules use.

    Args:
        model: plain.
        method: whose `prepare` is asked.
        names: prunable weights.
        shape: (channels, height, width) of an image.

    Raises:
        SuiteError: it says that it cannot.
    """
    if not any(name in names for users in shared(model) for name in users):
        return
    masks = {name: torch.ones_like(model.get_parameter(name)) for name in names}
    try:
        method.prepare(copy.deepcopy(model), masks, shape)
    except TypeError as error:
        raise SuiteError(f"{type(model).__name__}: {error}.") from error


def parametrised(model: nn.Module) -> tuple[str, ...]:
    """Layers whose weight is computed, as by weight normalisation: no preset counts them."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd))
    return tuple(n for n, m in layers if not isinstance(m._parameters.get("weight"), nn.Parameter))


def shapes(model: nn.Module, names: Sequence[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of weights, as `Budget` has them."""
    return tuple((name, tuple(model.get_parameter(name).shape)) for name in names)
