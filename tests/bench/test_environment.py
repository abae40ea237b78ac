"""Where a record was made: device, versions, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import msgspec
import pytest
import torch

from bench import environment as module
from bench.environment import environment
from bench.process_settings import set_up_process
from bench.record import Environment


@pytest.fixture(autouse=True)
def fresh_commit(monkeypatch):
    """The commit is looked up once a process; here, once a test."""
    monkeypatch.delenv("SPARSEBENCH_COMMIT", raising=False)
    module.commit.cache_clear()
    yield
    module.commit.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, in the place of the harness's own."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.py").write_text("1")
    (tmp_path / "README.md").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def here() -> Environment:
    return environment(torch.device("cpu"))


def test_an_environment_names_device_threads_and_versions():
    found = here()
    assert found.device
    assert found.threads == torch.get_num_threads()
    assert found.python == platform.python_version()
    assert found.torch == torch.__version__
    assert platform.system() in found.platform
    assert platform.machine() in found.platform
    assert found.sparsebench == "checkout" or re.match(r"\d+\.\d+", found.sparsebench)


def test_an_environment_is_plain_enough_for_json():
    found = here()
    assert msgspec.json.decode(msgspec.json.encode(found), type=Environment) == found
    assert type(found.torch) is str  # torch's own version is a class of its own


def test_peak_memory_is_in_bytes():
    # Python with torch loaded takes more than 50 MB, and less than a TB.
    assert 5e7 < here().peak_memory_bytes < 1e12


def test_the_commit_is_the_repositorys(repository):
    found = here()
    assert found.commit == git(repository, "rev-parse", "HEAD")
    assert re.fullmatch(r"[0-9a-f]{40}", found.commit)
    assert not found.dirty


@pytest.mark.parametrize(
    ("path", "dirty"),
    [("bench/a.py", True), ("bench/new.py", True), ("README.md", False), ("records/a.json", False)],
)
def test_only_files_of_the_harness_make_it_dirty(path, dirty, repository):
    (repository / path).parent.mkdir(exist_ok=True)
    (repository / path).write_text("2")
    assert here().dirty == dirty


def test_code_is_the_commit_and_a_hash_of_what_differs(repository):
    head = git(repository, "rev-parse", "HEAD")
    assert module.code() == head
    (repository / "bench" / "a.py").write_text("2")
    module.commit.cache_clear()
    assert re.fullmatch(f"{head} with local changes [0-9a-f]{{12}}", module.code())


def test_a_process_goes_on_with_the_code_that_it_began_with(repository):
    first = git(repository, "rev-parse", "HEAD")
    set_up_process(threads=1)
    (repository / "bench" / "a.py").write_text("2")
    git(repository, "commit", "--quiet", "-a", "-m", "second, while a cell is trained")
    (repository / "bench" / "a.py").write_text("3")
    assert (here().commit, here().dirty) == (first, False)


def test_a_folder_without_a_repository_has_an_unknown_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (here().commit, here().dirty) == ("unknown", False)


def test_somebody_elses_repository_is_not_taken_for_the_harness(repository, monkeypatch):
    monkeypatch.setattr(module, "ROOT", repository / "bench")
    assert here().commit == "unknown"


def test_a_machine_without_git_has_an_unknown_commit(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository / "empty"))
    assert here().commit == "unknown"


def test_a_copy_without_a_repository_can_be_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("SPARSEBENCH_COMMIT", "abc1234")
    assert (here().commit, here().dirty) == ("abc1234", False)
