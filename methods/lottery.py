"""Lottery tickets: iterative magnitude pruning with resetting, and its controls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from methods.allocation import apportion, keep_count
from methods.api import Budget, Phase, Run, option
from methods.masking import (
    ProjectedMethod,
    clear_buffers,
    magnitudes,
    random_scores,
    surviving,
    write_counts,
    write_masks,
)
from methods.ranking import ones
from methods.schedules import spaced

OWN_STREAM = 2**31
"""Controls draw from here on."""

LOOK = 100
"""Steps between looks at the validation loss; at least 20 looks in a training."""


@dataclass(frozen=True)
class LotteryTicket(ProjectedMethod):
    """The lottery ticket hypothesis (Frankle & Carbin, 2019, arXiv:1803.03635), Appendix B.

    In rounds: train, prune the smallest of the surviving weights, reset the others to what they
    were at step k, and train again (strategy 1). Weights, biases, normalisation, optimizer, and
    the position in the data and in the learning rate's schedule are all reset. Each round is a
    result: the harness tests its network, at its end and at the step of least validation loss.

    One run lands on every sparsity asked for: a round that would go beyond one takes a smaller
    rate and lands on it exactly.

    Differs from the paper: landing. Counts are rounded to integers, and all rounds take the same
    data order.

    Attributes:
        strategy: `reset` (strategy 1), `continue` (strategy 2: the weights are reset once, for the
            last training) or `one_shot` (a single round straight to the sparsity; each layer keeps
            as much as rounds would leave it).
        scope: `layer` prunes each layer by its own rate (paper: LeNet, Conv-2/4/6), `global` ranks
            all layers together (paper: ResNet-18, VGG-19).
        rate: fraction of the surviving weights pruned in a round (paper: 0.2).
        conv_rate: of convolutions (paper: 0.1 in Conv-2/4, 0.15 in Conv-6); None: `rate`.
        output_rate: of the output layer; None: half of `rate` (paper).
        rewind: step k as a fraction of the budget (paper: 0).
        also: lower sparsities to land on, such as "0.8 0.9"; the suite fills it in.
    """

    paper: ClassVar[str] = "arXiv:1803.03635"
    strategy: Literal["reset", "continue", "one_shot"] = "reset"
    scope: Literal["layer", "global"] = "layer"
    rate: float = option(0.2, "(0, 1)")
    conv_rate: float | None = option(None, "(0, 1)")
    output_rate: float | None = option(None, "(0, 1)")
    rewind: float = option(0.0, "[0, 1)")
    also: str = ""

    def __post_init__(self) -> None:
        """Checks the ranges, and that the scope uses the options.

        Raises:
            ValueError: names the option.
        """
        super().__post_init__()
        for name in ("conv_rate", "output_rate"):
            if getattr(self, name) is not None and self.scope == "global":
                raise ValueError(f"{name} is for scope = 'layer', not 'global'")

    @property
    def lands_on_all(self) -> bool:
        """Strategy 1 passes through every sparsity; the others end at one."""
        return self.strategy == "reset"

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """The training of the dense network, then one for each round.

        Raises:
            ValueError: `also` is not a list of sparsities below the cell's, or the strategy lands
                on one only; `rewind` leaves no step to train.
        """
        assert density is not None
        if self.also and not self.lands_on_all:
            raise ValueError(f"also = {self.also!r}, but {self.strategy!r} lands on one sparsity")
        k = round(self.rewind * budget.steps)
        window, left = (k / budget.steps, 1.0), budget.steps - k
        if left < 1:
            raise ValueError(f"rewind = {self.rewind} leaves none of {budget.steps} steps to train")
        look = spaced(LOOK, left)
        start = Phase("start", k, (0.0, window[0]), save_as="start")
        phases = [start, Phase("round-0", left, window, measured=True, validate_every=look)]
        resets = self.strategy != "continue"
        levels = self.levels(budget, density)
        for r, counts in enumerate(levels, 1):
            last = r == len(levels)
            phases.append(
                Phase(
                    f"round-{r}",
                    left,
                    window,
                    density=sum(counts.values()) / _total(budget),
                    rewind_to="start" if resets or last else None,
                    measured=resets or last,
                    validate_every=look if resets or last else None,
                )
            )
        return tuple(phases)

    def levels(self, budget: Budget, density: float) -> list[dict[str, int]]:
        """Weights that each layer keeps in round 1, 2, ..."""
        counts = {name: math.prod(shape) for name, shape in _shapes(budget).items()}
        rates = self.rates(budget)
        rounds: list[dict[str, int]] = []
        for target in self.landings(budget, density):
            while (now := sum(counts.values())) > target:
                # The last round before a landing takes what is left, at a rate of its own.
                part = (now - target) / sum(rates[name] * count for name, count in counts.items())
                shares = {n: c * (1 - min(part, 1.0) * rates[n]) for n, c in counts.items()}
                total = min(now - 1, math.floor(sum(shares.values()) + 0.5))
                counts = apportion(shares, max(target, total), counts)
                rounds.append(counts)
        return rounds[-1:] if self.strategy == "one_shot" else rounds

    def landings(self, budget: Budget, density: float) -> list[int]:
        """Numbers of weights to land on, descending."""
        try:
            others = [float(text) for text in self.also.split()]
        except ValueError:
            others = [-1.0]
        if not all(0 <= other < 1 - density for other in others):
            raise ValueError(
                f"also = {self.also!r}; allowed: sparsities in [0, {1 - density:g}), such as '0.5'"
            )
        densities = [*(1 - other for other in sorted(others)), density]
        return [keep_count(_total(budget), kept) for kept in densities]

    def rates(self, budget: Budget) -> dict[str, float]:
        """Fraction of the surviving weights that each layer loses in a round."""
        shapes = _shapes(budget)
        if self.scope == "global":
            return dict.fromkeys(shapes, self.rate)
        convolution = self.rate if self.conv_rate is None else self.conv_rate
        rates = {n: self.rate if len(s) == 2 else convolution for n, s in shapes.items()}
        last = list(shapes)[-1]
        if len(shapes[last]) == 2:  # where the preset leaves the classifier out, it is not the last
            rates[last] = self.rate / 2 if self.output_rate is None else self.output_rate
        return rates

    def start_phase(self, run: Run) -> None:
        """Prunes the smallest of the weights that the round before has trained."""
        if run.phase.density is None:
            return
        state = run.state
        scores = surviving(state, magnitudes(state))
        if self.scope == "global":
            write_masks(state, scores, run.phase.density, "global")
        else:
            assert run.density is not None
            levels = self.levels(run.budget, run.density)
            write_counts(state, scores, levels[int(run.phase.name.removeprefix("round-")) - 1])
        clear_buffers(state, state.masks)


@dataclass(frozen=True)
class TicketControl(ProjectedMethod):
    """A ticket's masks without what made it one (Frankle & Carbin, 2019), Section 4, Appendix E, F.

    Trains the network with the masks of the cell's source, from a change of the initialisation that
    the source had (the same seed), or with its masks shuffled.

    Differs from the paper: nothing that we know of. A source that was reset to step k > 0 is not
    told apart: its controls start at step 0.

    Attributes:
        control: `reinit` draws all parameters anew; `resample` draws each layer's weights, with
            replacement, from those that the ticket keeps of it; `noise` adds Gaussian noise to the
            weights; `shuffle` permutes the mask within each layer.
        draw: which of several draws, from 1 on (paper: 3 for each ticket).
        sigma: of `noise` only, in standard deviations of the layer's initial weights (paper: 0.5,
            1, 2, 3); None: 1.
        fresh: of `shuffle` only: draws all parameters anew too.
    """

    paper: ClassVar[str] = "arXiv:1803.03635"
    control: Literal["reinit", "resample", "noise", "shuffle"] = "reinit"
    draw: int = option(1, "[1, inf)")
    sigma: float | None = option(None, "(0, inf)")
    fresh: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges, and that the control uses the options.

        Raises:
            ValueError: names the option.
        """
        super().__post_init__()
        for name, unset, control in (("sigma", None, "noise"), ("fresh", False, "shuffle")):
            if getattr(self, name) != unset and self.control != control:
                raise ValueError(f"{name} is for control = {control!r}, not {self.control!r}")

    @property
    def needs_source(self) -> bool:
        """The ticket."""
        return True

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One training, tested as a ticket's is."""
        look = spaced(LOOK, budget.steps)
        return (Phase("train", budget.steps, measured=True, validate_every=look),)

    def start_phase(self, run: Run) -> None:
        """Takes the masks, and makes the initial weights."""
        assert run.source is not None
        state, generator = run.state, run.generator
        # Not the source's stream, of the same seed: one that began at random would be drawn again.
        generator.manual_seed(generator.initial_seed() + OWN_STREAM + self.draw)
        for name, mask in run.source.masks.items():
            state.masks[name].copy_(mask)
        if self.control == "reinit" or self.fresh:
            state.model.load_state_dict(run.fresh_weights(self.draw))
        if self.control == "shuffle":
            counts = {name: int(ones(mask)) for name, mask in state.masks.items()}
            write_counts(state, random_scores(run), counts)
        for name, weight in state.weights.items():
            kept = weight[state.masks[name] != 0]
            if self.control == "resample" and len(kept):
                drawn = torch.randint(len(kept), weight.shape, generator=generator)
                weight.copy_(kept[drawn.to(kept.device)])
            elif self.control == "noise":
                noise = torch.randn(weight.shape, generator=generator).to(weight.device)
                weight.add_(noise, alpha=(self.sigma or 1.0) * float(weight.std()))


def _shapes(budget: Budget) -> dict[str, tuple[int, ...]]:
    """Shapes of the prunable weights; without a model, a large layer and a small output layer."""
    return dict(budget.shapes) or {"hidden": (1000, 1000), "output": (10, 1000)}


def _total(budget: Budget) -> int:
    return sum(math.prod(shape) for shape in _shapes(budget).values())
