"""The gate: what passes, what does not, and how the answer is told apart."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from bench import cli
from bench.errors import RecordError, UsageError
from bench.record import Record, Times
from bench.spec import CellSpec
from bench.store import Cell, Manifest
from reports.outcome import SHOWN
from reports.regress import Limits, Outcome, check, write_baseline
from reports.statistics import Pooled
from reports.tolerance import ALARM
from tests.reports.records import SUITE, counts, fill, manifest, record, spec

SEEDS = [spec(seed=seed) for seed in range(2)]


def measured(*top1: float, **more: Any) -> list[Record]:
    """One record per accuracy, on seeds 0, 1, ..."""
    return [record(spec(seed=seed), value, **more) for seed, value in enumerate(top1)]


def compare(
    folder: Path,
    before: list[Record],
    now: list[Record],
    specs: list[CellSpec] | None = None,
    **limits: float,
) -> Outcome:
    """Makes a baseline of `before`, and checks `now` (of a suite that asks for `specs`)."""
    fill(folder / "before", manifest(*(one.spec for one in before)), *before)
    asked = [one.spec for one in now] if specs is None else specs
    fill(folder / "now", manifest(*asked), *now)
    baseline = write_baseline(folder / "before", SUITE)
    return check(folder / "now", SUITE, baseline, limits=Limits(**limits))


def test_the_same_records_are_fine(tmp_path: Path) -> None:
    outcome = compare(tmp_path, measured(97.0, 98.0), measured(97.0, 98.0))
    assert (outcome.status, outcome.exit_code) == ("fine", 0)
    assert "| 2 -> 2 |      97.50 | 97.50 |        +0.00 |     -3.63 |  12.00 -> 12.00 | fine " in (
        outcome.table
    )
    assert "- 1 row: 1 fine." in outcome.table


@pytest.mark.parametrize(("top1", "exit_code"), [(97.5, 0), (97.25, 1), (99.0, 0)])
def test_without_two_seeds_in_any_row_half_a_point_may_be_lost(
    tmp_path: Path, top1: float, exit_code: int
) -> None:
    outcome = compare(tmp_path, measured(98.0), measured(top1))
    assert outcome.exit_code == exit_code
    assert "no row of the baseline has two seeds" in outcome.table


@pytest.mark.parametrize(("now", "exit_code"), [((97.5, 97.5), 0), ((97.4, 97.4), 1)])
def test_seeds_that_agree_exactly_tell_no_noise(
    tmp_path: Path, now: tuple[float, float], exit_code: int
) -> None:
    outcome = compare(tmp_path, measured(98.0, 98.0), measured(*now))
    assert outcome.exit_code == exit_code
    assert outcome.lines[0].allowed == 0.5
    assert "the seeds of every row of the baseline agree, so no noise shows" in outcome.table


# Baseline 97, 99: mean 98, sigma sqrt(2), 1 degree of freedom. Now varies as much: 2 of them. As
# many standard errors sqrt(2) sqrt(1/2 + 1/2) may be lost as Student's t has at 1 - 0.018.
@pytest.mark.parametrize(("step", "exit_code"), [(-0.01, 0), (0.01, 1)])
def test_noisy_rows_may_fall_by_what_noise_explains(
    tmp_path: Path, step: float, exit_code: int
) -> None:
    allowed = float(stats.t.ppf(1 - ALARM, 2)) * math.sqrt(2)
    low = 98 - allowed - step
    outcome = compare(tmp_path, measured(97.0, 99.0), measured(low - 1, low + 1))
    assert outcome.exit_code == exit_code
    assert outcome.lines[0].allowed == pytest.approx(allowed)


def test_rows_with_fewer_ok_seeds_may_fall_by_more(tmp_path: Path) -> None:
    diverged = record(SEEDS[1], None, status="diverged")
    now = [record(SEEDS[0], 92.0), diverged]
    outcome = compare(tmp_path, measured(97.0, 99.0), now)
    allowed = float(stats.t.ppf(1 - ALARM, 1)) * math.sqrt(2) * math.sqrt(1 / 2 + 1)
    assert outcome.lines[0].allowed == pytest.approx(allowed)
    assert outcome.exit_code == 3  # for the seed that diverged
    assert "| 2 -> 1 |" in outcome.table


def test_the_spread_is_pooled_over_the_rows_of_both_sides(tmp_path: Path) -> None:
    # variance 4 of three seeds, 0.5 of two, both once more: sigma^2 = 2 (2 * 4 + 1 * 0.5) / 6
    noisy = measured(96.0, 98.0, 100.0)
    quiet = [record(spec("snip", seed=seed), 98.0 + seed) for seed in range(2)]
    fallen = [record(spec("snip", seed=seed), 93.2 + seed) for seed in range(2)]
    outcome = compare(tmp_path, [*noisy, *quiet], [*noisy, *fallen])
    assert outcome.exit_code == 0
    sigma = math.sqrt(17 / 6)
    critical = float(stats.t.ppf(math.sqrt(1 - ALARM), 6))  # so that neither of two rows exceeds it
    assert [line.allowed for line in outcome.lines] == pytest.approx(
        [critical * sigma * math.sqrt(2 / 3), critical * sigma]
    )
    assert f"{critical:.2f} sigma sqrt(1/n + 1/m); sigma, of one run" in outcome.table
    assert "1.683 (6 degrees of freedom)" in outcome.table


def test_what_broke_does_not_widen_its_own_tolerance(tmp_path: Path) -> None:
    steady = [98.0, 98.2, 97.9, 98.1, 98.3]
    before = [record(spec(m, seed=s), v) for m in "abcd" for s, v in enumerate(steady)]
    wild = [98.0, 20.0, 98.0, 60.0, 98.0]
    now = [one if one.spec.method != "d" else None for one in before]
    now = [one for one in now if one] + [record(spec("d", seed=s), v) for s, v in enumerate(wild)]
    outcome = compare(tmp_path, before, now)
    assert outcome.exit_code == 1
    assert outcome.lines[-1].reasons == ("accuracy fell",)
    assert outcome.tolerance.noise is not None
    assert outcome.tolerance.noise.sd == pytest.approx(stats.tstd(steady))
    assert outcome.tolerance.noise.freedom == 7 * 4


def test_a_row_that_always_spread_more_is_held_to_its_own_spread(tmp_path: Path) -> None:
    steady, wide = [98.0, 98.2, 97.9, 98.1, 98.3], [90.0, 60.0, 75.0, 80.0, 70.0]
    calm = [record(spec(m, seed=s), v) for m in "abcdefgh" for s, v in enumerate(steady)]
    loose = [record(spec("wide", seed=s), v) for s, v in enumerate(wide)]
    lower = [record(one.spec, (one.top1 or 0) - 5) for one in loose]
    outcome = compare(tmp_path / "wide", [*calm, *loose], [*calm, *lower])
    assert outcome.exit_code == 0
    assert outcome.tolerance.noise is not None
    sigmas = [line.sigma for line in outcome.lines]
    assert sigmas == pytest.approx([stats.tstd(steady)] * 8 + [stats.tstd(wide)], rel=0.1)
    assert "the rows differ in spread" in outcome.table
    found = outcome.as_dict()
    assert (found["rows_differ_in_spread"], found["critical"]) == (True, None)
    fallen = [record(one.spec, (one.top1 or 0) - 1) for one in calm]
    assert compare(tmp_path / "calm", [*calm, *loose], [*fallen, *loose]).exit_code == 1


@pytest.mark.parametrize(("tried", "exit_code"), [(False, 4), (True, 3)], ids=["absent", "failed"])
def test_rows_that_differ_in_spread_may_all_have_no_seed_that_is_ok(
    tmp_path: Path, tried: bool, exit_code: int
) -> None:
    steady, wide = [98.0, 98.2, 97.9, 98.1, 98.3], [90.0, 60.0, 75.0, 80.0, 70.0]
    before = [record(spec(m, seed=s), v) for m in "abcdefgh" for s, v in enumerate(steady)]
    before += [record(spec("wide", seed=s), v) for s, v in enumerate(wide)]
    lost = [record(one.spec, None, status="failed", counts=None) for one in before if tried]
    outcome = compare(tmp_path, before, lost, specs=[one.spec for one in before])
    assert outcome.exit_code == outcome.as_dict()["exit_code"] == exit_code
    assert "so each has its own sigma, of one run: that of its seeds" in outcome.table
    (tmp_path / "empty").mkdir()
    baseline = write_baseline(tmp_path / "before", SUITE)
    nowhere = check(tmp_path / "empty", SUITE, baseline)
    assert nowhere.exit_code == nowhere.as_dict()["exit_code"] == 4
    assert "| missing " in nowhere.table


def test_cells_that_rows_share_tell_the_noise_once(tmp_path: Path) -> None:
    values = [97.0, 98.0, 99.0]
    cells = [record(spec(seed=s), v) for s, v in enumerate(values)]
    alone = compare(tmp_path / "alone", cells, cells).tolerance.noise
    asked = [Cell(label, one.spec, 100, 1.0, 0) for label in ("a", "b", "c") for one in cells]
    fill(tmp_path / "shared", Manifest(SUITE, "Shared", tuple(asked)), *cells)
    outcome = check(tmp_path / "shared", None, write_baseline(tmp_path / "shared", SUITE))
    assert len(outcome.lines) == 3
    assert outcome.tolerance.noise == alone == Pooled(1.0, 4)


def test_noise_above_the_accuracy_itself_allows_any_fall(tmp_path: Path) -> None:
    outcome = compare(tmp_path, measured(10.0, 60.0), measured(20.0, 50.0))
    assert "    any |" in outcome.table
    assert "any: noise explains a fall by more than the accuracy itself" in outcome.table


@pytest.mark.parametrize(
    ("more", "after"), [((), ""), ((("every", 100),), " (every=100)")], ids=["all", "some"]
)
def test_options_that_a_label_names_do_not_follow_it(
    tmp_path: Path, more: tuple[tuple[str, int], ...], after: str
) -> None:
    options = (("drop_fraction", 0.2), *more)
    one = record(spec(options=options), label="rigl[drop_fraction=0.2]")
    asked = manifest(one.spec, label="rigl[drop_fraction=0.2]")
    fill(tmp_path, asked, one)
    outcome = check(tmp_path, None, write_baseline(tmp_path, SUITE))
    assert outcome.lines[0].method == f"rigl[drop_fraction=0.2]{after}"


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


@pytest.mark.parametrize("status", ["failed", "lost", "out-of-memory", "timeout"])
@pytest.mark.parametrize("row", ["known", "new"])
def test_a_check_says_how_a_cell_failed(tmp_path: Path, status: str, row: str) -> None:
    fine = measured(98.0, 98.0)
    bad = SEEDS[1] if row == "known" else spec("snip")
    kept = fine[:1] if row == "known" else fine
    tries = [record(bad, None, status=of, counts=None) for of in ("failed", status)]
    outcome = compare(tmp_path, fine, [*kept, *tries], specs=[*SEEDS, bad])
    assert (outcome.status, outcome.exit_code) == ("failed", 3)
    assert f"seed {bad.seed} {status}" in outcome.table


@pytest.mark.parametrize("status", ["diverged", "invalid", "failed"])
def test_a_cell_that_went_wrong_fails_the_check(tmp_path: Path, status: str) -> None:
    bad = record(SEEDS[1], None, status=status, counts=None)
    outcome = compare(tmp_path, measured(98.0, 98.0), [record(SEEDS[0], 98.0), bad])
    assert (outcome.status, outcome.exit_code) == ("failed", 3)
    assert f"seed 1 {status}" in outcome.table


def test_a_cell_that_diverged_in_the_baseline_may_diverge_again(tmp_path: Path) -> None:
    both = [record(SEEDS[0], 98.0), record(SEEDS[1], None, status="diverged")]
    assert compare(tmp_path, both, both).exit_code == 0


@pytest.mark.parametrize("status", ["invalid", "failed"])
def test_a_cell_that_was_bad_in_the_baseline_too_never_passes(tmp_path: Path, status: str) -> None:
    both = [record(SEEDS[0], 98.0), record(SEEDS[1], None, status=status)]
    assert compare(tmp_path, both, both, specs=SEEDS).exit_code == 3


def test_a_row_that_was_never_ok_is_not_compared(tmp_path: Path) -> None:
    bad = record(spec("snip"), None, status="diverged")
    outcome = compare(tmp_path, [bad, *measured(98.0)], [bad, *measured(98.0)])
    assert outcome.exit_code == 0
    assert "not compared" in outcome.table


def test_a_seed_that_was_skipped_in_the_baseline_may_be_skipped_again(tmp_path: Path) -> None:
    skipped = record(SEEDS[1], None, status="skipped", reason="no such layer", counts=None)
    both = [record(SEEDS[0], 98.0), skipped]
    assert compare(tmp_path / "one", both, both).exit_code == 0
    fine = measured(98.0, 98.0)
    assert compare(tmp_path / "other", fine, both).exit_code == 4


def test_a_row_that_was_never_ok_must_still_be_run(tmp_path: Path) -> None:
    bad = record(spec("snip"), None, status="diverged")
    asked = [bad.spec, SEEDS[0]]
    assert compare(tmp_path, [bad, *measured(98.0)], measured(98.0), specs=asked).exit_code == 4


@pytest.mark.parametrize("top1", [math.nan, math.inf, None])
def test_an_accuracy_that_is_no_number_never_passes(tmp_path: Path, top1: float | None) -> None:
    outcome = compare(tmp_path, measured(98.0), [record(SEEDS[0], top1)], floor=1e9)
    assert outcome.exit_code == 3


def test_a_row_that_the_suite_lost_is_missing(tmp_path: Path) -> None:
    outcome = compare(tmp_path, [*measured(98.0), record(spec("snip"))], measured(98.0))
    assert (outcome.status, outcome.exit_code) == ("nothing", 4)
    assert "missing" in outcome.table


def test_a_seed_that_was_not_run_is_missing(tmp_path: Path) -> None:
    outcome = compare(tmp_path, measured(98.0, 98.0), measured(98.0), specs=SEEDS)
    assert outcome.exit_code == 4
    assert "not run: 1 seed of the baseline" in outcome.table


def test_a_seed_that_the_suite_no_longer_asks_for_is_missing(tmp_path: Path) -> None:
    assert compare(tmp_path, measured(98.0, 98.0), measured(98.0)).exit_code == 4


def test_records_of_nothing_that_the_baseline_knows_are_nothing_to_compare(tmp_path: Path) -> None:
    bad = record(SEEDS[0], None, status="diverged")
    assert compare(tmp_path, [bad], [bad]).exit_code == 4


def test_a_folder_without_the_suite_misses_every_row(tmp_path: Path) -> None:
    fill(tmp_path / "before", manifest(*SEEDS), *measured(98.0, 98.0))
    (tmp_path / "empty").mkdir()
    outcome = check(tmp_path / "empty", None, write_baseline(tmp_path / "before", SUITE))
    assert outcome.exit_code == 4
    assert "| missing " in outcome.table


def test_the_worst_row_decides(tmp_path: Path) -> None:
    before = [*measured(98.0), record(spec("snip")), record(spec("set"))]
    fallen, diverged = measured(90.0), record(spec("snip"), None, status="diverged")
    assert compare(tmp_path / "three", before, [*fallen, diverged]).exit_code == 3
    assert compare(tmp_path / "two", before, fallen).exit_code == 1


def test_new_rows_are_shown_and_do_not_matter(tmp_path: Path) -> None:
    outcome = compare(tmp_path, measured(98.0), [*measured(98.0), record(spec("snip"), 12.0)])
    assert outcome.exit_code == 0
    assert "| new " in outcome.table


def test_a_new_row_that_went_wrong_fails_the_check(tmp_path: Path) -> None:
    bad = record(spec("snip"), None, status="invalid")
    outcome = compare(tmp_path, measured(98.0), [*measured(98.0), bad])
    assert outcome.exit_code == 3
    assert "new; seed 0 invalid" in outcome.table


def test_a_new_version_of_a_method_is_compared_and_told(tmp_path: Path) -> None:
    newer = record(spec(method_version=2), 90.0)
    outcome = compare(tmp_path, measured(98.0), [newer])
    assert outcome.exit_code == 1
    assert "1 row with other keys than in the baseline" in outcome.table


def test_a_row_is_found_though_the_cell_that_its_masks_come_from_has_another_key(
    tmp_path: Path,
) -> None:
    before, now = (record(spec("random", source=key)) for key in ("a" * 12, "b" * 12))
    assert compare(tmp_path, [before], [now]).exit_code == 0


# Training took 12 s in the baseline
@pytest.mark.parametrize(
    ("seconds", "tolerance", "exit_code"), [(99.0, None, 0), (14.9, 0.25, 0), (15.1, 0.25, 1)]
)
def test_times_are_shown_and_fail_only_where_it_is_asked_for(
    tmp_path: Path, seconds: float, tolerance: float | None, exit_code: int
) -> None:
    slow = record(SEEDS[0], times=Times(seconds, 1.0, 0.5, "2025-01-01T00:00:00Z"))
    limits = {} if tolerance is None else {"time": tolerance}
    outcome = compare(tmp_path, measured(98.0), [slow], **limits)
    assert outcome.exit_code == exit_code
    assert f"12.00 -> {seconds:.2f}" in outcome.table


def test_times_of_a_baseline_that_has_none_cannot_be_held_to(tmp_path: Path) -> None:
    fill(tmp_path, manifest(SEEDS[0]), *measured(98.0))
    text = write_baseline(tmp_path, SUITE).replace(b'"seconds": 12.0', b'"seconds": null')
    assert check(tmp_path, SUITE, text).exit_code == 0
    with pytest.raises(RecordError, match=r"old\.json: no times.* baseline demo --out FILE"):
        check(tmp_path, SUITE, text, "old.json", Limits(time=0.5))


@pytest.mark.parametrize(
    "limits", [{"floor": math.nan}, {"floor": math.inf}, {"floor": -1.0}, {"time": math.nan}]
)
def test_a_limit_is_finite_and_no_less_than_nothing(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="must be a finite number, 0 or more"):
        Limits(**limits)


def test_a_long_table_shows_only_what_is_not_fine(tmp_path: Path) -> None:
    before = [record(spec(f"m{number}")) for number in range(SHOWN + 1)]
    outcome = compare(tmp_path, before, [record(before[0].spec, 50.0), *before[1:]])
    assert "accuracy fell" in outcome.table
    assert "| m1 " not in outcome.table
    assert f"{SHOWN + 1} rows: 1 regressed, {SHOWN} fine." in outcome.table
    assert len(outcome.lines) == SHOWN + 1


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command; gives its exit status, output and error output."""

    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparsebench", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return called


def test_the_commands_write_a_baseline_and_check_against_it(tmp_path: Path, run: Command) -> None:
    file = tmp_path / "base.json"
    fill(tmp_path / "r", manifest(*SEEDS), *measured(97.0, 99.0))
    code, out, err = run("baseline", "--records", tmp_path / "r", "--out", file)
    assert code == 0
    assert out.startswith(f"{file}\nsmallest drop that a check can find (probability 95%, 2 seeds")
    assert "warning: 1 of 1 rows have fewer than 5 seeds that are ok (least: 2)" in err
    for suite in ([], [SUITE], [f"{SUITE}.toml"]):
        code, out, _ = run("check", *suite, "--records", tmp_path / "r", "--baseline", file)
        assert (code, out.startswith("## demo: fine\n")) == (0, True)


def test_the_check_prints_json_for_programs(tmp_path: Path, run: Command) -> None:
    file = tmp_path / "base.json"
    fill(tmp_path / "r", manifest(*SEEDS), *measured(97.0, 99.0))
    fill(tmp_path / "now", manifest(*SEEDS), *measured(80.0, 82.0))
    run("baseline", "--records", tmp_path / "r", "--out", file)
    code, out, _ = run("check", "--records", tmp_path / "now", "--baseline", file, "--json")
    found = json.loads(out)
    assert (code, found["exit_code"], found["status"]) == (1, 1, "regressed")
    (row,) = found["rows"]
    assert (row["before"], row["now"], row["difference"]) == (98.0, 81.0, -17.0)
    assert (row["reasons"], row["n"], found["freedom"]) == (["accuracy fell"], 2, 2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check", "--baseline", "absent.json"], "absent.json: cannot read the baseline"),
        (["check", "other", "--baseline", "base.json"], "baseline of suite 'demo'"),
        (["check", "--baseline", "base.json", "--records", "absent"], "no such file"),
        (["baseline", "--records", "absent", "--out", "new.json"], "absent: no records"),
        (["baseline", "--records", "r", "--out", "r"], "--out r: cannot write there"),
    ],
)
def test_wrong_input_is_a_usage_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Command,
    arguments: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "r", manifest(*SEEDS), *measured(97.0, 99.0))
    Path("base.json").write_bytes(write_baseline(tmp_path / "r", SUITE))
    code, _, err = run(*arguments)
    assert (code, text in err) == (2, True), err


def test_a_folder_of_several_suites_asks_which(tmp_path: Path, run: Command) -> None:
    fill(tmp_path, manifest(*SEEDS), *measured(97.0, 99.0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "suite.json").write_text("{}")
    code, _, err = run("baseline", "--records", tmp_path, "--out", tmp_path / "b.json")
    assert code == 2
    assert (
        "records of 2 suites (demo, other); name the suite: sparsebench baseline SUITE --out FILE"
        in err
    )
