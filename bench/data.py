"""Images as uint8 tensors on the device; batches, crops, flips and normalisation are made there.

Where the pixels come from is the data's own matter: `Data` has all of them on the device,
`bench.streaming` decodes those that are asked for. Everything else is the same code for both.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bench.datasets import Arrays, DatasetInfo
from bench.errors import DataError
from bench.recipes import Recipe
from bench.seeds import derive


class Images(Protocol):
    """uint8 images (N, H, W, C) of which a slice is a tensor on the device; a tensor is one."""

    def __getitem__(self, part: slice, /) -> Tensor: ...


class Reader(Protocol):
    """Gives the pixels of training batches by position."""

    def read(self, position: int, index: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """uint8 (B, H, W, C) of the images with these numbers, each cropped at its corner."""


@dataclass(frozen=True, slots=True)
class Split:
    """Part of a data set: uint8 images (N, H, W, C) and int64 labels (N,), on the device."""

    images: Images
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Order:
    """Which images make which batch: epochs in a random order each, by position.

    Attributes:
        seed: and name of the stream, from which every epoch's own seed follows.
        size: of the training set.
        batch: images in a batch.
    """

    seed: tuple[int, str]
    size: int
    batch: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches that an epoch fills."""
        return self.size // self.batch

    def generator(self, epoch: int) -> torch.Generator:
        """What an epoch is drawn from, its order first."""
        return torch.Generator().manual_seed(derive(*self.seed, epoch))

    def draw(self, generator: torch.Generator) -> Tensor:
        """(size,) the numbers of the images in an epoch's order, on the CPU."""
        return torch.randperm(self.size, generator=generator)

    def part(self, position: int) -> tuple[int, slice]:
        """Epoch of a batch, and where in its order the batch lies."""
        epoch, step = divmod(position, self.steps_per_epoch)
        return epoch, slice(step * self.batch, (step + 1) * self.batch)


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
        """uint8 (B, H, W, C) -> float32 (B, C, H, W), mean 0 and variance 1, channels last.

        Floats in [0, 255] are written over.
        """
        return images.to(torch.float32).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)

    def reader(self, recipe: Recipe, order: Order, *, augmented: bool) -> Reader:
        """The training pixels for one stream of batches."""
        images, margin = self.train.images, recipe.crop if augmented else 0
        assert isinstance(images, Tensor)
        return _Resident(crop_windows(images, margin, recipe.padding), margin)

    def close(self) -> None:
        """Frees what a cell's end does not free by itself."""


@dataclass(frozen=True, slots=True)
class _Resident:
    """Pixels that all lie on the device, as `crop_windows` sees them."""

    windows: Tensor
    margin: int

    def read(self, position: int, index: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        if self.margin:
            return self.windows[index, rows, columns]
        return self.windows.index_select(0, index)


def to_device(arrays: Arrays, recipe: Recipe, device: torch.device) -> Data:
    """Splits off the validation images and moves everything to the device.

    The split is drawn from the data's own hash: the same for every seed and method.

    Raises:
        DataError: too few images for the recipe's split or batch.
    """
    kept, held = split_indices(arrays.hash, len(arrays.y_train), recipe)

    def split(x: np.ndarray, y: np.ndarray) -> Split:
        return Split(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))

    return Data(
        arrays.info,
        *normalisation(arrays.info, recipe, device),
        split(arrays.x_train[kept], arrays.y_train[kept]),
        split(arrays.x_train[held], arrays.y_train[held]),
        split(arrays.x_test, arrays.y_test),
    )


def split_indices(
    content: str, size: int, recipe: Recipe
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the images to train on, and of those held out for validation; ascending.

    Args:
        content: the data's hash, which alone decides.
        size: of the training set.
        recipe: says how many are held out.

    Raises:
        DataError: too few images for the recipe's split or batch.
    """
    if size - recipe.validation < recipe.batch:
        raise DataError(
            f"{size} training images less {recipe.validation} for validation do not fill one batch "
            f"of {recipe.batch}."
        )
    order = np.random.default_rng(int(content, 16)).permutation(size)
    return np.sort(order[recipe.validation :]), np.sort(order[: recipe.validation])


def normalisation(info: DatasetInfo, recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    """(C,) what is taken from pixels in [0, 255], and what they are divided by."""
    channels = info.shape[0]
    mean = info.mean if recipe.normalise else (0.0,) * channels
    std = info.std if recipe.normalise else (1.0,) * channels
    return 255 * torch.tensor(mean, device=device), 255 * torch.tensor(std, device=device)


class BatchStream:
    """Training batches by position: any batch of any epoch can be had without those before it.

    Args:
        data: its training images are streamed.
        recipe: batch size and augmentation.
        seed: the cell's seed; order and augmentation of an epoch follow from it and the epoch.
        name: of the stream; streams of other names are independent.
        augmented: whether images are cropped, flipped and turned as the recipe says.
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
        self.plan = Order((seed, name), len(data.train), recipe.batch)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.flip = augmented and recipe.flip
        self.crop = recipe.crop if augmented else 0
        self.rotate = recipe.rotate if augmented else 0.0
        self._reader = data.reader(recipe, self.plan, augmented=augmented)
        self._epoch = -1

    def batch(self, position: int) -> tuple[Tensor, Tensor]:
        """The batch at a position, counted in steps from the start of training.

        Returns:
            float32 images (B, C, H, W) and int64 labels (B,).
        """
        epoch, part = self.plan.part(position)
        if epoch != self._epoch:
            self._draw(epoch)
        index = self.order[part]
        images = self._reader.read(position, index, self.rows[part], self.columns[part])
        if self.flip:
            images = torch.where(self.mirrored[part, None, None, None], images.flip(2), images)
        if self.rotate:
            images = rotated(images, self.angles[part])
        return self.data.normalise(images), self.labels.index_select(0, index)

    def _draw(self, epoch: int) -> None:
        """Draws order and augmentation of a whole epoch, on the CPU so that devices agree."""
        generator = self.plan.generator(epoch)
        size, device = len(self.labels), self.labels.device
        self.order = self.plan.draw(generator).to(device)
        offsets = torch.randint(2 * self.crop + 1, (2, size), generator=generator).to(device)
        self.rows, self.columns = offsets
        self.mirrored = (torch.rand(size, generator=generator) < 0.5).to(device)
        if self.rotate:  # last, so that streams without it stay as they are
            angles = self.rotate * (2 * torch.rand(size, generator=generator) - 1)
            self.angles = angles.to(device)
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
