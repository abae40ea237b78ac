"""Where faults are made; `pytest -m faults` tries commands that start by themselves too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.faulty import Place
from tests.faults.faulty import place as made


@pytest.fixture(
    params=["forked", pytest.param("python -m bench", marks=pytest.mark.faults)],
)
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    """A folder in which a method of another package goes wrong as a file says."""
    return made(tmp_path, request)
