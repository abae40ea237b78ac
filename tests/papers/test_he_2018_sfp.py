"""He et al., 2018, arXiv:1808.06866: soft filter pruning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from bench.errors import SuiteError
from bench.prunable import prunable_names
from bench.resolve import make_method
from bench.trainer import Trainer
from methods.allocation import keep_count
from methods.api import Budget
from methods.filters import companions, convolutions, filter_norms, rows
from methods.masking import GROWN
from methods.sfp import SFP
from models import create_model
from tests.tiny import (
    TINY_RECIPE,
    FakeRun,
    copied,
    hand_state,
    momentum_of,
    tiny_data,
    tiny_trainer,
    train,
    watch_updates,
)

RESNET20 = (16,) * 7 + (32,) * 6 + (64,) * 6
"""Filters of the convolutions of a CIFAR ResNet-20, in order."""


def layers(sizes, seed=0):
    """A state with one random weight (filters, 3, 2, 2) a layer."""
    generator = torch.Generator().manual_seed(seed)
    return hand_state(
        {str(i): torch.randn(size, 3, 2, 2, generator=generator) for i, size in enumerate(sizes)}
    )


def pruned(sizes, density, **options):
    """State after one update at the end of the ramp, and the weights before it."""
    state = layers(sizes)
    before = copied(state.weights)
    with torch.no_grad():
        SFP(**options).update(FakeRun(state, density=density, step=1000))
    return state, before


def zeroed_by_the_published_rule(weight, keep):
    """Indices of the int(n (1 - keep)) filters of smallest norm, by numpy's order."""
    norms = np.linalg.norm(weight.numpy().reshape(len(weight), -1), axis=1)
    return set(np.argsort(norms)[: int(len(weight) * (1 - keep))].tolist())


def zeroed(weight):
    return set((~weight.flatten(1).any(1)).nonzero().flatten().tolist())


def test_a_layer_loses_its_smallest_filters_and_nothing_else():
    # Norms 5, 1, 3, 2, and half of them stay.
    values = [[3.0, 4.0], [0.6, -0.8], [-3.0, 0.0], [0.0, 2.0]]
    state = hand_state({"w": torch.tensor(values).view(4, 2, 1, 1)})
    with torch.no_grad():
        SFP().update(FakeRun(state, density=0.5))
    assert filter_norms(state.weights["w"]).tolist() == [5, 0, 3, 0]
    assert state.weights["w"].flatten(1).tolist() == [[3, 4], [0, 0], [-3, 0], [0, 0]]
    assert rows(state.masks["w"]).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
def test_the_zeroed_filters_are_those_of_the_published_rule(keep):
    state, before = pruned(RESNET20, keep)
    for name, weight in state.weights.items():
        assert zeroed(weight) == zeroed_by_the_published_rule(before[name], keep), name


def test_counts_are_rounded_where_the_published_rule_rounds_down():
    # Keep 0.7: there 4 of 16, 9 of 32 and 19 of 64 are zeroed. Here 482 of 688 filters stay
    # (481.6): 11 + 22 + 44 of each kind are 473, and the nine that are missing go to the largest
    # remainders, 0.8 of all six with 64 and 0.4 of the first three with 32 (the 16s have 0.2).
    state, before = pruned(RESNET20, 0.7)
    kept = [int(rows(mask).sum()) for mask in state.masks.values()]
    assert kept == [11] * 7 + [23] * 3 + [22] * 3 + [45] * 6
    assert sum(kept) == keep_count(sum(RESNET20), 0.7) == 482
    for (name, weight), size in zip(state.weights.items(), RESNET20, strict=True):
        theirs = zeroed_by_the_published_rule(before[name], 0.7)
        assert len(theirs) == {16: 4, 32: 9, 64: 19}[size]
        assert zeroed(weight) >= theirs


@pytest.mark.parametrize(("size", "keep", "left"), [(10, 0.9, 9), (20, 0.8, 16), (10, 0.05, 1)])
def test_no_error_of_the_last_bit_costs_a_filter(size, keep, left):
    # The published code zeroes int(10 (1 - 0.9)) = 0 and int(20 (1 - 0.8)) = 3.
    state, _ = pruned([size], keep)
    assert int(rows(state.masks["0"]).sum()) == left


@pytest.mark.parametrize("density", [0.3, 0.45, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("sizes", [RESNET20, (6, 16), (7, 5, 3, 11)])
def test_counts_of_the_layers_sum_to_the_target_and_are_within_one(sizes, density):
    state, _ = pruned(sizes, density)
    kept = [int(rows(mask).sum()) for mask in state.masks.values()]
    assert sum(kept) == keep_count(sum(sizes), density)
    assert all(abs(k - density * size) < 1 for k, size in zip(kept, sizes, strict=True))


def test_it_prunes_before_training_and_after_each_epoch():
    (phase,) = SFP().plan(Budget(20_000, 100, 12_800), 0.7)
    assert [step for step in range(301) if phase.updates.due(step)] == [0, 100, 200, 300]
    assert phase.updates.stop is None
    # A short budget keeps twenty prunes, and a longer period is asked for in epochs.
    (phase,) = SFP().plan(Budget(40, 16, 512), 0.7)
    assert phase.updates.every == 2
    (phase,) = SFP(every=3).plan(Budget(20_000, 100, 12_800), 0.7)
    assert phase.updates.every == 300


def test_zeroed_filters_are_not_zero_after_one_step_with_momentum():
    trainer = tiny_trainer(SFP(), model="conv", density=0.5, steps=64)
    with torch.no_grad():  # a ReLU behind a shift of exactly 0 lets no gradient through
        for norm in (trainer.state.model.norm1, trainer.state.model.norm2):
            norm.bias.fill_(0.5)
    log = watch_updates(trainer)
    checked = 0
    for step in trainer.run():
        if log[-1].step != step - 1 or step == 1:  # at the first prune there is no momentum yet
            continue
        for name, weight in trainer.state.weights.items():
            off = rows(log[-1].masks[name]) == 0
            assert not log[-1].weights[name][off].any()
            assert bool(weight.detach().flatten(1).any(1).all())
            checked += int(off.sum())
    assert checked == 12 * 21  # at steps 3, 6, ... 63; the memory of a zeroed filter stays:
    assert all(bool(m["momentum_buffer"].all()) for m in log[-1].memory.values())


def test_what_the_first_prune_zeroes_stays_behind_a_shift_of_zero_and_a_relu():
    # The channel is 0, where a ReLU has no derivative, and the filter has no momentum yet.
    trainer = tiny_trainer(SFP(), model="conv", density=0.5, steps=64)
    log = watch_updates(trainer)
    train(trainer)
    for update in log:
        assert all(torch.equal(mask, log[0].masks[n]) for n, mask in update.masks.items())


def test_filters_change_places_behind_an_addition():
    torch.manual_seed(0)
    model = create_model("resnet20", (3, 16, 16), 4, width=0.25)
    trainer = network_trainer(model, SFP(), 0.5, 40)
    log = watch_updates(trainer)
    train(trainer)
    back = sum(
        int((rows(mask) > rows(update.old_masks[name])).sum())
        for update in log[1:]
        for name, mask in update.masks.items()
    )
    assert back > 5


def network_trainer(model, method, density, steps, prunable="dpf"):
    recipe = dataclasses.replace(TINY_RECIPE, drops=())
    names = prunable_names(model, method, prunable)
    budget = Budget(steps, 16, 512, ())
    return Trainer(method, model, names, tiny_data(recipe), recipe, budget, density, 0)


def test_the_optimizers_memory_is_left_alone():
    state = hand_state({"w": torch.ones(4, 1, 1, 1)}, momentum={"w": torch.full((4, 1, 1, 1), 2.0)})
    with torch.no_grad():
        SFP().update(FakeRun(state, density=0.5))
    assert momentum_of(state, "w").flatten().tolist() == [2, 2, 2, 2]
    assert state.weights["w"].flatten().tolist() == [1, 1, 0, 0]  # ties go to the first


@pytest.mark.parametrize(
    ("ramp", "step", "left"),
    [
        (0.0, 0, 1000),  # from the start, as published
        (0.5, 0, 10_000),
        (0.5, 50, 7_561),  # a tenth of the way: sparsity 0.2439
        (0.5, 250, 2_125),  # half: 0.7875
        (0.5, 500, 1_000),
        (0.5, 1000, 1_000),
        (1.0, 500, 2_125),
    ],
)
def test_the_ramp_is_cubic(ramp, step, left):
    state = hand_state({"w": torch.arange(1, 10_001.0).view(-1, 1, 1, 1)})
    with torch.no_grad():
        SFP(ramp=ramp).update(FakeRun(state, density=0.1, step=step))
    assert int(rows(state.masks["w"]).sum()) == left
    assert int(state.weights["w"].count_nonzero()) == left


def test_the_finished_network_is_zeroed_after_its_last_step():
    trainer = tiny_trainer(SFP(), model="conv", density=0.4, steps=30)
    with torch.no_grad():
        for norm in (trainer.state.model.norm1, trainer.state.model.norm2):
            norm.bias.fill_(0.5)
    last = {}
    for step in trainer.run():
        if step == 30:
            last = copied(trainer.state.weights)
    assert sum(len(zeroed(weight)) for weight in last.values()) == 0
    # 0.4 of 24 is 9.6: 3 of 8 (3.2) and 7 of 16 (6.4), the larger remainder.
    finished = {name: trainer.state.model.get_parameter(name).detach() for name in last}
    assert [len(weight) - len(zeroed(weight)) for weight in finished.values()] == [3, 7]
    for name, weight in finished.items():
        order = filter_norms(last[name]).argsort().tolist()
        assert zeroed(weight) == set(order[: len(zeroed(weight))])
        kept = rows(trainer.state.masks[name]) != 0
        assert torch.equal(weight[kept], last[name][kept])


def test_a_kept_filter_of_zeros_still_counts():
    trainer = tiny_trainer(SFP(), model="conv", density=0.5, steps=4)
    for step in trainer.run():
        if step == 4:
            with torch.no_grad():
                trainer.state.weights["conv1.weight"].zero_()
    weight = trainer.state.model.conv1.weight.detach()
    assert len(weight) - len(zeroed(weight)) == 4
    assert float(weight.abs().max()) == pytest.approx(GROWN)


@pytest.mark.parametrize("leak", [False, True])
def test_normalisation_and_bias_are_silent_in_the_finished_network_alone(leak):
    torch.manual_seed(0)
    model = create_model("vgg11", (3, 16, 16), 4, width=0.125)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(0.5)
    found = companions(model, dict.fromkeys(convolutions(model)), (3, 16, 16))
    trainer = network_trainer(model, SFP(bn_leak=leak), 0.5, 20)
    for step in trainer.run():
        if step == 20:
            for others in found.values():
                assert all(bool(model.get_parameter(other).all()) for other in others)
    for name, others in found.items():
        kept = rows(trainer.state.masks[name]) != 0
        assert not kept.all()
        for other in others:
            parameter = model.get_parameter(other)
            assert torch.equal(parameter != 0, kept | leak), other


def test_the_papers_layers_are_the_3x3_convolutions():
    model = create_model("resnet20", (3, 32, 32), shortcut="B")
    names = prunable_names(model, SFP(), "lth")
    assert [len(model.get_parameter(name)) for name in names] == list(RESNET20)
    assert {model.get_parameter(name).shape[2:] for name in names} == {torch.Size((3, 3))}
    assert len(prunable_names(model, SFP(), "dpf")) == 21  # and two shortcuts


@pytest.mark.parametrize("options", [{"every": 0}, {"ramp": 1.1}, {"ramp": -0.1}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(SuiteError, match="lies outside"):
        make_method("sfp", options, "here")
