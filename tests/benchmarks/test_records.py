"""The store and `report` on 10,000 records, beside what the files alone cost."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import pytest

from bench.record import encode
from bench.store import Store, read
from reports.page.build import page
from reports.suite_table import report
from tests.benchmarks import many
from tests.benchmarks.ratios import Beside

READ_ALL = "json.loads of each file"


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory, measuring: bool) -> many.Many:
    """A store of 10,000 records; fewer where nothing is measured."""
    return many.fill(tmp_path_factory.mktemp("many"), 10_000 if measuring else 60)


def paths(filled: many.Many) -> list[Path]:
    return [filled.store.path(spec) for spec in filled.specs]


@pytest.mark.benchmark(group="one record, its write")
def test_write(beside: Beside, tmp_path: Path) -> None:
    store, plain = Store(tmp_path, "written"), tmp_path / "plain.json"
    records = map(many.record, many.questions())
    text = encode(next(records))

    def with_sync() -> None:
        with plain.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    path = beside("record: write / write and fsync", lambda: store.put(next(records)), with_sync)
    assert path.exists()


@pytest.mark.benchmark(group="one record", timer=time.process_time)
@pytest.mark.parametrize("brief", [False, True], ids=["whole", "brief"])
def test_read(brief: bool, beside: Beside, filled: many.Many) -> None:
    ours, plain = (itertools.cycle(paths(filled)) for _ in range(2))
    found = beside(
        f"record: read{', brief' if brief else ''} / json.loads",
        lambda: read(next(ours), brief=brief),
        lambda: json.loads(next(plain).read_bytes()),
        number=20,
    )
    assert bool(found.layers) != brief


@pytest.mark.benchmark(group="10,000 records", timer=time.process_time)
def test_which_are_missing(beside: Beside, filled: many.Many) -> None:
    store, known = filled.store, paths(filled)
    asked = [*filled.specs, many.other()]
    missing = beside(
        "which cells are missing / a stat of each file",
        lambda: [spec for spec in asked if not store.has(spec)],
        lambda: [path for path in known if not path.exists()],
        rounds=5,
    )
    assert missing == [many.other()]


@pytest.mark.benchmark(group="10,000 records", timer=time.process_time)
def test_report(beside: Beside, filled: many.Many) -> None:
    root, known = filled.store.folder.parent, paths(filled)
    text = beside(
        f"report / {READ_ALL}",
        lambda: report(root),
        lambda: [json.loads(path.read_bytes()) for path in known],
        rounds=3,
    )
    assert len(filled.specs) // many.SEEDS <= text.count("\n| ")


@pytest.mark.benchmark(group="10,000 records", timer=time.process_time)
def test_page(beside: Beside, filled: many.Many) -> None:
    root, known = filled.store.folder.parent, paths(filled)
    text = beside(
        f"page of the leaderboard / {READ_ALL}",
        lambda: page(root),
        lambda: [json.loads(path.read_bytes()) for path in known],
        rounds=1,
    )
    assert len(text) < 40e6
    assert all(spec.key in text for spec in filled.specs[:3])
