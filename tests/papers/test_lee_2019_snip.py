"""Lee et al., 2019, arXiv:1810.02340: prune at initialisation by connection sensitivity."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from bench.trial import network
from methods.allocation import allocate, keep_count
from methods.snip import OWN_DRAW, SNIP
from tests.tiny import (
    TINY_RECIPE,
    FakeRun,
    copied,
    hand_state,
    nonzero,
    tiny_model,
    tiny_trainer,
    train,
)

AUGMENTED = dataclasses.replace(TINY_RECIPE, crop=2, flip=True)


def scoring(trainer):
    """Trains one step; returns the batches that the method asked for."""
    seen = []
    plain = trainer.loss

    def watched(images, labels):
        seen.append((images.clone(), labels.clone()))
        return plain(images, labels)

    trainer.loss = watched
    next(trainer.run())
    return seen


def top(scores: np.ndarray, keep: int) -> np.ndarray:
    mask = np.zeros(scores.size, np.float32)
    mask[np.argsort(-scores, kind="stable")[:keep]] = 1
    return mask


def flattened(tensors) -> np.ndarray:
    return np.concatenate([tensors[name].detach().numpy().reshape(-1) for name in tensors])


def test_the_score_of_a_scalar_network_is_its_closed_form():
    # y = w x, L = (y - t)^2 / 2: dL/dw = x (w x - t), score |w x (w x - t)|.
    # x = 2, t = 3:  w    3     -1     0.5   0
    #                wx   6     -2     1     0
    #             score   18    10     2     0
    weight = torch.tensor([3.0, -1, 0.5, 0])
    state = hand_state({"w": weight})
    loss = ((state.weights["w"] * 2 - 3) ** 2 / 2).sum()
    (gradient,) = torch.autograd.grad(loss, state.weights["w"])
    run = FakeRun(state, dense_gradients={"w": gradient})
    assert SNIP().scores(run)["w"].tolist() == [18, 10, 2, 0]


def test_a_large_weight_with_no_gradient_goes_before_a_small_one_with_much():
    # |w g|: 9 * 0.1 = 0.9, 1 * 2 = 2, 4 * 0.5 = 2, 2 * 1.5 = 3. The equal 1 and 2: the lower index.
    state = hand_state({"w": [9.0, -1, 4, 2]})
    run = FakeRun(state, dense_gradients={"w": torch.tensor([0.1, 2, -0.5, -1.5])})
    SNIP().prune(run, 0.5)
    assert state.masks["w"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_masks_keep_the_largest_derivatives_by_a_gate_at_one(model, density):
    # The paper's definition: dL/dc at c = 1 where the network computes with c w.
    trainer = tiny_trainer("snip", model=model, density=density)
    ((images, labels),) = scoring(trainer)
    network = tiny_model(model)
    weights = {name: network.get_parameter(name).detach() for name in trainer.state.masks}
    gates = {name: torch.ones_like(weight, requires_grad=True) for name, weight in weights.items()}
    gated = {name: gates[name] * weight for name, weight in weights.items()}
    loss = functional.cross_entropy(functional_call(network, gated, (images,)), labels)
    slopes = torch.autograd.grad(loss, list(gates.values()))
    scores = np.concatenate([slope.abs().numpy().reshape(-1) for slope in slopes])
    found = flattened(trainer.state.masks)
    assert found.sum() == keep_count(scores.size, density)
    # The two ways round differently, so scores within a rounding error may change places.
    assert scores[found == 1].min() >= scores[found == 0].max() * (1 - 1e-4)


@pytest.mark.parametrize("scale", [0.25, 3.0, 1000.0])
def test_masks_do_not_change_when_the_loss_is_multiplied(scale):
    plain, scaled = tiny_trainer("snip", model="conv"), tiny_trainer("snip", model="conv")
    loss = scaled.loss

    def multiplied(images, labels):
        with torch.enable_grad():
            return scale * loss(images, labels)

    scaled.loss = multiplied
    next(plain.run())
    next(scaled.run())
    for name, mask in plain.state.masks.items():
        assert torch.equal(scaled.state.masks[name], mask)


def test_scores_do_not_know_the_weight_decay():
    masks = []
    for decay in (0.0, 10.0):
        recipe = dataclasses.replace(TINY_RECIPE, weight_decay=decay)
        trainer = tiny_trainer("snip", recipe=recipe)
        next(trainer.run())
        masks.append(flattened(trainer.state.masks))
    np.testing.assert_array_equal(*masks)


def test_the_batch_is_drawn_from_the_training_images_as_they_are():
    trainer = tiny_trainer("snip", model="conv", recipe=AUGMENTED)
    ((images, labels),) = scoring(trainer)
    assert images.shape == (32, 3, 16, 16)
    data = trainer.data
    plain = data.normalise(data.train.images)
    for image, label in zip(images, labels, strict=True):
        same = (plain == image).flatten(1).all(1)
        assert int(same.sum()) == 1
        assert int(data.train.labels[same]) == int(label)
    # So it is in training, where the recipe crops and flips.
    augmented, _ = trainer.stream.batch(0)
    assert not any(bool((plain == image).flatten(1).all(1).any()) for image in augmented[:4])


@pytest.mark.parametrize("batches", [1, 3])
def test_scoring_batches_are_metered_and_different(batches):
    trainer = tiny_trainer(SNIP(batches=batches))
    seen = scoring(trainer)
    assert len(seen) == batches == trainer.cursor.extra_batches
    assert len({images.sum().item() for images, _ in seen}) == batches
    for _ in trainer.run():
        pass
    assert trainer.cursor.extra_batches == batches


def test_several_batches_are_averaged():
    trainer = tiny_trainer(SNIP(batches=3), density=0.1)
    network = copy.deepcopy(trainer.state.model)
    seen = scoring(trainer)
    total = {name: torch.zeros_like(mask) for name, mask in trainer.state.masks.items()}
    for images, labels in seen:
        network.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        for name in total:
            total[name] += network.get_parameter(name).grad / 3
    scores = flattened({n: (network.get_parameter(n) * g).abs() for n, g in total.items()})
    found = flattened(trainer.state.masks)
    assert scores[found == 1].min() >= scores[found == 0].max() * (1 - 1e-4)


def test_scoring_uses_batch_statistics_and_leaves_the_running_ones():
    trainer = tiny_trainer("snip", model="conv")
    norm = trainer.state.model.norm1
    plain = trainer.loss
    seen = []

    def watched(images, labels):
        assert norm.training
        loss = plain(images, labels)
        seen.append((norm.running_mean.clone(), norm.running_var.clone()))
        return loss

    trainer.loss = watched
    next(trainer.run())
    assert torch.equal(seen[0][0], torch.zeros(8))
    assert torch.equal(seen[0][1], torch.ones(8))
    assert int(norm.num_batches_tracked) == 1  # of the one training step


def test_training_goes_on_from_the_weights_that_were_scored():
    initial = copied(dict(tiny_model("mlp").named_parameters()))
    trainer = tiny_trainer("snip", recipe=dataclasses.replace(TINY_RECIPE, lr=1e-30))
    next(trainer.run())
    for name, weight in trainer.state.weights.items():
        assert torch.equal(weight.detach(), initial[name] * trainer.state.masks[name])


def test_if_asked_training_starts_from_other_weights_than_were_scored():
    recipe = dataclasses.replace(TINY_RECIPE, lr=1e-30)
    plain, other = (
        tiny_trainer(SNIP(reinit=reinit), model="conv", recipe=recipe) for reinit in (False, True)
    )
    next(plain.run())
    next(other.run())
    scored, fresh = tiny_model("conv"), network("conv", 0, OWN_DRAW)
    for name, mask in other.state.masks.items():
        assert torch.equal(mask, plain.state.masks[name])
        weight = other.state.weights[name].detach()
        assert torch.equal(weight, fresh.get_parameter(name) * mask)
        assert not torch.equal(weight, scored.get_parameter(name) * mask)
    for name in ("norm1.weight", "classifier.bias"):
        assert torch.equal(other.state.model.get_parameter(name), fresh.get_parameter(name))


def test_training_sees_the_batches_of_dense_training():
    # Scoring draws from a stream of its own: the data order does not move by one.
    dense, snip = tiny_trainer("dense"), tiny_trainer("snip")
    next(dense.run())
    next(snip.run())
    assert snip.cursor.position == 1
    assert torch.equal(snip.stream.batch(7)[0], dense.stream.batch(7)[0])


@pytest.mark.parametrize("density", [0.02, 0.1, 0.33])
def test_masks_are_exact_and_stay(density):
    trainer = tiny_trainer("snip", model="conv", density=density)
    before = {}
    for _ in trainer.run():
        before = before or copied(trainer.state.masks)
        for name, weight in trainer.state.weights.items():
            assert torch.equal(trainer.state.masks[name], before[name])
            assert torch.equal(weight != 0, before[name] != 0)
    assert sum(nonzero(trainer.state.weights).values()) == keep_count(1432, density)


def test_the_layer_wise_option_ranks_each_layer_by_itself():
    trainer = train(tiny_trainer(SNIP(scope="uniform")))
    shapes = {name: tuple(mask.shape) for name, mask in trainer.state.masks.items()}
    assert nonzero(trainer.state.masks) == allocate(shapes, 0.1, "uniform")


def test_biases_and_normalisation_are_not_pruned():
    trainer = train(tiny_trainer("snip", model="conv", density=0.02))
    assert set(trainer.state.masks) == {"conv1.weight", "conv2.weight", "classifier.weight"}
    assert bool((trainer.state.model.classifier.bias != 0).all())
    assert bool((trainer.state.model.norm1.weight != 0).all())
