"""Fine-tuning after the run, for the methods that papers report with and without it."""

from __future__ import annotations

from dataclasses import dataclass

from methods.api import Budget, LearningRate, Phase, Run, SparsityMethod, option
from methods.masking import reset_optimizer
from methods.schedules import portion

FINETUNE = "finetune"


@dataclass(frozen=True)
class FineTuned(SparsityMethod):
    """Trains on with fixed masks after the full run; the budget multiple is 1 + `finetune`.

    Attributes:
        finetune: length of fine-tuning, as a fraction of the budget (Lin et al., 2020: 60 of 300
            epochs); 0: none.
        finetune_lr: where its learning rate starts, as a fraction of the recipe's, before it falls
            along a cosine (Han et al., 2015: 0.1 on LeNet).
    """

    finetune: float = option(0.0, "[0, 10]")
    finetune_lr: float = option(0.1, "(0, 10]")

    def finetuning(self, budget: Budget, density: float | None = None) -> Phase:
        """The phase at the end of the plan; it may have no step."""
        # Rounded down, so that a multiple of 1.2 pays for a fine-tuning of 0.2.
        steps = portion(self.finetune, budget.steps)
        return Phase(FINETUNE, steps, lr=LearningRate(self.finetune_lr), density=density)

    def start_phase(self, run: Run) -> None:
        """The optimizer starts anew for fine-tuning."""
        super().start_phase(run)
        if run.phase.name == FINETUNE:
            reset_optimizer(run.state)
