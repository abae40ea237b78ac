"""Pruning without data by iteratively conserving synaptic flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.api import Run, Scores, option
from methods.functional import call_with
from methods.masking import PruneAtInit


@dataclass(frozen=True)
class SynFlow(PruneAtInit):
    """SynFlow (Tanaka et al., 2020, arXiv:2006.05467), Algorithm 1.

    Before the first step, prunes in `rounds`: each scores |w| dR/d|w|, where R sums the outputs of
    the network with absolute weights on an input of ones, and keeps the highest, down to density
    D^(k / rounds) in round k. No data is used. Every parameter and buffer counts by its absolute
    value, normalisation works as in evaluation, and all is computed in double precision: R
    multiplies the layers' sizes. The cost is `rounds` passes forward and backward, of one image of
    ones; they are not metered, for they are no batches.

    Differs from the paper: biases are zero while scoring, since the flow is conserved only without
    them; those of the published networks start at zero.

    Attributes:
        rounds: of scoring and pruning (paper: 100); one only where `layers_of_source` says how many
            weights each layer keeps.
        biases: the absolute values of the biases add to the flow, as in the published code.
    """

    paper: ClassVar[str] = "arXiv:2006.05467"
    rounds: int = option(100, "[1, 10000]")
    biases: bool = False

    def scores(self, run: Run) -> Scores:
        """Synaptic flow through each weight of the masked network."""
        state, model = run.state, run.state.model
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        absolute = {
            # Integers are positions and counters.
            name: tensor.detach().double().abs() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        for name, tensor in absolute.items():
            if name in state.masks:
                tensor.mul_(state.masks[name])
            elif name.endswith("bias") and not self.biases:
                tensor.zero_()
        ones = torch.ones(1, *run.input_shape, dtype=torch.float64, device=state.lr.device)
        with torch.enable_grad():
            weights = [absolute[name].requires_grad_() for name in state.masks]
            flow = call_with(model, absolute, ones).sum()
            found = torch.autograd.grad(flow, weights)
        return {
            name: weight.detach() * gradient
            for name, weight, gradient in zip(state.masks, weights, found, strict=True)
        }

    def prune(self, run: Run, density: float) -> None:
        """Prunes to `density` in rounds."""
        rounds = 1 if self.layers_of_source else self.rounds
        run.state.model.eval()
        for done in range(1, rounds + 1):
            super().prune(run, density ** (done / rounds))
        run.state.model.train()
