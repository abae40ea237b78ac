"""The gate: what passes, what does not, and how the answer is told apart."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench.errors import RecordError
from bench.record import Record
from bench.spec import CellSpec
from reports.regress import Outcome, check, write_baseline
from tests.reports.records import SUITE, counts, fill, manifest, record, spec

SEEDS = [spec(seed=seed) for seed in range(2)]


def measured(*top1: float, **more: object) -> list[Record]:
    """One record per accuracy, on seeds 0, 1, ..."""
    return [record(spec(seed=seed), value, **more) for seed, value in enumerate(top1)]


def compare(
    folder: Path,
    before: list[Record],
    now: list[Record],
    specs: list[CellSpec] | None = None,
    floor: float = 0.5,
) -> Outcome:
    """Makes a baseline of `before`, and checks `now` (of a suite that asks for `specs`)."""
    fill(folder / "before", manifest(*(one.spec for one in before)), *before)
    asked = [one.spec for one in now] if specs is None else specs
    fill(folder / "now", manifest(*asked), *now)
    return check(folder / "now", SUITE, write_baseline(folder / "before", SUITE), floor=floor)


def test_the_same_records_are_fine(tmp_path: Path) -> None:
    outcome = compare(tmp_path, measured(97.0, 98.0), measured(97.0, 98.0))
    assert (outcome.status, outcome.exit_code) == ("fine", 0)
    assert "| 2 -> 2 |      97.50 | 97.50 |        +0.00 |     -2.12 | fine " in outcome.table


@pytest.mark.parametrize(("top1", "exit_code"), [(97.5, 0), (97.25, 1), (99.0, 0)])
def test_one_seed_may_fall_by_the_floor(tmp_path: Path, top1: float, exit_code: int) -> None:
    outcome = compare(tmp_path, measured(98.0), measured(top1))
    assert outcome.exit_code == exit_code
    assert "no row of the baseline has two seeds" in outcome.table


# Baseline 97, 99: mean 98, sigma sqrt(2); two seeds then and now: 3 sqrt(2) sqrt(1/2 + 1/2) = 4.243
@pytest.mark.parametrize(("now", "exit_code"), [((93.8, 93.8), 0), ((93.7, 93.7), 1)])
def test_noisy_rows_may_fall_by_three_standard_errors(
    tmp_path: Path, now: tuple[float, float], exit_code: int
) -> None:
    outcome = compare(tmp_path, measured(97.0, 99.0), measured(*now))
    assert outcome.exit_code == exit_code
    assert "-4.24" in outcome.table


def test_fewer_seeds_may_fall_by_more(tmp_path: Path) -> None:
    # one seed now: 3 sqrt(2) sqrt(1/2 + 1/1) = 5.196
    outcome = compare(tmp_path, measured(97.0, 99.0), measured(92.9))
    assert outcome.exit_code == 0
    assert "-5.20" in outcome.table
    assert "2 -> 1" in outcome.table


def test_the_spread_is_pooled_over_rows(tmp_path: Path) -> None:
    # variance 4 of three seeds, 0 of two: sigma = sqrt((2 * 4 + 1 * 0) / 3) = 1.633;
    # three seeds may fall by 3 * 1.633 * sqrt(2/3) = 4, two by 3 * 1.633 = 4.899
    noisy = measured(96.0, 98.0, 100.0)
    quiet = [record(spec("snip", seed=seed), 98.0) for seed in range(2)]
    fallen = [record(spec("snip", seed=seed), 93.2) for seed in range(2)]
    outcome = compare(tmp_path, [*noisy, *quiet], [*noisy, *fallen])
    assert outcome.exit_code == 0
    assert "-4.00" in outcome.table
    assert "-4.90" in outcome.table
    assert "sigma, pooled over the baseline's rows: 1.633" in outcome.table


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"nonzero": 281}, "seed 0: parameters left 280 -> 281"),
        ({"macs": 19_999}, "seed 0: MACs 20000 -> 19999"),
    ],
)
def test_counts_are_compared_exactly(tmp_path: Path, change: dict[str, int], text: str) -> None:
    now = [record(SEEDS[0], 98.0, counts=counts(**change))]
    outcome = compare(tmp_path, measured(98.0), now)
    assert (outcome.status, outcome.exit_code) == ("regressed", 1)
    assert text in outcome.table


@pytest.mark.parametrize("status", ["diverged", "invalid", "failed"])
def test_a_cell_that_went_wrong_fails_the_check(tmp_path: Path, status: str) -> None:
    bad = record(SEEDS[1], None, status=status, counts=None)
    outcome = compare(tmp_path, measured(98.0, 98.0), [record(SEEDS[0], 98.0), bad])
    assert (outcome.status, outcome.exit_code) == ("failed", 3)
    assert f"seed 1 {status}" in outcome.table


def test_a_cell_that_diverged_in_the_baseline_too_does_not_fail(tmp_path: Path) -> None:
    both = [record(SEEDS[0], 98.0), record(SEEDS[1], None, status="diverged")]
    assert compare(tmp_path, both, both).exit_code == 0


def test_a_row_that_was_never_ok_is_not_compared(tmp_path: Path) -> None:
    bad = record(spec("snip"), None, status="diverged")
    outcome = compare(tmp_path, [bad, *measured(98.0)], [bad, *measured(98.0)])
    assert outcome.exit_code == 0
    assert "not compared" in outcome.table


@pytest.mark.parametrize("top1", [math.nan, None])
def test_an_accuracy_that_is_no_number_never_passes(tmp_path: Path, top1: float | None) -> None:
    outcome = compare(tmp_path, measured(98.0), [record(SEEDS[0], top1)], floor=math.inf)
    assert outcome.exit_code == 3


def test_a_row_that_the_suite_lost_is_missing(tmp_path: Path) -> None:
    outcome = compare(tmp_path, [*measured(98.0), record(spec("snip"))], measured(98.0))
    assert (outcome.status, outcome.exit_code) == ("nothing", 4)
    assert "missing" in outcome.table


def test_a_seed_that_was_not_run_is_missing(tmp_path: Path) -> None:
    outcome = compare(tmp_path, measured(98.0, 98.0), measured(98.0), specs=SEEDS)
    assert outcome.exit_code == 4
    assert "not run: 1 seed of the baseline" in outcome.table


def test_records_of_nothing_that_the_baseline_knows_are_nothing_to_compare(tmp_path: Path) -> None:
    bad = record(SEEDS[0], None, status="diverged")
    assert compare(tmp_path, [bad], [bad]).exit_code == 4


def test_the_worst_row_decides(tmp_path: Path) -> None:
    before = [*measured(98.0), record(spec("snip")), record(spec("set"))]
    fallen, diverged = measured(90.0), record(spec("snip"), None, status="diverged")
    assert compare(tmp_path / "three", before, [*fallen, diverged]).exit_code == 3
    assert compare(tmp_path / "two", before, fallen).exit_code == 1


def test_new_rows_are_shown_and_do_not_matter(tmp_path: Path) -> None:
    outcome = compare(tmp_path, measured(98.0), [*measured(98.0), record(spec("snip"), 12.0)])
    assert outcome.exit_code == 0
    assert "| new " in outcome.table


def test_a_new_version_of_a_method_is_compared_and_told(tmp_path: Path) -> None:
    newer = record(spec(method_version=2), 90.0)
    outcome = compare(tmp_path, measured(98.0), [newer])
    assert outcome.exit_code == 1
    assert "1 row with other keys than in the baseline" in outcome.table


def test_a_baseline_names_its_keys_counts_and_accuracy(tmp_path: Path) -> None:
    fill(tmp_path, manifest(*SEEDS), *measured(97.0, 99.0))
    (row,) = json.loads(write_baseline(tmp_path, SUITE))["rows"]
    assert (row["label"], row["spec"]["model"], row["spec"]["sparsity"]) == ("rigl", "lenet", 0.9)
    assert (row["n"], row["top1"], row["deviation"]) == (2, 98.0, pytest.approx(math.sqrt(2)))
    assert [(cell["key"], cell["nonzero"], cell["macs"]) for cell in row["cells"]] == [
        (one.key, 280, 20_000) for one in SEEDS
    ]


def test_a_suite_without_records_makes_no_baseline(tmp_path: Path) -> None:
    fill(tmp_path, manifest(*SEEDS))
    with pytest.raises(RecordError, match="sparsebench run demo"):
        write_baseline(tmp_path, SUITE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"n": 1', '"n": 0'),
        ('"n": 1', '"n": "one"'),
        ('"schema": 1', '"schema": 7'),
        ('"suite": "demo"', '"suite": "other"'),
        ('"epochs": 10.0', '"epochs": -1'),
        ("}", ""),
    ],
)
def test_a_damaged_baseline_is_an_error_that_names_the_file(
    tmp_path: Path, old: str, new: str
) -> None:
    fill(tmp_path, manifest(SEEDS[0]), *measured(98.0))
    text = write_baseline(tmp_path, SUITE).decode()
    assert old in text
    with pytest.raises(RecordError, match=r"here\.json"):
        check(tmp_path, SUITE, text.replace(old, new).encode(), where="here.json")
