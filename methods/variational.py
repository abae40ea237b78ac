"""Sparse variational dropout: weights whose noise drowns them are dropped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from methods.api import OptimizerSettings, Run, Scores, Shape, TrainState, option
from methods.filters import uncalled
from methods.parametrizations import require_untied
from methods.penalised import PenaltyMethod, decay_others

EPSILON = 1e-8
"""Keeps the logarithm and the square root away from 0."""


def noise_ratio(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    """The logarithm of alpha = sigma^2 / w^2, per weight."""
    return log_sigma2 - torch.log(weight.square() + EPSILON)


def divergence(log_alpha: Tensor) -> Tensor:
    """KL divergence from the log-uniform prior, per weight (Eq. 14); 0 at infinite noise."""
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return k1 * torch.sigmoid(-k2 - k3 * log_alpha) + functional.softplus(-log_alpha) / 2


def layer(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear or convolutional module computes, with another weight and bias."""
    if isinstance(module, _ConvNd):
        own = module.weight.stride()
        if weight.dim() == 4 and own[1] == 1 and weight.stride() != own:
            # Of one input channel, what is computed from channels last is no longer so.
            weight = weight.to(memory_format=torch.channels_last)
        return module._conv_forward(x, weight, bias)
    return functional.linear(x, weight, bias)


def is_plain(module: Any) -> bool:
    """Whether a module computes what its kind does; subclasses may treat their weight first."""
    if getattr(module, "transposed", False):
        return False
    if isinstance(module, _ConvNd):
        extents = zip(module.kernel_size, module.dilation, strict=True)
        size = [module.in_channels, *(4 * kernel * dilation for kernel, dilation in extents)]
    else:
        size = [module.in_features]
    x = torch.linspace(0.25, 1, math.prod(size)).view(1, *size).to(module.weight)
    with torch.no_grad():
        return torch.allclose(module(x), layer(module, x, module.weight, module.bias))


def normal_like(x: Tensor) -> Tensor:
    """Standard normal numbers, drawn as they lie in memory: ten times quicker for channels last."""
    noise = torch.empty_like(x)
    noise.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).normal_()
    return noise


def noisy_forward(module: Any, x: Tensor) -> Tensor:
    """In training, draws the layer's outputs (Eqs. 17 and 18); else drops what noise drowns."""
    weight = mean_weight = module.weight
    log_alpha = noise_ratio(weight, module.log_sigma2).clamp(-8, 8)
    if module.train_clip or not module.training:
        mean_weight = weight * (log_alpha < module.threshold)
    mean = layer(module, x, mean_weight, module.bias)
    if not module.training:
        return mean
    variance = layer(module, x.square(), log_alpha.exp() * weight.square(), None)
    return mean + torch.sqrt(variance + EPSILON) * normal_like(mean)


@dataclass(frozen=True)
class VariationalDropout(PenaltyMethod):
    """Sparse variational dropout (Molchanov et al., 2017, arXiv:1701.05369), Sections 4.1 to 4.3.

    Each weight has a Gaussian of mean w and variance sigma^2, learned as log sigma^2; the layer's
    outputs are drawn, not the weights. The loss is the mean data term plus the divergence from
    the log-uniform prior over the N training images. Weights with log alpha = log(sigma^2 / w^2)
    at or above `threshold` are dropped, also in looks at the validation loss during training.

    Differs from the paper: log alpha is clipped to [-8, 8], and 1e-8 stands beside w^2 in the
    logarithm and beside the variance in the square root, as in the published code, where the first
    is missing in places. The ramp of the divergence scales with the budget. Optimizer, learning
    rate and initial weights are the recipe's (paper: Adam at 1e-3, for VGG from a trained network);
    its weight decay stays for parameters without noise (paper: none).

    Attributes:
        kl: factor on the divergence (paper: 1).
        delay: fraction of the run before the divergence counts (published code: 5 of 200 epochs).
        warmup: fraction of the run over which it then rises (published code: 15 of 200 epochs).
        log_sigma2_init: at first (published code: -10).
        threshold: log alpha at which a weight is dropped (paper: 3).
        train_clip: means of weights at or above the threshold are left out in training too, but not
            their noise (published code, for its LeNets).
    """

    paper: ClassVar[str] = "arXiv:1701.05369"
    kl: float = option(1.0, "[0, inf)")
    delay: float = option(0.025, "[0, 1]")
    warmup: float = option(0.075, "(0, 1]")
    log_sigma2_init: float = option(-10.0, "[-30, 0]")
    threshold: float = option(3.0, "[0, 8]")
    train_clip: bool = False

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor], input_shape: Shape
    ) -> dict[str, nn.Parameter]:
        """Gives the modules noise: their class becomes a subclass, until `make_plain`.

        Raises:
            TypeError: a module does something else with its weight than its kind does, or another
                module uses the same weight.
        """
        modules = dict(modules_of(model, masks))
        for name in modules:
            require_untied(model, name)
        layers = [name.rpartition(".")[0] for name in modules]
        for name in uncalled(model, layers, input_shape):
            raise TypeError(f"{name}: the model uses its weight without calling the layer")
        for name, module in modules.items():
            kind = type(module)
            if not is_plain(module):
                raise TypeError(f"{name}: no noise is known for the forward pass of {kind}")
            module.register_parameter("log_sigma2", nn.Parameter(torch.zeros_like(masks[name])))
            changes = {"forward": noisy_forward, "threshold": self.threshold}
            changes["train_clip"] = self.train_clip
            module.__class__ = type(f"Noisy{kind.__name__}", (kind,), changes)
        return super().prepare(model, masks, input_shape)

    def optimizer(
        self,
        weights: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        lr: Tensor,
        settings: OptimizerSettings,
    ) -> Optimizer:
        """No weight decay: the prior takes its place."""
        return decay_others(weights, others, "log_sigma2", lr, settings)

    def start_phase(self, run: Run) -> None:
        """Sets the first noise, and the divergence's coefficient."""
        state = run.state
        for _, module in modules_of(state.model, state.masks):
            module.log_sigma2.fill_(self.log_sigma2_init)
        state.slots["number"] = {"price": state.lr.new_tensor(self.kl / run.budget.examples)}

    def penalty(self, state: TrainState) -> Tensor:
        """Divergence of all weights, ramped up."""
        ramp = ((state.progress - self.delay) / self.warmup).clamp(0, 1)
        terms = [
            divergence(noise_ratio(module.weight, module.log_sigma2).clamp(-8, 8)).sum()
            for _, module in modules_of(state.model, state.masks)
        ]
        return ramp * state.slots["number"]["price"] * torch.stack(terms).sum()

    def importance(self, run: Run) -> Scores:
        """Little noise; not clipped, so that there are no ties."""
        return {
            name: -noise_ratio(module.weight, module.log_sigma2)
            for name, module in modules_of(run.state.model, run.state.masks)
        }

    def make_plain(self, model: nn.Module) -> None:
        """Drops what noise drowns; the modules get their own class back."""
        for module in model.modules():
            if "log_sigma2" in module._parameters:
                layer: Any = module
                dropped = noise_ratio(layer.weight, layer.log_sigma2) >= self.threshold
                layer.weight.masked_fill_(dropped, 0)
                del layer.log_sigma2
                layer.__class__ = type(layer).__bases__[0]
        model.eval()


def modules_of(model: nn.Module, names: Mapping[str, object]) -> Iterator[tuple[str, Any]]:
    """The module of each prunable weight."""
    for name in names:
        yield name, model.get_submodule(name.rpartition(".")[0])
