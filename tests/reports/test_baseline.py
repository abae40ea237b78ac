"""Baselines: what they keep, what is refused, and what they say they can find."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from bench.errors import RecordError
from bench.record import Execution, Record
from reports.baseline import (
    Baseline,
    encode,
    make_baseline,
    reach,
    read_baseline,
    shortcomings,
    write_baseline,
)
from reports.regress import check
from reports.statistics import Pooled
from reports.tolerance import POWER, Tolerance
from tests.reports.records import SUITE, fill, manifest, record, spec

SEEDS = [spec(seed=seed) for seed in range(2)]
COMMITTED = sorted((Path(__file__).parents[2] / "reports" / "baselines").glob("*.json"))


def measured(*top1: float) -> list[Record]:
    """One record per accuracy, on seeds 0, 1, ..."""
    return [record(spec(seed=seed), value) for seed, value in enumerate(top1)]


def made(folder: Path, *records: Record) -> Baseline:
    """The baseline of these records."""
    fill(folder, manifest(*(one.spec for one in records)), *records)
    return make_baseline(folder, SUITE)


def test_a_baseline_names_its_keys_counts_accuracy_and_times(tmp_path: Path) -> None:
    fill(tmp_path, manifest(*SEEDS), *measured(97.0, 99.0))
    content = json.loads(write_baseline(tmp_path, SUITE))
    (row,) = content["rows"]
    assert (row["label"], row["spec"]["model"], row["spec"]["sparsity"]) == ("rigl", "lenet", 0.9)
    assert (row["n"], row["top1"], row["deviation"]) == (2, 98.0, pytest.approx(math.sqrt(2)))
    assert row["seconds"] == 12.0
    assert [(cell["key"], cell["nonzero"], cell["macs"]) for cell in row["cells"]] == [
        (one.key, 280, 20_000) for one in SEEDS
    ]
    assert (content["schema"], content["places"]) == (2, ["cpu, 1 threads, torch 2.15"])


def test_a_baseline_tells_where_several_devices_trained_a_cell(tmp_path: Path) -> None:
    several = Execution(devices=2)
    baseline = made(tmp_path, measured(97.0)[0], record(SEEDS[1], 99.0, execution=several))
    where = "cpu, 1 threads, torch 2.15"
    assert baseline.places == (f"2 devices: {where}", where)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    baseline = made(tmp_path, *measured(97.0, 99.0))
    assert read_baseline(encode(baseline), "here.json") == baseline


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_baselines_can_be_read(path: Path) -> None:
    baseline = read_baseline(path.read_bytes(), path.name, path.stem)
    assert all(row.n for row in baseline.rows)


def test_a_baseline_of_schema_1_holds_all_but_times(tmp_path: Path) -> None:
    content = json.loads(encode(made(tmp_path, *measured(97.0, 99.0)))) | {"schema": 1}
    del content["places"]
    for row in content["rows"]:
        del row["seconds"]
    outcome = check(tmp_path, SUITE, json.dumps(content).encode())
    assert outcome.exit_code == 0
    assert " - -> 12.00 |" in outcome.table


def test_a_suite_without_records_makes_no_baseline(tmp_path: Path) -> None:
    fill(tmp_path, manifest(*SEEDS))
    with pytest.raises(RecordError, match="sparsebench run demo"):
        write_baseline(tmp_path, SUITE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"n": 1', '"n": 0'),
        ('"n": 1', '"n": "one"'),
        ('"schema": 2', '"schema": 7'),
        ('"suite": "demo"', '"suite": "other"'),
        ('"epochs": 10.0', '"epochs": -1'),
        ('"status": "ok"', '"status": "missing"'),
        ('"top1": 98.0', '"top1": NaN'),
        ('"top1": 98.0', '"top1": 1e300'),
        ('"top1": 98.0', '"top1": -1.0'),
        ('"top1": 98.0', '"top1": 1e999'),
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


def test_the_smallest_drop_is_found_as_often_as_it_says() -> None:
    tolerance = Tolerance(Pooled(0.4, 96), 12, 0.0)
    drop = tolerance.smallest_drop(5, 5)
    assert drop is not None
    assert drop < 3 * 0.4
    shift = drop / tolerance.error(5, 5)
    assert stats.nct.sf(tolerance.critical, 96, shift) == pytest.approx(POWER, abs=1e-3)


def test_a_floor_above_the_noise_is_what_must_be_exceeded() -> None:
    drop = Tolerance(Pooled(0.01, 96), 12, 1.0).smallest_drop(5, 5)
    # the floor, and what one mean in twenty lies above it by chance
    assert drop == pytest.approx(1.0 + stats.norm.ppf(POWER) * 0.01 * math.sqrt(2 / 5), abs=1e-4)


def test_a_baseline_says_what_it_can_find_and_warns_of_few_seeds(tmp_path: Path) -> None:
    baseline = made(tmp_path, *measured(97.0, 97.5, 98.0))
    (text,) = reach(baseline)
    assert "3 seeds on both sides" in text
    assert "sigma 0.500" in text
    (warning,) = shortcomings(baseline)
    assert "1 of 1 rows have fewer than 5 seeds" in warning


def test_a_baseline_says_which_rows_spread_too_much_to_find_anything(tmp_path: Path) -> None:
    steady = [
        record(spec(method, seed=seed), top1)
        for method in "abcdefgh"
        for seed, top1 in enumerate([97.0, 97.5, 98.0, 97.2, 97.1])
    ]
    wide = [record(spec("wide", seed=seed), 10.0 * (seed + 1)) for seed in range(5)]
    _, text = reach(made(tmp_path, *steady, *wide))
    assert text == "spread too much to find any drop: wide, lenet, 90"


def test_a_drop_above_every_accuracy_is_none(tmp_path: Path) -> None:
    first, _ = reach(made(tmp_path, *measured(10.0, 60.0)))
    assert first.startswith("smallest drop that a check can find (probability 95%, 2 seeds on both")
    assert "both sides): none; one run has sigma" in first


def test_seeds_that_agree_cannot_say(tmp_path: Path) -> None:
    (text,) = reach(made(tmp_path, *measured(97.0, 97.0)))
    assert "not known, as the seeds of every row agree; it allows 0.5 points" in text


@pytest.mark.parametrize("deviation", ["-5.0", "1e308", "NaN"])
def test_a_deviation_that_no_accuracies_have_is_damage(tmp_path: Path, deviation: str) -> None:
    fill(tmp_path, manifest(*SEEDS), *measured(98.0, 98.0))
    text = write_baseline(tmp_path, SUITE).replace(
        b'"deviation": 0.0', b'"deviation": %b' % deviation.encode()
    )
    with pytest.raises(
        RecordError, match=r"here\.json: damaged baseline.*: sparsebench baseline SUITE --out FILE"
    ):
        check(tmp_path, None, text, where="here.json")


def test_a_suite_that_is_no_name_is_damage_and_no_path(tmp_path: Path) -> None:
    fill(tmp_path, manifest(*SEEDS), *measured(98.0, 99.0))
    text = write_baseline(tmp_path, SUITE).replace(b'"demo"', b'"../../etc"')
    with pytest.raises(RecordError, match="is no name"):
        check(tmp_path, None, text)


def test_rows_near_collapse_do_not_hide_what_the_others_lose() -> None:
    # the figures that reports/README.md gives of the committed records
    baseline = make_baseline(Path(__file__).parents[2] / "reports" / "records", "mnist-lenet")
    first, lost = reach(baseline)
    assert "0.35 to 68.71 points (median 1.02), as the rows differ in spread" in first
    assert "typical one run has sigma 0.075" in first
    assert lost.count(";") == 2  # three rows spread too much to find any drop


def test_a_baseline_of_single_seeds_cannot_say(tmp_path: Path) -> None:
    (text,) = reach(made(tmp_path, *measured(97.0)))
    assert "not known, as no row has two seeds; it allows 0.5 points" in text


def test_five_good_seeds_are_not_warned_of_but_bad_cells_are(tmp_path: Path) -> None:
    good = measured(97.0, 97.5, 98.0, 97.2, 97.1)
    assert not list(shortcomings(made(tmp_path / "good", *good)))
    bad = record(spec(seed=5), None, status="invalid")
    (warning,) = shortcomings(made(tmp_path / "bad", *good, bad))
    assert "not every cell is ok (1 invalid)" in warning
