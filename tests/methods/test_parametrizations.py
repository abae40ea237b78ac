"""The straight-through mask: what the forward pass, the gradient and the finished network see."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from methods import get_method
from methods.parametrizations import MaskSTE, attach, bake
from tests.tiny import tiny_model


def test_the_forward_pass_sees_masked_weights_and_the_gradient_ignores_the_mask():
    # y = x (w m)^T with x = (2, 3, 5), w = (7, 11, 13), m = (1, 0, 1): y = 14 + 65 = 79.
    # dL/d(w m) = x for L = y; straight through, dL/dw = x, also at the masked 11.
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[7.0, 11, 13]])
    original = attach(layer, "weight", MaskSTE(torch.tensor([[1.0, 0, 1]])))
    output = layer(torch.tensor([[2.0, 3, 5]]))
    assert output.item() == 79
    output.sum().backward()
    assert original.grad.tolist() == [[2, 3, 5]]


def test_the_gradient_is_that_at_the_masked_weight_and_not_at_the_dense_one():
    # L = (w m)^2 summed: dL/d(w m) = 2 w m = (6, 0); at the dense weight it would be (6, 8).
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 4]])
    original = attach(layer, "weight", MaskSTE(torch.tensor([[1.0, 0]])))
    layer.weight.square().sum().backward()
    assert original.grad.tolist() == [[6, 0]]


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3)])
def test_backward_is_the_identity(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, requires_grad=True)
    mask = (torch.rand(shape, generator=generator) < 0.3).float()
    gradient = torch.randn(shape, generator=generator)
    output = MaskSTE(mask)(weight)
    assert torch.equal(output, weight.detach() * mask)
    (found,) = torch.autograd.grad(output, weight, gradient)
    assert torch.equal(found, gradient)


def test_writing_the_mask_changes_the_forward_pass():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 4]])
    mask = torch.ones(1, 2)
    attach(layer, "weight", MaskSTE(mask))
    assert layer.weight.tolist() == [[3, 4]]
    mask.copy_(torch.tensor([[0.0, 1]]))
    assert layer.weight.tolist() == [[0, 4]]


def test_attach_returns_what_the_optimizer_sees():
    model = tiny_model("conv")
    plain = model.conv1.weight
    values = plain.detach().clone()
    original = attach(model, "conv1.weight", MaskSTE(torch.zeros_like(values)))
    assert dict(model.named_parameters())["conv1.parametrizations.weight.original"] is original
    assert torch.equal(original, values)
    assert original.requires_grad
    assert not model.conv1.weight.any()


def test_the_mask_is_in_no_state_dict():
    model = tiny_model("conv")
    attach(model, "conv1.weight", MaskSTE(torch.ones_like(model.conv1.weight)))
    assert not [name for name in model.state_dict() if "mask" in name]


def test_baking_leaves_the_plain_modules_with_exact_zeros():
    model = tiny_model("conv")
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    types = {name: type(module) for name, module in model.named_modules()}
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name in ("conv1.weight", "conv2.weight", "classifier.weight"):
        masks[name] = (torch.rand(plain[name].shape, generator=generator) < 0.4).float()
        attach(model, name, MaskSTE(masks[name]))
    model.eval()
    images = torch.randn(2, 3, 16, 16, generator=generator)
    before = model(images)
    bake(model)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    baked = model.state_dict()
    assert set(baked) == set(plain)
    for name, value in plain.items():
        assert torch.equal(baked[name], value * masks[name] if name in masks else value)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert torch.equal(model(images), before)


def test_baking_a_plain_network_does_nothing():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bake(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["dpf", "top_kast", "l0", "str", "soft_deepr", "variational_dropout"]
)
def test_a_weight_that_two_modules_use_is_refused(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    masks = {"0.weight": torch.ones(4, 4), "3.weight": torch.ones(2, 4)}
    with pytest.raises(TypeError, match=r"^0\.weight and 2\.weight are one weight, which "):
        get_method(name)().prepare(model, masks, (1, 2, 2))
