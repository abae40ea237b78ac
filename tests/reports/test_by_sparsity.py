"""The short table: a line a method, a column a sparsity."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bench.record import Execution
from bench.spec import BudgetSpec
from bench.store import Against, Cell, Manifest
from reports.by_sparsity import by_sparsity
from reports.suite_table import stored_table
from tests.reports.records import SUITE, counts, fill, record, spec
from tests.reports.test_suite_table import body


def cell(of, label="", **more):
    return Cell(label or of.method, of, steps=100, multiple=1.0, updates=0, **more)


def shown(root: Path, cells, *records) -> list[dict[str, str]]:
    fill(root, Manifest(SUITE, "Demonstration", tuple(cells)), *records)
    return body(by_sparsity(root, SUITE))


def test_a_method_has_one_line_and_each_sparsity_its_column(tmp_path):
    dense, low, high = spec("dense", 0.0), spec(sparsity=0.5), spec(sparsity=0.9)
    rows = shown(
        tmp_path,
        map(cell, [high, dense, low]),
        record(dense, 98.0),
        record(high, 95.5, multiple=1.2),
        record(low, 97.0),
    )
    assert list(rows[0]) == ["method", "0", "50", "90", "budget multiple"]
    assert list(rows[0].values()) == ["rigl", "", "97.00", "95.50", "1.00 to 1.20"]
    assert list(rows[1].values()) == ["dense", "98.00", "", "", "1.00"]


def test_what_was_not_run_is_a_dash_and_what_went_wrong_is_marked(tmp_path):
    low, high = spec(sparsity=0.5), spec(sparsity=0.9)
    lost = record(high, 10.0, status="diverged", counts=counts(0.9, dead=("fc1.weight",)))
    rows = shown(tmp_path, map(cell, [low, high]), lost)
    assert (rows[0]["50"], rows[0]["90"]) == ("-", "* 1 of 1 dead")


def test_a_grid_of_targets_is_one_line_and_a_free_penalty_says_what_it_reached(tmp_path):
    free = spec("l0", None)
    landed = [spec("l0", None, options=(("target", t),)) for t in (0.5, 0.9)]
    rows = shown(
        tmp_path,
        [cell(free), *(cell(of, f"l0[target={dict(of.options)['target']}]") for of in landed)],
        record(free, 97.0, counts=counts(0.75)),
        *(record(of, 96.0, counts=counts(0.9)) for of in landed),
    )
    assert [row["method"] for row in rows] == ["l0", "l0 by top-k"]
    assert rows[0]["penalty"] == "97.00 (at 75.0)"
    assert (rows[1]["50"], rows[1]["90"], rows[1]["penalty"]) == ("96.00", "96.00", "")


def test_narrower_networks_stand_in_one_line_under_the_model_of_the_suite(tmp_path):
    narrow = [spec("dense", 0.0, model_options=(("width", width),)) for width in (0.5, 0.1)]
    against = Against(1000, 800, 200_000, 80)
    cells = [
        cell(of, "small_dense", sparsity=s, against=against)
        for of, s in zip(narrow, (0.5, 0.9), strict=True)
    ]
    rows = shown(tmp_path, cells, *(record(of, 90.0) for of in narrow))
    assert len(rows) == 1
    assert "model" not in rows[0]
    assert (rows[0]["50"], rows[0]["90"]) == ("90.00", "90.00")


def test_models_have_lines_of_their_own_and_footnotes_stand_below(tmp_path):
    one, other = spec(), dataclasses.replace(spec(), model="resnet")
    fill(tmp_path, Manifest(SUITE, "", (cell(one), cell(other))), record(one), record(other))
    table = by_sparsity(tmp_path, SUITE)
    assert [row["model"] for row in body(table)] == ["lenet", "resnet"]
    assert "- accuracy: last step on the test set" in table


def test_rows_of_different_conditions_have_lines_of_their_own_that_say_them(tmp_path):
    # The short table of one label would show the last of them, under the name of all.
    long, short = spec(), spec(budget=BudgetSpec(steps=50))
    rows = shown(tmp_path, map(cell, [long, short]), record(long, 97.0), record(short, 91.0))
    assert [(row["budget"], row["90"]) for row in rows] == [
        ("10 epochs", "97.00"),
        ("50 steps", "91.00"),
    ]


def test_narrower_networks_of_a_model_with_options_stand_under_that_one(tmp_path):
    normed = (("batch_norm", True),)
    full = [spec("dense", 0.0), spec("dense", 0.0, model_options=normed)]
    narrow = [
        spec("dense", 0.0, model_options=(*own.model_options, ("width", 0.1))) for own in full
    ]
    against = Against(1000, 800, 200_000, 80)
    cells = [cell(of) for of in full]
    cells += [cell(of, "small_dense", sparsity=0.9, against=against) for of in narrow]
    tops = (98.0, 99.0, 90.0, 95.0)
    records = [record(of, top1) for of, top1 in zip([*full, *narrow], tops, strict=True)]
    rows = shown(tmp_path, cells, *records)
    assert [(row["model"], row["90"]) for row in rows if row["method"] == "small_dense"] == [
        ("lenet", "90.00"),
        ("lenet (batch_norm=True)", "95.00"),
    ]


def test_options_that_a_grids_label_does_not_name_stand_below(tmp_path):
    wide = [spec(options=(("drop_fraction", f), ("scope", "uniform"))) for f in (0.2, 0.3)]
    cells = [cell(of, f"rigl[drop_fraction={dict(of.options)['drop_fraction']}]") for of in wide]
    fill(tmp_path, Manifest(SUITE, "", tuple(cells)), *map(record, wide))
    assert "- options beside the defaults: rigl: scope=uniform.\n" in by_sparsity(tmp_path, SUITE)
    other = spec(options=(("drop_fraction", 0.5), ("scope", "erk")))
    cells.append(cell(other, "rigl[drop_fraction=0.5]"))
    fill(tmp_path / "more", Manifest(SUITE, "", tuple(cells)), *map(record, wide))
    told = "rigl[drop_fraction=0.2]: scope=uniform; rigl[drop_fraction=0.3]: scope=uniform; rigl["
    assert f"- options beside the defaults: {told}" in by_sparsity(tmp_path / "more", SUITE)


def test_no_footnote_tells_of_columns_that_are_not_there(tmp_path):
    stacked = record(spec(), train_macs=5e9, execution=Execution("shared", stack=4))
    place = fill(tmp_path, Manifest(SUITE, "", (cell(spec()),)), stacked)
    short = by_sparsity(tmp_path, SUITE)
    full = stored_table(place)
    for words in ("- other columns: ", "- training MACs: ", "- seconds beside other cells"):
        assert (words in short, words in full) == (False, True)
    assert "- computed 4 cells at a time as one network" in short  # its sums are others
