"""One record as markdown."""

from __future__ import annotations

import re

import pytest

from bench.record import Compact, Execution, LayerCount
from reports.record_page import record_page
from tests.reports.records import counts, record, spec

LAYER = LayerCount("fc.weight", (10, 80), 800, 80, 200_000, 20_000, True)


def test_the_page_shows_macs_by_both_conventions_and_what_is_live():
    figures = counts(elementwise=3_000, live=60, live_macs=15_000, compact=Compact(700, 150_000))
    layer = LayerCount("fc.weight", (10, 80), 800, 80, 200_000, 20_000, True, 60, (9, 40), 3_000)
    page = record_page(record(spec(), counts=figures, layers=(layer,)))
    facts = dict(re.findall(r"^\| (\S.*?) +\| (\S.*?) +\|$", page, re.MULTILINE))
    assert facts["MACs A"] == "20,000 of 200,000"
    assert facts["MACs B"] == "23,000 of 203,000"
    assert facts["MACs A on live paths"] == "15,000"
    assert facts["on a live path"] == "60 prunable weights"
    assert facts["effective sparsity"] == "0.925000"
    assert facts["without dead channels"] == "700 parameters, 150,000 MACs A"
    row = next(line for line in page.splitlines() if "fc.weight" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][-3:] == ["3,000", "60", "9 x 40"]


@pytest.mark.parametrize(
    ("execution", "text"),
    [
        (Execution(), "alone, step by step"),
        (
            Execution("exclusive", 1, graph=True, compiled=True),
            "steps replayed as a CUDA graph; passes made by torch.compile, whose sums round "
            "differently",
        ),
    ],
)
def test_the_page_says_how_steps_were_computed(execution, text):
    assert f"| computed | {text} |" in re.sub(
        r" +", " ", record_page(record(spec(), execution=execution))
    )


@pytest.mark.parametrize("label", ["computed", "MACs B", "live path", "effective", "dead channels"])
def test_the_page_of_a_record_from_before_they_were_counted_leaves_them_out(label):
    page = record_page(record(spec(), layers=(LAYER,), execution=None))
    assert "MACs A" in page
    assert label not in page
