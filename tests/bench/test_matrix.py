"""The table of methods and networks in `methods/README.md`: not stale, and true."""

from __future__ import annotations

import pytest

from bench.errors import BenchError
from bench.matrix import BEGIN, END, MODELS, README, heading, tried
from methods import METHODS, get_method
from methods.masking import ProjectedMethod

TABLE = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip().split("\n")
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
    assert ROWS.keys() == METHODS.keys(), "run `tox run -e matrix`"
    for method, line in ROWS.items():
        stamp, *found = cells(line)
        assert stamp == f"`{method}` v{get_method(method).version}", "run `tox run -e matrix`"
        assert len(found) == len(MODELS)


def test_at_most_a_tenth_of_the_pairs_are_skipped_each_with_a_reason():
    found = [cell for line in ROWS.values() for cell in cells(line)[1:]]
    skipped = [cell for cell in found if cell != "yes"]
    assert len(skipped) <= len(found) / 10
    for mark in skipped:
        assert any(line.startswith(f"{mark}: ") for line in TABLE)


@pytest.mark.parametrize(("method", "column"), ONE_EACH)
def test_a_method_runs_on_its_network_as_the_table_says(method, column):
    reason = tried(method, MODELS[column])
    mark = cells(ROWS[method])[1 + list(MODELS).index(column)]
    assert mark == "yes" if not reason else f"{mark}: {reason}." in TABLE


def test_a_filter_method_needs_filters():
    assert tried("sfp", "lenet_300_100") == "no filters to prune"


def test_a_method_that_leaves_the_wrong_number_is_no_yes(monkeypatch):
    monkeypatch.setattr(ProjectedMethod, "finish", lambda *_: None)
    monkeypatch.setattr(ProjectedMethod, "project", lambda *_: None)
    with pytest.raises(BenchError, match="random on lenet5"):
        tried("random", "lenet5")
