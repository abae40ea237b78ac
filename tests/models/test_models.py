from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from bench.counting import count_layers, count_totals
from models import MODELS, create_model, is_known, model_options, names_like
from models.resnet_cifar import ResNet

SHAPES = {"lenet_300_100": (1, 28, 28), "lenet5": (1, 28, 28), "resnet20": (3, 32, 32)}
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


def test_every_model_has_a_shape_here_and_a_row_in_the_readme():
    assert MODELS.keys() == SHAPES.keys()
    assert {row[0] for row in readme_rows()} >= MODELS.keys()


@pytest.mark.parametrize("row", readme_rows(), ids=lambda row: f"{row[0]} {row[1]}".strip())
def test_readme_states_the_counted_numbers(row):
    name, option, _, shape, *numbers = row
    options = dict([option.split("=")]) if option else {}
    shape = tuple(map(int, shape.split("x")))
    model = create_model(name, shape, **options)
    totals = count_totals(model, count_layers(model, shape))
    counted = [totals.parameters, totals.weights, totals.dense_macs]
    assert [f"{number:,}" for number in counted] == numbers


@pytest.mark.parametrize("name", MODELS)
def test_model_maps_a_batch_to_finite_logits_with_gradients(name):
    torch.manual_seed(0)
    model = create_model(name, SHAPES[name], classes=7)
    logits = model(torch.randn(3, *SHAPES[name]))
    assert logits.shape == (3, 7)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_own_models_have_ten_classes_unless_told(name):
    model = create_model(name, SHAPES[name]).eval()
    assert model(torch.zeros(1, *SHAPES[name])).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in MODELS), ("resnet20", {"shortcut": "B"})],
)
def test_model_traces_into_one_graph(name, options):
    # The backend "eager" keeps the front end, which is what refuses a graph break, and is quick.
    torch.manual_seed(0)
    model = create_model(name, SHAPES[name], **options).eval()
    images = torch.randn(2, *SHAPES[name])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_gives_the_same_weights(name):
    first, second = (
        (torch.manual_seed(seed), create_model(name, SHAPES[name]).state_dict())[1]
        for seed in (3, 3)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


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


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("lenet_300_100", "flatten fc1 relu fc2 relu classifier"),
        ("lenet5", "conv1 relu pool conv2 relu pool flatten fc1 relu classifier"),
    ],
)
def test_lenet_is_the_chain_of_its_layers(name, layers):
    torch.manual_seed(0)
    model = create_model(name, (1, 28, 28))
    plain = {"flatten": nn.Flatten(), "relu": nn.ReLU(), "pool": nn.MaxPool2d(2)}
    named = plain | dict(model.named_children())
    chain = nn.Sequential(*(named[layer] for layer in layers.split()))
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(model(images), chain(images))


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


# Parameters and MACs of the deeper networks, from the layer formula, for 3x32x32 and 10 classes.
@pytest.mark.parametrize(
    ("depth", "shortcut", "parameters", "macs"),
    [
        (32, "A", 464_154, 68_862_592),
        (44, "B", 661_338, 97_436_288),
        (56, "A", 853_018, 125_485_696),
        (110, "B", 1_730_714, 253_149_824),
    ],
)
def test_resnet_of_other_depths_has_the_known_counts(depth, shortcut, parameters, macs):
    model = ResNet(depth, 3, 10, shortcut)
    totals = count_totals(model, count_layers(model, (3, 32, 32)))
    assert (totals.parameters, totals.dense_macs) == (parameters, macs)


def test_resnet_refuses_a_depth_that_is_not_6k_plus_2():
    with pytest.raises(ValueError, match="depth: found 18; allowed: 8, 14, 20"):
        ResNet(18, 3, 10)


def test_options_are_the_keyword_only_parameters_of_the_builder():
    assert model_options("resnet20") == {"shortcut": "A"}
    assert model_options("lenet5") == model_options("lenet_300_100") == {}
    assert model_options("timm:resnet18") == {}


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("resnet2", (3, 32, 32), {}, "no such model: 'resnet2'; known: lenet5, lenet_300_100, res"),
        ("timm:resnt18", (3, 32, 32), {}, "no such model: 'timm:resnt18'; known: timm:resnet18"),
        ("resnet20", (3, 32, 32), {"short": 1}, "no such option: short = 1; allowed: shortcut"),
        ("lenet5", (1, 28, 28), {"short": 1}, "lenet5: no such option: short = 1; allowed: none"),
        ("resnet20", (3, 32, 32), {"shortcut": "C"}, "shortcut: found 'C'; allowed: 'A', 'B'"),
        ("lenet5", (1, 8, 8), {}, "lenet5 takes images of at least 16x16, got 1x8x8"),
        ("lenet5", (1, 16, 15), {}, "lenet5 takes images of at least 16x16, got 1x16x15"),
        ("lenet5", (28, 28), {}, "input_shape: found 28x28; allowed: channels, height, width"),
        ("lenet5", (1, 0, 28), {}, "input_shape: found 1x0x28"),
        ("lenet5", (1, 28, 28), {"classes": 0}, "classes: found 0; allowed: 1 or more"),
        ("timm:resnet18", (3, 64, 64), {"dept": 3}, "timm:resnet18 cannot be built .* 'dept'"),
    ],
)
def test_error_says_what_was_found_and_what_is_allowed(name, shape, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, shape, **options)


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
        model = create_model(name, shape)
        assert isinstance(model, nn.Module)
        assert model.training
