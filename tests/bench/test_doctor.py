"""`sparsebench doctor`: what is wrong is found, named, and never ends in a traceback."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import doctor
from bench.doctor import CHECKS, Finding, Places, examine
from bench.leases import STALE_SECONDS
from tests.bench.cells import train, write_suite


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of records of one cell."""
    folder = tmp_path_factory.mktemp("made")
    train(write_suite(folder), folder / "records")
    return folder / "records"


@pytest.fixture
def places(tmp_path) -> Places:
    (tmp_path / "data").mkdir()
    (tmp_path / "records").mkdir()
    return Places(tmp_path / "data", tmp_path / "records")


def found(name: str, places: Places) -> list[Finding]:
    return doctor._guarded(name, CHECKS[name], places)


def one(name: str, places: Places, state: str) -> Finding:
    """The only finding of a check in this state."""
    (finding,) = [finding for finding in found(name, places) if finding.state == state]
    return finding


def copied(made: Path, places: Places) -> Path:
    """The record, in the folder to examine."""
    target = places.records / "tiny"
    target.mkdir()
    for file in (made / "tiny").glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    return next(target.glob("dense-*.json"))


def test_this_machine_can_run_suites(places, made):
    copied(made, places)
    wrong = [finding for finding in examine(places) if finding.state == "wrong"]
    # What other programs of this machine leave of memory and disk is not the harness's matter.
    assert [finding for finding in wrong if "free" not in finding.found] == []


def test_nothing_is_left_behind(places, made):
    copied(made, places)
    before = sorted(places.records.rglob("*")), sorted(places.data.rglob("*"))
    examine(places)
    assert (sorted(places.records.rglob("*")), sorted(places.data.rglob("*"))) == before


def test_versions_are_compared_with_what_the_project_needs(places, monkeypatch):
    versions = importlib.metadata.version
    old = {"torch": "2.5.1+cpu", "timm": "0.9"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: old.get(name) or versions(name))
    wrong = [finding for finding in found("libraries", places) if finding.state == "wrong"]
    assert {finding.check: finding.found.partition(";")[0] for finding in wrong} == old
    assert all("pip install" in finding.mend for finding in wrong)


def test_a_library_that_is_missing_is_named(places, monkeypatch):
    versions = importlib.metadata.version

    def version(name: str) -> str:
        if name == "pillow":
            raise importlib.metadata.PackageNotFoundError
        return versions(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert one("libraries", places, "wrong").check == "pillow"


def test_torch_that_cannot_be_imported_is_a_finding(places, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert "torch" in one("device", places, "wrong").found


@pytest.mark.parametrize(("cuda", "said"), [(None, "built without CUDA"), ("13.2", "cannot use")])
def test_a_gpu_that_torch_cannot_use_is_wrong(cuda, said, places, monkeypatch):
    monkeypatch.setattr("bench.environment.driver", lambda: "550.54")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert said in one("device", places, "wrong").found


def test_a_damaged_data_file_is_named(places):
    (places.data / "mnist.npz").write_bytes(b"PK\x03\x04 no zip")
    finding = one("data", places, "wrong")
    assert "mnist.npz" in finding.found
    assert "delete" in finding.mend


def test_other_data_under_a_known_name_are_wrong(places):
    x, y = np.zeros((4, 28, 28), np.uint8), np.arange(4)
    np.savez(places.data / "mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    finding = one("data", places, "wrong")
    assert finding.check == "data: mnist"
    assert "47ef77565eff" in finding.found


def test_the_real_data_are_fine(real_data, places):
    states = {f.check: f.state for f in found("data", Places(real_data, places.records))}
    assert states["data: mnist"] == "fine"


def test_no_data_yet_is_no_fault(places, tmp_path):
    assert [f.state for f in found("data", places)] == ["note"]
    assert [f.state for f in found("data", Places(tmp_path / "none", places.records))] == ["note"]


def test_damaged_records_and_lists_are_named(places, made):
    path = copied(made, places)
    path.write_bytes(path.read_bytes()[:100])
    (path.parent / "suite.json").write_bytes(b"{")
    texts = [f.found for f in found("records", places) if f.state == "wrong"]
    assert [path.name in texts[0], "suite.json" in texts[1]] == [True, True]


def test_many_damaged_records_are_counted(places, made):
    path = copied(made, places)
    for number in range(9):
        (path.parent / f"x-{number}.json").write_bytes(b"{}")
    wrong = [f for f in found("records", places) if f.state == "wrong"]
    assert len(wrong) == doctor.NAMED + 1
    assert wrong[-1].found.startswith("4 more")


def test_records_that_can_be_read_are_counted(places, made):
    copied(made, places)
    assert one("records", places, "fine").found == "1 can be read"


def test_a_folder_that_cannot_be_written_is_wrong(places, monkeypatch):
    def refused(**options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refused)
    finding = one("folders", places, "wrong")
    assert "Read-only file system" in finding.found
    assert "--records" in finding.mend


def test_a_full_disk_is_wrong(places, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    states = [finding.state for finding in found("folders", places)]
    assert states == ["wrong", "wrong"]


def test_a_folder_that_is_not_there_yet_is_fine(places, tmp_path):
    states = [f.state for f in found("folders", Places(places.data, tmp_path / "new" / "deep"))]
    assert "wrong" not in states
    assert not (tmp_path / "new").exists()


def test_little_memory_is_wrong(places, monkeypatch):
    monkeypatch.setattr(doctor, "_free_memory", lambda: 10**6)
    assert "--workers 1" in one("memory", places, "wrong").mend


def test_a_quota_of_cores_is_noted(places, monkeypatch):
    monkeypatch.setattr(doctor, "cores", lambda: 8)
    monkeypatch.setattr(doctor, "_quota", lambda: 1.5)
    assert "--workers 1" in one("cores", places, "note").mend


def test_more_threads_than_cores_are_noted(places, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert "4096" in one("cores", places, "note").found


def test_leases_that_nobody_renews_and_leftovers_are_noted(places):
    suite = places.records / "tiny"
    for folder in ("locks", "checkpoints"):
        (suite / folder).mkdir(parents=True)
    old, new = suite / "locks" / "a.lock.1", suite / "locks" / "b.lock.1"
    rest = suite / f".a.json.{os.getpid()}.tmp"
    for file in (old, new, rest, suite / "checkpoints" / "a.damaged"):
        file.write_bytes(b"")
    before = time.time() - STALE_SECONDS - 7200
    os.utime(old, (before, before))
    os.utime(rest, (before, before))
    checks = {f.check: f for f in found("leftovers", places)}
    assert checks.keys() == {"leases", "leftovers", "checkpoints"}
    assert checks["leases"].found.startswith("1 of 2")
    assert {f.state for f in checks.values()} == {"note"}


@pytest.mark.parametrize("error", [OSError("gone"), KeyError("x"), SystemExit(3)])
def test_whatever_a_check_raises_is_a_finding(error, places):
    def broken(places):
        yield Finding("first", "fine", "here")
        raise error

    first, second = doctor._guarded("own", broken, places)
    assert (first.state, second.check, second.state) == ("fine", "own", "wrong")
    assert type(error).__name__ in second.found


def test_the_command_ends_with_1_where_something_is_wrong(call, places, monkeypatch):
    fine = Finding("a", "fine", "all of it")
    wrong = Finding("b", "wrong", "half of it", "mend it")
    where = ["--data", places.data, "--records", places.records]
    for findings, status in (([fine], 0), ([fine, wrong], 1)):
        monkeypatch.setattr(doctor, "examine", lambda places, findings=findings: findings)
        outcome = call("doctor", *where, "--json")
        assert outcome.status == status
        assert json.loads(outcome.out)["ok"] == (status == 0)
        assert len(json.loads(outcome.out)["findings"]) == len(findings)
    assert "mend it" in call("doctor", *where).out


def test_everything_broken_at_once_is_still_a_table(call, tmp_path, monkeypatch):
    records = tmp_path / "records"
    (records / "tiny" / "suite.json").mkdir(parents=True)
    (records / "tiny" / "a.json").write_bytes(b"\xff")
    (records / "tiny" / "attempts").write_bytes(b"")
    (tmp_path / "data").write_bytes(b"no folder")
    outcome = call("doctor", "--data", tmp_path / "data", "--records", records)
    assert outcome.status == 1
    assert "Traceback" not in outcome.err + outcome.out
