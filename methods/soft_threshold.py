"""Soft threshold weight reparameterization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from methods.api import OptimizerSettings, Run, Scores, Shape, option
from methods.parametrizations import attach
from methods.penalised import PenaltyMethod


class SoftThreshold(nn.Module):
    """sign(w) relu(|w| - sigmoid(s)), with one s for the whole weight.

    Args:
        weight: gives dtype and device.
        start: s at the start.
    """

    def __init__(self, weight: Tensor, start: float) -> None:
        super().__init__()
        self.threshold_logit = nn.Parameter(weight.new_full((), start))

    def above(self, weight: Tensor) -> Tensor:
        """How far |w| lies above the threshold, negative below it."""
        return weight.abs() - self.threshold_logit.sigmoid()

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the network computes with."""
        return weight.sign() * self.above(weight).relu()


@dataclass(frozen=True)
class STR(PenaltyMethod):
    """Soft threshold reparameterization (Kusupati et al., 2020, arXiv:2002.03231).

    Each layer computes with S(w, s) = sign(w) relu(|w| - g(s)), g the sigmoid, and s learns with w.
    It starts so far below 0 that g(s) is exactly 0 and has no gradient; weight decay alone brings
    it up, by about exp(-decay sum(eta) / (1 - momentum)) over steps of SGD at rates eta. From -10
    or so on the gradient has a say. Sparsity follows from `s_init` and `decay`.

    Differs from the paper: `target`. Otherwise only in what the recipe says; budgets shorter than
    the paper's 100 epochs of ImageNet need a larger `decay`, or `s_init` nearer to 0.

    Attributes:
        s_init: s at the start, in every layer (paper: -3200 for ResNet-50).
        decay: weight decay of s alone (an option of the published code); None: the recipe's, as in
            the paper, where it is what is varied (2.25e-5 for ResNet-50 with 90 % sparsity).
    """

    paper: ClassVar[str] = "arXiv:2002.03231"
    s_init: float = option(-3200.0, "(-inf, 0]")
    decay: float | None = option(None, "[0, inf)")

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor], input_shape: Shape
    ) -> dict[str, nn.Parameter]:
        """Gives each weight a threshold."""
        plain = {name: model.get_parameter(name).detach() for name in masks}
        return {
            name: attach(model, name, SoftThreshold(weight, self.s_init))
            for name, weight in plain.items()
        }

    def optimizer(
        self,
        weights: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        lr: Tensor,
        settings: OptimizerSettings,
    ) -> Optimizer:
        """The recipe's, the thresholds with a weight decay of their own if there is one."""
        if self.decay is None:
            return super().optimizer(weights, others, lr, settings)
        thresholds = [p for name, p in others.items() if name.endswith(".threshold_logit")]
        rest = [p for name, p in others.items() if not name.endswith(".threshold_logit")]
        groups: list[dict[str, Any]] = [{"params": [*weights.values(), *rest]}]
        return settings.build([*groups, {"params": thresholds, "weight_decay": self.decay}], lr)

    def importance(self, run: Run) -> Scores:
        """How far |w| lies above its layer's threshold."""
        found = {}
        for name, weight in run.state.weights.items():
            path, dot, tensor = name.rpartition(".")
            soft = run.state.model.get_submodule(f"{path}{dot}parametrizations.{tensor}.0")
            assert isinstance(soft, SoftThreshold)
            found[name] = soft.above(weight)
        return found
