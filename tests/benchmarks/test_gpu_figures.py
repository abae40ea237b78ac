"""`gpu_figures` is rehearsed on the CPU, and keeps out of PERFORMANCE.md unless a GPU speaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import environment
from tests.benchmarks import gpu_figures, gpu_measures
from tests.benchmarks.gpu_measures import MEASURES, QUICK, Found, Place, make_data, measured

REHEARSE = ("--device", "cpu", "--quick", "--out")


@pytest.fixture
def performance(tmp_path, monkeypatch) -> Path:
    """A PERFORMANCE.md of the test's own."""
    path = tmp_path / "PERFORMANCE.md"
    path.write_text(f"# All\n\n{gpu_figures.BEGIN}\nold\n{gpu_figures.END}\n\nrest\n")
    monkeypatch.setattr(gpu_figures, "PERFORMANCE", path)
    return path


def few(monkeypatch, *names: str) -> None:
    """Leaves these measurements, by their first figures."""
    kept = [entry for entry in MEASURES if next(iter(entry[1])) in names]
    assert len(kept) == len(names)
    monkeypatch.setattr(gpu_measures.measured, "__defaults__", (kept,))


def place(tmp_path, *, real: bool = False) -> Place:
    make_data(tmp_path, QUICK.images)
    return Place(torch.device("cpu"), QUICK, tmp_path, real)


def test_a_rehearsal_measures_and_writes_where_it_is_told_only(
    performance, tmp_path, monkeypatch, capsys
):
    few(
        monkeypatch,
        "ResNet-20, one cell",
        "ResNet-20, 1 cell, in sum",
        "launches of a step that static masks add",
        "methods whose steps wait for the device",
        "global mask update of 23M weights",
    )
    monkeypatch.setattr(environment, "commit", lambda: ("0123abc", False, ""))
    before = performance.read_text()
    out = tmp_path / "out.json"
    assert gpu_figures.main([*REHEARSE, str(out)]) == 0
    assert performance.read_text() == before
    written = json.loads(out.read_text())
    assert written["rehearsal"] is True
    assert "commit 0123abc" in written["where"]
    assert written["values"]["ResNet-20, one cell"] > 0
    assert written["values"]["launches of a step that static masks add"] in (1, 2)
    assert written["values"]["methods whose steps wait for the device"] == 0
    assert "REHEARSAL" in capsys.readouterr().out


def test_every_other_measurement_can_be_rehearsed(tmp_path):
    others = [
        entry
        for entry in MEASURES
        if next(iter(entry[1])).startswith(("memory", "WRN-28-2, one cell", "ResNet-20 of 300"))
    ]
    assert len(others) == 3
    for name, _, found in measured(place(tmp_path), others):
        assert isinstance(found, Found), (name, found)


def test_overheads_of_methods_are_those_of_the_table(tmp_path):
    found = gpu_measures.measure_methods(place(tmp_path), "resnet20", "ResNet-20", 4000)
    assert list(found) == list(dict(gpu_measures.names_of("ResNet-20")))


def test_the_accuracy_is_that_of_a_record(tmp_path):
    found = gpu_measures.measure_accuracy(place(tmp_path, real=True))
    assert 0 <= found["dense ResNet-20 of 300 epochs, test accuracy"].value <= 100


def test_what_is_not_at_hand_is_said_and_an_error_costs_its_own_figures_only(tmp_path):
    def broken(_: Place) -> gpu_measures.Figures:
        raise RuntimeError("CUDA error: out of luck\nand more")

    def fine(_: Place) -> gpu_measures.Figures:
        return {"two": Found("2", 2.0)}

    measures = [
        (gpu_measures.measure_peer, {"peer": "10 times"}),
        (broken, {"one": ""}),
        (fine, {"two": "2"}),
    ]
    found = {name: what for name, _, what in measured(place(tmp_path), measures)}
    assert found["peer"] == "not run: no checkout of open_lth: --open-lth DIR"
    assert found["one"] == "failed: RuntimeError: CUDA error: out of luck"
    assert found["two"] == Found("2", 2.0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--device", "cpu"],
        ["--device", "cpu", "--quick"],
        ["--device", "cpu", "--out", "figures.json"],
        ["--quick"],
        ["--device", "cpu", "--quick", "--out", "PERFORMANCE.md"],
    ],
)
def test_figures_of_a_cpu_are_refused(arguments, performance, monkeypatch, capsys):
    monkeypatch.chdir(performance.parent)
    before = performance.read_text()
    with pytest.raises(SystemExit) as refused:
        gpu_figures.main(arguments)
    assert refused.value.code == 2
    assert "rehearsal" in capsys.readouterr().err
    assert [path.name for path in performance.parent.iterdir()] == ["PERFORMANCE.md"]
    assert performance.read_text() == before


def test_without_a_gpu_nothing_is_measured(performance, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = performance.read_text()
    assert gpu_figures.main([]) == 0
    assert capsys.readouterr().out == "not run: no CUDA device\n"
    assert performance.read_text() == before


def test_the_block_is_replaced_and_all_else_stays(performance):
    text = gpu_figures.block([("a figure", "2 times", "3 times", "1.5", "a | b")], "here", False)
    assert "REHEARSAL" not in text
    gpu_figures.write_block(text)
    written = performance.read_text()
    assert written.startswith(f"# All\n\n{gpu_figures.BEGIN}\n\nhere\n")
    assert written.endswith(f"a / b    |\n\n{gpu_figures.END}\n\nrest\n")
    gpu_figures.write_block(text)
    assert performance.read_text() == written


def test_a_file_without_the_block_is_refused(performance):
    performance.write_text("# All\n")
    with pytest.raises(ValueError, match="has no line <!-- gpu figures -->"):
        gpu_figures.write_block("figures")


def test_the_committed_table_has_every_figure():
    text = (gpu_figures.ROOT / "bench" / "PERFORMANCE.md").read_text(encoding="utf-8")
    _, _, rest = text.partition(gpu_figures.BEGIN)
    table = rest.partition(gpu_figures.END)[0]
    for _, aims in MEASURES:
        for name, aim in aims.items():
            assert any(
                [cell.strip() for cell in line.split("|")[1:3]] == [name, aim]
                for line in table.splitlines()
            ), name
