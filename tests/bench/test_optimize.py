"""An optimizer's step the short way: torch's digits, and what is left to torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from bench.optimize import Advance

Make = Callable[..., Optimizer]

MAKES: dict[str, Make] = {
    "sgd": lambda p, lr: SGD(p, lr=lr, fused=True),
    "momentum": lambda p, lr: SGD(p, lr=lr, momentum=0.9, weight_decay=1e-2, fused=True),
    "nesterov": lambda p, lr: SGD(p, lr=lr, momentum=0.9, nesterov=True, fused=True),
    "dampening": lambda p, lr: SGD(p, lr=lr, momentum=0.9, dampening=0.5, fused=True),
    "adam": lambda p, lr: Adam(p, lr=lr, betas=(0.8, 0.99), fused=True),
    "adam with decay": lambda p, lr: Adam(p, lr=lr, weight_decay=1e-2, fused=True),
    "adamw": lambda p, lr: AdamW(p, lr=lr, weight_decay=1e-2, fused=True),
}


def parameters() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(n, 7)) for n in (3, 5, 11)]
    return [{"params": made[:2]}, {"params": made[2:], "weight_decay": 0.0}]


class Pair:
    """The same network twice: one goes the short way, one torch's."""

    def __init__(self, make: Make) -> None:
        self.lr = torch.tensor(0.1)
        self.ours, self.torchs = (make(parameters(), self.lr) for _ in range(2))
        self.advance = Advance(self.ours)

    @staticmethod
    def of(optimizer: Optimizer) -> list[torch.nn.Parameter]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, number: int, without: int | None = None) -> None:
        torch.manual_seed(number)
        self.lr.fill_(0.1 / (number + 1))
        for index, (one, two) in enumerate(
            zip(self.of(self.ours), self.of(self.torchs), strict=True)
        ):
            one.grad = None if index == without else torch.randn_like(one)
            two.grad = None if one.grad is None else one.grad.clone()
        with torch.no_grad():
            self.advance()
        self.torchs.step()

    def check(self) -> None:
        for one, two in zip(self.of(self.ours), self.of(self.torchs), strict=True):
            assert torch.equal(one, two)
            mine, theirs = self.ours.state[one], self.torchs.state[two]
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, theirs[key]), key


@pytest.fixture
def long_ways(monkeypatch):
    """Steps that an optimizer took itself; the short way takes none."""
    seen: list[str] = []
    for kind in (SGD, Adam, AdamW):
        if "step" not in vars(kind):  # AdamW has Adam's in newer versions of torch
            continue
        plain = kind.step

        def counted(self, *args, plain=plain):
            seen.append(type(self).__name__)
            return plain(self, *args)

        monkeypatch.setattr(kind, "step", counted)
    return seen


@pytest.mark.parametrize("name", MAKES)
def test_every_kind_gives_torchs_digits(name, long_ways):
    pair = Pair(MAKES[name])
    for number in range(5):
        pair.step(number)
        pair.check()
    # Torch's own took 5 steps, and the short way has torch take the first, which makes the memory.
    assert len(long_ways) == (5 if name == "sgd" else 6)


@pytest.mark.parametrize("name", MAKES)
def test_a_group_without_parameters_is_passed_over_as_torch_does(name):
    pair = Pair(lambda groups, lr: MAKES[name]([*groups, {"params": []}], lr))
    for number in range(3):
        pair.step(number)
        pair.check()


def test_a_parameter_without_a_gradient_is_left_out_as_torch_does(long_ways):
    pair = Pair(MAKES["adam"])
    for number, without in enumerate([None, 1, None, 2, None]):
        pair.step(number, without)
        pair.check()
    assert len(long_ways) == 5 + 3


def test_options_are_read_in_every_step():
    pair = Pair(MAKES["adam with decay"])
    for number in range(4):
        for optimizer in (pair.ours, pair.torchs):
            optimizer.param_groups[0]["weight_decay"] = 0.01 * number
            optimizer.param_groups[1]["betas"] = (0.1 * number, 0.9)
        pair.step(number)
        pair.check()


def test_memory_that_lies_elsewhere_is_used_once_it_is_forgotten():
    pair = Pair(MAKES["adam"])
    pair.step(0)
    pair.step(1)
    for optimizer in (pair.ours, pair.torchs):
        for state in optimizer.state.values():
            state["exp_avg"] = torch.zeros_like(state["exp_avg"])
    pair.advance.forget()
    pair.step(2)
    pair.check()


@pytest.mark.parametrize(
    "make",
    [
        lambda p, lr: Adam(p, lr=lr),
        lambda p, lr: Adam(p, lr=lr, amsgrad=True, fused=True),
        lambda p, lr: Adam(p, lr=lr, maximize=True, fused=True),
        lambda p, lr: type("Own", (SGD,), {})(p, lr=lr, fused=True),
        lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    ],
)
def test_other_kinds_and_options_take_their_own_step(make):
    pair = Pair(make)
    for number in range(3):
        pair.step(number)
        pair.check()
    assert not pair.advance._groups


def test_hooks_of_an_optimizer_are_called():
    pair = Pair(MAKES["adam"])
    seen: list[int] = []
    pair.ours.register_step_post_hook(lambda *_: seen.append(1))
    for number in range(3):
        pair.step(number)
    assert len(seen) == 3


def test_a_step_that_somebody_replaced_is_taken():
    pair = Pair(MAKES["adam"])
    seen: list[int] = []
    pair.ours.step = lambda: seen.append(1)
    for number in range(3):
        pair.step(number)
    assert len(seen) == 3
