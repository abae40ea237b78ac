"""Dynamic model pruning with feedback, of weights and of filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from methods.allocation import Scope
from methods.api import Budget, Cadence, Controls, Phase, Run, Shape, option
from methods.filters import (
    companions,
    convolutions,
    essential,
    filter_norms,
    rows,
    write_filter_masks,
    zero_companions,
    zero_means,
)
from methods.finetuning import FINETUNE, FineTuned
from methods.masking import fill_zeros, magnitudes, write_masks
from methods.parametrizations import MaskSTE, attach, bake
from methods.schedules import cubic_density, ramp


@dataclass(frozen=True)
class DPF(FineTuned):
    """Dynamic model pruning with feedback (Lin et al., 2020, arXiv:2006.07253), Algorithm 1.

    The network computes with masked weights, and the gradient found there updates all the dense
    weights (Eq. 2), so a pruned weight can return with the value that it has had since. Masks are
    ranked anew every `every` steps to the end of training; their sparsity follows the cubic
    schedule, one level an epoch, and reaches the target at the second learning-rate decay.

    Differs from the paper: levels change at least 20 times, also where the ramp has fewer epochs.
    The masks of the finished network are ranked once more, after the last step of the full run.

    Attributes:
        scope: ranks all layers together (paper), or each by its own count.
        every: steps between rankings (paper: p = 16).
        end: fraction of the budget at which the ramp ends; None: the recipe's second decay, else
            0.75.
    """

    paper: ClassVar[str] = "arXiv:2006.07253"
    scope: Scope = "global"
    every: int = option(16, "[1, inf)")
    end: float | None = option(None, "(0, 1]")

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One phase, re-ranked to its end, and fine-tuning of the last masks if asked."""
        train = Phase("train", budget.steps, updates=Cadence(self.every))
        return (train, self.finetuning(budget)) if self.finetune else (train,)

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor], input_shape: Shape
    ) -> dict[str, nn.Parameter]:
        """Masks the weights in the forward pass."""
        return {name: attach(model, name, MaskSTE(mask)) for name, mask in masks.items()}

    def rank(self, run: Run, density: float) -> None:
        """Writes the masks from the dense weights."""
        write_masks(run.state, magnitudes(run.state), density, self.scope)

    def start_phase(self, run: Run) -> None:
        """Fine-tuning begins with the last masks; what they prune is not looked at again."""
        super().start_phase(run)
        if run.phase.name == FINETUNE:
            assert run.density is not None
            self.rank(run, run.density)

    def update(self, run: Run) -> None:
        """Ranks at the schedule's level."""
        budget, target = run.budget, run.density
        assert target is not None
        end = budget.second_drop() if self.end is None else round(self.end * budget.steps)
        levels = ramp(0, max(1, end), budget.steps_per_epoch)
        assert levels.stop is not None
        level = run.step // levels.every * levels.every
        self.rank(run, cubic_density(level, 0, levels.stop - 1, target))

    def finish(self, run: Run) -> None:
        """Ranks a last time, at the target, and writes masked weights into the plain network."""
        assert run.density is not None
        if run.phase.name != FINETUNE:
            self.rank(run, run.density)
        fill_zeros(run.state)
        bake(run.state.model)


@dataclass(frozen=True)
class DPFFilters(DPF):
    """DPF on filters (Lin et al., 2020, section 4.3): the cell's sparsity is that of the filters.

    Filters are ranked by their L2 norm, by default across all layers. Their bias and the shift of
    the BatchNorm behind them are masked with them, and its running mean is zeroed, so a pruned
    channel is zero in every forward pass. The scale, which then changes nothing but the gradient,
    is zeroed in the finished network only: behind a scale of zero no gradient reaches a filter.

    Differs from the paper: the published tables do not say whether the normalisation is masked.
    Where a ReLU follows at once, torch's derivative of 0 at 0 stops the gradient of a channel of
    zeros, so such a filter returns only as the others shrink below it. The last ranking only
    prunes. A layer through which all paths lead keeps its largest filter.

    Attributes:
        norm: `l2` (paper), or divided by the square root of the fan-in, so that layers with small
            filters are not pruned first.
        bn_leak: leave the normalisation as it is: a pruned filter then still sends a constant.
    """

    controls: ClassVar[Controls] = "filters"
    scope: Literal["global", "uniform"] = "global"
    norm: Literal["l2", "l2/sqrt(fan_in)"] = "l2"
    bn_leak: bool = False

    def prunable(self, model: nn.Module) -> tuple[str, ...]:
        """Convolutions only: a classifier's filters would be its classes."""
        return convolutions(model)

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor], input_shape: Shape
    ) -> dict[str, nn.Parameter]:
        """Masks the weights, and with them the biases and shifts that go with their filters."""
        if not self.bn_leak:
            for name, others in companions(model, masks, input_shape).items():
                for other in others:
                    if other.endswith("bias"):
                        attach(model, other, MaskSTE(rows(masks[name])))
        return super().prepare(model, masks, input_shape)

    def start_phase(self, run: Run) -> None:
        """Finds the layers that may not be emptied."""
        if "essential" not in run.state.slots:
            needed = essential(run.state.model, run.state.masks, run.input_shape)
            flags = {name: run.state.lr.new_tensor(name in needed) for name in run.state.masks}
            run.state.slots["essential"] = flags
        super().start_phase(run)

    def rank(self, run: Run, density: float) -> None:
        """Writes the masks from the norms of the dense filters."""
        state, scores = run.state, {}
        for name, weight in state.weights.items():
            norms = filter_norms(weight)
            if self.norm != "l2":
                norms = norms / weight[0].numel() ** 0.5
            if state.slots["essential"][name]:
                norms[norms.argmax()] = torch.inf
            scores[name] = norms
        write_filter_masks(state, scores, density, self.scope)
        zero_means(state)

    def finish(self, run: Run) -> None:
        """Ranks what is left, and zeroes the scales of pruned channels: they can be cut out."""
        # A filter that returns after the last step would meet normalisation without statistics.
        torch._foreach_mul_(list(run.state.weights.values()), list(run.state.masks.values()))
        super().finish(run)
        if not self.bn_leak:
            found = companions(run.state.model, run.state.masks, run.input_shape)
            zero_companions(run.state, found)
