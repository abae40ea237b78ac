"""Presets: which weights count as prunable."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import nn

from bench.errors import SuiteError
from bench.prunable import PRESETS, prunable_names
from methods.api import SparsityMethod
from models import create_model


@dataclass(frozen=True)
class Hidden(SparsityMethod):
    """A method that leaves the classifier alone."""

    def prunable(self, model: nn.Module) -> tuple[str, ...]:
        # In an order of its own: the result must not follow it.
        return tuple(name for name in reversed(super().prunable(model)) if "classifier" not in name)


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
    ("shortcut", "preset", "count"),
    [("A", "dpf", 267_696), ("B", "dpf", 270_256), ("A", "all", 268_336), ("B", "all", 270_896)],
)
def test_resnet20_has_the_papers_number_of_prunable_weights(shortcut, preset, count):
    assert weights(create_model("resnet20", (3, 32, 32), shortcut=shortcut), preset) == count


@pytest.mark.parametrize("preset", PRESETS)
def test_biases_and_normalisation_never_count(preset):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(2, 2, 1),
        nn.LayerNorm(3), nn.Embedding(2, 2), nn.PReLU(),
    )  # fmt: skip
    names = prunable_names(model, SparsityMethod(), preset)
    assert names == ("0.weight", "2.weight", "3.weight")


def test_a_method_may_leave_weights_out_and_the_order_is_the_models():
    names = prunable_names(create_model("lenet_300_100", (1, 8, 8)), Hidden(), "all")
    assert names == ("fc1.weight", "fc2.weight")


def test_a_model_may_be_a_single_layer():
    assert prunable_names(nn.Linear(2, 3), SparsityMethod(), "all") == ("weight",)


def test_nothing_to_prune_is_refused_with_the_presets():
    with pytest.raises(SuiteError) as caught:
        prunable_names(create_model("lenet_300_100", (1, 8, 8)), Hidden(), "dpf")
    assert str(caught.value) == (
        "prunable = 'dpf' leaves LeNet300100 no weight that Hidden can prune. Presets: all, dpf."
    )
