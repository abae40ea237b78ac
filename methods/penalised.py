"""Base of the methods whose sparsity follows from a penalty, not from a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from methods.api import Controls, OptimizerSettings, Run, Scores, SparsityMethod, option
from methods.masking import fill_zeros, magnitudes, write_masks
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
        """What the last ranking goes by, before the network is made plain: the highest are kept.

        Default: the magnitude of what the optimizer sees.
        """
        return magnitudes(run.state)

    def make_plain(self, model: nn.Module) -> None:
        """Leaves a plain module with the weights that are tested."""
        model.eval()
        bake(model)

    def finish(self, run: Run) -> None:
        """Makes the network plain; keeps exactly the target's weights if there is one."""
        state, density = run.state, self.final_density(run.density)
        if density is not None:
            write_masks(state, self.importance(run), density, "global")
        self.make_plain(state.model)
        for name, mask in state.masks.items():
            weight = state.model.get_parameter(name)
            if density is not None:
                weight.mul_(mask)
                fill_zeros({name: weight}, {name: mask})
            else:
                mask.copy_(weight != 0)
