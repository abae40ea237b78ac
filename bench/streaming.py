"""Batches of images that are decoded from files by processes of their own, ahead of their use.

What a file becomes depends on the recipe and, where that crops or augments at random, on the cell's
seed, the stream, the epoch and the image: not on how many processes there are, nor on what was
asked for before.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from bench import data as resident
from bench import folders
from bench.crops import Crops, fill_padded
from bench.data import Data, Feed, Order, Split, normalisation, split_indices
from bench.datasets import Arrays, Pixels
from bench.errors import BenchError, DataError, SuiteError
from bench.folders import Folder
from bench.recipes import Recipe
from bench.seeds import derive

SHARE = 16
"""Images that one process decodes at a time: a batch is shared among them."""


@dataclass(frozen=True, slots=True)
class Making:
    """How a picture becomes a square of pixels.

    Attributes:
        size: side of the square.
        crop_fraction: part of the resized picture's shorter side that the centre takes.
        area: range of the part that a random crop takes; (1, 1): the centre is taken.
        policy: timm's name of an augmentation policy; empty: none.
    """

    size: int
    crop_fraction: float
    area: tuple[float, float] = (1.0, 1.0)
    policy: str = ""

    @classmethod
    def of(cls, recipe: Recipe, *, augmented: bool) -> Making:
        """What a recipe says."""
        if not augmented:
            return cls(recipe.image_size, recipe.crop_fraction)
        return cls(recipe.image_size, recipe.crop_fraction, recipe.area, recipe.auto_augment)

    @property
    def random(self) -> bool:
        """Whether anything is drawn."""
        return self.area != (1.0, 1.0) or bool(self.policy)

    @property
    def transform(self) -> Callable[[Image], Image]:
        """The picture in RGB -> the square, from timm's own transforms.

        Raises:
            AssertionError, ValueError, KeyError: timm does not know the policy.
        """
        from timm.data.transforms_factory import create_transform

        common: dict[str, Any] = {
            "input_size": (3, self.size, self.size),
            "interpolation": "bilinear",
            "use_prefetcher": True,
        }
        make: Any = create_transform
        centre = make(**common, crop_pct=self.crop_fraction)
        crop, augment, _ = make(
            **common,
            is_training=True,
            scale=self.area,
            hflip=0.0,  # the recipe's flips are made on the device, as for small data
            color_jitter=None,
            auto_augment=self.policy or None,
            separate=True,
        )
        if self.area == (1.0, 1.0):
            crop.transforms = centre.transforms[:-1]  # the last makes a tensor

        def made(picture: Image) -> Image:
            square: Image = augment(crop(picture))
            return square

        return made


def check(recipe: Recipe, where: str) -> None:
    """Refuses what timm cannot do, before anything is decoded.

    Raises:
        SuiteError: the recipe's policy is none of timm's.
    """
    try:
        assert callable(Making.of(recipe, augmented=True).transform)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise SuiteError(
            f"{where}: auto_augment = {recipe.auto_augment!r}: timm cannot make that ({error}). "
            "Give a policy such as 'rand-m9-mstd0.5', 'augmix-m3-w3' or 'original'."
        ) from error


def to_device(source: Arrays | Folder, recipe: Recipe, device: torch.device, count: int) -> Data:
    """A data set as cells train on it, its validation images split off.

    Args:
        source: what was read of it.
        recipe: validation split, normalisation, and the size of a folder's images.
        device: where batches are needed.
        count: processes that decode a folder's images.

    Raises:
        DataError: too few images for the recipe's split or batch.
    """
    if isinstance(source, Arrays):
        return resident.to_device(source, recipe, device)
    kept, held = split_indices(source.hash, len(source.y_train), recipe)
    decoders = Decoders(count)
    decoders.start()  # before any clock
    making = Making.of(recipe, augmented=False)

    def split(x: Sequence[str], y: np.ndarray) -> Split:
        return Split(Files(x, making, decoders, device), torch.from_numpy(y).to(device))

    def part(chosen: np.ndarray) -> Split:
        return split([source.x_train[i] for i in chosen], source.y_train[chosen])

    return StreamedData(
        source.info,
        *normalisation(source.info, recipe, device),
        part(kept),
        part(held),
        split(source.x_test, source.y_test),
        decoders,
        unit=recipe.normalise == "unit",
    )


@dataclass(frozen=True, slots=True)
class StreamedData(Data):
    """A data set whose images are decoded when they are needed; the labels lie on the device."""

    decoders: Decoders

    def feed(self, recipe: Recipe, order: Order, *, augmented: bool) -> Feed:
        """The training pixels for one stream of batches, decoded ahead."""
        assert isinstance(self.train.images, Files)
        return _Stream(self.train.images, recipe, order, augmented)

    def close(self) -> None:
        """Ends the processes."""
        self.decoders.close()


class Decoders:
    """Processes that decode images; they start when they are first needed.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def start(self) -> None:
        """Starts them, and waits until the first is there."""
        self.submit((), (), Making(1, 1.0)).result()

    def submit(self, paths: Sequence[str], seeds: Sequence[int], making: Making) -> Future[Pixels]:
        """Begins to decode images."""
        if self._pool is None:
            self._pool = folders.processes(self.count, _prepare)
        return self._pool.submit(decoded, paths, seeds, making)

    def close(self) -> None:
        """Ends them; what they were doing is lost. They start anew if they are needed again."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


_transform = functools.lru_cache(maxsize=4)(lambda making: making.transform)


def decoded(paths: Sequence[str], seeds: Sequence[int], making: Making) -> Pixels:
    """uint8 (N, size, size, 3), in a process of its own.

    Args:
        paths: of the files.
        seeds: one a file; empty where nothing is drawn.
        making: what the pictures become.

    Raises:
        DataError: names the file that cannot be decoded.
    """
    pixels = np.empty((len(paths), making.size, making.size, 3), np.uint8)
    for number, path in enumerate(paths):
        try:
            picture = folders.decode(path)
        except Exception as error:  # a damaged image can raise nearly anything
            raise DataError(
                f"{path}: cannot be decoded any more ({folders.fault(error)}). It could when the "
                "suite was resolved: put it back, and run the suite again."
            ) from error
        if seeds:
            random.seed(seeds[number])
            np.random.seed(seeds[number] % 2**32)  # noqa: NPY002  what timm draws from
            torch.manual_seed(seeds[number])
        pixels[number] = np.asarray(_transform(making)(picture))
    return pixels


class _Ahead:
    """Decoded batches by key; those that come after the last are begun before they are asked for.

    Args:
        decoders: who decodes.
        making: what.
        jobs: paths and seeds of the batch with a key; no paths: there is no such batch.
        step: from a key to the next.
        size: of a batch.
    """

    def __init__(
        self,
        decoders: Decoders,
        making: Making,
        jobs: Callable[[int], tuple[Sequence[str], Sequence[int]]],
        step: int,
        size: int,
    ) -> None:
        self._decoders, self._making, self._jobs = decoders, making, jobs
        self._step = step
        # A batch more than is in use, and work for every process while it waits.
        self._depth = 1 + -(-SHARE * decoders.count // max(1, size))
        self._begun: dict[int, list[Future[Pixels]]] = {}

    def get(self, key: int, device: torch.device) -> Tensor:
        """uint8 (B, H, W, 3) on the device.

        Raises:
            DataError: names the file that cannot be decoded.
        """
        keys = [key + i * self._step for i in range(self._depth + 1)]
        for other in self._begun.keys() - set(keys):
            for future in self._begun.pop(other):
                future.cancel()
        try:
            for wanted in keys:
                if wanted not in self._begun:
                    self._begun[wanted] = self._begin(wanted)
            parts = [future.result() for future in self._begun.pop(key)]
        except BrokenProcessPool as error:
            self._begun.clear()
            self._decoders.close()
            raise BenchError("A process that decodes images died (out of memory?).") from error
        images = torch.from_numpy(np.concatenate(parts))
        if device.type == "cuda":
            images = images.pin_memory()
        return images.to(device, non_blocking=True)

    def _begin(self, key: int) -> list[Future[Pixels]]:
        paths, seeds = self._jobs(key)
        return [
            self._decoders.submit(
                paths[start : start + SHARE], seeds[start : start + SHARE], self._making
            )
            for start in range(0, len(paths), SHARE)
        ]


class Files:
    """Images of files as a sequence: a slice is decoded as tests want it, the next one ahead.

    Args:
        paths: of the files.
        making: what the pictures become.
        decoders: who decodes.
        device: where slices are needed.
    """

    def __init__(
        self, paths: Sequence[str], making: Making, decoders: Decoders, device: torch.device
    ) -> None:
        self.paths, self.making = paths, making
        self.decoders, self.device = decoders, device
        self._size = 0
        self._ahead: _Ahead | None = None

    def __getitem__(self, part: slice) -> Tensor:
        """uint8 (B, H, W, 3) of a slice without a step."""
        start, stop, _ = part.indices(len(self.paths))
        if stop <= start:
            side = self.making.size
            return torch.empty((0, side, side, 3), dtype=torch.uint8, device=self.device)
        # What was asked for decides, not what there was: the last chunk is shorter.
        asked = part.stop if part.stop is not None and part.stop > 0 else stop
        size = asked - start
        if self._ahead is None or size != self._size:
            self._size = size
            self._ahead = _Ahead(self.decoders, self.making, self._jobs, size, size)
        return self._ahead.get(start, self.device)

    def _jobs(self, start: int) -> tuple[Sequence[str], Sequence[int]]:
        return self.paths[start : start + self._size], ()


class _Stream:
    """Pixels of the training batches of one stream, by position.

    Args:
        files: of the training images.
        recipe: what the pictures become.
        order: which images make which batch.
        augmented: whether they are cropped as the recipe says.
    """

    def __init__(self, files: Files, recipe: Recipe, order: Order, augmented: bool) -> None:
        self._files, self._order = files, order
        self._margin, self._padding = recipe.crop if augmented else 0, recipe.padding
        self._making = Making.of(recipe, augmented=augmented)
        self._ahead = _Ahead(files.decoders, self._making, self._jobs, 1, order.images)
        self._epoch, self._numbers = -1, torch.empty(0)
        side = recipe.image_size + 2 * self._margin
        shape = order.images, side, side, 3
        self._padded = torch.zeros(shape, dtype=torch.uint8, device=files.device)
        self._position = -1
        self.crops = Crops(self._padded, self._margin)

    def seek(self, position: int) -> None:
        """Waits until the batch is decoded, and brings it to where the crops are taken."""
        if position != self._position:
            images = self._ahead.get(position, self._files.device)
            fill_padded(self._padded, images, self._margin, self._padding)
            self._position = position

    def numbers(self, order: Tensor) -> Tensor:
        """(N,) the images of a batch lie there one after the other."""
        return torch.arange(len(order)) % self._order.images

    def _jobs(self, position: int) -> tuple[Sequence[str], Sequence[int]]:
        epoch, part = self._order.part(position)
        if epoch != self._epoch:
            self._epoch = epoch
            self._numbers = self._order.draw(self._order.generator(epoch))
        numbers = self._numbers[part].tolist()
        seed = self._order.seed
        seeds = [derive(*seed, epoch, n) for n in numbers] if self._making.random else ()
        return [self._files.paths[number] for number in numbers], seeds
