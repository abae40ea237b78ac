"""Dynamic model pruning with feedback, of weights and of filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from methods.allocation import Scope
from methods.api import Budget, Cadence, Phase, Run, Shape, TrainState, option
from methods.finetuning import FINETUNE, FineTuned
from methods.masking import fill_zeros, magnitudes, write_masks
from methods.parametrizations import MaskSTE, attach, bake
from methods.schedules import cubic_density, ramp, spaced


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
        every: steps between rankings (paper: p = 16), at most a twentieth of the budget.
        end: fraction of the budget at which the ramp ends; None: the recipe's second decay, else
            0.75.
        decay: the recipe's weight decay acts on all the dense weights (paper), or only on those
            that the masks keep, which AdamW has no way to.
    """

    paper: ClassVar[str] = "arXiv:2006.07253"
    version: ClassVar[int] = 2
    scope: Scope = "global"
    every: int = option(16, "[1, inf)")
    end: float | None = option(None, "(0, 1]")
    decay: Literal["dense", "masked"] = "dense"

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One phase, re-ranked to its end, and fine-tuning of the last masks if asked.

        Raises:
            ValueError: the optimizer's decay cannot be kept off masked weights, as it was asked.
        """
        if self.decay == "masked":
            budget.require_coupled_decay("decay = 'masked'")
        every = spaced(self.every, budget.steps)
        train = Phase("train", budget.steps, updates=Cadence(every))
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

    def gradient_masks(self, run: Run) -> Mapping[str, Tensor] | None:
        """None, as pruned weights are updated too; in fine-tuning nothing reads them again."""
        return run.state.masks if run.phase.name == FINETUNE else None

    def edit_gradients(self, state: TrainState) -> None:
        """Takes off what the optimizer is about to add for pruned weights, where asked."""
        if self.decay == "masked":
            strength = state.optimizer.param_groups[0]["weight_decay"]
            for name, weight in state.weights.items():
                assert weight.grad is not None
                weight.grad.sub_(weight * (1 - state.masks[name]), alpha=strength)

    def finish(self, run: Run) -> None:
        """Ranks a last time, at the target, and writes masked weights into the plain network."""
        assert run.density is not None
        if run.phase.name != FINETUNE:
            self.rank(run, run.density)
        fill_zeros(run.state.weights, run.state.masks)
        bake(run.state.model)
