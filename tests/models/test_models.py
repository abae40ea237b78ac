from __future__ import annotations

import functools
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import conv2d_same
from torch import nn
from torch.nn import functional

import models
from bench.counting import Totals, count_layers, count_totals
from models import MODELS, create_model, is_known, model_options, names_like
from models.densenet_cifar import DenseNet
from models.resnet_cifar import ResNet
from models.wide_resnet import WideResNet

CIFAR = (3, 32, 32)
MNIST = (1, 28, 28)
FAMILIES = (  # the same code within each
    ("lenet_300_100",),
    ("lenet5",),
    ("conv2", "conv4", "conv6"),
    ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    ("vgg11", "vgg13", "vgg16", "vgg19"),
    ("vgg16_d",),
    ("wrn_16_2", "wrn_16_8", "wrn_16_10", "wrn_22_2", "wrn_22_8"),
    ("wrn_28_2", "wrn_28_4", "wrn_28_8", "wrn_28_10"),
    ("alexnet_s", "alexnet_b"),
    ("densenet_40_12",),
    ("densenet_bc_100_12",),
)
SHAPES = {
    name: MNIST if name.startswith("lenet") else CIFAR for family in FAMILIES for name in family
}
THIN = {"width": 0.1}  # the structure of a network, in a fraction of the time
TIMM = [
    ("timm:resnet18", (3, 64, 64)),
    ("timm:mobilenetv3_small_050", (3, 64, 64)),
    ("timm:convnext_atto", (1, 64, 64)),
    ("timm:vit_tiny_patch16_224", (3, 32, 32)),
    ("timm:vit_tiny_patch16_224", (1, 32, 48)),
]


def readme_rows() -> list[list[str]]:
    text = (Path(models.__file__).parent / "README.md").read_text()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| (timm:)?\w+ \|.*\d", line)
    ]


def options_of(cell: str) -> dict[str, object]:
    """Those of a cell such as `shortcut=B, width=2`."""
    pairs = [pair.split("=") for pair in cell.split(", ")] if cell else []
    words = {"A", "B", "same"}
    return {name: value if value in words else json.loads(value) for name, value in pairs}


@functools.cache
def totals(name: str, shape: tuple[int, int, int], cell: str = "") -> Totals:
    """Counts, which do not depend on the weights: drawing none saves the time."""
    with torch.device("meta"):
        model = create_model(name, shape, **options_of(cell))
    model.to_empty(device="cpu")
    return count_totals(model, count_layers(model, shape))


def weight_shapes(name: str, shape: tuple[int, int, int], **options: object) -> list[torch.Size]:
    with torch.device("meta"):
        model = create_model(name, shape, **options)
    return [module.weight.shape for module in model.modules() if is_layer(module)]


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)


def test_every_model_has_a_shape_here_and_a_row_in_the_readme():
    assert MODELS.keys() == SHAPES.keys()
    assert {row[0] for row in readme_rows()} >= MODELS.keys()


@pytest.mark.parametrize("row", readme_rows(), ids=lambda row: f"{row[0]} {row[1]}".strip())
def test_readme_states_the_counted_numbers(row):
    name, cell, _, shape, *numbers = row
    found = totals(name, tuple(map(int, shape.split("x"))), cell)
    assert [f"{n:,}" for n in (found.parameters, found.weights, found.dense_macs)] == numbers


# Worked out from the papers' definitions, layer by layer; 10 classes.
@pytest.mark.parametrize(
    ("name", "cell", "parameters", "weights", "conv", "shortcut", "norm", "bias", "macs"),
    [
        ("lenet_300_100", "", 266_610, 266_200, 0, 0, 0, 410, 266_200),
        ("lenet_300_100", "batch_norm=true", 267_020, 266_200, 0, 0, 820, 0, 266_200),
        ("lenet5", "", 431_080, 430_500, 25_500, 0, 0, 580, 2_293_000),
        ("conv2", "", 4_301_642, 4_300_992, 38_592, 0, 0, 650, 43_780_608),
        ("conv4", "", 2_425_930, 2_425_024, 259_776, 0, 0, 906, 98_306_560),
        ("conv6", "", 2_262_602, 2_261_184, 1_144_512, 0, 0, 1_418, 153_881_088),
        ("resnet20", "", 269_722, 268_336, 267_696, 0, 1_376, 10, 40_551_040),
        ("resnet32", "", 464_154, 461_872, 461_232, 0, 2_272, 10, 68_862_592),
        ("resnet44", "", 658_586, 655_408, 654_768, 0, 3_168, 10, 97_174_144),
        ("resnet56", "", 853_018, 848_944, 848_304, 0, 4_064, 10, 125_485_696),
        ("resnet110", "", 1_727_962, 1_719_856, 1_719_216, 0, 8_096, 10, 252_887_680),
        ("resnet20", "shortcut=B", 272_474, 270_896, 270_256, 2_560, 1_568, 10, 40_813_184),
        ("resnet32", "shortcut=B", 466_906, 464_432, 463_792, 2_560, 2_464, 10, 69_124_736),
        ("resnet44", "shortcut=B", 661_338, 657_968, 657_328, 2_560, 3_360, 10, 97_436_288),
        ("resnet56", "shortcut=B", 855_770, 851_504, 850_864, 2_560, 4_256, 10, 125_747_840),
        ("resnet110", "shortcut=B", 1_730_714, 1_722_416, 1_721_776, 2_560, 8_288, 10, 253_149_824),
        # The "ResNet-32" of GraSP: 32-64-128 channels.
        (
            *("resnet32", "shortcut=B, width=2"),
            *(1_860_522, 1_855_584, 1_854_304, 10_240, 4_928, 10, 275_612_928),
        ),
        ("vgg11", "", 9_231_114, 9_222_848, 9_217_728, 0, 5_504, 2_762, 152_769_536),
        ("vgg13", "", 9_416_010, 9_407_168, 9_402_048, 0, 5_888, 2_954, 228_267_008),
        ("vgg16", "", 14_728_266, 14_715_584, 14_710_464, 0, 8_448, 4_234, 313_201_664),
        ("vgg19", "", 20_040_522, 20_024_000, 20_018_880, 0, 11_008, 5_514, 398_136_320),
        ("vgg11", "bias=false", 9_228_362, 9_222_848, 9_217_728, 0, 5_504, 10, 152_769_536),
        ("vgg13", "bias=false", 9_413_066, 9_407_168, 9_402_048, 0, 5_888, 10, 228_267_008),
        ("vgg16", "bias=false", 14_724_042, 14_715_584, 14_710_464, 0, 8_448, 10, 313_201_664),
        ("vgg19", "bias=false", 20_035_018, 20_024_000, 20_018_880, 0, 11_008, 10, 398_136_320),
        ("vgg16_d", "", 15_255_626, 15_239_872, 14_710_464, 0, 10_496, 5_258, 313_725_952),
        ("wrn_16_2", "", 691_674, 689_840, 688_560, 10_752, 1_824, 10, 101_106_944),
        ("wrn_16_8", "", 10_961_370, 10_954_160, 10_949_040, 165_888, 7_200, 10, 1_548_145_664),
        ("wrn_16_10", "", 17_116_634, 17_107_632, 17_101_232, 258_560, 8_992, 10, 2_412_173_568),
        ("wrn_22_2", "", 1_079_642, 1_076_912, 1_075_632, 10_752, 2_720, 10, 157_730_048),
        ("wrn_22_8", "", 17_158_106, 17_147_312, 17_142_192, 165_888, 10_784, 10, 2_454_115_328),
        ("wrn_28_2", "", 1_467_610, 1_463_984, 1_462_704, 10_752, 3_616, 10, 214_353_152),
        ("wrn_28_4", "", 5_849_050, 5_841_840, 5_839_280, 41_984, 7_200, 10, 845_597_184),
        ("wrn_28_8", "", 23_354_842, 23_340_464, 23_335_344, 165_888, 14_368, 10, 3_360_084_992),
        ("wrn_28_10", "", 36_479_194, 36_461_232, 36_454_832, 258_560, 17_952, 10, 5_243_328_768),
        ("alexnet_s", "", 5_077_066, 5_066_784, 3_745_824, 0, 6_848, 3_434, 57_664_800),
        ("alexnet_s", "padding=same", 5_077_066, 5_066_784, 3_745_824, 0, 6_848, 3_434, 69_912_576),
        ("alexnet_b", "", 8_501_322, 8_484_896, 3_745_824, 0, 10_944, 5_482, 61_082_912),
        (
            *("alexnet_b", "padding=same"),
            *(8_501_322, 8_484_896, 3_745_824, 0, 10_944, 5_482, 73_330_688),
        ),
        ("densenet_40_12", "", 1_019_722, 1_001_616, 997_136, 0, 18_096, 10, 264_812_928),
        ("densenet_bc_100_12", "", 769_162, 745_164, 741_744, 0, 23_988, 10, 287_929_692),
    ],
)
def test_model_has_the_known_counts(
    name, cell, parameters, weights, conv, shortcut, norm, bias, macs
):
    found = totals(name, SHAPES[name], cell)
    assert (found.parameters, found.weights, found.dense_macs) == (parameters, weights, macs)
    assert (found.conv_weights, found.shortcut_weights) == (conv, shortcut)
    assert (found.norm, found.bias) == (norm, bias)
    assert found.parameters == found.weights + found.norm + found.bias


@pytest.mark.parametrize("name", MODELS)
def test_model_maps_a_batch_to_finite_logits_with_gradients(name):
    torch.manual_seed(0)
    model = create_model(name, SHAPES[name], classes=7, **THIN)
    logits = model(torch.randn(3, *SHAPES[name]))
    assert logits.shape == (3, 7)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_own_models_have_ten_classes_unless_told(name):
    model = create_model(name, SHAPES[name], **THIN).eval()
    assert model(torch.zeros(1, *SHAPES[name])).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((first, {}) for first, *_ in FAMILIES),
        ("resnet20", {"shortcut": "B"}),
        ("wrn_16_2", {"dropout": 0.3}),
        ("conv2", {"dropout": 0.5}),
        ("alexnet_s", {"padding": "same"}),
        ("densenet_40_12", {"dropout": 0.2}),
    ],
)
def test_model_traces_into_one_graph(name, options):
    # The backend "eager" keeps the front end, which is what refuses a graph break, and is quick.
    torch.manual_seed(0)
    model = create_model(name, SHAPES[name], **THIN, **options).eval()
    images = torch.randn(2, *SHAPES[name])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_gives_the_same_weights(name):
    first, second = (
        (torch.manual_seed(seed), create_model(name, SHAPES[name], **THIN).state_dict())[1]
        for seed in (3, 3)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", MODELS)
def test_width_is_a_factor_on_every_hidden_layer(name):
    plain = weight_shapes(name, SHAPES[name])
    double = weight_shapes(name, SHAPES[name], width=2)
    for index, (one, two) in enumerate(zip(plain, double, strict=True)):
        assert two[0] == one[0] * (1 if index == len(plain) - 1 else 2)
        assert two[1] == one[1] * (1 if index == 0 else 2)
        assert two[2:] == one[2:]


@pytest.mark.parametrize("name", MODELS)
def test_narrowest_width_leaves_one_unit_in_each_hidden_layer(name):
    model = create_model(name, SHAPES[name], width=1e-6).eval()
    layers = [(path, module) for path, module in model.named_modules() if is_layer(module)]
    *hidden, (_, last) = layers
    # A transition of a DenseNet has what the layers before it have together.
    units = {len(layer.weight) for path, layer in hidden if "transition" not in path}
    assert (units, len(last.weight)) == ({1}, 10)
    assert model(torch.zeros(1, *SHAPES[name])).shape == (1, 10)


def test_width_is_rounded():
    # 300 * 0.018 = 5.4 and 100 * 0.018 = 1.8; 16, 32 and 64 times 0.3 are 4.8, 9.6 and 19.2.
    assert [shape[0] for shape in weight_shapes("lenet_300_100", MNIST, width=0.018)] == [5, 2, 10]
    resnet = weight_shapes("resnet20", CIFAR, width=0.3)
    assert [shape[0] for shape in resnet] == [5] * 7 + [10] * 6 + [19] * 6 + [10]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet_300_100", (3, 5, 7)),
        ("conv2", (3, 2, 2)),
        ("conv4", (1, 28, 28)),
        ("conv6", (3, 8, 15)),
        ("vgg11", (3, 16, 16)),
        ("vgg16", (1, 28, 28)),
        ("vgg19", (3, 64, 48)),
        ("vgg16_d", (1, 64, 96)),
        ("resnet32", (1, 7, 9)),
        ("wrn_16_2", (4, 9, 7)),
        ("wrn_28_4", (3, 1, 1)),
        ("alexnet_s", (1, 28, 28)),
        ("alexnet_b", (3, 7, 64)),
        ("densenet_40_12", (1, 28, 28)),
        ("densenet_bc_100_12", (3, 4, 9)),
    ],
)
def test_model_takes_images_of_other_sizes(name, shape):
    model = create_model(name, shape, **THIN).eval()
    assert model(torch.randn(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize(("name", "shape"), TIMM)
def test_timm_model_takes_the_shape_of_the_data(name, shape):
    model = create_model(name, shape, classes=5).eval()
    with torch.no_grad():
        assert model(torch.randn(2, *shape)).shape == (2, 5)


def test_timm_model_keeps_its_own_number_of_classes_unless_told():
    assert create_model("timm:resnet18", (3, 64, 64)).num_classes == 1000


def test_keywords_are_passed_on_to_timm():
    model = create_model("timm:resnet18", (3, 32, 32), 10, drop_rate=0.25)
    assert model.drop_rate == 0.25


@pytest.mark.parametrize(("side", "features"), [(16, 50), (19, 50), (28, 800), (32, 1250)], ids=str)
def test_lenet5_fits_its_linear_layer_to_the_image(side, features):
    # 28 -> 24 -> 12 -> 8 -> 4, times 50 filters: 800.
    model = create_model("lenet5", (3, side, side))
    assert model.fc1.in_features == features
    assert model(torch.zeros(1, 3, side, side)).shape == (1, 10)


VGG11 = (
    "conv1_1 norm1_1 relu pool conv2_1 norm2_1 relu pool "
    "conv3_1 norm3_1 relu conv3_2 norm3_2 relu pool "
    "conv4_1 norm4_1 relu conv4_2 norm4_2 relu pool "
    "conv5_1 norm5_1 relu conv5_2 norm5_2 relu average flatten classifier"
)
VGG16_D = (
    "conv1_1 norm1_1 relu conv1_2 norm1_2 relu pool "
    "conv2_1 norm2_1 relu conv2_2 norm2_2 relu pool "
    "conv3_1 norm3_1 relu conv3_2 norm3_2 relu conv3_3 norm3_3 relu pool "
    "conv4_1 norm4_1 relu conv4_2 norm4_2 relu conv4_3 norm4_3 relu pool "
    "conv5_1 norm5_1 relu conv5_2 norm5_2 relu conv5_3 norm5_3 relu pool "
    "flatten fc1 relu norm1 fc2 relu norm2 classifier"
)


ALEXNET = (
    "conv1 norm1 relu conv2 norm2 relu conv3 norm3 relu conv4 norm4 relu conv5 norm5 relu "
    "flatten hidden.fc1 hidden.norm1 relu hidden.fc2 hidden.norm2 relu classifier"
)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("lenet_300_100", "flatten fc1 relu fc2 relu classifier"),
        ("lenet5", "conv1 relu pool conv2 relu pool flatten fc1 relu classifier"),
        (
            "conv4",
            "conv1 relu conv2 relu pool conv3 relu conv4 relu pool "
            "flatten fc1 relu fc2 relu classifier",
        ),
        ("vgg11", VGG11),
        ("vgg16_d", VGG16_D),
        ("alexnet_s", ALEXNET),
    ],
)
def test_model_is_the_chain_of_its_layers(name, layers):
    torch.manual_seed(0)
    model = create_model(name, SHAPES[name])
    chain = chain_of(model, layers, {})
    images = torch.randn(2, *SHAPES[name])
    torch.testing.assert_close(model(images), chain(images))


def chain_of(model: nn.Module, layers: str, more: dict[str, nn.Module]) -> nn.Sequential:
    plain = {"flatten": nn.Flatten(), "relu": nn.ReLU(), "pool": nn.MaxPool2d(2)}
    named = plain | {"average": nn.AvgPool2d(2)} | more
    named |= {
        name.removeprefix("features."): module
        for name, module in model.named_modules()
        if not list(module.children())
    }
    return nn.Sequential(*(named[layer] for layer in layers.split()))


def test_conv2_drops_units_behind_both_hidden_linear_layers():
    model = create_model("conv2", (3, 8, 8), dropout=0.5)
    layers = "conv1 relu conv2 relu pool flatten fc1 relu drop fc2 relu drop classifier"
    chain = chain_of(model, layers, {"drop": nn.Dropout(0.5)})
    images = torch.randn(2, 3, 8, 8)
    results = [(torch.manual_seed(1), network(images))[1] for network in (model, chain)]
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], model.eval()(images))


@pytest.mark.parametrize("name", ["conv4", "wrn_16_2", "densenet_bc_100_12"])
def test_dropout_is_off_by_default(name):
    model = create_model(name, CIFAR, **THIN)
    images = torch.randn(4, *CIFAR)
    state = torch.get_rng_state()
    assert torch.equal(model(images), model(images))
    assert torch.equal(torch.get_rng_state(), state)


def test_lenets_draw_their_weights_layer_by_layer():
    for name, layers in {
        "lenet_300_100": lambda: [nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)],
        "lenet5": lambda: [
            *(nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)),
            *(nn.Linear(800, 500), nn.Linear(500, 10)),
        ],
    }.items():
        torch.manual_seed(5)
        expected = [value for layer in layers() for value in layer.parameters()]
        torch.manual_seed(5)
        drawn = create_model(name, MNIST).parameters()
        assert all(itertools.starmap(torch.equal, zip(drawn, expected, strict=True)))


def test_resnet_blocks_have_readable_names():
    names = dict(create_model("resnet20", (3, 32, 32), shortcut="B").named_parameters())
    assert names["stem.weight"].shape == (16, 3, 3, 3)
    assert names["stages.0.1.conv1.weight"].shape == (16, 16, 3, 3)
    assert [name for name in names if "shortcut" in name and names[name].dim() == 4] == [
        "stages.1.0.shortcut.conv.weight",
        "stages.2.0.shortcut.conv.weight",
    ]


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet_is_stem_blocks_with_shortcuts_mean_and_classifier(shortcut):
    torch.manual_seed(0)
    model = ResNet(14, 3, 10, shortcut)
    images = torch.randn(4, 3, 16, 16)
    x = model.norm(model.stem(images)).relu()
    for block in itertools.chain(*model.stages):
        y = block.norm1(block.conv1(x)).relu()
        x = (block.norm2(block.conv2(y)) + block.shortcut(x)).relu()
    assert x.shape == (4, 64, 4, 4)
    torch.testing.assert_close(model(images), model.classifier(x.flatten(2).mean(2)))


def test_shortcut_a_keeps_every_second_pixel_and_adds_zero_channels():
    shortcut = ResNet(8, 3, 10).stages[1][0].shortcut
    x = torch.arange(2 * 16 * 4 * 4.0).view(2, 16, 4, 4)
    y = shortcut(x)
    assert y.shape == (2, 32, 2, 2)
    assert torch.equal(y[:, :16], x[:, :, [0, 2]][:, :, :, [0, 2]])
    assert not y[:, 16:].any()


def test_resnet_convolutions_have_variance_two_over_fan_out():
    torch.manual_seed(0)
    weight = ResNet(20, 3, 10).stages[2][0].conv1.weight  # 32 to 64 channels: fan-out is 64 * 9
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_resnet_refuses_a_depth_that_is_not_6k_plus_2():
    with pytest.raises(ValueError, match="depth: found 18; allowed: 8, 14, 20"):
        ResNet(18, 3, 10)


def test_wide_resnet_refuses_a_depth_that_is_not_6n_plus_4():
    with pytest.raises(ValueError, match="depth: found 18; allowed: 10, 16, 22"):
        WideResNet(18, 2, 3, 10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_wide_resnet_is_stem_blocks_norm_mean_and_classifier(dropout):
    torch.manual_seed(0)
    model = WideResNet(16, 2, 3, 10, dropout=dropout)
    images = torch.randn(4, 3, 16, 16)
    torch.manual_seed(1)
    x = model.stem(images)
    for block in itertools.chain(*model.stages):
        y = block.norm1(x).relu()
        # The shortcut joins where the shape changes, behind normalisation and ReLU.
        x = x if block.shortcut is None else block.shortcut(y)
        y = functional.dropout(block.norm2(block.conv1(y)).relu(), dropout)
        x = x + block.conv2(y)
    assert x.shape == (4, 128, 4, 4)
    expected = model.classifier(model.norm(x).relu().flatten(2).mean(2))
    torch.manual_seed(1)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 19, 33), (1, 1, 1)])
def test_alexnet_with_same_padding_pads_as_tensorflow_does(shape):
    torch.manual_seed(0)
    model = create_model("alexnet_s", shape, padding="same", width=0.1).eval()
    x = y = torch.randn(2, *shape)
    for number in range(1, 6):
        conv = model.features.get_submodule(f"conv{number}")
        y = conv2d_same(y, conv.weight, conv.bias, stride=(2, 2))  # timm's, for TensorFlow's nets
        y = model.features.get_submodule(f"norm{number}")(y).relu()
        assert y.shape[2:] == tuple(math.ceil(side / 2**number) for side in shape[1:])
    torch.testing.assert_close(model.features(x), y)


@pytest.mark.parametrize("bc", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_densenet_is_stem_blocks_transitions_norm_mean_and_classifier(bc, dropout):
    torch.manual_seed(0)
    model = DenseNet(16, 12, bc, 3, 10, dropout=dropout)
    images = torch.randn(4, 3, 9, 8)
    torch.manual_seed(1)

    def unit(layers: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(layers.conv(layers.norm(x).relu()), dropout)

    x = model.stem(images)
    channels = 24 if bc else 16
    for number in (1, 2, 3):
        for layer in model.blocks.get_submodule(f"block{number}"):
            assert x.shape[1] == channels
            y = unit(layer.bottleneck, x) if bc else x
            assert y.shape[1] == (48 if bc else channels)
            x = torch.cat([x, unit(layer.new, y)], 1)
            channels += 12
        if number < 3:
            x = unit(model.blocks.get_submodule(f"transition{number}"), x)
            x = functional.avg_pool2d(x, 2)
            channels = channels // 2 if bc else channels
    assert x.shape == (4, channels, 2, 2)
    expected = model.classifier(model.norm(x).relu().flatten(2).mean(2))
    torch.manual_seed(1)
    torch.testing.assert_close(model(images), expected)


def test_densenet_convolutions_have_variance_two_over_fan_out():
    torch.manual_seed(0)
    weight = create_model("densenet_bc_100_12", CIFAR).blocks.transition1.conv.weight
    assert weight.shape == (108, 216, 1, 1)
    assert weight.std().item() == pytest.approx((2 / 108) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("bc", "allowed"), [(False, "7, 10"), (True, "10, 16")])
def test_densenet_refuses_a_depth_that_does_not_divide_into_three_blocks(bc, allowed):
    with pytest.raises(ValueError, match=f"depth: found 12; allowed: {allowed} and so on"):
        DenseNet(12, 12, bc, 3, 10)


def test_wide_resnet_has_a_shortcut_layer_where_the_shape_changes():
    names = dict(create_model("wrn_22_2", CIFAR, **THIN).named_parameters())
    assert [name for name in names if "shortcut" in name] == [
        f"stages.{stage}.0.shortcut.weight" for stage in range(3)
    ]
    # 16 -> 32 channels at the same size, then to half the size.
    model = create_model("wrn_22_2", CIFAR)
    assert [model.stages[i][0].shortcut.stride for i in range(3)] == [(1, 1), (2, 2), (2, 2)]
    assert model.stages[0][0].shortcut.weight.shape == (32, 16, 1, 1)
    # A width at which the first stage keeps the stem's channels needs none there.
    assert create_model("wrn_22_2", CIFAR, width=1e-6).stages[0][0].shortcut is None


def test_wide_resnet_convolutions_have_variance_two_over_fan_out():
    torch.manual_seed(0)
    weight = create_model("wrn_16_2", CIFAR).stages[2][0].conv1.weight  # 64 to 128 channels
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_options_are_the_keyword_only_parameters_of_the_builder():
    assert model_options("resnet20") == {"shortcut": "A", "width": 1.0}
    assert model_options("lenet5") == {"width": 1.0}
    assert model_options("lenet_300_100") == {"width": 1.0, "batch_norm": False}
    assert model_options("vgg16") == model_options("vgg16_d") == {"width": 1.0, "bias": True}
    assert model_options("conv6") == model_options("wrn_28_2") == {"width": 1.0, "dropout": 0.0}
    assert model_options("alexnet_b") == {"width": 1.0, "padding": "fixed"}
    assert model_options("densenet_bc_100_12") == {"width": 1.0, "dropout": 0.0}
    assert model_options("timm:resnet18") == {}


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        (
            "resnet2",
            (3, 32, 32),
            {},
            "no such model: 'resnet2'; known: alexnet_b, alexnet_s, conv2, conv4, conv6, dense",
        ),
        ("timm:resnt18", (3, 32, 32), {}, "no such model: 'timm:resnt18'; known: timm:resnet18"),
        ("resnet20", (3, 32, 32), {"short": 1}, "no such option: short = 1; allowed: shortcut"),
        ("lenet5", (1, 28, 28), {"short": 1}, "lenet5: no such option: short = 1; allowed: width$"),
        ("resnet20", (3, 32, 32), {"shortcut": "C"}, "shortcut: found 'C'; allowed: 'A', 'B'"),
        ("lenet5", (1, 8, 8), {}, "lenet5 takes images of at least 16x16, got 1x8x8"),
        ("lenet5", (1, 16, 15), {}, "lenet5 takes images of at least 16x16, got 1x16x15"),
        ("conv2", (3, 1, 2), {}, "conv2 takes images of at least 2x2, got 3x1x2"),
        ("conv4", (3, 4, 3), {}, "conv4 takes images of at least 4x4, got 3x4x3"),
        ("conv6", (3, 7, 8), {}, "conv6 takes images of at least 8x8, got 3x7x8"),
        ("vgg13", (1, 15, 16), {}, "vgg13 takes images of at least 16x16, got 1x15x16"),
        ("vgg16_d", (3, 32, 31), {}, "vgg16_d takes images of at least 32x32, got 3x32x31"),
        ("densenet_40_12", (3, 3, 8), {}, "densenet takes images of at least 4x4, got 3x3x8"),
        ("alexnet_b", (3, 6, 9), {}, "alexnet with fixed padding takes images of at least 7x7"),
        (
            *("alexnet_s", (3, 32, 32), {"padding": "valid"}),
            "padding: found 'valid'; allowed: 'fixed', 'same'",
        ),
        ("vgg16", (3, 32, 32), {"bias": 0}, "bias: found 0; allowed: true, false"),
        ("conv2", (3, 32, 32), {"dropout": 1.0}, "dropout: found 1.0; allowed: a number from 0"),
        ("wrn_16_2", (3, 32, 32), {"dropout": -0.1}, "dropout: found -0.1; allowed: a number"),
        ("wrn_16_2", (3, 32, 32), {"dropout": True}, "dropout: found True; allowed: a number"),
        ("lenet5", (28, 28), {}, "input_shape: found 28x28; allowed: channels, height, width"),
        ("lenet5", (1, 0, 28), {}, "input_shape: found 1x0x28"),
        ("lenet5", (1, 28, 28), {"classes": 0}, "classes: found 0; allowed: 1 or more"),
        ("timm:resnet18", (3, 64, 64), {"dept": 3}, "timm:resnet18 cannot be built .* 'dept'"),
    ],
)
def test_error_says_what_was_found_and_what_is_allowed(name, shape, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, shape, **options)


@pytest.mark.parametrize("width", [0, -1.0, float("inf"), float("nan"), True, "2"])
def test_width_must_be_a_number_above_0(width):
    for name, shape in SHAPES.items():
        with pytest.raises(ValueError, match=r"width: found .*; allowed: a number above 0"):
            create_model(name, shape, width=width)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("resnet20", True),
        ("resnet18", False),
        ("", False),
        ("timm:resnet18", True),
        ("timm:resnet18.a1_in1k", True),
        ("timm:resnet18.nobody", False),
        ("timm:resnt18", False),
        ("timm:", False),
    ],
)
def test_known_names_are_ours_and_those_of_timm(name, known):
    assert is_known(name) is known


def test_names_offered_for_an_unknown_one_can_be_built():
    assert names_like("resnet2") == sorted(MODELS)
    offered = names_like("timm:resnt18")
    assert "timm:resnet18" in offered
    assert all(map(is_known, offered))


def test_table_is_read_without_importing_torch():
    code = "import sys, models; models.names_like('x'); print({'torch', 'timm'} & set(sys.modules))"
    root = Path(models.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_models_are_plain_modules_in_training_mode():
    for name, shape in SHAPES.items():
        model = create_model(name, shape, **THIN)
        assert isinstance(model, nn.Module)
        assert model.training
