"""Masks from scores, and the base of the methods that hold pruned weights at zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from methods.allocation import Scope, allocate, keep_count
from methods.api import Budget, Phase, Run, Scores, SparsityMethod, TrainState
from methods.ranking import NoOrderError as NoOrderError
from methods.ranking import kth_largest as kth_largest
from methods.ranking import ones, write_top
from methods.ranking import topk_mask as topk_mask

GROWN = 1e-12
"""Least value of a weight that is kept: zero to the arithmetic, a non-zero to the counter.

A weight grows at this value, and may never get a gradient: a unit beside it can be dead.
At exactly 0 the finished network would have fewer non-zeros than its masks. Bellec et al.'s code
grows at 1e-12 too.
"""


def write_masks(state: TrainState, scores: Scores, density: float, scope: Scope) -> None:
    """Writes masks with exactly `keep_count(total, density)` ones, at the highest scores.

    Args:
        state: its masks are written in place.
        scores: one tensor per mask; -inf is never kept while anything else is left.
        density: of all the masked weights together, in (0, 1].
        scope: ranks all layers together, or each by its own count.
    """
    if scope == "global":
        masks = list(state.masks.values())
        keep = keep_count(sum(mask.numel() for mask in masks), density)
        write_top(masks, [scores[name] for name in state.masks], keep)
    else:
        shapes = {name: tuple(mask.shape) for name, mask in state.masks.items()}
        write_counts(state, scores, allocate(shapes, density, scope))


def write_counts(state: TrainState, scores: Scores, counts: Mapping[str, int]) -> None:
    """Writes masks that keep, in each layer, `counts[name]` weights of the highest scores."""
    for name, keep in counts.items():
        write_top([state.masks[name]], [scores[name]], keep)


def surviving(state: TrainState, scores: Scores) -> Scores:
    """The scores, -inf where the weight is pruned: it is not to be kept again."""
    return {name: inside(score, state.masks[name]) for name, score in scores.items()}


def inside(scores: Tensor, where: Tensor) -> Tensor:
    """Finite scores where `where` is 1, -inf where it is 0."""
    # (x - 1) / x is 0 and -inf; on a CPU five times quicker than to fill by booleans.
    where = where.to(scores.dtype)
    return (where - 1).div_(where).add_(scores.detach())


def magnitudes(state: TrainState) -> Scores:
    """|w| of every prunable weight."""
    sizes = torch._foreach_abs([weight.detach() for weight in state.weights.values()])
    return dict(zip(state.weights, sizes, strict=True))


def random_scores(run: Run) -> Scores:
    """Uniform scores from the method's own stream; double precision keeps ties out."""
    return {
        name: torch.rand(mask.shape, generator=run.generator, dtype=torch.float64).to(mask.device)
        for name, mask in run.state.masks.items()
    }


def reset_optimizer(state: TrainState) -> None:
    """Makes the optimizer forget everything, as at the start of a run."""
    if type(state.optimizer) in (SGD, Adam, AdamW):
        for buffers in state.optimizer.state.values():
            for value in buffers.values():
                if isinstance(value, Tensor):
                    value.zero_()
        return
    # The memory of others need not start at 0; some count their steps in the groups.
    state.optimizer.state.clear()
    for group in state.optimizer.param_groups:
        group.pop("step", None)


def fill_zeros(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Gives weights that are kept, but happen to be exactly 0, the least value that counts.

    Some initialisations draw an exact 0 now and then, or start a layer at 0.

    Args:
        weights: written in place.
        masks: for each of some weights, 1 where it is kept.
    """
    for name, mask in masks.items():
        weights[name].masked_fill_((weights[name] == 0) & (mask != 0), GROWN)


def clear_buffers(state: TrainState, where: Scores) -> None:
    """Zeroes the optimizer's memory of single weights.

    Momentum left on a pruned weight would move it when it grows again, and decays into denormal
    numbers, which are slow.

    Args:
        state: its optimizer state is written in place.
        where: 1 where the memory is kept, 0 where it is cleared, per weight.
    """
    for name, keep in where.items():
        weight = state.weights[name]
        for value in state.optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.mul_(keep)


@dataclass(frozen=True)
class ProjectedMethod(SparsityMethod):
    """Weights outside the mask are zero after every step.

    The gradient stays dense (hard projection); for optimizers that work element by element, the
    weights inside the mask train exactly as if the gradient were masked too.
    """

    def finish(self, run: Run) -> None:
        """Leaves as many non-zeros as the masks have ones."""
        fill_zeros(run.state.weights, run.state.masks)

    def project(self, state: TrainState) -> None:
        """Holds pruned weights at zero."""
        torch._foreach_mul_(list(state.weights.values()), list(state.masks.values()))


@dataclass(frozen=True)
class MaskedMethod(ProjectedMethod):
    """Prunes by scores, to a density and for good.

    Attributes:
        scope: `global` ranks all layers together; `uniform`, `er` and `erk` fix each layer's count.
    """

    scope: Scope = "global"

    def scores(self, run: Run) -> Scores:
        """What decides: the highest are kept."""
        return magnitudes(run.state)

    def prune(self, run: Run, density: float) -> None:
        """Prunes to `density`; a weight that is pruned stays so."""
        state = run.state
        write_masks(state, surviving(state, self.scores(run)), density, self.scope)
        clear_buffers(state, state.masks)

    def start_phase(self, run: Run) -> None:
        """Prunes to the phase's density, if it names one."""
        if run.phase.density is not None:
            self.prune(run, run.phase.density)


@dataclass(frozen=True)
class PruneAtInit(MaskedMethod):
    """Prunes once, before the first step; the masks then stay.

    Attributes:
        layers_of_source: each layer keeps as many weights as it has in the cell's source; `scope`
            then plays no part (the shuffling control of Frankle et al., 2021, arXiv:2009.08576).
    """

    layers_of_source: bool = False

    @property
    def needs_source(self) -> bool:
        """Whether layer counts are copied."""
        return self.layers_of_source

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One phase that begins by pruning."""
        return (Phase("train", budget.steps, density=density),)

    def prune(self, run: Run, density: float) -> None:
        """Prunes to `density`, or to the source's count of each layer."""
        if not self.layers_of_source:
            return super().prune(run, density)
        assert run.source is not None
        counts = {name: int(ones(mask)) for name, mask in run.source.masks.items()}
        return write_counts(run.state, self.scores(run), counts)
