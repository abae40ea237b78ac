"""Bellec et al., 2018, arXiv:1711.05136: soft-DEEP R, whose number of connections is free."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from methods.allocation import allocate
from methods.api import OptimizerSettings, TrainState
from methods.masking import GROWN
from methods.soft_deepr import SignedReLU, SoftDeepR
from tests.contract.checks import network_weight
from tests.tiny import TINY_RECIPE, FakeRun, copied, nonzero, tiny_trainer, train


def linear_state(method, size, *, lr=0.05):
    """One layer of size[0] x size[1], and its FakeRun after `start_phase`."""
    torch.manual_seed(0)
    model = nn.Linear(size[1], size[0], bias=False)
    masks = {"weight": torch.ones_like(model.weight.detach())}
    weights = method.prepare(model, masks, (1, 1, size[1]))
    rate = torch.tensor(lr)
    optimizer = method.optimizer(weights, {}, rate, OptimizerSettings())
    run = FakeRun(TrainState(model, weights, masks, optimizer, rate, torch.zeros(())))
    with torch.no_grad():
        method.start_phase(run)
        method.project(run.state)
    return run


@torch.no_grad()
def step(method, state, gradient=0.0):
    for theta in state.weights.values():
        theta.grad = (theta > 0) * torch.as_tensor(gradient)
    method.edit_gradients(state)
    state.optimizer.step()
    method.project(state)


def test_the_weight_is_theta_with_its_sign_where_theta_is_above_0():
    soft = SignedReLU(torch.tensor([0.3, -0.3, -0.1, 0.2]))
    theta = torch.tensor([0.5, 0.25, -0.5, 0.0], requires_grad=True)
    weight = soft(theta)
    assert weight.tolist() == [0.5, -0.25, 0.0, 0.0]
    weight.sum().backward()
    assert theta.grad.tolist() == [1, -1, 0, 0]  # the dormant have none


def test_theta_min_of_the_published_defaults():
    # eta 0.05, noise = alpha = 1e-5: T = eta noise^2 / 2 = 2.5e-12, beta = alpha / T = 4e6;
    # p 0.005: -0.995 / (0.005 * 4e6) = -4.975e-5.
    run = linear_state(SoftDeepR(scope="uniform"), (20, 100))
    wall = run.state.slots["theta_min"]["weight"]
    assert float(wall) == pytest.approx(-4.975e-5, rel=1e-5)
    # p 0.1: -0.9 / (0.1 * 4e6).
    run = linear_state(SoftDeepR(active=0.1), (20, 100))
    assert float(run.state.slots["theta_min"]["weight"]) == pytest.approx(-2.25e-6, rel=1e-5)


def test_the_walls_are_as_many_steps_of_noise_away_whatever_l1_and_rate():
    for l1, lr in ((1e-5, 0.05), (1e-3, 0.05), (1e-3, 0.4)):
        run = linear_state(SoftDeepR(l1=l1, active=0.1), (20, 100), lr=lr)
        wall = float(run.state.slots["theta_min"]["weight"])
        assert wall / (lr * l1) == pytest.approx(-4.5, rel=1e-4)


def test_theta_min_follows_the_base_rate_though_warmup_begins_at_none():
    walls = []
    for warmup in (0.0, 0.5):
        trainer = tiny_trainer(
            SoftDeepR(active=0.1), recipe=dataclasses.replace(TINY_RECIPE, warmup=warmup)
        )
        next(trainer.run())
        walls.append(float(trainer.state.slots["theta_min"]["fc1.weight"]))
    assert walls[0] == walls[1] < 0


def test_each_layer_starts_with_its_count_and_the_rest_spread_down_to_theta_min():
    trainer = tiny_trainer(SoftDeepR(active=0.1, l1=1e-3))
    start = {name: network_weight(trainer.state.model, name) for name in trainer.state.masks}
    with torch.no_grad():
        trainer.method.start_phase(trainer)
    state = trainer.state
    shapes = {name: tuple(theta.shape) for name, theta in state.weights.items()}
    counts = allocate(shapes, 0.1, "erk")
    for name, theta in state.weights.items():
        active, wall = theta > 0, float(state.slots["theta_min"][name])
        assert int(active.sum()) == counts[name]
        weight = network_weight(state.model, name)
        assert torch.equal(weight[active], start[name][active])
        assert not weight[~active].any()
        if name == "fc1.weight":
            depth = theta.detach()[~active] / wall  # uniform: mean 1/2, deviation 0.289
            assert 0 <= float(depth.min()) <= float(depth.max()) <= 1
            assert float(depth.mean()) == pytest.approx(0.5, abs=0.02)
            assert float(depth.std()) == pytest.approx(0.289, abs=0.01)
        # p is the layer's own: theta_min = -(1 - p) / p * eta alpha / 2, eta = 0.05 / (1 - 0.9).
        p = counts[name] / theta.numel()
        assert wall == pytest.approx(-(1 - p) / p * 0.5 * 1e-3 / 2, rel=1e-4)


def test_active_ones_get_gradient_and_l1_dormant_ones_neither():
    method = SoftDeepR(l1=0.2, noise_ratio=0.0, active=0.5, scope="uniform")
    run = linear_state(method, (4, 5), lr=0.1)
    theta = run.state.weights["weight"].detach()
    run.state.slots["theta_min"]["weight"].fill_(-1.0)
    before = torch.tensor([1.0, 0.5, -0.5, 0.0] * 5).view(4, 5)
    theta.copy_(before)
    step(method, run.state, gradient=2.0)
    # theta - eta g - eta alpha = theta - 0.1 * 2 - 0.1 * 0.2
    expected = torch.where(before > 0, before - 0.22, before)
    torch.testing.assert_close(theta.detach(), expected)


def test_noise_reaches_all_and_theta_min_is_a_floor():
    method = SoftDeepR(l1=0.2, noise_ratio=2.0, active=0.1, scope="uniform")
    run = linear_state(method, (200, 100), lr=0.1)
    theta = run.state.weights["weight"].detach()
    wall = run.state.slots["theta_min"]["weight"].fill_(-9.0)
    theta.fill_(-5.0)
    step(method, run.state)
    # eta noise = 0.1 * 0.2 * 2
    assert float((theta + 5).std()) == pytest.approx(0.04, rel=0.03)
    wall.fill_(-5.01)
    step(method, run.state)
    assert float(theta.min()) == pytest.approx(-5.01)
    assert 0.2 < float((theta == wall).float().mean()) < 0.8


def test_without_data_the_fraction_active_stays_at_p():
    # Noise of many steps of L1: the walk is fine enough for the rule, which is of continuous time.
    method = SoftDeepR(l1=1e-3, noise_ratio=5.0, active=0.2, scope="uniform")
    run = linear_state(method, (40, 50), lr=1.0)
    state, theta = run.state, run.state.weights["weight"].detach()
    # The stationary density above 0 is exponential with scale T / alpha = 0.5 * 25e-3 = 0.0125.
    with torch.no_grad():
        scale = torch.empty_like(theta).exponential_() * 0.0125
        theta.copy_(torch.where(theta > 0, scale, theta))
    seen = []
    for done in range(1500):
        step(method, state)
        if done % 10 == 0:
            seen.append(float((theta > 0).float().mean()))
    assert sum(seen[30:]) / len(seen[30:]) == pytest.approx(0.2, abs=0.04)


def test_the_number_is_free_and_theta_min_holds_in_a_run():
    trainer = tiny_trainer(SoftDeepR(l1=3e-3, active=0.3), steps=40)
    counts, signs = [], None
    for _ in trainer.run():
        state = trainer.state
        for name, theta in state.weights.items():
            assert (theta >= state.slots["theta_min"][name]).all()
        weights = {name: network_weight(state.model, name) for name in state.masks}
        counts.append(sum(nonzero(weights).values()))
        found = {name: state.model.get_buffer(_sign(name)).clone() for name in weights}
        signs = signs or found
        assert all(torch.equal(found[name], signs[name]) for name in found)
        for name, weight in weights.items():
            assert (weight * signs[name] >= 0).all()
    assert len(set(counts)) > 20
    assert sum(nonzero(dict(trainer.state.model.named_parameters())).values()) > 0
    weights = {name: trainer.state.model.get_parameter(name) for name in trainer.state.masks}
    assert sum(nonzero(weights).values()) == counts[-1]
    assert nonzero(trainer.state.masks) == nonzero(weights)


def _sign(name):
    return f"{name.rpartition('.')[0]}.parametrizations.weight.0.sign"


def test_more_l1_leaves_fewer_connections():
    left = []
    for l1 in (1e-5, 1e-3, 1e-2):
        state = train(tiny_trainer(SoftDeepR(l1=l1, active=0.5), steps=48)).state
        left.append(sum(nonzero(state.masks).values()))
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize(("target", "kept"), [(0.9, 1245), (0.2, 9958)])
def test_a_target_keeps_the_largest_thetas_dormant_ones_last(target, kept):
    trainer = tiny_trainer(SoftDeepR(active=0.3, target=target), steps=6)
    thetas = {}
    for _ in trainer.run():
        thetas = copied(trainer.state.weights)
    flat = torch.cat([theta.flatten() for theta in thetas.values()])
    mask = torch.cat([mask.flatten() for mask in trainer.state.masks.values()]) == 1
    weights = [trainer.state.model.get_parameter(name) for name in trainer.state.masks]
    weight = torch.cat([w.detach().flatten() for w in weights])
    assert int(mask.sum()) == kept == int(weight.count_nonzero())
    assert float(flat[mask].min()) >= float(flat[~mask].max())
    revived = mask & (flat <= 0)
    assert (weight[revived] == GROWN).all()
    assert bool(revived.any()) == (target == 0.2)


def test_adam_does_not_move_dormant_connections():
    recipe = dataclasses.replace(
        TINY_RECIPE, optimizer="adam", lr=1e-2, momentum=0.0, nesterov=False
    )
    trainer = tiny_trainer(SoftDeepR(l1=1e-3, active=0.3), recipe=recipe)
    for _ in trainer.run():
        for theta in trainer.state.weights.values():
            memory = trainer.state.optimizer.state[theta]
            assert not memory["exp_avg"][theta <= 0].any()
    assert any(
        trainer.state.optimizer.state[t]["exp_avg"].any() for t in trainer.state.weights.values()
    )


def test_the_defaults_are_the_published_codes():
    method = SoftDeepR()
    assert (method.l1, method.noise_ratio, method.active) == (1e-5, 1.0, 0.005)
