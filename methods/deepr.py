"""Deep rewiring: sampling of networks with a fixed number of connections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from methods import ranking
from methods.allocation import Scope
from methods.api import Budget, OptimizerSettings, Phase, Run, SparsityMethod, TrainState, option
from methods.masking import GROWN, MaskedMethod, clear_buffers, random_scores, write_masks


@dataclass(frozen=True)
class Langevin(SparsityMethod):
    """Stochastic gradient Langevin dynamics of the prunable weights, in both deep rewirings.

    Attributes:
        l1: alpha, on the scale of the loss (published code: 1e-5).
        matched: eta of the weights is lr / (1 - momentum), with which a gradient of plain SGD moves
            them as far as with the recipe's momentum; else it is lr.
    """

    l1: float = option(1e-5, "[0, inf)")
    matched: bool = True

    def optimizer(
        self,
        weights: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        lr: Tensor,
        settings: OptimizerSettings,
    ) -> Optimizer:
        """The recipe's, but the weights know neither weight decay nor SGD's momentum."""
        own: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
        own["gain"] = 1 / (1 - settings.momentum) if self.matched else 1.0
        own["peak"] = own["gain"] * float(lr)
        groups = {"params": list(weights.values()), **own}, {"params": list(others.values())}
        return settings.build(groups, lr)

    def drift(self, state: TrainState, theta: Tensor, push: Tensor, noise: float) -> Tensor:
        """Noise and L1 of one step: eta (noise nu - alpha push); brings the gradient to eta too."""
        gain = state.optimizer.param_groups[0]["gain"]
        assert theta.grad is not None
        theta.grad.mul_(gain)
        heat = torch.randn_like(theta).mul_(noise).sub_(self.l1 * push)
        return heat.mul_(state.lr * gain)


def dsr_noise(progress: Tensor) -> Tensor:
    """() sqrt(2 * 0.01 T): T falls at epochs 25, 80 and 140 of 200, and noise ends at 190."""
    heat = torch.full_like(progress, 1e-5)
    for epoch, temperature in ((25, 1e-8), (80, 1e-12), (140, 1e-15), (190, 0.0)):
        heat.masked_fill_(progress >= epoch / 200, temperature)
    return (2 * 0.01 * heat).sqrt()


def first_of(order: Tensor, candidates: Tensor, late: Tensor | None, count: Tensor) -> Tensor:
    """Boolean, true at the `count` candidates that come first; does not wait for the device.

    Args:
        order: a permutation of the positions, (N,).
        candidates: boolean, (N,).
        late: boolean, (N,), disjoint from the candidates: their turn is after all of those. None:
            there are none.
        count: () integer, at most the number of both together.
    """
    chosen = candidates.index_select(0, order)
    rank = chosen.cumsum(0, dtype=torch.int32)
    if late is not None:
        last = late.index_select(0, order)
        rank = torch.where(last, rank[-1] + last.cumsum(0, dtype=torch.int32), rank)
        chosen |= last
    chosen &= rank <= count
    return torch.empty_like(chosen).scatter_(0, order, chosen)


def drawn(taken: Tensor, free: int, count: int) -> Tensor:
    """Different positions that are not taken, each set of them as likely; waits for the device.

    Args:
        taken: 0 at the positions to choose from, (N,).
        free: how many these are.
        count: how many to choose, at most as many.

    Returns:
        Integers, (count,), in no order.
    """
    taken, found = taken.clone(), [torch.empty(0, dtype=torch.int64, device=taken.device)]
    while count:
        tries = count * taken.numel() // free + 1
        tried = torch.randint(taken.numel(), (tries,), device=taken.device)
        hit = tried[taken[tried] == 0].unique()  # type: ignore[no-untyped-call]
        hit = hit[torch.randperm(hit.numel(), device=taken.device)[:count]]
        found.append(hit)
        taken[hit] = 1
        free, count = free - hit.numel(), count - hit.numel()
    return torch.cat(found)


def _flat(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    flat = [tensors[name].reshape(-1) for name in names]
    return torch.cat(flat) if len(flat) > 1 else flat[0]


@dataclass(frozen=True)
class DeepR(Langevin, MaskedMethod):
    """Deep rewiring (Bellec et al., 2018, arXiv:1711.05136), Algorithm 1.

    A connection is theta with a fixed sign: w = sign * theta where it is active, else 0. Every step
    adds -eta alpha + sqrt(2 eta T) nu to the active theta beside -eta times the gradient. Those
    that fall to 0 close, and as many dormant ones, the just closed among them, open at random.

    Differs from the paper: signs are those of the initial weights, which are as random. The paper
    trains everything by plain SGD; here that is for the weights, see `matched`, and all else keeps
    the recipe's optimizer. With an Adam recipe the weights' gradient step is Adam's, and its memory
    of what closes is cleared. T falls with the rate as in the published code, T = eta noise^2 / 2,
    so that sqrt(2 eta T) = eta noise. `scope` sets each layer's number; the paper lists them.

    Attributes:
        scope: how the connections are spread over the layers.
        noise: deviation of the noise per unit of eta (published code: 1e-5).
        pooled: the number of connections is held over all layers together, not in each: the layer
            in which one opens is drawn in proportion to the layers' numbers at the start. The
            training's multiply-adds are counted with those numbers.
        variant: `dsr` is what Mostafa & Wang (2019, arXiv:1902.05967) compare with: L1 and noise
            enter the gradient and so the recipe's own step, momentum and all, `noise` plays no
            part, but sqrt(0.02 T) with a T that falls in stages; noise and rewiring end at 95 % of
            the run; a connection closes when w changes its sign, stays closed in that step while
            others can open, and opens at 0 with the first sign that it moves to. Unlike there,
            momentum is cleared.
    """

    paper: ClassVar[str] = "arXiv:1711.05136"
    scope: Scope = "erk"
    noise: float = option(1e-5, "[0, inf)")
    pooled: bool = False
    variant: Literal["paper", "dsr"] = "paper"

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One phase that begins with random masks."""
        return (Phase("train", budget.steps, density=density),)

    def optimizer(
        self,
        weights: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        lr: Tensor,
        settings: OptimizerSettings,
    ) -> Optimizer:
        """L1 takes the place of weight decay."""
        if self.variant == "paper":
            return super().optimizer(weights, others, lr, settings)
        undecayed = {"params": list(weights.values()), "weight_decay": 0.0}
        return settings.build((undecayed, {"params": list(others.values())}), lr)

    def start_phase(self, run: Run) -> None:
        """Draws the masks and fixes the signs."""
        state = run.state
        assert run.phase.density is not None
        write_masks(state, random_scores(run), run.phase.density, self.scope)
        weights = state.weights.items()
        state.slots["sign"] = {name: torch.ones_like(w).copysign_(w) for name, w in weights}
        masks = state.masks.items()
        state.slots["share"] = {name: ranking.ones(mask).long() for name, mask in masks}

    def edit_gradients(self, state: TrainState) -> None:
        """Gradient, L1 and noise for active connections, nothing for dormant ones."""
        for name, weight in state.weights.items():
            mask, sign = state.masks[name], state.slots["sign"][name]
            assert weight.grad is not None
            if self.variant == "dsr":
                heat = torch.randn_like(weight).mul_(dsr_noise(state.progress))
                weight.grad.add_(heat).add_(sign, alpha=self.l1)
            else:
                weight.add_(self.drift(state, weight, sign, self.noise).mul_(mask))
            weight.grad.mul_(mask)

    def project(self, state: TrainState) -> None:
        """Closes connections, and opens as many."""
        dsr = self.variant == "dsr"
        signs, kept = state.slots["sign"], {}
        for name, mask in state.masks.items():
            stays = (state.weights[name] * signs[name]).detach()
            stays = stays.ge_(0).masked_fill_(state.progress >= 0.95, 1) if dsr else stays.gt_(0)
            kept[name] = stays.mul_(mask)
        clear_buffers(state, kept)
        for names in [list(kept)] if self.pooled else [[name] for name in kept]:
            opened = self.opened(state, names, kept)
            sizes = [kept[name].numel() for name in names]
            for name, part in zip(names, torch.split(opened, sizes), strict=True):
                grown = part.view(kept[name].shape)
                torch.add(kept[name], grown, out=state.masks[name])
                weight = state.weights[name].mul_(kept[name])
                if dsr:
                    signs[name].copy_(weight.sign())  # 0: not known yet
                weight.add_(grown * signs[name], alpha=GROWN)

    def opened(self, state: TrainState, names: list[str], kept: Mapping[str, Tensor]) -> Tensor:
        """1 where a connection of these layers opens, as many as have closed; (N,)."""
        dsr = self.variant == "dsr"
        stays = _flat(kept, names)
        taken = _flat(state.masks, names) if dsr else stays
        number = torch.stack([state.slots["share"][name] for name in names]).sum()
        count = number - ranking.ones(stays).long()
        if ranking.on_host(stays) and not self.pooled:
            # Few close in a step, and an order of all positions takes longer than the rest of it.
            free = taken.numel() - int(number if dsr else number - count)
            if count <= free:
                return torch.zeros_like(stays).index_fill_(0, drawn(taken, free, int(count)), 1)
        late = taken != stays if dsr else None
        order = self.order(state, names, kept)
        return first_of(order, taken == 0, late, count).to(stays.dtype)

    def order(self, state: TrainState, names: list[str], kept: Mapping[str, Tensor]) -> Tensor:
        """Positions of these layers' weights in the order in which they would open."""
        size, device = sum(kept[name].numel() for name in names), state.lr.device
        if not self.pooled:
            return torch.randperm(size, device=device)
        # Exponential waiting times: a layer's rate is its share, divided by its dormant ones.
        shares = state.slots["share"]
        scale = {n: ((on == 0).sum() / shares[n]).expand(on.shape) for n, on in kept.items()}
        return (torch.empty(size, device=device).exponential_() * _flat(scale, names)).argsort()
