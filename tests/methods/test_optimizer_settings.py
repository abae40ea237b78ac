"""The optimizers that recipes name."""

from __future__ import annotations

import pytest
import torch

from methods.api import OptimizerSettings


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_adam_is_told_on_a_gpu_that_it_may_be_recorded(name, on_gpu, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu)
    weight = torch.nn.Parameter(torch.ones(3))
    made = OptimizerSettings(name).build([weight], torch.tensor(0.1))
    assert [group["capturable"] for group in made.param_groups] == [on_gpu]
