"""Rows: what is averaged over which seeds."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from bench.record import Record
from bench.spec import BudgetSpec, CellSpec
from reports.aggregate import Row, aggregate, budget_text, model_text
from tests.reports.records import counts, manifest, record, spec

SEEDS = [spec(seed=seed) for seed in range(3)]


def row_of(*records: Record, specs: list[CellSpec] = SEEDS) -> Row:
    (row,) = aggregate(manifest(*specs), records).rows
    return row


def test_accuracy_is_the_mean_and_the_sample_deviation_over_seeds() -> None:
    # mean 98, squared distances 1 + 0 + 1, over n - 1 = 2
    row = row_of(*(record(one, top1) for one, top1 in zip(SEEDS, [97.0, 98.0, 99.0], strict=True)))
    assert (row.top1, row.deviation) == (98.0, 1.0)
    assert (row.asked, len(row.finished), row.statuses) == (3, 3, ("ok", "ok", "ok"))


def test_one_seed_has_no_deviation() -> None:
    row = row_of(record(SEEDS[0], 98.0), specs=SEEDS[:1])
    assert (row.top1, row.deviation) == (98.0, None)


def test_a_row_holds_sizes_time_and_cost() -> None:
    row = row_of(record(SEEDS[0], multiple=1.2), specs=SEEDS[:1])
    assert row.reached_sparsity == pytest.approx(0.9)
    assert row.total_sparsity == pytest.approx(0.72)  # 280 of 1,000 are left
    assert row.macs_fraction == pytest.approx(0.1)
    assert (row.nonzero, row.macs) == (280, 20_000)
    assert (row.train_seconds, row.multiple, row.dead) == (12.0, 1.2, ())


def test_missing_seeds_are_named_missing() -> None:
    row = row_of(record(SEEDS[1], 98.0))
    assert row.statuses == ("missing", "ok", "missing")
    assert (row.asked, len(row.finished), row.top1) == (3, 1, 98.0)


def test_a_row_without_records_has_no_numbers() -> None:
    row = row_of()
    assert row.statuses == ("missing",) * 3
    numbers = (row.top1, row.deviation, row.nonzero, row.macs, row.train_seconds, row.multiple)
    assert numbers == (None,) * 6


def test_diverged_and_invalid_seeds_do_not_enter_the_means() -> None:
    diverged = record(SEEDS[1], 10.0, status="diverged", counts=counts(0.5), multiple=9.0)
    invalid = record(SEEDS[2], 50.0, status="invalid", counts=counts(0.5), multiple=9.0)
    row = row_of(record(SEEDS[0], 98.0), diverged, invalid)
    assert row.statuses == ("ok", "diverged", "invalid")
    assert (row.top1, row.deviation, row.nonzero, row.multiple) == (98.0, None, 280, 1.0)


def test_a_row_with_no_ok_seed_still_shows_its_sizes() -> None:
    row = row_of(record(SEEDS[0], None, status="invalid", counts=counts(0.5)))
    assert (row.top1, row.nonzero) == (None, 600)


def test_a_diverged_cell_may_have_no_counts() -> None:
    row = row_of(record(SEEDS[0], None, status="diverged", counts=None))
    assert (row.nonzero, row.reached_sparsity, row.train_seconds) == (None, None, 12.0)


@pytest.mark.parametrize("top1", [None, math.nan, math.inf])
def test_an_ok_record_without_a_finite_accuracy_is_invalid(top1: float | None) -> None:
    row = row_of(record(SEEDS[0], top1))
    assert (row.statuses[0], row.top1) == ("invalid", None)


def test_a_failed_attempt_counts_as_not_run() -> None:
    assert row_of(record(SEEDS[0], None, status="failed")).statuses[0] == "missing"


def test_records_that_the_suite_does_not_ask_for_are_counted() -> None:
    old = record(spec(method_version=2))
    results = aggregate(manifest(*SEEDS), [record(SEEDS[0]), old])
    assert results.stale == 1
    assert len(results.rows[0].finished) == 1


def test_rows_stand_in_the_order_of_the_suite() -> None:
    asked = [spec("dense", 0.0), spec("snip", 0.9), spec("dense", 0.0, seed=1), spec("snip", 0.8)]
    rows = aggregate(manifest(*asked), []).rows
    assert [(row.label, row.spec.sparsity, row.asked) for row in rows] == [
        ("dense", 0.0, 2),
        ("snip", 0.9, 1),
        ("snip", 0.8, 1),
    ]


def test_questions_that_differ_in_anything_but_the_seed_are_rows_of_their_own() -> None:
    other = dataclasses.replace(SEEDS[1], budget=BudgetSpec(epochs=20))
    assert len(aggregate(manifest(SEEDS[0], other), []).rows) == 2


def test_emptied_layers_of_any_seed_are_named_once() -> None:
    dead = counts(dead=("fc1.weight",))
    row = row_of(record(SEEDS[0], counts=dead), record(SEEDS[1], counts=dead), record(SEEDS[2]))
    assert row.dead == ("fc1.weight",)


def test_models_and_budgets_are_named_with_their_options_and_units() -> None:
    wide = spec(model_options=(("width", 2),), budget=BudgetSpec(steps=500))
    assert model_text(wide) == "lenet (width=2)"
    assert (budget_text(wide), budget_text(spec())) == ("500 steps", "10 epochs")


def test_reports_do_not_import_torch() -> None:
    modules = "reports.aggregate, reports.suite_table, reports.regress"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
