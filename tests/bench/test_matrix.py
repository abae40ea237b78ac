"""The table of methods and networks in `methods/README.md`: not stale, and true."""

from __future__ import annotations

import pytest

from bench.errors import BenchError
from bench.matrix import MODELS, gap, heading, shown, stamp, tried
from methods import METHODS
from methods.masking import ProjectedMethod

TABLE = shown()
ROWS = {line.split("`")[1]: line for line in TABLE if line.startswith("| `")}
ONE_EACH = [
    # Every method meets a network and every network a method; filters are where they are.
    (method, list(MODELS)[(index + (2 if info.controls == "filters" else 1)) % len(MODELS)])
    for index, (method, info) in enumerate(METHODS.items())
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_names_every_method_in_its_present_version_and_every_network():
    assert TABLE[:2] == heading()
    assert list(ROWS) == list(METHODS), "run `python -m bench.matrix METHOD` for what is missing"
    for method, line in ROWS.items():
        name, *found = cells(line)
        assert name == stamp(method), f"run `python -m bench.matrix {method}`"
        assert len(found) == len(MODELS)


def test_at_most_a_tenth_of_the_pairs_is_not_possible_each_with_a_reason():
    found = {(m, c): cell for m in ROWS for c, cell in zip(MODELS, cells(ROWS[m])[1:], strict=True)}
    assert len(found) == len(METHODS) * len(MODELS)
    gaps = [pair for pair, cell in found.items() if cell != "yes"]
    assert len(gaps) <= len(found) / 10
    for method, column in gaps:
        assert found[method, column] == "no"
        assert any(line.startswith(gap(method, column, "")[:-1]) for line in TABLE)


@pytest.mark.parametrize(("method", "column"), ONE_EACH)
def test_a_method_runs_on_its_network_as_the_table_says(method, column):
    reason = tried(method, MODELS[column])
    mark = cells(ROWS[method])[1 + list(MODELS).index(column)]
    assert mark == ("no" if reason else "yes")
    assert not reason or gap(method, column, reason) in TABLE


def test_a_filter_method_needs_filters():
    assert tried("sfp", "lenet_300_100") == "no filters to prune"


def test_a_method_that_leaves_the_wrong_number_is_no_yes(monkeypatch):
    monkeypatch.setattr(ProjectedMethod, "finish", lambda *_: None)
    monkeypatch.setattr(ProjectedMethod, "project", lambda *_: None)
    with pytest.raises(BenchError, match="random on lenet5"):
        tried("random", "lenet5")
