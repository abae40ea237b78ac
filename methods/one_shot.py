"""One-shot magnitude pruning with fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.api import Budget, Phase, option
from methods.finetuning import FineTuned
from methods.masking import MaskedMethod


@dataclass(frozen=True)
class OneShotMagnitude(FineTuned, MaskedMethod):
    """Train, prune the smallest magnitudes once, fine-tune (Han et al., 2015, arXiv:1506.02626).

    The dense run takes the whole budget; fine-tuning comes on top, as in Lin et al. (2020), so the
    budget multiple is 1 + `finetune`.

    Differs from the paper: one prune instead of several, and all layers ranked together as in Lin
    et al.; the paper finds a threshold per layer (`scope = "uniform"` prunes each layer alike). The
    optimizer starts anew for fine-tuning, whose learning rate falls along a cosine. Ranking all
    layers together can empty one; the record then names it as dead.
    """

    paper: ClassVar[str] = "arXiv:1506.02626"
    finetune: float = option(0.2, "[0, 10]")

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """The full dense run, then fine-tuning of what is left."""
        return (Phase("dense", budget.steps), self.finetuning(budget, density))
