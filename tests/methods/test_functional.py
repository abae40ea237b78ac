"""Other tensors in a forward pass: what is replaced, and what is back afterwards."""

from __future__ import annotations

import torch
from torch import nn

from methods.functional import call_with


def test_the_tensors_are_used_and_the_models_own_are_back():
    model = nn.Linear(3, 2)
    own = dict(model.named_parameters())
    given = {"weight": torch.eye(2, 3), "bias": torch.tensor([1.0, 2.0])}
    x = torch.tensor([[5.0, 6.0, 7.0]])
    assert call_with(model, given, x).tolist() == [[6.0, 8.0]]
    assert all(parameter is own[name] for name, parameter in model.named_parameters())


def test_what_is_not_given_stays():
    model = nn.Linear(2, 2)
    nn.init.constant_(model.bias, 3.0)
    assert call_with(model, {"weight": torch.eye(2)}, torch.ones(1, 2)).tolist() == [[4.0, 4.0]]


def test_a_module_that_stands_in_two_places_gets_its_own_tensors_back():
    layer, norm = nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)
    model = nn.Sequential(layer, norm, layer, norm)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    copies = {name: tensor.detach().clone() for name, tensor in own.items()}
    copies["0.weight"] = 2 * torch.eye(2)
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    model.eval()
    torch.testing.assert_close(call_with(model, copies, x), 4 * x, rtol=1e-4, atol=0)
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(now[name] is tensor for name, tensor in own.items())
    assert isinstance(layer.weight, nn.Parameter)


def test_a_parameter_of_two_modules_is_replaced_in_both():
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    found = call_with(model, {"0.weight": 3 * torch.eye(2)}, torch.ones(1, 2))
    assert found.tolist() == [[9.0, 9.0]]
    assert second.weight is first.weight
    assert isinstance(first.weight, nn.Parameter)
