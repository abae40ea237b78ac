"""Both passes written out: autograd's digits, and where they are left to autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from bench.passes import Passes, written_out
from bench.step import Step
from bench.trainer import Trainer
from methods import METHODS
from methods.parametrizations import MaskSTE, attach
from models import create_model
from tests.tiny import TINY_RECIPE, tiny_model, tiny_trainer

SHAPE, CLASSES, BATCH = (1, 8, 8), 10, 16


def chain(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), *layers)


def lenet(batch: int = BATCH) -> nn.Module:
    torch.manual_seed(0)
    return create_model("lenet_300_100", (1, 28, 28), CLASSES)


def masked() -> nn.Module:
    model = lenet()
    attach(model, "fc2.weight", MaskSTE((torch.rand(100, 300) < 0.2).float()))
    return model


NETWORKS = {
    "relu": lambda: chain(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES)),
    "tanh": lambda: chain(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, CLASSES)),
    "sigmoid": lambda: chain(nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, CLASSES)),
    "no bias": lambda: chain(nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, CLASSES)),
    "one layer": lambda: chain(nn.Linear(64, CLASSES)),
    "two activations": lambda: chain(
        nn.Linear(64, 32), nn.Tanh(), nn.ReLU(), nn.Flatten(), nn.Linear(32, CLASSES)
    ),
    "activation of the images": lambda: chain(nn.Tanh(), nn.Linear(64, CLASSES)),
    "activation at the end": lambda: chain(nn.Linear(64, CLASSES), nn.ReLU()),
    "lenet": lenet,
    "masked": masked,
}


def batch(size: int, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    shape = (1, 28, 28) if type(model).__name__ == "LeNet300100" else SHAPE
    return torch.randn(size, *shape), torch.randint(CLASSES, (size,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [BATCH, 128])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("by_onednn", [False, True])
def test_loss_and_gradients_are_autograds_to_the_last_bit(
    name, size, smoothing, by_onednn, monkeypatch
):
    from bench import passes, products

    if by_onednn and not products.available():
        pytest.skip("not run: torch has no such operator here")
    monkeypatch.setattr(products, "pays", lambda: by_onednn)
    monkeypatch.setattr(passes, "pays", lambda: by_onednn)
    model, other = NETWORKS[name](), NETWORKS[name]()
    other.load_state_dict(model.state_dict())
    if name == "masked":
        other.fc2.parametrizations.weight[0].mask.copy_(model.fc2.parametrizations.weight[0].mask)
    x, y = batch(size, model)
    found = written_out(model, size, smoothing)
    assert found is not None
    loss = found.forward(x, y)
    found.backward()
    layers = products.in_layers() if by_onednn else torch.enable_grad()
    with layers:
        expected = functional.cross_entropy(other(x), y, label_smoothing=smoothing)
    expected.backward()
    assert torch.equal(loss, expected)
    for (key, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), key
    assert not loss.requires_grad


def test_gradients_are_added_to_those_that_are_there():
    model = NETWORKS["relu"]()
    x, y = batch(BATCH, model)
    found = written_out(model, BATCH, 0.0)
    found.forward(x, y)
    found.backward()
    first = [p.grad.clone() for p in model.parameters()]
    found.forward(x, y)
    found.backward()
    for parameter, gradient in zip(model.parameters(), first, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)


class Own(nn.Module):
    """A chain, but of others: what it decides while it runs would be read off once."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.fc(x.flatten(1))


def hooked():
    model = NETWORKS["relu"]()
    model[1].register_forward_hook(lambda *_: None)
    return model


def hooked_tensor():
    model = NETWORKS["relu"]()
    model[1].weight.register_hook(lambda gradient: gradient)
    return model


def hooked_accumulation():
    model = NETWORKS["relu"]()
    model[1].weight.register_post_accumulate_grad_hook(lambda _: None)
    return model


def frozen():
    model = NETWORKS["relu"]()
    model[1].bias.requires_grad_(False)
    return model


def tied():
    model = chain(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[3].weight = model[1].weight
    return model


def weird():
    model = NETWORKS["relu"]()
    attach(model, "1.weight", nn.Tanh())
    return model


def masked_bias():
    model = NETWORKS["relu"]()
    attach(model, "1.bias", MaskSTE(torch.ones(32)))
    return model


@pytest.mark.parametrize(
    "make",
    [
        Own,
        hooked,
        hooked_tensor,
        hooked_accumulation,
        frozen,
        tied,
        weird,
        masked_bias,
        lambda: NETWORKS["relu"]().double(),
        lambda: chain(nn.Tanh()),
        lambda: chain(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, CLASSES)),
        lambda: tiny_model("conv"),
    ],
)
def test_what_may_compute_something_else_is_left_to_autograd(make):
    assert written_out(make(), BATCH, 0.0) is None


def trained(trainer: Trainer) -> Trainer:
    for _ in trainer.run():
        pass
    return trainer


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].controls != "filters"])
def test_every_method_trains_alike_without_them(name, monkeypatch):
    ours = trained(tiny_trainer(name, steps=20))
    monkeypatch.setattr("bench.step.written_out", lambda *_: None)
    plain = trained(tiny_trainer(name, steps=20))
    assert torch.equal(ours.losses, plain.losses)
    for one, two in zip(
        ours.state.model.state_dict().values(), plain.state.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two)
    for key, mask in ours.state.masks.items():
        assert torch.equal(mask, plain.state.masks[key])


def passes_of(trainer: Trainer) -> Passes | None:
    """After a first step."""
    moments = trainer.moments()
    while next(moments) is not None:
        pass
    return trainer.hot._passes


@pytest.mark.parametrize("name", ["dense", "snip", "rigl", "dpf", "lottery_ticket"])
def test_masks_and_straight_through_masks_have_them(name):
    assert passes_of(tiny_trainer(name)) is not None


@pytest.mark.parametrize("name", ["l0", "variational_dropout", "str"])
def test_other_parametrizations_and_penalties_have_not(name):
    assert passes_of(tiny_trainer(name)) is None


def test_half_precision_and_compiled_steps_have_not():
    half = dataclasses.replace(TINY_RECIPE, precision="bf16")
    assert passes_of(tiny_trainer("dense", recipe=half)) is None
    trainer = tiny_trainer("dense")
    step = Step(trainer.method, trainer.state, trainer.stream, trainer.recipe, compiled=True)
    step.begin()
    assert step._passes is None


def test_a_hook_that_comes_between_steps_is_called_in_the_next():
    trainer = tiny_trainer("dense")
    assert passes_of(trainer) is not None
    seen: list[object] = []
    layer = next(m for m in trainer.state.model.modules() if isinstance(m, nn.Linear))
    layer.register_forward_hook(lambda *_: seen.append(1))
    trainer.hot.changed()
    trainer.compute()
    assert seen
    assert trainer.hot._passes is None


def test_a_hook_of_a_gradient_that_comes_between_steps_is_called_in_the_next():
    trainer = tiny_trainer("dense")
    assert passes_of(trainer) is not None
    seen: list[object] = []
    weight = next(iter(trainer.state.weights.values()))
    weight.register_post_accumulate_grad_hook(seen.append)
    trainer.hot.changed()
    trainer.compute()
    assert seen


def test_a_weight_that_is_another_tensor_later_is_used():
    trainer = tiny_trainer("dense")
    assert passes_of(trainer) is not None
    layer = next(m for m in trainer.state.model.modules() if isinstance(m, nn.Linear))
    layer.weight = nn.Parameter(torch.full_like(layer.weight, torch.nan))
    trainer.hot.changed()
    assert torch.isnan(trainer.hot.forward(*trainer.stream.read()))
