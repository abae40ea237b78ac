"""Tanaka et al., 2020, arXiv:2006.05467: synaptic flow, in rounds and without data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn

from methods.allocation import keep_count
from methods.api import Phase, TrainState
from methods.magnitude_at_init import MagnitudeAtInit
from methods.synflow import SynFlow
from tests.tiny import FakeRun, copied, nonzero, tiny_trainer


def run_of(model, *, density=0.5, shape=(2, 1, 1)):
    """A run around a network whose weight matrices are all prunable."""
    parameters = dict(model.named_parameters())
    weights = {name: p for name, p in parameters.items() if p.ndim > 1}
    masks = {name: torch.ones_like(weight.detach()) for name, weight in weights.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainState(model, weights, masks, optimizer, torch.tensor(0.1), torch.zeros(()))
    return FakeRun(
        state, density=density, phase=Phase("train", 10, density=density), input_shape=shape
    )


def scores_of(run, **options):
    run.state.model.eval()
    with torch.no_grad():
        return SynFlow(**options).scores(run)


def chain(first, second, bias=None):
    """A network of two linear layers on flattened images, with a rectifier between them."""
    layers = [nn.Linear(2, 2, bias=bias is not None), nn.Linear(2, 1, bias=False)]
    layers[0].weight.data.copy_(torch.tensor(first))
    layers[1].weight.data.copy_(torch.tensor(second))
    if bias is not None:
        layers[0].bias.data.copy_(torch.tensor(bias))
    return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1])


FIRST, SECOND = [[1.0, -2], [3, 0.5]], [[-1.0, 2]]


def test_the_score_of_a_weight_is_the_flow_through_it():
    # |W1| of ones = (3, 3.5); R = 1 * 3 + 2 * 3.5 = 10. Through W1_ij flows |W1_ij| |W2_i|.
    scores = scores_of(run_of(chain(FIRST, SECOND)))
    assert scores["1.weight"].tolist() == [[1, 2], [6, 1]]
    assert scores["3.weight"].tolist() == [[3, 7]]


def test_a_pruned_weight_carries_no_flow():
    # Without W1_00: (2, 3.5), R = 2 + 7 = 9.
    run = run_of(chain(FIRST, SECOND))
    run.state.masks["1.weight"][0, 0] = 0
    scores = scores_of(run)
    assert scores["1.weight"].tolist() == [[0, 2], [6, 1]]
    assert scores["3.weight"].tolist() == [[2, 7]]


def test_biases_add_to_the_flow_only_if_asked():
    # With |b| = (1, 0.5) the hidden units carry (4, 4).
    run = run_of(chain(FIRST, SECOND, bias=[-1.0, 0.5]))
    assert scores_of(run)["3.weight"].tolist() == [[3, 7]]
    assert scores_of(run, biases=True)["3.weight"].tolist() == [[4, 8]]
    assert run.state.model[1].bias.tolist() == [-1, 0.5]


def test_flow_is_conserved_by_layers_and_by_hidden_units():
    torch.manual_seed(0)
    sizes = (12, 9, 7, 5)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    model = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    run = run_of(model, shape=(3, 2, 2))
    found = list(scores_of(run).values())
    flow = torch.ones(12, dtype=torch.float64)
    for layer in layers:
        flow = layer.weight.detach().double().abs() @ flow
    for score in found:
        torch.testing.assert_close(score.sum(), flow.sum())
    for before, after in pairwise(found):
        torch.testing.assert_close(before.sum(dim=1), after.sum(dim=0))


def test_every_parameter_and_buffer_counts_by_its_absolute_value():
    trainer, mirrored = (tiny_trainer("synflow", model="conv") for _ in range(2))
    with torch.no_grad():
        for norm in ("norm1", "norm2"):
            getattr(trainer.state.model, norm).running_mean.fill_(0.5)
            getattr(mirrored.state.model, norm).running_mean.fill_(-0.5)
            getattr(mirrored.state.model, norm).weight.neg_()
        for weight in mirrored.state.weights.values():
            weight.neg_()
    found, expected = scores_of(mirrored), scores_of(trainer)
    for name, score in found.items():
        assert torch.equal(score, expected[name])
        assert score.any()
    # Normalisation is that of evaluation: |0.5| is subtracted, which batch statistics would not.
    trainer.state.model.norm1.running_mean.zero_()
    assert not torch.equal(scores_of(trainer)["conv2.weight"], expected["conv2.weight"])


class Indexed(nn.Linear):
    """Has positions among its buffers, as relative attention has."""

    def __init__(self):
        super().__init__(2, 2, bias=False)
        self.register_buffer("order", torch.tensor([1, 0]))

    def forward(self, x):
        return super().forward(x)[:, self.order]


def test_buffers_of_integers_stay_as_they_are():
    model = nn.Sequential(nn.Flatten(), Indexed())
    model[1].weight.data.copy_(torch.tensor(FIRST))
    scores = scores_of(run_of(model))
    assert torch.equal(scores["1.weight"], torch.tensor(FIRST).abs().double())


@dataclass(frozen=True)
class Watched(SynFlow):
    def scores(self, run):
        log.append((copied(run.state.masks), run.state.model.training))
        return super().scores(run)


log: list[tuple[dict[str, torch.Tensor], bool]] = []


def test_density_falls_exponentially_and_masks_are_nested():
    trainer = tiny_trainer(Watched(rounds=4), density=0.0625)
    log.clear()
    next(trainer.run())
    # 12,448 weights at 1, 1/2, 1/4, 1/8 before the rounds, and 1/16 after the last.
    counts = [sum(nonzero(masks).values()) for masks, _ in log]
    assert counts == [12448, 6224, 3112, 1556]
    assert sum(nonzero(trainer.state.masks).values()) == 778
    rounds = [masks for masks, _ in log] + [trainer.state.masks]
    for before, after in pairwise(rounds):
        assert all(torch.equal(mask * before[name], mask) for name, mask in after.items())
    assert not any(training for _, training in log)
    assert trainer.state.model.training


def test_a_hundred_rounds_are_the_default():
    log.clear()
    next(tiny_trainer(Watched(), density=0.1).run())
    assert len(log) == 100
    assert sum(nonzero(log[50][0]).values()) == keep_count(12448, 0.1**0.5)


def test_rounds_keep_every_layer_where_one_shot_and_magnitude_lose_one():
    def layers(method, density):
        trainer = tiny_trainer(method, density=density)
        next(trainer.run())
        return list(nonzero(trainer.state.masks).values())

    # 12 and 3 of 12,448 weights; three layers of one weight each are the sparsest path there is.
    for keep in (12, 3):
        found = layers(SynFlow(), keep / 12448)
        assert min(found) >= 1
        assert sum(found) == keep
    assert min(layers(SynFlow(rounds=1), 12 / 12448)) == 0
    assert min(layers(MagnitudeAtInit(), 12 / 12448)) == 0


def test_a_deep_network_overflows_single_precision_and_is_pruned_all_the_same():
    # 50 layers of 10 ones on 10 ones: R = 10^51, and single precision ends at 3.4 * 10^38.
    layers = [nn.Linear(10, 10, bias=False) for _ in range(50)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    run = run_of(nn.Sequential(nn.Flatten(), *layers), density=0.3, shape=(10, 1, 1))
    scores = scores_of(run)
    for score in scores.values():
        torch.testing.assert_close(score.sum().item(), 1e51)
    with torch.no_grad():
        SynFlow(rounds=3).start_phase(run)
    assert sum(nonzero(run.state.masks).values()) == 1500


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_neither_data_nor_the_signed_network_are_touched(model):
    trainer = tiny_trainer("synflow", model=model)
    before = copied(trainer.state.model.state_dict())

    def refuse(*args, **kwargs):
        raise AssertionError("SynFlow looks at no image")

    trainer.batches = trainer.logits = trainer.loss = trainer.gradients = refuse
    with torch.no_grad():
        trainer.method.start_phase(trainer)
    for name, tensor in trainer.state.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype
    assert trainer.cursor.extra_batches == 0


def test_masks_stay_while_the_network_trains():
    trainer = tiny_trainer("synflow", model="conv", density=0.1)
    steps = trainer.run()
    next(steps)
    masks = copied(trainer.state.masks)
    for _ in steps:
        assert all(torch.equal(trainer.state.masks[name], mask) for name, mask in masks.items())
    losses = [point.train_loss for point in trainer.cursor.curve]
    assert losses[-1] < losses[0]
