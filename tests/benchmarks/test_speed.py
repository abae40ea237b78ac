"""How long things take. Nothing here asserts a time: `tox run -e perf` prints the table.

The groups compare what belongs together: steps of each method beside dense, and so on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import record, store
from bench.counting import count_layers
from bench.data import BatchStream
from bench.datasets import load
from bench.recipes import Recipe
from methods import METHODS
from methods.masking import topk_mask
from models import create_model
from tests.reports import records
from tests.tiny import tiny_data, tiny_trainer

Benchmark = Any


@pytest.mark.benchmark(group="one training step, small MLP; filter methods: small conv net")
@pytest.mark.parametrize("name", METHODS)
def test_step(benchmark: Benchmark, name: str) -> None:
    model = "conv" if METHODS[name].controls == "filters" else "mlp"
    trainer = tiny_trainer(name, model=model, steps=10**6)
    steps = trainer.run()
    next(steps)
    benchmark(next, steps)
    assert trainer.cursor.total > 1


@pytest.mark.benchmark(group="exact k-th largest of 1.5 million")
def test_topk_mask(benchmark: Benchmark) -> None:
    scores = torch.rand(1_500_000, generator=torch.Generator().manual_seed(0))
    mask = benchmark(topk_mask, scores, 150_000)
    assert int(mask.sum()) == 150_000


@pytest.mark.benchmark(group="exact k-th largest of 1.5 million")
def test_torch_sort(benchmark: Benchmark) -> None:
    """What `topk_mask` is compared with."""
    scores = torch.rand(1_500_000, generator=torch.Generator().manual_seed(0))
    assert benchmark(lambda: scores.sort(descending=True).values[149_999]) > 0.89


@pytest.mark.benchmark(group="one batch of 128 with crop and flip")
def test_batch(benchmark: Benchmark) -> None:
    recipe = Recipe(title="", batch=128, lr=0.1, crop=4, flip=True)
    stream = BatchStream(tiny_data(recipe), recipe, 0, "order")
    images, _ = benchmark(stream.batch, 0)
    assert images.shape == (128, 3, 16, 16)


@pytest.mark.benchmark(group="count a network")
@pytest.mark.parametrize("name", ["lenet_300_100", "resnet20", "timm:resnet18"])
def test_count(benchmark: Benchmark, name: str) -> None:
    model = create_model(name, (3, 32, 32), 10)
    assert len(benchmark(count_layers, model, (3, 32, 32))) > 2


@pytest.mark.benchmark(group="count ResNet-50 at 224x224")
@pytest.mark.parametrize("live", [False, True], ids=["products", "products and live paths"])
def test_count_of_a_large_network(benchmark: Benchmark, live: bool) -> None:
    model = create_model("timm:resnet50", (3, 224, 224))
    lines = benchmark.pedantic(count_layers, (model, (3, 224, 224)), {"live": live}, rounds=3)
    assert len(lines) == 54


@pytest.mark.benchmark(group="read the embedded data")
def test_digits(benchmark: Benchmark) -> None:
    assert len(benchmark(load, "digits", Path()).y_train) == 1437


@pytest.mark.benchmark(group="write and read a record")
def test_record(benchmark: Benchmark, tmp_path: Path) -> None:
    made = records.record(records.spec())
    path = tmp_path / f"{made.spec.slug}.json"

    def both() -> record.Record:
        store.write_atomically(path, record.encode(made))
        return store.read(path)

    assert benchmark(both) == made
