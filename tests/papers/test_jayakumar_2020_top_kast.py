"""Jayakumar et al., 2020, arXiv:2106.03517: compute with the top D, update the top D + M."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

import bench.step
from bench.errors import SuiteError
from bench.resolve import make_method
from methods.allocation import allocate, keep_count
from methods.api import Budget
from methods.top_kast import TopKAST
from tests.tiny import (
    FakeRun,
    copied,
    hand_state,
    momentum_of,
    nonzero,
    tiny_model,
    tiny_trainer,
    train,
    watch_updates,
)

EIGHT = [[0.9, -0.8, 0.1, 0.5, -0.6, 0.2, 0.3, -0.4]]


def started(weights, method, *, density=0.25, decay=0.0, momentum=None):
    """A run after the start of its phase."""
    state = hand_state(weights, momentum=momentum)
    state.optimizer.param_groups[0]["weight_decay"] = decay
    run = FakeRun(state, density=density)
    with torch.no_grad():
        method.start_phase(run)
    return run


def test_forward_and_backward_sets_are_the_largest_weights():
    # A: 2 of 8, |w| >= 0.8; B: 4 of 8, |w| >= 0.5.
    state = started({"w": EIGHT}, TopKAST()).state
    assert state.masks["w"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert state.slots["backward"]["w"].tolist() == [[1, 1, 0, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("name", ["adamw", "timm:lamb"])
def test_an_optimizer_that_scales_the_gradient_but_not_its_decay_is_refused(name):
    # The step of a penalty in the gradient would be of one size whatever the coefficient.
    with pytest.raises(ValueError, match=f"the penalty is for weight decay .* not '{name}'"):
        TopKAST().plan(Budget(100, 10, 640, optimizer=name), 0.1)
    TopKAST().plan(Budget(100, 10, 640, optimizer="adam"), 0.1)


def test_the_gradient_is_left_on_the_backward_set_alone():
    state = started({"w": EIGHT}, TopKAST()).state
    state.weights["w"].grad = torch.arange(1, 9.0).reshape(1, 8)
    with torch.no_grad():
        TopKAST().edit_gradients(state)
    assert state.weights["w"].grad.tolist() == [[1, 2, 0, 4, 5, 0, 0, 0]]


@pytest.mark.parametrize(("decay", "l2"), [(0.04, 0.0), (0.0, 0.04), (0.03, 0.01)])
def test_the_penalty_weighs_one_on_a_and_one_over_the_density_on_the_rest_of_b(decay, l2):
    # Coefficient 0.04, D = 1/4: 0.04 w on A, 0.16 w on B without A, nothing elsewhere.
    method = TopKAST(l2=l2)
    state = started({"w": EIGHT}, method, decay=decay).state
    weight = state.weights["w"]
    weight.grad = torch.zeros(1, 8)
    with torch.no_grad():
        method.edit_gradients(state)
    # What the optimizer itself adds; outside B `project` takes it back.
    total = (weight.grad + decay * weight.detach()) * state.slots["backward"]["w"]
    expected = torch.tensor([[0.036, -0.032, 0, 0.08, -0.096, 0, 0, 0]])
    torch.testing.assert_close(total, expected)


def test_weights_outside_the_backward_set_are_held_whatever_the_optimizer_does():
    method = TopKAST()
    state = started({"w": EIGHT}, method, decay=0.5, momentum={"w": torch.ones(1, 8)}).state
    weight = state.weights["w"]
    weight.grad = torch.ones(1, 8)
    with torch.no_grad():
        method.edit_gradients(state)
        state.optimizer.step()
        moved = weight.detach().clone()
        method.project(state)
    before = torch.tensor(EIGHT)
    outside = torch.tensor([[0, 0, 1, 0, 0, 1, 1, 1]]) == 1
    assert not torch.equal(moved[outside], before[outside])
    assert torch.equal(weight[outside], before[outside])
    assert torch.equal(weight[~outside], moved[~outside])
    assert not torch.equal(moved[~outside], before[~outside])


def test_a_weight_that_enters_the_backward_set_brings_no_momentum():
    run = started({"w": EIGHT}, TopKAST())
    state = run.state
    state.optimizer.state[state.weights["w"]]["momentum_buffer"] = torch.ones(1, 8)
    with torch.no_grad():
        # 0.5 shrinks to 0.05 and leaves B; 0.4 takes its place.
        state.weights["w"][0, 3] = 0.05
        TopKAST().update(run)
    assert state.slots["backward"]["w"].tolist() == [[1, 1, 0, 0, 1, 0, 0, 1]]
    assert momentum_of(state, "w").tolist() == [[1, 1, 0, 1, 1, 0, 0, 0]]


def test_the_backward_set_holds_the_forward_set_where_rounding_would_not():
    # D = 0.4 of 1, 3 and 3 weights: 0.4, 1.2 and 1.2, rounded to 1, 1 and 1. Of 0.6, 1.8 and 1.8
    # for B the first rounds to 0, and the others to 2.
    weights = {"a": [[0.1]], "b": [[0.1, 0.2, 0.3]], "c": [[0.4, 0.5, 0.6]]}
    state = started(weights, TopKAST(backward=1.5), density=0.4).state
    assert nonzero(state.masks) == {"a": 1, "b": 1, "c": 1}
    assert nonzero(state.slots["backward"]) == {"a": 1, "b": 2, "c": 2}


def test_both_sets_are_the_same_without_exploration():
    state = started({"w": EIGHT}, TopKAST(backward=1.0)).state
    assert torch.equal(state.slots["backward"]["w"], state.masks["w"])


@pytest.mark.parametrize("scope", ["uniform", "global", "erk"])
@pytest.mark.parametrize(("density", "wide"), [(0.05, 0.1), (0.2, 0.4), (0.7, 1.0)])
def test_both_sets_keep_their_size_and_are_ranked_by_magnitude(scope, density, wide):
    trainer = tiny_trainer(TopKAST(scope=scope), model="conv", density=density)
    shapes = {name: tuple(mask.shape) for name, mask in trainer.state.masks.items()}
    log = watch_updates(trainer)
    for _ in trainer.run():
        state = trainer.state
        backward = state.slots["backward"]
        assert sum(nonzero(state.masks).values()) == keep_count(1432, density)
        assert abs(sum(nonzero(backward).values()) - keep_count(1432, wide)) <= 1
        assert all((backward[name] >= mask).all() for name, mask in state.masks.items())
        if scope != "global":
            assert nonzero(state.masks) == allocate(shapes, density, scope)
            for name, mask in log[-1].masks.items() if log else ():
                size = log[-1].weights[name].abs()
                if 0 < int(mask.sum()) < mask.numel():
                    assert size[mask == 1].min() >= size[mask == 0].max()


def naive(trainer, batches, density):
    """Top-KAST as the paper's equations say it, with SGD and Nesterov momentum, on plain tensors.

    Returns:
        The dense weights at the end, and the last forward sets.
    """
    model = tiny_model("conv").train()
    names, recipe = list(trainer.state.masks), trainer.recipe
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    few, many = (allocate(shapes, d, "uniform") for d in (density, 2 * density))
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    memory = {name: torch.zeros_like(value) for name, value in theta.items()}
    buffers = dict(model.named_buffers())
    inside: dict[str, torch.Tensor] = {name: torch.ones(()) for name in theta}
    forward: dict[str, torch.Tensor] = {}
    for images, labels, lr in batches:
        for name in names:
            order = theta[name].abs().flatten().argsort(descending=True, stable=True)
            rank = torch.empty_like(order)
            rank[order] = torch.arange(len(order))
            forward[name] = (rank < few[name]).view(shapes[name]).float()
            old, inside[name] = inside[name], (rank < many[name]).view(shapes[name]).float()
            memory[name] *= old * inside[name]
        alpha = {
            name: (value * forward.get(name, 1)).requires_grad_() for name, value in theta.items()
        }
        loss = functional.cross_entropy(functional_call(model, alpha | buffers, (images,)), labels)
        for name, g in zip(alpha, torch.autograd.grad(loss, list(alpha.values())), strict=True):
            strength = torch.ones(())
            if name in forward:
                strength = forward[name] + (inside[name] - forward[name]) / density
            change = inside[name] * (g + recipe.weight_decay * strength * theta[name])
            memory[name] = recipe.momentum * memory[name] + change
            theta[name] = theta[name] - lr * (change + recipe.momentum * memory[name])
    return theta, forward


def test_a_real_run_is_the_papers_update_on_plain_tensors(monkeypatch):
    density, batches = 0.25, []
    trainer = tiny_trainer("top_kast", model="conv", density=density, steps=24)
    plain = bench.step.forward

    def spy(model, method, state, images, labels, smoothing):
        batches.append((images.clone(), labels.clone(), float(state.lr)))
        return plain(model, method, state, images, labels, smoothing)

    monkeypatch.setattr(bench.step, "forward", spy)
    start = copied(trainer.state.weights)
    train(trainer)
    theta, forward = naive(trainer, batches, density)
    moved = 0.0
    for name, mask in trainer.state.masks.items():
        assert torch.equal(mask, forward[name])
        found = trainer.state.model.get_parameter(name)
        torch.testing.assert_close(found.detach(), theta[name] * mask, rtol=1e-3, atol=1e-5)
        moved = max(moved, float((theta[name] - start[name]).abs().max()))
    assert moved > 0.05


def test_weights_enter_the_forward_set_from_the_backward_set():
    trainer = tiny_trainer("top_kast", model="conv", density=0.2)
    entered, first = 0, {}
    before = {}
    for _ in trainer.run():
        masks, backward = copied(trainer.state.masks), copied(trainer.state.slots["backward"])
        first = first or masks
        for name, (old, old_backward) in before.items():
            new = (masks[name] == 1) & (old == 0)
            entered += int(new.sum())
            assert bool((old_backward[new] == 1).all())
        before = {name: (masks[name], backward[name]) for name in masks}
    assert entered > 5


def test_weights_stay_bit_for_bit_while_they_are_outside_the_backward_set():
    trainer = tiny_trainer("top_kast", model="conv", density=0.1)
    held, compared = {}, 0
    for _ in trainer.run():
        for name, weight in trainer.state.weights.items():
            outside = trainer.state.slots["backward"][name] == 0
            if name in held:
                both = outside & held[name][0]
                assert torch.equal(weight[both], held[name][1][both])
                compared += int(both.sum())
            held[name] = (outside, weight.detach().clone())
    assert compared > 10_000


def test_sets_change_only_every_so_many_steps():
    (phase,) = TopKAST(every=100).plan(Budget(5000, 100, 3200), 0.1)
    assert [step for step in range(350) if phase.updates.due(step)] == [100, 200, 300]
    # A twentieth of 200 steps at most.
    (phase,) = TopKAST(every=100).plan(Budget(200, 10, 320), 0.1)
    assert phase.updates.every == 10
    (phase,) = TopKAST().plan(Budget(200, 10, 320), 0.1)
    assert phase.updates.count(200) == 199  # and once as the phase starts


def test_the_finished_network_has_the_weights_of_the_last_forward_set():
    trainer = tiny_trainer("top_kast", density=0.1)
    for _ in trainer.run():
        masks, weights = copied(trainer.state.masks), copied(trainer.state.weights)
    for name, mask in masks.items():
        assert torch.equal(trainer.state.model.get_parameter(name), weights[name] * mask)
        assert weights[name][mask == 0].any()


@pytest.mark.parametrize("options", [{"backward": 0.9}, {"every": 0}, {"l2": -1.0}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(SuiteError, match="lies outside"):
        make_method("top_kast", options, "here")
