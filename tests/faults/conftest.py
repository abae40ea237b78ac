"""Where faults are made; `pytest -m faults` tries commands that start by themselves too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.bench.cells import ROOT
from tests.faults.clusters import started
from tests.faults.faulty import Place
from tests.faults.faulty import place as made


@pytest.fixture(
    params=["forked", pytest.param("python -m bench", marks=pytest.mark.faults)],
)
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    """A folder in which a method of another package goes wrong as a file says."""
    return made(tmp_path, request)


@pytest.fixture(scope="module")
def one_cluster() -> Iterator[None]:
    """Keeps other processes of the tests from starting a Ray cluster beside this one.

    Some look at all the Ray workers of the machine, to see that theirs are gone.
    """
    with FileLock(Path(tempfile.gettempdir()) / "sparsebench-tests-ray.lock", timeout=1800):
        yield


@pytest.fixture
def cluster(one_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a Ray cluster that outlives the drivers that are killed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # its workers have it from here
    monkeypatch.setenv("RAY_worker_niceness", "0")  # of its own accord it lets others go first
    with started(2) as ray:
        yield ray.get_runtime_context().gcs_address
