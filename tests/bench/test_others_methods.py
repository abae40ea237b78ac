"""A suite may name a method that another package offers."""

from __future__ import annotations

import pytest

from bench import launch
from bench.errors import SuiteError
from bench.store import Store
from bench.suite import load
from tests.bench.cells import plan_of, write_suite

SOURCE = '''
from dataclasses import dataclass
from methods.masking import PruneAtInit

@dataclass(frozen=True)
class Largest(PruneAtInit):
    """Keeps the largest initial weights."""

@dataclass(frozen=True)
class Wrong(PruneAtInit):
    controls = "densty"
'''


@pytest.fixture
def others(package):
    """A package that offers two methods of its own, and one that cannot be loaded."""
    package(
        SOURCE,
        largest="outside_methods:Largest",
        wrong="outside_methods:Wrong",
        broken="nowhere:Lost",
    )


@pytest.mark.usefixtures("others")
def test_a_suite_trains_a_method_of_another_package_beside_ours_and_as_a_source(tmp_path):
    text = "[methods.largest]\n[methods.random]\nlayers_of_source = true\nsource = 'largest'"
    plan = plan_of(write_suite(tmp_path, text, sparsities="[0.5]"))
    store = Store(tmp_path / "records", "tiny")
    cells = list(plan.manifest.cells)
    launch.train(plan, store, cells, launch.Settings("cpu", workers=1))
    largest, random = (store.get(cell.spec) for cell in cells)
    assert (largest.spec.method, largest.status) == ("largest", "ok")
    assert largest.counts.prunable_nonzero == random.counts.prunable_nonzero == 25_100
    assert random.spec.source == largest.spec.key


@pytest.mark.usefixtures("others")
def test_a_method_that_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(SuiteError, match=r"methods\.broken: .*nowhere"):
        load(str(write_suite(tmp_path, "[methods.broken]")))


@pytest.mark.usefixtures("others")
def test_a_method_of_an_unknown_kind_is_refused_before_training(tmp_path):
    allowed = "allowed: none, density, filters, penalty"
    with pytest.raises(SuiteError, match=rf"methods\.wrong: .*controls = 'densty'; {allowed}"):
        load(str(write_suite(tmp_path, "[methods.wrong]")))
