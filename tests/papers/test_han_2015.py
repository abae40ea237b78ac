"""Han et al., 2015, arXiv:1506.02626: train, prune by magnitude, fine-tune."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from methods.allocation import keep_count
from methods.api import Budget
from methods.one_shot import OneShotMagnitude
from tests.tiny import TINY_RECIPE, FakeRun, copied, hand_state, nonzero, tiny_trainer, train

RECIPES = {
    "sgd": TINY_RECIPE,
    "heavy-decay": dataclasses.replace(TINY_RECIPE, weight_decay=0.05, momentum=0.95),
    "adam": dataclasses.replace(TINY_RECIPE, optimizer="adam", lr=1e-3, momentum=0, nesterov=False),
}


def top(magnitudes: np.ndarray, keep: int) -> np.ndarray:
    mask = np.zeros(magnitudes.size, bool)
    mask[np.argsort(-magnitudes, kind="stable")[:keep]] = True
    return mask


def test_finetuning_comes_on_top_of_the_full_dense_run():
    # Lin et al.: 300 epochs, then 60.
    dense, finetune = OneShotMagnitude().plan(Budget(300, 1, 50_000), 0.1)
    assert (dense.name, dense.steps, dense.density) == ("dense", 300, None)
    assert (finetune.name, finetune.steps, finetune.density) == ("finetune", 60, 0.1)
    assert dense.updates is None
    assert finetune.updates is None


@pytest.mark.parametrize(
    ("steps", "fraction", "expected"), [(24, 0.2, 4), (300, 0.2, 60), (10, 0.29, 2), (7, 0, 0)]
)
def test_finetuning_is_rounded_down(steps, fraction, expected):
    plan = OneShotMagnitude(finetune=fraction).plan(Budget(steps, 1, 100), 0.1)
    assert plan[1].steps == expected


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("density", [0.03, 0.1, 0.5])
def test_the_masks_are_the_largest_weights_of_all_layers_at_the_end_of_the_dense_run(
    model, density
):
    trainer = tiny_trainer(OneShotMagnitude(finetune=0.5), model=model, density=density)
    dense = {}
    for step in trainer.run():
        if step < 24:
            assert all(bool(mask.all()) for mask in trainer.state.masks.values())
        if step == 24:
            dense = copied(trainer.state.weights)
    flat = np.concatenate([weight.abs().numpy().reshape(-1) for weight in dense.values()])
    expected = top(flat, keep_count(flat.size, density))
    found = np.concatenate([mask.numpy().reshape(-1) for mask in trainer.state.masks.values()])
    np.testing.assert_array_equal(found, expected)
    # The dense run before it is ordinary dense training.
    plain = train(tiny_trainer("dense", model=model))
    assert all(torch.equal(dense[name], weight) for name, weight in plain.state.weights.items())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_pruned_weights_are_zero_after_every_step_of_finetuning(recipe):
    trainer = tiny_trainer(OneShotMagnitude(finetune=0.5), model="conv", recipe=recipe)
    seen = 0
    masks = {}
    for step in trainer.run():
        if step <= 24:
            continue
        masks = masks or copied(trainer.state.masks)
        seen += 1
        for name, weight in trainer.state.weights.items():
            assert torch.equal(trainer.state.masks[name], masks[name])
            assert torch.equal(weight != 0, masks[name] != 0)
    assert seen == 12
    assert sum(nonzero(trainer.state.weights).values()) == keep_count(1432, 0.1)


def test_the_layer_wise_option_gives_each_layer_the_same_density():
    # 12,288 + 128 + 32 at 0.25: 3072, 32, 8.
    trainer = tiny_trainer(OneShotMagnitude(scope="uniform"), density=0.25)
    dense = {}
    for step in trainer.run():
        if step == 24:
            dense = copied(trainer.state.weights)
    masks = trainer.state.masks
    assert nonzero(masks) == {"fc1.weight": 3072, "fc2.weight": 32, "classifier.weight": 8}
    for name, weight in dense.items():
        expected = top(weight.abs().numpy().reshape(-1), weight.numel() // 4)
        np.testing.assert_array_equal(masks[name].numpy().reshape(-1), expected)


@pytest.mark.parametrize(
    ("min_keep", "scope", "expected"),
    [
        # 3 of 10: the largest of all are 9, 8 and 7.
        (0, "global", [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
        # 9, 3 and 2 stay whatever the rest.
        (1, "global", [1, 0, 0, 0, 0, 0, 0, 1, 1, 0]),
        # Counts by density, 2, 1 and 0, and of the largest.
        (0, "uniform", [1, 1, 0, 0, 0, 0, 0, 1, 0, 0]),
    ],
)
def test_the_largest_weights_of_each_layer_stay_if_asked(min_keep, scope, expected):
    layers = {"a": [9.0, -8, 7, 6, 5, 4], "b": [1.0, 3], "c": [-2.0, 0.5]}
    state = hand_state({name: [values] for name, values in layers.items()})
    with torch.no_grad():
        OneShotMagnitude(min_keep=min_keep, scope=scope).prune(FakeRun(state), 0.3)
    assert torch.cat([mask.flatten() for mask in state.masks.values()]).tolist() == expected


def test_a_minimum_that_the_density_does_not_leave_is_refused():
    # 7 + 4 + 2 (all that c has) = 13 weights of 1000 + 4 + 2, of which 1 % are 10.06.
    budget = Budget(10, 5, 320, shapes=(("a", (10, 100)), ("b", (2, 2)), ("c", (2, 1))))
    with pytest.raises(ValueError, match="min_keep = 7 is 13 weights, but 10 are left"):
        OneShotMagnitude(min_keep=7).plan(budget, 0.01)
    OneShotMagnitude(min_keep=4).plan(budget, 0.01)  # 4 + 4 + 2
    with pytest.raises(ValueError, match="min_keep = 7 needs scope = 'global'"):
        OneShotMagnitude(min_keep=7, scope="uniform")


def test_the_optimizer_starts_anew_for_finetuning():
    # One step of fine-tuning with Nesterov momentum from a buffer of zero: the buffer then holds
    # the step's gradient, and w moves by lr (1 + momentum) (g + decay w).
    trainer = tiny_trainer(OneShotMagnitude(finetune=0.2))
    run = trainer.run()
    for step in run:
        if step == 24:
            break
    state = trainer.state
    memory = state.optimizer.state
    assert all(memory[weight]["momentum_buffer"].any() for weight in state.weights.values())
    bias = state.model.fc1.bias
    before = copied({"bias": bias})["bias"]
    next(run)
    buffer = memory[bias]["momentum_buffer"]  # equals g + decay w where it started from zero
    expected = before - 0.005 * 1.9 * buffer
    torch.testing.assert_close(bias.detach(), expected, rtol=0, atol=1e-7)
    assert float((bias.detach() - before).abs().max()) > 1e-5


def test_the_learning_rate_of_finetuning_falls_along_a_cosine_from_a_tenth():
    # The dense run ends at 0.05 / 100; fine-tuning starts at 0.1 * 0.05 and falls over 8 steps.
    trainer = tiny_trainer(OneShotMagnitude(finetune=1 / 3))
    rates = [float(trainer.state.lr) for _ in trainer.run()]
    assert rates[23] == pytest.approx(0.0005)
    expected = [0.005 / 2 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates[24:] == pytest.approx(expected, rel=1e-6)


def test_without_finetuning_the_network_is_pruned_all_the_same():
    trainer = train(tiny_trainer(OneShotMagnitude(finetune=0.0)))
    assert trainer.cursor.total == 24
    assert sum(nonzero(trainer.state.weights).values()) == 1245


def test_normalisation_keeps_learning_its_statistics_while_finetuning():
    trainer = tiny_trainer(OneShotMagnitude(finetune=0.5), model="conv")
    norm = trainer.state.model.norm2
    seen = []
    for step in trainer.run():
        if step >= 24:
            assert norm.training
            seen.append(norm.running_mean.clone())
    assert all(not torch.equal(seen[0], later) for later in seen[1:])
    assert int(norm.num_batches_tracked) == 36
