"""Wang et al., 2020, arXiv:2002.07376: keep the weights that carry the gradient's flow."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.autograd.functional import vhp
from torch.func import functional_call
from torch.nn import functional

from bench.errors import SuiteError
from bench.resolve import make_method
from methods.api import Phase
from methods.grasp import GraSP, hessian_gradient
from methods.masking import topk_mask
from tests.tiny import FakeRun, copied, hand_state, tiny_trainer, train


@dataclass(frozen=True)
class Quadratic(GraSP):
    """The loss is sum of a_i w_i^2 / 2, whatever the images; a = (1, 2)."""

    def loss(self, run, images, labels):
        (weight,) = run.state.weights.values()
        return (torch.tensor([1.0, 2]) * weight**2).sum() / 2


class OneBatch(FakeRun):
    def batches(self, count, *, augmented=True):
        assert not augmented
        return iter([(torch.empty(0), torch.empty(0))] * count)


def test_on_a_quadratic_the_weight_of_least_curvature_goes_first():
    # a = (1, 2), w = (1, 1): g = (1, 2), Hg = (1, 4), S = (-1, -4); the highest S is removed.
    state = hand_state({"w": [1.0, 1]})
    run = OneBatch(state, density=0.5, phase=Phase("train", 10, density=0.5))
    with torch.no_grad():
        assert Quadratic().scores(run)["w"].tolist() == [1, 4]
        Quadratic().start_phase(run)
    assert state.masks["w"].tolist() == [0, 1]


def test_the_sign_of_the_score_counts_and_not_its_size():
    # w = (1, -1) with a cross term: H = [[1, 2], [2, 1]], g = Hw = (-1, 1), Hg = (1, -1),
    # S = -w * Hg = (-1, -1); with w = (1, -0.4): g = (0.2, 1.6), Hg = (3.4, 2), S = (-3.4, 0.8).
    matrix = torch.tensor([[1.0, 2], [2, 1]])

    @dataclass(frozen=True)
    class Crossed(GraSP):
        def loss(self, run, images, labels):
            (weight,) = run.state.weights.values()
            return weight @ matrix @ weight / 2

    for values, expected in (([1.0, -1], [1.0, 1]), ([1.0, -0.4], [3.4, -0.8])):
        with torch.no_grad():
            scores = Crossed().scores(OneBatch(hand_state({"w": values})))
        torch.testing.assert_close(scores["w"], torch.tensor(expected))


def test_on_a_quadratic_the_product_is_the_square_of_the_matrix_times_the_weights():
    torch.manual_seed(0)
    matrix = torch.randn(6, 6, dtype=torch.float64)
    matrix = matrix + matrix.T
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        (product,) = hessian_gradient([lambda: weight @ matrix @ weight / 2], [weight])
    start = weight.detach()
    torch.testing.assert_close(product, matrix @ matrix @ start)
    # The sum of S = -w * Hg over all weights is minus the squared norm of the gradient.
    torch.testing.assert_close((-start * product).sum(), -(matrix @ start).square().sum())


def test_the_product_agrees_with_finite_differences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    images, labels = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 3
    weights = [model[0].weight, model[2].weight]

    def loss():
        return functional.cross_entropy(model(images), labels)

    with torch.no_grad():
        product = hessian_gradient([loss], weights)
    gradient = torch.autograd.grad(loss(), weights)
    step = 1e-6
    with torch.no_grad():
        for weight, g in zip(weights, gradient, strict=True):
            weight.add_(g, alpha=step)
    moved = torch.autograd.grad(loss(), weights)
    for found, before, after in zip(product, gradient, moved, strict=True):
        torch.testing.assert_close(found, (after - before) / step, rtol=1e-4, atol=1e-8)
        assert found.abs().max() > 1e-4


def test_the_gradient_of_all_batches_meets_the_hessian_of_all():
    # L1 = w^2 / 2, L2 = 3 w^2 / 2 at w = 1: H = 4, g = 4, Hg = 16; apart they would give 1 + 9.
    weight = torch.ones(1, requires_grad=True)
    losses = [lambda: (weight**2).sum() / 2, lambda: 3 * (weight**2).sum() / 2]
    with torch.no_grad():
        assert hessian_gradient(losses, [weight])[0].tolist() == [16]


@pytest.mark.parametrize("temperature", [200.0, 2.0])
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_in_a_real_run_the_masks_are_those_of_the_divided_logits(model, temperature):
    trainer = tiny_trainer(GraSP(temperature=temperature), model=model, density=0.2)
    state = trainer.state
    start = copied(dict(state.model.named_parameters()))
    buffers = copied(dict(state.model.named_buffers()))
    seen = []
    plain = trainer.batches

    def watched(count, *, augmented=True):
        assert not augmented
        for batch in plain(count, augmented=augmented):
            seen.append(batch)
            yield batch

    trainer.batches = watched
    next(trainer.run())
    ((images, labels),) = seen
    fixed = {name: value.double() for name, value in (start | buffers).items()}
    weights = tuple(fixed.pop(name) for name in state.masks)

    def loss(*weights):
        tensors = {name: value.clone() for name, value in fixed.items()}
        tensors |= dict(zip(state.masks, weights, strict=True))
        logits = functional_call(state.model, tensors, (images.double(),))
        return functional.cross_entropy(logits / temperature, labels)

    leaves = [weight.clone().requires_grad_() for weight in weights]
    gradient = torch.autograd.grad(loss(*leaves), leaves)
    _, product = vhp(loss, weights, gradient)
    flat = torch.cat([(w * hg).reshape(-1) for w, hg in zip(weights, product, strict=True)])
    found = torch.cat([mask.reshape(-1) for mask in state.masks.values()])
    expected = topk_mask(flat, int(found.sum()))
    # Single precision may swap neighbours at the threshold.
    assert int((found != expected).sum()) <= 4
    assert 0.15 < float(found.mean()) < 0.25


@pytest.mark.parametrize("batches", [1, 3])
def test_every_batch_is_drawn_once_and_used_twice(batches):
    trainer = train(tiny_trainer(GraSP(batches=batches), steps=2))
    assert trainer.cursor.drawn == batches
    assert trainer.cursor.extra_batches == 2 * batches


def test_masks_stay_and_training_begins_from_the_weights_that_were_scored():
    trainer = tiny_trainer("grasp", model="conv")
    initial = copied(trainer.state.weights)
    with torch.no_grad():
        trainer.method.start_phase(trainer)
    masks = copied(trainer.state.masks)
    assert all(torch.equal(w, initial[n]) for n, w in trainer.state.weights.items())
    assert int(trainer.state.model.norm1.num_batches_tracked) == 0
    again = tiny_trainer("grasp", model="conv")
    for _ in again.run():
        assert all(torch.equal(again.state.masks[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"batches": 0}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(SuiteError, match="lies outside"):
        make_method("grasp", options, "here")


def test_the_defaults_are_the_published_ones():
    method = GraSP()
    assert (method.temperature, method.batches, method.scope) == (200.0, 1, "global")
