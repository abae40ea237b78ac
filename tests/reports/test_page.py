"""The page as text: what it embeds, and that nothing in it is fetched or run but our scripts."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import math
import re
import shlex
import zlib
from pathlib import Path
from typing import Any

import pytest

from bench.datasets import DATASETS
from bench.errors import RecordError
from bench.launch import chosen
from bench.record import CurvePoint, PhaseResult
from bench.resolve import resolve
from bench.suite import load
from reports.page.build import inline, page
from reports.page.cells import BATCH, POINTS, columns, command, packed, rounds, thinned
from tests.reports.records import counts, record, spec
from tests.reports.study import HOSTILE, measured, study


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return page(study(tmp_path_factory.mktemp("study")), "A study")


def data_of(text: str, name: str = "data") -> Any:
    """What the page embeds under a name."""
    found = re.search(f'<script type="application/json" id="{name}">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def unpacked(batches: list[str]) -> list[dict[str, Any]]:
    return [one for text in batches for one in json.loads(zlib.decompress(base64.b64decode(text)))]


def test_each_suite_has_a_table_whose_rows_name_their_cells(text):
    demo, hostile = data_of(text)["suites"]
    assert (demo["name"], hostile["name"]) == ("demo", "hostile")
    headers = [name for name, _ in demo["columns"]]
    assert headers[0] == "method"
    row = demo["rows"][1]
    assert dict(zip(headers, row["texts"], strict=True))["top-1 %"] == "95.50 ± 0.71"
    assert (row["method"], row["model"], row["sparsity"]) == ("rigl", "lenet", "98")
    cells = unpacked(data_of(text, "cells-0"))
    assert [cells[place]["key"] for place in row["cells"]] == [
        spec("rigl", 0.98, seed).key for seed in (0, 1)
    ]
    assert [demo["seeds"][place] for place in row["cells"]] == [0, 1]


def test_figures_sort_by_their_value_and_what_is_unknown_has_none(text):
    suites = data_of(text)["suites"]
    for suite in suites:
        figures = [name for name, is_figure in suite["columns"] if is_figure]
        assert "top-1 %" in figures
        assert "method" not in figures
        assert all(len(row["values"]) == len(figures) for row in suite["rows"])
    place = [name for name, is_figure in suites[0]["columns"] if is_figure].index("top-1 %")
    assert [row["values"][place] for row in suites[0]["rows"]] == [97.5, 95.5, 96.5, 97.0, None]
    assert [row["values"][place] for row in suites[1]["rows"]] == [None]


def test_a_row_that_was_not_run_opens_no_cell(text):
    assert data_of(text)["suites"][0]["rows"][-1]["cells"] == []


def test_a_cell_has_its_configuration_curve_layers_environment_and_command(text):
    cell = unpacked(data_of(text, "cells-0"))[0]
    assert ["method", "rigl"] in cell["facts"]["asked"]
    assert ["top-1, last step, test set", "97.00 %"] in cell["facts"]["measured"]
    assert ["device", "cpu, 1 CPU threads, Linux"] in cell["facts"]["where"]
    assert len(cell["curve"]["step"]) == len(cell["curve"]["train_loss"]) <= POINTS
    assert cell["curve"]["validation_loss"][0] == 0.3333
    assert cell["layers"] == [["fc1.weight", "60x10", 600, 40], ["fc2.weight", "10x20", 200, 40]]
    assert cell["command"].startswith("sparsebench run demo.toml --only rigl-lenet-s0.9-seed0-")


def test_cells_lie_in_batches_in_the_order_of_their_keys():
    records = [measured(spec(seed=seed), 97.0, "demo", "rigl") for seed in range(BATCH + 3)]
    found = packed(records)
    assert [len(unpacked([batch])) for batch in found.batches] == [BATCH, 3]
    assert [cell["key"] for cell in unpacked(found.batches)] == found.keys
    assert found.keys == [one.spec.key for one in records]


@pytest.mark.parametrize("count", [0, 1, POINTS, POINTS + 1, 1234])
def test_a_curve_is_thinned_evenly_and_keeps_its_end(count):
    points = [CurvePoint(step, 1.0) for step in range(count)]
    kept = [point.step for point in thinned(points)]
    assert len(kept) <= POINTS
    assert kept[-1:] == [count - 1][:count]
    assert len(set(map(int.__sub__, kept[1:], kept))) <= 1


def test_a_loss_that_is_not_finite_is_a_gap_and_an_unknown_one_is_left_out():
    points = [CurvePoint(1, math.nan), CurvePoint(2, 0.123456)]
    assert columns(points, CurvePoint.__struct_fields__) == {
        "step": [1, 2],
        "train_loss": [None, 0.1235],
    }


def test_the_command_of_a_cell_trains_that_cell_alone():
    plan = resolve(load("smoke"), Path())
    for cell in plan.manifest.cells:
        one = dataclasses.replace(record(cell.spec), suite="smoke")
        words = shlex.split(command(one))
        assert words[:4] == ["sparsebench", "run", "smoke", "--only"]
        assert {found.spec.key for found in chosen(plan, words[4])} == {cell.spec.key}


def test_the_command_asks_for_the_folder_of_a_data_set_that_has_files():
    made = {name for name, info in DATASETS.items() if not info.torchvision}
    for name in (*DATASETS, "imagenet", "imagefolder:here"):
        words = shlex.split(command(record(spec(dataset=name))))
        has_none = name in made or name.startswith("imagefolder:")
        assert words[-2:] == (["--records", "reproduced"] if has_none else ["--data", "DIR"])


def test_a_cell_of_several_rounds_shows_each():
    phases = (
        PhaseResult("round-0", 100, 0.1, status="ok", top1=97.0, counts=counts(0.9), total=100),
        PhaseResult("between", 5, 0.1),
        PhaseResult("round-1", 100, None, status="diverged", reason="no number", total=205),
    )
    assert rounds(record(spec(), phases=phases)) == [
        ["round-0", "90.00", "80", "97.00", "ok"],
        ["round-1", "", "", "", "diverged no number"],
    ]


def test_no_text_of_a_record_becomes_markup(text):
    assert HOSTILE not in text
    assert "<img" not in text
    (row,) = data_of(text)["suites"][1]["rows"]
    assert row["method"] == HOSTILE


def test_only_our_script_may_run_and_nothing_may_be_fetched(text):
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    (script,) = re.findall(r'<script type="module">(.*?)</script>', text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == [f"'sha256-{digest}'", "blob:"]
    assert text.count("<script") == text.count('<script type="application/json"') + 1
    assert "connect-src" not in rules
    assert "http" not in policy


def test_a_library_that_would_end_its_own_element_is_refused():
    with pytest.raises(ValueError, match="would end its own <script>"):
        inline("x = '</SCRIPT>'", "script")


def test_the_same_records_give_the_same_page(text, tmp_path):
    assert page(study(tmp_path), "A study") == text


def test_the_title_is_text_and_the_libraries_are_named_with_their_licence(tmp_path):
    found = page(study(tmp_path), "A < B")
    assert "<h1>A &lt; B</h1>" in found
    assert "DataTables and jQuery (MIT" in found
    assert "plotly.js (MIT" in found


def test_no_records_are_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(RecordError, match=re.escape(str(tmp_path))):
        page(tmp_path)
