"""A method that goes wrong in any of its hooks, in any way: told in a line or in a record.

Once it is mended, the same command completes the suite as if nothing had happened.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import executors
from bench.record import Record
from bench.store import Store
from tests.bench.cells import Command, stored, write_suite
from tests.faults.faulty import HOOKS, Place

PENALTY = {"final_density"}
"""Hooks that only a method that a penalty drives is asked for."""

AT_FIRST = {
    "__post_init__",
    "needs_source",
    "lands_on_all",
    "final_density",
    "prunable",
    "plan",
}
"""Hooks that are asked before anything trains."""

ONLY_AT_FIRST = {"needs_source", "lands_on_all"}


def table(hook: str) -> str:
    """A row of a suite whose method may go wrong in a hook."""
    method = "faulty_penalty" if hook in PENALTY else "faulty"
    return f'[methods.{hook.strip("_")}]\nmethod = "{method}"\nhook = "{hook}"'


def suite_of(place: Place, *hooks: str, **fields: str) -> Path:
    """A suite with a row for each hook, and one beside them that nothing is wrong with."""
    rows = [table(hook) for hook in hooks]
    return write_suite(place.folder, "\n".join([*rows, "[methods.dense]"]), **fields)


def completed(place: Place, suite: Path, *options: str) -> Command:
    """The same command without the fault; and that all is as if there had been none."""
    place.fault.unlink(missing_ok=True)
    again = place.run(suite, *options)
    assert again.wait() == 0, again.said
    alone = place.run(suite, records=place.folder / "undisturbed")
    assert alone.wait() == 0, alone.said
    assert stored(place.records) == stored(place.folder / "undisturbed")
    assert not list(place.records.glob("tiny/checkpoints/*"))
    assert not list(place.records.glob("tiny/locks/*"))
    return again


def attempts(place: Place) -> dict[str, Record]:
    """The last failed try of each row."""
    return {record.label: record for record in Store(place.records, "tiny").attempts()}


@pytest.mark.parametrize("kind", ["raises", pytest.param("leaves", marks=pytest.mark.faults)])
def test_a_hook_that_goes_wrong_in_training_costs_its_own_cell_and_is_in_its_record(kind, place):
    suite = suite_of(place, *HOOKS)
    place.fault.write_text(f"{kind}, training")
    run = place.run(suite)
    assert run.wait() == 1, run.said
    failed = attempts(place)
    asked = set(HOOKS) - ONLY_AT_FIRST
    assert failed.keys() == {hook.strip("_") for hook in asked}
    wanted = {"raises": "RuntimeError: the fault of two lines", "leaves": "SystemExit: leaving"}
    for record in failed.values():
        assert record.status == "failed"
        assert record.reason == wanted[kind]
        assert "tests/faults/faulty.py" in record.traceback
    assert run.said.count(wanted[kind]) >= len(asked)
    assert "Traceback" not in run.said
    assert len(stored(place.records)) == 3  # needs_source, lands_on_all and dense
    completed(place, suite)


@pytest.mark.parametrize("hook", sorted(AT_FIRST))
def test_a_hook_that_goes_wrong_before_anything_trains_is_told_in_a_line(hook, place):
    if place.real and hook != "plan":
        pytest.skip("not run: that commands begin alike is tried with one hook")
    suite = suite_of(place, hook)
    place.fault.write_text("raises")
    run = place.run(suite)
    assert run.wait() == 2, run.said
    label = hook.strip("_")
    method = "faulty_penalty" if hook in PENALTY else "faulty"
    fault = "RuntimeError: the fault of two lines (_raise, line "
    lines = run.said.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"sparsebench: tiny.toml: methods.{label}: {method}: {fault}")
    assert lines[0].endswith("Mend the method, or leave it out of the suite.")
    assert not place.records.exists()
    if hook == "plan":
        completed(place, suite)


@pytest.mark.parametrize("kind", ["memory", "gpu memory", "python memory"])
def test_a_cell_without_memory_is_tried_again_and_goes_on_later(kind, place):
    if place.real and kind != "memory":
        pytest.skip("not run: that commands begin alike is tried with one allocator")
    suite = suite_of(place, "edit_gradients", "update")
    place.fault.write_text(kind)
    run = place.run(suite, "--retries", "1")
    assert run.wait() == 1, run.said
    found = attempts(place)
    assert {one.label: one.status for one in Store(place.records, "tiny").attempts()} == {
        "edit_gradients": "out-of-memory",
        "update": "out-of-memory",
    }
    assert len(Store(place.records, "tiny").attempts()) == 4  # each was tried twice
    assert "memory" in found["update"].reason.lower()
    assert "Traceback" not in run.said
    assert run.said.count("it is tried again at the end") == 2
    assert len(stored(place.records)) == 1
    completed(place, suite)


def test_memory_that_was_short_once_costs_a_try_and_nothing_else(place):
    suite = suite_of(place, "edit_gradients")
    place.fault.write_text("memory, once")
    completed_run = place.run(suite)
    assert completed_run.wait() == 0, completed_run.said
    assert attempts(place)["edit_gradients"].status == "out-of-memory"
    completed(place, suite)


def test_a_loss_that_is_no_number_is_a_result_and_comes_again_once_it_is_moved_away(place):
    suite = suite_of(place, "penalty")
    place.fault.write_text("nan")
    run = place.run(suite)
    assert run.wait() == 1, run.said
    records = {record.label: record for record in Store(place.records, "tiny").records()}
    assert {label: record.status for label, record in records.items()} == {
        "penalty": "diverged",
        "dense": "ok",
    }
    assert records["penalty"].reason == "the loss of step 1 of 44 is not finite"
    assert "diverged: the loss of step 1 of 44 is not finite" in run.said
    assert "Traceback" not in run.said
    place.fault.unlink()
    again = place.run(suite)
    assert again.wait() == 1, again.said  # it is final, until somebody says otherwise
    path = Store(place.records, "tiny").path(records["penalty"].spec)
    path.rename(place.folder / "moved")
    completed(place, suite)


def _impatient() -> None:
    executors.GRACE_SECONDS = 4


@pytest.mark.parametrize(
    "hook", ["edit_gradients", pytest.param("finish", marks=pytest.mark.faults)]
)
def test_a_step_that_hangs_is_ended_and_the_cell_goes_on_later(hook, place):
    """By the one who hands out cells: the process that hangs notices nothing."""
    if place.real:
        pytest.skip("not run: two minutes of patience are for people")
    suite = suite_of(place, hook)
    place.fault.write_text("hangs")
    run = place.run(suite, "--cell-timeout", "0.1", also=_impatient)
    try:
        assert run.wait() == 1, run.said
    finally:
        run.kill()
    assert attempts(place)[hook].status == "timeout"
    assert "said nothing for 0.167 minutes, and was ended" in attempts(place)[hook].reason
    assert f"[1/2] {hook}" in run.said
    assert "dense" not in attempts(place)
    assert "Traceback" not in run.said
    completed(place, suite)


@pytest.mark.faults
def test_a_worker_that_dies_in_a_hook_costs_a_try(place):
    suite = suite_of(place, "update")
    place.fault.write_text("killed, once")
    run = place.run(suite, "--workers", "2")
    assert run.wait() == 0, run.said
    assert attempts(place)["update"].status == "lost"
    assert "the worker process died (exit code -9); it is tried again" in run.said
    completed(place, suite)


def test_a_worker_that_alone_is_told_to_stop_costs_nothing(place):
    """What it has saved goes on in another one, in the same run."""
    suite = suite_of(place, "update", "edit_gradients", seeds="[0, 1]")
    place.fault.write_text("told, once")
    run = place.run(suite, "--workers", "2")
    assert run.wait() == 0, run.said
    assert "its worker process alone was told to stop; it goes on in another." in run.said
    assert len(stored(place.records)) == 5 + 1
    assert not attempts(place)
    completed(place, suite)
