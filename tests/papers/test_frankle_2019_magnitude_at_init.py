"""Frankle & Carbin, 2019, arXiv:1803.03635: pruning at iteration 0, by the initial magnitudes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.allocation import allocate, keep_count
from methods.api import Phase
from methods.magnitude_at_init import MagnitudeAtInit
from tests.tiny import FakeRun, copied, hand_state, nonzero, tiny_trainer, train


def pruned(weights, density, **options):
    """Masks as lists, after the start of a phase that prunes to `density`."""
    state = hand_state(weights)
    run = FakeRun(state, density=density, phase=Phase("train", 10, density=density))
    with torch.no_grad():
        MagnitudeAtInit(**options).start_phase(run)
    return {name: mask.tolist() for name, mask in state.masks.items()}


def test_the_largest_magnitudes_are_kept_whatever_their_sign():
    # Of |w| = 0.3 0.9 0.1 | 0.5 0.7, three of five: 0.9, 0.7 and 0.5.
    weights = {"a": [0.3, -0.9, 0.1], "b": [[-0.5], [0.7]]}
    assert pruned(weights, 0.6) == {"a": [0, 1, 0], "b": [[1], [1]]}


def test_each_layer_by_itself_keeps_its_own_share():
    # Ranked together with one that starts ten times larger, a layer is emptied.
    weights = {"small": [[0.03, 0.01, 0.02, 0.04]], "large": [[0.3, 0.1, 0.2, 0.4]]}
    assert pruned(weights, 0.5) == {"small": [[0, 0, 0, 0]], "large": [[1, 1, 1, 1]]}
    halves = {"small": [[1, 0, 0, 1]], "large": [[1, 0, 0, 1]]}
    assert pruned(weights, 0.5, scope="uniform") == halves


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_masks_are_those_of_the_initial_weights_and_stay(model):
    trainer = tiny_trainer("magnitude_at_init", model=model, density=0.1)
    initial = {n: w.detach().clone().numpy() for n, w in trainer.state.weights.items()}
    flat = np.abs(np.concatenate([w.reshape(-1) for w in initial.values()]))
    smallest_kept = np.sort(flat)[-keep_count(len(flat), 0.1)]
    for _ in trainer.run():
        for name, mask in trainer.state.masks.items():
            np.testing.assert_array_equal(mask.numpy() == 1, np.abs(initial[name]) >= smallest_kept)
    assert trainer.cursor.extra_batches == 0


def test_training_begins_from_the_initial_weights():
    trainer = tiny_trainer("magnitude_at_init")
    initial = copied(trainer.state.weights)
    with torch.no_grad():
        trainer.method.start_phase(trainer)
        trainer.method.project(trainer.state)
    for name, weight in trainer.state.weights.items():
        assert torch.equal(weight, initial[name] * trainer.state.masks[name])


def test_uniform_prunes_every_layer_to_the_same_sparsity():
    trainer = train(tiny_trainer(MagnitudeAtInit(scope="uniform"), density=0.1))
    shapes = {name: tuple(mask.shape) for name, mask in trainer.state.masks.items()}
    # 1,228.8 of 12,288, 12.8 of 128 and 3.2 of 32 make 1,245; the largest remainders round up.
    assert nonzero(trainer.state.masks) == allocate(shapes, 0.1, "uniform")
    assert list(nonzero(trainer.state.masks).values()) == [1229, 13, 3]


def test_a_sparser_network_is_part_of_a_denser_one():
    # So it does not matter that the paper arrives at a sparsity in rounds.
    sparse, dense = (
        train(tiny_trainer("magnitude_at_init", density=density, steps=1)).state.masks
        for density in (0.1, 0.5)
    )
    for name, mask in sparse.items():
        assert torch.equal(mask * dense[name], mask)
    assert not any(torch.equal(mask, dense[name]) for name, mask in sparse.items())
