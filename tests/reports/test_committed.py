"""Tables between marks: found, made anew, and never by a command that does more than print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.errors import RecordError, UsageError
from bench.store import Store
from reports import committed
from reports.committed import Block, blocks, documents, write
from tests.reports.records import fill, manifest, record, spec
from tests.reports.test_compare import command

ROOT = Path(__file__).parents[2]

MARK = "<!-- sparsebench report demo -->"
TEXT = f"# Title\n\n{MARK}\n\n| a |\n\n<!-- end -->\n\nMore.\n"


def says(*lines: str):
    """A command line that prints this, whatever it is asked."""

    def run(_: Sequence[str]) -> str:
        return "\n".join(lines) + "\n\n"

    return run


def refuses(_: Sequence[str]) -> str:
    raise AssertionError("a command was run")


@pytest.fixture
def document(tmp_path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_table_that_the_command_still_prints_has_no_difference(document):
    (found,) = documents([document], says("| a |"))
    assert (found.difference, found.renewed, found.blocks) == ("", TEXT, 1)


def test_a_table_that_changed_is_shown_as_a_unified_diff(document):
    (found,) = documents([document], says("| b |", "", "- a note"))
    assert found.difference.startswith(f"--- {document}\n+++ {document} as the records give it\n")
    assert [line for line in found.difference.splitlines()[3:] if line[0] != " "] == [
        "-| a |",
        "+| b |",
        "+",
        "+- a note",
    ]
    assert document.read_text(encoding="utf-8") == TEXT


def test_writing_renews_the_tables_and_nothing_else(document):
    (found,) = documents([document], says("| b |"))
    write(found)
    assert document.read_text(encoding="utf-8") == TEXT.replace("| a |", "| b |")
    (again,) = documents([document], says("| b |"))
    assert again.difference == ""


def test_a_new_pair_of_marks_is_filled(document):
    document.write_text(f"{MARK}\n<!-- end -->", encoding="utf-8")
    (found,) = documents([document], says("| a |"))
    assert found.renewed == f"{MARK}\n\n| a |\n\n<!-- end -->"


def test_every_table_gets_the_words_of_its_own_command(document):
    marks = ("report demo --records 'my records'", "compare a b")
    document.write_text(
        "\n\n".join(f"<!-- sparsebench {mark} -->\n<!-- end -->" for mark in marks),
        encoding="utf-8",
    )
    (found,) = documents([document], lambda words: f"{len(words)}: {words[-1]}")
    assert found.renewed == (
        f"<!-- sparsebench {marks[0]} -->\n\n4: my records\n\n<!-- end -->\n\n"
        f"<!-- sparsebench {marks[1]} -->\n\n3: b\n\n<!-- end -->"
    )


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("run smoke", "allowed are compare, report, show"),
        ("--help", "allowed are compare"),
        ("merge a --out b", "not allowed here"),
        ("baseline smoke --out f", "not allowed here"),
        ("report --write", "--write is not allowed"),
        ("report --check", "--check is not allowed"),
        ("report demo --out=x", "--out=x is not allowed"),
        ("report --help", "--help is not allowed"),
        ("report 'demo", "No closing quotation"),
    ],
)
def test_a_command_that_does_more_than_print_is_never_run(command, said, document):
    document.write_text(f"\n<!-- sparsebench {command} -->\n<!-- end -->\n", encoding="utf-8")
    with pytest.raises(UsageError, match=rf"page\.md:2: sparsebench {command}: .*{said}"):
        documents([document], refuses)


def test_a_command_that_fails_is_told_with_its_place(document):
    def fails(_: Sequence[str]) -> str:
        raise RecordError("demo: no records.")

    with pytest.raises(UsageError, match=r"page\.md:3: demo: no records\."):
        documents([document], fails)


@pytest.mark.parametrize("text", [f"{MARK}\n| a |\n", f"a\n{MARK}\n{MARK}\n<!-- end -->\n"])
def test_a_table_without_an_end_is_named(text, document):
    document.write_text(text, encoding="utf-8")
    number = text.split("\n").index(MARK) + 1
    with pytest.raises(
        UsageError, match=rf"page\.md:{number}: this table has no end; expected <!-"
    ):
        documents([document], refuses)


def test_code_and_other_comments_are_no_marks():
    lines = [
        "```text",
        MARK,
        "~~~",
        "```",
        "~~~~",
        MARK,
        "~~~",
        "~~~~",
        f"Write `{MARK}`.",
        "<!-- tox run -e matrix -->",
        "<!-- end -->",
        MARK,
        "x",
    ]
    assert list(blocks([*lines, "<!-- end -->"], "page")) == [Block(11, 13, MARK[5:-4])]


@pytest.mark.parametrize(
    "wrong",
    [
        f"  {MARK}",
        f"Write {MARK}.",
        f"{MARK} ",
        "<!--sparsebench report demo-->",
        "<!-- Sparsebench report demo -->",
        "<!-- sparsebench report demo\n-->",
        "<!--\nsparsebench report demo -->",
        "<!-- sparsebench report demo",
        "<!--leaderboard: begin-->",
        "<!-- leaderboard: end -->",
    ],
)
def test_what_looks_like_a_mark_and_is_none_is_refused_with_its_line(wrong, document):
    document.write_text(f"{TEXT}\n{wrong}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"page\.md:11: this looks like a table's mark and is no"):
        documents([document], says("| a |"))


def test_a_comment_in_a_table_is_not_looked_at(document):
    document.write_text(TEXT.replace("| a |", "```\n  <!-- sparsebench -->"), encoding="utf-8")
    (found,) = documents([document], says("| a |"))
    assert found.renewed == TEXT


def test_a_document_keeps_its_ends_of_lines(document):
    text = TEXT.replace("\n", "\r\n")
    document.write_bytes(text.encode())
    (same,) = documents([document], says("| a |"))
    assert (same.difference, same.renewed) == ("", text)
    (found,) = documents([document], says("| b |", "| c |"))
    write(found)
    assert document.read_bytes().decode() == text.replace("| a |", "| b |\r\n| c |")


def test_a_generated_page_part_has_marks_of_its_own(document, monkeypatch):
    monkeypatch.setitem(committed.GENERATED, "leaderboard", lambda: "| new |\n")
    text = "<!-- leaderboard: begin -->\n\n| {} |\n\n<!-- leaderboard: end -->\n"
    document.write_text(text.format("old"), encoding="utf-8")
    (found,) = documents([document], refuses)
    assert found.renewed == text.format("new")


def test_a_check_that_would_check_nothing_is_refused(document, tmp_path, monkeypatch):
    empty = tmp_path / "empty.md"
    empty.write_text("# Nothing\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"empty\.md: no table to check; one stands between"):
        documents([document, empty], says("| a |"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"README\.md, reports/README\.md.*: no table to check"):
        documents([], refuses)
    document.rename("README.md")
    Path("reports").mkdir()
    empty.rename("reports/README.md")
    assert [one.path for one in documents([], says("| a |"))] == [Path("README.md")]


def test_a_document_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.md: cannot read the document"):
        documents([tmp_path / "none.md"], refuses)


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Path:
    """A folder with records, and a document with a mark and no table yet."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "records", manifest(spec()), record(spec()))
    document = Path("page.md")
    document.write_text(f"# Title\n\n{MARK}\n<!-- end -->\n", encoding="utf-8")
    return document


def test_the_command_finds_a_table_that_differs_and_renews_it(suite, monkeypatch, capsys):
    assert command(monkeypatch, "report", "--check", suite) == 1
    said = capsys.readouterr().out
    assert "+| rigl " in said
    assert said.endswith(
        "page.md: not as the records give; to renew: sparsebench report --write page.md\n"
    )
    assert command(monkeypatch, "report", "--write", suite) == 0
    assert capsys.readouterr().out == "page.md: 1 table, written\n"
    assert command(monkeypatch, "report", "--check", suite) == 0
    assert capsys.readouterr().out == "page.md: 1 table, as the records give\n"


def test_the_table_that_the_command_writes_is_what_a_reader_gets(suite, monkeypatch, capsys):
    command(monkeypatch, "report", "--write", suite)
    capsys.readouterr()
    command(monkeypatch, "report", "demo")
    assert capsys.readouterr().out.strip() in suite.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("report none", "none/suite.json: no such file"),
        ("report --by-colour", "No such option: --by-colour"),
        ("check demo", "check demo: not allowed here"),
    ],
)
def test_a_wrong_mark_ends_with_status_2_and_changes_nothing(
    mark, said, suite, monkeypatch, capsys
):
    text = f"a\n<!-- sparsebench {mark} -->\nold\n<!-- end -->\n"
    suite.write_text(text, encoding="utf-8")
    assert command(monkeypatch, "report", "--write", suite) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparsebench: page.md:2: ")
    assert said in error
    assert suite.read_text(encoding="utf-8") == text


def test_an_edited_record_ends_the_check_with_status_2(suite, monkeypatch, capsys):
    path = Store(Path("records"), "demo").path(spec())
    path.write_bytes(path.read_bytes().replace(b'"seed":0', b'"seed":1'))
    assert command(monkeypatch, "report", "--check", suite) == 2
    assert "the file was edited or renamed" in capsys.readouterr().err


def test_the_tables_of_the_repository_are_what_its_records_give(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status = command(monkeypatch, "report", "--check")
    assert status == 0, capsys.readouterr().out
