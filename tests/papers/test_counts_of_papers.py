"""Numbers that papers print and that follow from counting alone; nothing is trained."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.counting import ACTIVATIONS, count_layers, count_totals
from bench.prunable import prunable_names, shapes
from bench.record import LayerCount
from methods.allocation import allocate, keep_count
from methods.api import Budget, SparsityMethod
from methods.lottery import LotteryTicket
from models import MODELS, create_model

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
MNIST = {name: (1, 28, 28) for name in MODELS if name.startswith("lenet")}


def unfilled(name: str, shape: tuple[int, int, int], classes: int | None = 10) -> nn.Module:
    """A network whose weights are not made: counts depend on shapes alone."""
    with torch.device("meta"):
        return create_model(name, shape, classes).eval()


def flops_of(model: nn.Module, shape: tuple[int, ...], *backends: SDPBackend) -> int:
    """What torch's own counter says of one image, where attention runs on some backends."""
    device = next(model.parameters()).device
    allowed = backends or (SDPBackend.MATH,)
    with torch.no_grad(), sdpa_kernel(list(allowed)), FlopCounterMode(display=False) as flops:
        model(torch.zeros(1, *shape, device=device))
    return flops.get_total_flops()


# Multiply-adds against torch's counter, which counts a multiplication and an addition each.
#
# Where torch is wrong: what runs as one fused kernel without a formula counts as nothing. In older
# releases that is attention on the CPU (`_scaled_dot_product_flash_attention_for_cpu`), still today
# the fast path of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`. Written out as matrix
# products (the backend MATH, the fast path off), all of it is counted. Grouped, depthwise and
# transposed convolutions are right in the forward pass. Recurrent layers neither counter sees.


@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_of_our_models_are_half_of_the_flops_that_torch_counts(name):
    shape = MNIST.get(name, CIFAR)
    model = unfilled(name, shape)
    layers = count_layers(model, shape)
    assert 2 * count_totals(model, layers).dense_macs == flops_of(model, shape) > 0


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "regnety_002",  # grouped convolutions, squeeze and excitation
        "efficientnet_b0",  # depthwise
        "test_nfnet",  # standardised weights
        "convnext_atto",
        "densenet121",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "xcit_nano_12_p8_224",  # attention between channels
        "mobilevit_xxs",
        "gmixer_12_224",
        "pvt_v2_b0",
        "efficientformerv2_s0",
        "levit_128",
    ],
)
def test_multiply_adds_of_timms_models_are_half_of_the_flops_that_torch_counts(name):
    shape = (3, 64, 64)
    model = create_model(f"timm:{name}", shape, 10).eval()  # not all of timm can be left unfilled
    layers = count_layers(model, shape)
    assert 2 * count_totals(model, layers).dense_macs == flops_of(model, shape) > 0


def test_torchs_counter_may_leave_out_attention_on_the_cpu_and_ours_never_does():
    shape = (3, 64, 64)
    model = create_model("timm:vit_tiny_patch16_224", shape, 10, depth=2).eval()
    layers = count_layers(model, shape)
    (attention,) = [line.dense_macs for line in layers if line.name == ACTIVATIONS]
    # Two blocks of 3 heads of 64 units; 16 patches and the class token; queries with keys, and
    # the result with values.
    assert attention == 2 * 2 * (3 * 17 * 17 * 64)
    dense = count_totals(model, layers).dense_macs
    assert flops_of(model, shape) == 2 * dense
    missing = 2 * dense - flops_of(model, shape, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    assert missing in (0, 2 * attention)


def test_torchs_counter_may_leave_out_a_fused_encoder_layer_and_ours_never_does():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    dense = count_totals(layer, count_layers(layer, (5, 8))).dense_macs
    assert dense == 5 * 512 + 2 * 5 * 5 * 8
    assert flops_of(layer, (5, 8)) in (0, 2 * dense)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert flops_of(layer, (5, 8)) == 2 * dense
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 12, 3, groups=4, stride=2, padding=1),
        nn.Conv2d(8, 8, 5, groups=8, padding=2, dilation=1),
        nn.Conv2d(8, 4, 3, dilation=2),
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(8, 12, 4, groups=4, stride=2),
        nn.Conv2d(8, 6, (1, 7), padding=(0, 3)),
    ],
    ids=str,
)
def test_every_kind_of_convolution_agrees_with_torchs_counter(layer):
    shape = (8, 9, 10)
    (line,) = count_layers(layer, shape)
    assert 2 * line.dense_macs == flops_of(layer, shape) > 0


# ResNet-50 under RigL's distributions (Evci et al., 2020, arXiv:1911.11134, figure 2).


@functools.cache
def resnet50() -> tuple[nn.Module, Mapping[str, LayerCount]]:
    """The network and its lines by name."""
    model = unfilled("timm:resnet50", IMAGENET, None)
    return model, {line.name: line for line in count_layers(model, IMAGENET)}


def fraction_of_macs(sparsity: float, scope: str, preset: str) -> float:
    """Multiply-adds that are left, with each layer at the density of a scope."""
    model, lines = resnet50()
    names = prunable_names(model, SparsityMethod(), preset, sparsity)
    kept = allocate({n: lines[n].shape for n in names}, 1 - sparsity, scope)
    left = sum(
        line.dense_macs * kept.get(name, line.weights) / line.weights
        for name, line in lines.items()
    )
    return left / sum(line.dense_macs for line in lines.values())


@pytest.mark.parametrize(
    ("sparsity", "erk", "uniform"),
    # RigL prints 0.42, 0.24, 0.12 and 0.23, 0.13, 0.08.
    [(0.8, 0.414, 0.223), (0.9, 0.242, 0.126), (0.95, 0.122, 0.077)],
)
def test_resnet50_costs_what_rigl_says_with_either_distribution(sparsity, erk, uniform):
    assert round(fraction_of_macs(sparsity, "erk", "rigl-erk"), 3) == erk
    assert round(fraction_of_macs(sparsity, "uniform", "rigl-uniform"), 3) == uniform


def test_resnet50_has_as_many_multiply_adds_as_rigl_counts():
    # 8.2e9 operations, an addition and a multiplication each.
    assert round(2 * sum(line.dense_macs for line in resnet50()[1].values()) / 1e9, 1) == 8.2


# Filters and weights that a ratio leaves (Lin et al., 2020, arXiv:2006.07253, tables 2 and 3).


def test_resnet50_is_left_what_dpf_prints():
    model, _ = resnet50()
    everything = sum(parameter.numel() for parameter in model.parameters())
    names = prunable_names(model, SparsityMethod(), "dpf")
    prunable = sum(model.get_parameter(name).numel() for name in names)
    printed = {0.8: (6_793_102, "6.79"), 0.9: (4_447_611, "4.45")}
    for sparsity, (left, millions) in printed.items():
        assert everything - prunable + keep_count(prunable, 1 - sparsity) == left
        assert f"{left / 1e6:.2f}" == millions


# Iterative pruning of LeNet-300-100 (Frankle & Carbin, 2019, arXiv:1803.03635, section 2).

# Round -> percent of the weights that are left, as the paper's legends and text have them.
LEFT = {1: 80.0, 2: 64.1, 3: 51.3, 4: 41.1, 7: 21.1, 9: 13.5, 12: 7.0, 15: 3.6, 18: 1.9}


def test_rounds_of_a_fifth_and_a_tenth_leave_the_papers_percentages_of_lenet():
    model = unfilled("lenet_300_100", (1, 28, 28))
    method = LotteryTicket()
    names = prunable_names(model, method, "lth")
    levels = method.levels(Budget(1000, 100, 3200, shapes=shapes(model, names)), 0.01)
    left = {k: sum(level.values()) for k, level in enumerate(levels, start=1)}
    for k in range(1, 19):
        formula = 265_200 * 0.8**k + 1_000 * 0.9**k
        assert left[k] == pytest.approx(formula, abs=5)  # a rounding in each layer and round
    assert {k: round(100 * left[k] / 266_200, 1) for k in LEFT} == LEFT
