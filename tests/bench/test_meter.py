"""Training MACs: closed forms, and sums over the masks that each step of a real run had."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench import checkpoint
from bench.counting import count_layers
from bench.meter import Meter
from bench.trainer import Trainer
from methods.api import SparsityMethod
from methods.dpf import DPF
from methods.gradual import GradualMagnitude
from methods.one_shot import OneShotMagnitude
from methods.rigl import RigL
from methods.sfp import SFP
from methods.snip import SNIP
from methods.sparse_momentum import SparseMomentum
from methods.top_kast import TopKAST
from tests.tiny import TINY_RECIPE, tiny_model, tiny_trainer, train

BATCH = TINY_RECIPE.batch
# 3x16x16 images; TinyMLP is 768-16-8-4, TinyConv two strided convolutions on 8x8 and 4x4 positions.
USES = {
    "mlp": {"fc1.weight": 1, "fc2.weight": 1, "classifier.weight": 1},
    "conv": {"conv1.weight": 64, "conv2.weight": 16, "classifier.weight": 1},
}
DENSE = {"mlp": 768 * 16 + 16 * 8 + 8 * 4, "conv": 216 * 64 + 1152 * 16 + 64}


def metered(method: str | SparsityMethod, model: str = "mlp", **settings: object) -> Trainer:
    trainer = tiny_trainer(method, model=model, **settings)
    layers = count_layers(tiny_model(model), trainer.input_shape)
    trainer.meter = Meter(trainer.method, trainer.state, layers, BATCH)
    return trainer


def macs(masks: Mapping[str, Tensor], model: str) -> int:
    """Of one image, worked out from the sizes of the layers; what has no mask is dense."""
    kept = sum(USES[model][name] * int(mask.sum()) for name, mask in masks.items())
    missing = USES[model].keys() - masks.keys()
    dense = {"classifier.weight": 64}  # the only layer that a filter method leaves out
    return kept + sum(dense[name] * USES[model][name] for name in missing)


def spent(trainer: Trainer) -> float:
    return sum(phase.train_macs for phase in trainer.cursor.phases)


def walked(trainer: Trainer, cost: Callable[[Trainer], int]) -> int:
    """Sum over the steps of a run; masks do not change in a step."""
    return BATCH * sum(cost(trainer) for _ in trainer.run())


def test_a_dense_step_costs_three_passes():
    trainer = metered("dense", steps=7)
    train(trainer)
    assert spent(trainer) == 7 * BATCH * 3 * DENSE["mlp"]


def test_rigl_costs_what_its_paper_says():
    # Per interval of dT steps: 3 f_S dT + 2 f_S + f_D, the extra batch for growth included.
    trainer = metered(RigL(every=4, scope="uniform"), density=0.25, steps=24)
    train(trainer)
    sparse = macs(trainer.state.masks, "mlp")
    updates = trainer.cursor.drawn
    assert updates > 2
    assert spent(trainer) == BATCH * (24 * 3 * sparse + updates * (2 * sparse + DENSE["mlp"]))


def test_snip_scores_on_the_dense_network():
    trainer = metered(SNIP(), density=0.1, steps=5)
    train(trainer)
    sparse = macs(trainer.state.masks, "mlp")
    assert spent(trainer) == BATCH * (3 * DENSE["mlp"] + 5 * 3 * sparse)


def test_a_ramp_costs_what_its_masks_cost_in_each_step():
    trainer = metered(GradualMagnitude(), "conv", density=0.1, steps=24)
    expected = walked(trainer, lambda run: 3 * macs(run.state.masks, "conv"))
    assert spent(trainer) == expected < 24 * BATCH * 3 * DENSE["conv"]


@pytest.mark.parametrize("method", [DPF(), SparseMomentum()], ids=["dpf", "momentum"])
def test_methods_that_read_the_gradient_of_pruned_weights_pay_for_it(method):
    trainer = metered(method, density=0.1, steps=24)
    expected = walked(trainer, lambda run: 2 * macs(run.state.masks, "mlp") + DENSE["mlp"])
    # Sparse momentum may look at an extra batch where momentum ranks nothing.
    assert trainer.cursor.extra_batches == 0
    assert spent(trainer) == expected


def test_dpf_fine_tunes_the_weights_of_its_last_masks_alone():
    trainer = metered(DPF(finetune=0.5), density=0.1, steps=10)
    train(trainer)
    fed, tuned = trainer.cursor.phases
    assert (fed.steps, tuned.steps) == (10, 5)
    sparse = macs(trainer.state.masks, "mlp")
    assert tuned.train_macs == 5 * BATCH * 3 * sparse < fed.train_macs / 2


def test_top_kast_computes_gradients_on_its_wider_set():
    trainer = metered(TopKAST(every=3), density=0.1, steps=12)
    expected = walked(
        trainer,
        lambda run: 2 * macs(run.state.masks, "mlp") + macs(run.state.slots["backward"], "mlp"),
    )
    assert spent(trainer) == expected


def test_soft_filter_pruning_trains_every_filter():
    trainer = metered(SFP(), "conv", density=0.5, steps=20)
    train(trainer)
    assert spent(trainer) == 20 * BATCH * 3 * DENSE["conv"]
    assert macs(trainer.state.masks, "conv") < DENSE["conv"]


def test_each_phase_has_its_own_sum():
    trainer = metered(OneShotMagnitude(finetune=0.5), density=0.1, steps=10)
    train(trainer)
    sparse = macs(trainer.state.masks, "mlp")
    dense, tuned = trainer.cursor.phases
    assert (dense.steps, tuned.steps) == (10, 5)
    assert dense.train_macs == 10 * BATCH * 3 * DENSE["mlp"]
    assert tuned.train_macs == 5 * BATCH * 3 * sparse


def test_a_resumed_run_has_the_same_sum(tmp_path):
    whole = metered("rigl", steps=24)
    train(whole)
    cut, path = metered("rigl", steps=24), tmp_path / "run.safetensors"
    steps = cut.run()
    for _ in range(13):
        next(steps)
    checkpoint.write(cut, path, "key")
    resumed = metered("rigl", steps=24)
    checkpoint.read(resumed, path, "key")
    train(resumed)
    assert spent(resumed) == spent(whole) > 0


def test_smoothed_labels_enter_the_training_loss_and_the_scoring_loss():
    recipe = dataclasses.replace(TINY_RECIPE, label_smoothing=0.2)
    trainer = tiny_trainer("dense", recipe=recipe, steps=1)
    images, labels = trainer.stream.batch(0)
    logits = trainer.state.model(images).log_softmax(1)
    target = 0.8 * functional.one_hot(labels, 4) + 0.2 / 4
    expected = -(target * logits).sum(1).mean()
    torch.testing.assert_close(trainer.loss(images, labels), expected)
    train(trainer)
    torch.testing.assert_close(trainer.losses[0], expected.detach())
