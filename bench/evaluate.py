"""Accuracy of a network on a split."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from bench.data import Data, Split
from bench.distributed import ALONE, Group

CHUNK = 1000
"""Images per forward pass; fixed, so that a figure does not depend on who asks."""

CHUNK_NUMBERS = CHUNK * 3 * 64 * 64
"""Numbers per forward pass at most, which larger images reach with fewer than CHUNK."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean cross-entropy and accuracy in percent; `top5` only for more than 5 classes."""

    loss: float
    top1: float
    top5: float | None


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, data: Data, group: Group = ALONE) -> Evaluation:
    """Evaluates the network as it is, in evaluation mode, on every image of a split.

    Args:
        model: any module from images to (B, classes); left in evaluation mode.
        split: at least one image.
        data: whose normalisation is used.
        group: ranks that share the passes; each gets the figures of all, as one process finds them.
    """
    model.eval()
    count, chunk = len(split), chunk_size(data.info.shape)
    passes = -(-count // chunk)
    found = torch.zeros(passes, 3, device=split.labels.device)  # waited for once, at the end
    for number in group.part(passes):
        start = number * chunk
        labels = split.labels[start : start + chunk]
        logits = model(data.normalise(split.images[start : start + chunk])).float()
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        found[number] = torch.stack([loss, best[:, 0].sum().float(), best.sum().float()])
    group.add(found)  # to zeros
    loss, top1, top5 = (sum(column) for column in zip(*found.tolist(), strict=True))
    many = data.info.classes > 5
    return Evaluation(loss / count, 100 * top1 / count, 100 * top5 / count if many else None)


def chunk_size(shape: tuple[int, int, int]) -> int:
    """Images per forward pass, from (channels, height, width) alone."""
    return max(1, min(CHUNK, CHUNK_NUMBERS // math.prod(shape)))
