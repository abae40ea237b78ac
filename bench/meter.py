"""What a training would cost in multiply-adds if every zero were skipped, phase by phase.

The accounting of Evci et al., 2020 (arXiv:1911.11134, appendix on floating-point operations), in
multiply-adds: a step costs each image a pass forward, a pass backward to the activations, and one
to the weights. The first two go through the weights that the forward pass uses, the third computes
the gradients that the method uses. Normalisation, biases, the optimizer and the ranking of weights
are left out, and so is the harness's own looking. Emulated with dense tensors, as here, no method
gets this saving in wall-clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bench.record import LayerCount
from methods.api import Run, SparsityMethod, TrainState
from methods.ranking import ones


class Meter:
    """Sums the training of one run. Everything stays on the device until a phase has ended.

    Args:
        method: says which weights its passes use.
        state: of the run; its masks say which layers are prunable.
        layers: of the plain dense network, from `bench.counting`; without them nothing is summed.
        batch: images of a training step.

    Attributes:
        total: () float64, multiply-adds of the phase so far, up to step `counted` of the run.
        rate: () float64, those of one step with the present masks.
    """

    def __init__(
        self, method: SparsityMethod, state: TrainState, layers: Sequence[LayerCount], batch: int
    ) -> None:
        self.method, self.batch = method, batch
        # How often an image uses each weight of a layer.
        self.uses = {
            line.name: line.dense_macs / line.weights
            for line in layers
            if line.name in state.masks and line.weights
        }
        self.dense = float(sum(line.dense_macs for line in layers))
        self.rest = float(sum(line.dense_macs for line in layers if line.name not in state.masks))
        self.total = torch.zeros((), dtype=torch.float64, device=state.lr.device)
        self.rate = torch.zeros_like(self.total)
        self.counted = 0

    def settle(self, step: int) -> None:
        """Adds the steps of the run up to `step`, before the masks change."""
        self.total += (step - self.counted) * self.rate
        self.counted = step

    def refresh(self, run: Run) -> None:
        """Takes the cost of a step anew, after the masks have changed."""
        used = self.method.forward_masks(run)
        updated = self.method.gradient_masks(run)
        forward = self._macs(used)
        gradient = forward if updated is used else self._macs(updated)
        self.rate.copy_(self.batch * (2 * forward + gradient))

    def add_scoring(self, run: Run, images: int) -> None:
        """Adds a pass outside of training: forward, and backward to every weight's gradient."""
        passes = 2 * self._macs(self.method.forward_masks(run))
        self.total += images * (passes + self.dense)

    def end_phase(self, step: int) -> float:
        """What the phase cost up to `step`, its last; waits for the device."""
        self.settle(step)
        spent = float(self.total)
        self.total.zero_()
        return spent

    def _macs(self, masks: Mapping[str, Tensor] | None) -> Tensor:
        """() multiply-adds of one image through the weights that masks keep; None: through all."""
        if masks is None:
            return torch.full_like(self.total, self.dense)
        kept = [uses * ones(masks[name]).double() for name, uses in self.uses.items()]
        return sum(kept, torch.full_like(self.total, self.rest))
