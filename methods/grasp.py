"""Gradient signal preservation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from methods.api import Run, Scores, option
from methods.masking import PruneAtInit


def hessian_gradient(
    losses: Sequence[Callable[[], Tensor]], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Hg, the Hessian times the gradient, of the sum of the losses.

    Args:
        losses: each computes a () loss, with its graph; called twice.
        weights: differentiated by; the result has their shapes.
    """
    gradient = [torch.zeros_like(weight) for weight in weights]
    product = [torch.zeros_like(weight) for weight in weights]
    # Fused attention has no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for loss in losses:
            torch._foreach_add_(gradient, torch.autograd.grad(loss(), weights))
        for loss in losses:
            found = torch.autograd.grad(loss(), weights, create_graph=True)
            inner = torch.stack([(g * h).sum() for g, h in zip(gradient, found, strict=True)])
            torch._foreach_add_(product, torch.autograd.grad(inner.sum(), weights))
    return product


@dataclass(frozen=True)
class GraSP(PruneAtInit):
    """GraSP (Wang et al., 2020, arXiv:2002.07376), Algorithm 1.

    Before the first step, removes the weights with the largest S = -w * Hg: those whose removal
    lowers the norm of the gradient least, or raises it. Logits are divided by `temperature`; the
    images are not augmented, and normalisation uses the batch's statistics.

    Differs from the paper: the images are batches of the recipe's size, as training draws them (its
    code takes equally many of each class, in two halves: no option here, for a method does not know
    the classes). Scoring and training share their initial weights (its code scores linear layers
    that are initialised anew).

    Attributes:
        temperature: divisor of the logits (paper: 200).
        batches: training batches that the gradient and the Hessian are summed over (published
            settings: once 10 images of each class); they are metered, twice each.
    """

    paper: ClassVar[str] = "arXiv:2002.07376"
    temperature: float = option(200.0, "(0, inf)")
    batches: int = option(1, "[1, 1000]")

    def loss(self, run: Run, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the flattened outputs, () tensor."""
        return functional.cross_entropy(run.logits(images) / self.temperature, labels)

    def scores(self, run: Run) -> Scores:
        """The negative of S, w * Hg: the highest are kept."""
        weights = run.state.weights
        batches = run.batches(self.batches, augmented=False)
        losses = [partial(self.loss, run, images, labels) for images, labels in batches]
        product = hessian_gradient(losses, list(weights.values()))
        pairs = zip(weights.items(), product, strict=True)
        return {name: weight.detach() * hg for (name, weight), hg in pairs}
