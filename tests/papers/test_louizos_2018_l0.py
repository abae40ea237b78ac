"""Louizos et al., 2018, arXiv:1712.01312: hard-concrete gates and their expected L0 norm."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from methods.l0 import L0, chance_open, drawn_gate, final_gate, gates_of
from tests.tiny import TINY_RECIPE, copied, started, tiny_trainer, train

THIRDS = 2 / 3

ADAM = dataclasses.replace(TINY_RECIPE, optimizer="adam", lr=0.1, momentum=0.0, nesterov=False)


def set_gates(state, values):
    """Writes log_alpha of the only layer, in its average too."""
    ((name, gate),) = gates_of(state)
    gate.log_alpha.data.copy_(torch.as_tensor(values).expand_as(gate.log_alpha))
    path = name.removesuffix("weight")
    state.slots["average"][f"{path}parametrizations.weight.0.log_alpha"].copy_(
        gate.log_alpha.detach()
    )
    return gate.log_alpha


# The distribution.


@pytest.mark.parametrize(
    ("log_alpha", "chance"),
    # sigmoid(log_alpha + 2/3 log 11), 2/3 log 11 = 1.598597
    [(-4.60517, 0.04713), (-1.598597, 0.5), (0.0, 0.83182), (0.8473, 0.92026), (4.605, 0.99798)],
)
def test_the_chance_of_an_open_gate(log_alpha, chance):
    assert float(chance_open(torch.tensor(log_alpha), THIRDS)) == pytest.approx(chance, abs=6e-6)


@pytest.mark.parametrize(("log_alpha", "chance"), [(0.0, 0.83182), (-2.398, 0.31017)])
def test_gates_are_open_as_often_as_the_formula_says(log_alpha, chance):
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    gates = drawn_gate(torch.full_like(u, log_alpha), u, THIRDS)
    assert float((gates > 0).double().mean()) == pytest.approx(chance, abs=0.01)
    assert gates.min() == 0
    assert gates.max() == 1
    if log_alpha == 0:  # 1 - sigmoid(2/3 log 11)
        assert float((gates == 1).double().mean()) == pytest.approx(0.16818, abs=0.01)


@pytest.mark.parametrize(
    ("u", "gate"),
    # log_alpha 0: odds (u / (1 - u))^1.5 = 1, 8, 1/8, 27, 1/27; gate 1.2 odds / (1 + odds) - 0.1
    [(0.5, 0.5), (0.8, 29 / 30), (0.2, 1 / 30), (0.9, 1.0), (0.1, 0.0), (0.0, 0.0), (1.0, 1.0)],
)
def test_a_gate_follows_from_its_draw(u, gate):
    found = drawn_gate(torch.zeros(()), torch.tensor(u), THIRDS)
    assert float(found) == pytest.approx(gate, abs=1e-6)


@pytest.mark.parametrize(
    ("log_alpha", "gate"),
    [
        # 1.2 sigmoid - 0.1 reaches 0 at -log 11 = -2.397895, and 1 at log 11.
        (-2.3980, 0.0),
        (-2.3978, 9e-6),
        (0.0, 0.5),
        (1.0, 0.777270),  # not 0.881, which it were with a division by the temperature
        (2.3978, 1 - 9e-6),
        (2.3980, 1.0),
    ],
)
def test_the_final_gate_has_no_temperature(log_alpha, gate):
    found = float(final_gate(torch.tensor(log_alpha, dtype=torch.float64)))
    assert found == pytest.approx(gate, abs=2e-6)
    assert (found in (0, 1)) == (gate in (0, 1))


# The layers.


def test_a_group_is_an_input_unit_or_a_filter():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(7, 5))
    shapes = [gate.log_alpha.shape for _, gate in gates_of(started(L0(), model))]
    assert shapes == [(6, 1, 1, 1), (1, 7)]


def test_a_gate_for_each_weight():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(7, 5))
    state = started(L0(gates="weight"), model)
    for name, gate in gates_of(state):
        assert gate.log_alpha.shape == state.weights[name].shape


def test_closed_gates_silence_inputs_and_filters():
    linear, conv = nn.Linear(3, 2), nn.Conv2d(1, 2, 3)
    set_gates(started(L0(), linear), [[4.0, -4.0, 4.0]])
    set_gates(started(L0(), conv), torch.tensor([-4.0, 4.0]).view(2, 1, 1, 1))
    for module in (linear, conv):
        module.eval()
    assert torch.equal(linear.weight != 0, torch.tensor([[True, False, True]] * 2))
    assert not conv.weight[0].any()
    assert conv.weight[1].all()
    original = linear.parametrizations.weight.original
    assert torch.equal(linear.weight[:, 0], original[:, 0])  # z is 1 at 4


def test_gates_are_drawn_anew_in_training_only():
    linear = nn.Linear(50, 20)
    started(L0(), linear)
    first, second = linear.weight, linear.weight
    assert not torch.equal(first, second)
    # One gate for the whole column: the ratio to the weight is the same in all rows.
    ratio = first / linear.parametrizations.weight.original
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    linear.eval()
    assert torch.equal(linear.weight, linear.weight)


@pytest.mark.parametrize("gates", ["group", "weight"])
def test_gates_begin_at_the_dropout_rate_asked_for(gates):
    # log(0.8 / 0.2) = 1.386294
    state = started(L0(gates=gates, droprate_init=0.2), nn.Linear(2000, 3))
    ((_, gate),) = gates_of(state)
    assert float(gate.log_alpha.detach().mean()) == pytest.approx(math.log(4), abs=2e-3)
    assert float(gate.log_alpha.detach().std()) == pytest.approx(0.01, rel=0.1)


# The penalty.


@pytest.mark.parametrize("gates", ["group", "weight"])
def test_expected_number_of_open_weights_in_the_first_layer_of_lenet(gates):
    method = L0(gates=gates)
    state = started(method, nn.Linear(784, 300))
    set_gates(state, 0.0)
    (chances,) = method.open_probability(state).values()
    assert chances.shape == (300, 784)
    # 0.83182 * 784 * 300; with the 300 biases it is the 195,944.58 of the published code.
    assert float(chances.double().sum()) + 300 == pytest.approx(195_944.58, abs=0.1)


@pytest.mark.parametrize(("gates", "size"), [("group", 300), ("weight", 1)])
@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_the_price_is_per_weight_and_per_image(gates, size, log_alpha):
    method = L0(gates=gates, lam=0.1)
    state = started(method, nn.Linear(784, 300), examples=60_000)
    gate = set_gates(state, log_alpha)
    penalty = method.penalty(state)
    p = 1 / (1 + math.exp(-log_alpha - 1.598597))
    assert float(penalty.detach()) == pytest.approx(0.1 / 60_000 * 784 * 300 * p, rel=1e-5)
    penalty.backward()
    expected = torch.full_like(gate, 0.1 / 60_000 * p * (1 - p) * size)
    torch.testing.assert_close(gate.grad, expected, rtol=1e-4, atol=0)


def test_weight_decay_counts_as_much_as_the_gate_is_open():
    # Inputs of squared norms 9 + 16 and 4 + 0, open with 0.83182 and 0.5:
    # 0.01 / 2 * (0.83182 * 25 + 0.5 * 4) + 3 / 100 * 2 * (0.83182 + 0.5)
    method, linear = L0(lam=3.0), nn.Linear(2, 2)
    linear.weight.data.copy_(torch.tensor([[3.0, 2.0], [4.0, 0.0]]))
    state = started(method, linear, weight_decay=0.01, examples=100)
    set_gates(state, [[0.0, -1.598597]])
    penalty = method.penalty(state)
    assert float(penalty.detach()) == pytest.approx(0.1139775 + 0.0799092, abs=1e-6)
    penalty.backward()
    weight = state.weights["weight"]
    expected = 0.01 * torch.tensor([[3 * 0.83182, 2 * 0.5], [4 * 0.83182, 0.0]])
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_the_optimizer_decays_what_has_no_gate():
    state = started(L0(), nn.Linear(3, 2), weight_decay=0.01)
    decay = {id(p): g["weight_decay"] for g in state.optimizer.param_groups for p in g["params"]}
    found = {name: decay[id(p)] for name, p in state.model.named_parameters()}
    assert found == {
        "bias": 0.01,
        "parametrizations.weight.original": 0.0,
        "parametrizations.weight.0.log_alpha": 0.0,
    }


def test_log_alpha_stays_where_gradients_reach_it():
    method = L0()
    state = started(method, nn.Linear(3, 2))
    gate = set_gates(state, [[-20.0, 1.0, 20.0]])
    with torch.no_grad():
        method.project(state)
    torch.testing.assert_close(gate.detach(), torch.tensor([[-4.60517, 1.0, 4.60517]]))


# The moving average.


def test_the_moving_average_is_corrected_for_its_beginning():
    # Spans 4 of 80 steps; 1, 2, 3 weigh 0.25 * (0.75^2, 0.75, 1), in all 1 - 0.75^3:
    # (0.140625 + 0.375 + 0.75) / 0.578125 = 2.189189
    method, linear = L0(average=4), nn.Linear(2, 2)
    linear.bias.data.fill_(1.0)
    state = started(method, linear, steps=80)  # the first of the values
    for value in (2.0, 3.0):
        linear.bias.data.fill_(value)
        with torch.no_grad():
            method.project(state)
    torch.testing.assert_close(state.slots["average"]["bias"], torch.full((2,), 2.189189))


@pytest.mark.parametrize("average", [1, 3, 1000])
def test_the_finished_network_is_the_average_behind_its_gates(average):
    trainer = tiny_trainer(L0(average=average, gates="weight"), steps=80, recipe=ADAM)
    seen = []
    for _ in trainer.run():
        seen.append(copied(dict(trainer.state.model.named_parameters())))
    keep = 1 - 1 / min(average, 4)  # a twentieth of 80 steps
    shares = [keep ** (79 - i) for i in range(80)]
    # The initial weights are left out here: their share is 0.75^80 at most, 1e-10.
    mean = {
        name: sum(s * p[name].double() for s, p in zip(shares, seen, strict=True)) / sum(shares)
        for name in seen[0]
    }
    model = trainer.state.model
    for layer in ("fc1", "fc2", "classifier"):
        original = mean[f"{layer}.parametrizations.weight.original"]
        gate = final_gate(mean[f"{layer}.parametrizations.weight.0.log_alpha"])
        found = model.get_parameter(f"{layer}.weight").detach().double()
        torch.testing.assert_close(found, original * gate, rtol=1e-4, atol=1e-6)
        bias = model.get_parameter(f"{layer}.bias").detach().double()
        torch.testing.assert_close(bias, mean[f"{layer}.bias"], rtol=1e-4, atol=1e-6)


# Real runs.


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("gates", ["group", "weight"])
def test_a_higher_price_leaves_fewer_weights(model, gates):
    left, expected = [], []
    for lam in (0.0, 0.1, 10.0):
        method = L0(lam=lam, gates=gates)
        trainer = train(tiny_trainer(method, model=model, steps=80, recipe=ADAM))
        weights = {n: trainer.state.model.get_parameter(n) for n in trainer.state.masks}
        for name, mask in trainer.state.masks.items():
            assert torch.equal(mask != 0, weights[name] != 0)
        left.append(sum(int(weight.count_nonzero()) for weight in weights.values()))
        expected.append(sum(float(p.sum()) for p in trainer.open_probability.values()))
    assert left[0] > left[1] > left[2]
    assert expected[0] > expected[1] > expected[2] > 0


@pytest.mark.parametrize("gates", ["group", "weight"])
@pytest.mark.parametrize("lam", [0.0, 10.0])
def test_a_target_is_hit_exactly_by_gate_times_magnitude(lam, gates):
    method = L0(lam=lam, gates=gates, target=0.9, average=1)
    trainer = tiny_trainer(method, steps=60, recipe=ADAM)
    for _ in trainer.run():
        last = copied(method.importance(trainer))
    model, masks = trainer.state.model, trainer.state.masks
    weights = {name: model.get_parameter(name) for name in masks}
    assert sum(int(weight.count_nonzero()) for weight in weights.values()) == 1245
    kept = torch.cat([last[name][mask == 1] for name, mask in masks.items()])
    dropped = torch.cat([last[name][mask == 0] for name, mask in masks.items()])
    assert kept.min() >= dropped.max()
    for name, weight in weights.items():
        gated = last[name] * masks[name]
        torch.testing.assert_close(weight.abs(), gated, rtol=1e-6, atol=1e-11)


def test_networks_looked_at_during_training_have_the_final_gates():
    trainer = tiny_trainer("l0")
    iterator = trainer.run()
    next(iterator)
    model = trainer.state.model.eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), model(images))


def test_the_defaults_are_the_papers():
    method = L0()
    assert (method.gates, method.lam, method.temperature) == ("group", 0.1, 2 / 3)
    assert (method.droprate_init, method.average) == (0.5, 1000)
