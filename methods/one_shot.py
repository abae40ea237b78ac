"""One-shot magnitude pruning with fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.allocation import keep_count
from methods.api import Budget, Phase, Run, Scores, option
from methods.finetuning import FineTuned
from methods.masking import MaskedMethod, topk_mask


@dataclass(frozen=True)
class OneShotMagnitude(FineTuned, MaskedMethod):
    """Train, prune the smallest magnitudes once, fine-tune (Han et al., 2015, arXiv:1506.02626).

    The dense run takes the whole budget; fine-tuning comes on top, as in Lin et al. (2020), so the
    budget multiple is 1 + `finetune`.

    Differs from the paper: one prune instead of several, and all layers ranked together as in Lin
    et al.; the paper finds a threshold per layer (`scope = "uniform"` prunes each layer alike). The
    optimizer starts anew for fine-tuning, whose learning rate falls along a cosine. Ranking all
    layers together can empty one; the record then names it as dead.

    Attributes:
        min_keep: so many of each layer's largest weights stay; 1 empties no layer. For the
            `global` scope: the others give each layer its count.
    """

    paper: ClassVar[str] = "arXiv:1506.02626"
    finetune: float = option(0.2, "[0, 10]")
    min_keep: int = option(0, "[0, inf)")

    def __post_init__(self) -> None:
        """Refuses an option that would do nothing."""
        super().__post_init__()
        if self.min_keep and self.scope != "global":
            raise ValueError(f"min_keep = {self.min_keep} needs scope = 'global'")

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """The full dense run, then fine-tuning of what is left.

        Raises:
            ValueError: the layers are to keep more than the density leaves.
        """
        sizes = [math.prod(shape) for _, shape in budget.shapes]
        least = sum(min(self.min_keep, size) for size in sizes)
        if density and least > (kept := keep_count(sum(sizes), density)):
            raise ValueError(f"min_keep = {self.min_keep} is {least} weights, but {kept} are left")
        return (Phase("dense", budget.steps), self.finetuning(budget, density))

    def scores(self, run: Run) -> Scores:
        """Magnitudes; without end where a weight is to stay."""
        found = super().scores(run)
        for score in found.values() if self.min_keep else ():
            score[topk_mask(score, min(self.min_keep, score.numel())) != 0] = torch.inf
        return found
