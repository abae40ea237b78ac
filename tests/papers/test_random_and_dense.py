"""The two controls: no sparsity, and sparsity by chance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from bench.data import BatchStream
from bench.resolve import make_method
from methods.allocation import keep_count
from methods.dense import Dense
from methods.dpf import DPF
from methods.gradual import GradualMagnitude
from methods.one_shot import OneShotMagnitude
from methods.random_pruning import RandomPruning
from methods.rigl import RigL
from methods.snip import SNIP
from methods.sparse_evolution import SET
from tests.tiny import (
    TINY_RECIPE,
    FakeRun,
    copied,
    hand_state,
    nonzero,
    tiny_data,
    tiny_model,
    tiny_trainer,
    train,
)

UNPRUNED = [
    RandomPruning(),
    RandomPruning(scope="global"),
    SNIP(),
    GradualMagnitude(),
    SET(),
    RigL(),
    DPF(),
]


def finished(trainer):
    return copied(train(trainer).state.model.state_dict())


# By chance.


@pytest.mark.parametrize("method", ["set", "rigl", "sparse_momentum", "deepr", "dsr", "mest"])
def test_random_masks_are_not_those_that_another_method_of_the_seed_begins_with(method):
    masks = []
    for name in ("random", method):
        trainer = tiny_trainer(make_method(name, {"scope": "uniform"}, name), density=0.1)
        next(iter(trainer.run()))
        masks.append(torch.cat([mask.flatten() for mask in trainer.state.masks.values()]).bool())
    one, other = masks
    assert abs(int(one.sum()) - int(other.sum())) <= 2
    # Drawn apart, a tenth of what one keeps is in the other.
    assert int((one & other).sum()) < 0.2 * int(one.sum())


# Dense.


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("method", UNPRUNED, ids=lambda method: repr(method).split(",")[0])
def test_at_sparsity_zero_every_method_trains_as_dense_does_bit_for_bit(method, model):
    dense = finished(tiny_trainer("dense", model=model))
    other = finished(tiny_trainer(method, model=model, density=1.0))
    assert set(other) == set(dense)
    for name, value in dense.items():
        assert torch.equal(other[name], value), name


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_masks_of_ones_leave_every_step_of_the_trajectory_alone(optimizer):
    momentum = {"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {}
    plain = dataclasses.replace(TINY_RECIPE, momentum=0.0, nesterov=False)
    recipe = dataclasses.replace(plain, optimizer=optimizer, **momentum)
    dense = tiny_trainer("dense", model="conv", recipe=recipe)
    masked = tiny_trainer("random", model="conv", density=1.0, recipe=recipe)
    for _ in zip(dense.run(), masked.run(), strict=True):
        for one, other in zip(
            dense.state.model.state_dict().values(),
            masked.state.model.state_dict().values(),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_one_shot_without_finetuning_or_sparsity_is_dense_training():
    dense = finished(tiny_trainer("dense"))
    other = finished(tiny_trainer(OneShotMagnitude(finetune=0.0), density=1.0))
    assert all(torch.equal(other[name], value) for name, value in dense.items())


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_dense_training_is_the_recipe_in_a_plain_loop(model):
    # SGD with Nesterov momentum and weight decay on every parameter; the rate 0.05 falls by ten at
    # steps 12 and 18 of 24.
    network = tiny_model(model)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    stream = BatchStream(tiny_data(), TINY_RECIPE, 0, "order")
    for step in range(24):
        optimizer.param_groups[0]["lr"] = 0.05 if step < 12 else 0.005 if step < 18 else 0.0005
        images, labels = stream.batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    found = finished(tiny_trainer("dense", model=model))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_dense_prunes_nothing_and_asks_for_no_extra_batches():
    trainer = train(tiny_trainer("dense"))
    assert Dense.controls == "none"
    assert trainer.density is None
    assert trainer.cursor.extra_batches == 0
    assert all(bool(mask.all()) for mask in trainer.state.masks.values())
    # By chance an initial weight may be any number, but not exactly 0.
    assert nonzero(trainer.state.weights) == nonzero(trainer.state.masks)


# Random.


def test_uniform_masks_keep_the_density_in_each_layer():
    # 0.1 of 12,288 + 128 + 32 = 12,448 is 1244.8: 1245 in all. Shares 1228.8, 12.8, 3.2: floors
    # 1228 + 12 + 3 = 1243, and the two remainders of 0.8 are rounded up.
    trainer = train(tiny_trainer("random"))
    expected = {"fc1.weight": 1229, "fc2.weight": 13, "classifier.weight": 3}
    assert nonzero(trainer.state.masks) == expected
    assert nonzero(trainer.state.weights) == expected


def test_erk_masks_keep_the_published_counts_in_each_layer():
    # Units 768+16 = 784, 16+8 = 24, 8+4 = 12, together 820. epsilon = 1245/820 = 1.518:
    # 1190.3, 36.4, 18.2; floors 1190 + 36 + 18 = 1244; the largest remainder, 0.4, is fc2's.
    trainer = train(tiny_trainer(RandomPruning(scope="erk")))
    expected = {"fc1.weight": 1190, "fc2.weight": 37, "classifier.weight": 18}
    assert nonzero(trainer.state.masks) == expected


def test_global_masks_are_exact_in_sum_and_near_the_density_in_each_layer():
    trainer = train(tiny_trainer(RandomPruning(scope="global"), density=0.5))
    counts = nonzero(trainer.state.masks)
    assert sum(counts.values()) == 6224
    assert abs(counts["fc2.weight"] - 64) < 30  # five standard deviations of sqrt(128)/2


def masks_of(seed: int, method: str = "random"):
    trainer = tiny_trainer(method, seed=seed)
    next(trainer.run())
    return copied(trainer.state.masks)


def test_masks_differ_between_seeds_and_repeat_with_the_same():
    first, again, other = masks_of(0), masks_of(0), masks_of(1)
    for name, mask in first.items():
        assert torch.equal(mask, again[name])
        assert not torch.equal(mask, other[name])
    # Two draws of a tenth share about a tenth: 123 of 1229, give or take five deviations of 10.
    shared = int((first["fc1.weight"] * other["fc1.weight"]).sum())
    assert abs(shared - 123) < 55


def test_masks_do_not_depend_on_the_weights():
    state = hand_state({"w": torch.arange(100.0)})
    flipped = hand_state({"w": -torch.arange(100.0).flip(0)})
    for each in (state, flipped):
        RandomPruning().prune(FakeRun(each), 0.3)
    assert torch.equal(state.masks["w"], flipped.masks["w"])


def test_every_position_is_kept_as_often_as_any_other():
    # 400 draws of 20 out of 50: 160 each, with deviation sqrt(400 * 0.4 * 0.6) = 9.8.
    kept = torch.zeros(50)
    for seed in range(400):
        state = hand_state({"w": torch.ones(50)})
        run = FakeRun(state, generator=torch.Generator().manual_seed(seed))
        RandomPruning().prune(run, 0.4)
        assert int(state.masks["w"].sum()) == 20
        kept += state.masks["w"]
    assert float((kept - 160).abs().max()) < 40


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_random_masks_stay_and_what_they_prune_is_zero_after_every_step(model):
    trainer = tiny_trainer("random", model=model)
    before = None
    for _ in trainer.run():
        masks = copied(trainer.state.masks)
        before = before or masks
        for name, weight in trainer.state.weights.items():
            assert torch.equal(masks[name], before[name])
            assert not weight.detach()[masks[name] == 0].any()
    assert trainer.cursor.extra_batches == 0


def test_kept_weights_start_where_dense_training_starts():
    initial = copied(dict(tiny_model("mlp").named_parameters()))
    trainer = tiny_trainer("random", recipe=dataclasses.replace(TINY_RECIPE, lr=1e-30))
    next(trainer.run())
    for name, weight in trainer.state.weights.items():
        assert torch.equal(weight.detach(), initial[name] * trainer.state.masks[name])


@pytest.mark.parametrize("density", [0.02, 0.1, 0.33, 0.9])
@pytest.mark.parametrize("scope", ["global", "uniform", "er", "erk"])
def test_the_finished_network_has_exactly_the_asked_number_of_weights(scope, density):
    trainer = train(tiny_trainer(RandomPruning(scope=scope), density=density, steps=2))
    found = {name: trainer.state.model.get_parameter(name) for name in trainer.state.masks}
    assert sum(nonzero(found).values()) == keep_count(12_448, density)
