"""Methods to come, as small as the interface allows: they prove that it can express them.

For tests only: no data sheets, no options with ranges, no published defaults. The product's own
versions may differ. Sections are those of the methods' papers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.optim import Optimizer

from methods.allocation import apportion, keep_count
from methods.api import (
    Budget,
    Cadence,
    Controls,
    OptimizerSettings,
    Phase,
    Run,
    Scores,
    Shape,
    SparsityMethod,
    TrainState,
)
from methods.drop_grow import DropGrow
from methods.masking import (
    GROWN,
    MaskedMethod,
    PruneAtInit,
    clear_buffers,
    random_scores,
    topk_mask,
    write_masks,
)
from methods.parametrizations import attach, bake


@dataclass(frozen=True)
class LotterySketch(MaskedMethod):
    """Iterative magnitude pruning, rewound to step k before each round (Frankle & Carbin, 2019)."""

    rewind: float = 0.25
    rounds: int = 3

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        assert density is not None
        k = round(self.rewind * budget.steps)
        rest, window = budget.steps - k, (k / budget.steps, 1.0)
        rounds = tuple(
            Phase(
                f"round-{r}",
                rest,
                window,
                density=density ** (r / self.rounds),
                rewind_to="rewind",
            )
            for r in range(1, self.rounds + 1)
        )
        start = Phase("start", k, (0.0, window[0]), save_as="rewind")
        return (start, Phase("round-0", rest, window), *rounds)


@dataclass(frozen=True)
class GraSPSketch(PruneAtInit):
    """Keeps the weights whose removal would lower the gradient's norm (Wang et al., 2020)."""

    temperature: float = 1.0

    def scores(self, run: Run) -> Scores:
        weights = run.state.weights
        ((images, labels),) = run.batches(1, augmented=False)
        with torch.enable_grad():
            # The paper divides the outputs by a temperature.
            loss = functional.cross_entropy(run.logits(images) / self.temperature, labels)
            found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            product = torch.stack([(g * g.detach()).sum() for g in found]).sum()
        hessian_gradient = torch.autograd.grad(product, list(weights.values()))
        pairs = zip(weights.items(), hessian_gradient, strict=True)
        return {name: weight * hg for (name, weight), hg in pairs}


@dataclass(frozen=True)
class SynFlowSketch(PruneAtInit):
    """Prunes in rounds by the flow of ones through |w| (Tanaka et al., 2020)."""

    rounds: int = 100

    def start_phase(self, run: Run) -> None:
        assert run.density is not None
        ones = torch.ones(1, *run.input_shape, dtype=torch.float64)
        run.state.model.eval()
        for r in range(1, self.rounds + 1):
            scores = self.flow(run, ones)
            for name, mask in run.state.masks.items():
                scores[name].masked_fill_(mask == 0, -torch.inf)
            write_masks(run.state, scores, run.density ** (r / self.rounds), self.scope)
            self.project(run.state)
        run.state.model.train()

    def flow(self, run: Run, ones: Tensor) -> Scores:
        model, names = run.state.model, list(run.state.weights)
        tensors = {k: v.double().abs() for k, v in model.state_dict().items()}
        with torch.enable_grad():
            weights = [tensors[name].requires_grad_() for name in names]
            output = functional_call(model, tensors, (ones,)).sum()
            found = torch.autograd.grad(output, weights)
        return {name: tensors[name].detach() * g for name, g in zip(names, found, strict=True)}


@dataclass(frozen=True)
class SparseMomentumSketch(DropGrow):
    """Momentum decides where weights grow, and how many in each layer (Dettmers, 2019)."""

    scope: Any = "uniform"
    stop: float = 1.0
    drop_fraction: float = 0.5

    def update(self, run: Run) -> None:
        state = run.state
        memory = {
            name: state.optimizer.state[weight]["momentum_buffer"].abs()
            for name, weight in state.weights.items()
        }
        kept = {name: (m != 0) & ~self.dropped(run, name) for name, m in state.masks.items()}
        removed = sum(
            int((m != 0).sum()) - int(kept[name].sum()) for name, m in state.masks.items()
        )
        share = {name: float(memory[name][state.masks[name] != 0].mean()) for name in memory}
        room = {name: int((~kept[name]).sum()) for name in kept}
        wanted = {name: removed * share[name] / sum(share.values()) for name in share}
        for name, count in apportion(wanted, removed, room).items():
            grown = topk_mask(memory[name].masked_fill(kept[name], -1), count) != 0
            new = grown & (state.masks[name] == 0)
            state.masks[name].copy_(kept[name] | grown)
            # The momentum of a grown weight stays: it is what the weight was chosen for.
            state.weights[name].mul_(state.masks[name]).masked_fill_(new, GROWN)


@dataclass(frozen=True)
class DSRSketch(DropGrow):
    """Prunes below one threshold that adapts itself; grows where much is left (Mostafa, 2019)."""

    threshold: float = 1e-3
    target: int = 40

    def start_phase(self, run: Run) -> None:
        super().start_phase(run)
        threshold = torch.full_like(run.state.lr, self.threshold)
        run.state.slots["dsr"] = {"threshold": threshold}

    def update(self, run: Run) -> None:
        state, threshold = run.state, run.state.slots["dsr"]["threshold"]
        kept = {
            name: (mask != 0) & (state.weights[name].abs() >= threshold)
            for name, mask in state.masks.items()
        }
        fallen = {name: (mask != 0) & ~kept[name] for name, mask in state.masks.items()}
        removed = sum(int(where.sum()) for where in fallen.values())
        left = {name: int(where.sum()) for name, where in kept.items()}
        # Removed weights are among the last to return: only where nothing else has room.
        wanted = {
            name: removed * count / max(1, sum(left.values())) for name, count in left.items()
        }
        room = {name: kept[name].numel() - left[name] for name in kept}
        scores = random_scores(run)
        for name, count in apportion(wanted, removed, room).items():
            score = scores[name].sub_(fallen[name].double()).masked_fill(kept[name], -torch.inf)
            grown = topk_mask(score, count) != 0
            state.masks[name].copy_(kept[name] | grown)
            clear_buffers(state, {name: kept[name]})
            state.weights[name].mul_(kept[name]).masked_fill_(grown, GROWN)
        if removed > 1.1 * self.target:
            threshold.div_(2)
        elif removed < 0.9 * self.target:
            threshold.mul_(2)


class LangevinSGD(Optimizer):
    """Gradient, L1 and noise on the rewired weights; plain SGD on the rest."""

    def __init__(self, groups: Any, lr: Tensor, l1: float, noise: float) -> None:
        super().__init__(groups, {"lr": lr, "l1": l1, "noise": noise})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                change = parameter.grad
                if group["rewired"]:
                    noise = torch.randn_like(parameter) * group["noise"]
                    change = change + group["l1"] * parameter.sign() + noise
                parameter.sub_(change * group["lr"])


@dataclass(frozen=True)
class DeepRSketch(MaskedMethod):
    """A connection that crosses zero is replaced by a random one, every step (Bellec, 2018).

    The replacement happens in the hot `project`, without waiting for the device.
    """

    scope: Any = "erk"
    l1: float = 1e-3
    noise: float = 0.05

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        return (Phase("train", budget.steps, density=density),)

    def optimizer(
        self,
        weights: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        lr: Tensor,
        settings: OptimizerSettings,
    ) -> Optimizer:
        groups = [
            {"params": list(weights.values()), "rewired": True},
            {"params": list(others.values()), "rewired": False},
        ]
        return LangevinSGD(groups, lr, self.l1, self.noise)

    def start_phase(self, run: Run) -> None:
        state = run.state
        assert run.density is not None
        write_masks(state, random_scores(run), run.density, self.scope)
        drawn = random_scores(run)
        sign = {name: torch.sign(score - 0.5).float() for name, score in drawn.items()}
        state.slots["sign"] = sign
        state.slots["keep"] = {name: mask.sum() for name, mask in state.masks.items()}
        for name, weight in state.weights.items():
            weight.abs_().mul_(sign[name])

    def project(self, state: TrainState) -> None:
        for name, weight in state.weights.items():
            mask, sign = state.masks[name], state.slots["sign"][name]
            open_ = (mask != 0) & (weight * sign > 0)
            missing = state.slots["keep"][name] - open_.sum()
            draw = torch.rand(open_.numel(), device=mask.device).masked_fill(open_.flatten(), -1)
            rank = draw.argsort(descending=True).argsort()
            grown = (rank < missing).view(open_.shape)
            mask.copy_(open_ | grown)
            weight.copy_(torch.where(grown, GROWN * sign, weight * mask))


class SignedReLU(nn.Module):
    """w = sign * relu(theta), the sign fixed."""

    sign: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("sign", torch.where(weight < 0, -1.0, 1.0))

    def forward(self, theta: Tensor) -> Tensor:
        return self.sign * theta.relu()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.abs()


@dataclass(frozen=True)
class SoftDeepRSketch(SparsityMethod):
    """Dormant connections walk at random until they cross zero again (Bellec, 2018)."""

    controls: ClassVar[Controls] = "penalty"
    l1: float = 5e-2
    noise: float = 0.02
    lowest: float = -0.05

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor], input_shape: Shape
    ) -> dict[str, nn.Parameter]:
        return {
            name: attach(model, name, SignedReLU(model.get_parameter(name).detach()))
            for name in masks
        }

    optimizer = DeepRSketch.optimizer

    def project(self, state: TrainState) -> None:
        for theta in state.weights.values():
            theta.clamp_(min=self.lowest)

    def finish(self, run: Run) -> None:
        bake(run.state.model)


class HardConcrete(nn.Module):
    """w * z, with a gate z in [0, 1] for each weight, drawn anew in every training pass."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        start = torch.empty_like(weight).normal_()  # from the cell's stream of noise
        self.log_alpha = nn.Parameter(start)

    def forward(self, weight: Tensor) -> Tensor:
        gate = self.log_alpha.sigmoid()
        if self.training:
            u = torch.rand_like(weight).clamp(1e-6, 1 - 1e-6)
            gate = ((u.log() - (1 - u).log() + self.log_alpha) * 1.5).sigmoid()
        return weight * (gate * 1.2 - 0.1).clamp(0, 1)

    def expected_open(self) -> Tensor:
        return (self.log_alpha - 2 / 3 * math.log(0.1 / 1.1)).sigmoid().sum()


@dataclass(frozen=True)
class L0Sketch(SparsityMethod):
    """Gates with a price on the expected number that is open (Louizos et al., 2018)."""

    controls: ClassVar[Controls] = "penalty"
    price: float = 1.0

    def gates(self, model: nn.Module) -> Iterator[HardConcrete]:
        return (module for module in model.modules() if isinstance(module, HardConcrete))

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor], input_shape: Shape
    ) -> dict[str, nn.Parameter]:
        found = {}
        for name in masks:
            gate = HardConcrete(model.get_parameter(name).detach())
            found[name] = attach(model, name, gate)
        return found

    def optimizer(
        self,
        weights: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        lr: Tensor,
        settings: OptimizerSettings,
    ) -> Optimizer:
        gates = [p for name, p in others.items() if name.endswith("log_alpha")]
        rest = [p for name, p in others.items() if not name.endswith("log_alpha")]
        groups = [{"params": [*weights.values(), *rest]}, {"params": gates, "weight_decay": 0.0}]
        return settings.build(groups, lr)

    def penalty(self, state: TrainState) -> Tensor:
        return self.price * torch.stack([g.expected_open() for g in self.gates(state.model)]).sum()

    def project(self, state: TrainState) -> None:
        for gate in self.gates(state.model):
            gate.log_alpha.clamp_(math.log(1e-2), math.log(1e2))

    def finish(self, run: Run) -> None:
        run.state.model.eval()
        bake(run.state.model)


@dataclass(frozen=True)
class SFPSketch(SparsityMethod):
    """Zeroes the smallest filters each epoch, and lets them train on (He et al., 2018)."""

    controls: ClassVar[Controls] = "filters"

    def prunable(self, model: nn.Module) -> tuple[str, ...]:
        modules = model.named_modules()
        return tuple(f"{name}.weight" for name, m in modules if isinstance(m, nn.Conv2d))

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        epoch = budget.steps_per_epoch
        return (Phase("train", budget.steps, updates=Cadence(epoch, epoch)),)

    def update(self, run: Run) -> None:
        assert run.density is not None
        for name, mask in run.state.masks.items():
            norms = run.state.weights[name].flatten(1).norm(dim=1)  # (out,)
            rows = topk_mask(norms, keep_count(len(norms), run.density))
            mask.copy_(rows[:, None, None, None].expand_as(mask))
            run.state.weights[name].mul_(mask)

    def finish(self, run: Run) -> None:
        self.update(run)
