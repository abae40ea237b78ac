"""Cells of several rounds and cells with a source, on digits: records, masks, and what goes wrong.

lenet_300_100 on digits has 50,200 prunable weights. From 35,140 on, at 30 %, it takes two rounds to
25,100, at 50 %; so five trainings in all.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from bench import inspection, runner, saving
from bench.datasets import DATASETS
from bench.launch import CELL_FAILED, DONE, Settings, chosen, left, train, verdict
from bench.networks import probe
from bench.record import landed
from bench.sources import read_masks
from bench.store import Store
from bench.task import Finished, Stopped
from bench.together import run_cell
from bench.trainer import Trainer
from methods.masking import PruneAtInit
from reports.aggregate import aggregate
from reports.suite_table import stored_table
from tests.bench.cells import (
    plan_of,
    register,
    tasks_of,
    the_same,
    train_one,
    write_recipe,
    write_suite,
)

STEPS = 20
WEIGHTS = 50_200
LANDINGS = {0.3: 35_140, 0.5: 25_100}

METHODS = """
[methods.dense]
[methods.lottery_ticket]
[methods.reinit]
method = "ticket_control"
source = "lottery_ticket"
[methods.noise]
method = "ticket_control"
source = "lottery_ticket"
control = "noise"
sigma = 3.0
sparsities = [0.5]
[methods.dpf]
sparsities = [0.5]
[methods.like_dpf]
method = "random"
layers_of_source = true
source = "dpf"
sparsities = [0.5]
[methods.small_dense]
"""


def suite_in(folder, methods=METHODS, recipe="", **fields):
    recipe = write_recipe(
        folder, recipe or "batch = 50\nlr = 0.002\noptimizer = 'adam'\nvalidation = 137"
    )
    common = {
        "sparsities": "[0.5, 0.3]",  # in any order
        "budget": f"{{ steps = {STEPS}, max_multiple = 9 }}",
        "recipe": recipe,
    }
    return write_suite(folder, methods, **common | fields)


def launched(path, records, only=None):
    """What the command line does with a suite; (plan, store, exit status)."""
    plan = plan_of(path)
    store = Store(records, plan.manifest.suite)
    cells = chosen(plan, only)
    train(plan, store, cells, Settings("cpu", workers=1))
    return plan, store, verdict(store, cells)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    plan, store, status = launched(suite_in(folder), folder / "records")
    assert status == DONE
    return plan, store


def cells_of(plan, label):
    return {cell.asked: cell for cell in plan.manifest.cells if cell.label == label}


def record_of(run, label, sparsity=0.5):
    plan, store = run
    return store.get(cells_of(plan, label)[sparsity].spec)


ONES = {
    name: torch.ones_like(value)
    for name, value in probe("lenet_300_100", DATASETS["digits"], ()).named_parameters()
    if name.endswith("weight")
}


def masks_at(run, label, phase):
    plan, store = run
    cell = cells_of(plan, label)[0.5]
    return read_masks(store.masks(cell.spec) / f"{phase}.safetensors", ONES)


def zeros_of(run, label, sparsity=0.5):
    """Where the finished network of a cell is not zero."""
    plan, store = run
    weights = load_file(store.weights(cells_of(plan, label)[sparsity].spec))
    return {name: (weights[name] != 0).float() for name in ONES}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def count(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def test_one_cell_serves_every_sparsity(run):
    plan, store = run
    cells = cells_of(plan, "lottery_ticket")
    assert cells.keys() == {0.5, 0.3}
    assert cells[0.5].spec == cells[0.3].spec
    assert cells[0.5].spec.sparsity == 0.5
    assert dict(cells[0.5].spec.options) == {"also": "0.3"}
    assert (cells[0.5].steps, cells[0.5].multiple) == (5 * STEPS, 5.0)
    assert len(list(store.records())) == 1 + 1 + 2 + 1 + 1 + 1 + 2


def test_the_record_holds_every_round_with_its_figures(run):
    record = record_of(run, "lottery_ticket")
    assert record.status == "ok"
    start, *rounds = record.phases
    assert (start.name, start.steps, start.status, start.counts) == ("start", 0, None, None)
    assert [one.name for one in rounds] == [f"round-{r}" for r in range(5)]
    assert [one.total for one in rounds] == [STEPS * n for n in range(1, 6)]
    # 49,200 and 1,000 at 0.8 and 0.9 make 40,260; the rest of the way to 35,140; 28,197; 25,100.
    kept = [one.counts.prunable_nonzero for one in rounds]
    assert kept == [WEIGHTS, 40_260, 35_140, pytest.approx(28_197, abs=40), 25_100]
    for one in rounds:
        assert one.status == "ok"
        assert one.counts.target_nonzero == one.counts.prunable_nonzero
        assert one.counts.macs == one.counts.prunable_nonzero  # each weight is used once an image
        assert one.counts.nonzero == one.counts.prunable_nonzero + 410  # biases
        assert one.density == one.counts.prunable_nonzero / WEIGHTS
        assert 15 < one.top1 <= one.top5 <= 100
        assert one.test_loss > 0
        assert 1 <= one.least.step <= STEPS
        assert one.least.top1 > 15
    # Test and counts are those of the finished cell.
    assert (record.top1, record.test_loss, record.counts) == (
        rounds[-1].top1,
        rounds[-1].test_loss,
        rounds[-1].counts,
    )


def test_the_round_before_any_pruning_is_the_dense_cell(run):
    dense, ticket = record_of(run, "dense", 0.0), record_of(run, "lottery_ticket").phases[1]
    assert (ticket.top1, ticket.top5, ticket.test_loss) == (dense.top1, dense.top5, dense.test_loss)
    assert ticket.counts == dataclasses.replace(dense.counts, target_nonzero=WEIGHTS)


def test_a_least_validation_loss_at_the_end_has_the_accuracy_of_the_end(run):
    rounds = record_of(run, "lottery_ticket").phases[1:]
    last = [one for one in rounds if one.least.step == STEPS]
    assert last
    assert all(one.least.top1 == one.top1 for one in last)
    curve = {point.step: point.validation_loss for point in record_of(run, "dense", 0.0).curve}
    assert rounds[0].least.validation_loss <= curve[STEPS] + 1e-5


def test_times_and_cost_are_told_for_each_round(run):
    record = record_of(run, "lottery_ticket")
    assert len(record.times.phases) == len(record.phases)
    assert list(record.times.phases) == sorted(record.times.phases)
    assert 0 < record.times.phases[1] < record.times.phases[-1] <= record.times.train_seconds
    assert (record.steps, record.extra_batches, record.multiple) == (5 * STEPS, 0, 5.0)
    early = landed(record, 0.3)
    assert (early.steps, early.multiple) == (3 * STEPS, 3.0)
    assert early.times.train_seconds == record.times.phases[3]
    assert early.top1 == record.phases[3].top1
    assert early.counts.prunable_nonzero == 35_140


def test_masks_of_every_round_are_on_disk(run):
    record = record_of(run, "lottery_ticket")
    masks = [masks_at(run, "lottery_ticket", one.name) for one in record.phases[1:]]
    assert [count(one) for one in masks] == [
        one.counts.prunable_nonzero for one in record.phases[1:]
    ]
    for old, new in itertools.pairwise(masks):
        assert all(torch.equal(new[name] * old[name], new[name]) for name in new)
    assert same(masks[-1], zeros_of(run, "lottery_ticket"))


@pytest.mark.parametrize(("sparsity", "phase"), [(0.3, "round-2"), (0.5, "round-4")])
def test_a_control_has_the_masks_of_the_round_that_landed_and_pays_for_it(run, sparsity, phase):
    record = record_of(run, "reinit", sparsity)
    assert record.status == "ok"
    assert record.counts.prunable_nonzero == LANDINGS[sparsity]
    assert same(zeros_of(run, "reinit", sparsity), masks_at(run, "lottery_ticket", phase))
    assert record.steps == STEPS
    paid = landed(record_of(run, "lottery_ticket"), sparsity).multiple
    assert record.multiple == pytest.approx(1 + paid)
    # It is tested as a ticket is.
    (train,) = record.phases
    assert (train.status, train.top1, train.counts) == ("ok", record.top1, record.counts)
    assert train.least.top1 is not None


def test_a_control_of_layer_counts_has_those_of_its_source(run):
    dpf, like = record_of(run, "dpf"), record_of(run, "like_dpf")
    assert [line.nonzero for line in like.layers] == [line.nonzero for line in dpf.layers]
    assert not same(zeros_of(run, "dpf"), zeros_of(run, "like_dpf"))
    assert like.multiple == pytest.approx(1 + dpf.multiple)
    assert like.spec.source == dpf.spec.key


def test_rows_read_the_round_that_landed_there(run):
    plan, store = run
    rows = {
        (row.label, row.spec.sparsity): row
        for row in aggregate(plan.manifest, list(store.records())).rows
    }
    record = record_of(run, "lottery_ticket")
    for sparsity, phase in ((0.3, record.phases[3]), (0.5, record.phases[5])):
        row = rows["lottery_ticket", sparsity]
        assert row.top1 == phase.top1
        assert row.nonzero == LANDINGS[sparsity] + 410
        assert row.multiple == phase.total / STEPS
    small = rows["small_dense", 0.5]
    assert small.reached_sparsity == pytest.approx(0.5, abs=0.01)
    assert small.smaller
    assert stored_table(store).count("| lottery_ticket ") == 2


def test_a_suite_that_is_done_trains_nothing(run, monkeypatch):
    plan, store = run

    def untouchable(*arguments):
        raise AssertionError

    monkeypatch.setattr("bench.launch.perform", untouchable)
    train(plan, store, chosen(plan, None), Settings("cpu", workers=1))
    assert left(store, chosen(plan, None)) == 0


def test_only_on_a_control_trains_its_source_first_and_nothing_else(tmp_path):
    plan, store, status = launched(suite_in(tmp_path), tmp_path / "records", only="noise")
    assert status == DONE
    assert {record.label for record in store.records()} == {"lottery_ticket", "noise"}
    assert record_of((plan, store), "noise").multiple == 6.0


def test_testing_a_round_leaves_the_noise_of_the_training_alone(tmp_path, monkeypatch):
    inside = []
    fresh, measure = runner._Attempt.fresh_model, runner._Attempt.measure_ended

    def drawn(self, draw=0):
        model = fresh(self, draw)
        inside.append(torch.random.get_rng_state())
        return model

    def measured(self):
        before = torch.random.get_rng_state()
        inside.clear()
        measure(self)
        assert torch.equal(torch.random.get_rng_state(), before)
        # The new network did draw numbers.
        tested.extend(not torch.equal(one, before) for one in inside)

    tested = []
    monkeypatch.setattr(runner._Attempt, "fresh_model", drawn)
    monkeypatch.setattr(runner._Attempt, "measure_ended", measured)
    budget = "{ steps = 3, max_multiple = 9 }"
    path = suite_in(tmp_path, "[methods.lottery_ticket]", sparsities="[0.5]", budget=budget)
    train_one(path, tmp_path)
    assert tested == [True] * 10  # five rounds, at their end and at the least validation loss


class Killed(KeyboardInterrupt):
    """Like a kill, nothing of the harness sees it."""


def killed(task, monkeypatch):
    """Kills a run again and again: within rounds, at their ends, and in the steps after them."""
    kills = [3, 5, 13, 20, 21, 30, 36, 37, 45, 51, 53, 54, 66, 70, 83]
    step = Trainer._prepare_step

    def prepare(self):
        if kills and self.cursor.total == kills[0]:
            kills.pop(0)
            raise Killed
        step(self)

    monkeypatch.setattr(Trainer, "_prepare_step", prepare)
    resumed = 0
    while kills:
        resumed += task.checkpoint.exists()
        with pytest.raises(Killed):
            list(run_cell(task))
    assert resumed >= 12


def stopped(task, monkeypatch):
    """Stops a run at deadlines: the steps done go through all parts of a round."""
    done = []
    for _ in range(6):
        *_, event = run_cell(dataclasses.replace(task, deadline=runner.time.monotonic() + 15))
        assert isinstance(event, Stopped)
        done.append(event.done)
    assert len({steps % 16 for steps in done}) >= 5


@pytest.mark.parametrize("how", [killed, stopped])
def test_a_run_left_in_the_middle_of_rounds_ends_like_one_that_was_not(how, tmp_path, monkeypatch):
    # Four steps to the snapshot and five trainings of 16; the rate is so high that the validation
    # loss falls and rises.
    recipe = "batch = 50\nlr = 0.02\noptimizer = 'adam'\nvalidation = 137\nwarmup = 0.2"
    path = suite_in(tmp_path, "[methods.lottery_ticket]\nrewind = 0.2", recipe, sparsities="[0.5]")
    wanted = train_one(path, tmp_path / "undisturbed")
    assert wanted.steps == 4 + 5 * 16
    assert sum(one.least.step < 8 for one in wanted.phases[1:]) >= 2
    store, undisturbed = (Store(tmp_path / name, "tiny") for name in ("records", "undisturbed"))
    # A second passes with each look at the clock, so that it saves after about three steps.
    seconds = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(seconds), perf_counter=time.perf_counter)
    monkeypatch.setattr(runner, "time", clock)
    monkeypatch.setattr(saving, "time", clock)
    (task,) = tasks_of(plan_of(path), store, checkpoint_seconds=3)
    how(task, monkeypatch)
    *_, last = run_cell(task)
    assert isinstance(last, Finished)
    assert the_same(last.record) == the_same(wanted)
    assert all(one.least.top1 is not None for one in last.record.phases[1:])
    assert len(last.record.times.phases) == 6
    for name in (f"round-{r}.safetensors" for r in range(5)):
        ours, theirs = (place.masks(wanted.spec) / name for place in (store, undisturbed))
        assert ours.read_bytes() == theirs.read_bytes()
    assert store.weights(wanted.spec).read_bytes() == undisturbed.weights(wanted.spec).read_bytes()


PAIR = """
[methods.lottery_ticket]
[methods.reinit]
method = "ticket_control"
source = "lottery_ticket"
"""


def test_a_source_whose_networks_are_gone_is_told_with_what_to_do(tmp_path):
    path = suite_in(tmp_path, PAIR, budget="{ steps = 5, max_multiple = 5 }")
    records = tmp_path / "records"
    plan, store, _ = launched(path, records, only="lottery_ticket")
    ticket = cells_of(plan, "lottery_ticket")[0.5].spec
    shutil.rmtree(store.masks(ticket))
    *_, status = launched(path, records)
    assert status == CELL_FAILED
    # The finished network gives the masks of the last round, but not those of the round before.
    assert record_of((plan, store), "reinit", 0.5) is not None
    (failed,) = store.attempts()
    assert (failed.status, failed.spec.sparsity, failed.traceback) == ("failed", 0.3, "")
    assert "the source's network is not here" in failed.reason
    assert f"Move its record {ticket.slug}.json away" in failed.reason
    # The advice helps.
    store.path(ticket).unlink()
    *_, status = launched(path, records)
    assert status == DONE


@dataclass(frozen=True)
class Broken(PruneAtInit):
    """Raises before the first step."""

    def start_phase(self, run):
        raise RuntimeError("on purpose")


def test_without_its_source_a_control_is_not_run(tmp_path, monkeypatch):
    register(monkeypatch, "broken", Broken)
    methods = """
[methods.broken]
[methods.control]
method = "random"
layers_of_source = true
source = "broken"
[methods.dense]
"""
    path = suite_in(tmp_path, methods, sparsities="[0.5]", budget="{ steps = 5 }")
    plan, store, status = launched(path, tmp_path / "records")
    assert status == CELL_FAILED
    assert [record.label for record in store.attempts()] == ["broken"]
    assert [record.label for record in store.records()] == ["dense"]
    rows = aggregate(plan.manifest, list(store.records())).rows
    assert [row.statuses for row in rows] == [("missing",), ("missing",), ("ok",)]
    assert "- broken, lenet_300_100, 50 %, seed 0: failed: RuntimeError: on purpose" in (
        stored_table(store)
    )


def test_a_control_is_skipped_where_its_source_diverged(tmp_path):
    recipe = "batch = 50\nlr = 1e30"
    path = suite_in(tmp_path, PAIR, recipe, sparsities="[0.5]")
    _, store, status = launched(path, tmp_path / "records")
    assert status == CELL_FAILED
    (source,) = store.records()
    assert source.status == "diverged"
    assert store.attempts() == []
    (control,) = (cell for cell in store.manifest().cells if cell.label == "reinit")
    assert control.skipped == f"the source {source.spec.slug} is diverged: {source.reason}"


def test_a_cell_that_stopped_before_it_landed_has_rows_without_figures(tmp_path, monkeypatch):
    step = Trainer._count_step

    def poisoned(self):
        step(self)
        if self.phase.name == "round-3":
            self.losses.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "_count_step", poisoned)
    plan, store, _ = launched(suite_in(tmp_path, PAIR), tmp_path / "records")
    # It landed on 30 % in round 2, and never on 50 %; so has its control.
    rows = {
        (row.label, row.spec.sparsity): row
        for row in aggregate(plan.manifest, list(store.records())).rows
    }
    assert rows["lottery_ticket", 0.3].statuses == ("ok",)
    assert rows["lottery_ticket", 0.3].nonzero == 35_140 + 410
    assert rows["lottery_ticket", 0.5].statuses == ("diverged",)
    assert rows["lottery_ticket", 0.5].nonzero is None
    assert rows["reinit", 0.3].statuses == ("ok",)
    assert rows["reinit", 0.5].statuses == ("missing",)


SHORT = """
[methods.one_shot]
budget = { steps = 40 }
[methods.reinit]
method = "ticket_control"
source = "one_shot"
"""


def test_what_a_source_cost_is_counted_in_the_budgets_of_the_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "CHANCE_FACTOR", 0.0)  # nothing is learnt
    budget = "{ steps = 10, max_multiple = 9 }"
    plan = plan_of(write_suite(tmp_path, SHORT, sparsities="[0.5]", budget=budget))
    store = Store(tmp_path / "records", "tiny")
    train(plan, store, list(plan.manifest.cells), Settings("cpu", workers=1))
    source, control = store.records()
    assert (source.label, source.steps, source.multiple) == ("one_shot", 48, 1.2)
    assert control.multiple == (10 + 48) / 10
    assert [cell.multiple for cell in plan.manifest.cells] == [1.2, 5.8]
