"""One-shot magnitude pruning with fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.api import Budget, LearningRate, Phase, Run, option
from methods.masking import MaskedMethod, reset_optimizer
from methods.schedules import portion


@dataclass(frozen=True)
class OneShotMagnitude(MaskedMethod):
    """Train, prune the smallest magnitudes once, fine-tune (Han et al., 2015, arXiv:1506.02626).

    The dense run takes the whole budget; fine-tuning comes on top, as in Lin et al. (2020), so the
    budget multiple is 1 + `finetune`.

    Differs from the paper: one prune instead of several, and all layers ranked together as in Lin
    et al.; the paper finds a threshold per layer (`scope = "uniform"` prunes each layer alike). The
    optimizer starts anew for fine-tuning, whose learning rate falls along a cosine. Ranking all
    layers together can empty one; the record then names it as dead.

    Attributes:
        finetune: length of fine-tuning, as a fraction of the budget (Lin et al.: 60 of 300 epochs).
        finetune_lr: where its learning rate starts, as a fraction of the recipe's (Han et al.: 0.1
            on LeNet).
    """

    paper: ClassVar[str] = "arXiv:1506.02626"
    finetune: float = option(0.2, "[0, 10]")
    finetune_lr: float = option(0.1, "(0, 10]")

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """The full dense run, then fine-tuning of what is left."""
        # Rounded down, so that a multiple of 1.2 pays for a fine-tuning of 0.2.
        steps = portion(self.finetune, budget.steps)
        lr = LearningRate(self.finetune_lr)
        return (
            Phase("dense", budget.steps),
            Phase("finetune", steps, lr=lr, density=density),
        )

    def start_phase(self, run: Run) -> None:
        """Prunes before fine-tuning."""
        super().start_phase(run)
        if run.phase.name == "finetune":
            reset_optimizer(run.state)
