"""Where faults are made; `pytest -m faults` tries commands that start by themselves too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

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

    Clusters of one user share the file of the token by which commands are let in.
    """
    with FileLock(Path(tempfile.gettempdir()) / "sparsebench-tests-ray.lock", timeout=1800):
        yield
