"""Markdown tables, as a reader sees them.

The golden table is compared exactly. After a wanted change, write it again and read the difference:

    python -m tests.reports.test_suite_table
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench.errors import RecordError
from bench.record import Compact, Execution, Origin, Record
from bench.spec import BudgetSpec, CellSpec
from reports.suite_table import report, suite_table
from tests.reports.records import ENVIRONMENT, SUITE, counts, fill, manifest, record, spec

GOLDEN = Path(__file__).parents[1] / "golden" / "tables" / "two_methods.md"
SEEDS = [spec(seed=seed) for seed in range(3)]


def cells(line: str) -> list[str]:
    return [text.strip() for text in line.strip().strip("|").split("|")]


def body(table: str) -> list[dict[str, str]]:
    """Rows of a table by the names of their columns."""
    header, _, *lines = (cells(line) for line in table.splitlines() if line.startswith("|"))
    return [dict(zip(header, line, strict=True)) for line in lines]


def shown(*records: Record, specs: list[CellSpec] = SEEDS) -> dict[str, str]:
    (row,) = body(suite_table(manifest(*specs), records))
    return row


def two_methods() -> str:
    """Every kind of cell in one table."""
    dense = [spec("dense", 0.0, seed) for seed in range(3)]
    snip = [spec("snip", sparsity, seed) for sparsity in (0.9, 0.995, 0.999) for seed in range(3)]
    asked = manifest(*dense, *snip, title="Two methods on digits")
    dirty = dataclasses.replace(ENVIRONMENT, commit="def5678", dirty=True)
    lost = counts(0.995, dead=("fc2.weight",))
    records = [
        *(record(one, top1) for one, top1 in zip(dense, [98.0, 98.5, 99.0], strict=True)),
        record(snip[0], 97.0, multiple=1.2, environment=dirty),
        record(snip[1], 97.5, multiple=1.2),
        record(snip[3], 90.0, counts=lost),
        record(snip[4], 10.0, status="diverged", reason="the accuracy is that\nof guessing"),
        record(snip[5], None, status="invalid", reason="5 weights left, 4 asked for"),
        record(spec("snip", 0.9, method_version=2)),
    ]
    attempts = [
        record(snip[6], None, status="failed", reason="ValueError: first"),
        record(snip[6], None, status="failed", reason="ValueError: last"),
    ]
    return suite_table(asked, records, attempts)


def test_table_is_the_golden_one() -> None:
    assert two_methods() == GOLDEN.read_text(encoding="utf-8")


def test_several_seeds_show_mean_and_deviation() -> None:
    row = shown(*(record(one, top1) for one, top1 in zip(SEEDS, [97, 98, 99], strict=True)))
    assert (row["n"], row["top-1 %"]) == ("3", "98.00 ± 1.00")


def test_one_seed_is_shown_without_a_deviation() -> None:
    row = shown(record(SEEDS[0], 98.314), specs=SEEDS[:1])
    assert (row["n"], row["top-1 %"]) == ("1", "98.31")


def test_missing_seeds_show_in_n() -> None:
    row = shown(record(SEEDS[0], 97.0), record(SEEDS[1], 99.0))
    assert (row["n"], row["top-1 %"]) == ("2/3", "98.00 ± 1.41")


def test_a_row_that_was_not_run_is_dashes() -> None:
    row = shown()
    assert row.pop("method") == "rigl"
    assert row.pop("sparsity asked %") == "90"
    assert row.pop("n") == "0/3"
    assert set(row.values()) == {"-"}


def test_diverged_seeds_show_a_star_with_their_count_and_reason() -> None:
    bad = record(SEEDS[1], None, status="diverged", reason="the loss is nan", counts=None)
    table = suite_table(manifest(*SEEDS), [record(SEEDS[0]), bad, record(SEEDS[2])])
    assert body(table)[0]["top-1 %"] == "98.00 ± 0.00, * 1 of 3"
    assert "- rigl, lenet, 90 %, seed 1: diverged: the loss is nan\n" in table
    assert "- `*`: this many seeds diverged" in table


def test_a_dash_is_always_explained() -> None:
    stopped = record(SEEDS[0], None, status="diverged", counts=None)
    table = suite_table(manifest(SEEDS[0]), [stopped])
    assert body(table)[0]["MACs left"] == "-"
    assert "- `-`: not run, or stopped before it was measured" in table


def test_a_row_that_diverged_throughout_shows_only_the_star() -> None:
    bad = [record(one, 10.0, status="diverged") for one in SEEDS]
    assert shown(*bad)["top-1 %"] == "* 3 of 3"


def test_invalid_seeds_are_shown_as_such() -> None:
    bad = record(SEEDS[0], 97.0, status="invalid")
    assert shown(bad, specs=SEEDS[:1])["top-1 %"] == "invalid 1 of 1"


def test_networks_with_an_emptied_layer_are_marked_dead_and_the_layers_named() -> None:
    table = suite_table(
        manifest(SEEDS[0]), [record(SEEDS[0], counts=counts(dead=("fc1.weight", "fc2.weight")))]
    )
    assert body(table)[0]["reached sparsity %"] == "90.00 dead"
    assert "- dead: emptied layers (rigl, lenet, 90 %: fc1.weight, fc2.weight).\n" in table


@pytest.mark.parametrize(
    ("left", "expected"),
    # of 1,000,000 prunable weights; 100.00 would claim an empty network
    [(1_000_000, "0.00"), (100_001, "90.00"), (500, "99.950"), (12, "99.9988"), (0, "100.00")],
)
def test_reached_sparsity_has_the_digits_to_tell(left: int, expected: str) -> None:
    figures = counts(prunable=1_000_000, prunable_nonzero=left)
    assert shown(record(SEEDS[0], counts=figures))["reached sparsity %"] == expected


@pytest.mark.parametrize(
    ("macs", "expected"),
    [(434_000, "0.43 M (10.00 %)"), (99_999, "99,999 (10.00 %)"), (4e9, "4,000.00 M (10.00 %)")],
)
def test_macs_are_shown_with_their_share(macs: int, expected: str) -> None:
    figures = counts(macs=macs, dense_macs=10 * macs)
    assert shown(record(SEEDS[0], counts=figures))["MACs left"] == expected


def test_initial_weights_are_told_where_they_are_not_random() -> None:
    given = [dataclasses.replace(one, init="file-0123456789ab") for one in SEEDS[:2]]
    assert "initial weights" not in suite_table(manifest(SEEDS[0]), [])
    assert "initial weights: file-0123456789ab." in suite_table(manifest(*given), [])
    both = body(suite_table(manifest(SEEDS[0], given[0]), []))
    assert [row["initial weights"] for row in both] == ["random", "file-0123456789ab"]


def test_live_counts_and_training_macs_are_columns_once_some_row_has_them() -> None:
    one, two = SEEDS[:2]
    live = counts(0.9, live=60, compact=Compact(700, 150_000))  # of 800 prunable weights
    table = suite_table(manifest(one), [record(one, counts=live, train_macs=1.234e9)])
    (row,) = body(table)
    assert (row["effective sparsity %"], row["training MACs"]) == ("92.50", "1.23e+09")
    assert "parameters once cut" not in row  # it asks for weights, not for filters
    assert "effective sparsity:" in table
    assert "training MACs:" in table
    # A mean over seeds of which one is not known would be a mean over others.
    half = shown(record(one, counts=live), record(two), specs=[one, two])
    assert "effective sparsity %" not in half


def test_filter_methods_show_the_network_without_its_dead_channels() -> None:
    cut = counts(0.9, filters=(40, 20, 20), compact=Compact(700, 150_000))
    table = suite_table(manifest(SEEDS[0]), [record(SEEDS[0], counts=cut)])
    (row,) = body(table)
    assert (row["parameters once cut"], row["MACs once cut"]) == ("700", "150,000")
    assert "- once cut:" in table


def test_a_single_model_stands_in_the_title() -> None:
    table = suite_table(manifest(*SEEDS), [])
    assert table.startswith("## Demonstration (demo, lenet)\n")
    assert "model" not in body(table)[0]


def test_two_models_are_a_column() -> None:
    table = suite_table(manifest(spec(), spec(model="resnet20")), [])
    assert table.startswith("## Demonstration (demo)\n")
    assert [row["model"] for row in body(table)] == ["lenet", "resnet20"]


def test_rows_of_different_recipes_or_budgets_show_them() -> None:
    longer = spec("snip", budget=BudgetSpec(epochs=20), recipe="long", recipe_hash="cccc")
    table = suite_table(manifest(spec(), longer), [])
    assert [(row["recipe"], row["budget"]) for row in body(table)] == [
        ("plain (aaaa)", "10 epochs"),
        ("long (cccc)", "20 epochs"),
    ]
    assert "- data set: digits (bbbb); prunable: all.\n" in table


def test_rows_of_one_label_and_different_options_show_them() -> None:
    weak, strong = (spec("l0", None, options=(("lam", lam),)) for lam in (1e-6, 1e-5))
    table = suite_table(manifest(weak, strong), [])
    assert [(row["options"], row["sparsity asked %"]) for row in body(table)] == [
        ("lam=1e-06", "penalty"),
        ("lam=1e-05", "penalty"),
    ]
    assert "- `penalty`: no sparsity can be asked for" in table


def test_footnotes_count_stale_records_and_failed_attempts() -> None:
    old = [record(spec(method_version=version)) for version in (2, 3, 4)]
    tries = [record(SEEDS[0], None, status="failed", reason="out of memory")]
    table = suite_table(manifest(*SEEDS), old, tries)
    assert "- 3 records of earlier versions of this suite are not shown.\n" in table
    assert "- 1 failed attempt in `attempts/`; a cell that only failed counts as" in table


@pytest.mark.parametrize("status", ["lost", "out-of-memory", "timeout"])
def test_footnotes_say_what_became_of_a_cell_that_only_failed(status: str) -> None:
    tries = [record(SEEDS[1], None, status=status, reason="the worker is gone")]
    table = suite_table(manifest(*SEEDS), [record(SEEDS[0])], tries)
    assert f"seed 1: {status}: the worker is gone\n" in table
    assert body(table)[0]["n"] == "1/3"


def test_a_cell_that_turned_out_not_to_be_runnable_is_shown_like_one_that_is_skipped() -> None:
    wrong = [record(SEEDS[0]), record(SEEDS[1], None, status="skipped", reason="no such layer")]
    table = suite_table(manifest(*SEEDS), wrong)
    assert "- skipped: " in table
    assert "seed 1: no such layer\n" in table
    assert body(table)[0]["top-1 %"] == "98.00"
    both = suite_table(manifest(SEEDS[1]), wrong)
    assert "- skipped: " in both


def test_footnotes_say_how_cells_were_computed_where_it_was_not_one_by_one() -> None:
    alone, stacked = spec("dense", 0.0), spec("rigl")
    asked = manifest(alone, stacked)
    records = [
        record(alone, execution=Execution("shared")),
        record(stacked, execution=Execution("shared", stack=4)),
    ]
    table = suite_table(asked, records)
    assert "- seconds beside other cells on the same device, which tell of its load " in table
    assert "as much as of the method: all.\n" in table
    assert "- computed 4 cells at a time as one network, whose sums round differently: rigl.\n" in (
        table
    )
    before = suite_table(asked, [record(alone, execution=None), record(stacked)])
    assert "- seconds of records that do not say whether other cells ran beside: dense.\n" in before
    several = record(stacked, execution=Execution(devices=2))
    table = suite_table(asked, [record(alone, execution=Execution()), several])
    assert "- each cell trained on 2 devices together, whose seconds these are: rigl.\n" in table
    resumed = record(stacked, execution=Execution(before=(Origin("abc1234", "a cluster"),)))
    table = suite_table(asked, [record(alone, execution=Execution()), resumed])
    assert (
        "- trained in part by commit abc1234 (a cluster), before it was resumed: rigl.\n" in table
    )
    plain = suite_table(asked, [record(alone, execution=Execution()), record(stacked)])
    assert "trained in part" not in plain
    assert "devices, which" not in plain
    assert "seconds beside" not in plain
    assert "computed 4" not in plain


def test_a_suite_without_cells_is_an_empty_table() -> None:
    assert body(suite_table(manifest(), [])) == []


def test_report_joins_the_suites_that_have_records(tmp_path: Path) -> None:
    store = fill(tmp_path, manifest(*SEEDS), record(SEEDS[0]))
    store.put(record(SEEDS[1], None, status="failed", reason="out of memory"))
    text = report(tmp_path)
    assert text == report(tmp_path, [SUITE])
    assert body(text)[0]["n"] == "1/3"
    assert "- 1 failed attempt in `attempts/`" in text


def test_a_folder_without_records_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="sparsebench run SUITE"):
        report(tmp_path)


def test_a_damaged_record_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    store = fill(tmp_path, manifest(*SEEDS), record(SEEDS[0]))
    path = store.path(SEEDS[0])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RecordError, match=path.name):
        report(tmp_path)


if __name__ == "__main__":
    GOLDEN.write_text(two_methods(), encoding="utf-8")
