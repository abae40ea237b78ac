"""One cell: what its record says, and what becomes of everything that goes wrong in it."""

from __future__ import annotations

import copy
import dataclasses
import errno
import itertools
import math
import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bench import checkpoint, resolve, runner, signals, step
from bench.checkpoint import tensor_hash
from bench.data import Split
from bench.executors import execute
from bench.record import Origin, PhaseResult, decode
from bench.saving import Saver
from bench.store import Store
from bench.task import Finished, Note, Progress, Stopped, Ways
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
        r"mnist in .* changed since the suite was resolved \(content \w+, expected \w+",
        last.record.reason,
    )
    assert last.record.traceback == ""  # no fault of anybody's code


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


def one_task(tmp_path, methods="[methods.rigl]", **changes):
    """The only cell of a suite."""
    suite = write_suite(tmp_path, methods)
    (task,) = tasks_of(plan_of(suite), Store(tmp_path / "records", "tiny"), **changes)
    return task


def asked_after(monkeypatch, steps, ask=signals.request):
    """Somebody asks to stop once so many more steps are done; the number of the step."""
    count = itertools.count(1)
    step = Trainer._count_step

    def counted(self):
        step(self)
        if next(count) == steps:
            ask()

    monkeypatch.setattr(Trainer, "_count_step", counted)


@pytest.mark.parametrize("steps", [1, 7, 43, 44])
def test_a_cell_that_is_asked_to_stop_finishes_its_step_and_goes_on_where_it_was(
    steps, tmp_path, monkeypatch
):
    task = one_task(tmp_path)
    *_, wanted = run_cell(task)
    with monkeypatch.context() as patched, signals.listen():
        asked_after(patched, steps)
        *_, stopped = run_cell(task)
    assert stopped == Stopped(task.cell.spec.key, steps)
    assert checkpoint.kept(task.checkpoint)
    *_, last = run_cell(task)
    assert the_same(last.record) == the_same(wanted.record)


def test_a_cell_that_is_asked_to_stop_before_its_first_step_does_none(tmp_path):
    task = one_task(tmp_path)
    with signals.listen():
        signals.request()
        assert list(run_cell(task)) == [Stopped(task.cell.spec.key, 0)]
    assert not checkpoint.kept(task.checkpoint)


def test_an_error_while_it_is_to_stop_is_not_the_cells(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Interrupted(Broken):
        def update(self, run):
            signals.request()
            raise RuntimeError("a helping process is gone")

    register(monkeypatch, "interrupted", Interrupted, "none")
    task = one_task(tmp_path, "[methods.interrupted]")
    with signals.listen():
        *_, note, last = run_cell(task)
    assert note.text == (
        "interrupted: an error while it was to stop (RuntimeError: a helping process is gone)."
    )
    assert last == Stopped(task.cell.spec.key, 7)


def test_a_cell_that_takes_too_long_is_saved_and_goes_on_with_more_time(tmp_path):
    task = one_task(tmp_path)
    *_, wanted = run_cell(task)
    limited = dataclasses.replace(task, timeout_seconds=0.02)
    *_, first = run_cell(limited)
    record = first.record
    assert record.status == "timeout"
    assert 0 < record.steps < 44
    assert record.reason == (
        f"stopped after {0.02 / 60:g} minutes, at step {record.steps} of 44; with more time it "
        "goes on from there"
    )
    assert record.times.train_seconds + record.times.eval_seconds >= 0.02
    *_, again = run_cell(limited)  # what it took before counts
    assert (again.record.status, again.record.steps) == ("timeout", record.steps)
    *_, last = run_cell(task)
    assert the_same(last.record) == the_same(wanted.record)


def test_a_cell_that_took_too_long_is_kept_aside_with_its_checkpoint(tmp_path):
    suite = write_suite(tmp_path)
    records = tmp_path / "records"
    (first,) = train(suite, records, timeout_seconds=0.01)
    store = Store(records, "tiny")
    assert first.status == "timeout"
    assert [record.status for record in store.attempts()] == ["timeout"]
    assert checkpoint.kept(store.checkpoint(first.spec))
    assert train_one(suite, records).status == "ok"
    assert not list(store.checkpoint(first.spec).parent.iterdir())


CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4000000000 bytes."
)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 4 GiB"),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(CPU_SAYS),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_has_a_status_and_keeps_what_was_trained(error, tmp_path, monkeypatch):
    there_is_enough = []

    @dataclass(frozen=True)
    class Large(SparsityMethod):
        def plan(self, budget, density):
            return (Phase("train", budget.steps, updates=Cadence(1, 7)),)

        def update(self, run):
            if run.step == 14 and not there_is_enough:
                raise error

    register(monkeypatch, "large", Large, "none")
    suite = write_suite(tmp_path, "[methods.large]")
    records = tmp_path / "records"
    first = train_one(suite, records, checkpoint_seconds=0)
    assert (first.status, first.steps, first.traceback) == ("out-of-memory", 14, "")
    assert first.reason == f"{type(error).__name__}: {error}"
    store = Store(records, "tiny")
    assert [record.status for record in store.attempts()] == ["out-of-memory"]
    assert checkpoint.kept(store.checkpoint(first.spec))
    there_is_enough.append(True)
    assert the_same(train_one(suite, records)) == the_same(train_one(suite, tmp_path / "other"))


def test_an_allocation_that_no_machine_can_make_is_too_little_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert runner.out_of_memory(caught.value)
    with pytest.raises(MemoryError) as other:
        np.empty(2**60, dtype=np.uint8)
    assert runner.out_of_memory(other.value)
    assert not runner.out_of_memory(RuntimeError("a mistake"))


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_checkpoints_and_not_the_training(tmp_path, monkeypatch):
    task = one_task(tmp_path, checkpoint_seconds=0)
    *_, wanted = run_cell(dataclasses.replace(task, checkpoint_seconds=60))
    monkeypatch.setattr(checkpoint, "write_atomically", full)
    events = list(run_cell(task))
    assert {event.text for event in events if isinstance(event, Note)} == {
        f"{task.checkpoint}: cannot be written (No space left on device); "
        "the last checkpoint stays."
    }
    assert the_same(events[-1].record) == the_same(wanted.record)


def test_weights_that_cannot_be_written_leave_the_checkpoint_for_the_next_run(
    tmp_path, monkeypatch
):
    suite = write_suite(tmp_path, "[methods.rigl]")
    wanted = the_same(train_one(suite, tmp_path / "undisturbed"))
    records = tmp_path / "records"
    with monkeypatch.context() as patched:
        patched.setattr(runner, "write_atomically", full)
        failed = train_one(suite, records, checkpoint_seconds=0)
    store = Store(records, "tiny")
    path = store.weights(failed.spec)
    assert (failed.status, failed.traceback) == ("failed", "")
    assert failed.reason == f"{path}: cannot be written (No space left on device)"
    assert checkpoint.kept(store.checkpoint(failed.spec))
    assert the_same(train_one(suite, records)) == wanted


def test_a_cell_for_which_there_is_no_room_says_so_before_it_trains(tmp_path, monkeypatch):
    task = one_task(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    *_, last = run_cell(task)
    assert (last.record.status, last.record.steps) == ("failed", 0)
    assert "the disk has 10 bytes left" in last.record.reason


def test_an_error_after_a_resume_says_how_to_start_over(tmp_path, monkeypatch):
    task = one_task(tmp_path)
    with monkeypatch.context() as patched, signals.listen():
        asked_after(patched, 20)
        list(run_cell(task))

    def broken(self):
        raise ValueError("no such thing")

    monkeypatch.setattr(Trainer, "compute", broken)
    for end in (f" (it went on at step 20; to start over, delete {task.checkpoint})", ""):
        *_, last = run_cell(task)
        assert last.record.status == "failed"
        assert last.record.reason == f"ValueError: no such thing{end}"
        task.checkpoint.unlink(missing_ok=True)


@pytest.mark.parametrize("both", [False, True])
def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_is_used(
    both, tmp_path, monkeypatch
):
    task = one_task(tmp_path, checkpoint_seconds=0)
    *_, wanted = run_cell(dataclasses.replace(task, checkpoint_seconds=60))
    with monkeypatch.context() as patched, signals.listen():
        asked_after(patched, 20)
        list(run_cell(task))
    newest, former = files = checkpoint.kept(task.checkpoint)
    for path in files[: 2 if both else 1]:
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.unlink()  # the two may share their bytes
        path.write_bytes(content)
    goes_on = []
    moments = Trainer.moments

    def watched(self):
        goes_on.append(self.cursor.total)
        yield from moments(self)

    monkeypatch.setattr(Trainer, "moments", watched)
    events = list(run_cell(dataclasses.replace(task, checkpoint_seconds=60)))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes[0] == (
        f"{newest}: damaged checkpoint (its content changed). It is kept as "
        f"{newest.with_suffix('.damaged').name}; the one before it is tried."
    )
    assert goes_on == [0 if both else 19]
    asides = [path.with_suffix(".damaged").exists() for path in files]
    assert asides == [True, both]
    assert newest.exists() is False  # so that the next one does not push a damaged one back
    if both:
        assert notes[1].startswith(f"{former}: damaged checkpoint")
        assert notes[1].endswith("the cell starts over.")
    assert the_same(events[-1].record) == the_same(wanted.record)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cell_goes_on_compiled_if_it_began_so_whatever_is_asked_for(
    compiled, tmp_path, monkeypatch
):
    monkeypatch.setattr(step, "_compiled", lambda: step.forward)  # what it would round differently
    task = one_task(tmp_path, ways=Ways(compiled=compiled))
    with monkeypatch.context() as patched, signals.listen():
        asked_after(patched, 20)
        list(run_cell(task))
    *_, last = run_cell(dataclasses.replace(task, ways=Ways(compiled=not compiled)))
    assert last.record.execution.compiled is compiled


def test_a_cell_that_goes_on_elsewhere_says_so(tmp_path, monkeypatch):
    task = one_task(tmp_path)
    with monkeypatch.context() as patched, signals.listen():
        asked_after(patched, 20)
        patched.setattr(checkpoint, "place", lambda _: "a cluster")
        list(run_cell(task))
    note, *_ = run_cell(task)
    here = checkpoint.place(torch.device("cpu"))
    assert note.text == (
        f"rigl began on a cluster and goes on here, on {here}: its last digits may differ."
    )


def test_a_cell_that_goes_on_by_other_code_says_so_and_its_record_names_both(tmp_path, monkeypatch):
    task = one_task(tmp_path)
    here = checkpoint.place(torch.device("cpu"))
    for commit in ("a" * 40, "b" * 40, "a" * 40):
        with monkeypatch.context() as patched, signals.listen():
            asked_after(patched, 8)
            patched.setattr(runner, "code", lambda commit=commit: commit)
            note, *_ = run_cell(task)
    assert note.text == (
        f"rigl was trained by commit {'b' * 40} and goes on with {'a' * 40}: its record names both."
    )
    monkeypatch.setattr(runner, "code", lambda: "c" * 40)
    *_, last = run_cell(task)
    assert last.record.execution.before == (Origin("b" * 40, here), Origin("a" * 40, here))


def test_a_cell_that_is_resumed_by_its_own_code_in_its_own_place_names_nothing_else(
    tmp_path, monkeypatch
):
    task = one_task(tmp_path)
    with monkeypatch.context() as patched, signals.listen():
        asked_after(patched, 20)
        list(run_cell(task))
    first, *_, last = run_cell(task)
    assert not isinstance(first, Note)
    assert last.record.execution.before == ()


def test_of_a_checkpoint_from_before_they_were_kept_the_code_is_unknown(tmp_path, monkeypatch):
    task = one_task(tmp_path)
    here = checkpoint.place(torch.device("cpu"))
    with monkeypatch.context() as patched, signals.listen():
        asked_after(patched, 20)
        patched.setattr(runner._Attempt, "_sign", lambda self: None)
        list(run_cell(task))
    *_, last = run_cell(task)
    assert last.record.execution.before == (Origin("unknown", here),)


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    task = one_task(tmp_path)
    *_, wanted = run_cell(task)
    clock = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with signals.listen():
        asked_after(monkeypatch, 20)
        list(run_cell(dataclasses.replace(task, deadline=time.monotonic() + 1000)))
    *_, last = run_cell(task)
    assert the_same(last.record) == the_same(wanted.record)
    assert last.record.times.train_seconds > 0


def test_the_command_gives_a_cell_its_minutes_and_fails_if_they_do_not_do(call, tmp_path):
    suite = write_suite(tmp_path)
    arguments = ("run", suite, "--workers", "1", "--cell-timeout")
    short = call(*arguments, 0.0001)
    assert short.status == 1
    assert "timeout: stopped after 0.0001 minutes, at step" in short.err
    assert call(*arguments, 5).status == 0
    wrong = call(*arguments, 0)
    assert (wrong.status, wrong.err) == (2, "sparsebench: --cell-timeout 0.0: must be above 0.\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_leaves_with_the_signals_status_once_all_is_saved(
    number, status, call, tmp_path, monkeypatch
):
    suite = write_suite(tmp_path, "[methods.rigl]\n[methods.dpf]")
    records = tmp_path / "records"
    former = signal.signal(number, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            asked_after(patched, 20, lambda: signal.raise_signal(number))
            stopped = call("run", suite, "--workers", "1")
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, former)
    assert stopped.status == status
    assert stopped.err.endswith("Saved and stopped. The same command goes on.\n")
    assert len(list((records / "tiny" / "checkpoints").iterdir())) == 1
    assert not stored(records)
    assert call("run", suite, "--workers", "1").status == 0
    assert stored(records) == {
        record.spec.key: the_same(record) for record in train(suite, tmp_path / "undisturbed")
    }


def test_once_a_cell_has_stopped_for_lack_of_time_no_other_begins(tmp_path, monkeypatch):
    # What saving takes may stop a cell long before the deadline, and another could not be saved.
    monkeypatch.setattr(Saver, "late", lambda self, now: True)
    suite = write_suite(tmp_path, "[methods.rigl]\n[methods.dpf]")
    store = Store(tmp_path / "records", "tiny")
    tasks = tasks_of(plan_of(suite), store, deadline=time.monotonic() + 1000)
    events = list(execute(tasks, store, workers=1, threads=1))
    assert [event for event in events if not isinstance(event, Progress)] == [
        Stopped(tasks[0].cell.spec.key, 1, late=True)
    ]


def test_the_command_says_that_time_was_up_before_the_limit_itself(call, tmp_path, monkeypatch):
    monkeypatch.setattr(Saver, "late", lambda self, now: True)
    suite = write_suite(tmp_path)
    stopped = call("run", suite, "--workers", "1", "--limit-minutes", 1000)
    assert stopped.status == 5
    assert stopped.err.endswith("Time is up, cells left: 1. The same command goes on.\n")
