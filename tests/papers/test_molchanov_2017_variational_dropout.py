"""Molchanov et al., 2017, arXiv:1701.05369: noise learned for each weight."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from methods.variational import VariationalDropout, divergence, layer, noise_ratio, normal_like
from tests import tiny
from tests.tiny import TINY_RECIPE, tiny_model, tiny_trainer, train

ADAM = dataclasses.replace(TINY_RECIPE, optimizer="adam", lr=0.02, momentum=0.0, nesterov=False)


def started(method, model, **more):
    """The state as a run begins, of images that the first layer takes."""
    first = next(m for m in model.modules() if isinstance(m, nn.Linear | _ConvNd))
    if isinstance(first, nn.Linear):
        shape = (first.in_features,)
    else:
        shape = (first.in_channels, *[8] * len(first.kernel_size))
    return tiny.started(method, model, shape=shape, **more)


def set_ratio(module, log_alpha):
    """Gives each weight the noise of one log alpha."""
    noise = torch.as_tensor(log_alpha) + torch.log(module.weight.data.square() + 1e-8)
    module.log_sigma2.data.copy_(noise)


# The divergence.


@pytest.mark.parametrize(
    ("log_alpha", "expected"),
    [(-8.0, 4.63590), (-3.0, 2.11559), (0.0, 0.43124), (3.0, 0.02542), (8.0, 0.00017)],
)
def test_the_divergence_of_one_weight(log_alpha, expected):
    found = divergence(torch.tensor(log_alpha, dtype=torch.float64))
    assert float(found) == pytest.approx(expected, abs=5e-6)


def test_the_divergence_falls_to_zero_as_the_noise_grows():
    grid = divergence(torch.linspace(-20, 30, 2001, dtype=torch.float64))
    assert (grid.diff() < 0).all()
    assert 0 < grid[-1] < 1e-12


def test_alpha_is_the_variance_over_the_squared_mean():
    # w = 0.5, sigma^2 = e^-2: -2 - log 0.25 = -0.613706; a weight of 0: -10 - log 1e-8 = 8.420681
    found = noise_ratio(torch.tensor([0.5, 0.0]), torch.tensor([-2.0, -10.0]))
    torch.testing.assert_close(found, torch.tensor([-0.613706, 8.420681]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_noise_is_standard_normal_and_lies_as_what_it_is_added_to(form):
    torch.manual_seed(0)
    x = torch.full((10, 20, 8, 12), 7.0).to(memory_format=form)
    noise = normal_like(x)
    assert noise.stride() == x.stride()
    assert (x == 7).all()
    # 19,200 numbers: deviations 0.007, 0.005 and 0.0033.
    assert abs(float(noise.mean())) < 0.03
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert float((noise.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.015)
    assert noise.unique().numel() > 19_000


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_the_variance_lies_as_the_mean_does(channels, form):
    conv = nn.Conv2d(channels, 4, 3).to(memory_format=form)
    x = torch.rand(2, channels, 8, 8).to(memory_format=form)
    variance = layer(conv, x.square(), conv.weight.square(), None)
    assert variance.stride() == conv(x).stride()


@pytest.mark.parametrize(
    ("progress", "share"),
    # Nothing for 5 of 200 epochs, then up to 1 at epoch 20.
    [(0.0, 0.0), (0.025, 0.0), (0.0625, 0.5), (0.1, 1.0), (0.7, 1.0)],
)
def test_the_divergence_is_ramped_up_and_is_per_image(progress, share):
    method, linear = VariationalDropout(kl=2.0), nn.Linear(30, 20)
    state = started(method, linear, examples=60_000)
    set_ratio(linear, 0.0)
    state.progress.fill_(progress)
    expected = share * 2 * 600 * 0.43124 / 60_000
    assert float(method.penalty(state).detach()) == pytest.approx(expected, rel=1e-4)


def test_the_gradient_of_the_divergence_pushes_noise_up_and_weights_down():
    method, linear = VariationalDropout(), nn.Linear(3, 2)
    state = started(method, linear)
    set_ratio(linear, 0.0)
    state.progress.fill_(1.0)
    method.penalty(state).backward()
    # d/dx at 0: -k1 k3 s (1 - s) - 1/4 with s = sigmoid(1.8732) = 0.866839; times 1/512.
    slope = (-0.63576 * 1.48695 * 0.866839 * 0.133161 - 0.25) / 512
    noise = torch.full((2, 3), slope)
    torch.testing.assert_close(linear.log_sigma2.grad, noise, rtol=1e-4, atol=0)
    # log alpha falls with log w^2: -2 / w.
    torch.testing.assert_close(
        linear.weight.grad, -2 / linear.weight.detach() * slope, rtol=1e-3, atol=0
    )


# The noise.


def layer_and_input(kind):
    torch.manual_seed(0)
    layers = {
        "linear": (nn.Linear(12, 4), (12,)),
        "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 7)),
        "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5)),
        "reflected": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
        "one-dimensional": (nn.Conv1d(3, 5, 3, dilation=2), (3, 9)),
    }
    layer, shape = layers[kind]
    return layer, torch.randn(1, *shape)


KINDS = ["linear", "conv", "depthwise", "reflected", "one-dimensional"]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_have_the_moments_of_independent_weights(kind):
    layer, x = layer_and_input(kind)
    with torch.no_grad():
        # A layer is linear in its weight: one weight at a time gives its share of the output.
        dense, weight = layer(x), layer.weight.clone()
        shares = []
        for index in range(weight.numel()):
            layer.weight.zero_()
            layer.weight.view(-1)[index] = weight.view(-1)[index]
            bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (dense.ndim - 2))
            shares.append(layer(x) - bias)
        layer.weight.copy_(weight)
        started(VariationalDropout(), layer)
        log_alpha = torch.rand_like(weight) * 4 - 2
        set_ratio(layer, log_alpha)
        variance = sum(
            math.exp(a) * share**2
            for a, share in zip(log_alpha.view(-1).tolist(), shares, strict=True)
        )
        draws = layer(x.expand(20_000, *x.shape[1:]))
    # The standard error of a mean is sd / 141, that of a variance 1 % of it.
    assert ((draws.mean(0) - dense[0]).abs() < 5 * (variance[0].sqrt() + 1e-4) / 141).all()
    torch.testing.assert_close(draws.var(0), variance[0], rtol=0.06, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_a_layer_is_dense_up_to_the_clip(kind):
    layer, x = layer_and_input(kind)
    with torch.no_grad():
        dense = layer(x)
        started(VariationalDropout(), layer)
        layer.log_sigma2.fill_(-1e4)
        assert torch.equal(layer.eval()(x), dense)
        # log alpha is clipped at -8: what is left is under e^-4 of any weight's share.
        torch.testing.assert_close(layer.train()(x), dense, rtol=0, atol=5 * math.exp(-4) * 3)
        assert not torch.equal(layer(x), dense)


def test_each_image_has_a_draw_of_its_own():
    linear = nn.Linear(12, 4)
    started(VariationalDropout(), linear)
    first, second = linear(torch.ones(2, 12))
    assert not torch.equal(first, second)


def test_gradients_of_a_draw_are_those_of_mean_and_deviation():
    linear = nn.Linear(1, 1, bias=False)
    linear.weight.data.fill_(0.5)
    started(VariationalDropout(), linear)
    set_ratio(linear, 0.0)
    torch.manual_seed(3)
    output = linear(torch.full((1, 1), 2.0))
    torch.manual_seed(3)
    noise = float(torch.randn(1, 1))
    # sd = |x| sigma with sigma = 0.5, which a change of w leaves alone: additive noise.
    assert float(output.detach()) == pytest.approx(1 + noise, rel=1e-5)
    output.backward()
    assert float(linear.weight.grad) == pytest.approx(2.0, rel=1e-5)
    assert float(linear.log_sigma2.grad) == pytest.approx(noise / 2, rel=1e-5)


def test_if_asked_means_above_the_threshold_are_left_out_and_their_noise_stays():
    # x = 2; w = (0.5, 3) with log alpha = (0, 4): variance 4 (0.25 + 9 e^4), mean 7, or 1.
    for clip, mean in ((False, 7.0), (True, 1.0)):
        linear = nn.Linear(2, 1, bias=False)
        linear.weight.data.copy_(torch.tensor([[0.5, 3.0]]))
        started(VariationalDropout(train_clip=clip), linear)
        set_ratio(linear, torch.tensor([[0.0, 4.0]]))
        torch.manual_seed(3)
        output = linear(torch.full((1, 2), 2.0))
        torch.manual_seed(3)
        noise = float(torch.randn(1, 1))
        deviation = math.sqrt(4 * (0.25 + 9 * math.exp(4)))
        assert float(output.detach()) == pytest.approx(mean + deviation * noise, rel=1e-5)
        output.backward()
        # sigma does not change with w, so the mean alone has a gradient: x, or none.
        expected = torch.tensor([[2.0, 0.0 if clip else 2.0]])
        torch.testing.assert_close(linear.weight.grad, expected, rtol=0, atol=1e-3)
        assert (linear.log_sigma2.grad != 0).all()
        assert float(linear.eval()(torch.full((1, 2), 2.0)).detach()) == pytest.approx(1.0)


def test_a_layer_that_does_something_else_with_its_weight_is_refused():
    class Standardised(nn.Linear):
        def forward(self, x):
            return functional.linear(x, self.weight - self.weight.mean(), self.bias)

    with pytest.raises(TypeError, match=r"0\.weight: no noise is known .*Standardised"):
        started(VariationalDropout(), nn.Sequential(Standardised(3, 2)))


def test_a_transposed_convolution_is_refused():
    with pytest.raises(TypeError, match=r"0\.weight: no noise is known .*ConvTranspose2d"):
        started(VariationalDropout(), nn.Sequential(nn.ConvTranspose2d(2, 3, 2)))


def test_a_layer_whose_weight_the_model_uses_without_it_is_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(3, 2)

        def forward(self, x):
            return functional.linear(x, self.qkv.weight)

    with pytest.raises(TypeError, match=r"0\.qkv: the model uses its weight without calling"):
        started(VariationalDropout(), nn.Sequential(Attention()))


def test_a_subclass_that_computes_the_same_takes_noise():
    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    module = nn.Sequential(Named(3, 2))
    started(VariationalDropout(), module)
    assert "log_sigma2" in dict(module[0].named_parameters())


# What is dropped.


def test_weights_are_dropped_from_the_threshold_on():
    method, linear = VariationalDropout(), nn.Linear(4, 1)
    linear.weight.data.copy_(torch.tensor([[0.5, -0.2, 3.0, 0.7]]))
    started(method, linear)
    set_ratio(linear, [[2.999, 3.001, 7.0, -8.0]])
    eye = torch.eye(4)
    looked_at = linear.eval()(eye) - linear.bias
    with torch.no_grad():
        method.make_plain(linear)
    expected = torch.tensor([[0.5, 0.0, 0.0, 0.7]])
    assert torch.equal(linear.weight, expected)
    torch.testing.assert_close(looked_at.T, expected)
    assert type(linear) is nn.Linear
    assert list(linear.state_dict()) == ["weight", "bias"]


def test_the_prior_takes_the_place_of_weight_decay():
    state = started(VariationalDropout(), nn.Linear(3, 2), weight_decay=0.01)
    decay = {id(p): g["weight_decay"] for g in state.optimizer.param_groups for p in g["params"]}
    found = {name: decay[id(p)] for name, p in state.model.named_parameters()}
    assert found == {"weight": 0.0, "bias": 0.01, "log_sigma2": 0.0}


# Real runs.


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_a_larger_divergence_leaves_fewer_weights(model):
    left = []
    for kl in (0.0, 0.3, 30.0):
        method = VariationalDropout(kl=kl, log_sigma2_init=-6.0)
        trainer = train(tiny_trainer(method, model=model, steps=80, recipe=ADAM))
        weights = {n: trainer.state.model.get_parameter(n) for n in trainer.state.masks}
        for name, mask in trainer.state.masks.items():
            assert torch.equal(mask != 0, weights[name] != 0)
        left.append(sum(int(weight.count_nonzero()) for weight in weights.values()))
        types = [type(module) for module in trainer.state.model.modules()]
        assert types == [type(module) for module in tiny_model(model).modules()]
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize("kl", [0.0, 30.0])
def test_a_target_keeps_the_weights_of_least_noise(kl):
    trainer = tiny_trainer(VariationalDropout(kl=kl, target=0.9), steps=60, recipe=ADAM)
    for _ in trainer.run():
        model, names = trainer.state.model, list(trainer.state.masks)
        ratios = {
            n: noise_ratio(model.get_parameter(n), model.get_submodule(n[:-7]).log_sigma2).detach()
            for n in names
        }
    kept = torch.cat([ratios[n][mask == 1] for n, mask in trainer.state.masks.items()])
    dropped = torch.cat([ratios[n][mask == 0] for n, mask in trainer.state.masks.items()])
    assert len(kept) == 1245
    assert kept.max() <= dropped.min()
    assert sum(int(model.get_parameter(n).count_nonzero()) for n in names) == 1245


def test_networks_looked_at_during_training_have_no_noise():
    trainer = tiny_trainer("variational_dropout", model="conv")
    next(trainer.run())
    model = trainer.state.model.eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_the_defaults_are_the_papers():
    method = VariationalDropout()
    assert (method.kl, method.threshold, method.log_sigma2_init) == (1.0, 3.0, -10.0)
    assert (200 * method.delay, 200 * (method.delay + method.warmup)) == (5, pytest.approx(20))
