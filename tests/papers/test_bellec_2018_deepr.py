"""Bellec et al., 2018, arXiv:1711.05136: deep rewiring with a fixed number of connections."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
import torch

from bench.errors import SuiteError
from bench.resolve import make_method
from methods import ranking
from methods.api import OptimizerSettings
from methods.deepr import DeepR, drawn, dsr_noise, first_of
from methods.masking import GROWN, random_scores
from methods.random_pruning import RandomPruning
from tests.tiny import TINY_RECIPE, copied, hand_state, nonzero, tiny_trainer, train

QUIET = DeepR(l1=0.0, noise=0.0)
LOUD = {"l1": 0.05, "noise": 0.3}
"""Enough for dozens of connections to close in every step of a tiny run."""


def hand(method, weights, masks, *, momentum=0.0, lr=0.1):
    """A state with the method's own optimizer and signs; layers called "a", "b", ..."""
    torch.manual_seed(0)
    names = "abc"[: len(weights)]
    state = hand_state(dict(zip(names, weights, strict=True)), dict(zip(names, masks, strict=True)))
    state.lr.fill_(lr)
    settings = OptimizerSettings("sgd", momentum)
    state.optimizer = method.optimizer(state.weights, {}, state.lr, settings)
    state.slots["sign"] = {
        name: torch.where(w.detach() < 0, -1.0, 1.0) for name, w in state.weights.items()
    }
    state.slots["share"] = {name: mask.sum() for name, mask in state.masks.items()}
    return state


@torch.no_grad()
def step(method, state, gradients):
    """One training step with these gradients; the weights before rewiring."""
    for weight, gradient in zip(state.weights.values(), gradients, strict=True):
        weight.grad = torch.tensor(gradient)
    method.edit_gradients(state)
    state.optimizer.step()
    moved = copied(state.weights)
    method.project(state)
    return moved


def steps_of(trainer):
    """Masks and weights after each step."""
    return [(copied(trainer.state.masks), copied(trainer.state.weights)) for _ in trainer.run()]


def test_one_step_by_hand():
    # eta 0.1, alpha 0.5: theta - eta S g - eta alpha = 1 - 0.1 * 2 - 0.05, and so on.
    state = hand(DeepR(l1=0.5, noise=0.0), [[1.0, -1.0, 0.04, 0.0]], [[1.0, 1, 1, 0]])
    moved = step(DeepR(l1=0.5, noise=0.0), state, [[2.0, 3.0, 0.0, 9.0]])["a"]
    # The second: -(1 + 0.1 * 3 - 0.05); the third falls to 0.04 - 0.05; the fourth is dormant.
    torch.testing.assert_close(moved, torch.tensor([0.75, -1.25, -0.01, 0.0]))
    mask, weight = state.masks["a"], state.weights["a"].detach()
    assert mask.sum() == 3
    torch.testing.assert_close(weight[:2], moved[:2])
    assert weight[2:].sort().values.tolist() == [0.0, torch.tensor(GROWN).item()]
    assert torch.equal(weight != 0, mask == 1)


def test_a_connection_opens_at_the_least_value_with_its_old_sign():
    state = hand(QUIET, [[-0.1, -0.1]], [[1.0, 1]])
    step(QUIET, state, [[-3.0, -3.0]])  # both cross to 0.2; with all active only they can open
    assert state.masks["a"].tolist() == [1, 1]
    assert state.weights["a"].detach().equal(torch.full((2,), -GROWN))


def test_one_that_stops_exactly_at_zero_closes():
    state = hand(QUIET, [[0.25, 1.0] + [0.0] * 998], [[1.0, 1] + [0] * 998], lr=0.5)
    step(QUIET, state, [[0.5] + [0.0] * 999])
    assert int(state.masks["a"].sum()) == 2
    assert state.masks["a"][0] == 0  # it could be drawn again, with a chance of 1 in 999


def test_noise_is_eta_times_its_deviation_and_reaches_active_connections_only():
    method = DeepR(l1=0.0, noise=0.2)
    state = hand(method, [torch.full((20000,), 9.0)], [torch.arange(20000) % 2], lr=0.5)
    moved = step(method, state, [[0.0] * 20000])["a"]
    heat = moved[1::2] - 9
    # sqrt(2 eta T) with T = eta noise^2 / 2 is eta noise = 0.1.
    assert float(heat.std()) == pytest.approx(0.1, rel=0.03)
    assert abs(float(heat.mean())) < 0.003
    assert (moved[::2] == 9).all()  # never moved; `project` is what sets it to zero


@pytest.mark.parametrize(("matched", "moved"), [(True, 0.7), (False, 0.97)])
def test_the_rate_is_matched_to_the_recipes_momentum(matched, moved):
    # lr 0.1, momentum 0.9: eta = 1, 1 - 1 * (0.2 + alpha 0.1); unmatched 1 - 0.1 * 0.3.
    method = DeepR(l1=0.1, noise=0.0, matched=matched)
    state = hand(method, [[1.0]], [[1.0]], momentum=0.9)
    assert step(method, state, [[0.2]])["a"].item() == pytest.approx(moved)
    # Plain: the second step is as long as the first.
    assert step(method, state, [[0.2]])["a"].item() == pytest.approx(2 * moved - 1)


class SameMasks(RandomPruning):
    """Random masks from the stream that deep rewiring draws its own from."""

    def scores(self, run):
        return random_scores(run)


def test_without_noise_l1_and_crossings_it_is_masked_sgd():
    recipe = dataclasses.replace(
        TINY_RECIPE, lr=1e-6, momentum=0.0, nesterov=False, weight_decay=0.0
    )
    found = train(tiny_trainer(QUIET, model="conv", recipe=recipe)).state
    masked = train(tiny_trainer(SameMasks(scope="erk"), model="conv", recipe=recipe)).state
    start = tiny_trainer(QUIET, model="conv", recipe=recipe).state
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, masked.model.state_dict()[name]), name
    weight = found.weights["conv2.weight"]
    assert not torch.equal(weight, start.weights["conv2.weight"] * found.masks["conv2.weight"])


def test_everything_but_the_weights_keeps_the_recipes_optimizer():
    trainer = tiny_trainer("deepr", model="conv")
    rewired, others = trainer.state.optimizer.param_groups
    assert {id(p) for p in rewired["params"]} == set(map(id, trainer.state.weights.values()))
    assert (rewired["momentum"], rewired["nesterov"], rewired["weight_decay"]) == (0, False, 0)
    assert (others["momentum"], others["nesterov"], others["weight_decay"]) == (0.9, True, 5e-4)
    train(trainer)
    memory = trainer.state.optimizer.state
    assert all(memory[p]["momentum_buffer"].any() for p in others["params"])
    assert all(memory[p].get("momentum_buffer") is None for p in rewired["params"])


@pytest.mark.parametrize("options", [{}, {"variant": "dsr"}])
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_the_number_of_connections_of_each_layer_holds_in_every_step(model, options):
    trainer = tiny_trainer(DeepR(l1=0.05, noise=0.3, **options), model=model)
    history = steps_of(trainer)
    first = nonzero(history[0][0])
    changed = 0
    for (before, _), (masks, weights) in itertools.pairwise(history):
        assert nonzero(masks) == first
        changed += sum(int((masks[name] != before[name]).sum()) for name in masks)
        for name, mask in masks.items():
            assert not weights[name][mask == 0].any()
            if not options:
                theta = weights[name] * trainer.state.slots["sign"][name]
                assert torch.equal(theta > 0, mask == 1)
    assert changed > 200
    assert nonzero({n: trainer.state.model.get_parameter(n) for n in first}) == first


def test_signs_are_those_of_the_initial_weights_for_good():
    trainer = tiny_trainer(DeepR(**LOUD))
    start = copied(trainer.state.weights)
    history = steps_of(trainer)
    for masks, weights in history[::5]:
        for name, mask in masks.items():
            active = mask == 1
            assert torch.equal(weights[name][active].sign(), start[name][active].sign())


def test_pooled_holds_the_sum_and_moves_connections_between_layers():
    trainer = tiny_trainer(DeepR(pooled=True, **LOUD))
    history = [nonzero(masks) for masks, _ in steps_of(trainer)]
    assert {sum(counts.values()) for counts in history} == {1245}
    assert len({counts["fc1.weight"] for counts in history}) > 5


@pytest.mark.parametrize(("pooled", "host"), [(False, True), (False, False), (True, True)])
def test_where_a_connection_opens_is_uniform_over_the_dormant_ones(pooled, host, monkeypatch):
    monkeypatch.setattr(ranking, "on_host", lambda _: host)  # else: the way that does not wait
    # Three of a layer's four active ones close, among 6 dormant: 3 of 9 positions open.
    method = DeepR(l1=0.0, noise=0.0, pooled=pooled)
    opened = torch.zeros(10)
    state = hand(method, [torch.zeros(10)], [torch.zeros(10)])
    state.slots["share"]["a"].fill_(4)
    for _ in range(3000):
        state.masks["a"].copy_(torch.tensor([1.0, 1, 1, 1] + [0] * 6))
        with torch.no_grad():
            state.weights["a"].copy_(torch.tensor([1.0, -1, -1, -1] + [0] * 6))
            method.project(state)
        assert state.masks["a"].sum() == 4
        opened += state.masks["a"]
    assert opened[0] == 3000  # the one that stayed
    # 1000 each, deviation sqrt(3000 * 1/3 * 2/3) = 26.
    assert ((opened[1:] - 1000).abs() < 100).all()


def test_pooled_draws_the_layer_by_its_number_whatever_is_dormant_there():
    # Targets 60, 60 and 50 of 600, 200 and 100; one closed: shares 0.353, 0.353, 0.294.
    method = DeepR(l1=0.0, noise=0.0, pooled=True)
    sizes, targets = (600, 200, 100), (60, 60, 50)
    start = [(torch.arange(n) < k).float() for n, k in zip(sizes, targets, strict=True)]
    state = hand(method, start, start)
    opened = torch.zeros(3)
    for _ in range(1500):
        for name, mask in zip("abc", start, strict=True):
            state.masks[name].copy_(mask)
            with torch.no_grad():
                state.weights[name].copy_(mask)
        with torch.no_grad():
            state.weights["a"][0] = -1.0
            method.project(state)
        opened += torch.tensor([float((state.weights[n] == GROWN).sum()) for n in "abc"])
    assert opened.sum() == 1500
    # Deviation at most sqrt(1500 / 4) = 19.
    torch.testing.assert_close(opened, torch.tensor([529.0, 529, 441]), atol=75, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_every_set_of_free_positions_is_as_likely_to_be_drawn(count):
    torch.manual_seed(0)
    taken = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 1, 0])
    free = [1, 2, 4, 5, 6, 9]
    sets = Counter(frozenset(drawn(taken, 6, count).tolist()) for _ in range(2000))
    possible = set(map(frozenset, itertools.combinations(free, count)))
    assert set(sets) == possible
    assert taken.sum() == 4  # not written to
    # At most 6 sets of one, 20 of three: 100 each, deviation 10.
    expected = 2000 / len(possible)
    assert all(abs(found - expected) < 5 * expected**0.5 for found in sets.values())


@pytest.mark.parametrize(
    ("count", "chosen"),
    [
        # In the order 4 2 0 3 1 the candidates are 4, 0; then the late ones 2, 1.
        (0, []),
        (1, [4]),
        (2, [0, 4]),
        (3, [0, 2, 4]),
        (4, [0, 1, 2, 4]),
    ],
)
def test_the_first_candidates_are_taken_then_the_late_ones(count, chosen):
    order = torch.tensor([4, 2, 0, 3, 1])
    candidates = torch.tensor([True, False, False, False, True])
    late = torch.tensor([False, True, True, False, False])
    found = first_of(order, candidates, late, torch.tensor(count))
    assert found.nonzero().flatten().tolist() == chosen


def test_adams_memory_of_what_closes_is_cleared():
    recipe = dataclasses.replace(
        TINY_RECIPE, optimizer="adam", lr=1e-2, momentum=0.0, nesterov=False
    )
    trainer = tiny_trainer(DeepR(l1=0.1, noise=1.0), recipe=recipe)
    dormant = 0
    for _ in trainer.run():
        for weight in trainer.state.weights.values():
            memory = trainer.state.optimizer.state[weight]
            fresh = weight.detach().abs() <= 2 * GROWN  # dormant, or opened in this step
            assert not memory["exp_avg"][fresh].any()
            assert not memory["exp_avg_sq"][fresh].any()
            assert memory["exp_avg"][~fresh].any()
            dormant += int(fresh.sum())
    assert dormant > 1000


def dsr_state(weights, masks, **options):
    return hand(DeepR(variant="dsr"), [weights], [masks], **options)


def test_dsr_puts_l1_and_noise_into_the_gradient_and_so_into_momentum():
    method = DeepR(variant="dsr", l1=0.5)
    state = hand(method, [[1.0, -1.0, 0.0]], [[1.0, 1, 0]], momentum=0.9)
    state.progress.fill_(0.95)  # no noise any more
    first = step(method, state, [[2.0, 3.0, 9.0]])["a"]
    # 1 - 0.1 (2 + 0.5); -1 - 0.1 (3 - 0.5)
    torch.testing.assert_close(first, torch.tensor([0.75, -1.25, 0.0]))
    second = step(method, state, [[0.0, 0.0, 9.0]])["a"]
    # momentum 0.9 * 2.5 and the L1 gradient of 0.5: 0.75 - 0.1 * 2.75
    torch.testing.assert_close(second, torch.tensor([0.475, -1.425, 0.0]))


def test_dsr_keeps_the_recipes_momentum_and_leaves_out_its_weight_decay():
    rewired, others = tiny_trainer(DeepR(variant="dsr")).state.optimizer.param_groups
    assert (rewired["momentum"], rewired["nesterov"], rewired["weight_decay"]) == (0.9, True, 0)
    assert (others["momentum"], others["nesterov"], others["weight_decay"]) == (0.9, True, 5e-4)


@pytest.mark.parametrize(
    ("epoch", "temperature"),
    [(0, 1e-5), (24.9, 1e-5), (25, 1e-8), (80, 1e-12), (140, 1e-15), (189, 1e-15), (190, 0.0)],
)
def test_dsr_noise_falls_in_stages(epoch, temperature):
    found = float(dsr_noise(torch.tensor(epoch / 200)))
    assert found == pytest.approx((2 * 0.01 * temperature) ** 0.5, rel=1e-5)


def test_dsr_opens_elsewhere_with_a_sign_yet_unknown():
    method = DeepR(variant="dsr", l1=0.0)
    state = dsr_state([0.1, 1.0, 0.0, 0.0], [1.0, 1, 0, 0])
    step(method, state, [[9.0, 0, 0, 0]])
    assert state.masks["a"][:2].tolist() == [0, 1]
    (new,) = state.masks["a"][2:].nonzero().flatten() + 2
    assert state.weights["a"][new] == 0
    assert state.slots["sign"]["a"][new] == 0
    # It moves below 0, keeps that sign, and closes only when it comes above.
    gradient = torch.zeros(4).index_fill_(0, new, 2.0).tolist()
    step(method, state, [gradient])
    assert state.masks["a"][new] == 1
    assert state.slots["sign"]["a"][new] == -1
    step(method, state, [[-10 * g for g in gradient]])
    assert state.masks["a"][new] == 0
    assert state.masks["a"].sum() == 2


def test_dsr_reopens_what_it_closed_when_there_is_no_other_place():
    method = DeepR(variant="dsr", l1=0.0)
    state = dsr_state([0.1, 0.1, 1.0, 0.0], [1.0, 1, 1, 0])
    step(method, state, [[9.0, 9.0, 0, 0]])
    assert state.masks["a"][2:].tolist() == [1, 1]
    assert state.masks["a"].sum() == 3


def test_dsr_stops_rewiring_at_95_percent():
    for progress, closes in ((0.949, True), (0.95, False)):
        state = dsr_state([0.1, 1.0, 0.0, 0.0], [1.0, 1, 0, 0])
        state.progress.fill_(progress)
        step(DeepR(variant="dsr"), state, [[9.0, 0, 0, 0]])
        assert (state.masks["a"][0] == 0) == closes


def test_it_learns_the_recipes_task():
    losses = {}
    for method in (DeepR(), RandomPruning(scope="erk")):
        trainer = train(tiny_trainer(method, density=0.2, steps=64))
        losses[type(method)] = trainer.cursor.curve[-1].train_loss
    assert losses[DeepR] < losses[RandomPruning] + 0.1
    assert losses[DeepR] < trainer.cursor.curve[0].train_loss - 0.3


@pytest.mark.parametrize("options", [{"l1": -1e-6}, {"noise": -1.0}, {"noise": float("inf")}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(SuiteError, match="lies outside"):
        make_method("deepr", options, "here")


def test_the_defaults_are_the_published_codes():
    method = DeepR()
    assert (method.l1, method.noise, method.variant, method.pooled) == (1e-5, 1e-5, "paper", False)
