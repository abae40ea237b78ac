"""Exact ranking: the largest scores of a layer, or of all layers together.

On a CPU, numpy's partition selects: it is vectorised, and many times faster than torch.sort and
torch.kthvalue (`bench/PERFORMANCE.md`). Elsewhere a radix selection does, in a few passes over the
scores, of which none waits for the device; torch.kthvalue would give a whole row to a single block
of threads there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RADIX = 11
"""Bits of a digit: the counts of 2048 digits fit into the fast memory of a block of threads."""

EXACT = 2**24
"""Up to here float32 holds every integer."""


class NoOrderError(ArithmeticError):
    """Scores that are not numbers: the run has left the finite numbers."""


def topk_mask(scores: Tensor, keep: int | Tensor) -> Tensor:
    """Mask of exactly `keep` ones at the largest scores; equal scores go to the lower index.

    Args:
        scores: any shape.
        keep: from 0 to the number of scores; a () tensor does where the host should not wait.

    Returns:
        Mask of the scores' shape and dtype.

    Raises:
        NoOrderError: see `write_top`.
    """
    mask = torch.empty_like(scores, memory_format=torch.contiguous_format, requires_grad=False)
    write_top([mask], [scores], keep)
    return mask


def write_top(masks: Sequence[Tensor], scores: Sequence[Tensor], keep: int | Tensor) -> None:
    """Writes masks with exactly `keep` ones at the largest scores of all tensors together.

    Equal scores go to the earlier tensor, and in it to the lower index.

    Args:
        masks: written in place; any dtype.
        scores: of the same shapes; one dtype for all.
        keep: as in `topk_mask`.

    Raises:
        NoOrderError: among the largest scores is a NaN, so no order exists. Only the CPU says
            so; elsewhere looking would wait for the device, and the next loss is not finite.
    """
    flat = _joined(scores)
    if not on_host(flat):
        kept = flat > (threshold := radix_select(flat, keep))
        ties = flat == threshold
        kept |= ties & (ties.cumsum(0) <= keep - kept.sum())
        _scatter(masks, kept)
    elif (count := int(keep)) in (0, flat.numel()):
        for mask in masks:
            mask.fill_(count > 0)
    else:
        threshold, tied = _partition(flat, count)
        if tied:
            flat = _joined(scores)
            kept = flat >= threshold
            surplus = int(kept.count_nonzero()) - count
            kept[(flat == threshold).nonzero()[-surplus:]] = False
            _scatter(masks, kept)
        else:  # straight into the masks, four times quicker than by way of booleans
            for mask, score in zip(masks, scores, strict=True):
                torch.ge(score.detach(), threshold, out=mask)


def kth_largest(flat: Tensor, k: int) -> Tensor:
    """The k-th largest element of (N,), as a () tensor.

    Raises:
        NoOrderError: a NaN is among the k largest; said on the CPU only.
    """
    if not on_host(flat):
        return radix_select(flat, k)
    return _partition(flat.clone(), k)[0]


def radix_select(flat: Tensor, k: int | Tensor) -> Tensor:
    """The k-th largest element of (N,), as a () tensor, digit by digit from the highest bit.

    Each pass counts the digits of those that agree with what was found before. Nothing waits for
    the device. A NaN ranks above infinity.

    Args:
        flat: of any floating dtype.
        k: from 1 to N, or a () tensor of it; 0 is taken for 1.
    """
    if flat.element_size() < 4:
        return radix_select(flat.float(), k).to(flat.dtype)
    low = 8 * flat.element_size()
    word, sign = (torch.int32 if low == 32 else torch.int64), -(2 ** (low - 1))
    bits = flat.view(word)
    # As unsigned integers these are in the order of the floats: positive ones get the highest bit,
    # negative ones all bits turned.
    keys = bits ^ ((bits >> (low - 1)) | sign)
    found, left = flat.new_zeros((), dtype=word), k
    while low:
        width = min(RADIX, low)
        low -= width
        rest = keys ^ found
        digits = (rest >> low) & (2**width - 1)
        if low + width < 8 * flat.element_size():
            digits.masked_fill_((rest >> (low + width)) != 0, -1)  # not counted
        at_least = _counts(digits, 2**width).flip(0).cumsum(0)  # of the digits down to each
        above = at_least < left
        left = left - (at_least * above).amax()
        # The digit's place from the top is the number of digits that are too high.
        digit = (2**width - 1 - above.sum()).clamp_(min=0)
        found = found | (digit << low).to(word)
    selected: Tensor = found ^ ((~found >> (8 * flat.element_size() - 1)) | sign)
    return selected.view(flat.dtype)


def ones(mask: Tensor) -> Tensor:
    """() number of ones in a mask of zeros and ones; a sum is much quicker than a count."""
    return mask.sum(dtype=None if mask.numel() <= EXACT else torch.float64)


def on_host(tensor: Tensor) -> bool:
    """Whether the host may look at values without a wait: some ways are quicker for it."""
    return tensor.device.type == "cpu"


def _joined(scores: Sequence[Tensor]) -> Tensor:
    """(N,) copy of all scores."""
    return torch.cat([score.detach().reshape(-1) for score in scores])


def _scatter(masks: Sequence[Tensor], flat: Tensor) -> None:
    parts = torch.split(flat, [mask.numel() for mask in masks])
    for mask, part in zip(masks, parts, strict=True):
        mask.copy_(part.view(mask.shape))


def _partition(flat: Tensor, k: int) -> tuple[Tensor, bool]:
    """The k-th largest, and whether one that is not among the k is equal to it.

    Args:
        flat: (N,) on the CPU; its order is lost.
        k: from 1 to N.
    """
    values = (flat if flat.element_size() >= 4 else flat.float()).numpy()
    # Many equal values slow the partition down; what may not be kept is left out before.
    if values.min() == -np.inf:
        chances = values != -np.inf
        if k < np.count_nonzero(chances) < len(values) * 0.75:
            values = values[np.flatnonzero(chances)]
    cut = len(values) - k
    values.partition(cut)
    if np.isnan(values[cut:].max()):
        raise NoOrderError("a score is not a number, so the weights have no order")
    tied = cut > 0 and bool(values[:cut].max() == values[cut])
    return torch.as_tensor(values[cut]).to(flat.dtype), tied


def _counts(digits: Tensor, size: int) -> Tensor:
    """(size,) how often each number from 0 on occurs; others are left out."""
    # On CUDA, histc counts integers without a look at them from the host; elsewhere it has only
    # floats.
    return torch.histc(digits if digits.is_cuda else digits.double(), size, 0, size)
