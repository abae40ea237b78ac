"""Images as uint8 tensors on the device; batches, crops, flips and normalisation are made there.

Where the pixels come from is the data's own matter: `Data` has all of them on the device,
`bench.streaming` decodes those that are asked for. Everything else is the same code for both.

A batch costs one gather, whatever is drawn: the images lie there with their borders, and mirrored
ones beside them, so that a crop is so many runs of pixels that begin where the drawn numbers say.
uint8 until the end, since gathering is bound by memory: four times less of it than in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.crops import Crops, resident_crops, rotated
from bench.datasets import Arrays, DatasetInfo
from bench.errors import DataError
from bench.recipes import Recipe
from bench.seeds import derive


class Images(Protocol):
    """uint8 images (N, H, W, C) of which a slice is a tensor on the device; a tensor is one."""

    def __getitem__(self, part: slice, /) -> Tensor: ...


class Feed(Protocol):
    """The training pixels of one stream of batches."""

    @property
    def crops(self) -> Crops:
        """Of the images that are there, in memory that stays in place."""

    def seek(self, position: int) -> None:
        """Sees to it that the images of a batch are there."""

    def numbers(self, order: Tensor) -> Tensor:
        """(N,) where the images of an epoch are among the crops' images when their batch is due.

        Args:
            order: (N,) the images' numbers in the epoch's order, on the CPU.
        """


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
        share: which of how many equal parts of each batch is read here, see `bench.distributed`.
    """

    seed: tuple[int, str]
    size: int
    batch: int
    share: tuple[int, int] = (0, 1)

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

    def place(self, position: int) -> tuple[int, int]:
        """Epoch of a batch, and its number in the epoch."""
        return divmod(position, self.steps_per_epoch)

    @property
    def read(self) -> slice:
        """Where in a batch lies what is read here."""
        number, parts = self.share
        return slice(number * self.batch // parts, (number + 1) * self.batch // parts)

    @property
    def images(self) -> int:
        """Of a batch that are read here."""
        return self.batch // self.share[1]

    def part(self, position: int) -> tuple[int, slice]:
        """Epoch of a batch, and where in its order lies what is read of it."""
        epoch, step = self.place(position)
        first = step * self.batch
        return epoch, slice(first + self.read.start, first + self.read.stop)


@dataclass(frozen=True, slots=True)
class Data:
    """A data set on the device.

    Attributes:
        info: the table's entry.
        mean: (H, W, C) what is taken from pixels in [0, 255]; `std`, what they are then divided by.
            Even where it is the same at all places, as arithmetic with C numbers takes six times as
            long as with a whole image.
        train: images to train on; `validation` and `test` likewise. `validation` may be empty.
        known: crops of the training images that were asked for: all streams share them.
        unit: whether each image is scaled to length 1.
    """

    info: DatasetInfo
    mean: Tensor
    std: Tensor
    train: Split
    validation: Split
    test: Split
    known: dict[object, Crops] = field(default_factory=dict, repr=False, kw_only=True)
    unit: bool = field(default=False, kw_only=True)

    def without_test(self) -> Data:
        """The data as a trainer gets it: no decision can follow from a test image."""
        return dataclasses.replace(self, test=Split(self.train.images[:0], self.train.labels[:0]))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, C) -> float32 (B, C, H, W), as the recipe says, channels last.

        Floats in [0, 255] are written over.
        """
        pixels = images.to(torch.float32).sub_(self.mean).div_(self.std)
        if self.unit:
            length = torch.linalg.vector_norm(pixels, dim=(1, 2, 3), keepdim=True)
            pixels.div_(length.clamp_min(torch.finfo(length.dtype).tiny))  # black stays black
        return pixels.permute(0, 3, 1, 2)

    def feed(self, recipe: Recipe, order: Order, *, augmented: bool) -> Feed:
        """The training pixels for one stream of batches."""
        images = self.train.images
        assert isinstance(images, Tensor)
        margin, flip = (recipe.crop, recipe.flip) if augmented else (0, False)
        key = margin, recipe.padding, flip
        if key not in self.known:
            self.known[key] = resident_crops(images, margin, recipe.padding, flip=flip)
        return _Resident(self.known[key])

    def close(self) -> None:
        """Frees what a cell's end does not free by itself."""


@dataclass(frozen=True, slots=True)
class _Resident:
    """Pixels of a training set that lies on the device."""

    crops: Crops

    def seek(self, position: int) -> None:
        """All images are always there."""

    def numbers(self, order: Tensor) -> Tensor:
        return order


class _Same:
    """Arrays that are equal only to themselves: their pixels are not compared."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.arrays is other.arrays

    def __hash__(self) -> int:
        return id(self.arrays)


def to_device(arrays: Arrays, recipe: Recipe, device: torch.device) -> Data:
    """Splits off the validation images and moves everything to the device.

    The split is drawn from the data's own hash: the same for every seed and method.

    Raises:
        DataError: too few images for the recipe's split or batch.
    """
    return _to_device(_Same(arrays), recipe, device)


@functools.lru_cache(maxsize=1)
def _to_device(same: _Same, recipe: Recipe, device: torch.device) -> Data:
    """Kept for the next cell, and shared by those that train side by side: nobody writes it."""
    arrays = same.arrays
    kept, held = split_indices(arrays.hash, len(arrays.y_train), recipe)

    def split(x: np.ndarray, y: np.ndarray) -> Split:
        return Split(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))

    def part(chosen: NDArray[np.int64]) -> Split:
        if len(chosen) == len(arrays.y_train):  # chosen images would be a copy
            return split(arrays.x_train, arrays.y_train)
        return split(arrays.x_train[chosen], arrays.y_train[chosen])

    train = part(kept)
    mean, std = normalisation(arrays.info, recipe, device)
    if recipe.normalise == "mean_image":
        mean = _mean_image(train.images)
    return Data(
        arrays.info,
        mean,
        std,
        train,
        part(held),
        split(arrays.x_test, arrays.y_test),
        unit=recipe.normalise == "unit",
    )


def _mean_image(images: Images) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (H, W, C), on the device."""
    assert isinstance(images, Tensor)
    mean = images.cpu().numpy().mean(0, dtype=np.float64)  # torch would copy all as float64 first
    return torch.from_numpy(mean.astype(np.float32)).to(images.device)


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
    """(H, W, C) what is taken from pixels in [0, 255], and what they are divided by."""
    channels, height, width = info.shape
    by_figures = recipe.normalise is True
    mean = info.mean if by_figures else (0.0,) * channels
    std = info.std if by_figures else (1.0,) * channels

    def wide(values: tuple[float, ...]) -> Tensor:
        return 255 * torch.tensor(values, device=device).repeat(height, width, 1)

    return wide(mean), wide(std)


class _PerImage:
    """A number for each image of an epoch, on the device in memory that stays in place.

    Args:
        order: how an epoch falls into batches.
        place: (1,) int64 on the device: number of the batch in the epoch that is read.
        dtype: of the numbers.
    """

    def __init__(self, order: Order, place: Tensor, dtype: torch.dtype) -> None:
        self._order, self._place = order, place
        shape = order.steps_per_epoch, order.images
        self._values = torch.zeros(shape, dtype=dtype, device=place.device)

    def write(self, values: Tensor) -> None:
        """Keeps an epoch's numbers (N,), which are on the CPU."""
        order = self._order
        batches = values[: order.steps_per_epoch * order.batch].view(-1, order.batch)
        send(batches[:, order.read], self._values)

    def read(self) -> Tensor:
        """(B,) of the batch."""
        return self._values.index_select(0, self._place).view(-1)


def send(values: Tensor, target: Tensor) -> None:
    """Writes a tensor of the CPU to one on the device, which nobody waits for."""
    if target.is_cuda:
        values = values.contiguous().pin_memory()
    target.copy_(values, non_blocking=True)


class BatchStream:
    """Training batches by position: any batch of any epoch can be had without those before it.

    `seek` is the host's part, `read` the device's.

    Args:
        data: its training images are streamed.
        recipe: batch size and augmentation.
        seed: the cell's seed; order and augmentation of an epoch follow from it and the epoch.
        name: of the stream; streams of other names are independent.
        augmented: whether images are cropped, flipped and turned as the recipe says.
        share: of each batch, as of `Order`.

    Attributes:
        position: of the batch that is read.
    """

    def __init__(
        self,
        data: Data,
        recipe: Recipe,
        seed: int,
        name: str,
        *,
        augmented: bool = True,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.data = data
        self.plan = Order((seed, name), len(data.train), recipe.batch, share)
        self.position = -1
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.flip = augmented and recipe.flip
        self.crop = recipe.crop if augmented else 0
        self.rotate = recipe.rotate if augmented else 0.0
        self._feed = data.feed(recipe, self.plan, augmented=augmented)
        self._classes = data.train.labels.cpu()
        self._epoch = -1
        place = torch.zeros(1, dtype=torch.int64, device=data.train.labels.device)
        self._place = place
        self._labels = _PerImage(self.plan, place, torch.int64)
        self._starts = _PerImage(self.plan, place, torch.int64)
        later = self.flip and not self._feed.crops.mirrored
        self._flips = _PerImage(self.plan, place, torch.bool) if later else None
        self._angles = _PerImage(self.plan, place, torch.float32) if self.rotate else None

    def batch(self, position: int) -> tuple[Tensor, Tensor]:
        """The batch at a position, counted in steps from the start of training.

        Returns:
            float32 images (B, C, H, W) and int64 labels (B,).
        """
        self.seek(position)
        return self.read()

    def seek(self, position: int) -> None:
        """Goes to a position: what the host has to do before `read`."""
        self.position = position
        epoch, step = self.plan.place(position)
        if epoch != self._epoch:
            self._draw(epoch)
        self._feed.seek(position)
        self._place.fill_(step)

    def read(self) -> tuple[Tensor, Tensor]:
        """The batch at the position, as often as wanted; new tensors each time.

        Reads nothing but memory on the device that stays where it is, and never waits for it, so
        that a CUDA graph may hold it: replayed after `seek`, it gives the batch at that position.

        Returns:
            float32 images (B, C, H, W) and int64 labels (B,).
        """
        images = self._feed.crops.read(self._starts.read())
        if self._flips is not None:
            mirrored = self._flips.read()[:, None, None, None]
            images = torch.where(mirrored, images.flip(2), images)
        if self._angles is not None:
            images = rotated(images, self._angles.read())
        return self.data.normalise(images), self._labels.read()

    def _draw(self, epoch: int) -> None:
        """Draws order and augmentation of a whole epoch, on the CPU so that devices agree."""
        generator, size = self.plan.generator(epoch), len(self._classes)
        self.order = self.plan.draw(generator)
        self.rows, self.columns = torch.randint(2 * self.crop + 1, (2, size), generator=generator)
        self.mirrored = torch.rand(size, generator=generator) < 0.5
        numbers = self._feed.numbers(self.order)
        starts = self._feed.crops.starts(numbers, self.rows, self.columns, self.mirrored)
        self._starts.write(starts)
        self._labels.write(self._classes[self.order])
        if self._flips is not None:
            self._flips.write(self.mirrored)
        if self._angles is not None:  # last, so that streams without it stay as they are
            self.angles = self.rotate * (2 * torch.rand(size, generator=generator) - 1)
            self._angles.write(self.angles)
        self._epoch = epoch
