"""Linear layers by oneDNN: the same but for rounding, in training steps alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from bench import products, step
from bench.evaluate import evaluate
from bench.products import available, in_layers, linear, pays, plain_linear
from tests.tiny import tiny_trainer

needs_onednn = pytest.mark.skipif(not available(), reason="torch has no oneDNN here")


@pytest.fixture
def anywhere(monkeypatch):
    """Every layer takes the detour, whoever made the processor."""
    monkeypatch.setattr(products, "WORTH", 1)
    monkeypatch.setattr(step, "pays", available)


@pytest.fixture
def counted(monkeypatch):
    """Counts products of the detour."""
    calls = []
    plain = products.product

    def product(*arguments):
        calls.append(arguments[0].shape)
        return plain(*arguments)

    monkeypatch.setattr(products, "product", product)
    return calls


@needs_onednn
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("input_grad", [True, False])
def test_outputs_and_gradients_are_torchs_but_for_rounding(has_bias, input_grad, anywhere, counted):
    torch.manual_seed(0)
    grads, outputs = [], []
    x = torch.randn(60, 784).requires_grad_(input_grad)
    layer = nn.Linear(784, 300, bias=has_bias)
    leaves = [*layer.parameters(), *([x] if input_grad else [])]
    for function in (plain_linear, linear):
        outputs.append(function(x, layer.weight, layer.bias))
        grads.append(torch.autograd.grad(outputs[-1].square().sum(), leaves))
    assert len(counted) == 2 + input_grad
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    for mine, torchs in zip(*grads, strict=True):
        assert mine.shape == torchs.shape
        assert (mine - torchs).norm() <= 1e-6 * torchs.norm()


@pytest.mark.parametrize(
    "x", [torch.ones(2, 3, 4), torch.ones(3, 4, dtype=torch.float64), torch.ones(4)]
)
def test_what_it_is_not_for_goes_torchs_way(x, anywhere, counted):
    weight = torch.ones(5, 4, dtype=x.dtype)
    assert torch.equal(linear(x, weight), plain_linear(x, weight))
    assert not counted


def test_small_products_and_those_of_autocast_go_torchs_way(monkeypatch, counted):
    x, weight = torch.ones(10, 10), torch.ones(10, 10)
    monkeypatch.setattr(products, "WORTH", 1001)
    linear(x, weight)
    monkeypatch.setattr(products, "WORTH", 1000)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert not counted


def test_layers_use_it_inside_and_what_was_there_afterwards_even_after_an_error(monkeypatch):
    def someones(*arguments):
        raise NotImplementedError

    def fails():
        with in_layers():
            assert functional.linear is linear
            raise RuntimeError("a mistake")

    for before in (plain_linear, someones):
        monkeypatch.setattr(functional, "linear", before)
        with pytest.raises(RuntimeError, match="a mistake"):
            fails()
        assert functional.linear is before


@needs_onednn
def test_gradients_of_gradients_and_of_functions_are_torchs_but_for_rounding(anywhere):
    torch.manual_seed(0)
    x, weight = torch.randn(20, 30), torch.randn(40, 30, requires_grad=True)
    found = []
    for function in (plain_linear, linear):
        first = torch.autograd.grad(function(x, weight).pow(3).sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(first[0].pow(2).sum(), weight)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-2)
    gradients = [
        torch.func.grad(lambda w, f=function: f(input=x, weight=w).pow(2).sum())(weight.detach())
        for function in (plain_linear, linear)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-3)


@needs_onednn
def test_steps_use_it_and_scores_and_tests_do_not(anywhere, counted, monkeypatch):
    monkeypatch.setattr("bench.step.written_out", lambda *_: None)  # which has products of its own
    trainer = tiny_trainer("dense")
    next(trainer.run())
    in_a_step = len(counted)
    assert in_a_step > 0
    trainer.gradients()
    evaluate(trainer.state.model, trainer.data.train, trainer.data)
    assert len(counted) == in_a_step


@needs_onednn
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor: 0\nvendor_id\t: AuthenticAMD\n", True),
        ("vendor_id\t: GenuineIntel\n", False),
        ("CPU implementer\t: 0x41\n", False),
    ],
)
def test_the_processors_maker_decides(text, expected, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    pays.cache_clear()
    assert pays() is expected
    pays.cache_clear()


def test_a_system_that_does_not_tell_the_maker_uses_torchs(monkeypatch):
    def fails(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fails)
    pays.cache_clear()
    assert pays() is False
    pays.cache_clear()
