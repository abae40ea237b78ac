"""Presets: which weights count as prunable."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from bench.errors import SuiteError
from bench.prunable import PRESETS, prunable_names
from methods.allocation import keep_count
from methods.api import Shape, SparsityMethod
from models import create_model


@dataclass(frozen=True)
class Hidden(SparsityMethod):
    """A method that leaves the classifier alone."""

    def prunable(self, model: nn.Module) -> tuple[str, ...]:
        # In an order of its own: the result must not follow it.
        return tuple(name for name in reversed(super().prunable(model)) if "classifier" not in name)


def unfilled(name: str, shape: Shape, classes: int | None = 10, **options: object) -> nn.Module:
    """A network whose weights are not made."""
    with torch.device("meta"):
        return create_model(name, shape, classes, **options)


def weights(model: nn.Module, preset: str) -> int:
    names = prunable_names(model, SparsityMethod(), preset)
    return sum(model.get_parameter(name).numel() for name in names)


def test_all_takes_every_convolution_and_linear_layer():
    names = prunable_names(create_model("lenet5", (1, 28, 28)), SparsityMethod(), "all")
    assert names == ("conv1.weight", "conv2.weight", "fc1.weight", "classifier.weight")


def test_dpf_takes_every_convolution_and_no_linear_layer():
    names = prunable_names(create_model("lenet5", (1, 28, 28)), SparsityMethod(), "dpf")
    assert names == ("conv1.weight", "conv2.weight")


@pytest.mark.parametrize(
    ("name", "options", "preset", "count"),
    [
        ("resnet20", {"shortcut": "A"}, "all", 268_336),
        ("resnet20", {"shortcut": "B"}, "all", 270_896),
        ("resnet20", {"shortcut": "A"}, "dpf", 267_696),
        ("resnet20", {"shortcut": "B"}, "dpf", 270_256),
        ("resnet20", {"shortcut": "A"}, "dsr", 267_264),  # less the stem, 9 * 3 * 16 = 432
        ("resnet20", {"shortcut": "B"}, "dsr", 267_264),  # and the shortcuts, 2,560
        ("resnet20", {"shortcut": "A"}, "lth", 267_696),
        ("resnet20", {"shortcut": "B"}, "lth", 267_696),
        ("wrn_28_2", {}, "all", 1_463_984),
        ("wrn_28_2", {}, "dpf", 1_462_704),
        ("wrn_28_2", {}, "dsr", 1_451_520),
        ("wrn_28_2", {}, "lth", 1_451_952),  # less 10,752 of shortcuts
        ("wrn_28_4", {}, "dpf", 5_839_280),
        ("wrn_28_4", {}, "dsr", 5_796_864),
        ("wrn_28_8", {}, "dsr", 23_169_024),
        ("vgg16_d", {}, "dpf", 14_710_464),
        # Without normalisation the lottery ticket paper prunes the classifier too.
        ("conv4", {}, "lth", 2_425_024),
        ("conv4", {}, "dpf", 259_776),
        ("vgg11", {}, "lth", 9_217_728),
        ("vgg11", {}, "all", 9_222_848),
        ("alexnet_s", {}, "all", 5_066_784),
        ("alexnet_s", {}, "dpf", 3_745_824),
        ("alexnet_b", {"padding": "same"}, "lth", 3_745_824),
        ("densenet_40_12", {}, "dpf", 997_136),
        ("densenet_40_12", {}, "dsr", 996_704),  # less the stem, 9 * 3 * 16
        ("densenet_bc_100_12", {}, "dpf", 741_744),
        ("densenet_bc_100_12", {}, "lth", 741_744),  # its 1x1 convolutions are no shortcuts
        ("densenet_bc_100_12", {}, "dsr", 741_096),  # less the stem, 9 * 3 * 24
    ],
)
def test_cifar_networks_have_the_papers_number_of_prunable_weights(name, options, preset, count):
    assert weights(unfilled(name, (3, 32, 32), **options), preset) == count


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("all", 25_502_912),
        ("dpf", 23_454_912),
        # Less the stem, 9,408, and the shortcuts, 2,768,896; with the classifier, 2,048,000.
        ("dsr", 22_724_608),
        ("lth", 20_686_016),  # the stem too, but not the classifier
    ],
)
def test_resnet50_has_the_papers_number_of_prunable_weights(preset, count):
    model = unfilled("timm:resnet50", (3, 224, 224), None)
    assert weights(model, preset) == count
    names = prunable_names(model, SparsityMethod(), preset)
    assert ("conv1.weight" in names) == (preset != "dsr")
    assert any("downsample" in name for name in names) == (preset in ("all", "dpf"))
    assert ("fc.weight" in names) == (preset in ("all", "dsr"))


def test_dsr_leaves_wide_hidden_layers_dense():
    names = prunable_names(unfilled("alexnet_s", (3, 32, 32)), SparsityMethod(), "dsr")
    assert names
    assert not [name for name in names if name.startswith(("hidden", "classifier"))]


def test_dsr_leaves_a_small_classifier_dense():
    assert "classifier.weight" not in prunable_names(
        unfilled("wrn_28_2", (3, 32, 32), 100), SparsityMethod(), "dsr"
    )


@pytest.mark.parametrize(
    ("name", "shape"), [("lenet_300_100", (1, 28, 28)), ("lenet5", (1, 28, 28))]
)
def test_lth_takes_every_weight_of_the_lenets(name, shape):
    model = unfilled(name, shape)
    assert weights(model, "lth") == weights(model, "all")
    assert weights(model, "lth") == {"lenet_300_100": 266_200, "lenet5": 430_500}[name]


@pytest.mark.parametrize(
    ("preset", "sparsity", "first"),
    [
        ("rigl-uniform", 0.5, False),
        ("rigl-uniform", 0.99, False),
        ("rigl-uniform", None, False),
        ("rigl-erk", 0.9, True),
        ("rigl-erk", 0.98, True),
        ("rigl-erk", 0.99, False),
        ("rigl-erk", 0.995, False),
        ("rigl-erk", None, True),
    ],
)
def test_rigls_first_layer_is_dense_where_all_layers_are_alike_and_from_99_percent_on(
    preset, sparsity, first
):
    for name, total, stem in (("resnet20", 268_336, 432), ("wrn_28_2", 1_463_984, 432)):
        model = unfilled(name, (3, 32, 32))
        names = prunable_names(model, SparsityMethod(), preset, sparsity)
        assert ("stem.weight" in names) == first
        assert "classifier.weight" in names
        count = sum(model.get_parameter(name).numel() for name in names)
        assert count == total - (0 if first else stem)


@pytest.mark.parametrize(
    ("name", "options", "preset", "sparsity", "left", "reached"),
    [
        # Parameters left of all of them, as Lin et al. report the sparsity that was reached.
        ("wrn_28_2", {}, "dpf", 0.9, 151_176, 89.70),
        ("wrn_28_2", {}, "dpf", 0.95, 78_041, 94.68),
        ("wrn_28_2", {}, "dpf", 0.99, 19_533, 98.67),
        ("wrn_28_2", {}, "dsr", 0.9, 161_242, 89.01),
        ("wrn_28_2", {}, "dsr", 0.95, 88_666, 93.96),
        ("wrn_28_2", {}, "dsr", 0.99, 30_605, 97.91),
        ("resnet20", {"shortcut": "B"}, "dpf", 0.9, 29_244, 89.27),
        ("resnet20", {"shortcut": "B"}, "dpf", 0.95, 15_731, 94.23),
        # The head of 529,802 parameters stays dense.
        ("vgg16_d", {}, "dpf", 0.95, 1_280_685, 91.61),
    ],
)
def test_the_papers_count_of_what_is_left(name, options, preset, sparsity, left, reached):
    model = unfilled(name, (3, 32, 32), **options)
    prunable = weights(model, preset)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert everything - prunable + keep_count(prunable, 1 - sparsity) == left
    assert round(100 * (1 - left / everything), 2) == reached


@pytest.mark.parametrize(
    ("sparsity", "left", "reached"), [(0.8, 6_793_102, 73.4), (0.9, 4_447_611, 82.6)]
)
def test_resnet50_reaches_the_papers_ratio(sparsity, left, reached):
    model = unfilled("timm:resnet50", (3, 224, 224), None)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert everything == 25_557_032
    dense = everything - weights(model, "dpf")
    assert dense + keep_count(23_454_912, 1 - sparsity) == left
    assert round(100 * (1 - left / everything), 1) == reached
    # Mostafa & Wang: 5.10 and 7.38 million, of the set that has the classifier but not the stem.
    dense = everything - weights(model, "dsr")
    theirs = {0.8: 7_377_346, 0.9: 5_104_885}
    assert dense + keep_count(22_724_608, 1 - sparsity) == theirs[sparsity]


@pytest.mark.parametrize("preset", PRESETS)
def test_biases_and_normalisation_never_count(preset):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(2, 2, 1),
        nn.LayerNorm(3), nn.Embedding(2, 2), nn.PReLU(),
    )  # fmt: skip
    names = prunable_names(model, SparsityMethod(), preset)
    first = () if preset in ("dsr", "rigl-uniform") else ("0.weight",)
    assert names == (*first, "2.weight", "3.weight")


def test_a_1x1_convolution_is_a_shortcut_only_beside_a_block():
    inside = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    assert prunable_names(inside, SparsityMethod(), "lth") == ("0.weight", "1.weight")
    block = nn.Module()
    block.conv = nn.Conv2d(3, 4, 3)
    block.downsample = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert prunable_names(block, SparsityMethod(), "lth") == ("conv.weight",)
    block.downsample[0] = nn.Conv2d(3, 4, 3)
    names = prunable_names(block, SparsityMethod(), "lth")
    assert names == ("conv.weight", "downsample.0.weight")


def test_a_method_may_leave_weights_out_and_the_order_is_the_models():
    names = prunable_names(create_model("lenet_300_100", (1, 8, 8)), Hidden(), "all")
    assert names == ("fc1.weight", "fc2.weight")


def test_a_model_may_be_a_single_layer():
    assert prunable_names(nn.Linear(2, 3), SparsityMethod(), "all") == ("weight",)


def test_nothing_to_prune_is_refused_with_the_presets():
    with pytest.raises(SuiteError) as caught:
        prunable_names(create_model("lenet_300_100", (1, 8, 8)), Hidden(), "dpf")
    assert str(caught.value) == (
        "prunable = 'dpf' leaves LeNet300100 no weight that Hidden can prune. Presets: all, dpf, "
        "lth, dsr, rigl-uniform, rigl-erk."
    )
