"""Folders of records joined: byte for byte, each once, and nothing where they contradict."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench.errors import RecordError, UsageError
from bench.store import Manifest, Store, write_atomically
from reports.folders import stores
from reports.merge import merge
from reports.suite_table import report
from tests.reports.records import SUITE, fill, manifest, record, spec
from tests.reports.test_compare import command
from tests.reports.test_suite_table import body

ONE, TWO, THREE = (spec(seed=seed) for seed in range(3))


def tree(root: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path in it."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def machines(tmp_path):
    """Two folders: ONE and TWO, and TWO (equal) and THREE."""
    a = fill(tmp_path / "a", manifest(ONE, TWO), record(ONE), record(TWO, 97.0))
    b = fill(tmp_path / "b", manifest(THREE, TWO), record(THREE), record(TWO, 97.0))
    return a, b


def test_records_of_two_machines_lie_together_byte_for_byte(machines, tmp_path):
    a, b = machines
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    out = Store(tmp_path / "out", SUITE)
    for place, of in ((a, ONE), (a, TWO), (b, TWO), (b, THREE)):
        assert out.path(of).read_bytes() == place.path(of).read_bytes()
    assert len(out.paths()) == 3


def test_the_list_of_cells_holds_the_firsts_and_then_the_others(machines, tmp_path):
    for name in ("a", "b"):
        assert len(stores(tmp_path / name)[SUITE].manifest().cells) == 2
    (joined,) = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    cells = Store(tmp_path / "out", SUITE).manifest().cells
    assert [cell.spec.seed for cell in cells] == [0, 1, 2]
    assert joined.manifest.title == "Demonstration"
    (row,) = body(report(tmp_path / "out"))
    assert row["n"] == "3"


def test_a_second_merge_changes_nothing(machines, tmp_path):
    sources, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "out"
    machines[0].put(record(THREE, status="failed"))
    (first,) = merge(sources, out)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    (again,) = merge(sources, out)
    assert (len(first.copies), len(again.copies)) == (4, 0)
    assert {
        path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")
    } == before
    (reversed_,) = merge(sources[::-1], out)
    assert reversed_.copies == {}


def test_a_folder_that_holds_records_takes_those_of_others(machines, tmp_path):
    before = tree(tmp_path / "a")
    (joined,) = merge([tmp_path / "b"], tmp_path / "a")
    after = tree(tmp_path / "a")
    assert (joined.records, len(joined.copies)) == (3, 1)
    assert [cell.spec.seed for cell in joined.manifest.cells] == [0, 1, 2]
    manifest_name = f"{SUITE}/suite.json"
    kept = {name: content for name, content in before.items() if name != manifest_name}
    assert kept.items() <= after.items()


def test_all_suites_are_joined_and_a_suites_own_folder_is_a_source_too(machines, tmp_path):
    other = Store(tmp_path / "b", "other")
    other.put_manifest(manifest(ONE))
    other.put(record(ONE, 91.0))
    found = merge([tmp_path / "a", tmp_path / "b" / "other"], tmp_path / "out")
    assert [joined.target.suite for joined in found] == [SUITE, "other"]
    assert sorted(stores(tmp_path / "out")) == [SUITE, "other"]
    assert not Store(tmp_path / "out", SUITE).has(THREE)


def test_two_different_records_of_one_cell_stop_everything(machines, tmp_path):
    c = fill(tmp_path / "c", manifest(ONE, TWO), record(ONE, 12.0), record(TWO, 12.0))
    with pytest.raises(RecordError) as caught:
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    text = str(caught.value)
    paths = [store.path(cell) for cell in (ONE,) for store in (machines[0], c)]
    assert all(str(path) in text for path in paths)
    assert "two different records of one cell. So do 1 other pair." in text
    assert not (tmp_path / "out").exists()


def test_of_two_different_records_the_first_is_kept_on_demand(machines, tmp_path):
    fill(tmp_path / "c", manifest(ONE), record(ONE, 12.0))
    (joined,) = merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out", keep_first=True)
    out = Store(tmp_path / "out", SUITE)
    assert out.path(ONE).read_bytes() == machines[0].path(ONE).read_bytes()
    assert [path.parts[-3] for path in joined.left_aside] == ["c"]
    assert str(joined).endswith(f"left aside: {joined.left_aside[0]}")
    merge([tmp_path / "c"], tmp_path / "out", keep_first=True)  # what lies there came first
    assert out.path(ONE).read_bytes() == machines[0].path(ONE).read_bytes()


def test_failed_attempts_of_all_machines_are_kept_under_numbers_of_their_own(tmp_path):
    for name, reasons in (("a", ("same", "first")), ("b", ("same", "second", "third"))):
        store = fill(tmp_path / name, manifest(ONE))
        for reason in reasons:
            store.put(record(ONE, status="failed", reason=reason))
    (joined,) = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    out = Store(tmp_path / "out", SUITE)
    assert joined.attempts == 4
    assert [p.name for p in out.attempt_paths()] == [f"{ONE.slug}-{n}.json" for n in (1, 2, 3, 4)]
    assert {one.reason for one in out.attempts()} == {"same", "first", "second", "third"}


def test_equal_failed_attempts_of_one_machine_are_all_kept_and_not_multiplied(tmp_path):
    for name, tries in (("a", 1), ("b", 2)):
        store = fill(tmp_path / name, manifest(ONE))
        for _ in range(tries):
            store.put(record(ONE, status="failed", reason="same"))
    sources, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "out"
    (joined,) = merge(sources, out)
    assert (joined.attempts, len(Store(out, SUITE).attempts())) == (2, 2)
    for again in (sources, sources[::-1], [tmp_path / "b"]):
        (joined,) = merge(again, out)
        assert (joined.attempts, joined.copies) == (2, {})


def test_lists_that_contradict_each_other_stop_everything(machines, tmp_path):
    b = machines[1]
    cells = tuple(dataclasses.replace(cell, steps=999) for cell in b.manifest().cells)
    b.put_manifest(Manifest(SUITE, "", cells))
    with pytest.raises(
        RecordError, match=r"a/demo/suite\.json and .*b/demo/suite\.json: they do not"
    ):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cell_is_skipped_where_one_machine_knows_why_and_none_has_run_it(tmp_path):
    fill(tmp_path / "a", manifest(ONE, TWO))
    b = fill(tmp_path / "b", manifest(ONE, TWO))
    cells = (dataclasses.replace(cell, skipped="no masks") for cell in b.manifest().cells)
    b.put_manifest(Manifest(SUITE, "", tuple(cells)))
    fill(tmp_path / "c", manifest(TWO), record(TWO))
    sources = [tmp_path / name for name in "abc"]
    for order in (sources, sources[::-1]):
        (joined,) = merge(order, tmp_path / f"out of {order[0].name}")
        found = {cell.spec.seed: cell.skipped for cell in joined.manifest.cells}
        assert found == {0: "no masks", 1: ""}


def test_rows_that_one_cell_answers_stay_apart(tmp_path):
    (cell,) = manifest(ONE).cells
    rounds = tuple(dataclasses.replace(cell, sparsity=asked) for asked in (0.5, 0.8))
    fill(tmp_path / "a", Manifest(SUITE, "", rounds[:1]), record(ONE))
    fill(tmp_path / "b", Manifest(SUITE, "", rounds), record(ONE))
    (joined,) = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert [cell.sparsity for cell in joined.manifest.cells] == [0.5, 0.8]
    assert joined.records == 1


@pytest.mark.parametrize("inside", ["", "attempts"])
def test_an_edited_record_stops_everything(inside, machines, tmp_path):
    status = "failed" if inside else "ok"
    path = machines[1].put(record(spec(seed=7), status=status))
    path.write_bytes(path.read_bytes().replace(b'"seed":7', b'"seed":8'))
    with pytest.raises(RecordError, match=f"{path.name}: the file was edited or renamed"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_without_records_is_named(tmp_path):
    with pytest.raises(RecordError, match="nowhere: no records there; give a folder of records"):
        merge([tmp_path / "nowhere"], tmp_path / "out")


def test_a_target_with_records_but_no_list_of_cells_is_left_alone(machines, tmp_path):
    (machines[0].folder / "suite.json").unlink()
    before = tree(tmp_path / "a")
    with pytest.raises(RecordError, match=r"suite\.json: no such file"):
        merge([tmp_path / "b"], tmp_path / "a")
    assert tree(tmp_path / "a") == before


def test_a_target_that_cannot_be_written_is_a_mistake_of_the_user(machines, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match=r"--out .*out: cannot write there"):
        merge([tmp_path / "a"], tmp_path / "out")


def test_weights_and_masks_come_along_only_if_asked_for(machines, tmp_path):
    a, b = machines
    write_atomically(a.weights(ONE), b"weights of one")
    write_atomically(b.masks(TWO) / "train.safetensors", b"masks of two")
    write_atomically(b.checkpoint(ONE), b"unfinished")
    sources = [tmp_path / "a", tmp_path / "b"]
    merge(sources, tmp_path / "out")
    out = Store(tmp_path / "out", SUITE)
    assert not (out.folder / "weights").exists()
    merge(sources, tmp_path / "out", with_weights=True)
    assert out.weights(ONE).read_bytes() == b"weights of one"
    assert (out.masks(TWO) / "train.safetensors").read_bytes() == b"masks of two"
    assert not (out.folder / "checkpoints").exists()


def test_weights_are_those_of_the_record_that_was_kept(machines, tmp_path):
    c = fill(tmp_path / "c", manifest(ONE), record(ONE, 12.0))
    write_atomically(c.weights(ONE), b"of the record left aside")
    sources = [tmp_path / "a", tmp_path / "c"]
    merge(sources, tmp_path / "out", keep_first=True, with_weights=True)
    assert not Store(tmp_path / "out", SUITE).weights(ONE).exists()


def test_the_command_says_what_it_did(machines, monkeypatch, capsys, tmp_path):
    sources, out = (tmp_path / "a", tmp_path / "b"), tmp_path / "out"
    assert command(monkeypatch, "merge", *sources, "--out", out) == 0
    assert capsys.readouterr().out == (
        f"{out / SUITE}: 3 cells, 3 records, 0 failed attempts; 3 files copied\n"
    )


def test_the_command_ends_with_status_2_where_records_differ(machines, monkeypatch, tmp_path):
    fill(tmp_path / "c", manifest(ONE), record(ONE, 12.0))
    arguments = ("merge", tmp_path / "a", tmp_path / "c", "--out", tmp_path / "out")
    assert command(monkeypatch, *arguments) == 2
    assert command(monkeypatch, *arguments, "--keep-first") == 0
