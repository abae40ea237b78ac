"""Accuracy of a network on a split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from bench.data import Data, Split

CHUNK = 1000
"""Images per forward pass; fixed, so that a figure does not depend on who asks."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean cross-entropy and accuracy in percent; `top5` only for more than 5 classes."""

    loss: float
    top1: float
    top5: float | None


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, data: Data) -> Evaluation:
    """Evaluates the network as it is, in evaluation mode, on every image of a split.

    Args:
        model: any module from images to (B, classes); left in evaluation mode.
        split: at least one image.
        data: whose normalisation is used.
    """
    model.eval()
    count = len(split)
    loss, top1, top5 = 0.0, 0, 0
    for start in range(0, count, CHUNK):
        labels = split.labels[start : start + CHUNK]
        logits = model(data.normalise(split.images[start : start + CHUNK])).float()
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        top1 += int(best[:, 0].sum())
        top5 += int(best.sum())
    many = data.info.classes > 5
    return Evaluation(loss / count, 100 * top1 / count, 100 * top5 / count if many else None)
