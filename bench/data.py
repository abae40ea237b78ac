"""Images as uint8 tensors on the device; batches, crops, flips and normalisation are made there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.datasets import Arrays, DatasetInfo
from bench.errors import DataError
from bench.recipes import Recipe
from bench.seeds import derive


@dataclass(frozen=True, slots=True)
class Split:
    """Part of a data set: uint8 images (N, H, W, C) and int64 labels (N,), on the device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Data:
    """A data set on the device.

    Attributes:
        info: the table's entry.
        mean: (C,) of the training pixels, in [0, 255]; `std` likewise.
        train: images to train on; `validation` and `test` likewise. `validation` may be empty.
    """

    info: DatasetInfo
    mean: Tensor
    std: Tensor
    train: Split
    validation: Split
    test: Split

    def without_test(self) -> Data:
        """The data as a trainer gets it: no decision can follow from a test image."""
        return dataclasses.replace(self, test=Split(self.train.images[:0], self.train.labels[:0]))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, C) -> float32 (B, C, H, W), mean 0 and variance 1, channels last."""
        return images.to(torch.float32).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)


def to_device(arrays: Arrays, recipe: Recipe, device: torch.device) -> Data:
    """Splits off the validation images and moves everything to the device.

    The split is drawn from the data's own hash: the same for every seed and method.

    Raises:
        DataError: too few images for the recipe's split or batch.
    """
    size = len(arrays.y_train)
    if size - recipe.validation < recipe.batch:
        raise DataError(
            f"{size} training images less {recipe.validation} for validation do not fill one batch "
            f"of {recipe.batch}."
        )
    order = np.random.default_rng(int(arrays.hash, 16)).permutation(size)
    held = np.sort(order[: recipe.validation])
    kept = np.sort(order[recipe.validation :])

    def split(x: np.ndarray, y: np.ndarray) -> Split:
        return Split(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))

    return Data(
        arrays.info,
        255 * torch.tensor(arrays.info.mean, device=device),
        255 * torch.tensor(arrays.info.std, device=device),
        split(arrays.x_train[kept], arrays.y_train[kept]),
        split(arrays.x_train[held], arrays.y_train[held]),
        split(arrays.x_test, arrays.y_test),
    )


class BatchStream:
    """Training batches by position: any batch of any epoch can be had without those before it.

    Args:
        data: its training images are streamed.
        recipe: batch size and augmentation.
        seed: the cell's seed; order and augmentation of an epoch follow from it and the epoch.
        name: of the stream; streams of other names are independent.
        augmented: whether images are cropped and flipped as the recipe says.
    """

    def __init__(
        self,
        data: Data,
        recipe: Recipe,
        seed: int,
        name: str,
        *,
        augmented: bool = True,
    ) -> None:
        self.data = data
        self.labels = data.train.labels
        self.batch_size = recipe.batch
        self.steps_per_epoch = len(data.train) // recipe.batch
        self.flip = augmented and recipe.flip
        self.crop = recipe.crop if augmented else 0
        self.windows = crop_windows(data.train.images, self.crop, recipe.padding)
        self._seed = (seed, name)
        self._epoch = -1

    def batch(self, position: int) -> tuple[Tensor, Tensor]:
        """The batch at a position, counted in steps from the start of training.

        Returns:
            float32 images (B, C, H, W) and int64 labels (B,).
        """
        epoch, step = divmod(position, self.steps_per_epoch)
        if epoch != self._epoch:
            self._draw(epoch)
        part = slice(step * self.batch_size, (step + 1) * self.batch_size)
        index = self.order[part]
        if self.crop:
            images = self.windows[index, self.rows[part], self.columns[part]]
        else:
            images = self.windows.index_select(0, index)
        if self.flip:
            images = torch.where(self.mirrored[part, None, None, None], images.flip(2), images)
        return self.data.normalise(images), self.labels.index_select(0, index)

    def _draw(self, epoch: int) -> None:
        """Draws order and augmentation of a whole epoch, on the CPU so that devices agree."""
        generator = torch.Generator().manual_seed(derive(*self._seed, epoch))
        size, device = len(self.labels), self.labels.device
        self.order = torch.randperm(size, generator=generator).to(device)
        offsets = torch.randint(2 * self.crop + 1, (2, size), generator=generator).to(device)
        self.rows, self.columns = offsets
        self.mirrored = (torch.rand(size, generator=generator) < 0.5).to(device)
        self._epoch = epoch


def crop_windows(images: Tensor, margin: int, padding: str) -> Tensor:
    """Every crop of every image, as a view of the padded images.

    Args:
        images: uint8 (N, H, W, C).
        margin: pixels of padding on each side; 0 returns the images.
        padding: `zero` or `reflect`.

    Returns:
        (N, 2 margin + 1, 2 margin + 1, H, W, C): image, row and column of the crop's corner.
    """
    if not margin:
        return images
    channels_first = images.permute(0, 3, 1, 2)
    mode = "constant" if padding == "zero" else "reflect"
    padded = functional.pad(channels_first, (margin,) * 4, mode=mode)
    padded = padded.permute(0, 2, 3, 1).contiguous()
    count, height, width, channels = images.shape
    sides = 2 * margin + 1
    image, row, column, channel = padded.stride()
    return padded.as_strided(
        (count, sides, sides, height, width, channels), (image, row, column, row, column, channel)
    )
