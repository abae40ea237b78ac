"""What would wait for a GPU is found on a CPU, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.hot import NoWaiting

WAITS: dict[str, Callable[[Tensor], object]] = {
    "_local_scalar_dense": lambda x: x.sum().item(),
    "_local_scalar_dense of float": lambda x: float(x.sum()),
    "_local_scalar_dense of if": lambda x: 1 if x.sum() > 0 else 0,
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "nonzero of where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "_unique2": lambda x: x.unique(),
    "unique_dim": lambda x: x.unique(dim=0),
    "index": lambda x: x[x > 0],
    "index_put_": lambda x: x.index_put_((x > 0,), torch.ones_like(x)[0]),
    "bincount": lambda x: x.long().bincount(),
    "lift_fresh": lambda x: torch.tensor(0.5),
    "lift_fresh of arrays": lambda x: x + torch.as_tensor(np.ones(4), dtype=torch.float32),
    "_to_copy": lambda x: x.to("meta"),
    "Tensor.tolist": lambda x: x.tolist(),
    "Tensor.numpy": lambda x: x.numpy(),
    "Tensor.cpu": lambda x: x.cpu(),
    "Tensor.__array__": np.asarray,
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_named(name):
    x = torch.arange(4.0)
    with (
        pytest.raises(AssertionError, match=rf"^(aten\.)?{name.split()[0]} would wait"),
        NoWaiting(),
    ):
        WAITS[name](x)


def test_a_wait_in_the_backward_pass_is_found():
    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float(gradient.sum())

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        Looks.apply(x).sum().backward()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_ordinary_step_passes(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    optimizer = kind(model.parameters(), lr=torch.tensor(0.1), fused=True)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    with NoWaiting():
        functional.cross_entropy(model(x[torch.arange(4)]), y).backward()
        optimizer.step()
        mask = torch.where(x > 0, 1.0, 0.0)
        x.mul_(mask).masked_fill_(mask == 0, 0.0)
    assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_nothing_is_refused_afterwards():
    with NoWaiting():
        pass
    assert torch.ones(2).sum().item() == 2
