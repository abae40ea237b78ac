"""The benchmarks' own tools: tables of ratios, many records, and the loops that race peers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from bench.store import Store, read
from tests.benchmarks import contestants, many, ratios
from tests.benchmarks.against_peers import BARE, PEER, table
from tests.benchmarks.contestants import LENET, RESNET20, Case
from tests.benchmarks.ratios import Baseline
from tests.benchmarks.turns import Rates


class Enough(KeyboardInterrupt):
    """Stops a loop."""


def test_a_change_beyond_the_factor_is_pointed_out_and_nothing_else():
    before = Baseline(ratios.here(), {"a": 1.0, "b": 1.0, "c": 1.0, "unused": 1.0})
    *_, first, second = ratios.report({"a": 1.4, "b": 2.0, "c": 0.25, "new": 3.0}, before)
    assert first == "warning: b: 2.0 times slower than the baseline"
    assert second == "warning: c: 4.0 times faster than the baseline"


def test_the_table_shows_both_ratios_and_says_where_the_baseline_is_from():
    before = Baseline({**ratios.here(), "processor": "another"}, {"a": 2.0})
    found, said = ratios.report({"a": 1.5, "new": 3.0}, before)
    assert [line.split() for line in found.splitlines()[2:]] == [
        ["a", "1.5", "2", "0.75"],
        ["new", "3", "-", "new"],
    ]
    assert said == "the baseline was measured elsewhere: processor another"


def test_a_written_baseline_keeps_what_was_not_measured(tmp_path: Path):
    path = tmp_path / "baseline.json"
    Baseline({"torch": "old"}, {"b": 1.0, "a": 2.0}).with_new({"b": 1.23456}).write(path)
    assert ratios.read(path) == Baseline(ratios.here(), {"a": 2.0, "b": 1.23})


def test_rounds_are_compared_with_each_other():
    rates = Rates({"one": (10.0, 20.0, 90.0), "two": (5.0, 40.0, 30.0)})
    assert rates.median("one") == 20
    assert rates.ratio("one", "two") == 2.0  # of 2, 0.5 and 3
    shown = table(Rates({PEER: (1.0,), "ours": (5.0,), BARE: (4.0,)})).splitlines()
    assert [cell.strip() for cell in shown[3].split("|")[1:-1]] == [
        "ours",
        "5",
        "5.00",
        "1.25",
        "1",
    ]


def test_many_records_are_what_their_store_says(tmp_path: Path):
    filled = many.fill(tmp_path, 20)
    assert isinstance(filled.store, Store)
    assert [read(filled.store.path(spec)).spec for spec in filled.specs] == list(filled.specs)
    assert len(list(filled.store.records())) == len(filled.store.manifest().cells) == 20
    assert many.other() not in set(itertools.islice(many.questions(), 10_000))


def test_many_records_are_of_some_15_kilobytes():
    made = [many.encode(many.record(q)) for q in itertools.islice(many.questions(), 0, 10_000, 99)]
    assert 12_000 < sum(map(len, made)) / len(made) < 20_000


@pytest.fixture
def little(tmp_path: Path) -> Path:
    """A folder with the first images of data sets that nobody has seen."""
    rng = np.random.default_rng(0)
    for name, shape in (("mnist", (28, 28)), ("cifar10", (32, 32, 3))):
        x = rng.integers(0, 256, size=(130, *shape), dtype=np.uint8)
        y = np.arange(130) % 10
        np.savez(tmp_path / f"{name}.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    return tmp_path


LOOPS = {
    "ours": contestants.ours,
    "bare": contestants.bare,
    "passes": contestants.passes,
    "our data": contestants.our_data,
    "PIL data": contestants.pil_data,
}


@pytest.mark.parametrize("case", [LENET, RESNET20], ids=lambda case: case.model)
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_says_how_many_images_it_took(name: str, case: Case, little: Path):
    taken: list[int] = []

    def tick(images: int) -> None:
        taken.append(images)
        if len(taken) == 2:
            raise Enough

    with pytest.raises(Enough):
        LOOPS[name](tick, case, little)
    assert taken == [case.batch] * 2


def test_stacked_cells_are_counted_one_by_one(little: Path):
    taken: list[int] = []

    def tick(images: int) -> None:
        taken.append(images)
        if len(taken) == 6:
            raise Enough

    with pytest.raises(Enough):
        contestants.ours(tick, LENET, little, stack=3)
    assert taken == [60] * 6
