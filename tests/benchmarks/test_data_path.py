"""A training batch beside torchvision's transforms on each image as a PIL picture."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from bench.data import BatchStream, to_device
from bench.datasets import DATASETS, Arrays
from bench.recipes import Recipe
from tests.benchmarks.ratios import Beside

AUGMENTED = Recipe(title="crop and flip", batch=128, lr=0.1, crop=4, flip=True)
PLAIN = Recipe(title="as they are", batch=60, lr=0.1)


@pytest.mark.benchmark(group="a training batch", timer=time.process_time)
@pytest.mark.parametrize(("name", "recipe"), [("cifar10", AUGMENTED), ("mnist", PLAIN)])
def test_batch(name: str, recipe: Recipe, beside: Beside, measuring: bool) -> None:
    info = DATASETS[name]
    channels, size, _ = info.shape
    rng, count = np.random.default_rng(0), 20_000 if measuring else 300
    images = rng.integers(0, 256, size=(count, size, size, channels), dtype=np.uint8)
    labels = np.zeros(count, dtype=np.int64)
    arrays = Arrays(info, images, labels, images[:1], labels[:1], "0" * 12)
    stream = BatchStream(to_device(arrays, recipe, torch.device("cpu")), recipe, 0, "order")
    positions = itertools.count()
    augment = [transforms.RandomCrop(size, 4), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose(
        [
            *(augment if recipe.flip else []),
            transforms.ToTensor(),
            transforms.Normalize(info.mean, info.std),
        ]
    )

    def with_pil() -> Tensor:
        index = rng.integers(0, count, size=recipe.batch)
        return torch.stack([transform(Image.fromarray(images[i].squeeze())) for i in index])

    found, _ = beside(
        f"batch: {name} / torchvision PIL", lambda: stream.batch(next(positions)), with_pil
    )
    assert found.shape == with_pil().shape == (recipe.batch, channels, size, size)
