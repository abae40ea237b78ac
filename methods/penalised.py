"""Base of the methods whose sparsity follows from a penalty, not from a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from methods.allocation import keep_count
from methods.api import Controls, OptimizerSettings, Run, Scores, SparsityMethod, option
from methods.masking import GROWN, topk_mask
from methods.parametrizations import bake


def decay_others(
    weights: Mapping[str, nn.Parameter],
    others: Mapping[str, nn.Parameter],
    ending: str,
    lr: Tensor,
    settings: OptimizerSettings,
) -> Optimizer:
    """The recipe's optimizer, its weight decay for the second of two groups only.

    Args:
        weights: and `others`, `lr`, `settings`: as `SparsityMethod.optimizer` has them.
        others: see there.
        ending: of the names of those `others` that are in the first group, with the weights.
        lr: see there.
        settings: see there.
    """
    own = [p for name, p in others.items() if name.endswith(ending)]
    rest = [p for name, p in others.items() if not name.endswith(ending)]
    first: dict[str, Any] = {"params": [*weights.values(), *own], "weight_decay": 0.0}
    return settings.build([first, {"params": rest}], lr)


@dataclass(frozen=True)
class PenaltyMethod(SparsityMethod):
    """A penalty drives weights to zero; how many follows from its coefficient.

    Attributes:
        target: sparsity to land on exactly, by a last ranking of all layers together by the
            method's own importance after training; None leaves what the penalty left. A target
            below what the penalty reached keeps weights that are zero but for `GROWN`; the record
            counts them as idle.
    """

    controls: ClassVar[Controls] = "penalty"
    target: float | None = option(None, "[0, 1)")

    def final_density(self, density: float | None) -> float | None:
        """The target's."""
        return None if self.target is None else 1 - self.target

    def importance(self, run: Run) -> Scores:
        """What the last ranking goes by, before the network is made plain: the highest are kept."""
        raise NotImplementedError

    def make_plain(self, model: nn.Module) -> None:
        """Leaves a plain module with the weights that are tested."""
        model.eval()
        bake(model)

    def finish(self, run: Run) -> None:
        """Makes the network plain; keeps exactly the target's weights if there is one."""
        model, names = run.state.model, list(run.state.masks)
        scores = self.importance(run) if self.target is not None else {}
        self.make_plain(model)
        weights = [model.get_parameter(name).detach() for name in names]
        masks = run.state.masks
        if scores:
            flat = torch.cat([scores[name].reshape(-1) for name in names])
            density = self.final_density(run.density)
            assert density is not None
            kept = topk_mask(flat, keep_count(flat.numel(), density))
            for name, part in zip(
                names, torch.split(kept, [w.numel() for w in weights]), strict=True
            ):
                masks[name].copy_(part.view(masks[name].shape))
        for name, weight in zip(names, weights, strict=True):
            if scores:
                weight.mul_(masks[name])
                weight.masked_fill_((weight == 0) & (masks[name] != 0), GROWN)
            else:
                masks[name].copy_(weight != 0)
