"""Cells side by side in one process: stacked, interleaved, and as the command line asks for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import runner
from bench.errors import UsageError
from bench.executors import execute
from bench.launch import Settings, places, train
from bench.packing import Fixed
from bench.store import Store
from bench.task import Finished, Note, Stopped, Ways
from bench.together import run_cell, run_cells
from methods.api import Phase, SparsityMethod
from tests.bench.cells import (
    forking,
    plan_of,
    register,
    stored,
    tasks_of,
    write_suite,
)

METHODS = "[methods.dense]\n[methods.rigl]\n[methods.dpf]\n[methods.one_shot]\n[methods.deepr]"


def tasks(tmp_path, methods=METHODS, *, stack=1, **suite):
    """The cells of a small suite, and where they go."""
    store = Store(tmp_path / "records", "tiny")
    found = tasks_of(plan_of(write_suite(tmp_path, methods, **suite)), store)
    return [dataclasses.replace(task, ways=Ways(stack=stack)) for task in found]


def records(events):
    """Key -> record of the cells that ended."""
    return {e.key: e.record for e in events if isinstance(e, Finished)}


def hashes(events):
    """Key -> hash of the finished network."""
    return {key: record.weights_hash for key, record in records(events).items()}


def side_by_side(cells, count):
    """Events of cells that train so many at a time, in this process."""
    left = list(cells)
    return list(run_cells(lambda _: left.pop(0) if left else None, Fixed(count)))


def test_cells_side_by_side_end_as_they_do_alone(tmp_path):
    alone = {}
    for task in tasks(tmp_path):
        alone |= hashes(run_cell(task))
    assert hashes(side_by_side(tasks(tmp_path), 3)) == alone
    assert len(set(alone.values())) == 5


def test_a_stacked_cell_depends_on_the_width_and_not_on_its_neighbours(tmp_path):
    cells = tasks(tmp_path, stack=4)
    together = records(side_by_side(cells, 4))
    assert {record.execution.stack for record in together.values()} == {4}
    for task in reversed(cells):  # each with three idle places
        assert hashes(run_cell(task))[task.cell.spec.key] == (
            together[task.cell.spec.key].weights_hash
        )
    alone = hashes(side_by_side(tasks(tmp_path), 1))
    assert {key for key, record in together.items() if record.weights_hash == alone[key]} == set()


def test_a_stacked_cell_goes_on_at_the_width_it_began_with(tmp_path, monkeypatch):
    (task,) = tasks(tmp_path, "[methods.rigl]", stack=4)
    wanted = hashes(run_cell(task))
    now = iter(range(1000))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(now))
    *_, stopped = run_cell(dataclasses.replace(task, deadline=12))
    assert isinstance(stopped, Stopped)
    assert stopped.done > 0
    *_, last = run_cell(dataclasses.replace(task, ways=Ways()))
    assert last.record.execution.stack == 4
    assert {last.key: last.record.weights_hash} == wanted


def test_what_cannot_be_stacked_says_so_and_is_computed_alone(tmp_path):
    cells = tasks(tmp_path, "[methods.l0]\n[methods.rigl]", stack=2)
    events = side_by_side(cells, 2)
    (note,) = [event.text for event in events if isinstance(event, Note)]
    assert note.startswith("l0 is computed alone, not in a stack: ")
    stacks = {r.label: r.execution.stack for r in records(events).values()}
    assert stacks == {"l0": 1, "rigl": 2}


@dataclasses.dataclass(frozen=True)
class Breaks(SparsityMethod):
    """Has a mistake in a hook of every step."""

    error = RuntimeError

    def edit_gradients(self, state):
        if float(state.progress) > 0.5:
            raise self.error("a mistake")


class Leaves(Breaks):
    error = SystemExit


def test_a_hook_that_leaves_the_program_costs_its_cell_alone(tmp_path, monkeypatch):
    register(monkeypatch, "leaves", Leaves)
    cells = tasks(tmp_path, "[methods.leaves]\n[methods.rigl]")
    found = [r for task in cells for r in records(run_cell(task)).values()]
    assert [(r.status, r.reason) for r in found] == [
        ("failed", "SystemExit: a mistake"),
        ("ok", ""),
    ]


def test_an_error_in_a_hook_costs_its_own_cell_of_a_stack(tmp_path, monkeypatch):
    register(monkeypatch, "breaks", Breaks)
    cells = tasks(tmp_path, "[methods.breaks]\n[methods.rigl]", stack=2)
    found = {r.label: r for r in records(side_by_side(cells, 2)).values()}
    assert (found["breaks"].status, found["rigl"].status) == ("failed", "ok")
    assert found["breaks"].reason == "RuntimeError: a mistake"
    assert 0 < found["breaks"].steps < found["rigl"].steps
    assert hashes(run_cell(cells[1])) == {found["rigl"].spec.key: found["rigl"].weights_hash}


@dataclasses.dataclass(frozen=True)
class Noisy(SparsityMethod):
    """Draws its penalty, and fails if asked to."""

    breaks: bool = False

    def penalty(self, state):
        if self.breaks and float(state.progress) > 0.5:
            raise ValueError("a broken penalty")
        return 0.01 * sum((torch.randn_like(w) * w).sum() for w in state.weights.values())


def test_a_penalty_that_is_drawn_is_the_cells_own(tmp_path, monkeypatch):
    register(monkeypatch, "noisy", Noisy)
    cells = tasks(tmp_path, "[methods.noisy]\n[methods.rigl]", stack=4, seeds="[0, 1]")
    together = hashes(side_by_side(cells, 4))
    assert len(set(together.values())) == 4
    for task in cells:
        assert hashes(run_cell(task)).items() <= together.items()


def test_an_error_in_a_penalty_costs_its_own_cell_of_a_stack(tmp_path, monkeypatch):
    register(monkeypatch, "noisy", Noisy)
    cells = tasks(tmp_path, "[methods.noisy]\nbreaks = true\n[methods.rigl]", stack=2)
    found = {r.label: r for r in records(side_by_side(cells, 2)).values()}
    reasons = {label: (r.status, r.reason) for label, r in found.items()}
    assert reasons == {"noisy": ("failed", "ValueError: a broken penalty"), "rigl": ("ok", "")}
    assert hashes(run_cell(cells[1])) == {found["rigl"].spec.key: found["rigl"].weights_hash}


@dataclasses.dataclass(frozen=True)
class Hooked(SparsityMethod):
    """Hooks the network when a phase begins."""

    controls = "none"
    late: bool = False

    def plan(self, budget, density):
        half = budget.steps // 2
        return Phase("first", half), Phase("second", budget.steps - half)

    def start_phase(self, run):
        if (run.phase.name == "second") is self.late:
            run.state.model.register_forward_hook(lambda *_: None)


def test_a_network_that_is_hooked_before_its_first_step_is_computed_alone(tmp_path, monkeypatch):
    register(monkeypatch, "hooked", Hooked, "none")
    cells = tasks(tmp_path, "[methods.hooked]\n[methods.rigl]", stack=2)
    found = records(side_by_side(cells, 2)).values()
    assert {r.label: (r.status, r.execution.stack) for r in found} == {
        "hooked": ("ok", 1),
        "rigl": ("ok", 2),
    }


def test_a_network_that_is_hooked_later_fails_and_says_what_to_do(tmp_path, monkeypatch):
    register(monkeypatch, "hooked", Hooked, "none")
    cells = tasks(tmp_path, "[methods.hooked]\nlate = true\n[methods.rigl]", stack=2)
    found = {r.label: r for r in records(side_by_side(cells, 2)).values()}
    assert (found["hooked"].status, found["rigl"].status) == ("failed", "ok")
    assert "in phase second the network cannot be computed in a stack any more" in (
        found["hooked"].reason
    )
    assert found["hooked"].reason.endswith("run the cell without --stack")


def test_an_error_in_the_passes_of_a_stack_is_every_cells(tmp_path, monkeypatch):
    def fails(self, *arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr("bench.stack.Stack.backward", fails)
    found = records(side_by_side(tasks(tmp_path, stack=5), 5)).values()
    assert {(r.status, r.reason) for r in found} == {("failed", "RuntimeError: no memory")}
    assert len(found) == 5


def test_the_time_of_a_stack_is_shared_among_its_cells(tmp_path):
    cells = tasks(tmp_path, stack=5)
    found = records(side_by_side(cells, 5)).values()
    assert all(record.times.train_seconds > 0 for record in found)


def test_workers_take_several_cells_each(tmp_path, monkeypatch):
    context = forking()
    monkeypatch.setattr("bench.processes.context", lambda: context)
    cells = tasks(tmp_path, stack=2)
    store = Store(tmp_path / "records", "tiny")
    found = records(execute(cells, store, workers=2, threads=1, places=2))
    alone = {}
    for task in cells:
        alone |= hashes(run_cell(task))
    assert {key: record.weights_hash for key, record in found.items()} == alone
    assert len(stored(tmp_path / "records")) == 5


@pytest.mark.parametrize(
    ("settings", "timing"),
    [
        (Settings("cpu", workers=1), "exclusive"),
        (Settings("cpu", workers=1, ways=Ways(stack=3)), "shared"),
    ],
)
def test_a_run_says_whether_other_cells_had_the_device_too(settings, timing, tmp_path):
    plan = plan_of(write_suite(tmp_path, METHODS))
    store = Store(tmp_path / "records", "tiny")
    train(plan, store, list(plan.manifest.cells), settings)
    found = list(store.records())
    assert {record.execution.timing for record in found} == {timing}
    assert len(found) == 5


@pytest.mark.parametrize(("text", "expected"), [("auto", 0), ("1", 1), ("12", 12)])
def test_cells_per_device_is_a_number_or_auto(text, expected):
    assert places(text) == expected


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", ""])
def test_other_cells_per_device_are_refused(text):
    with pytest.raises(UsageError, match=r"--cells-per-device .*: give auto or a number from 1 on"):
        places(text)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UsageError, match=r"--stack is for the CPU; on a GPU use --cells-per-dev"):
        Settings("cuda", ways=Ways(stack=4))
    with pytest.raises(UsageError, match=r"--compile and --stack do not go together"):
        Settings("cpu", ways=Ways(stack=4, compiled=True))
    with pytest.raises(UsageError, match=r"--cells-per-device is for GPUs; on the CPU use --work"):
        Settings("cpu", places=0)
