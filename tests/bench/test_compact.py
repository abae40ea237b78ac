"""The physically smaller network: the same outputs, and nothing cut that is still needed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bench.compact import Compacted, compact, compact_counts, rebuild
from bench.counting import count_layers, count_totals
from bench.errors import CannotCompact
from bench.liveness import live_weights
from bench.record import Compact
from bench.store import Store
from methods.api import Shape
from methods.filters import companions
from models import MODELS, create_model, model_options
from models.resnet_cifar import ResNet
from models.wide_resnet import WideResNet
from tests.bench.cells import train, write_suite


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, scales, shifts and statistics, in double precision and evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                spread = torch.rand(module.running_var.shape, generator=generator)
                module.running_var.copy_(spread + 0.5)
            elif isinstance(module, _ConvNd | nn.Linear):
                fan = module.weight[0].numel()
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(noise / fan**0.5)
                if module.bias is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    return model


def prune_filters(
    model: nn.Module, shape: Shape, fraction: float = 0.5, seed: int = 1, leak: bool = False
) -> nn.Module:
    """Zeroes random filters, and what `methods.filters` finds behind them unless it may leak."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, _ConvNd)]
    model.float()
    found = companions(model, dict.fromkeys(names), shape)
    model.double()
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            kept = torch.rand(len(weight), generator=generator) >= fraction
            weight[~kept] = 0
            for other in [] if leak else found[name]:
                model.get_parameter(other)[~kept] = 0
    return model


def images(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(3, *shape, generator=generator, dtype=torch.float64)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def checked(model: nn.Module, shape: Shape) -> Compacted:
    """The compact network, once its outputs are those of the other."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller = compact(model, shape)
    x = images(shape)
    with torch.no_grad():
        torch.testing.assert_close(smaller.model(x), model(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return smaller


def small(name: str) -> dict[str, object]:
    return {"width": 0.25} if "width" in model_options(name) else {}


# The depths and widths that run the same code as these are left out.
FAMILIES = [
    *("lenet_300_100", "lenet5", "conv4", "resnet20", "vgg11", "vgg16_d", "wrn_16_2"),
    *("alexnet_s", "densenet_40_12", "densenet_bc_100_12"),
]
CONSTANT_CHANNELS = {"lenet_300_100", "densenet_40_12"}
"""No convolution; or each is normalised by later layers, which make a constant of its zeros."""


@pytest.mark.parametrize(
    ("name", "option"), [*((name, {}) for name in FAMILIES), ("resnet20", {"shortcut": "B"})]
)
def test_filter_pruned_networks_of_every_family_compute_the_same(name, option):
    shape = (3, 32, 32)
    model = scrambled(create_model(name, shape, **small(name), **option))
    model = prune_filters(model, shape)
    smaller = checked(model, shape)
    left = parameters(smaller.model) / parameters(model)
    assert left == 1 if name in CONSTANT_CHANNELS else left < 0.8
    again = checked(smaller.model, shape)
    assert parameters(again.model) == parameters(smaller.model)


@pytest.mark.parametrize("name", MODELS)
def test_every_registry_model_can_be_compacted(name):
    shape = (3, 32, 32)
    options = {"width": 0.1} if "width" in model_options(name) else {}
    model = create_model(name, shape, **options).eval()
    for module in model.modules():
        if isinstance(module, _ConvNd):
            module.weight.data[0] = 0
    assert isinstance(compact(model, shape).model, nn.Module)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet10t", "mobilenetv3_small_050", "efficientnet_b0", "regnety_002"),
        *("densenet121", "convnext_atto", "resnetv2_50", "tf_mobilenetv3_small_minimal_100"),
    ],
)
def test_filter_pruned_timm_networks_compute_the_same(name):
    shape = (3, 64, 64)
    model = scrambled(create_model(f"timm:{name}", shape, 10))
    model = prune_filters(model, shape)
    assert parameters(checked(model, shape).model) < 0.97 * parameters(model)


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "timm:mobilenetv3_small_050"])
def test_nothing_behind_a_leaking_normalisation_is_cut(name):
    shape = (3, 32, 32)
    model = scrambled(create_model(name, shape, 10))
    model = prune_filters(model, shape, leak=True)
    assert parameters(checked(model, shape).model) == parameters(model)


@pytest.mark.parametrize(
    ("scale", "shift", "mean", "cut"),
    [(0, 0, 1, True), (1, 0, 0, True), (0, 1, 0, False), (1, 0, 1, False), (1, 1, 0, False)],
)
def test_a_normalised_channel_of_zeros_goes_if_it_stays_zero(scale, shift, mean, cut):
    model = scrambled(nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()))
    model.append(scrambled(nn.Conv2d(3, 2, 1)))
    model[0].weight.data[1] = 0
    for tensor, value in zip((model[1].weight, model[1].bias), (scale, shift), strict=True):
        tensor.data[1] = value
    model[1].running_mean[1] = mean
    assert checked(model, (1, 4, 4)).kept["0"]["outputs"] == ([0, 2] if cut else [0, 1, 2])


def test_unstructured_masks_that_empty_some_channels():
    shape = (3, 32, 32)
    model = scrambled(create_model("resnet20", shape, width=0.5))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, _ConvNd):
                kept = torch.rand(module.weight.shape, generator=generator) < 0.02
                module.weight *= kept
                norm = name.replace("conv", "norm").replace("stem", "norm")
                silent = ~module.weight.flatten(1).any(1)
                model.get_parameter(f"{norm}.weight")[silent] = 0
                model.get_parameter(f"{norm}.bias")[silent] = 0
    smaller = checked(model, shape)
    assert parameters(smaller.model) < parameters(model)
    # What stays has its zeros still.
    assert any(bool((p == 0).any()) for p in smaller.model.parameters())


def emptied(model: nn.Module, filters: dict[str, tuple[str, list[int]]]) -> nn.Module:
    """The model with some filters zero, and the scale and shift behind them."""
    for conv, (norm, rows) in filters.items():
        model.get_parameter(f"{conv}.weight").data[rows] = 0
        model.get_parameter(f"{norm}.weight").data[rows] = 0
        model.get_parameter(f"{norm}.bias").data[rows] = 0
    return model


def test_a_residual_network_by_hand():
    shape = (3, 8, 8)
    model = scrambled(ResNet(8, 3, 10, "B", 0.25))  # channels 4, 8, 16; one block a stage
    inner = {"stages.0.0.conv1": ("stages.0.0.norm1", [0, 1])}
    trunk = {
        "stem": ("norm", [0, 3]),
        "stages.0.0.conv2": ("stages.0.0.norm2", [3]),
    }
    smaller = checked(emptied(model, inner | trunk), shape)
    # Inside of the block two channels go. On the trunk only channel 3: the stem's zeros in channel
    # 0 meet what the block adds there.
    assert smaller.kept["stages.0.0.conv1"] == {"outputs": [2, 3], "inputs": [0, 1, 2]}
    assert smaller.kept["stages.0.0.conv2"] == {"outputs": [0, 1, 2], "inputs": [2, 3]}
    assert smaller.kept["stem"]["outputs"] == [0, 1, 2]
    # Parameters without a stem channel: 27 + 2 (stem, norm); conv1 4x4x9 -> 2x3x9, norm1 8 -> 4;
    # conv2 4x4x9 -> 3x2x9, norm2 8 -> 6; the next block reads 4 -> 3 channels with 8 filters of 9
    # and a shortcut of 8.
    gone = 29 + (144 - 54) + 4 + (144 - 54) + 2 + 8 * 9 + 8
    assert parameters(model) - parameters(smaller.model) == gone
    # MACs: 64 positions in the first stage, 16 in the second.
    macs = [count_totals(m, count_layers(m, shape)).dense_macs for m in (model, smaller.model)]
    assert macs[0] - macs[1] == 64 * (27 + 90 + 90) + 16 * (72 + 8)
    assert compact_counts(model, shape) == Compact(parameters(smaller.model), macs[1])


def test_channels_behind_a_padded_shortcut_go_with_the_block_s():
    shape = (3, 8, 8)
    model = scrambled(ResNet(8, 3, 10, "A", 0.25))
    # Channels 4 to 7 of the second stage have zeros for a shortcut; 1 has the trunk of before.
    filters = {"stages.1.0.conv2": ("stages.1.0.norm2", [1, 4, 7])}
    smaller = checked(emptied(model, filters), shape)
    assert smaller.kept["stages.1.0.conv2"]["outputs"] == [0, 1, 2, 3, 5, 6]
    assert smaller.kept["stages.2.0.conv1"]["inputs"] == [0, 1, 2, 3, 5, 6]
    # The next shortcut leads 4 and 7 to channels of the third stage that stay.
    assert smaller.kept["stages.2.0.conv2"]["outputs"] == list(range(16))
    assert parameters(checked(smaller.model, shape).model) == parameters(smaller.model)
    again = rebuild(ResNet(8, 3, 10, "A", 0.25).double(), shape, smaller.kept)
    again.load_state_dict(smaller.model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images(shape)), smaller.model(images(shape)))


def test_channels_that_nobody_reads_go():
    shape = (3, 8, 8)
    model = scrambled(WideResNet(10, 1, 3, 10, 0.25))
    with torch.no_grad():
        model.stages[0][0].conv2.weight[:, 2] = 0
        model.classifier.weight[:, 5] = 0
    kept = checked(model, shape).kept
    assert kept["stages.0.0.conv1"]["outputs"] == [0, 1, 3]
    assert 5 not in kept["stages.2.0.conv2"]["outputs"]
    assert 5 not in kept["classifier"]["inputs"]
    assert len(kept["classifier"]["outputs"]) == 10


def test_flattened_channels_take_all_their_pixels_along():
    model = scrambled(create_model("lenet5", (1, 28, 28)))
    model.conv2.weight.data[1] = 0
    model.conv2.bias.data[1] = 0
    kept = checked(model, (1, 28, 28)).kept
    assert set(range(800)) - set(kept["fc1"]["inputs"]) == set(range(16, 32))


class Custom(nn.Module):
    """A convolution of 6 filters, any operation, and a reader."""

    def __init__(self, function: Callable[..., Tensor], channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.function = function
        self.read = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.function(self.conv(x)))


CUT: dict[str, tuple[Callable[..., Tensor], int]] = {
    "pooling": (lambda x: functional.max_pool2d(functional.relu(x), 2), 6),
    "resize": (lambda x: functional.interpolate(x, scale_factor=2), 6),
    "padding": (lambda x: functional.pad(x, (1, 2, 0, 1), mode="reflect"), 6),
    "channels before": (lambda x: functional.pad(x, (0, 0, 0, 0, 2, 1)), 9),
    "concatenation": (lambda x: torch.cat([x, x[:, :, ::1]], 1), 12),
    "view": (lambda x: x * x.mean((2, 3)).view(x.size(0), -1, 1, 1), 6),
    "channels last": (lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 6),
}
KEPT: dict[str, tuple[Callable[..., Tensor], int]] = {
    "slice of channels": (lambda x: x[:, 1:], 5),
    "order of channels": (lambda x: x.flip(1), 6),
    "shuffle": (lambda x: x.reshape(1, 2, 3, 8, 8).transpose(1, 2).reshape(1, 6, 8, 8), 6),
    "softmax": (lambda x: x.softmax(1), 6),
    "split": (lambda x: x.chunk(2, 1)[0], 3),
    "constant channels": (lambda x: functional.pad(x, (0, 0, 0, 0, 0, 1), value=1.0), 7),
    "a frame of ones": (lambda x: functional.pad(x, (1, 1, 1, 1), value=1.0), 6),
    "mean of channels": (lambda x: x * x.mean(1, keepdim=True), 6),
    "constant": (lambda x: x + 0.5, 6),
    "layer norm": (lambda x: functional.layer_norm(x, (6, 8, 8)), 6),
    "new size": (lambda x: x.view(-1, 6, 8, 8), 6),
}


def without_two_filters(function, channels):
    """The smaller network that equals one around an operation, two of its filters gone."""
    model = scrambled(Custom(function, channels))
    model.conv.weight.data[[1, 4]] = 0
    smaller = compact(model, (3, 8, 8))
    x = images((3, 8, 8))[:1]
    with torch.no_grad():
        torch.testing.assert_close(smaller.model(x), model(x), rtol=1e-10, atol=1e-10)
    return smaller, model


@pytest.mark.parametrize("name", CUT)
def test_operations_that_keep_channels_apart_let_them_go(name):
    smaller, _ = without_two_filters(*CUT[name])
    assert smaller.kept["conv"]["outputs"] == [0, 2, 3, 5]


@pytest.mark.parametrize("name", KEPT)
def test_operations_to_which_the_place_of_a_channel_matters_keep_them_all(name):
    smaller, model = without_two_filters(*KEPT[name])
    assert parameters(smaller.model) == parameters(model)


class Map(nn.Module):
    """A gate for each position, from all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.look(x).sigmoid()


class Gate(nn.Module):
    """A gate for each channel, from all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.excite(functional.relu(self.squeeze(pooled))).sigmoid()


@pytest.mark.parametrize(
    ("layer", "cut"),
    [
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), True),
        (nn.Conv2d(6, 12, 3, groups=6, bias=False), True),
        (nn.Conv2d(6, 6, 3, groups=2), False),
        (nn.ConvTranspose2d(6, 5, 2, stride=2), True),
        (nn.GroupNorm(2, 6), False),
        (nn.PReLU(6), False),
        (nn.Linear(8, 8), False),
        (Gate(), True),
        (Map(), True),
    ],
    ids=[
        *("depthwise", "multiplier", "grouped", "transposed", "group norm", "prelu"),
        *("columns", "gate", "map"),
    ],
)
def test_layers_between_two_others(layer, cut):
    layer = copy.deepcopy(layer)
    channels = layer(torch.zeros(1, 6, 8, 8)).shape[1]
    model = scrambled(Custom(nn.Identity(), channels))
    model.function = scrambled(layer)
    model.conv.weight.data[[1, 4]] = 0
    smaller = checked(model, (3, 8, 8))
    assert len(smaller.kept["conv"]["outputs"]) == (4 if cut else 6)


def test_a_layer_used_twice_is_cut_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(self.stem(x))))

    model = scrambled(Twice())
    model.stem.weight.data[2] = 0
    assert checked(model, (3, 4, 4)).kept["layer"]["inputs"] == [0, 1, 2, 3]
    model.layer.weight.data[2] = 0
    assert checked(model, (3, 4, 4)).kept["layer"] == {"outputs": [0, 1, 3], "inputs": [0, 1, 3]}


def test_a_network_without_any_path_keeps_one_channel_a_layer():
    model = scrambled(create_model("vgg11", (3, 32, 32), width=0.25))
    nn.init.zeros_(model.classifier.weight)
    smaller = checked(model, (3, 32, 32))
    sizes = {len(sides["outputs"]) for name, sides in smaller.kept.items() if "conv" in name}
    assert sizes == {1}


@pytest.mark.parametrize("name", ["resnet20", "lenet5", "timm:efficientnet_b0"])
def test_the_same_network_is_rebuilt_from_plain_data(name):
    shape = (3, 32, 32)
    model = prune_filters(scrambled(create_model(name, shape, 10)), shape)
    smaller = compact(model, shape)
    kept = json.loads(json.dumps(smaller.kept))
    again = rebuild(create_model(name, shape, 10).double(), shape, kept)
    again.load_state_dict(smaller.model.state_dict())
    x = images(shape)
    with torch.no_grad():
        assert torch.equal(again(x), smaller.model(x))


def test_what_does_not_fit_is_not_rebuilt():
    shape = (1, 28, 28)
    kept = compact(create_model("lenet5", shape), shape).kept
    with pytest.raises(CannotCompact, match="are not those of this model"):
        rebuild(create_model("lenet_300_100", shape), shape, kept)
    with pytest.raises(CannotCompact, match="conv1: keeps outputs up to 19, but this model has 10"):
        rebuild(create_model("lenet5", shape, width=0.5), shape, kept)


def test_attention_and_untraceable_networks_are_refused_by_name():
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(x, x, x)

    with pytest.raises(CannotCompact, match="scaled_dot_product_attention multiplies activations"):
        compact(Attention(), (3, 4, 4))
    vit = create_model("timm:vit_tiny_patch16_224", (3, 32, 32))
    with pytest.raises(CannotCompact, match="scaled_dot_product_attention"):
        compact(vit, (3, 32, 32))  # an older torch cannot even trace it
    assert compact_counts(vit, (3, 32, 32)) is None

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CannotCompact, match=r"Branch: torch\.fx cannot trace"):
        compact(Branch(), (3, 32, 32))


@pytest.mark.parametrize("leak", [False, True])
def test_cells_of_filter_methods_record_their_compact_network(leak, tmp_path):
    option = "bn_leak = true" if leak else ""
    methods = f"[methods.sfp]\n{option}\n[methods.dpf_filters]\n{option}"
    suite = write_suite(
        tmp_path,
        methods,
        models='[{ name = "resnet20", width = 0.25 }]',
        prunable='"dpf"',
        sparsities="[0.4]",
    )
    for record in train(suite, tmp_path / "records"):
        counts, shape = record.counts, (1, 8, 8)
        model = create_model("resnet20", shape, width=0.25)
        model.load_state_dict(load_file(Store(tmp_path / "records", "tiny").weights(record.spec)))
        smaller = checked(model.eval().double(), shape).model
        if leak:  # though filters that SFP prunes before the first step leak nothing
            assert counts.compact is None
            if record.spec.method == "dpf_filters":
                assert parameters(smaller) == counts.parameters
        else:
            assert counts.compact.parameters == parameters(smaller) < counts.parameters
            assert counts.compact.dense_macs < counts.dense_macs
        live = live_weights(model, shape)
        prunable = [line.name for line in record.layers if line.prunable]
        assert counts.live == sum(int(live[name].sum()) for name in prunable)
        assert counts.live <= counts.prunable_nonzero
        assert counts.macs >= counts.live_macs > 0
        # Two operations for each output of a normalisation, one for each of a ReLU.
        outputs = [4 * 64] * 7 + [8 * 16] * 6 + [16 * 4] * 6
        assert counts.elementwise == 3 * sum(outputs)


def test_single_precision_outputs_differ_by_rounding_only():
    shape = (3, 32, 32)
    model = prune_filters(scrambled(create_model("resnet20", shape)), shape).float()
    smaller = compact(model, shape).model
    x = images(shape).float()
    with torch.no_grad():
        expected = model(x)
        assert float((smaller(x) - expected).abs().max() / expected.abs().max()) < 1e-5


def test_layers_of_one_weight_stay_whole_and_one():
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
    layers[4].weight = layers[2].weight
    model = nn.Sequential(nn.Flatten(), *layers, nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 3))
    model = scrambled(model)
    assert compact_counts(model.float(), (4,)).parameters == parameters(model)
    model.double()
    with torch.no_grad():
        model[3].weight[0] = 0  # a row of both
        model[7].weight[0] = 0
        model[7].bias[0] = 0
        model[7].weight[:, 2] = 0
    smaller = checked(model, (4,))
    assert smaller.model.get_submodule("3").weight is smaller.model.get_submodule("5").weight
    assert parameters(smaller.model) == parameters(model) - (8 + 1) - 3
    again = rebuild(model, (4,), smaller.kept)
    assert parameters(again) == parameters(smaller.model)
