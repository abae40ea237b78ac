"""Kusupati et al., 2020, arXiv:2002.03231: a soft threshold that each layer learns."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from methods.dense import Dense
from methods.masking import GROWN
from methods.soft_threshold import STR, SoftThreshold
from tests.contract.checks import network_weight
from tests.tiny import TINY_RECIPE, copied, nonzero, tiny_trainer, train

PLAIN = dataclasses.replace(TINY_RECIPE, momentum=0.0, nesterov=False, drops=())


def logit(threshold):
    return math.log(threshold / (1 - threshold))


def thresholds(trainer):
    """s of each layer."""
    return {
        name: parameter.detach().clone()
        for name, parameter in trainer.state.model.named_parameters()
        if name.endswith("threshold_logit")
    }


def test_the_soft_threshold_and_its_gradients_by_hand():
    weight = torch.tensor([[0.5, -0.3], [0.1, -0.2]], requires_grad=True)
    soft = SoftThreshold(weight.detach(), logit(0.2))
    found = soft(weight)
    torch.testing.assert_close(found, torch.tensor([[0.3, -0.1], [0.0, 0.0]]), atol=1e-6, rtol=0)
    (found * torch.tensor([[1.0, 2.0], [4.0, 0.0]])).sum().backward()
    # What lies above the threshold gets its gradient whole, what lies below gets none.
    assert weight.grad.tolist() == [[1, 2], [0, 0]]
    # dS/ds = -sign(w) g'(s) above the threshold, g' = 0.2 * 0.8: -(1 - 2) * 0.16.
    assert float(soft.threshold_logit.grad) == pytest.approx(0.16, rel=1e-5)


def test_at_the_papers_start_nothing_is_thresholded_and_s_has_no_gradient():
    weight = torch.tensor([1e-30, -0.4, 0.0, 2.0], requires_grad=True)
    soft = SoftThreshold(weight.detach(), -3200.0)
    found = soft(weight)
    assert torch.equal(found, weight)
    found.sum().backward()
    assert weight.grad.tolist() == [1, 1, 0, 1]
    assert soft.threshold_logit.grad == 0


@pytest.mark.parametrize(
    ("decay", "rate"),
    [(None, 1 - 0.05 * 5e-4), (0.1, 1 - 0.05 * 0.1), (0.0, 1.0)],
)
def test_weight_decay_alone_brings_s_up(decay, rate):
    trainer = train_to_the_last_step(STR(decay=decay), recipe=PLAIN)
    for s in thresholds(trainer).values():
        assert float(s) == pytest.approx(-3200 * rate**24, rel=1e-5)


def train_to_the_last_step(method, **options):
    """A trainer after its steps, before `finish`."""
    trainer = tiny_trainer(method, **options)
    for done in trainer.run():
        if done == trainer.total_steps:
            break
    return trainer


def test_with_momentum_s_rises_as_the_docstring_says():
    # 400 steps: s = -3200 exp(-decay sum(eta) / (1 - momentum)), sum(eta) / 0.1 = 200.
    recipe = dataclasses.replace(TINY_RECIPE, drops=())
    trainer = train_to_the_last_step(STR(decay=0.01), recipe=recipe, steps=400)
    for s in thresholds(trainer).values():
        assert float(s) == pytest.approx(-3200 * math.exp(-2), rel=0.1)


def test_a_decay_of_its_own_leaves_all_else_to_the_recipe():
    found = train_to_the_last_step(STR(decay=0.1), model="conv").state
    dense = train_to_the_last_step(Dense(), model="conv").state
    plain = dense.model.state_dict()
    for name in found.masks:
        assert torch.equal(network_weight(found.model, name), plain[name])
    for name in ("norm1.weight", "norm1.bias", "classifier.bias"):
        assert torch.equal(found.model.state_dict()[name], plain[name])


def test_layers_learn_thresholds_of_their_own_and_get_sparse():
    trainer = train_to_the_last_step(STR(s_init=-4.0, decay=0.1), steps=48)
    found = thresholds(trainer)
    assert len(found) == 3
    assert len({round(float(s), 3) for s in found.values()}) == 3
    assert all(s > -4 for s in found.values())
    before = {n: network_weight(trainer.state.model, n) for n in trainer.state.masks}
    with torch.no_grad():
        trainer.method.finish(trainer)
    after = {n: trainer.state.model.get_parameter(n).detach() for n in before}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert 0 < sum(nonzero(after).values()) < 0.8 * 12448
    assert nonzero(trainer.state.masks) == nonzero(after)


def test_more_decay_leaves_fewer_weights():
    left = []
    for decay in (0.0, 0.1, 0.3):
        state = train(tiny_trainer(STR(s_init=-5.0, decay=decay), steps=48)).state
        left.append(sum(nonzero(state.masks).values()))
    assert left[0] > left[1] > left[2]


def test_importance_is_the_distance_above_the_layers_own_threshold():
    trainer = tiny_trainer(STR(s_init=-2.0))
    modules = [m for m in trainer.state.model.modules() if isinstance(m, SoftThreshold)]
    with torch.no_grad():
        for module, threshold in zip(modules, (0.1, 0.2, 0.3), strict=True):
            module.threshold_logit.fill_(logit(threshold))
        scores = trainer.method.importance(trainer)
    expected = zip(trainer.state.weights.items(), (0.1, 0.2, 0.3), strict=True)
    for (name, weight), threshold in expected:
        torch.testing.assert_close(scores[name], weight.detach().abs() - threshold)


@pytest.mark.parametrize(("target", "kept"), [(0.95, 622), (0.05, 11826)])
def test_a_target_is_met_exactly_from_above_or_below(target, kept):
    trainer = tiny_trainer(STR(s_init=-4.0, target=target), steps=12)
    weights, scores = {}, {}
    for _ in trainer.run():
        weights = {n: network_weight(trainer.state.model, n).clone() for n in trainer.state.masks}
        with torch.no_grad():
            scores = copied(trainer.method.importance(trainer))
    mask = torch.cat([m.flatten() for m in trainer.state.masks.values()]) == 1
    score = torch.cat([s.flatten() for s in scores.values()])
    learned = torch.cat([w.flatten() for w in weights.values()])
    finished = torch.cat([trainer.state.model.get_parameter(n).detach().flatten() for n in scores])
    assert int(mask.sum()) == kept == int(finished.count_nonzero())
    assert float(score[mask].min()) >= float(score[~mask].max())
    idle = mask & (learned == 0)
    assert bool(idle.any()) == (target == 0.05)
    assert torch.equal(finished, torch.where(idle, GROWN, learned * mask))


def test_the_defaults_are_the_papers():
    method = STR()
    assert (method.s_init, method.decay, method.target) == (-3200.0, None, None)
