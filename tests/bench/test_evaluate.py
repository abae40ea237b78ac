"""Accuracy and loss of a network on a split, against values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import evaluate as module
from bench.data import Data, Split, to_device
from bench.datasets import Arrays, DatasetInfo
from bench.evaluate import chunk_size, evaluate
from bench.recipes import Recipe


class Table(nn.Module):
    """Returns for each image the logits in the row that its one pixel names; remembers batches."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.seen: list[tuple[int, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((len(x), self.training, torch.is_grad_enabled()))
        return self.rows[x.flatten().round().long()]


def data(labels: list[int], classes: int, pixels: list[int] | None = None) -> Data:
    """One-pixel images that reach the network as their numbers."""
    info = DatasetInfo((1, 1, 1), classes, (0.0,), (1 / 255,), "", "")
    x = np.array(pixels if pixels is not None else range(len(labels)), np.uint8)
    y = np.array(labels)
    arrays = Arrays(info, x.reshape(-1, 1, 1, 1), y, x.reshape(-1, 1, 1, 1), y, "00")
    return to_device(arrays, Recipe(title="", batch=1, lr=0.1), torch.device("cpu"))


def test_loss_and_accuracy_by_hand():
    used = data([0, 1, 1, 2], classes=3)
    log2, log4 = math.log(2), math.log(4)
    rows = [[log2, 0, 0], [0, log2, 0], [log4, log2, 0], [0.0, 0, 0]]
    found = evaluate(Table(torch.tensor(rows)), used.test, used)
    # Probabilities of the labels: 2/4, 2/4, 2/7 and 1/3; a tie goes to the first class.
    losses = [math.log(2), math.log(2), math.log(7 / 2), math.log(3)]
    assert found.loss == pytest.approx(sum(losses) / 4)
    assert found.top1 == 50
    assert found.top5 is None


def test_top5_counts_a_label_among_the_five_largest():
    logits = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]]).repeat(7, 1)
    used = data(list(range(7)), classes=7)
    found = evaluate(Table(logits), used.test, used)
    assert found.top1 == pytest.approx(100 / 7)
    assert found.top5 == pytest.approx(500 / 7)


@pytest.mark.parametrize(("classes", "known"), [(5, False), (6, True)])
def test_top5_is_for_more_than_five_classes(classes, known):
    used = data([0], classes)
    found = evaluate(Table(torch.zeros(1, classes)), used.test, used)
    assert (found.top5 is not None) == known


def test_a_split_of_several_chunks_counts_every_image(monkeypatch):
    labels = [i % 3 for i in range(103)]
    used = data(labels, classes=6)
    model = Table(torch.randn(103, 6, generator=torch.Generator().manual_seed(0)))
    whole = evaluate(model, used.test, used)
    monkeypatch.setattr(module, "CHUNK", 10)
    model.seen.clear()
    parts = evaluate(model, used.test, used)
    assert [count for count, _, _ in model.seen] == [10] * 10 + [3]
    assert (parts.top1, parts.top5) == (whole.top1, whole.top5)
    assert parts.loss == pytest.approx(whole.loss)


def test_the_network_is_evaluated_in_evaluation_mode_without_gradients():
    used = data([0, 1], classes=3)
    model = Table(torch.zeros(2, 3)).train()
    evaluate(model, used.test, used)
    assert model.seen == [(2, False, False)]
    assert not model.training


def test_the_split_that_is_asked_for_is_evaluated():
    used = data([0, 1, 2], classes=3)
    model = Table(torch.eye(3))
    wrong = Split(used.test.images[:2], used.test.labels[:2] + 1)
    assert evaluate(model, used.test, used).top1 == 100
    assert evaluate(model, wrong, used).top1 == 0


def test_logits_that_are_not_finite_give_a_loss_that_is_not():
    used = data([0], classes=3)
    assert math.isnan(evaluate(Table(torch.full((1, 3), math.nan)), used.test, used).loss)


def test_half_precision_is_summed_in_single():
    used = data([1] * 200, classes=3)
    rows = torch.tensor([[0.0, 8.0, 0.0]]).repeat(200, 1)
    half = evaluate(Table(rows.to(torch.bfloat16)), used.test, used)
    assert half.loss == pytest.approx(evaluate(Table(rows), used.test, used).loss)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 8, 8), 1000),
        ((1, 28, 28), 1000),
        ((3, 64, 64), 1000),
        ((3, 224, 224), 81),
        ((3, 5000, 5000), 1),
    ],
)
def test_how_many_images_go_through_at_once_follows_from_their_shape(shape, size):
    assert chunk_size(shape) == size
