"""Counting a network beside one forward pass of one image."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from bench.counting import count_layers
from models import create_model
from tests.benchmarks.ratios import Beside

SHAPES = {"lenet_300_100": (1, 28, 28), "resnet20": (3, 32, 32), "timm:resnet50": (3, 224, 224)}
SMALL = {"timm:resnet50": (3, 32, 32)}


@pytest.mark.benchmark(group="count a network", timer=time.process_time)
@pytest.mark.parametrize("live", [False, True], ids=["products", "products and live paths"])
@pytest.mark.parametrize("name", SHAPES)
def test_count(name: str, live: bool, beside: Beside, measuring: bool) -> None:
    shape = SHAPES[name] if measuring else SMALL.get(name, SHAPES[name])
    model = create_model(name, shape, 10).eval()
    image = torch.zeros(1, *shape)

    @torch.no_grad()
    def forward() -> Tensor:
        outputs: Tensor = model(image)
        return outputs

    lines = beside(
        f"count{', live' if live else ''}: {name} / forward of one image",
        lambda: count_layers(model, shape, live=live),
        forward,
        rounds=3 if name == "timm:resnet50" else 9,
    )
    assert all((line.live is not None) == live for line in lines)
