"""Crops, flips and turns of whole batches of images, as tensor operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from bench.errors import DataError

MIRRORED_BYTES = 2**30
"""Images whose mirrored copies would take more are mirrored batch by batch, and a batch then takes
three times as long. CIFAR-10's copies take 0.24 GB, and several processes may each hold them."""


class Crops:
    """Every crop of some images, and of the same mirrored: a batch of any of them is one gather.

    Args:
        padded: uint8 (N, H + 2 margin, W + 2 margin, C), contiguous. It is not copied: what is
            written there later is what is seen.
        margin: pixels of border on each side.
        mirrored: whether the latter half of `padded` is the former half mirrored; otherwise crops
            are mirrored when they are read.
    """

    def __init__(self, padded: Tensor, margin: int, *, mirrored: bool = False) -> None:
        count, height, width, channels = padded.shape
        self.margin, self.mirrored = margin, mirrored
        self.count = count // 2 if mirrored else count
        self.shape = height - 2 * margin, width - 2 * margin, channels
        if not margin:
            self._image, self._row = 1, 0
            self._runs = padded.flatten(1)
            return
        # A run is a row of a crop, and may begin at any pixel; so they overlap.
        rows, columns, _ = self.shape
        self._image, self._row = height * width, width
        self._runs = padded.as_strided(
            (count * height * width - columns + 1, columns * channels), (channels, 1)
        )
        self._rows = torch.arange(0, rows * width, width, device=padded.device)

    def starts(self, numbers: Tensor, rows: Tensor, columns: Tensor, mirrored: Tensor) -> Tensor:
        """Where crops begin, for `read`.

        Args:
            numbers: (N,) int64 of the images.
            rows: (N,) int64 in [0, 2 margin] of the crop's corner.
            columns: (N,) likewise.
            mirrored: (N,) bool, whether the crop is mirrored afterwards; without effect where there
                are no mirrored copies.

        Returns:
            (N,) int64.
        """
        if self.mirrored:
            numbers = numbers + self.count * mirrored
            columns = torch.where(mirrored, 2 * self.margin - columns, columns)
        return numbers * self._image + rows * self._row + columns

    def read(self, starts: Tensor) -> Tensor:
        """uint8 (B, H, W, C) crops that begin at `starts` (B,)."""
        if self.margin:
            starts = (starts[:, None] + self._rows).view(-1)
        return self._runs.index_select(0, starts).view(-1, *self.shape)


def resident_crops(images: Tensor, margin: int, padding: str, *, flip: bool) -> Crops:
    """Crops of images that stay as they are; mirrored copies are made if they are small enough.

    Args:
        images: uint8 (N, H, W, C); not copied where nothing is cropped or flipped.
        margin: pixels of border on each side.
        padding: `zero` or `reflect`.
        flip: whether mirrored crops are wanted.
    """
    count, height, width, channels = images.shape
    size = count, height + 2 * margin, width + 2 * margin, channels
    flip = flip and math.prod(size) <= MIRRORED_BYTES
    if not (margin or flip):
        return Crops(images.contiguous(), 0)
    padded = images.new_zeros((2 if flip else 1, *size))
    fill_padded(padded[0], images, margin, padding)
    if flip:
        padded[1] = padded[0].flip(2)
    return Crops(padded.flatten(0, 1), margin, mirrored=flip)


def fill_padded(padded: Tensor, images: Tensor, margin: int, padding: str) -> None:
    """Writes images (N, H, W, C) and their borders; zeros of a border are there already.

    Raises:
        DataError: an image cannot be reflected so far.
    """
    _, height, width, _ = images.shape
    if padding == "zero" or not margin:
        padded[:, margin : margin + height, margin : margin + width] = images
        return
    if margin >= min(height, width):
        raise DataError(
            f"Images of {height}x{width} pixels have no reflected border of {margin}; allowed: "
            f"crop = {min(height, width) - 1} at most, or padding = 'zero'."
        )
    rows = _reflected(height, margin, images.device)
    padded.copy_(images[:, rows[:, None], _reflected(width, margin, images.device)])


def _reflected(size: int, margin: int, device: torch.device) -> Tensor:
    """(size + 2 margin,) which pixels stand in a line and, reflected at its ends, in its border."""
    last = size - 1
    return last - (last - torch.arange(-margin, size + margin, device=device).abs()).abs()


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """Images turned about their centre, bilinear; outside it is as at the nearest border.

    Args:
        images: (B, H, W, C).
        degrees: (B,) counter-clockwise.

    Returns:
        float32 (B, H, W, C), on the same scale.
    """
    _, height, width, _ = images.shape
    angles = degrees * (math.pi / 180)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # Coordinates run from -1 to 1 along both sides, however long they are.
    rows = [cos, -sin * (height / width), zero], [sin * (width / height), cos, zero]
    matrix = torch.stack([torch.stack(row, 1) for row in rows], 1)  # (B, 2, 3)
    channels_first = images.permute(0, 3, 1, 2).to(torch.float32)
    grid = functional.affine_grid(matrix, list(channels_first.shape), align_corners=False)
    turned = functional.grid_sample(
        channels_first, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return turned.permute(0, 2, 3, 1)
