"""Initial weights by name: measured moments, and the same ones from the same seed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models import create_model
from models.initialise import KINDS, initialise

CIFAR = (3, 32, 32)


def drawn(name: str, kind: str, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model(name, CIFAR, 10, **options)
    initialise(model, kind)
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def fans(weight: torch.Tensor) -> tuple[int, int]:
    """Inputs that one output sums, and outputs that one input enters."""
    outputs, inputs, *kernel = weight.shape
    return inputs * math.prod(kernel), outputs * math.prod(kernel)


def standardised(weight: torch.Tensor, variance: float) -> torch.Tensor:
    return weight.detach().flatten().double() / math.sqrt(variance)


def check_standard_normal(values: torch.Tensor) -> None:
    """Moments within five standard errors, and tails that are not cut off."""
    error = 5 / math.sqrt(values.numel())
    assert values.mean().item() == pytest.approx(0, abs=error)
    assert values.var().item() == pytest.approx(1, abs=error * math.sqrt(2))
    assert (values**4).mean().item() == pytest.approx(3, abs=error * math.sqrt(96))
    assert (values.abs() > 2).double().mean().item() == pytest.approx(0.0455, abs=error * 0.21)


def test_glorot_normal_has_variance_two_over_both_fans_in_every_layer():
    weights = []
    for layer in layers(drawn("conv6", "glorot_normal")):
        fan_in, fan_out = fans(layer.weight)
        weights.append(standardised(layer.weight, 2 / (fan_in + fan_out)))
        # Frankle & Carbin's networks start without biases.
        assert not layer.bias.any()
    assert len(weights) == 9
    for weight in weights:
        check_standard_normal(weight)


def test_normal_has_a_deviation_of_a_hundredth_whatever_the_layer():
    for layer in layers(drawn("conv2", "normal")):
        check_standard_normal(standardised(layer.weight, 1e-4))
        assert not layer.bias.any()


def test_normal_linear_is_for_linear_layers_and_convolutions_are_glorots_uniform():
    for layer in layers(drawn("conv2", "normal_linear")):
        if isinstance(layer, nn.Linear):
            check_standard_normal(standardised(layer.weight, 1e-4))
        else:
            share = layer.weight.detach() / math.sqrt(6 / sum(fans(layer.weight)))
            assert 0.99 < share.abs().max() <= 1
            assert share.var() == pytest.approx(1 / 3, rel=0.05)
        assert not layer.bias.any()


def test_lecun_normal_has_variance_one_over_fan_in_in_every_layer():
    for layer in layers(drawn("conv4", "lecun_normal")):
        fan_in, _ = fans(layer.weight)
        check_standard_normal(standardised(layer.weight, 1 / fan_in))
        assert not layer.bias.any()


def test_he_fan_out_is_for_convolutions_and_linear_layers_have_fan_in():
    model = drawn("vgg16_d", "he_fan_out", width=0.25)
    for layer in layers(model):
        fan_in, fan_out = fans(layer.weight)
        variance = 2 / (fan_in if isinstance(layer, nn.Linear) else fan_out)
        check_standard_normal(standardised(layer.weight, variance))
        assert not layer.bias.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_weights_and_another_does_not(kind):
    first, second, other = (drawn("vgg11", kind, seed, width=0.1) for seed in (1, 1, 2))
    for a, b, c in zip(layers(first), layers(second), layers(other), strict=True):
        assert torch.equal(a.weight, b.weight)
        assert not torch.equal(a.weight, c.weight)


def test_weights_come_from_torchs_own_generator_layer_by_layer():
    model = create_model("lenet5", (1, 28, 28))
    torch.manual_seed(3)
    initialise(model, "glorot_normal")
    torch.manual_seed(3)
    for layer in (model.conv1, model.conv2, model.fc1, model.classifier):
        deviation = math.sqrt(2 / sum(fans(layer.weight)))
        assert torch.equal(layer.weight, torch.empty_like(layer.weight).normal_(0, deviation))


def test_the_models_own_weights_are_left_alone():
    torch.manual_seed(4)
    plain = create_model("resnet20", CIFAR, width=0.5)
    state = torch.get_rng_state()
    kept = drawn("resnet20", "model", seed=4, width=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, kept.parameters(), plain.parameters()))


def test_normalisation_keeps_its_gains_and_biases():
    model = create_model("resnet20", CIFAR, width=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
            nn.init.constant_(module.bias, 0.25)
    initialise(model, "glorot_normal")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.weight == 0.5).all() and (norm.bias == 0.25).all() for norm in norms)


def test_transposed_and_grouped_convolutions_are_drawn_too():
    model = nn.Sequential(nn.ConvTranspose2d(32, 64, 3), nn.Conv2d(64, 128, 3, groups=4))
    torch.manual_seed(0)
    initialise(model, "glorot_normal")
    # PyTorch's fans: a transposed weight is (inputs, outputs), a grouped one (outputs, inputs / 4).
    for layer, both in ((model[0], (32 + 64) * 9), (model[1], (128 + 16) * 9)):
        check_standard_normal(standardised(layer.weight, 2 / both))


def test_an_unknown_name_is_refused_with_the_known_ones():
    allowed = "allowed: model, glorot_normal, he_fan_out, lecun_normal, normal, normal_linear"
    with pytest.raises(ValueError, match=f"initialisation: found 'xavier'; {allowed}"):
        initialise(nn.Linear(1, 1), "xavier")
