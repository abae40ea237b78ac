"""Tiny real cells on which methods are tried: three networks, synthetic images, fresh trainers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import datasets
from bench.data import Data, to_device
from bench.prunable import prunable_names, shapes
from bench.recipes import Recipe
from bench.seeds import derive
from bench.trainer import Trainer
from methods.allocation import keep_count
from methods.api import Budget, Source, SparsityMethod
from methods.masking import topk_mask
from models import create_model

SGD = Recipe(
    title="momentum, weight decay, crops, flips; 448 images make 14 steps an epoch",
    batch=32,
    lr=0.05,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    drops=(0.5, 0.75),
    warmup=0.1,
    crop=2,
    flip=True,
    validation=64,
)
ADAM = Recipe(
    title="Adam with weight decay, crops at mirrored borders, cosine",
    batch=32,
    lr=0.01,
    optimizer="adam",
    weight_decay=1e-3,
    schedule="cosine",
    crop=2,
    padding="reflect",
    flip=True,
    validation=64,
)


class TinyMLP(nn.Module):
    """768-16-8-4 on flattened images: 12,448 weights in three layers, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3 * 16 * 16, 16)
        self.fc2 = nn.Linear(16, 8)
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 16, 16) to logits (B, 4)."""
        x = torch.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.classifier(torch.relu(self.fc2(x)))
        return logits


class TinyConv(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a classifier: 216 + 1,152 + 64 = 1,432 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 16, 16) to logits (B, 4)."""
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def tiny_resnet() -> nn.Module:
    """ResNet-18 of timm with an eighth of its channels."""
    return create_model("timm:resnet18", (3, 16, 16), 4, channels=(8, 16, 32, 64))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": TinyMLP,
    "conv": TinyConv,
    "timm": tiny_resnet,
}


def network(name: str, seed: int = 0, draw: int = 0) -> nn.Module:
    """A tiny network, its initial weights fixed by seed and draw; channels last, as in a cell."""
    torch.manual_seed(derive(seed, "init", *([draw] if draw else [])))
    return NETWORKS[name]().to(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=8)
def images(recipe: Recipe) -> Data:
    """The `synthetic` data on the CPU."""
    return to_device(datasets.load("synthetic", Path()), recipe, torch.device("cpu"))


def make_trainer(
    method: SparsityMethod,
    model: str,
    recipe: Recipe,
    *,
    density: float | None = 0.1,
    steps: int = 24,
    seed: int = 0,
    prunable: str = "all",
    data: Data | None = None,
) -> Trainer:
    """A real trainer of a tiny cell that has not begun.

    Args:
        method: an instance.
        model: name in `NETWORKS`.
        recipe: how it is trained.
        density: the target; ignored by methods that take none, such as `dense`.
        steps: length of the budget.
        seed: of the initial weights, the data order and the method's choices.
        prunable: preset of `bench.prunable`.
        data: None: all of `images(recipe)`.
    """
    data = data or images(recipe)
    made = network(model, seed)
    names = prunable_names(made, method, prunable)
    density = density if method.controls in ("density", "filters") else None
    return Trainer(
        method,
        made,
        names,
        data,
        recipe,
        budget_of(steps, recipe, data, made, names),
        density,
        seed,
        source=random_source(made, names, density, seed) if method.needs_source else None,
        fresh=lambda draw: network(model, seed, draw),
    )


def budget_of(
    steps: int, recipe: Recipe, data: Data, model: nn.Module, names: Sequence[str]
) -> Budget:
    """A budget of so many steps for a network with these prunable weights."""
    size = len(data.train)
    return Budget(steps, size // recipe.batch, size, recipe.drops, shapes(model, names))


def random_source(
    model: nn.Module, names: Sequence[str], density: float | None, seed: int = 0
) -> Source:
    """Random masks over all layers together, with as many ones as a cell of this density keeps."""
    weights = {name: model.get_parameter(name).detach() for name in names}
    sizes = [weight.numel() for weight in weights.values()]
    scores = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(seed))
    kept = topk_mask(scores, keep_count(sum(sizes), 1.0 if density is None else density))
    parts = zip(weights.items(), torch.split(kept, sizes), strict=True)
    return Source({name: part.view(weight.shape) for (name, weight), part in parts})


def train(trainer: Trainer) -> Trainer:
    """Trains to the end, `finish` included."""
    for _ in trainer.run():
        pass
    return trainer


def without_test(data: Data, on_touch: Callable[[], None]) -> Data:
    """The data as a trainer gets it, telling when somebody looks for the test images."""

    class Watched:
        def __getattr__(self, name: str) -> Tensor:
            on_touch()
            empty: Tensor = getattr(data.train, name)[:0]
            return empty

        def __len__(self) -> int:
            on_touch()
            return 0

    watched: Any = Watched()
    return dataclasses.replace(data, test=watched)
