"""How masks change: what every update did, and when each weight's mask changed last."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.clock import wait_for
from bench.record import MaskUpdate
from methods.api import Phase, TrainState
from methods.ranking import ones

POINTS = 200
"""A record keeps at most so many updates."""

BINS = 50
"""The training is cut into so many parts, for the last change of each weight's mask."""


class Dynamics:
    """Watches the updates of one run (Lin et al., 2020, figures 4 and 7).

    Args:
        plan: its phases.
        state: whose masks are watched.

    Attributes:
        last_change: step of the last change of each weight's mask, counted from 1; 0: none.
        seconds: that the last look took.
    """

    def __init__(self, plan: Sequence[Phase], state: TrainState) -> None:
        planned = sum(phase.updates.count(phase.steps) for phase in plan if phase.updates)
        self.every = max(1, -(-planned // POINTS))
        self.seconds = 0.0
        self.last_change: dict[str, Tensor] = {}
        if planned:
            self.last_change = {
                name: torch.zeros_like(mask, dtype=torch.int32)
                for name, mask in state.masks.items()
            }

    @contextmanager
    def watch(
        self, state: TrainState, step: int, index: int, points: list[MaskUpdate]
    ) -> Iterator[None]:
        """Compares the masks before and after what happens inside.

        Args:
            state: read only.
            step: optimizer steps done.
            index: number of the update; every `every`-th is kept.
            points: takes what is kept.
        """
        kept = index % self.every == 0
        device = state.lr.device
        if kept:  # the figures wait for the device: not for steps of before, which are training
            wait_for(device)
        started = time.perf_counter()
        masks = {name: mask.clone() for name, mask in state.masks.items()}
        weights = {n: w.detach().clone() for n, w in state.weights.items()} if kept else {}
        before = time.perf_counter()
        yield
        if kept:
            wait_for(device)
        after = time.perf_counter()
        for name, mask in state.masks.items():
            # Steps only rise. To multiply is six times quicker here than to fill by booleans.
            last = self.last_change[name]
            changed = torch.ne(mask, masks[name], out=torch.empty_like(last))
            torch.maximum(last, changed.mul_(step + 1), out=last)
        if kept:
            found = compared(masks, state.masks, weights, step)
            if found is not None:
                points.append(found)
        self.seconds = before - started + time.perf_counter() - after

    def histogram(self, steps: int) -> tuple[int, ...]:
        """Weights whose mask changed last in each part of a training of `steps` steps."""
        if not self.last_change:
            return ()
        when = torch.cat([change.reshape(-1) for change in self.last_change.values()])
        when = when[when > 0] - 1
        part = (when.long() * BINS // max(1, steps)).clamp_(max=BINS - 1)
        return tuple(torch.bincount(part, minlength=BINS).tolist())


def compared(
    before: dict[str, Tensor], after: dict[str, Tensor], weights: dict[str, Tensor], step: int
) -> MaskUpdate | None:
    """Figures of one update; None where weights are no numbers any more, as the loss will tell.

    Args:
        before: masks, by name.
        after: masks, by name.
        weights: dense weights before the update.
        step: optimizer steps done.
    """
    rows = []
    for name, old in before.items():
        new, energy = after[name], weights[name].double().square_()
        sums = ones(old), ones(new), ones(old * new), energy.sum(), energy.mul_(1 - new).sum()
        rows.append(torch.stack([part.double() for part in sums]))
    size = sum(mask.numel() for mask in before.values())
    kept_before, kept, both, total, lost = torch.stack(rows).sum(0).tolist()
    if not math.isfinite(total):
        return None
    return MaskUpdate(
        step,
        _rounded(kept / size),
        _rounded((kept_before + kept - 2 * both) / size),
        _rounded(both / max(1.0, kept_before + kept - both)),
        _rounded(lost / total if total else 0.0),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
