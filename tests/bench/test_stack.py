"""Stacked runs: the same gradients as alone, and nothing of their neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import checkpoint, products, stack
from bench.stack import Stack, group, stackable
from bench.trainer import Trainer
from bench.trial import images, trainer_of
from methods import METHODS, get_method
from models import create_model
from tests.tiny import TINY_RECIPE, copied, tiny_model, tiny_trainer

NOT_STACKED = {
    "l0": "fc1 has a weight that is drawn anew in every pass",
    "variational_dropout": "fc1, a NoisyLinear, is not stacked",
    "dpf_filters": "conv1, a Conv2d, is not stacked",
    "sfp": "conv1, a Conv2d, is not stacked",
}
"""Methods that cannot be: the last two prune nothing but filters of convolutions."""

ADAM = dataclasses.replace(
    TINY_RECIPE, optimizer="adam", momentum=0.0, nesterov=False, lr=0.01, label_smoothing=0.1
)

every_stacked_method = pytest.mark.parametrize("name", sorted(METHODS.keys() - NOT_STACKED.keys()))
every_way = pytest.mark.parametrize("large", [0, 10**12], ids=["one by one", "batched"])


class Member:
    """A run that others compute the steps of."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.moments = trainer.moments()
        self.due()

    def due(self) -> None:
        """Goes on to the next step that is due."""
        while next(self.moments) is not None:
            pass

    def alone(self, steps: int) -> Member:
        """Computes steps without a stack."""
        for _ in range(steps):
            self.trainer.compute()
            self.due()
        return self


def member(name: str, seed: int = 0, recipe=TINY_RECIPE) -> Member:
    return Member(tiny_trainer(name, seed=seed, steps=60, recipe=recipe))


def together(members: Sequence[Member | None], steps: int, stacked: Stack | None = None) -> Stack:
    """Computes steps of all members by one stack."""
    stacked = stacked or Stack(len(members))
    places = [found and found.trainer for found in members]
    for _ in range(steps):
        for found, loss in zip(members, stacked.backward(places), strict=True):
            if found and loss is not None:
                found.trainer.hot.finish(loss)
                found.due()
    return stacked


def weights(found: Member) -> dict[str, Tensor]:
    return copied(found.trainer.state.model.state_dict())


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    named = trainer.state.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor - expected[name]).norm() <= tolerance * expected[name].norm(), name


def choose(worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products from so many multiply-adds on go one by one, whoever made the processor."""
    monkeypatch.setattr(products, "WORTH", worth)
    monkeypatch.setattr(stack, "pays", products.available)


@every_way
@every_stacked_method
def test_gradients_and_loss_are_those_of_the_plain_backward(name, large, monkeypatch):
    choose(large, monkeypatch)
    plain = member(name, recipe=ADAM).alone(5).trainer
    other = member(name, recipe=ADAM).alone(5).trainer
    loss = plain.hot.forward(*plain.stream.read())
    plain.hot.backward(loss)
    _, found, _ = Stack(3).backward([None, other, None])
    assert found.shape == ()
    assert not found.requires_grad
    torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=0)
    assert_near(gradients(other), gradients(plain), 1e-6)


@pytest.mark.parametrize("name", NOT_STACKED)
def test_a_method_that_cannot_be_stacked_says_why(name):
    model = "conv" if "Conv2d" in NOT_STACKED[name] else "mlp"
    found = stackable(tiny_trainer(name, model=model).state.model)
    assert found.startswith(NOT_STACKED[name])
    assert "\n" not in found


@every_way
@pytest.mark.parametrize("name", ["rigl", "dpf", "str"])
def test_weights_do_not_depend_on_companions_on_the_place_or_on_idle_places(
    name, large, monkeypatch
):
    choose(large, monkeypatch)
    alone, first, last = member(name), member(name), member(name)
    together([None, alone, None], 50)
    together([first, member("dense", 1), member("dpf", 2)], 50)
    together([member("set", 3), None, last], 50)
    assert_equal(weights(first), weights(alone))
    assert_equal(weights(last), weights(alone))


def test_weights_of_a_whole_lenet_do_not_depend_on_companions_or_place():
    def lenet(seed: int) -> Member:
        def build(draw: int) -> nn.Module:
            torch.manual_seed(seed)
            return create_model("lenet_300_100", (3, 16, 16), 4)

        method, data = get_method("gradual")(), images(ADAM)
        return Member(trainer_of(method, build, ADAM, data, density=0.1, steps=60, seed=seed))

    alone, first, last = lenet(0), lenet(0), lenet(0)
    together([None, None, alone, None], 12)
    together([first, *(lenet(seed) for seed in (1, 2, 3))], 12)
    together([lenet(4), None, lenet(5), last], 12)
    assert_equal(weights(first), weights(alone))
    assert_equal(weights(last), weights(alone))


def test_a_stacked_run_agrees_with_one_alone_to_rounding():
    one, other = member("rigl"), member("rigl")
    one.alone(10)
    together([other, member("dense", 1)], 10)
    assert_near(weights(other), weights(one), 1e-5)


def test_a_place_can_be_left_and_taken_while_others_go_on():
    stays, alone, late, late_alone = (member("dpf", seed) for seed in (0, 0, 1, 1))
    stacked = together([stays, member("dense", 2)], 4)
    together([stays, None], 4, stacked)
    together([stays, late], 4, stacked)
    together([None, alone], 12)
    together([late_alone, None], 4)
    assert_equal(weights(stays), weights(alone))
    assert_equal(weights(late), weights(late_alone))


def test_a_run_that_is_no_number_any_more_leaves_its_companions_alone():
    broken, found, expected = member("dense", 1), member("rigl"), member("rigl")
    broken.trainer.state.weights["fc2.weight"].data.fill_(torch.nan)
    stacked = Stack(2)
    for _ in range(5):
        loss, other = stacked.backward([broken.trainer, found.trainer])
        assert loss.isnan()
        found.trainer.hot.finish(other)
        found.due()
    together([None, expected], 5)
    assert_equal(weights(found), weights(expected))


def test_a_run_that_is_saved_and_read_while_stacked_goes_on_bit_for_bit(tmp_path):
    found, companion = member("gradual"), member("dense", 1)
    stacked = together([found, companion], 7)
    checkpoint.write(found.trainer, tmp_path / "it", "key")
    together([found, companion], 5, stacked)
    trainer = tiny_trainer("gradual", steps=60)
    checkpoint.read(trainer, tmp_path / "it", "key")
    read = Member(trainer)
    together([None, read], 5)
    assert_equal(weights(read), weights(found))


@every_way
def test_a_recipe_in_bf16_is_computed_in_bf16(large, monkeypatch):
    choose(large, monkeypatch)
    half = dataclasses.replace(ADAM, precision="bf16")
    plain, other, exact = (member("dense", recipe=r).trainer for r in (half, half, ADAM))
    plain.hot.backward(plain.hot.forward(*plain.stream.read()))
    Stack(2).backward([other, None])
    Stack(2).backward([exact, None])
    assert_near(gradients(other), gradients(plain), 2e-2)
    with pytest.raises(AssertionError):
        assert_near(gradients(other), gradients(exact), 1e-4)


def test_without_onednn_large_products_are_batched_too(monkeypatch):
    choose(0, monkeypatch)
    found, expected = member("dense").trainer, member("dense").trainer
    Stack(1).backward([expected])
    monkeypatch.setattr(stack, "pays", lambda: False)
    monkeypatch.setattr(stack, "product", None)
    Stack(1).backward([found])
    assert_near(gradients(found), gradients(expected), 1e-6)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"lr": 0.1, "weight_decay": 0.0}, True),
        ({"batch": 16}, False),
        ({"label_smoothing": 0.1}, False),
        ({"precision": "bf16"}, False),
    ],
)
def test_runs_are_in_one_group_if_their_passes_are_alike(change, same):
    found = group(tiny_trainer("dpf", recipe=dataclasses.replace(TINY_RECIPE, **change)))
    assert (found == group(tiny_trainer("dense", seed=1))) is same
    assert isinstance(hash(found), int)


def test_networks_of_other_shapes_are_in_other_groups():
    def of(width: float) -> object:
        def build(draw: int) -> nn.Module:
            return create_model("lenet_300_100", (3, 16, 16), 4, width=width)

        method, data = get_method("dense")(), images(TINY_RECIPE)
        return group(trainer_of(method, build, TINY_RECIPE, data, density=None, steps=5))

    assert of(1.0) == of(1.0) != of(0.5)


class Small(nn.Module):
    """A network around one function of an image's 768 numbers."""

    def __init__(self, function) -> None:
        super().__init__()
        self.fc = nn.Linear(768, 4)
        self.dropout = nn.Dropout(0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def hooked() -> nn.Module:
    model = tiny_model()
    model.fc2.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (tiny_model("conv"), "conv1, a Conv2d, is not stacked: only linear layers are, with"),
        (hooked(), "fc2 has a hook"),
        (Small(lambda m, x: m.dropout(m.fc(x.flatten(1)))), "dropout, a Dropout, is not stacked"),
        (Small(lambda m, x: functional.dropout(m.fc(x.flatten(1)))), "dropout is not stacked"),
        (Small(lambda m, x: m.fc(x.flatten(1)).relu().neg()), "neg is not stacked"),
        (Small(lambda m, x: m.fc(x.flatten(2))), "flatten is not stacked"),
        (Small(lambda m, x: m.fc(x)), "fc comes before the images are flattened"),
        (Small(lambda m, x: m.fc(x.flatten(1)) + m.fc(x.flatten(1))), "flatten is not computed"),
        (Small(lambda m, x: (m.fc(x.flatten(1)),)), "its output is not that of its last layer"),
        (Small(lambda m, x: x if x.sum() > 0 else m.fc(x)), "its forward pass cannot be traced"),
    ],
)
def test_a_network_that_cannot_be_stacked_says_why_in_one_line(model, reason):
    found = stackable(model)
    assert found.startswith(reason)
    assert "\n" not in found


@pytest.mark.parametrize(
    "model",
    [
        create_model("lenet_300_100", (1, 28, 28), 10),
        Small(
            lambda m, x: torch.tanh(functional.relu(m.fc(torch.flatten(x, 1, -1)), inplace=True))
        ),
        nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.ReLU(), nn.Dropout(0.0), nn.Identity()),
    ],
)
def test_linear_layers_with_activations_can_be_stacked(model):
    assert stackable(model) == ""


def test_asking_leaves_the_random_stream_alone():
    trainer = tiny_trainer("l0")
    before = torch.get_rng_state()
    assert stackable(trainer.state.model)
    assert torch.equal(torch.get_rng_state(), before)
