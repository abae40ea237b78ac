"""Weights on a live path, against an enumeration of all paths and cases worked by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.liveness import live_weights
from models import MODELS, create_model, model_options
from models.resnet_cifar import PadShortcut


def filled(model: nn.Module, value: float = 1.0) -> nn.Module:
    """The model with no parameter that is zero."""
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def masked(model: nn.Module, density: float, seed: int) -> nn.Module:
    """The model with random weights, of which some are zero, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            kept = torch.rand(parameter.shape, generator=generator) < density
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * kept)
    return model


def live_of(model: nn.Module, shape: tuple[int, ...]) -> dict[str, list[object]]:
    """Live weights of the layers with more than one dimension, as nested lists of 0 and 1."""
    found = live_weights(model, shape)
    return {name: mask.int().tolist() for name, mask in found.items() if mask.dim() > 1}


# An edge goes from one value of the network to another through one element of one weight, or
# through none. The paths are walked one by one, without any tensor.
Edge = tuple[object, object, tuple[str, tuple[int, ...]] | None]


def on_a_path(edges: list[Edge], starts: set[object], ends: set[object]) -> set[object]:
    """Elements of weights on a path, by walking every path from every start."""
    outgoing: dict[object, list[Edge]] = {}
    for edge in edges:
        outgoing.setdefault(edge[0], []).append(edge)
    found: set[object] = set()

    def walk(place: object, crossed: tuple[object, ...]) -> None:
        if place in ends:
            found.update(crossed)
        for _, onward, weight in outgoing.get(place, []):
            walk(onward, (*crossed, weight))

    for start in starts:
        walk(start, ())
    return found - {None}


def linear_edges(name: str, layer: nn.Linear, source: str, target: str) -> Iterator[Edge]:
    for o, i in itertools.product(range(layer.out_features), range(layer.in_features)):
        if layer.weight[o, i] != 0:
            yield (source, i), (target, o), (name, (o, i))


def conv_edges(name: str, layer: nn.Conv2d, size: int, source: str, target: str) -> Iterator[Edge]:
    """A convolution that keeps the size of its square image."""
    outputs, inputs, kernel, _ = layer.weight.shape
    for o, i, u, v in itertools.product(
        range(outputs), range(inputs), range(kernel), range(kernel)
    ):
        if layer.weight[o, i, u, v] == 0:
            continue
        channel = o // (outputs // layer.groups) * inputs + i
        for r, c in itertools.product(range(size), range(size)):
            y, x = r + u - kernel // 2, c + v - kernel // 2
            if 0 <= y < size and 0 <= x < size:
                yield (source, channel, y, x), (target, o, r, c), (name, (o, i, u, v))


def as_set(model: nn.Module, shape: tuple[int, ...]) -> set[object]:
    return {
        (name, tuple(place))
        for name, mask in live_weights(model, shape).items()
        if mask.dim() > 1
        for place in mask.nonzero().tolist()
    }


@pytest.mark.parametrize("seed", range(12))
def test_live_weights_of_a_random_mlp_are_those_on_enumerated_paths(seed):
    layers = [nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)]
    model = masked(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Tanh(), layers[2]), 0.4, seed)
    edges: list[Edge] = []
    for step, (name, layer) in enumerate(zip(("0", "2", "4"), layers, strict=True)):
        edges += linear_edges(f"{name}.weight", layer, f"v{step}", f"v{step + 1}")
    expected = on_a_path(edges, {("v0", i) for i in range(5)}, {("v3", o) for o in range(3)})
    found = as_set(model, (5,))
    assert found == expected
    assert len(found) < sum(int((layer.weight != 0).sum()) for layer in layers)


class Residual(nn.Module):
    """A convolution, a block of a depthwise and a 1x1 one with a shortcut, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.deep = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.wide = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        y = self.wide(functional.relu(self.deep(x)))
        return self.head((x - y).mean(dim=(2, 3)))


@pytest.mark.parametrize("seed", range(8))
def test_live_weights_of_a_random_residual_network_are_those_on_enumerated_paths(seed):
    size, model = 2, masked(Residual(), 0.25, seed)
    edges = [
        *conv_edges("stem.weight", model.stem, size, "image", "x"),
        *conv_edges("deep.weight", model.deep, size, "x", "y"),
        *conv_edges("wide.weight", model.wide, size, "y", "sum"),
        *linear_edges("head.weight", model.head, "mean", "out"),
    ]
    places = list(itertools.product(range(3), range(size), range(size)))
    edges += [(("x", *place), ("sum", *place), None) for place in places]
    edges += [(("sum", *place), ("mean", place[0]), None) for place in places]
    starts = {("image", 0, r, c) for r, c in itertools.product(range(size), range(size))}
    expected = on_a_path(edges, starts, {("out", 0), ("out", 1)})
    assert as_set(model, (1, size, size)) == expected


def test_weights_behind_an_emptied_filter_and_before_an_unread_unit_are_dead():
    model = filled(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)))
    with torch.no_grad():
        model[0].weight[0] = 0  # its bias and its shift send a constant: no path
        model[3].weight[:, 2] = 0
    assert live_of(model, (2,)) == {
        "0.weight": [[0, 0], [1, 1], [0, 0]],
        "3.weight": [[0, 1, 0], [0, 1, 0]],
    }


def test_a_zero_scale_closes_the_channel_whatever_its_shift():
    model = filled(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)))
    model[1].weight.data[1] = 0
    found = live_weights(model, (1, 3, 3))
    assert found["0.weight"].flatten().tolist() == [True, False]
    assert found["2.weight"].flatten().tolist() == [True, False]


def test_closed_inputs_leave_the_rows_before_them_dead():
    # As group gates do: the columns of closed input units are zero.
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 2)))
    model[2].weight.data[:, [1, 3]] = 0
    assert live_weights(model, (3,))["0.weight"].sum(1).tolist() == [3, 0, 3, 0]


def test_both_signs_of_a_sum_are_paths():
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.head = nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = -2 * (self.left(x) - self.right(x)) / 3  # zero for equal weights
            return self.head(x + torch.tensor([True, False]) + (-1))

    found = live_weights(filled(Difference()), (2,))
    assert all(mask.all() for mask in found.values())


def test_no_depth_overflows_or_underflows():
    deep = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(100)]
    for value in (1e-20, 1e20):
        model = filled(nn.Sequential(*deep), value)
        model[50][0].weight.data[3] = 0
        found = live_weights(model, (64,))
        assert int(found["0.0.weight"].sum()) == 64 * 64
        assert int(found["51.0.weight"].sum()) == 64 * 63
        assert int(found["99.0.weight"].sum()) == 64 * 64


def test_option_a_shortcut_leads_to_the_old_channels_only():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)
            self.pad = PadShortcut(2, 4, 2)
            self.head = nn.Conv2d(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pad(self.conv(x)))

    found = live_weights(filled(Padded()), (1, 4, 4))
    assert found["head.weight"].flatten().tolist() == [True, True, False, False]
    assert found["conv.weight"].all()


def test_concatenated_maps_keep_their_places():
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)
            self.head = nn.Conv2d(5, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.a(x), x, self.b(x)], dim=1))

    model = filled(Dense())
    model.a.weight.data[1] = 0
    model.head.weight.data[0, 4] = 0
    found = live_weights(model, (1, 2, 2))
    assert found["head.weight"].flatten().tolist() == [True, False, True, True, False]
    assert found["b.weight"].flatten().tolist() == [True, False]


class Gated(nn.Module):
    """Squeeze and excitation: a gate for each channel, computed from all of them."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.squeeze, self.excite = nn.Conv2d(2, 1, 1), nn.Conv2d(1, 2, 1)
        self.head = nn.Conv2d(2, 1, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        pooled = functional.adaptive_avg_pool2d(x, 1)
        return self.head(x * self.gate(self.excite(functional.relu(self.squeeze(pooled)))))


GATES = [
    torch.sigmoid,
    functional.hardsigmoid,
    lambda x: functional.relu6(x + 3.0) / 6.0,
    lambda x: 1 - torch.sigmoid(x),
    lambda x: x.clamp(0.1, 1),
    lambda x: x.softmax(1),
    lambda x: 1 / (x.exp() + 1e-3),
]


@pytest.mark.parametrize("gate", GATES, ids=range(len(GATES)))
def test_a_gate_that_nothing_reaches_is_open(gate):
    model = filled(Gated(gate))
    assert all(mask.all() for n, mask in live_weights(model, (1, 3, 3)).items() if "bias" not in n)
    nn.init.zeros_(model.squeeze.weight)
    found = live_weights(model, (1, 3, 3))
    assert not found["squeeze.weight"].any()
    assert not found["excite.weight"].any()
    assert found["conv.weight"].all()
    assert found["head.weight"].all()
    # The gate of a channel of zeros opens nothing.
    model = filled(Gated(gate))
    model.conv.weight.data[0] = 0
    found = live_weights(model, (1, 3, 3))
    assert found["head.weight"].flatten().tolist() == [False, True]


def test_normalisation_over_channels_mixes_them():
    model = filled(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)))
    model[0].weight.data[0] = 0  # the mean of the others is taken away from it
    assert live_of(model, (2,))["2.weight"] == [[1, 1, 1]]
    model = filled(nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1)))
    model[0].weight.data[[0, 1, 2]] = 0  # the first group is all zero, the second is not
    found = live_weights(model, (1, 3, 3))["2.weight"].flatten().tolist()
    assert found == [False, False, True, True]


def test_grouped_and_transposed_convolutions_stay_within_their_groups():
    model = filled(
        nn.Sequential(
            nn.Conv2d(2, 4, 1),
            nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
            nn.Conv2d(4, 1, 1),
        )
    )
    model[0].weight.data[:2] = 0
    found = live_weights(model, (2, 4, 4))
    assert found["1.weight"].flatten(1).any(1).tolist() == [False, False, True, True]
    assert found["2.weight"].flatten(1).any(1).tolist() == [False, False, True, True]
    assert found["3.weight"].flatten().tolist() == [False, False, True, True]


def test_weight_that_sees_nothing_but_padding_is_dead():
    # Vysogorets & Kempe's example: the corner of a kernel over a single pixel.
    found = live_weights(filled(nn.Conv2d(1, 1, 3, padding=1)), (1, 1, 1))
    assert found["weight"].flatten().tolist() == [False] * 4 + [True] + [False] * 4


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(2, dilation=2),
        nn.AdaptiveMaxPool2d(1),
        nn.AvgPool2d(3, 1, 1),
        nn.Upsample(scale_factor=2, mode="bicubic"),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    ],
    ids=str,
)
def test_every_position_that_a_pooling_may_choose_is_live(pool):
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 1, 4, 4))
            self.pool = pool

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x * self.weight)

    assert live_weights(Pooled(), (1, 4, 4))["weight"].all()


def test_shared_weight_is_live_if_one_use_is():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))[:, :1]

    model = Twice()
    model.layer.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert live_of(model, (2,))["layer.weight"] == [[0, 1], [1, 0]]
    # Only output 0 is read; from unit 1 of the first use.
    model.layer.weight.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert live_of(model, (2,))["layer.weight"] == [[1, 0], [0, 0]]


def test_masked_and_parametrised_weights_count_by_what_the_forward_uses():
    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([[1.0, 0.0], [0.0, -1.0]]))

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    layer = filled(nn.Linear(2, 2))
    nn.utils.parametrize.register_parametrization(layer, "weight", Mask())
    found = live_of(layer, (2,))
    assert found == {"parametrizations.weight.original": [[1, 0], [0, 1]]}


def test_attention_is_followed():
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(2, 2) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
            return self.out(functional.scaled_dot_product_attention(q, k, v)[:, 0])

    model = filled(SelfAttention())
    assert all(mask.all() for mask in live_weights(model, (3, 2)).values() if mask.dim() > 1)
    nn.init.zeros_(model.q.weight)  # equal attention for all: the keys do not matter
    found = live_weights(model, (3, 2))
    assert not found["k.weight"].any()
    assert found["v.weight"].all()
    nn.init.zeros_(model.v.weight)
    assert not any(mask.any() for mask in live_weights(model, (3, 2)).values())


UNKNOWN: list[Callable[[Tensor], Tensor]] = [
    lambda x: torch.fft.fft(x).abs(),
    lambda x: x.sort(dim=1).values,
    lambda x: x.max(dim=1, keepdim=True).values + x,
    lambda x: functional.prelu(x, torch.zeros(3)),
    lambda x: functional.local_response_norm(x[..., None], 2)[..., 0],
]


@pytest.mark.parametrize("function", UNKNOWN, ids=range(len(UNKNOWN)))
def test_what_an_unknown_operation_touches_is_live(function):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.behind = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.behind(function(self.before(x)))

    model = filled(Model())
    model.before.weight.data[0] = 0
    found = live_weights(model, (2,))
    assert found["before.weight"].tolist() == [[False] * 2, [True] * 2, [True] * 2]
    assert found["behind.weight"].all()


def test_recurrent_layers_and_transformers_are_live():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(2, 3, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(3, 1, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(self.lstm(x)[0])

    found = live_weights(filled(Last()), (5, 2))
    assert all(mask.all() for mask in found.values() if mask.dim() > 1)


def test_writes_in_place_are_followed():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y.add_(self.b(x))
            out = torch.zeros(1, 3)
            out[:, 1:] = y
            with torch.no_grad():
                return out.relu_().detach()

    assert all(m.all() for m in live_weights(filled(InPlace()), (2,)).values() if m.dim() > 1)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_a_dense_registry_model_is_live(name):
    shape = (3, 32, 32)
    options = {"width": 0.1} if "width" in model_options(name) else {}
    model = filled(create_model(name, shape, **options))
    found = live_weights(model, shape)
    dead = {n: ~mask for n, mask in found.items() if n.endswith("weight") and not mask.all()}
    if name.startswith("alexnet"):
        # Its last convolution makes one pixel of 2x2: five of nine places see the padding only.
        assert dead.pop("features.conv5.weight")[0, 0].int().tolist() == [
            [1, 1, 1],
            [1, 0, 0],
            [1, 0, 0],
        ]
    assert dead == {}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet10t", (3, 64, 64)),
        ("mobilenetv3_small_050", (3, 96, 96)),
        ("convnext_atto", (3, 128, 128)),
        ("vit_tiny_patch16_224", (3, 32, 32)),
        ("regnety_002", (3, 64, 64)),
        ("densenet121", (3, 64, 64)),
        ("efficientnet_b0", (3, 96, 96)),
        ("swin_s3_tiny_224", (3, 224, 224)),
    ],
)
def test_every_weight_of_a_dense_timm_model_is_live(name, shape):
    # Smaller images would leave corners of the last kernels over nothing but padding.
    model = filled(create_model(f"timm:{name}", shape))
    found = live_weights(model, shape)
    assert not [n for n, mask in found.items() if n.endswith("weight") and not mask.all()]


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_the_caller_s_mode_and_the_model_are_left_alone(context):
    with context():
        model = create_model("resnet20", (3, 32, 32), width=0.25).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = live_weights(model, (3, 32, 32))
    assert found["stem.weight"].all()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
