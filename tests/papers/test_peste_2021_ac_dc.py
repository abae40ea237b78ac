"""Peste et al., 2021, arXiv:2106.12379: compressed and decompressed phases in turn."""

from __future__ import annotations

import dataclasses
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

from bench.errors import SuiteError
from bench.resolve import make_method
from methods.ac_dc import ACDC
from methods.allocation import allocate
from methods.api import Budget
from tests.tiny import TINY_RECIPE, copied, nonzero, tiny_trainer, train


def plan(steps, **options):
    """(name, first step, density) of each phase."""
    phases = ACDC(**options).plan(Budget(steps, 10, 320), 0.1)
    starts = [0, *accumulate(phase.steps for phase in phases)]
    return [
        (phase.name, start, phase.density) for phase, start in zip(phases, starts, strict=False)
    ]


def watch_switches(trainer):
    """A list that fills with copies of the state before and after each start of a phase."""
    log = []
    plain = trainer.method.start_phase

    def start_phase(run):
        state = run.state

        def now():
            memory = {name: copied(state.optimizer.state[w]) for name, w in state.weights.items()}
            return copied(state.weights), copied(state.masks), memory

        before = now()
        plain(run)
        log.append((run.phase, before, now()))

    object.__setattr__(trainer.method, "start_phase", start_phase)  # methods are frozen
    return log


def test_the_schedule_is_the_published_one_of_two_hundred_epochs():
    found = plan(200)
    assert [start for _, start, _ in found] == [0, 10, 30, 50, 70, 90, 110, 130, 150, 170]
    assert [density for _, _, density in found] == [1, 0.1] * 5
    assert [name for name, _, _ in found][:4] == [
        "decompressed-0",
        "compressed-1",
        "decompressed-1",
        "compressed-2",
    ]


def test_learning_rate_goes_on_through_the_switches():
    phases = ACDC().plan(Budget(200, 10, 320), 0.1)
    windows = [phase.lr_window for phase in phases]
    assert windows[0] == (0, 0.05)
    assert windows[-1] == (0.85, 1)
    assert all(a[1] == b[0] for a, b in pairwise(windows))
    rates = []
    trainer = tiny_trainer("ac_dc", steps=40)
    for _ in trainer.run():
        rates.append(float(trainer.state.lr))
    assert rates == pytest.approx([0.05] * 20 + [0.005] * 10 + [0.0005] * 10)


def test_warm_up_final_phase_and_cycles_are_options():
    # Of 100 steps, 20 before and 40 at the end leave 40 for two pairs of 10 steps each.
    found = plan(100, warmup=0.2, final=0.4, cycles=2)
    assert [start for _, start, _ in found] == [0, 20, 30, 40, 50, 60]
    assert [start for _, start, _ in plan(100, warmup=0.0, cycles=1)] == [0, 42, 85]


@pytest.mark.parametrize("steps", range(1, 40))
def test_a_short_budget_leaves_out_phases_and_ends_compressed(steps):
    phases = ACDC().plan(Budget(steps, 10, 320), 0.1)
    assert sum(phase.steps for phase in phases) == steps
    assert all(phase.steps for phase in phases[:-1])
    assert phases[-1].name == "compressed-5"
    assert phases[-1].density == 0.1


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_compression_keeps_the_largest_of_all_weights_and_decompression_opens_every_mask(
    model, scope
):
    trainer = tiny_trainer(ACDC(scope=scope), model=model, density=0.1, steps=40)
    log = watch_switches(trainer)
    shapes = {name: tuple(mask.shape) for name, mask in trainer.state.masks.items()}
    for _ in trainer.run():
        masks, weights = trainer.state.masks, trainer.state.weights
        if trainer.phase.name.startswith("compressed"):
            assert all(not weights[name][mask == 0].any() for name, mask in masks.items())
        else:
            assert all(mask.all() for mask in masks.values())
    assert [phase.density for phase, _, _ in log] == [1, 0.1] * 5
    for _, (weights, _, _), (_, masks, _) in log[1::2]:
        if scope == "global":
            groups = [list(masks)]
        else:
            assert nonzero(masks) == allocate(shapes, 0.1, "uniform")
            groups = [[name] for name in masks]
        for names in groups:
            size = np.concatenate([np.abs(weights[n].numpy().ravel()) for n in names])
            kept = np.concatenate([masks[n].numpy().ravel() for n in names])
            order = np.argsort(-size, kind="stable")[: int(kept.sum())]
            assert set(order) == set(np.flatnonzero(kept))
    first, last = log[1][2][1], log[-1][2][1]
    returned = sum(int(((first[name] == 0) & (last[name] == 1)).sum()) for name in first)
    assert returned > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_pruned_weights_come_back_at_zero_and_the_optimizer_forgets_at_decompression(optimizer):
    recipe = TINY_RECIPE
    if optimizer == "adam":
        recipe = dataclasses.replace(
            recipe, optimizer=optimizer, lr=1e-3, momentum=0.0, nesterov=False
        )
    trainer = tiny_trainer("ac_dc", steps=40, recipe=recipe)
    log = watch_switches(trainer)
    train(trainer)
    for _, (old, old_masks, old_memory), (new, _, memory) in log[2::2]:
        for name in new:
            assert torch.equal(old[name], new[name])
            assert not new[name][old_masks[name] == 0].any()
            assert any(value.any() for value in old_memory[name].values())
            assert not any(value.any() for value in memory[name].values())


def test_compression_clears_the_momentum_of_pruned_weights_alone():
    trainer = tiny_trainer("ac_dc", steps=40)
    log = watch_switches(trainer)
    train(trainer)
    for _, (_, _, old), (_, masks, memory) in log[1::2]:
        for name, mask in masks.items():
            before, after = (m[name]["momentum_buffer"] for m in (old, memory))
            assert before[mask == 0].any()
            assert torch.equal(after, before * mask)


def test_a_decompressed_phase_trains_the_weights_that_were_pruned():
    trainer = tiny_trainer("ac_dc", model="conv", steps=40)
    log = watch_switches(trainer)
    train(trainer)
    for (_, _, (_, masks, _)), (_, (grown, _, _), _) in zip(log[1:-2:2], log[3::2], strict=True):
        for name, mask in masks.items():
            assert grown[name][mask == 0].any()


@pytest.mark.parametrize("options", [{"warmup": 0.6}, {"final": 0.0}, {"cycles": 0}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(SuiteError, match="lies outside"):
        make_method("ac_dc", options, "here")
