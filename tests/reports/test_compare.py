"""Two sides of a comparison: which questions meet, what is told of them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import msgspec
import pytest

from bench import cli
from bench.errors import RecordError, UnknownName, UsageError
from bench.record import Record
from bench.spec import BudgetSpec
from bench.store import Against, Cell, Manifest, Store
from reports import statistics
from reports.compare import compare
from reports.side_by_side import as_data, side_by_side
from reports.statistics import Pooled
from tests.reports.records import ENVIRONMENT, SUITE, counts, fill, manifest, record, spec
from tests.reports.test_suite_table import body


def suite(root: Path, *records: Record, name: str = SUITE, labels: str = "") -> Path:
    """A suite that asks for the cells of these records; the folder of all suites."""
    asked = manifest(*(one.spec for one in records))
    if labels:
        cells = zip(asked.cells, labels.split(), strict=True)
        asked = Manifest(name, "", tuple(dataclasses.replace(c, label=label) for c, label in cells))
    store = Store(root, name)
    store.put_manifest(dataclasses.replace(asked, suite=name))
    for one in records:
        store.put(one)
    return root


def lines(root: Path, one: str | Path, other: str | Path) -> list[dict[str, str]]:
    """The table of the only suite, a dictionary a line."""
    (found,) = compare(root, str(one), str(other))
    return body(side_by_side(found))


def notes(root: Path, one: str | Path, other: str | Path) -> str:
    (found,) = compare(root, str(one), str(other))
    return side_by_side(found)


def test_two_folders_stand_side_by_side_question_by_question(tmp_path):
    a = suite(tmp_path / "a", record(spec("dense", 0.0), 98.0), record(spec(), 96.0))
    fewer = counts(0.9, nonzero=270)
    b = suite(tmp_path / "b", record(spec(), 96.5, counts=fewer), record(spec("dense", 0.0), 97.0))
    dense, rigl = lines(tmp_path, a, b)
    assert [dense["method"], dense["sparsity asked %"], dense["B - A"]] == ["dense", "0", "-1.00"]
    assert dense["parameters left"] == "1,000 (100.00 %)"
    assert [rigl["method"], rigl["A top-1 %"], rigl["B top-1 %"]] == ["rigl", "96.00", "96.50"]
    assert [rigl["n A"], rigl["n B"], rigl["B - A"]] == ["1", "1", "+0.50"]
    assert rigl["parameters left"] == "280 (28.00 %) / 270 (27.00 %)"
    assert rigl["MACs left"] == "20,000 (10.00 %)"
    assert rigl["budget multiple"] == "1.00"


def test_a_suites_own_folder_is_as_good_as_its_root(tmp_path):
    a = suite(tmp_path / "a", record(spec(), 96.0))
    b = suite(tmp_path / "b", record(spec(), 97.0), name="another")
    whole = suite(tmp_path / "c", record(spec(), 97.0))
    assert lines(tmp_path, a / SUITE, b / "another") == lines(tmp_path, a, whole)
    assert lines(tmp_path, a, b)  # each holds one suite alone


def test_every_suite_that_both_folders_have_gives_a_table(tmp_path):
    for root in ("a", "b"):
        for name in ("one", "two", root):
            suite(tmp_path / root, record(spec()), name=name)
    found = compare(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"))
    assert [each.suite for each in found] == ["one", "two"]


def test_two_methods_of_a_suite_meet_in_model_and_sparsity(tmp_path):
    low, high, other = spec(sparsity=0.5), spec(sparsity=0.9), spec("set", 0.9)
    wide = spec("set", 0.9, model_options=(("width", 2),))
    root = suite(tmp_path, *map(record, (low, high)), record(other, 97.25), record(wide))
    (only,) = lines(root, "rigl", "set")
    assert only["sparsity asked %"] == "90"
    assert only["B - A"] == "-0.75"
    text = notes(root, "rigl", "set")
    assert "- only A answers 1 question: rigl, lenet, 50 %." in text
    assert "- only B answers 1 question: set, lenet (width=2), 90 %." in text


def test_a_penalty_that_lands_by_top_k_meets_a_method_that_was_asked(tmp_path):
    lands = spec("l0", None, options=(("target", 0.9),))
    root = suite(tmp_path, record(spec()), record(lands, 95.0))
    (only,) = lines(root, "rigl", "l0")
    assert [only["sparsity asked %"], only["B top-1 %"]] == ["90", "95.00"]


def test_a_row_that_was_not_run_answers_nothing(tmp_path):
    a = suite(tmp_path / "a", record(spec()))
    fill(tmp_path / "b", manifest(spec()))
    assert lines(tmp_path, a, tmp_path / "b") == []
    assert "only A answers 1 question: rigl, lenet, 90 %." in notes(tmp_path, a, tmp_path / "b")


def test_the_accuracies_of_diverged_seeds_are_marked_and_not_compared(tmp_path):
    lost = record(spec(), 10.0, status="diverged", reason="the loss is\nnot finite")
    a, b = suite(tmp_path / "a", record(spec(), 96.0)), suite(tmp_path / "b", lost)
    (only,) = lines(tmp_path, a, b)
    assert [only["B top-1 %"], only["B - A"]] == ["* 1 of 1", "-"]
    text = notes(tmp_path, a, b)
    assert "- B: rigl, lenet, 90 %, seed 0: diverged: the loss is not finite" in text
    assert "`*`: this many seeds diverged" in text
    assert "different seeds" not in text  # one side has no mean


def test_conditions_that_the_sides_do_not_share_are_footnotes(tmp_path):
    elsewhere = dataclasses.replace(ENVIRONMENT, device="NVIDIA H200", torch="2.14")
    longer = spec(budget=BudgetSpec(epochs=20), recipe_hash="cccc", method_version=2)
    a = suite(tmp_path / "a", record(spec()))
    b = suite(tmp_path / "b", record(longer, environment=elsewhere, multiple=2.0))
    (only,) = lines(tmp_path, a, b)
    assert only["budget multiple"] == "1.00 / 2.00"
    text = notes(tmp_path, a, b)
    for said in (
        "budget: A 10 epochs; B 20 epochs.",
        "recipe: A plain (aaaa); B plain (cccc).",
        "devices: A cpu; B NVIDIA H200.",
        "torch: A 2.15; B 2.14.",
        "methods past version 1: A -; B rigl 2.",
    ):
        assert f"- not alike, {said}\n" in text
    assert "data set: digits (bbbb); prunable: all; initial weights: random; threads: 1;" in text
    assert text.count("not alike") == 5


def test_a_condition_that_varies_within_a_side_tells_its_questions_apart(tmp_path):
    short, long = (spec(budget=BudgetSpec(epochs=n)) for n in (5, 20))
    a = suite(tmp_path / "a", record(short, 95.0), record(long, 97.0))
    b = suite(tmp_path / "b", record(long, 97.5))
    (only,) = lines(tmp_path, a, b)
    assert only["B - A"] == "+0.50"
    assert "only A answers 1 question" in notes(tmp_path, a, b)


def test_rows_that_a_question_cannot_tell_apart_are_listed_and_not_mixed_up(tmp_path):
    weak, strong = (spec("l0", None, options=(("penalty", p),)) for p in (0.1, 0.2))
    root = suite(tmp_path, record(weak), record(strong), record(spec("vd", None)))
    assert lines(root, "l0", "vd") == []
    assert "only A answers 2 questions: l0, lenet, penalty; l0" in notes(root, "l0", "vd")


def test_means_over_different_seeds_are_said_to_be(tmp_path):
    a = suite(tmp_path / "a", *(record(spec(seed=n)) for n in (0, 1)))
    b = suite(tmp_path / "b", *(record(spec(seed=n)) for n in (0, 2)))
    assert "means of A and B are over different seeds: rigl, lenet, 90 %." in notes(tmp_path, a, b)
    assert "different seeds" not in notes(tmp_path, a, a)


def test_statistics_are_computed_only_when_asked_for(tmp_path):
    def runs(at: float, sparsity: float) -> list[Record]:
        return [record(spec(sparsity=sparsity, seed=n), at + 0.1 * n) for n in range(3)]

    a = suite(tmp_path / "a", *runs(97.0, 0.5), *runs(96.0, 0.9))
    b = suite(tmp_path / "b", *runs(97.0, 0.5), *runs(90.0, 0.9))
    (plain,) = compare(tmp_path, str(a), str(b))
    assert "p" not in body(side_by_side(plain))[0]
    (found,) = compare(tmp_path, str(a), str(b), tests=True)
    same, apart = body(side_by_side(found))
    assert [same["p"], same["Holm"]] == ["1.000", "1.000"]
    assert float(apart["p"]) < 0.001
    tests = [pair.chance for pair in found.pairs]
    assert tests[1] is not None
    assert tests[1].difference == pytest.approx(-6)
    assert "- p: paired t over the seeds that both have" in side_by_side(found)


def test_a_cell_that_lies_in_both_folders_tells_its_noise_once(tmp_path):
    shared = [record(spec(seed=n), 96.0 + 2 * n) for n in range(2)]
    before = [record(spec("set", seed=n), 97.0 + n) for n in range(2)]
    after = [record(spec("set", seed=n), 93.0 + n) for n in range(2)]
    a, b = suite(tmp_path / "a", *shared, *before), suite(tmp_path / "b", *shared, *after)
    (found,) = compare(tmp_path, str(a), str(b), tests=True)
    # Variances 2, once, and 0.5, of both sides as it was run again: one in all, of three freedoms.
    expected = statistics.compare({0: 93.0, 1: 94.0}, {0: 97.0, 1: 98.0}, Pooled(1.0, 3))
    assert found.pairs[1].chance == expected


def test_a_label_that_stands_for_another_method_is_said_to(tmp_path):
    a = suite(tmp_path / "a", record(spec(), 96.0, label="ours"), labels="ours")
    b = suite(tmp_path / "b", record(spec("set"), 97.0, label="ours"), labels="ours")
    assert "- not alike, methods: A ours: rigl; B ours: set.\n" in notes(tmp_path, a, b)
    (found,) = compare(tmp_path, str(a), str(b))
    (line,) = as_data(found)["lines"]
    assert [line[side]["method"] for side in "ab"] == ["rigl", "set"]
    often = record(spec(options=(("every", 10),)))
    root = suite(tmp_path / "c", record(spec()), often, labels="rigl rigl[every=10]")
    assert "methods" not in notes(root, "rigl", "rigl[every=10]")


def test_where_no_p_is_possible_the_reason_stands_in_its_place(tmp_path):
    a, b = (suite(tmp_path / name, record(spec())) for name in "ab")
    (found,) = compare(tmp_path, str(a), str(b), tests=True)
    (only,) = body(side_by_side(found))
    assert [only["p"], only["Holm"]] == ["n too small", "n too small"]


def test_a_comparison_as_data_holds_every_seed(tmp_path):
    a = suite(tmp_path / "a", *(record(spec(seed=n), 96.0 + n) for n in (0, 1)))
    b = suite(tmp_path / "b", record(spec(), 97.0, train_macs=5e9))
    (found,) = compare(tmp_path, str(a), str(b), tests=True)
    data = json.loads(msgspec.json.encode(as_data(found)))
    (line,) = data["lines"]
    assert line["question"]["method"] == "rigl"
    assert line["a"]["accuracies"] == {"0": 96.0, "1": 97.0}
    assert line["a"]["keys"] == [spec(seed=n).key for n in (0, 1)]
    assert [line["difference"], line["b"]["train_macs"], line["chance"]["n"]] == [0.5, 5e9, 1]


def test_a_label_goes_before_a_method_of_that_name(tmp_path):
    often = spec(options=(("every", 10),))
    root = suite(tmp_path, record(spec(), 96.0), record(often), labels="rigl rigl[every=10]")
    assert lines(root, "rigl", "rigl[every=10]")[0]["A top-1 %"] == "96.00"


def test_a_method_with_several_rows_is_refused_with_their_labels(tmp_path):
    cells = [spec(options=(("every", n),)) for n in (10, 20)]
    root = suite(tmp_path, *map(record, (*cells, spec("set"))), labels="often seldom set")
    with pytest.raises(UsageError, match="rigl has several rows in demo; give one of often, sel"):
        compare(root, "rigl", "set")
    assert lines(root, "often", "set")


def test_an_unknown_name_is_told_with_those_that_are_known(tmp_path):
    root = suite(tmp_path, record(spec()), record(spec("set")))
    with pytest.raises(UnknownName, match=r"'rgil'\. Did you mean 'rigl'\? Known: rigl, set\."):
        compare(root, "rgil", "set")


def test_a_folder_does_not_compare_with_a_method(tmp_path):
    root = suite(tmp_path, record(spec()))
    with pytest.raises(UsageError, match=f"{root} is a folder of records, but rigl is none"):
        compare(root, "rigl", str(root))


def test_sides_that_no_suite_has_both_of_are_refused(tmp_path):
    for name, method in (("one", "rigl"), ("two", "set")):
        suite(tmp_path, record(spec(method)), name=name)
        for more in ("x", "y"):
            suite(tmp_path / name, record(spec(method)), name=name + more)
    with pytest.raises(RecordError, match="no suite has records of both rigl and set"):
        compare(tmp_path, "rigl", "set")
    for folder in ("one", "two"):
        (tmp_path / folder / "suite.json").unlink()
    with pytest.raises(RecordError, match=r"no suite is in both folders \(.*one has onex, oney;"):
        compare(tmp_path, str(tmp_path / "one"), str(tmp_path / "two"))


@pytest.mark.parametrize("options", [(), (("batch_norm", True),)])
def test_a_narrower_dense_network_meets_the_sparse_ones(tmp_path, options):
    wide = spec(model_options=options)
    small = spec("dense", 0.0, model_options=(*options, ("width", 0.1)))
    against = Against(parameters=1000, prunable=800, dense_macs=200_000, kept=80)
    cells = (
        Cell("rigl", wide, 100, 1.0, 0),
        Cell("small_dense", small, 100, 1.0, 0, sparsity=0.9, against=against),
    )
    asked = Manifest(SUITE, "", cells)
    fill(tmp_path, asked, record(wide, 96.0), record(small, 94.0, label="small_dense"))
    (only,) = lines(tmp_path, "small_dense", "rigl")
    assert [only["sparsity asked %"], only["B - A"]] == ["90", "+2.00"]


def command(monkeypatch, *arguments: str | Path) -> int:
    """Runs a command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["sparsebench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_prints_tables_or_data(monkeypatch, capsys, tmp_path):
    root = suite(tmp_path, record(spec(), 96.0), record(spec("set"), 97.0))
    assert command(monkeypatch, "compare", "rigl", "set", "--records", root) == 0
    assert body(capsys.readouterr().out)[0]["B - A"] == "+1.00"
    options = ("--records", root, "--statistics", "full", "--json")
    assert command(monkeypatch, "compare", "rigl", "set", *options) == 0
    (data,) = json.loads(capsys.readouterr().out)
    assert data["lines"][0]["chance"]["reason"] == "n too small"


def test_the_command_refuses_what_it_does_not_know_with_status_2(monkeypatch, capsys, tmp_path):
    root = suite(tmp_path, record(spec()))
    assert command(monkeypatch, "compare", "rigl", "rgil", "--records", root) == 2
    said = capsys.readouterr().err
    assert said.startswith("sparsebench: ")
    assert said.count("\n") == 1
