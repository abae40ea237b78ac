"""The base of the methods that a penalty drives: landing on a target."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from methods.penalised import PenaltyMethod
from tests.tiny import copied, tiny_trainer, train


@dataclass(frozen=True)
class Ridge(PenaltyMethod):
    """The least that such a method can be."""

    def penalty(self, state):
        return 1e-3 * torch.stack([w.square().sum() for w in state.weights.values()]).sum()


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_by_default_the_largest_magnitudes_land_on_the_target(model):
    trainer = tiny_trainer(Ridge(target=0.9), model=model, steps=8)
    seen = {}
    for _ in trainer.run():
        seen = copied(trainer.state.weights)
    flat = torch.cat([weight.flatten() for weight in seen.values()]).abs()
    left = torch.cat([trainer.state.model.get_parameter(n).flatten() for n in seen])
    keep = {"mlp": 1245, "conv": 143}[model]
    assert int(left.count_nonzero()) == keep
    assert set(left.nonzero().flatten().tolist()) == set(flat.topk(keep).indices.tolist())


def test_without_a_target_nothing_is_ranked_and_the_masks_say_what_is_left():
    trainer = train(tiny_trainer(Ridge(), steps=2))
    for name, mask in trainer.state.masks.items():
        assert torch.equal(mask != 0, trainer.state.model.get_parameter(name) != 0)


def test_a_kept_weight_that_is_zero_counts():
    trainer = tiny_trainer(Ridge(target=0.0), steps=1)
    for _ in trainer.run():
        with torch.no_grad():
            trainer.state.weights["fc2.weight"].zero_()
    assert int(trainer.state.model.get_parameter("fc2.weight").count_nonzero()) == 128
