"""The interface can express the methods to come: each sketch goes through the real trainer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import bench.trainer
from bench import checkpoint
from bench.trainer import Trainer
from methods.allocation import keep_count
from methods.api import Budget, Cadence, OptimizerSettings, Phase, Run, SparsityMethod
from tests.contract.checks import (
    KEY,
    SGD,
    assert_compiles_once,
    assert_plain,
    assert_resumes_bit_for_bit,
    assert_tensors_stay_in_place,
    builder,
    network_weight,
)
from tests.contract.sketches import (
    DeepRSketch,
    DSRSketch,
    GraSPSketch,
    HardConcrete,
    L0Sketch,
    LotterySketch,
    SFPSketch,
    SoftDeepRSketch,
    SparseMomentumSketch,
    SynFlowSketch,
)
from tests.tiny import copied, nonzero, tiny_model, tiny_trainer, train

SKETCHES = [
    LotterySketch(),
    LotterySketch(rewind=0.0),
    SparseMomentumSketch(every=2),
    DSRSketch(every=2),
    DeepRSketch(),
    SoftDeepRSketch(),
    L0Sketch(),
    SFPSketch(),
    GraSPSketch(),
    SynFlowSketch(rounds=20),
]
every_sketch = pytest.mark.parametrize(
    "sketch", SKETCHES, ids=lambda s: type(s).__name__ + ("-0" if s == SKETCHES[1] else "")
)


@every_sketch
def test_sketch_resumes_bit_for_bit_from_a_cut_in_every_phase(sketch, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.trainer, "CURVE_POINTS", 5)
    assert_resumes_bit_for_bit(builder(sketch, steps=20), tmp_path)


@every_sketch
def test_sketch_leaves_a_plain_network_with_the_weights_asked_for(sketch):
    trainer = train(builder(sketch, steps=20)())
    assert_plain(trainer.state.model, tiny_model("conv"))
    assert len(trainer.cursor.curve) == trainer.total_steps
    counts = nonzero({n: trainer.state.model.get_parameter(n) for n in trainer.state.masks})
    total = sum(mask.numel() for mask in trainer.state.masks.values())
    if sketch.controls == "density":
        assert sum(counts.values()) == keep_count(total, 0.1)
    elif sketch.controls == "penalty":
        assert 0 < sum(counts.values()) < total


@every_sketch
def test_sketch_never_replaces_a_tensor(sketch):
    assert_tensors_stay_in_place(builder(sketch, steps=16)())


@every_sketch
def test_sketch_compiles_into_one_graph(sketch, monkeypatch):
    assert_compiles_once(builder(sketch, steps=6), monkeypatch)


# Lottery tickets: rewinding.


@dataclass
class Start:
    """What the first step of a phase sees."""

    phase: Phase
    model: dict[str, Tensor]
    masks: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    lr: float
    images: Tensor
    labels: Tensor


def starts_of(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Start]:
    """Trains, and looks at the state as each phase takes its first step."""
    seen: dict[str, Start] = {}
    forward = bench.trainer.forward

    def spy(model: nn.Module, method: Any, state: Any, images: Tensor, labels: Tensor) -> Tensor:
        if trainer.step == 0:
            tensors = (model.state_dict(), state.masks, trainer.optimizer_tensors())
            copies = map(copied, tensors)
            seen[trainer.phase.name] = Start(
                trainer.phase, *copies, float(state.lr), images, labels
            )
        return forward(model, method, state, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(bench.trainer, "forward", spy)
        train(trainer)
    return seen


@pytest.mark.parametrize("setting", ["conv-sgd", "mlp-adam"])
def test_every_round_begins_with_the_masked_snapshot_of_step_k(setting, monkeypatch):
    trainer = builder(LotterySketch(rewind=0.25), setting, steps=20)()
    starts = starts_of(trainer, monkeypatch)
    snapshot = trainer.snapshots["rewind"]
    assert snapshot.position == 5
    for r in (1, 2, 3):
        start = starts[f"round-{r}"]
        for name, tensor in start.model.items():
            expected = snapshot.model[name] * start.masks.get(name, 1)
            assert torch.equal(tensor, expected), name
        for name, tensor in start.optimizer.items():
            assert torch.equal(tensor, snapshot.optimizer[name]), name
        kept = torch.cat([mask.flatten() for mask in start.masks.values()])
        assert int(kept.sum()) == keep_count(len(kept), 0.1 ** (r / 3))
    # The training of the rounds has not reached the snapshot.
    assert all(torch.equal(t, snapshot.model[n]) for n, t in starts["round-0"].model.items())


def test_every_round_sees_the_data_and_the_learning_rate_of_step_k(monkeypatch):
    trainer = builder(LotterySketch(rewind=0.25), steps=20)()
    starts = starts_of(trainer, monkeypatch)
    images, labels = builder(LotterySketch())().stream.batch(5)
    for r in range(4):
        start = starts[f"round-{r}"]
        assert torch.equal(start.images, images)
        assert torch.equal(start.labels, labels)
        assert start.lr == pytest.approx(SGD.lr_at(0.25))
    assert trainer.cursor.position == 20
    assert trainer.cursor.total == 5 + 4 * 15


def test_masks_of_a_round_keep_the_largest_of_the_weights_trained_in_the_round_before(monkeypatch):
    trainer = builder(LotterySketch(rewind=0.25), steps=8)()
    trained: dict[int, tuple[Tensor, Tensor]] = {}
    forward = bench.trainer.forward

    def flat(tensors: dict[str, Any]) -> Tensor:
        return torch.cat([tensor.detach().flatten() for tensor in tensors.values()])

    def spy(*arguments: Any) -> Tensor:
        if trainer.phase.rewind_to and trainer.step == 0:
            before = trained[trainer.cursor.total]
            masks = flat(trainer.state.masks)
            assert (masks <= before[1]).all()
            largest = set(before[0].topk(int(masks.sum())).indices.tolist())
            assert set(masks.nonzero().flatten().tolist()) == largest
        return forward(*arguments)

    monkeypatch.setattr(bench.trainer, "forward", spy)
    for done in trainer.run():
        trained[done] = flat(trainer.state.weights).abs(), flat(trainer.state.masks).clone()


def test_rewinding_to_the_initialisation_starts_without_momentum(monkeypatch):
    trainer = builder(LotterySketch(rewind=0.0), steps=8)()
    starts = starts_of(trainer, monkeypatch)
    assert trainer.snapshots["rewind"].optimizer == {}
    assert starts["round-1"].optimizer
    assert not any(tensor.any() for tensor in starts["round-1"].optimizer.values())


# Dynamic sparse training.


def test_sparse_momentum_moves_weights_between_layers_and_keeps_their_number():
    trainer = tiny_trainer(SparseMomentumSketch(every=2), model="conv", recipe=SGD)
    counts = []
    for _ in trainer.run():
        counts.append(nonzero(trainer.state.masks))
    total = sum(mask.numel() for mask in trainer.state.masks.values())
    assert {sum(count.values()) for count in counts} == {keep_count(total, 0.1)}
    assert len({tuple(count.values()) for count in counts}) > 3


def test_sparse_momentum_sees_the_momentum_of_missing_weights():
    trainer = tiny_trainer(SparseMomentumSketch(stop=0.0), model="conv", recipe=SGD, steps=3)
    for _ in trainer.run():
        for name, weight in trainer.state.weights.items():
            memory = trainer.state.optimizer.state[weight]["momentum_buffer"]
            missing = trainer.state.masks[name] == 0
            assert memory[missing].any()
            assert not weight[missing].any()


def test_deepr_keeps_exactly_its_number_of_connections_after_every_step():
    trainer = tiny_trainer(DeepRSketch(), model="conv", recipe=SGD)
    seen = set()
    expected: dict[str, int] = {}
    for done in trainer.run():
        state = trainer.state
        counts = nonzero(state.weights)
        expected = expected or counts
        assert counts == expected == nonzero(state.masks), f"after step {done}"
        for name, weight in state.weights.items():
            assert (weight * state.slots["sign"][name] >= 0).all()
        seen.add(b"".join(mask.numpy().tobytes() for mask in state.masks.values()))
    assert len(seen) > 3, "connections must be replaced"


def test_soft_deepr_closes_and_reopens_connections():
    trainer = tiny_trainer(SoftDeepRSketch(noise=0.2), model="conv", recipe=SGD)
    state, seen = trainer.state, []
    for _ in trainer.run():
        weights = [network_weight(state.model, name).flatten() for name in state.masks]
        seen.append(torch.cat(weights) != 0)
        assert all((theta >= -0.05).all() for theta in state.weights.values())
    assert any((before & ~after).any() for before, after in itertools.pairwise(seen))
    assert any((~before & after).any() for before, after in itertools.pairwise(seen))


def test_dsr_adapts_its_threshold_and_keeps_the_number_of_weights():
    trainer = tiny_trainer(DSRSketch(every=2), model="conv", recipe=SGD)
    thresholds, counts = set(), set()
    for _ in trainer.run():
        thresholds.add(float(trainer.state.slots["dsr"]["threshold"]))
        counts.add(sum(nonzero(trainer.state.masks).values()))
    assert len(thresholds) > 2
    assert len(counts) == 1


# Penalties and filters.


def test_l0_gates_close_at_a_price_and_have_no_weight_decay():
    def count_open(price: float) -> int:
        finished = train(tiny_trainer(L0Sketch(price=price), model="conv", recipe=SGD)).state
        return sum(int(finished.model.get_parameter(n).count_nonzero()) for n in finished.masks)

    assert 0 < count_open(2.0) < count_open(0.0)
    groups = tiny_trainer(L0Sketch(), model="conv", recipe=SGD).state.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [SGD.weight_decay, 0.0]
    assert [len(group["params"]) for group in groups] == [8, 3]


def test_l0_penalty_is_part_of_the_loss_that_is_differentiated():
    trainer = tiny_trainer(L0Sketch(price=0.1), model="conv")
    state = trainer.state
    gates = [module for module in state.model.modules() if isinstance(module, HardConcrete)]
    with torch.no_grad():
        for gate in gates:
            gate.log_alpha.fill_(0.0)
    images, labels = trainer.stream.batch(0)
    losses = []
    for method in (L0Sketch(price=0.1), L0Sketch(price=0.0)):
        torch.manual_seed(0)
        losses.append(bench.trainer.forward(state.model, method, state, images, labels))
    # At log_alpha = 0 a gate is open with probability sigmoid(1.598597) = 0.83182.
    expected = 0.1 * 0.83182 * (216 + 1152 + 64)
    assert float((losses[0] - losses[1]).detach()) == pytest.approx(expected, rel=1e-5)
    losses[0].backward()
    # d/d log_alpha: the gate's part of the data term, and 0.1 * 0.83182 * (1 - 0.83182).
    assert all(gate.log_alpha.grad is not None for gate in gates)


def test_sfp_filters_train_on_after_they_were_zeroed():
    trainer = tiny_trainer(SFPSketch(), density=0.5, model="conv", recipe=SGD, steps=30)
    assert list(trainer.state.masks) == ["conv1.weight", "conv2.weight"]

    def filters(weights: dict[str, Any]) -> list[int]:
        return [int(w.detach().flatten(1).any(1).sum()) for w in weights.values()]

    seen = []
    for _ in trainer.run():
        seen.append((filters(trainer.state.masks), filters(trainer.state.weights)))
    # Steps are updated before; an epoch has 14. Momentum moves what was zeroed at once.
    assert seen[13] == ([8, 16], [8, 16])
    assert seen[14] == ([4, 8], [8, 16])
    weights = {name: trainer.state.model.get_parameter(name) for name in trainer.state.masks}
    assert filters(weights) == [4, 8]


# Before training.


def test_grasp_scores_are_the_weights_times_the_hessian_gradient_product(monkeypatch):
    # g(w + e g) - g(w) over e tends to H g.
    trainer = tiny_trainer(GraSPSketch(), model="mlp")
    trainer.state.model.double()
    ((images, labels),) = trainer.batches(1, augmented=False)
    monkeypatch.setattr(trainer, "batches", lambda *_, **__: iter([(images.double(), labels)]))
    with torch.no_grad():
        scores = trainer.method.scores(trainer)
        weights = list(trainer.state.weights.values())
        before = torch.autograd.grad(trainer.loss(images.double(), labels), weights)
        for weight, gradient in zip(weights, before, strict=True):
            weight.add_(gradient, alpha=1e-6)
        after = torch.autograd.grad(trainer.loss(images.double(), labels), weights)
        for weight, gradient in zip(weights, before, strict=True):
            weight.sub_(gradient, alpha=1e-6)
    for (name, weight), first, second in zip(
        trainer.state.weights.items(), before, after, strict=True
    ):
        expected = weight.detach() * (second - first) / 1e-6
        torch.testing.assert_close(scores[name], expected, rtol=1e-3, atol=1e-6)


def test_synflow_empties_no_layer_where_magnitudes_do():
    counts = {}
    for method in (SynFlowSketch(), LotterySketch(rewind=0.0, rounds=1)):
        trainer = train(tiny_trainer(method, density=0.002, model="mlp", steps=1))
        counts[type(method)] = nonzero(trainer.state.masks)
    assert min(counts[SynFlowSketch].values()) > 0
    assert sum(counts[SynFlowSketch].values()) == sum(counts[LotterySketch].values())


@pytest.mark.parametrize("sketch", [GraSPSketch(), SynFlowSketch(rounds=5)], ids=str)
def test_scoring_leaves_normalisation_statistics_and_noise_alone(sketch):
    trainer = tiny_trainer(sketch, model="conv")
    before, noise = copied(dict(trainer.state.model.named_buffers())), torch.get_rng_state()
    with torch.no_grad():
        trainer.method.start_phase(trainer)
    assert trainer.state.model.training
    assert torch.equal(torch.get_rng_state(), noise)
    after = dict(trainer.state.model.named_buffers())
    assert all(torch.equal(after[name], before[name]) for name in before)
    # SynFlow needs no data.
    assert trainer.cursor.extra_batches == int(isinstance(sketch, GraSPSketch))


# What a method may rely on between steps, also after a resume.


def test_batches_of_a_method_are_new_each_time_metered_and_not_those_of_training():
    trainer = builder(GraSPSketch())()
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
