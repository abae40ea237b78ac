"""Dynamic model pruning with feedback, of whole filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from methods.api import Controls, Run, Shape, TrainState
from methods.dpf import DPF
from methods.filters import (
    companions,
    convolutions,
    evaluation,
    filter_norms,
    rows,
    two_images,
    write_filter_masks,
    zero_companions,
)
from methods.parametrizations import MaskSTE, attach


def essential(model: nn.Module, names: Mapping[str, object], shape: Shape) -> set[str]:
    """Weights of convolutions that keep the image's way to the output open by themselves.

    Layers beside a skip connection may lose all their filters. Of two ways around each other, such
    as a block and the convolution in its shortcut, only one may. Seen by silencing one layer after
    the other, in the model's order, as long as two images still give two outputs.
    """
    needed = set()
    handles = []
    with evaluation(model):
        images = two_images(model, shape)
        for name, module in model.named_modules():
            if f"{name}.weight" in names:
                handle = module.register_forward_hook(
                    lambda _, __, output: torch.zeros_like(output)
                )
                # One at a time: in a batch, rounding may differ from image to image.
                if torch.equal(model(images[:1]), model(images[1:])):
                    needed.add(f"{name}.weight")
                    handle.remove()
                else:
                    handles.append(handle)
    for handle in handles:
        handle.remove()
    return needed


def zero_means(state: TrainState) -> None:
    """Zeroes the running means of normalisation whose shift is masked, where the mask is 0.

    Behind a filter of zeros they stay at 0, so the channel is silent at once in evaluation too.
    """
    for module in state.model.modules():
        if isinstance(module, _BatchNorm) and is_parametrized(module, "bias"):
            mask = module.get_buffer("parametrizations.bias.0.mask")
            if module.running_mean is not None:
                module.running_mean.mul_(mask)


@dataclass(frozen=True)
class DPFFilters(DPF):
    """DPF on filters (Lin et al., 2020, section 4.3): the cell's sparsity is that of the filters.

    Filters are ranked by their L2 norm, by default across all layers. Their bias and the shift of
    the BatchNorm behind them are masked with them, and its running mean is zeroed, so a pruned
    channel is zero in every forward pass. The scale, which then changes nothing but the gradient,
    is zeroed in the finished network only: behind a scale of zero no gradient reaches a filter.

    Differs from the paper: the published tables do not say whether the normalisation is masked.
    Where a ReLU follows at once, torch's derivative of 0 at 0 stops the gradient of a channel of
    zeros, so such a filter returns only as the others shrink below it. The last ranking only
    prunes. A layer through which all paths lead keeps its largest filter, where the counts leave
    it one: `uniform` may not, nor a sparsity that leaves fewer filters than such layers.

    Attributes:
        norm: `l2` (paper), or divided by the square root of the fan-in, so that layers with small
            filters are not pruned first.
        bn_leak: leave the normalisation as it is: a pruned filter then still sends a constant.
    """

    controls: ClassVar[Controls] = "filters"
    scope: Literal["global", "uniform"] = "global"
    norm: Literal["l2", "l2/sqrt(fan_in)"] = "l2"
    bn_leak: bool = False

    @property
    def cuttable(self) -> bool:
        """Not with a leak."""
        return not self.bn_leak

    def prunable(self, model: nn.Module) -> tuple[str, ...]:
        """Convolutions only: a classifier's filters would be its classes."""
        return convolutions(model)

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor], input_shape: Shape
    ) -> dict[str, nn.Parameter]:
        """Masks the weights, and with them the biases and shifts that go with their filters."""
        if not self.bn_leak:
            for name, others in companions(model, masks, input_shape).items():
                for other in others:
                    if other.endswith("bias"):
                        attach(model, other, MaskSTE(rows(masks[name])))
        return super().prepare(model, masks, input_shape)

    def start_phase(self, run: Run) -> None:
        """Finds the layers that may not be emptied."""
        if "essential" not in run.state.slots:
            needed = essential(run.state.model, run.state.masks, run.input_shape)
            flags = {name: run.state.lr.new_tensor(name in needed) for name in run.state.masks}
            run.state.slots["essential"] = flags
        super().start_phase(run)

    def rank(self, run: Run, density: float) -> None:
        """Writes the masks from the norms of the dense filters."""
        state, scores = run.state, {}
        for name, weight in state.weights.items():
            norms = filter_norms(weight)
            if self.norm != "l2":
                norms = norms / weight[0].numel() ** 0.5
            if state.slots["essential"][name]:
                norms[norms.argmax()] = torch.inf
            scores[name] = norms
        write_filter_masks(state, scores, density, self.scope)
        zero_means(state)

    def finish(self, run: Run) -> None:
        """Ranks what is left, and zeroes the scales of pruned channels: they can be cut out."""
        # A filter that returns after the last step would meet normalisation without statistics.
        torch._foreach_mul_(list(run.state.weights.values()), list(run.state.masks.values()))
        super().finish(run)
        if not self.bn_leak:
            found = companions(run.state.model, run.state.masks, run.input_shape)
            zero_companions(run.state, found)
