"""The folder of records: written once, whole or not at all, and never trusted blindly."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from bench import store
from bench.errors import RecordError, UnknownName
from bench.record import SCHEMA, CurvePoint, LayerCount, MaskUpdate, Record, decode, encode
from bench.store import BULK, Store, find, read, write_atomically
from bench.sweep import sweep
from tests.bench.cells import spec
from tests.reports.records import ENVIRONMENT, fill, manifest
from tests.reports.records import record as record_of


def record(**changes: object) -> Record:
    return record_of(spec(), **changes)


@pytest.fixture
def place(tmp_path):
    return Store(tmp_path, "demo")


def test_a_record_comes_back_as_it_was_put(place):
    one = record(curve=(CurvePoint(1, 2.5), CurvePoint(2, 1.5, 0.5, 97.25)), reason="ünïcode")
    assert place.get(one.spec) is None
    path = place.put(one)
    assert path == place.path(one.spec) == place.folder / f"{one.spec.slug}.json"
    assert place.get(one.spec) == one
    assert list(place.records()) == [one]


def test_a_brief_record_is_the_record_without_its_bulk(place):
    layer = LayerCount("w", (2, 3), 6, 3, 60, 30, True)
    update = MaskUpdate(1, 0.5, 0.1, 0.9, 0.2)
    points, counts = (CurvePoint(1, 2.5),), (1, 2)
    whole = record(layers=(layer,), curve=points, mask_updates=(update,), last_changes=counts)
    path = place.put(whole)
    light = dataclasses.replace(whole, **dict.fromkeys(BULK, ()))
    assert light != whole
    assert place.get(whole.spec, brief=True) == light
    assert list(place.records(brief=True)) == [light]
    assert read(path) == whole


@pytest.mark.parametrize("status", ["ok", "diverged"])
def test_whether_there_is_a_record_is_known_without_reading_it(status, place):
    assert not place.has(spec())
    place.put(record(status="failed"))
    assert not place.has(spec())
    place.put(record(status=status)).write_bytes(b"damaged")
    assert place.has(spec())


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (b'"schema":1', b'"schema":99', "schema 99, but this version reads 1"),
        (b'"top1":98.0', b'"top1":"high"', r"damaged record \(Expected `float \| null`"),
        (b'"seed":0', b'"seed":7', "the file was edited or renamed"),
        (b'"curve":[', b'"curve":[,', "damaged record"),
    ],
)
def test_a_brief_look_finds_the_same_faults(old, new, text, place):
    path = place.put(record())
    damaged = path.read_bytes().replace(old, new)
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    for brief in (False, True):
        with pytest.raises(RecordError, match=text):
            read(path, brief=brief)


def test_a_record_is_readable_json_in_the_order_of_its_fields(place):
    text = place.put(record()).read_text(encoding="utf-8")
    assert list(json.loads(text)) == [field.name for field in dataclasses.fields(Record)]
    assert text.endswith("}\n")


@pytest.mark.parametrize("status", ["ok", "diverged", "invalid"])
def test_a_final_record_is_written_once(status, place):
    place.put(record(status=status))
    before = place.path(spec()).read_bytes()
    with pytest.raises(
        RecordError, match=r"this cell has a record already; records are never edited"
    ):
        place.put(record(top1=12.0))
    assert place.path(spec()).read_bytes() == before


def test_a_failed_attempt_lies_aside_and_the_cell_stays_to_do(place):
    paths = [place.put(record(status="failed", reason=str(n))) for n in range(3)]
    slug = spec().slug
    assert [path.name for path in paths] == [f"{slug}-{n}.json" for n in (1, 2, 3)]
    assert {path.parent.name for path in paths} == {"attempts"}
    assert [decode(path.read_bytes(), "").reason for path in paths] == ["0", "1", "2"]
    assert place.get(spec()) is None
    assert list(place.records()) == []


def test_an_attempt_never_takes_the_place_of_another(place):
    first = place.put(record(status="failed", reason="first"))
    second = place.put(record(status="failed", reason="second"))
    first.unlink()
    place.put(record(status="failed", reason="third"))
    assert decode(second.read_bytes(), "").reason == "second"
    assert len(list(second.parent.iterdir())) == 2


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_breaks_off_leaves_what_was_there(fails, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def breaks(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(*((os, "fsync") if fails == "fsync" else (Path, "replace")), breaks)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"


def test_a_write_is_on_disk_before_the_old_file_goes(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(
        Path, "replace", lambda one, other: (calls.append("replace"), replace(one, other))
    )
    write_atomically(tmp_path / "deep" / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder's names
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("moment", "write", "left"),
    [
        ((os, "fsync"), write_atomically, b"own"),
        ((Path, "hardlink_to"), store.write_once, b"the other's"),
    ],
)
def test_a_process_of_equal_number_on_a_shared_folder_is_not_in_the_way(
    moment, write, left, tmp_path, monkeypatch
):
    path, real = tmp_path / "file", getattr(*moment)

    def other_first(*arguments: object) -> None:
        monkeypatch.setattr(*moment, real)
        write(path, b"the other's")
        real(*arguments)

    monkeypatch.setattr(*moment, other_first)
    write(path, b"own")
    assert path.read_bytes() == left
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_left_is_swept_once_its_cell_is_done(place, monkeypatch):
    place.put_manifest(manifest(spec()))
    left: list[Path] = []
    fsync, hardlink = os.fsync, Path.hardlink_to

    def noted() -> None:
        left.extend(path for path in place.folder.iterdir() if path.name.startswith("."))

    monkeypatch.setattr(os, "fsync", lambda file: (noted(), fsync(file)))
    monkeypatch.setattr(Path, "hardlink_to", lambda one, other: (noted(), hardlink(one, other)))
    place.put(record())
    assert {path.suffix for path in left} == {".tmp", ".new"}
    for path in left:
        path.write_bytes(b"half")
    sweep(place, [spec()])
    assert not any(path.exists() for path in left)


def test_what_a_broken_write_left_is_no_record(place, monkeypatch):
    place.put(record())

    def breaks(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", breaks)
        with pytest.raises(OSError, match="disk full"):
            place.put(record_of(spec(seed=1)))
    assert len(list(place.records())) == 1
    assert place.get(spec(seed=1)) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged record"),
        (b"{", "damaged record"),
        (b"\xff\xfe", "damaged record"),
        (b"[]", "schema None, but this version reads 1"),
        (b"{}", "schema None, but this version reads 1"),
        (b'{"schema": 1}', "damaged record"),
        (b'{"schema": 2}', "schema 2, but this version reads 1"),
    ],
)
def test_a_damaged_record_is_named_with_what_to_do(content, said, place):
    path = place.put(record())
    path.write_bytes(content)
    for reads in (lambda: place.get(spec()), lambda: list(place.records()), lambda: read(path)):
        with pytest.raises(RecordError) as caught:
            reads()
        message = str(caught.value)
        assert message.startswith(f"{path}: {said}")
        assert message.endswith("Move it away and run the suite again.")
        assert "\n" not in message
    assert path.read_bytes() == content


def edit(path: Path, **changes: object) -> None:
    """Writes other values into a record by hand."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    for place, value in changes.items():
        part = raw
        *above, last = place.split("__")
        for name in above:
            part = part[name]
        part[last] = value
    path.write_text(json.dumps(raw), encoding="utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        {"top1": "98"},
        {"status": "fine"},
        {"curve": [["one", 2.0]]},
        {"spec__budget": {"epochs": 1, "steps": 1}},
        {"spec__seed": 0.5},
    ],
    ids=str,
)
def test_a_record_with_a_wrong_field_is_named(changes, place):
    path = place.put(record())
    edit(path, **changes)
    with pytest.raises(RecordError, match="damaged record"):
        read(path)


@pytest.mark.parametrize("changes", [{"spec__seed": 1}, {"spec__sparsity": 0.5}], ids=str)
def test_an_edited_question_is_found_by_its_key(changes, place):
    path = place.put(record())
    edit(path, **changes)
    with pytest.raises(RecordError, match=r"was edited or renamed \(its content has key"):
        place.get(spec())


def test_a_renamed_record_is_found_by_its_key(place):
    path = place.put(record())
    other = place.path(spec(seed=1))
    path.rename(other)
    with pytest.raises(RecordError, match=f"{other.name}: the file was edited or renamed"):
        place.get(spec(seed=1))


def test_a_copy_under_another_name_is_found_though_its_key_is_right(place):
    path = place.put(record())
    other = path.with_name(f"mine-{path.name}")
    other.write_bytes(path.read_bytes())
    with pytest.raises(RecordError, match=rf"{other.name}: .* belongs to {spec().slug}\)"):
        list(place.records(brief=True))


def test_an_edited_attempt_is_found_by_its_key(place):
    path = place.put(record(status="failed"))
    edit(path, spec__seed=1)
    with pytest.raises(RecordError, match=f"{path.name}: the file was edited or renamed"):
        place.attempts()


def test_a_record_from_before_a_field_was_added_is_read_with_that_field_unknown(place):
    path = place.put(record())
    raw = json.loads(path.read_text(encoding="utf-8"))
    later = ("train_macs", "execution", "expected", "mask_updates", "last_changes", "phases")
    for name in later:
        del raw[name]
    for name in ("live", "live_macs", "compact", "elementwise", "filters"):
        del raw["counts"][name]
    for name in ("init", "source", "prunable"):
        del raw["spec"][name]
    path.write_text(json.dumps(raw), encoding="utf-8")
    assert read(path) == read(path, brief=True) == record(execution=None)


@pytest.mark.parametrize(("schema", "newer"), [("0", False), ("null", False), ("2", True)])
def test_a_record_of_another_schema_says_whether_it_is_a_newer_one(schema, newer, place):
    path = place.put(record())
    old = path.read_bytes()
    path.write_bytes(old.replace(b'"schema":1', f'"schema":{schema}'.encode()))
    with pytest.raises(RecordError, match="but this version reads 1") as caught:
        list(place.records(brief=True))
    assert ("a newer sparsebench wrote it" in str(caught.value)) == newer


@pytest.mark.parametrize(
    "points", [(CurvePoint(1, 3e38), CurvePoint(2, 1e-45)), (CurvePoint(1, 0.1, None, 0.0),)]
)
def test_extreme_but_finite_numbers_come_back(points, place):
    one = record(curve=points, top1=0.0, top5=None)
    assert decode(encode(one), "") == one


def test_a_record_without_measurements_comes_back():
    bare = Record(
        SCHEMA, "demo", "rigl", spec(), "failed", ENVIRONMENT, record().times, reason="why"
    )
    assert decode(encode(bare), "") == bare


def test_the_list_of_cells_comes_back(place):
    asked = manifest(spec(), spec(seed=1), title="Títle")
    place.put_manifest(asked)
    assert place.manifest() == asked
    place.put_manifest(manifest(spec(seed=2)))  # the suite changed
    assert [cell.spec.seed for cell in place.manifest().cells] == [2]
    assert list(place.records()) == []


def test_a_missing_list_of_cells_is_named_with_what_to_do(place):
    with pytest.raises(
        RecordError, match=r"suite\.json: no such file\. Run the suite first: .* demo\.toml$"
    ):
        place.manifest()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff"])
def test_a_damaged_list_of_cells_is_named_with_what_to_do(content, place):
    place.put_manifest(manifest(spec()))
    (place.folder / "suite.json").write_bytes(content)
    with pytest.raises(
        RecordError, match=r"suite\.json: damaged list of cells .* Delete it and run"
    ):
        place.manifest()


def test_suites_are_the_folders_with_a_list_of_cells(tmp_path):
    assert store.suites(tmp_path / "none") == []
    for name in ("b", "a"):
        Store(tmp_path, name).put_manifest(manifest(spec()))
    (tmp_path / "c").mkdir()
    assert store.suites(tmp_path) == ["a", "b"]


def test_a_cell_is_found_by_key_part_of_a_key_and_file_name(tmp_path):
    one, two = spec(seed=0), spec(seed=1)
    place = fill(tmp_path, manifest(one, two), record_of(one), record_of(two))
    names = [one.key, one.key[:7], one.slug, f"{one.slug}.json", "seed0", f"demo/{one.slug}"]
    for name in names:
        assert find(tmp_path, name) == place.path(one)


def test_a_cell_that_failed_before_is_still_found_by_its_key_and_file_name(tmp_path):
    store = fill(tmp_path, manifest(spec()), record(status="failed"), record())
    for name in (spec().key, spec().slug, f"{spec().slug}.json"):
        assert find(tmp_path, name) == store.path(spec())


def test_of_a_cell_that_only_failed_the_last_try_is_found(tmp_path):
    store = Store(tmp_path, "demo")
    tries = [store.put(record(status="failed", reason=str(n))) for n in range(11)]
    for name in (spec().key, spec().slug):
        assert find(tmp_path, name) == tries[-1]
    for name in (tries[0].stem, tries[0].name, f"demo/attempts/{tries[0].name}"):
        assert find(tmp_path, name) == tries[0]


def test_failed_tries_of_two_cells_are_several(tmp_path):
    store = Store(tmp_path, "demo")
    for seed in (0, 0, 1):
        store.put(record_of(spec(seed=seed), status="failed"))
    with pytest.raises(UnknownName, match=r"no such single cell \(2 match\): 'rigl'"):
        find(tmp_path, "rigl")


@pytest.mark.parametrize("name", ["zzz", "suite", "000000000000"])
def test_an_unknown_cell_is_named_with_some_that_are_known(name, tmp_path):
    fill(tmp_path, manifest(spec()), record_of(spec()))
    with pytest.raises(UnknownName, match=rf"no such cell: '{name}'\..* Known: .*{spec().slug}"):
        find(tmp_path, name)


def test_a_name_that_fits_several_cells_lists_them(tmp_path):
    one, two = spec(seed=0), spec(seed=1)
    fill(tmp_path, manifest(one, two), record_of(one), record_of(two))
    with pytest.raises(UnknownName, match=r"no such single cell \(2 match\): 'rigl'") as caught:
        find(tmp_path, "rigl")
    assert one.slug in str(caught.value)
    assert two.slug in str(caught.value)


def test_a_cell_of_two_suites_is_found_by_suite_and_file_name(tmp_path):
    for name in ("demo", "my-demo", "other"):
        Store(tmp_path, name).put(record_of(spec()))
    with pytest.raises(UnknownName, match=r"3 match") as caught:
        find(tmp_path, spec().key)
    assert f"other/{spec().slug}" in str(caught.value)
    for name in ("other", "my-demo"):
        assert find(tmp_path, f"{name}/{spec().slug}").parent.name == name


def test_a_final_record_whose_status_was_edited_is_named(tmp_path):
    kept = fill(tmp_path, manifest(spec()), record_of(spec()))
    path = kept.path(spec())
    path.write_bytes(path.read_bytes().replace(b'"status":"ok"', b'"status":"failed"'))
    with pytest.raises(RecordError, match=rf"{path.name}: status 'failed' does not belong here"):
        kept.get(spec())


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    kept = Store(tmp_path, "demo")
    kept.path(spec()).mkdir(parents=True)
    with pytest.raises(RecordError, match="cannot read the record"):
        kept.get(spec())


def test_a_folder_of_records_without_its_list_of_cells_is_named(tmp_path):
    fill(tmp_path, manifest(spec()), record_of(spec()))
    (tmp_path / "demo" / "suite.json").unlink()
    assert store.suites(tmp_path) == ["demo"]
    with pytest.raises(RecordError, match=r"suite\.json: no such file"):
        Store(tmp_path, "demo").manifest()
