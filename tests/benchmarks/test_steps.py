"""A training step of each method beside one of dense, mask updates included; ways to compute it.

LeNet-300-100 on synthetic 28x28 images, batch 60, Adam; filter methods on a small conv net. A run
of 500 steps is measured whole but for its first slice, in slices that alternate.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import products
from bench.data import Data, to_device
from bench.datasets import DATASETS, Arrays
from bench.networks import make_model
from bench.recipes import Recipe
from bench.stack import Stack
from bench.trainer import Trainer
from bench.trial import network, trainer_of
from methods import METHODS, get_method
from tests.benchmarks.ratios import Beside
from tests.tiny import tiny_data

LENET = Recipe(title="as the lottery ticket's LeNet", batch=60, lr=1.2e-3, optimizer="adam")
CONV = Recipe(title="a small conv net", batch=32, lr=0.05, momentum=0.9)
SLICES, STEPS = 5, 100


@functools.cache
def digits() -> Data:
    """6,000 patterns in 10 classes with noise: no layer dies of them, as of noise alone."""
    rng = np.random.default_rng(0)
    patterns = rng.uniform(0, 255, size=(10, 28, 28, 1))
    labels = rng.integers(0, 10, size=6000)
    noise = rng.normal(0, 48, size=(6000, 28, 28, 1))
    images = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
    arrays = Arrays(DATASETS["mnist"], images, labels, images[:600], labels[:600], "0" * 12)
    return to_device(arrays, LENET, torch.device("cpu"))


def lenet(draw: int) -> nn.Module:
    model = make_model("lenet_300_100", DATASETS["mnist"], {}, draw)
    return model.to(memory_format=torch.channels_last)


def steps_of(name: str, small: bool) -> Callable[[int], int]:
    """A function that goes on training by so many steps, and gives the number done."""
    method = get_method(name)()
    build = functools.partial(network, "conv") if small else lenet
    recipe, data = (CONV, tiny_data(CONV)) if small else (LENET, digits())
    trainer = trainer_of(method, build, recipe, data, density=0.1, steps=SLICES * STEPS)
    steps = trainer.run()

    def go(count: int) -> int:
        return max(itertools.islice(steps, count))

    return go


@pytest.mark.benchmark(group="100 training steps", timer=time.process_time)
@pytest.mark.parametrize("name", METHODS)
def test_step(name: str, beside: Beside, measuring: bool) -> None:
    small = METHODS[name].controls == "filters"
    method, dense = steps_of(name, small), steps_of("dense", small)
    count = STEPS if measuring else 2
    done = beside(
        f"step: {name} / dense",
        functools.partial(method, count),
        functools.partial(dense, count),
        rounds=SLICES - 1,
    )
    assert done >= count


def dense() -> tuple[Trainer, Callable[[], object]]:
    """A run of which a step is due, and what goes on to the next."""
    trainer = trainer_of(get_method("dense")(), lenet, LENET, digits(), density=None, steps=10**6)
    moments = trainer.moments()
    next(moments)

    def go_on() -> None:
        assert next(moments)
        assert next(moments) is None

    return trainer, go_on


@pytest.mark.benchmark(group="a training step of dense", timer=time.process_time)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_stack(width: int, beside: Beside, measuring: bool) -> None:
    (single, go_on), *cells = (dense() for _ in range(1 + width))
    stack, trainers = Stack(width), [trainer for trainer, _ in cells]

    def alone() -> None:
        for _ in range(width):
            single.hot.compute()
            go_on()

    def stacked() -> Tensor:
        losses = stack.backward(trainers)
        for (trainer, due), loss in zip(cells, losses, strict=True):
            assert loss is not None
            trainer.hot.finish(loss)
            due()
        return losses[0]

    number = 64 // width if measuring else 1
    assert beside(f"step: {width} stacked / {width} alone", stacked, alone, number=number) > 0


@pytest.mark.benchmark(group="a training step of dense", timer=time.process_time)
def test_products(beside: Beside, measuring: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's, whoever made the processor, beside torch's own choice."""

    def go(available: bool) -> Callable[[], object]:
        monkeypatch.setattr("bench.step.pays", lambda: available)
        trainer, due = dense()

        def step() -> object:
            trainer.hot.compute()
            return due()

        return step

    number = 50 if measuring else 1
    name = "step: products by oneDNN / by torch's choice"
    assert beside(name, go(products.available()), go(False), number=number) is None
