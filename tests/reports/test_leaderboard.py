"""The leaderboard in markdown, and its place in a document."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.errors import UsageError
from bench.reporting import leaderboard as command
from bench.spec import BudgetSpec
from bench.store import Cell, Manifest
from reports.leaderboard import BEGIN, END, leaderboard, placed
from tests.reports.records import SUITE, counts, fill, manifest, record, spec
from tests.reports.study import study
from tests.reports.test_landed_rows import TICKETS, rows_at, ticket
from tests.reports.test_suite_table import body


def shown(root: Path, *records) -> list[dict[str, str]]:
    fill(root, manifest(*(one.spec for one in records)), *records)
    return body(leaderboard(root))


def test_methods_stand_in_the_order_of_their_gap_to_the_best_and_the_best_is_bold(tmp_path):
    rows = shown(
        tmp_path,
        record(spec("set", 0.9), 95.0),
        record(spec("set", 0.98), 94.0),
        record(spec("rigl", 0.9), 97.0),
        record(spec("rigl", 0.98), 93.0),
        record(spec("dense", 0.0), 98.0),
    )
    assert [list(row.values()) for row in rows] == [
        ["dense", "1", "98.00", "", "", "", "1.00"],
        ["rigl", "1", "", "**97.00**", "93.00", "0.50", "1.00"],
        ["set", "1", "", "95.00", "**94.00**", "1.00", "1.00"],
    ]


def test_who_fails_at_the_hardest_sparsity_gains_nothing_by_it(tmp_path):
    rows = shown(
        tmp_path,
        record(spec("rigl", 0.9), 97.0),
        record(spec("rigl", 0.98), None, status="diverged"),
        record(spec("set", 0.9), 90.0),
        record(spec("set", 0.98), 80.0),
        record(spec("snip", 0.9), 92.0),
        record(spec("snip", 0.98), 79.0),
    )
    assert [row["method"] for row in rows] == ["snip", "set", "rigl"]
    assert (rows[2]["90"], rows[2]["98"], rows[2]["behind the best"]) == (
        "**97.00**",
        "* 1 of 1",
        "",
    )


def test_free_penalties_are_not_ranked_as_they_meet_at_no_sparsity(tmp_path):
    rows = shown(
        tmp_path,
        record(spec("l0", None), 99.0, counts=counts(0.5)),
        record(spec("str", None), 60.0, counts=counts(0.9)),
        record(spec("set", 0.9), 90.0),
        record(spec("snip", 0.9), 91.0),
    )
    assert [(row["method"], row["behind the best"]) for row in rows] == [
        ("snip", "0.00"),
        ("set", "1.00"),
        ("l0", ""),
        ("str", ""),
    ]


def test_n_is_the_seeds_with_a_record_from_the_fewest_to_the_most(tmp_path):
    asked = [spec("rigl", sparsity, seed) for sparsity in (0.9, 0.98) for seed in (0, 1)]
    fill(tmp_path, manifest(*asked), *(record(of) for of in asked[:3]))
    (row,) = body(leaderboard(tmp_path))
    assert row["n"] == "1 to 2"
    assert "not run; 1 cell without a record" in leaderboard(tmp_path)


def test_a_cell_that_answers_several_rows_is_missing_once(tmp_path):
    ran, absent = TICKETS
    rows = [*rows_at(ran, 0.5, 0.9), *rows_at(absent, 0.5, 0.9)]
    fill(tmp_path, Manifest(SUITE, "Tickets", tuple(rows)), ticket(ran, 97.0, 95.0))
    assert "not run; 1 cell without a record" in leaderboard(tmp_path)


def test_a_row_that_is_skipped_under_the_key_of_another_is_not_missing(tmp_path):
    dense = spec("dense", 0.0)
    why = "this model has no width"
    skipped = Cell("small_dense", dense, 100, 1.0, 0, sparsity=0.9, skipped=why)
    asked = (*manifest(dense).cells, skipped)
    fill(tmp_path, Manifest(SUITE, "Demo", asked), record(dense))
    assert "without a record" not in leaderboard(tmp_path)


def test_who_had_more_steps_is_not_what_others_are_measured_with(tmp_path):
    long = BudgetSpec(epochs=100.0)
    rows = shown(
        tmp_path,
        record(spec("rigl"), 95.0),
        record(spec("set"), 94.0),
        record(spec("rigl", budget=long), 98.0),
        record(spec("set", budget=long), 97.5),
    )
    assert sorted(list(row.values())[:6] for row in rows) == [
        ["rigl", "10 epochs", "1", "**95.00**", "0.00", "1.00"],
        ["rigl", "100 epochs", "1", "**98.00**", "0.00", "1.00"],
        ["set", "10 epochs", "1", "94.00", "1.00", "1.00"],
        ["set", "100 epochs", "1", "97.50", "0.50", "1.00"],
    ]


def test_each_model_and_each_suite_has_a_table_of_its_own(tmp_path):
    small, large = spec("rigl"), spec("rigl", model="resnet20")
    fill(tmp_path, Manifest(SUITE, "Demo", manifest(small, large).cells), *map(record, [small]))
    study(tmp_path / "more")
    assert leaderboard(tmp_path).count(": top-1 % by sparsity %") == 2
    assert "## Demo (demo, lenet): top-1 % by sparsity %" in leaderboard(tmp_path)
    assert "(hostile, lenet)" in leaderboard(tmp_path / "more")


def test_the_board_stands_between_its_marks_and_the_rest_stays():
    document = f"# Reports\n\n{BEGIN}\nold\n{END}\n\nHow to read it.\n"
    renewed = placed(document, "## Board\n\nnew\n", "README.md")
    assert renewed == f"# Reports\n\n{BEGIN}\n\n## Board\n\nnew\n\n{END}\n\nHow to read it.\n"
    assert placed(renewed, "## Board\n\nnew\n", "README.md") == renewed


@pytest.mark.parametrize(
    "document", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n" * 2]
)
def test_a_document_without_its_marks_is_refused_and_stays_as_it_is(document, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(document, encoding="utf-8")
    with pytest.raises(UsageError, match=r"README\.md: no place for the leaderboard"):
        command(study(tmp_path / "records"), path, None, None)
    assert path.read_text(encoding="utf-8") == document


def test_the_command_prints_the_board_or_writes_it_and_the_page(tmp_path, capsys):
    root, document, page = study(tmp_path / "records"), tmp_path / "a.md", tmp_path / "a.html"
    command(root, None, None, None)
    assert capsys.readouterr().out == leaderboard(root) + "\n"
    document.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    command(root, document, page, "Mine")
    assert capsys.readouterr().out == f"{document}\n{page}\n"
    assert leaderboard(root).strip() in document.read_text(encoding="utf-8")
    assert "<title>Mine</title>" in page.read_text(encoding="utf-8")


def test_a_title_without_a_page_and_a_folder_that_is_not_there_are_usage_errors(tmp_path):
    root = study(tmp_path / "records")
    with pytest.raises(UsageError, match="--title Mine: is for the page"):
        command(root, None, None, "Mine")
    with pytest.raises(UsageError, match=r"missing\.md"):
        command(root, tmp_path / "missing.md", None, None)
