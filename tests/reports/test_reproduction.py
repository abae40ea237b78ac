"""The reproduction score: what counts, what is within, and what is said of the rest."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator

import pytest

from bench.errors import SuiteError
from bench.record import Least, PhaseResult, Record
from bench.spec import BudgetSpec
from reports import papers, reproduction, specs
from reports.fields import FIELDS
from reports.leaderboard import leaderboard
from reports.page.build import page
from reports.papers import PublishedCell
from reports.reproduction import SCORED, UNSCORED, Attempt, Score, as_dict
from tests.reports.published import cell, everything
from tests.reports.records import fill, manifest, record, spec

TABLE = "dpf-table4"


def scored(folder, records: list[Record]) -> Score:
    fill(folder, manifest(*(one.spec for one in records)), *records)
    return reproduction.reproduction(folder)


def find(score: Score, method: str, target: str, model: str = "ResNet-20") -> Attempt:
    (one,) = (
        one
        for one in score.attempts
        if (one.method, one.target, one.model) == (method, target, model)
        and one.table in ("dpf-table1", TABLE)
    )
    return one


def shifted(records: list[Record], model: str, method: str, sparsity: float, to: float):
    """The records with the seeds of one cell at the same accuracy."""
    asked = (model, method, sparsity)
    return [
        dataclasses.replace(one, top1=to)
        if (one.spec.model, one.spec.method, one.spec.sparsity) == asked
        else one
        for one in records
    ]


@pytest.fixture
def records() -> list[Record]:
    return everything(specs.load(TABLE))


def test_records_at_the_published_figures_reproduce_them_all(tmp_path, records):
    score = scored(tmp_path, records)
    ran = [one for one in score.attempts if one.status != "not run"]
    fourth = papers.load("dpf2020").tables["table4"].cells
    dpf = [one for one in ran if one.table in ("dpf-table1", TABLE)]
    assert len(dpf) == sum(bool(cell.top1) for cell in fourth)
    assert {one.status for one in dpf} == {"within"}
    assert {one.seeds for one in dpf} == {3}
    assert (score.run, score.score) == (score.within, 1.0)


def test_a_figure_that_stands_in_several_tables_counts_once(tmp_path, records):
    cells = [
        (one.table, one.model, one.method, one.target, one.figure)
        for one in scored(tmp_path, records).attempts
    ]
    assert len(set(cells)) == len(cells)
    first, fourth = specs.load("dpf-table1"), specs.load(TABLE)
    assert first.paper == fourth.paper
    assert not [c for c in cells if c[0] == TABLE and ("dpf-table1", *c[1:]) in cells]


@pytest.mark.parametrize(
    ("to", "status"),
    # Published: 90.88 with a deviation of 0.07, so that 0.5 points are allowed.
    [(91.38, "within"), (90.38, "within"), (91.39, "outside"), (90.37, "outside")],
)
def test_half_a_point_is_within_and_more_is_outside(tmp_path, records, to, status):
    score = scored(tmp_path, shifted(records, "resnet20", "dpf", 0.9, to))
    one = find(score, "DPF", "90%")
    assert (one.status, float(one.tolerance)) == (status, 0.5)
    assert one.difference == pytest.approx(to - 90.88)
    assert (score.run - score.within, score.score == 1) == (
        (0, True) if status == "within" else (1, False)
    )


@pytest.mark.parametrize(("to", "status"), [(84.5, "within"), (84.52, "outside")])
def test_two_published_deviations_are_within_where_they_are_more(tmp_path, records, to, status):
    # Published: 83.03 with a deviation of 0.74.
    one = find(
        scored(tmp_path, shifted(records, "resnet20", "sparse_momentum", 0.95, to)), "SM", "95%"
    )
    assert (one.status, float(one.tolerance)) == (status, 1.48)


def test_another_budget_is_another_protocol_and_does_not_count(tmp_path):
    records = everything(specs.load(TABLE), budget=BudgetSpec(epochs=3))
    score = scored(tmp_path, records)
    assert (score.run, score.score) == (0, None)
    one = find(score, "DPF", "90%")
    assert one.status == "another protocol"
    assert one.reasons == ("shorter budget: 3 epochs, the paper's is 300 epochs",)
    text = reproduction.report(score)
    assert "Reproduction score: not run" in text
    assert "shorter budget: 3 epochs" in text


def test_of_two_lengths_the_papers_own_counts(tmp_path, records):
    short = everything(specs.load(TABLE), budget=BudgetSpec(epochs=3))
    assert scored(tmp_path, [*short, *records]).score == 1.0


def test_a_diverged_seed_leaves_no_accuracy_and_counts_against(tmp_path, records):
    lost = next(i for i, one in enumerate(records) if one.spec.method == "dpf")
    records[lost] = dataclasses.replace(
        records[lost], status="diverged", reason="the loss is not finite", top1=None
    )
    score = scored(tmp_path, records)
    assert [one.method for one in score.attempts if one.status == "no accuracy"] == ["DPF"]
    assert score.run - score.within == 1
    (one,) = [one for one in score.attempts if one.status == "no accuracy"]
    assert (as_dict(one)["diverged"], one.seeds) == (1, 2)
    text = reproduction.report(score)
    assert re.search(r"\| +[0-9.]+ ± [0-9.]+, \* 1 of 3 \| +2 \|", text)
    assert "- `*`: this many seeds diverged; they are not in the mean.\n" in text


def test_a_diverged_seed_of_another_protocol_is_not_left_out_in_silence(tmp_path):
    records = everything(specs.load(TABLE), budget=BudgetSpec(epochs=3))
    lost = next(i for i, one in enumerate(records) if one.spec.method == "dpf")
    records[lost] = dataclasses.replace(
        records[lost], status="diverged", reason="the loss is not finite", top1=None
    )
    text = reproduction.report(scored(tmp_path, records))
    below = text.partition("another protocol\n")[2]
    assert ", * 1 of 3 |" in below
    assert below.endswith("- `*`: this many seeds diverged; they are not in the mean.\n")


def test_what_the_mark_says_differs_never_counts(tmp_path):
    score = scored(tmp_path, everything(specs.load("dpf-table2")))
    tuned = [one for one in score.attempts if "FT" in one.method]
    assert {one.status for one in tuned} == {"another protocol"}
    assert all("tunes" in one.reasons[0] for one in tuned)


def test_a_figure_remembered_of_a_paper_never_counts(tmp_path):
    score = scored(tmp_path, everything(specs.load("sparse-momentum-cifar10")))
    known = {one.name: one.status for one in score.attempts}
    assert known["sparse-momentum-cifar10, SM, VGG16-D, 5%"] == "another protocol"
    assert known["sparse-momentum-cifar10, SM, WRN-28-2, 10%"] == "within"


def test_the_report_names_what_is_outside_with_its_explanation(tmp_path, records, monkeypatch):
    file = tmp_path / "explanations.toml"
    file.write_text(
        '[[explanation]]\ntable = "dpf-table1"\nmodel = "ResNet-20"\nmethod = "DPF"\n'
        'target = "90%"\ntext = "the moon was full"\n'
    )
    monkeypatch.setattr(reproduction, "EXPLANATIONS", file)
    text = reproduction.report(
        scored(tmp_path / "records", shifted(records, "resnet20", "dpf", 0.9, 85.0))
    )
    assert "- dpf-table1, DPF, ResNet-20, 90%: the moon was full." in text
    assert f"| {85:.2f} ± 0.00 |" in text
    assert "-5.88" in text


def test_programs_get_the_four_keys_and_null_before_anything_was_run(tmp_path):
    data = scored(tmp_path, [record(spec("rigl", 0.5, 0), 90.0)]).as_dict()
    assert list(data) == ["run", "within", "score", "cells"]
    assert json.loads(json.dumps(data))["score"] is None
    assert (data["run"], data["within"]) == (0, 0)


def figures(paper: str) -> Iterator[PublishedCell]:
    """Every published cell with a figure that can be compared."""
    for table in papers.load(paper).tables.values():
        for one in table.cells:
            if any(FIELDS[name].published(one) for name in (*SCORED, *UNSCORED)):
                yield one


@pytest.mark.parametrize("paper", papers.names())
def test_every_published_figure_stands_in_a_table(paper):
    tables = [spec for spec in reproduction.tables() if spec.paper == papers.load(paper)]
    asked = {q.published for spec in tables for line in spec.lines for q in line}
    assert not [cell for cell in figures(paper) if cell not in asked]


@pytest.mark.parametrize("wrong", ['method = "lottery_ticket"', 'target = "13.5%"', 'figure = "e"'])
def test_an_explanation_of_no_published_figure_is_refused(wrong, tmp_path, records, monkeypatch):
    entry = {"table": "lth-lenet-gain", "model": "LeNet-300-100", "method": "ticket", "text": "?"}
    text = "".join(f'{k} = "{v}"\n' for k, v in entry.items() if not wrong.startswith(k))
    file = tmp_path / "explanations.toml"
    monkeypatch.setattr(reproduction, "EXPLANATIONS", file)
    file.write_text(f"[[explanation]]\n{text}{wrong}\n")
    with pytest.raises(
        SuiteError, match=r"explanations\.toml: lth-lenet-gain, .*: no published figure"
    ):
        scored(tmp_path / "records", records)


def ticket(seed: int, dense: int, own: int) -> Record:
    """A ticket of one round that stops early at `own`, and its dense network at `dense`."""
    asked = specs.load("lth-lenet-early")
    (question,) = (q for (q,) in asked.lines if q.published and q.published.earlier)
    phases = (
        PhaseResult("round-0", 9, 1.0, 9, "ok", least=Least(dense, 0.1, 97.0), top1=97.5),
        PhaseResult("round-1", 9, 0.2, 18, "ok", least=Least(own, 0.1, 98.0), top1=97.5),
    )
    return record(cell(question, "mnist", seed), 97.5, phases=phases, steps=18)


def test_a_figure_that_is_not_in_points_is_shown_and_does_not_count(tmp_path):
    score = scored(tmp_path, [ticket(0, 1000, 700), ticket(1, 1000, 900)])
    (one,) = (one for one in score.attempts if one.figure == "earlier")
    assert (one.status, one.mean, one.tolerance) == ("not scored", pytest.approx(20), None)
    assert (score.run, score.score) == (0, None)
    assert score.as_dict()["cells"][score.attempts.index(one)]["tolerance"] is None


def test_of_rows_by_other_protocols_the_one_that_differs_least_is_shown(tmp_path):
    table = specs.load(TABLE)
    short = everything(table, budget=BudgetSpec(epochs=3))
    other = everything(table, budget=BudgetSpec(epochs=3), recipe="plain", recipe_hash="f" * 12)
    one = find(scored(tmp_path, [*other, *short]), "DPF", "90%")
    assert one.status == "another protocol"
    assert one.reasons == ("shorter budget: 3 epochs, the paper's is 300 epochs",)


def test_rows_of_the_papers_protocol_that_differ_otherwise_do_not_count(tmp_path, records):
    others = [
        dataclasses.replace(one, spec=dataclasses.replace(one.spec, method_version=2))
        for one in records
    ]
    one = find(scored(tmp_path, [*records, *others]), "DPF", "90%")
    assert (one.status, one.reasons) == ("another protocol", ("several rows of demo fit",))


def test_the_leaderboard_and_the_page_tell_the_score(tmp_path, records):
    fill(tmp_path, manifest(*(one.spec for one in records)), *records)
    score = reproduction.reproduction(tmp_path)
    told = f"Reproduction score: 100 % ({score.within} of {score.run})"
    assert f"## {told}" in leaderboard(tmp_path)
    text = page(tmp_path, "Page")
    assert f"<h2>{told}</h2>" in text
    assert text.count("<td>within</td>") == score.run


def test_the_leaderboard_says_not_run_where_nothing_was(tmp_path):
    fill(tmp_path, manifest(spec("rigl", 0.5, 0)), record(spec("rigl", 0.5, 0), 90.0))
    assert "## Reproduction score: not run" in leaderboard(tmp_path)
    assert "<h2>Reproduction score: not run</h2>" in page(tmp_path, "Page")
