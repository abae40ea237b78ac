"""What a method may rely on between steps, also after a resume: shown by small probes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench import checkpoint
from bench.trainer import Trainer
from methods.api import Budget, Cadence, OptimizerSettings, Phase, Run, SparsityMethod
from methods.dense import Dense
from tests.contract.checks import KEY, SGD, assert_resumes_bit_for_bit, builder
from tests.tiny import train


def test_batches_of_a_method_are_new_each_time_metered_and_not_those_of_training():
    trainer = builder(Dense())()
    own = [images for count in (2, 1) for images, _ in trainer.batches(count)]
    plain = [images for images, _ in trainer.batches(1, augmented=False)]
    training = [trainer.stream.batch(position)[0] for position in range(4)]
    for one, other in itertools.combinations([*own, *plain, *training], 2):
        assert not torch.equal(one, other)
    assert trainer.cursor.extra_batches == 4
    assert trainer.cursor.position == 0


@dataclass(frozen=True)
class Probe(SparsityMethod):
    """Keeps what the hooks between steps see, in slots whose names do not ascend."""

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        half, updates = budget.steps // 2, Cadence(1)
        return (
            Phase("first", half, (0.0, 0.5), updates=updates, save_as="half"),
            Phase("second", half, (0.5, 1.0), updates=updates),
            Phase("again", half, (0.5, 1.0), updates=updates, rewind_to="half"),
        )

    def start_phase(self, run: Run) -> None:
        if not run.state.slots:
            weights = {n: torch.zeros_like(w) for n, w in reversed(run.state.weights.items())}
            run.state.slots["sum"] = weights
            run.state.slots["seen"] = {name: torch.zeros(()) for name in ("progress", "lr")}
        self.update(run)

    def update(self, run: Run) -> None:
        state = run.state
        state.slots["seen"]["progress"].mul_(0.9).add_(state.progress)
        state.slots["seen"]["lr"].mul_(0.9).add_(state.lr)
        for name, total in state.slots["sum"].items():
            total.add_(state.weights[name])

    def finish(self, run: Run) -> None:
        self.update(run)


class CountingSGD(Optimizer):
    """Keeps a number, and a tensor of whole numbers, beside each parameter."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"count": 0, "whole": torch.zeros_like(parameter, dtype=torch.int32)}
                state["count"] += 1
                state["whole"] += 1
                parameter.sub_(parameter.grad * group["lr"])


@dataclass(frozen=True)
class CountingProbe(Probe):
    """With an optimizer that keeps more than floats."""

    def optimizer(
        self,
        weights: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        lr: Tensor,
        settings: OptimizerSettings,
    ) -> Optimizer:
        return CountingSGD([*weights.values(), *others.values()], {"lr": lr})


def resumed_probe(probe: Probe, folder: Path) -> tuple[Trainer, Trainer]:
    """A run that was saved after three steps, and the one that was read from there."""
    saved = builder(probe, steps=8)()
    next(done for done in saved.run() if done == 3)
    checkpoint.write(saved, folder / "run", KEY)
    resumed = builder(probe, steps=8)()
    checkpoint.read(resumed, folder / "run", KEY)
    return saved, resumed


def test_learning_rate_and_progress_that_hooks_see_do_not_depend_on_a_cut(tmp_path):
    assert_resumes_bit_for_bit(builder(Probe(), steps=8), tmp_path)


def test_update_sees_the_progress_and_the_learning_rate_of_the_coming_step():
    seen: list[tuple[float, float]] = []

    @dataclass(frozen=True)
    class Watch(SparsityMethod):
        def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
            return (Phase("train", budget.steps, updates=Cadence(1)),)

        def update(self, run: Run) -> None:
            seen.append((float(run.state.progress), float(run.state.lr)))

    train(builder(Watch(), steps=8)())
    assert seen == [pytest.approx((step / 8, SGD.lr_at(step / 8))) for step in range(8)]


def test_finish_sees_the_last_phase_at_its_end():
    seen: list[tuple[str, int]] = []

    @dataclass(frozen=True)
    class Watch(SparsityMethod):
        def finish(self, run: Run) -> None:
            seen.append((run.phase.name, run.step))

    train(builder(Watch(), steps=8)())
    assert seen == [("train", 8)]


def test_slots_come_back_in_their_order(tmp_path):
    saved, resumed = resumed_probe(Probe(), tmp_path)
    assert list(resumed.state.slots) == list(saved.state.slots)
    for slot, values in saved.state.slots.items():
        assert list(resumed.state.slots[slot]) == list(values)


def test_slots_come_back_in_their_memory_layout(tmp_path):
    # The layout decides in which order a sum over the tensor is taken, and so its last bits.
    saved, resumed = resumed_probe(Probe(), tmp_path)
    for name, value in saved.state.slots["sum"].items():
        assert resumed.state.slots["sum"][name].stride() == value.stride(), name


def test_optimizer_state_comes_back_with_its_numbers_and_types(tmp_path):
    saved, resumed = resumed_probe(CountingProbe(), tmp_path)
    for one, other in zip(saved.optimized(), resumed.optimized(), strict=True):
        expected, found = saved.state.optimizer.state[one], resumed.state.optimizer.state[other]
        assert found["count"] == expected["count"] == 3
        assert found["whole"].dtype == expected["whole"].dtype == torch.int32
        assert torch.equal(found["whole"], expected["whole"])


def test_run_with_such_an_optimizer_resumes_bit_for_bit(tmp_path):
    assert_resumes_bit_for_bit(builder(CountingProbe(), steps=8), tmp_path)


def test_rewinding_restores_the_numbers_of_the_optimizer_too():
    trainer = builder(CountingProbe(), steps=8)()
    counts = []
    for _ in trainer.run():
        (memory, *_) = trainer.state.optimizer.state.values()
        counts.append((memory["count"], int(memory["whole"].max())))
    assert counts == [(n, n) for n in [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]]
