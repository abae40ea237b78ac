from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from bench.counting import (
    ACTIVATIONS,
    Totals,
    _product,
    count_layers,
    count_totals,
    with_kept,
)
from models import MODELS, create_model


@pytest.fixture(autouse=True)
def seed():
    # An unlucky draw has weights that are exactly zero.
    torch.manual_seed(0)


def totals_of(model: nn.Module, shape: tuple[int, ...]) -> Totals:
    return count_totals(model, count_layers(model, shape))


def macs_of(model: nn.Module, shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    return {line.name: (line.dense_macs, line.macs) for line in count_layers(model, shape)}


# Columns: parameters, weights, convolution weights, 1x1 shortcut weights, normalisation, biases,
# MACs; worked out from the layers' shapes.
@pytest.mark.parametrize(
    ("name", "options", "shape", "expected"),
    [
        ("lenet_300_100", {}, (1, 28, 28), (266_610, 266_200, 0, 0, 0, 410, 266_200)),
        ("lenet5", {}, (1, 28, 28), (431_080, 430_500, 25_500, 0, 0, 580, 2_293_000)),
        (
            "resnet20",
            {"shortcut": "A"},
            (3, 32, 32),
            (269_722, 268_336, 267_696, 0, 1_376, 10, 40_551_040),
        ),
        (
            "resnet20",
            {"shortcut": "B"},
            (3, 32, 32),
            (272_474, 270_896, 270_256, 2_560, 1_568, 10, 40_813_184),
        ),
        (
            "timm:resnet50",
            {},
            (3, 224, 224),
            (25_557_032, 25_502_912, 23_454_912, 2_768_896, 53_120, 1_000, 4_089_184_256),
        ),
    ],
    ids=["lenet_300_100", "lenet5", "resnet20-A", "resnet20-B", "timm:resnet50"],
)
def test_totals_of_known_networks_are_exact(name, options, shape, expected):
    counted = totals_of(create_model(name, shape, **options), shape)
    assert expected == (
        counted.parameters,
        counted.weights,
        counted.conv_weights,
        counted.shortcut_weights,
        counted.norm,
        counted.bias,
        counted.dense_macs,
    )


TIMM = {
    "resnet50": 64,
    "mobilenetv3_small_050": 64,
    "efficientnet_b0": 64,
    "convnext_atto": 64,
    "regnety_002": 64,
    "densenet121": 64,
    "vgg11": 64,
    "inception_v3": 128,
    "vit_tiny_patch16_224": 32,
    "swin_tiny_patch4_window7_224": 224,
    "mixer_s32_224": 224,
}


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, 32) for name in MODELS), *((f"timm:{name}", size) for name, size in TIMM.items())],
)
def test_dense_macs_are_half_of_the_flops_that_torch_counts(name, size):
    shape = (3, size, size)
    with torch.device("meta"):
        model = create_model(name, shape).eval()
        image = torch.zeros(1, *shape)
    # Not every release of torch counts the attention kernel of the CPU; all count its plain form.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        model(image)
    assert 2 * totals_of(model, shape).dense_macs == flops.get_total_flops()


def convolve(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, int]:
    """A convolution by plain loops, and its multiplications by weights that are not zero."""
    (padding, _), (stride, _), (dilation, _) = layer.padding, layer.stride, layer.dilation
    x = functional.pad(x, (padding,) * 4)
    outputs, inputs, *kernel = layer.weight.shape
    reach = [dilation * (k - 1) for k in kernel]
    height, width = ((x.shape[1 + d] - reach[d] - 1) // stride + 1 for d in (0, 1))
    y, count = torch.zeros(outputs, height, width), 0
    for o, i, r, c, u, v in itertools.product(
        range(outputs), range(inputs), range(height), range(width), *map(range, kernel)
    ):
        if weight := layer.weight[o, i, u, v].item():
            channel = o // (outputs // layer.groups) * inputs + i
            y[o, r, c] += weight * x[channel, r * stride + u * dilation, c * stride + v * dilation]
            count += 1
    return y, count


def scatter(layer: nn.ConvTranspose2d, x: Tensor) -> tuple[Tensor, int]:
    """A transposed convolution by plain loops: every input pixel spreads over its outputs."""
    (padding, _), (stride, _) = layer.padding, layer.stride
    inputs, outputs, *kernel = layer.weight.shape
    height, width = ((x.shape[1 + d] - 1) * stride + kernel[d] for d in (0, 1))
    y, count = torch.zeros(outputs * layer.groups, height, width), 0
    for i, o, r, c, u, v in itertools.product(
        range(inputs), range(outputs), *map(range, x.shape[1:]), *map(range, kernel)
    ):
        if weight := layer.weight[i, o, u, v].item():
            channel = i // (inputs // layer.groups) * outputs + o
            y[channel, r * stride + u, c * stride + v] += weight * x[i, r, c]
            count += 1
    return y[:, padding : height - padding, padding : width - padding], count


def multiply(layer: nn.Linear, x: Tensor) -> tuple[Tensor, int]:
    y, count = torch.zeros(layer.out_features), 0
    for o, i in itertools.product(range(layer.out_features), range(layer.in_features)):
        if weight := layer.weight[o, i].item():
            y[o] += weight * x[i]
            count += 1
    return y, count


LAYERS = {
    "plain": nn.Conv2d(3, 4, 3, bias=False),
    "padded": nn.Conv2d(3, 4, 3, padding=1, bias=False),
    "strided": nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
    "dilated": nn.Conv2d(3, 4, 3, dilation=2, padding=2, bias=False),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6, padding=1, bias=False),
    "oblong": nn.Conv2d(3, 4, (1, 3), bias=False),
    "transposed": nn.ConvTranspose2d(4, 3, 3, bias=False),
    "transposed strided": nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, bias=False),
    "transposed grouped": nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False),
    "transposed padded": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
    "dilated strided": nn.Conv2d(4, 4, 3, stride=2, dilation=2, padding=3, groups=2, bias=False),
    "multiplier": nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3, bias=False),
    "linear": nn.Linear(12, 7, bias=False),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_macs_equal_multiplications_by_nonzero_weights_in_plain_loops(kind):
    generator = torch.Generator().manual_seed(0)
    layer = LAYERS[kind]
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.weight *= torch.rand(layer.weight.shape, generator=generator) < 0.4
    shape = (12,) if kind == "linear" else (layer.in_channels, 7, 6)
    x = torch.randn(shape, generator=generator)
    loops = {nn.Conv2d: convolve, nn.ConvTranspose2d: scatter, nn.Linear: multiply}[type(layer)]
    y, count = loops(layer, x)
    torch.testing.assert_close(layer(x[None])[0], y)  # the loops do what the layer does
    (line,) = count_layers(layer, shape)
    assert line.macs == count
    assert line.nonzero == int((layer.weight != 0).sum()) < line.weights
    assert line.dense_macs * line.nonzero == line.macs * line.weights


def test_macs_of_a_masked_network_are_the_sum_over_its_layers():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),  # 8x8 positions
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=4),  # 3x3 positions
        nn.Flatten(),
        nn.Linear(36, 5),  # 1 position
    )
    keep = {0: 11, 3: 7, 5: 20}
    for index, count in keep.items():
        weight = network[index].weight.data
        weight.copy_(torch.zeros_like(weight))
        weight.view(-1)[:count] = 1
    lines = count_layers(network, (2, 8, 8), prunable={"0.weight", "5.weight"})
    assert [(line.name, line.nonzero, line.macs, line.prunable) for line in lines] == [
        ("0.weight", 11, 11 * 64, True),
        ("3.weight", 7, 7 * 9, False),
        ("5.weight", 20, 20, True),
    ]
    totals = count_totals(network, lines)
    assert (totals.norm, totals.bias, totals.weights) == (8, 4 + 4 + 5, 72 + 36 + 180)
    assert totals.macs == 11 * 64 + 7 * 9 + 20
    assert totals.nonzero == sum(int((p != 0).sum()) for p in network.parameters())


def bruteforce(layers: list[nn.Module], x: Tensor) -> tuple[Tensor, int]:
    """A network by plain loops, and its multiplications by weights that are not zero."""
    loops = {nn.Conv2d: convolve, nn.ConvTranspose2d: scatter, nn.Linear: multiply}
    total = 0
    for layer in layers:
        if type(layer) in loops:
            x, count = loops[type(layer)](layer, x)
            total += count
        else:
            x = layer(x[None])[0]
    return x, total


NETWORKS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "depthwise separable": (
        [
            nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(3),
            nn.ReLU6(),
            nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False),
            nn.Conv2d(3, 4, 1, bias=False),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 2 * 2, 3, bias=False),
        ],
        (2, 8, 7),
    ),
    "down and up": (
        [
            nn.ZeroPad2d(1),
            nn.Conv2d(2, 4, 3, stride=2, dilation=2, bias=False),
            nn.LeakyReLU(),
            nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, groups=2, bias=False),
        ],
        (2, 7, 9),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_of_masked_networks_equal_their_multiplications_in_plain_loops(name):
    layers, shape = NETWORKS[name]
    network = nn.Sequential(*layers).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, _ConvNd | nn.Linear):
                layer.weight.normal_(generator=generator)
                layer.weight *= torch.rand(layer.weight.shape, generator=generator) < 0.3
        x = torch.randn(shape, generator=generator)
        y, count = bruteforce(layers, x)
        torch.testing.assert_close(network(x[None])[0], y)
    assert totals_of(network, shape).macs == count


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        # Convention A + 3 operations for each output of a normalisation: DPF's 216M, 848M, 3366M.
        ("wrn_28_2", 214_353_152 + 3 * 475_136),
        ("wrn_28_4", 845_597_184 + 3 * 933_888),
        ("wrn_28_8", 3_360_084_992 + 3 * 1_851_392),
    ],
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_convention_b_gives_the_macs_that_dpf_prints(name, macs, context):
    shape = (3, 32, 32)
    with torch.device("meta"):
        model = create_model(name, shape)
    # In inference mode, PyTorch hands over whole layers instead of their parts.
    inner, model.forward = model.forward, lambda x: context()(inner)(x)
    counted = totals_of(model, shape)
    assert counted.dense_macs + counted.elementwise == macs


ELEMENTWISE = [
    (nn.BatchNorm2d(4), 2),
    (nn.BatchNorm2d(4, affine=False), 1),
    (nn.GroupNorm(2, 4), 2),
    (nn.GroupNorm(2, 4, affine=False), 1),
    (nn.LayerNorm((4, 3, 3)), 2),
    (nn.LayerNorm((4, 3, 3), elementwise_affine=False), 1),
    (nn.InstanceNorm2d(4, affine=True), 2),
    *((activation, 1) for activation in (nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.LeakyReLU())),
    *((activation, 1) for activation in (nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(), nn.ELU())),
    *((activation, 1) for activation in (nn.Hardswish(), nn.PReLU(), nn.Mish(), nn.SELU())),
    *((free, 0) for free in (nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Sigmoid())),
]


@pytest.mark.parametrize(("layer", "operations"), ELEMENTWISE, ids=str)
def test_convention_b_counts_operations_for_each_output(layer, operations):
    # 4 maps of 3x3; the bias and the classifier add nothing.
    model = nn.Sequential(nn.Conv2d(2, 4, 1), layer, nn.Flatten(), nn.Linear(36, 2))
    lines = {line.name: line.elementwise for line in count_layers(model, (2, 3, 3))}
    assert lines == {"0.weight": operations * 36, "3.weight": 0}


def test_elementwise_operations_belong_to_the_layer_in_front_of_them():
    model = nn.Sequential(
        nn.BatchNorm2d(2),  # of the image: nobody is in front
        *(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU()),
    )
    lines = count_layers(model, (2, 4, 4))
    assert [(line.name, line.elementwise) for line in lines] == [
        ("1.weight", 3 * 3 * 16 + 3 * 4),
        ("7.weight", 5),
        (ACTIVATIONS, 2 * 2 * 16),
    ]
    assert count_totals(model, lines).elementwise == 144 + 12 + 5 + 64


def test_what_is_computed_from_parameters_only_is_in_front_of_nothing():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(5))
            self.layer = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(2 * functional.relu(self.shift) + self.layer(x))

    assert [(n.name, n.elementwise) for n in count_layers(Shifted(), (4,))] == [("layer.weight", 5)]


def test_live_weights_units_and_macs_by_hand():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),  # 64 positions
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.ConvTranspose2d(4, 6, 1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    for module in network:
        if isinstance(module, _ConvNd | nn.Linear):
            nn.init.ones_(module.weight)
    network[0].weight.data[1] = 0  # what follows filter 1 is dead
    network[5].weight.data[:, 5] = 0  # and what leads to feature 5
    lines = count_layers(network, (2, 8, 8), live=True)
    assert [(line.nonzero, line.live, line.live_units) for line in lines] == [
        (54, 54, (3, 2)),
        (36, 27, (3, 3)),
        (12, 3 + 2 * 2, (5, 3)),  # one channel to 3 outputs, two channels to 2
        (15, 15, (3, 5)),
    ]
    totals = count_totals(network, lines)
    assert totals.live == 54 + 27 + 7 + 15
    assert totals.live_macs == 64 * (54 + 27 + 7) + 15
    unseen = count_totals(network, count_layers(network, (2, 8, 8)))
    assert (unseen.live, unseen.live_macs) == (None, None)


def test_a_network_that_cannot_be_followed_has_no_live_counts():
    def fails(x: Tensor) -> Tensor:
        if x.requires_grad:  # as it never does in counting
            raise RuntimeError("nobody thought of this")
        return x

    model = nn.Sequential(nn.Linear(4, 2))
    model.forward = lambda x: fails(model[0](x))
    (line,) = count_layers(model, (4,), live=True)
    assert (line.macs, line.live, line.live_units) == (8, None, None)
    assert count_totals(model, (line,)).live is None


def test_kept_counts_take_the_place_of_the_non_zeros():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3))
    lines = with_kept(count_layers(model, (1, 4, 4), ["0.weight"]), {"0.weight": 5})
    assert [(line.nonzero, line.macs, line.prunable) for line in lines] == [
        (5, 5 * 16, True),
        (96, 96, False),
    ]


def test_depthwise_convolution_counts_each_weight_once_per_position():
    # 64 channels, 9 weights each, 10x10 positions; without groups it would be 64 times as many.
    layer = nn.Conv2d(64, 64, 3, padding=1, groups=64)
    assert macs_of(layer, (64, 10, 10)) == {"weight": (57_600, 57_600)}


def test_convolution_over_a_sequence_is_counted():
    layer = nn.Conv1d(4, 6, 3)  # 72 weights, 8 positions
    assert macs_of(layer, (4, 10)) == {"weight": (576, 576)}


def test_linear_layer_counts_every_token():
    layer = nn.Linear(8, 6, bias=False)
    layer.weight.data[0] = 0
    assert macs_of(layer, (5, 8)) == {"weight": (5 * 48, 5 * 40)}


class Apply(nn.Module):
    """One weight of 4x6 with 4 non-zeros, and any function of it and the images."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.eye(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.weight, x)


@pytest.mark.parametrize(
    ("function", "shape", "uses"),
    [
        (lambda w, x: x @ w, (4,), 1),
        (lambda w, x: w.t() @ x[0], (4, 3), 3),
        (lambda w, x: w @ x[0], (6,), 1),
        (lambda w, x: torch.addmv(x.new_zeros(4), w, x[0]), (6,), 1),
        (lambda w, x: torch.addmm(x.new_zeros(4), x, w.t()), (6,), 1),
        (lambda w, x: functional.linear(x, w), (5, 6), 5),
        (lambda w, x: functional.conv1d(x, w[:, :, None]), (6, 7), 7),
        (lambda w, x: x.new_zeros(3, 2, 6).baddbmm_(x[0], w.expand(3, 4, 6)), (3, 2, 4), 6),
        (lambda w, x: torch.einsum("nhti,io->nhto", x, w), (3, 2, 4), 6),
        (lambda w, x: w.t() @ torch.ones(4, 3) + x, (3,), 3),
        (
            lambda w, x: torch.ops.aten._convolution(
                x, w[:, :, None], None, [1], [0], [1], False, [0], 1, False, False, True, True
            ),
            (6, 7),
            7,
        ),
    ],
    ids=[
        *("mm", "view", "mv", "addmv", "addmm", "linear"),
        *("conv", "baddbmm", "einsum", "constant", "traced conv"),
    ],
)
def test_weight_counts_once_per_use_in_every_product(function, shape, uses):
    expected = {"weight": (24 * uses, 4 * uses)}
    assert macs_of(Apply(function), shape) == expected
    # Inside of inference mode, PyTorch hands over whole layers instead of their parts.
    inferred = Apply(torch.inference_mode()(function))
    assert macs_of(inferred, shape) == expected


def test_fixed_kernel_is_no_weight_but_is_multiplied():
    sobel = torch.tensor([[[[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]]])
    model = Apply(lambda w, x: functional.conv2d(x, sobel))
    assert macs_of(model, (1, 6, 6)) == {ACTIVATIONS: (9 * 16, 6 * 16)}


def test_learned_query_is_no_weight_after_its_projection():
    projection = torch.ones(6, 6)
    model = Apply(lambda w, x: (w @ projection) @ x.transpose(1, 2))  # 4 queries, 5 keys
    counted = macs_of(model, (5, 6))
    assert counted == {"weight": (24 * 6, 4 * 6), ACTIVATIONS: (4 * 5 * 6, 4 * 5 * 6)}


class Batched(nn.Module):
    """One matrix for each of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.ones(3, 4, 5))
        self.experts.data[1] = 0

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nti,eio->neto", x, self.experts)


def test_weight_in_a_batched_product_is_found():
    assert macs_of(Batched(), (7, 4)) == {"experts": (60 * 7, 40 * 7)}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x)[:, :, ::2, ::2])


def test_weight_used_twice_has_its_macs_twice_and_its_parameters_once():
    model = Twice()
    model.conv.weight.data[0] = 0
    (line,) = count_layers(model, (3, 8, 8))
    assert (line.weights, line.nonzero) == (81, 54)
    assert (line.dense_macs, line.macs) == (81 * (64 + 16), 54 * (64 + 16))
    assert count_totals(model, (line,)).parameters == 81


def test_tied_modules_are_one_line():
    layer = nn.Linear(4, 4)
    assert macs_of(nn.Sequential(layer, nn.ReLU(), layer), (4,)) == {"0.weight": (32, 32)}


class Standardised(nn.Conv2d):
    """The convolution sees a weight that is computed from its parameter."""

    def __init__(self) -> None:
        super().__init__(4, 6, 3, bias=False)
        self.gain = nn.Parameter(torch.ones(6, 1, 1, 1))
        self.mask = torch.ones(6, 4, 3, 3)
        self.mask[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gain * (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(x, weight * self.mask, None)


def test_computed_weight_counts_by_the_nonzeros_that_the_operation_used():
    model = Standardised()
    (line,) = count_layers(model, (4, 5, 5))
    assert line.name == "weight"
    assert line.nonzero == 216
    assert (line.dense_macs, line.macs) == (216 * 9, 180 * 9)


def test_parametrized_linear_counts_by_the_nonzeros_that_the_operation_used():
    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.eye(4))

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Mask())
    assert macs_of(layer, (4,)) == {"parametrizations.weight.original": (16, 4)}


class Attention(nn.Module):
    def __init__(self, kernel: SDPBackend | None = None) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = x[:, :, :3], x, x
        if self.kernel is None:
            return functional.scaled_dot_product_attention(query, key, value)
        with sdpa_kernel(self.kernel):
            return functional.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("kernel", [None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_counts_both_of_its_products(kernel):
    # 2 heads, 3 queries, 5 keys, 4 dimensions: 2 * 3 * 5 * 4 for the scores, the same for the sum.
    (line,) = count_layers(Attention(kernel), (2, 5, 4))
    assert (line.name, line.shape, line.weights) == (ACTIVATIONS, (), 0)
    assert line.dense_macs == line.macs == 120 + 120


def test_fused_attention_counts_values_wider_than_the_keys():
    query, key, value = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 7)
    op = "_scaled_dot_product_efficient_attention"  # exists on GPUs only
    assert _product(op, (query, key, value), None) == (2 * 3 * 5 * (4 + 7), [])


def test_multihead_attention_is_not_hidden_by_its_fast_path():
    # 5 tokens of 8 dimensions, 2 heads of 4: 3 * 64 and 64 weights, products 2 * (5 * 5 * 8).
    class SelfAttention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, x, x, need_weights=False)[0]

    model = SelfAttention(8, 2, batch_first=True)
    model.in_proj_weight.data[8:16] = 0
    fast = torch.backends.mha.get_fastpath_enabled()
    assert macs_of(model, (5, 8)) == {
        "in_proj_weight": (192 * 5, 128 * 5),
        "out_proj.weight": (64 * 5, 64 * 5),
        ACTIVATIONS: (400, 400),
    }
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_transformer_encoder_is_counted_in_full():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    # 5 tokens: projections 256 weights, feed-forward 256 weights, products 2 * 5 * 5 * 8.
    assert totals_of(layer, (5, 8)).dense_macs == 5 * 512 + 400


def test_vision_transformer_agrees_with_a_count_by_hand():
    shape = (3, 32, 32)
    model = create_model("timm:vit_tiny_patch16_224", shape, classes=10)
    counted = macs_of(model, shape)
    # 12 blocks; 4 patches and the class token; 3 heads of 64 dimensions.
    assert counted[ACTIVATIONS][0] == 12 * 2 * (3 * 5 * 5 * 64)
    assert counted["patch_embed.proj.weight"][0] == 4 * (192 * 3 * 16 * 16)
    assert counted["blocks.3.attn.qkv.weight"][0] == 5 * (3 * 192 * 192)
    assert counted["blocks.3.mlp.fc1.weight"][0] == 5 * (4 * 192 * 192)
    assert counted["head.weight"][0] == 192 * 10
    blocks = 12 * (5 * 12 * 192 * 192 + 2 * 3 * 5 * 5 * 64)
    assert totals_of(model, shape).dense_macs == blocks + 4 * 147_456 + 1_920
    # Neither a position embedding nor a class token is the weight of a product.
    assert not {"pos_embed", "cls_token"} & counted.keys()


def test_strided_trunk_convolution_is_no_shortcut():
    # ConvNeXt calls the 2x2 convolutions between its stages `downsample`.
    shape = (3, 32, 32)
    model = create_model("timm:convnext_atto", shape)
    assert any("downsample.1.weight" in name for name in macs_of(model, shape))
    assert totals_of(model, shape).shortcut_weights == 0


class Stateful(nn.Module):
    """Counts its calls in a buffer, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.frozen(self.norm(x))


def test_modes_and_buffers_are_left_as_they_were():
    model = Stateful()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    same = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    count_layers(model, (3, 4, 4))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert same == {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    assert [module.training for module in model.modules()] == [True, True, False]


class Auxiliary(nn.Module):
    """Has a second head in training, and a cache that is dropped when training begins."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.second = nn.Linear(4, 2), nn.Linear(4, 2)
        self.cache: Tensor | None = None

    def train(self, mode: bool = True) -> Auxiliary:
        self.cache = None if mode else self.cache
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.head(x) + self.second(x)
        self.cache = self.head(x)
        return self.cache


def test_network_is_counted_in_evaluation_mode_and_told_when_it_ends():
    model = Auxiliary()
    assert macs_of(model, (4,)) == {"head.weight": (8, 8)}
    assert model.training
    assert model.cache is None


def test_modes_are_restored_when_the_forward_fails():
    model = nn.Sequential(nn.Linear(4, 4))
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        count_layers(model, (5,))
    assert all(module.training for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_counting_changes_neither_the_weights_nor_the_random_stream():
    model = create_model("resnet20", (3, 32, 32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    count_layers(model, (3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_count_does_not_depend_on_the_gradient_mode_of_the_caller(context):
    with context():
        assert macs_of(create_model("lenet5", (1, 28, 28)), (1, 28, 28)) == {
            "conv1.weight": (500 * 576, 500 * 576),
            "conv2.weight": (25_000 * 64, 25_000 * 64),
            "fc1.weight": (400_000, 400_000),
            "classifier.weight": (5_000, 5_000),
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_image_has_the_type_of_the_weights(dtype):
    assert macs_of(nn.Linear(4, 2).to(dtype), (4,)) == {"weight": (8, 8)}


def test_prunable_parameter_that_is_never_used_is_listed():
    model = nn.Sequential(nn.Linear(4, 2))
    model.spare = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))
    model.forward = lambda x: model[0](x)
    lines = count_layers(model, (4,), prunable=["spare"])
    assert [(line.name, line.nonzero, line.dense_macs, line.prunable) for line in lines] == [
        ("spare", 2, 0, True),
        ("0.weight", 8, 8, False),
    ]
    assert count_totals(model, lines).weights == 8


def test_prunable_name_that_is_no_parameter_is_refused():
    with pytest.raises(ValueError, match="the model has no parameter nope"):
        count_layers(nn.Linear(4, 2), (4,), prunable={"weight", "nope"})
