"""The hot part of training: precision, compilation, and what a step leaves behind."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from bench.step import Step, data_term, set_precision
from bench.trainer import Trainer
from methods import METHODS
from tests.tiny import TINY_RECIPE, tiny_trainer

BF16 = dataclasses.replace(TINY_RECIPE, precision="bf16")


@pytest.fixture
def torchs_flags():
    """Leaves torch as it was."""
    kept = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.allow_tf32 = kept[0]
    torch.set_float32_matmul_precision(kept[1])


def test_a_step_leaves_its_loss_and_no_gradients():
    trainer = tiny_trainer("dense")
    for moment in trainer.moments():
        if moment is not None:
            break
        before = trainer.hot.loss.clone()
        trainer.compute()
    assert trainer.hot.loss != before
    assert trainer.losses[0] == trainer.hot.loss
    assert all(parameter.grad is None for parameter in trainer.state.model.parameters())


def test_moments_and_run_train_alike():
    run, moments = tiny_trainer("rigl"), tiny_trainer("rigl")
    steps = list(run.run())
    seen: list[int] = []
    for moment in moments.moments():
        if moment is None:
            moments.compute()
        else:
            seen.append(moment)
    assert seen == steps
    for name, weight in run.state.weights.items():
        assert torch.equal(weight, moments.state.weights[name])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_in_bf16_with_weights_in_fp32(name):
    model = "conv" if METHODS[name].controls == "filters" else "mlp"
    wide, half = (
        tiny_trainer(name, model=model, recipe=recipe, steps=20) for recipe in (TINY_RECIPE, BF16)
    )
    for trainer in (wide, half):
        for _ in trainer.run():
            pass
    assert all(p.dtype == torch.float32 for p in half.state.model.parameters())
    assert torch.isfinite(half.losses).all()
    first = float(wide.losses[0]), float(half.losses[0])
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=0.1)


def test_the_precision_of_scores_is_that_of_training_and_they_come_in_fp32():
    trainers = [tiny_trainer("dense", recipe=recipe) for recipe in (TINY_RECIPE, BF16)]
    wide, half = (trainer.gradients() for trainer in trainers)
    for name, gradient in half.items():
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, wide[name])
        torch.testing.assert_close(gradient, wide[name], rtol=0.2, atol=0.02)


def test_a_loss_is_computed_in_fp32():
    logits, labels = torch.randn(4, 10, dtype=torch.bfloat16), torch.arange(4)
    found = data_term(logits, labels, 0.1)
    assert found.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)
    assert found == expected


@pytest.mark.parametrize(
    ("name", "rounded", "products"),
    [("fp32", False, "highest"), ("tf32", True, "high"), ("bf16", False, "highest")],
)
def test_only_a_recipe_of_tf32_rounds_products_to_it(name, rounded, products, torchs_flags):
    torch.backends.cudnn.allow_tf32 = not rounded
    set_precision(dataclasses.replace(TINY_RECIPE, precision=name))
    assert torch.backends.cudnn.allow_tf32 is rounded
    assert torch.get_float32_matmul_precision() == products


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, by torch itself
def test_a_compiled_step_computes_the_same_but_for_rounding():
    plain = tiny_trainer("dpf", steps=6)
    compiled = compile_steps(tiny_trainer("dpf", steps=6))
    for trainer in (plain, compiled):
        for _ in trainer.run():
            pass
    for name, weight in plain.state.weights.items():
        torch.testing.assert_close(weight, compiled.state.weights[name], rtol=1e-4, atol=1e-5)


def compile_steps(trainer: Trainer) -> Trainer:
    """The run, its passes compiled."""
    step = functools.partial(Step, compiled=True)
    trainer.hot = step(trainer.method, trainer.state, trainer.stream, trainer.recipe)
    return trainer
