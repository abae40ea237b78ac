"""Where a step's time goes: stages, cadences, turns, and that nothing is left behind.

No test looks at a clock: times are checked against each other, or against a clock of the test's.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import profiling, recipes
from bench.contestant import CUT, STAGES, Contestant, Watched, at_work, evaluated
from bench.errors import CellError, UsageError
from bench.evaluate import Evaluation
from bench.profiling import Drift, Profile, Spread, drift, of_record, profile, table, task_of
from bench.step import Step
from bench.store import Store
from methods.api import Budget, Cadence, Phase
from methods.masking import MaskedMethod
from tests.bench.cells import plan_of, register, stored, train, train_one, write_recipe, write_suite
from tests.reports.records import record, spec

SEVERAL = "[methods.dense]\n[methods.one_shot]\n[methods.rigl]\nevery = 4\n[methods.l0]"
BUDGET = "{ epochs = 8, max_multiple = 1.2 }"
EPOCH = 22  # steps, of digits at batch 64


def contestant(path: Path, label: str, steps: int = 0) -> Contestant:
    plan = plan_of(path)
    cell = next(cell for cell in plan.manifest.cells if cell.label == label)
    return Contestant(task_of(cell, plan, "cpu", graph=True), steps)


@pytest.fixture(scope="module", autouse=True)
def few_rounds() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "LEAST_ROUNDS", 3)
        yield 3


@pytest.fixture(scope="module")
def profiles(tmp_path_factory, few_rounds) -> dict[str, Profile]:
    path = write_suite(tmp_path_factory.mktemp("profiled"), SEVERAL, budget=BUDGET)
    plan = plan_of(path)
    found = profile(plan, plan.manifest.cells, "cpu", seconds=0.0)
    assert not found.notes
    return {row.label: row for row in found.rows if isinstance(row, Profile)}


def test_every_method_has_every_stage_and_they_add_up(profiles):
    assert list(profiles) == ["dense", "one_shot", "rigl", "l0"]
    for row in profiles.values():
        assert tuple(row.stages) == STAGES
        assert sum(row.stages.values()) + row.unattributed == pytest.approx(row.step)
        for stage in ("data", "forward", "backward", "hot hooks", "optimizer", "evaluation"):
            assert row.stages[stage] > 0, stage
        assert row.own == pytest.approx(
            row.stages["hot hooks"] + row.stages["updates"] + row.stages["phase start"]
        )
        assert row.ratio.lower <= row.ratio.median <= row.ratio.upper
        assert row.replayed is None


def test_updates_are_divided_by_their_period(profiles):
    rigl = profiles["rigl"]
    assert rigl.every == 4
    assert rigl.update > 0
    assert rigl.stages["updates"] == pytest.approx(rigl.update / 4)
    for label in ("dense", "one_shot", "l0"):
        assert (profiles[label].every, profiles[label].stages["updates"]) == (None, 0)
    one_shot = profiles["one_shot"]  # fine-tuned for a fifth of the epochs
    assert one_shot.start > 0
    assert one_shot.stages["phase start"] == pytest.approx(one_shot.start / (8 * EPOCH // 5))


def test_what_was_measured_is_said(profiles, few_rounds):
    assert profiles["dense"].phase == "train"
    assert profiles["dense"].first == 4 * EPOCH
    assert profiles["one_shot"].phase == "finetune"
    assert profiles["rigl"].first % 4 == 0
    assert {row.steps for row in profiles.values()} == {2 * few_rounds}
    assert profiles["rigl"].sparsity == 0.9
    assert profiles["dense"].sparsity in (None, 0.0)


def test_a_cell_is_at_work_where_it_prunes():
    dense = Phase("dense", 10)
    assert at_work([dense]) == 0
    assert at_work([Phase("start", 0), dense]) == 1
    assert at_work([dense, Phase("prune", 5, density=0.1)]) == 1
    assert at_work([Phase("all", 5, density=1.0), Phase("prune", 5, density=0.5)]) == 1
    assert at_work([dense, Phase("update", 5, updates=Cadence(2))]) == 1
    assert at_work([dense, Phase("late", 5, updates=Cadence(2, start=7))]) == 0


def test_phases_before_the_measured_one_are_cut_and_the_schedule_is_where_it_would_be(tmp_path):
    path = write_suite(tmp_path, "[methods.one_shot]", budget="{ epochs = 20, max_multiple = 1.2 }")
    cell = contestant(path, "one_shot")
    cursor, length = cell.trainer.cursor, 20 * EPOCH
    assert cursor.phase == 1
    assert cell.phase.steps == length // 5
    assert cell.first == length // 10
    assert (cursor.step, cursor.total) == (cell.first, length + cell.first)
    assert cursor.position == CUT  # steps that were really trained
    masks = cell.trainer.state.masks.values()
    kept = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert kept == pytest.approx(0.1, abs=1e-4)
    cell.steps(3)
    cell.step()
    assert float(cell.trainer.state.progress) == pytest.approx(
        cursor.total / (length + length // 5)
    )


def test_rounds_of_a_lottery_ticket_are_reached(tmp_path):
    path = write_suite(
        tmp_path, "[methods.lottery_ticket]", budget="{ epochs = 4, max_multiple = 40 }"
    )
    cell = contestant(path, "lottery_ticket")
    assert cell.phase.name == "round-1"
    assert any(not mask.all() for mask in cell.trainer.state.masks.values())
    assert cell.steps(2) > 0


class Counted(MaskedMethod):
    """Counts its updates."""

    calls = 0

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        return (Phase("train", budget.steps, updates=Cadence(3, start=3)),)

    def update(self, run) -> None:
        assert run.phase.updates.due(run.step)
        type(self).calls += 1


def test_updates_come_only_where_they_are_timed(tmp_path, monkeypatch):
    register(monkeypatch, "counted", Counted)
    cell = contestant(write_suite(tmp_path, "[methods.counted]"), "counted")
    kind = type(cell.trainer.method)
    cell.steps(30)
    cell.stages(5)
    assert kind.calls == 0
    cell.rare()
    assert kind.calls == 1  # every update is looked at closely: one is enough
    cell.steps(5)
    assert kind.calls == 1


def test_in_a_drift_updates_come_as_planned(tmp_path, monkeypatch):
    register(monkeypatch, "counted", Counted)
    cell = contestant(write_suite(tmp_path, "[methods.counted]"), "counted", steps=100)
    cell.really(60)
    assert type(cell.trainer.method).calls == 20
    assert cell.trainer.cursor.step == 60


def test_what_comes_now_and_then_is_in_no_timed_step(tmp_path, monkeypatch):
    """A clock that only goes on while an epoch's order is drawn, or a point of the curve added."""
    path = write_suite(tmp_path, budget="{ epochs = 200 }")
    cell = contestant(path, "dense")
    now = [0.0]
    monkeypatch.setattr("bench.clock.time.perf_counter", lambda: now[0])

    def slow(name: str, owner: object, seconds: float) -> None:
        before = getattr(owner, name)

        def run(*arguments):
            now[0] += seconds
            return before(*arguments)

        monkeypatch.setattr(owner, name, run)

    slow("_draw", cell.trainer.stream, 5.0)
    slow("_add_curve_point", cell.trainer, 3.0)
    assert cell.interval == EPOCH  # 4,400 steps and 200 points
    assert cell.steps(50) == 0
    assert set(cell.stages(50).values()) == {0.0}
    rare = cell.rare()
    assert (rare["order"], rare["curve"]) == (5.0, 3.0 + 0.0)
    divided = cell.divided(rare)
    assert divided["data"] == pytest.approx(5 / EPOCH)
    assert divided["harness"] == pytest.approx(3 / EPOCH)


def test_a_watched_step_computes_what_a_step_does(tmp_path):
    """Bit for bit, L0's noise too."""
    path = write_suite(tmp_path, "[methods.l0]\n[methods.rigl]")
    for label in ("l0", "rigl"):
        found = []
        for kind in (Step, Watched):
            cell = contestant(path, label)
            trainer = cell.trainer
            if kind is Watched:
                trainer.hot = cell.watched
            torch.manual_seed(0)
            for _ in range(5):
                cell.step()
            found.append([weight.clone() for weight in trainer.state.model.parameters()])
            assert "step" not in vars(trainer.state.optimizer)
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_is_timed_is_what_a_run_computes(tmp_path, monkeypatch):
    cell = contestant(write_suite(tmp_path, "[methods.rigl]"), "rigl")
    passes = cell.trainer.hot._passes
    assert passes is not None
    called: list[str] = []
    for name in ("forward", "backward"):
        real = getattr(passes, name)
        monkeypatch.setattr(
            passes, name, lambda *a, real=real, n=name: called.append(n) or real(*a)
        )
    cell.watched.compute()
    assert called == ["forward", "backward"]


def test_every_part_of_a_step_goes_to_its_stage(tmp_path, monkeypatch):
    """A clock that says what was called."""
    monkeypatch.setattr("bench.step.written_out", lambda *_: None)  # it asks for no penalty
    ticks = itertools.count()
    monkeypatch.setattr("bench.clock.time.perf_counter", lambda: float(next(ticks)))
    cell = contestant(write_suite(tmp_path, "[methods.rigl]"), "rigl")
    cell.watched.take()
    cell.watched.compute()
    spent = cell.watched.take()
    # Each watch looks twice; what is inside of one looks four times more for two hooks and step.
    assert spent == dict.fromkeys(STAGES, 0.0) | {
        "data": 1.0,
        "forward": 2.0,  # 3 less the penalty's 1
        "backward": 1.0,
        "hot hooks": 3.0,
        "optimizer": 1.0,
        "harness": 4.0,  # 7 less the two hooks' and the optimizer's
    }


def test_who_is_first_alternates(tmp_path):
    cells = contestant(path := write_suite(tmp_path), "dense"), contestant(path, "dense")
    called: list[Contestant] = []

    def measure(cell: Contestant) -> float:
        called.append(cell)
        return float(cell is cells[1])

    assert [profiling._pair(measure, *cells, number) for number in range(3)] == [(0.0, 1.0)] * 3
    assert called == [*cells, *reversed(cells), *cells]


def test_a_dense_cell_is_added_where_there_is_none(tmp_path):
    plan = plan_of(write_suite(tmp_path, "[methods.snip]"))
    found = profile(plan, plan.manifest.cells, "cpu", 0.0)
    (row,) = found.rows
    assert isinstance(row, Profile)
    assert row.label == "snip"
    assert row.dense > 0


def test_cells_that_cannot_be_measured_are_named(tmp_path):
    path = write_suite(
        tmp_path,
        '[methods.small_dense]\n[methods.snip]\n[methods.other]\nmethod = "ticket_control"\n'
        'source = "snip"\ncontrol = "shuffle"',
    )
    plan = plan_of(path)
    found = profile(plan, plan.manifest.cells, "cpu", 0.0)
    assert [row.label for row in found.rows] == ["snip"]
    assert found.notes == (
        "small_dense, lenet_300_100: not measured: a dense network of another width; it is its own "
        "reference",
        "other, lenet_300_100: not measured: it starts from the masks of another cell",
    )


class Broken(MaskedMethod):
    """Cannot start."""

    def start_phase(self, run) -> None:
        raise RuntimeError("no masks today")


def test_a_method_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    register(monkeypatch, "broken", Broken)
    path = write_suite(tmp_path, "[methods.broken]\n[methods.snip]")
    with pytest.raises(CellError, match="no masks today"):
        contestant(path, "broken")
    plan = plan_of(path)
    found = profile(plan, plan.manifest.cells, "cpu", 0.0)
    assert [row.label for row in found.rows] == ["snip"]
    (note,) = found.notes
    assert note.startswith("broken, lenet_300_100: not measured: RuntimeError: no masks today")


class Looking(MaskedMethod):
    """Two phases with a result each."""

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        one = Phase("one", 30, measured=True, validate_every=10)
        return (one, Phase("two", 10, density=density, measured=True))


@pytest.mark.parametrize("name", ["dense", "looking"])
def test_images_that_a_run_evaluates(name, tmp_path, monkeypatch):
    register(monkeypatch, "looking", Looking)
    recipe = write_recipe(tmp_path, "batch = 64\nlr = 0.1\nvalidation = 157")  # 20 steps an epoch
    path = write_suite(tmp_path, f"[methods.{name}]", recipe=recipe, budget="{ steps = 40 }")
    counted = []

    def evaluate(model, split, data, *group):
        counted.append(len(split))
        return Evaluation(1.0, 50.0, 90.0)

    monkeypatch.setattr("bench.trainer.evaluate", evaluate)
    monkeypatch.setattr("bench.runner.evaluate", evaluate)
    planned = evaluated(contestant(path, name).trainer, 360)
    counted.clear()
    train_one(path, tmp_path / "records")
    assert planned == sum(counted)


@pytest.fixture
def windows(monkeypatch) -> Iterator[int]:
    monkeypatch.setattr(profiling, "SETTLED", 4)
    monkeypatch.setattr(profiling, "WINDOW", 6)
    monkeypatch.setattr(profiling, "SLICE", 2)
    return 20


def test_a_drift_compares_two_windows_at_the_same_steps(tmp_path, windows):
    plan = plan_of(write_suite(tmp_path, "[methods.dense]\n[methods.snip]"))
    found = drift(plan, plan.manifest.cells, "cpu", windows)
    for row, label in zip(found.rows, ("dense", "snip"), strict=True):
        assert isinstance(row, Drift)
        assert (row.label, row.after) == (label, 20)
        assert row.change == pytest.approx(row.late.median / row.early.median)
    text = table(found)
    assert "steps 4 to 10 / dense" in text
    assert "steps 20 to 26 / dense" in text


def test_the_windows_of_a_drift_are_where_they_are_said_to_be(tmp_path, windows, monkeypatch):
    path = write_suite(tmp_path)
    cells = contestant(path, "dense", steps=26), contestant(path, "dense", steps=26)

    def really(cell: Contestant, count: int) -> float:
        at = cell.trainer.cursor.step
        for _ in range(count):
            cell.step()
        slow = 3.0 if at >= 20 else 2.0 if 4 <= at < 10 else 100.0
        return slow if cell is cells[1] else 1.0

    monkeypatch.setattr(Contestant, "really", really)
    row = profiling._drift(*cells, 20)
    assert row.early == Spread(2.0, 2.0, 2.0)
    assert row.late == Spread(3.0, 3.0, 3.0)
    assert row.change == 1.5


def test_a_drift_over_too_few_steps_is_refused(tmp_path):
    plan = plan_of(write_suite(tmp_path))
    with pytest.raises(UsageError, match=r"--drift 300: give at least 400 steps"):
        drift(plan, plan.manifest.cells, "cpu", 300)


def test_the_command_prints_a_table_and_stores_nothing(tmp_path, call):
    path = write_suite(tmp_path, SEVERAL)
    done = call("profile", path, "--only", "rigl", "--seconds", "0", "--device", "cpu")
    assert done.status == 0
    assert done.out.startswith("## lenet_300_100\n\n| method    | data ")
    assert "| rigl 90 % | train from " in done.out
    assert done.err == "rigl, lenet_300_100\n"
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.toml"]


def test_the_command_takes_a_cell_with_a_record(tmp_path, call):
    record = train_one(write_suite(tmp_path, "[methods.snip]"), tmp_path / "records")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = call("profile", record.spec.key, "--seconds", "0", "--device", "cpu", "--json")
    assert done.status == 0
    found = json.loads(done.out)
    assert [row["label"] for row in found["rows"]] == ["snip"]
    assert list(found["rows"][0]["stages"]) == list(STAGES)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_cell_whose_recipe_is_gone_asks_for_it(tmp_path, call):
    recipe = write_recipe(tmp_path, "batch = 64\nlr = 0.1")
    path = write_suite(tmp_path, "[methods.snip]", recipe=recipe, budget="{ steps = 20 }")
    key = train_one(path, tmp_path / "records").spec.key
    refused = call("profile", key, "--device", "cpu")
    assert refused.status == 2
    assert "name the file by --recipe" in refused.err
    asked = ("--recipe", tmp_path / "own.toml", "--seconds", "0", "--device", "cpu")
    assert call("profile", key, *asked).status == 0


def test_neither_a_suite_nor_a_cell(tmp_path, call):
    assert call("profile", "nothing", "--device", "cpu").status == 2


def test_a_run_afterwards_gives_the_same_record(tmp_path):
    path = write_suite(tmp_path, "[methods.rigl]\nevery = 4\n[methods.l0]")
    train(path, tmp_path / "before")
    plan = plan_of(path)
    profile(plan, plan.manifest.cells, "cpu", 0.0)
    train(path, tmp_path / "after")
    assert stored(tmp_path / "after") == stored(tmp_path / "before")


@pytest.mark.gpu
def test_on_a_gpu_steps_are_replayed_too(tmp_path):
    plan = plan_of(write_suite(tmp_path, "[methods.rigl]\nevery = 4"))
    found = profile(plan, plan.manifest.cells, "cuda", 0.0)
    (row,) = found.rows
    assert isinstance(row, Profile)
    assert row.replayed is not None
    assert row.replayed_step
    assert not found.notes
    assert "replayed / dense" in table(found)


@pytest.mark.parametrize(
    ("init", "kind"), [("random", "random"), ("pretrained-0123456789abcdef", "pretrained")]
)
def test_a_record_says_where_its_first_weights_come_from(init, kind, tmp_path):
    asked = spec(recipe="digits", recipe_hash=recipes.load("digits", "").hash, init=init)
    path = Store(tmp_path, "demo").put(record(asked))
    assert of_record(path, None, Path()).init == kind


def test_a_record_of_a_cell_that_started_from_a_file_is_refused(tmp_path):
    asked = spec(recipe="digits", recipe_hash=recipes.load("digits", "").hash, init="file-0123")
    path = Store(tmp_path, "demo").put(record(asked))
    with pytest.raises(UsageError, match="starts from a file of weights"):
        of_record(path, None, Path())
