"""Tiny runs on a device, for tests that are rehearsed on the CPU and mean it on a GPU.

A test with `@on_devices` runs on both, on the GPU with the mark `gpu`.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import datasets
from bench.data import Data, to_device
from bench.prunable import prunable_names
from bench.recipes import Recipe
from bench.step import Step
from bench.trainer import Trainer
from bench.trial import random_source
from methods import METHODS, get_method
from methods.api import Budget, Source
from tests.hot import NoWaiting
from tests.tiny import tiny_model

# cuBLAS looks for it once, before its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

RECIPE = Recipe(title="", batch=32, lr=0.05, momentum=0.9, weight_decay=5e-4, crop=2, flip=True)
ADAM = Recipe(title="", batch=32, lr=0.01, optimizer="adam", weight_decay=1e-3, crop=2)

DENSITY = 0.1

STATIC = (
    *("one_shot", "lottery_ticket", "ticket_control", "random", "magnitude_at_init"),
    *("snip", "grasp", "synflow"),
)
"""Methods whose masks stay from one phase to the next."""


@functools.lru_cache(maxsize=4)
def images(recipe: Recipe, device: str) -> Data:
    """The `synthetic` data there."""
    return to_device(datasets.load("synthetic", Path()), recipe, torch.device(device))


def tiny_run(
    name: str,
    device: str,
    *,
    recipe: Recipe = RECIPE,
    steps: int = 24,
    seed: int = 0,
    step: Callable[..., Step] = Step,
) -> Trainer:
    """A run of a method that has not begun, on a convolutional network of 1,432 weights."""
    method = get_method(name)()
    network = tiny_model("conv", seed)
    names = prunable_names(network, method, "all")
    density = DENSITY if METHODS[name].controls in ("density", "filters") else None
    source = None
    if method.needs_source:
        made = random_source(network, names, density, seed)
        source = Source({name: mask.to(device) for name, mask in made.masks.items()})
    data = images(recipe, device)
    return Trainer(
        method,
        network.to(device),
        names,
        data,
        recipe,
        Budget(steps, len(data.train) // recipe.batch, len(data.train), ()),
        density,
        seed,
        source=source,
        fresh=lambda draw: tiny_model("conv", draw).to(device),
        step=step,
    )


@contextmanager
def settled(device: str) -> Iterator[None]:
    """Sums in a fixed order, on a stream that can be recorded: bits can be compared."""
    if device == "cpu":
        yield
        return
    kept = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            yield
    finally:
        torch.backends.cudnn.deterministic = kept


@contextmanager
def never_waiting(device: str) -> Iterator[None]:
    """An error for whatever makes the host wait for a GPU."""
    if device == "cpu":
        with NoWaiting():
            yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not find every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def outcome(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What a run has come to: weights, masks, its memory and its losses, as copies on the CPU."""
    found = {f"model/{n}": t for n, t in trainer.state.model.state_dict().items()}
    found |= {f"mask/{n}": t for n, t in trainer.state.masks.items()}
    found |= {f"optimizer/{n}": t for n, t in trainer.optimizer_tensors().items()}
    found["losses"] = torch.tensor([point.train_loss for point in trainer.cursor.curve])
    found["last loss"] = trainer.hot.loss
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same, bit for bit."""
    assert one.keys() == other.keys()
    differing = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert not differing
