"""One cell: what its record says, and what becomes of everything that goes wrong in it."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bench import resolve, runner
from bench.checkpoint import tensor_hash
from bench.data import Split
from bench.executors import execute
from bench.record import PhaseResult, decode
from bench.runner import Finished, Note, Progress
from bench.store import Store
from bench.together import run_cell
from bench.trainer import Trainer
from methods.api import Cadence, Phase, SparsityMethod
from methods.dpf import DPF
from methods.masking import MaskedMethod
from tests.bench.cells import (
    digits_like,
    plan_of,
    register,
    stored,
    tasks_of,
    the_same,
    train,
    train_one,
    write_recipe,
    write_suite,
)

# lenet_300_100 on digits: 64-300-100-10.
WEIGHTS = 64 * 300 + 300 * 100 + 100 * 10
BIASES = 300 + 100 + 10


@dataclass(frozen=True)
class Broken(SparsityMethod):
    """Raises in the middle of training."""

    def plan(self, budget, density):
        return (Phase("train", budget.steps, updates=Cadence(1, 7)),)

    def update(self, run):
        raise RuntimeError("on purpose,\nin two lines")


@dataclass(frozen=True)
class Lazy(MaskedMethod):
    """Prunes nothing."""


@dataclass(frozen=True)
class OffByOne(MaskedMethod):
    """Prunes one weight more than it was asked to."""

    def plan(self, budget, density):
        return (Phase("train", budget.steps, density=density),)

    def finish(self, run):
        weight = next(iter(run.state.weights.values()))
        weight.flatten()[int(weight.flatten().nonzero()[0])] = 0


@dataclass(frozen=True)
class Unbaked(DPF):
    """Leaves its parametrization in the network."""

    def finish(self, run):
        pass


@dataclass(frozen=True)
class Renamed(SparsityMethod):
    """Puts another layer of the same size in the place of one."""

    def finish(self, run):
        run.state.model.fc2 = nn.Sequential(run.state.model.fc2)


@dataclass(frozen=True)
class Emptied(SparsityMethod):
    """Leaves a network that guesses."""

    def finish(self, run):
        for parameter in run.state.model.parameters():
            parameter.zero_()


@dataclass(frozen=True)
class Infinite(SparsityMethod):
    """Leaves a network whose outputs are not finite."""

    def finish(self, run):
        run.state.model.classifier.bias.fill_(math.nan)


def test_the_record_of_a_dense_network_by_hand(tmp_path):
    record = train_one(write_suite(tmp_path, seeds="[3]"), tmp_path / "records")
    counts = record.counts
    assert (record.status, record.reason, record.traceback) == ("ok", "", "")
    assert (record.suite, record.label, record.spec.method) == ("tiny", "dense", "dense")
    assert (record.spec.seed, record.spec.sparsity) == (3, 0.0)
    assert (record.steps, record.extra_batches, record.multiple) == (44, 0, 1.0)
    # 44 steps of 64 images, three passes through 50,200 weights.
    training = 44 * 64 * 3 * 50_200
    assert record.phases == (PhaseResult("train", 44, 1.0, total=44, train_macs=training),)
    assert record.train_macs == training
    assert counts.parameters == counts.nonzero == WEIGHTS + BIASES
    assert counts.prunable == counts.prunable_nonzero == WEIGHTS
    assert counts.target_nonzero is None
    assert (counts.idle, counts.dead, counts.reached_sparsity) == (0, (), 0.0)
    assert counts.macs == counts.dense_macs == WEIGHTS  # every weight is used once an image
    assert [(line.name, line.shape, line.weights) for line in record.layers] == [
        ("fc1.weight", (300, 64), 19_200),
        ("fc2.weight", (100, 300), 30_000),
        ("classifier.weight", (10, 100), 1_000),
    ]
    assert record.top1 > 85
    assert record.top1 <= record.top5 <= 100
    assert record.top1 * 3.6 == pytest.approx(round(record.top1 * 3.6))  # of 360 images
    assert 0 < record.test_loss < 1


def test_the_record_of_a_pruned_network_by_hand(tmp_path):
    # 44 steps, 8 of fine-tuning (a fifth, rounded down), and 5,020 of 50,200 weights kept.
    record = train_one(write_suite(tmp_path, "[methods.one_shot]"), tmp_path / "records")
    counts = record.counts
    assert record.status == "ok"
    assert (record.steps, record.extra_batches, record.multiple) == (52, 0, 52 / 44)
    assert record.phases == (
        PhaseResult("dense", 44, 1.0, total=44, train_macs=44 * 64 * 3 * 50_200),
        PhaseResult("finetune", 8, 0.1, total=52, train_macs=8 * 64 * 3 * 5_020),
    )
    assert counts.target_nonzero == counts.prunable_nonzero == 5_020
    assert counts.reached_sparsity == pytest.approx(0.9)
    assert counts.nonzero == 5_020 + BIASES
    assert (counts.macs, counts.dense_macs) == (5_020, WEIGHTS)
    assert sum(line.nonzero for line in record.layers) == 5_020


def test_extra_batches_are_counted_in_the_multiple(tmp_path):
    suite = write_suite(tmp_path, "[methods.snip]\nbatches = 11")
    record = train_one(suite, tmp_path / "records")
    assert (record.steps, record.extra_batches, record.multiple) == (44, 11, 55 / 44)


def test_the_curve_goes_from_the_first_step_to_the_last_with_validation_at_epochs(tmp_path):
    recipe = write_recipe(tmp_path, "batch = 100\nlr = 0.1\nvalidation = 137")
    suite = write_suite(tmp_path, recipe=recipe, budget="{ epochs = 3 }")
    record = train_one(suite, tmp_path / "records")
    assert [point.step for point in record.curve] == list(range(1, 40))  # 13 steps an epoch
    with_validation = [point for point in record.curve if point.validation_top1 is not None]
    assert [point.step for point in with_validation] == [13, 26, 39]
    assert record.curve[0].train_loss == pytest.approx(math.log(10), abs=0.3)
    assert record.curve[-1].train_loss < record.curve[0].train_loss / 2
    assert record.times.eval_seconds > 0


def test_a_long_curve_is_thinned_to_200_points(tmp_path):
    suite = write_suite(tmp_path, budget="{ steps = 401 }")
    curve = train_one(suite, tmp_path / "records").curve
    assert [point.step for point in curve] == [*range(3, 402, 3), 401]


def test_times_and_environment_are_filled_in(tmp_path):
    record = train_one(write_suite(tmp_path, "[methods.rigl]"), tmp_path / "records")
    times = record.times
    assert 0 < times.update_seconds < times.train_seconds < 60
    assert 0 < times.eval_seconds < 60
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", times.started)
    assert record.environment.threads == 1


def test_the_finished_network_is_kept_and_hashed(tmp_path):
    suite = write_suite(tmp_path, "[methods.dpf]")
    record = train_one(suite, tmp_path / "records")
    kept = load_file(Store(tmp_path / "records", "tiny").weights(record.spec))
    assert tensor_hash(kept) == record.weights_hash
    assert set(kept) == {
        f"{n}.{k}" for n in ("fc1", "fc2", "classifier") for k in ("weight", "bias")
    }
    weights = [value for name, value in kept.items() if name.endswith("weight")]
    assert sum(int(value.count_nonzero()) for value in weights) == 5_020


def test_a_cell_gives_the_same_record_again_and_another_seed_another(tmp_path):
    suite = write_suite(tmp_path, "[methods.rigl]", seeds="[0, 1]")
    one = train(suite, tmp_path / "one")
    two = train(suite, tmp_path / "two")
    assert [the_same(record) for record in one] == [the_same(record) for record in two]
    assert one[0].weights_hash != one[1].weights_hash


def test_methods_start_from_the_same_network_with_the_same_batches(tmp_path):
    # A loss of the first step does not depend on the method: it comes before the first update.
    methods = "[methods.dense]\n[methods.gradual]\n[methods.one_shot]"
    records = train(write_suite(tmp_path, methods), tmp_path / "records")
    assert len({record.curve[0].train_loss for record in records}) == 1


def test_a_loss_that_is_not_finite_is_recorded_with_its_step_and_the_suite_goes_on(tmp_path):
    recipe = write_recipe(tmp_path, "batch = 64\nlr = 1e30")
    methods = '[methods.dense]\n[methods.frozen]\nmethod = "random"'
    suite = write_suite(tmp_path, methods, recipe=recipe)
    records = train(suite, tmp_path / "records")
    assert [record.status for record in records] == ["diverged", "diverged"]
    for record in records:
        found = re.fullmatch(r"the loss of step (\d+) of 44 is not finite", record.reason)
        assert found
        assert 2 <= int(found[1]) <= 4  # the first step's loss is still that of the start
        assert [point.step for point in record.curve] == list(range(1, int(found[1])))
        assert (record.top1, record.counts, record.weights_hash) == (None, None, "")
    assert stored(tmp_path / "records").keys() == {record.spec.key for record in records}


def test_a_step_that_is_not_finite_is_named_between_points_of_the_curve(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class NanAt150(SparsityMethod):
        def penalty(self, state):
            return torch.where(state.progress * 1000 >= 149, math.nan, 0.0)

    register(monkeypatch, "poison", NanAt150, "none")
    suite = write_suite(tmp_path, "[methods.poison]", budget="{ steps = 1000 }")
    record = train_one(suite, tmp_path / "records")
    # Points of the curve are 5 steps apart here.
    assert record.reason == "the loss of step 150 of 1000 is not finite"
    assert (record.status, record.curve[-1].step) == ("diverged", 145)


def test_scores_that_are_not_numbers_are_a_divergence(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Nothing(MaskedMethod):
        def plan(self, budget, density):
            return (Phase("train", budget.steps, updates=Cadence(1, 5)),)

        def update(self, run):
            next(iter(run.state.weights.values())).fill_(math.nan)
            self.prune(run, run.density)

    register(monkeypatch, "nothing", Nothing)
    record = train_one(write_suite(tmp_path, "[methods.nothing]"), tmp_path / "records")
    assert record.status == "diverged"
    assert record.reason.startswith("after step 5: ")


def test_a_network_that_guesses_is_recorded_as_diverged_with_its_figures(tmp_path, monkeypatch):
    register(monkeypatch, "emptied", Emptied, "none")
    record = train_one(write_suite(tmp_path, "[methods.emptied]"), tmp_path / "records")
    assert record.status == "diverged"
    assert re.fullmatch(r"accuracy \d+\.\d\d % is under 1.5 times chance", record.reason)
    assert record.top1 < 15
    assert record.counts.nonzero == record.counts.macs == 0
    assert record.counts.dead == ("fc1.weight", "fc2.weight", "classifier.weight")


def test_outputs_that_are_not_finite_are_recorded_as_diverged(tmp_path, monkeypatch):
    register(monkeypatch, "infinite", Infinite, "none")
    record = train_one(write_suite(tmp_path, "[methods.infinite]"), tmp_path / "records")
    assert record.status == "diverged"
    assert "not finite" in record.reason


@pytest.mark.parametrize(("kind", "found"), [(Lazy, WEIGHTS), (OffByOne, 5_019)])
def test_a_wrong_count_of_non_zeros_is_invalid(kind, found, tmp_path, monkeypatch):
    register(monkeypatch, "wrong", kind)
    record = train_one(write_suite(tmp_path, "[methods.wrong]"), tmp_path / "records")
    assert record.status == "invalid"
    assert record.reason == (f"{found} prunable weights are not zero, but 5020 were asked for")
    assert (record.counts.target_nonzero, record.counts.prunable_nonzero) == (5020, found)


@pytest.mark.parametrize(
    ("kind", "controls"), [(Unbaked, "density"), (Renamed, "none")], ids=["parametrized", "renamed"]
)
def test_a_network_that_is_not_the_plain_one_is_invalid(kind, controls, tmp_path, monkeypatch):
    register(monkeypatch, "unplain", kind, controls)
    record = train_one(write_suite(tmp_path, "[methods.unplain]"), tmp_path / "records")
    assert record.status == "invalid"
    assert "has other modules or tensors than the plain one" in record.reason
    assert record.top1 is None


def test_a_method_that_raises_is_kept_aside_with_its_traceback_and_runs_again(
    tmp_path, monkeypatch
):
    register(monkeypatch, "broken", Broken, "none")
    suite = write_suite(tmp_path, "[methods.broken]\n[methods.dense]")
    records = tmp_path / "records"
    failed, fine = train(suite, records)
    assert (failed.status, fine.status) == ("failed", "ok")  # the suite goes on
    assert failed.reason.startswith("RuntimeError: on purpose")
    assert 'raise RuntimeError("on purpose' in failed.traceback
    assert failed.steps == 7
    attempts = records / "tiny" / "attempts"
    assert [path.name for path in attempts.iterdir()] == [f"{failed.spec.slug}-1.json"]
    (kept,) = (decode(path.read_bytes(), "") for path in attempts.iterdir())
    assert kept == failed
    assert stored(records).keys() == {fine.spec.key}

    again = train(suite, records)
    assert [record.label for record in again] == ["broken"]
    assert len(list(attempts.iterdir())) == 2

    register(monkeypatch, "broken", SparsityMethod, "none")  # mended
    assert [record.status for record in train(suite, records)] == ["ok"]


def test_data_that_changed_since_the_suite_was_resolved_is_a_failure(tmp_path):
    np.savez(tmp_path / "mnist.npz", **digits_like())
    recipe = write_recipe(tmp_path, "batch = 16\nlr = 0.1")
    suite = write_suite(tmp_path, dataset='"mnist"', recipe=recipe)
    resolve.load_arrays.cache_clear()
    plan = plan_of(suite, tmp_path)
    np.savez(tmp_path / "mnist.npz", **digits_like(80))
    resolve.load_arrays.cache_clear()
    (task,) = tasks_of(plan, Store(tmp_path / "records", "tiny"))
    *_, last = run_cell(task)
    resolve.load_arrays.cache_clear()
    assert isinstance(last, Finished)
    assert last.record.status == "failed"
    assert re.match(
        r"DataError: mnist in .* changed since the suite was resolved \(content \w+, expected \w+",
        last.record.reason,
    )


class Spy:
    """A split that remembers whether training was over when it was looked at."""

    def __init__(self, split: Split, over: list[bool]) -> None:
        self._split, self._over = split, over
        self.looks: list[bool] = []

    def __getattr__(self, name: str):
        self.looks.append(bool(self._over))
        return getattr(self._split, name)

    def __len__(self) -> int:
        return len(self._split)


@pytest.mark.parametrize("method", ["dense", "one_shot", "snip", "rigl", "dpf"])
def test_test_images_are_never_looked_at_before_training_has_ended(method, tmp_path, monkeypatch):
    over: list[bool] = []
    spies: list[Spy] = []
    to_device, run = runner.to_device, Trainer.moments

    def spied(*arguments):
        data = to_device(*arguments)
        spies.append(Spy(data.test, over))
        return dataclasses.replace(data, test=spies[-1])

    def watched(self):
        yield from run(self)
        over.append(True)

    monkeypatch.setattr(runner, "to_device", spied)
    monkeypatch.setattr(Trainer, "moments", watched)
    recipe = write_recipe(tmp_path, "batch = 64\nlr = 0.1\nmomentum = 0.9\nvalidation = 200")
    suite = write_suite(tmp_path, f"[methods.{method}]", recipe=recipe, sparsities="[0.5]")
    assert train_one(suite, tmp_path / "records").status == "ok"
    assert spies[0].looks
    assert all(spies[0].looks)


def test_a_damaged_checkpoint_is_named_and_kept_and_the_cell_starts_over(tmp_path):
    suite = write_suite(tmp_path, "[methods.rigl]")
    wanted = the_same(train_one(suite, tmp_path / "undisturbed"))
    place = Store(tmp_path / "records", "tiny")
    (task,) = tasks_of(plan_of(suite), place)
    task.checkpoint.parent.mkdir(parents=True)
    task.checkpoint.write_bytes(b"garbage")
    first, *_, last = run_cell(task)
    assert isinstance(first, Note)
    assert first.text.startswith(f"{task.checkpoint}: damaged checkpoint")
    assert "the cell starts over" in first.text
    assert [path.read_bytes() for path in task.checkpoint.parent.glob("*.damaged")] == [b"garbage"]
    assert isinstance(last, Finished)
    assert the_same(last.record) == wanted


def test_a_cell_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PROGRESS_SECONDS", 0.0)
    (task,) = tasks_of(plan_of(write_suite(tmp_path)), Store(tmp_path / "records", "tiny"))
    events = list(run_cell(task))
    steps = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in steps] == list(range(1, 45))
    assert {(event.key, event.total) for event in steps} == {(task.cell.spec.key, 44)}
    assert isinstance(events[-1], Finished)


def test_a_disk_that_cannot_be_written_fails_the_cell_alone(tmp_path):
    suite = write_suite(tmp_path)
    (task,) = tasks_of(plan_of(suite), Store(tmp_path / "records", "tiny"))
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    *_, last = run_cell(dataclasses.replace(task, weights=blocked / "weights.safetensors"))
    assert last.record.status == "failed"
    assert "blocked" in last.record.reason


@dataclass(frozen=True)
class Disguised(MaskedMethod):
    """Prunes at the end, and lets the dense network answer in the pruned one's place."""

    def finish(self, run):
        model = run.state.model
        dense = copy.deepcopy(model)
        self.prune(run, run.density)
        self.project(run.state)
        model.forward = dense.forward


def test_only_the_tensors_of_the_finished_network_are_measured(tmp_path, monkeypatch):
    register(monkeypatch, "disguised", Disguised)
    suite = write_suite(tmp_path, "[methods.disguised]\n[methods.dense]", sparsities="[0.99]")
    disguised, dense = train(suite, tmp_path / "records")
    if disguised.label == "dense":
        disguised, dense = dense, disguised
    assert disguised.counts.prunable_nonzero == disguised.counts.target_nonzero
    assert disguised.top1 < dense.top1 - 20


def test_a_kept_weight_that_happens_to_be_zero_still_counts(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class OneZero(MaskedMethod):
        def finish(self, run):
            self.prune(run, run.density)
            self.project(run.state)
            for name, weight in run.state.weights.items():
                weight[tuple(run.state.masks[name].nonzero()[0])] = 0.0
            super().finish(run)

    register(monkeypatch, "one_zero", OneZero)
    record = train_one(write_suite(tmp_path, "[methods.one_zero]"), tmp_path / "records")
    assert record.status == "ok"
    assert record.counts.idle == 3


def test_a_bug_in_a_hook_is_a_failure_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Buggy(MaskedMethod):
        def finish(self, run):
            raise ZeroDivisionError("division by zero")

    register(monkeypatch, "buggy", Buggy)
    suite = write_suite(tmp_path, "[methods.buggy]")
    plan = plan_of(suite)
    store = Store(tmp_path / "records", "tiny")
    (task,) = tasks_of(plan, store, checkpoint_seconds=0)
    events = list(execute([task], store, 1, 1))
    assert events[-1].record.status == "failed"
    assert "ZeroDivisionError" in events[-1].record.traceback
    assert not task.checkpoint.exists()
