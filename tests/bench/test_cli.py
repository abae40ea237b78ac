"""The command line: `python -m bench` as a process of its own, and `main` where form matters."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from rich.console import Console

from bench import live
from bench.record import Record
from bench.store import Cell, Store, read
from methods import METHODS
from methods.allocation import keep_count
from methods.api import Phase, SparsityMethod
from models import MODELS
from tests.bench.cells import (
    Outcome,
    plan_of,
    register,
    sparsebench,
    spec,
    train,
    write_recipe,
    write_suite,
)
from tests.reports.records import record as record_of

METHODS_USED = "[methods.dense]\n[methods.one_shot]\n[methods.rigl]"


def real(*arguments: str | Path, cwd: Path, **environment: str) -> Outcome:
    """Runs a command line as a user does."""
    process = sparsebench(*arguments, cwd=cwd, **environment)
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_suite_runs_from_its_file_to_its_table_and_only_once(call, tmp_path):
    suite = write_suite(tmp_path, METHODS_USED, seeds="[0, 1]", title='"A tiny suite"')
    first = real("run", suite.name, "--workers", "1", cwd=tmp_path)
    assert first.status == 0, first.err
    assert first.out.startswith("## A tiny suite (tiny, lenet_300_100)")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.out.splitlines()]
    labels = [row[0] for row in rows if row and row[0] in ("dense", "one_shot", "rigl")]
    assert labels == ["dense", "one_shot", "rigl"]
    # Without a terminal, one line per cell and nothing else; seed 0 of everything comes first.
    lines = first.err.splitlines()
    pattern = (
        r"\[(\d)/6\] (\w+) lenet_300_100 s(0|0.9) seed(\d) [0-9a-f]{12} +\d+\.\d\d %  \d+\.\d s"
    )
    found = [re.fullmatch(pattern, line) for line in lines]
    assert [match and match.group(1, 2, 4) for match in found] == [
        (str(number + 1), label, str(seed))
        for number, (seed, label) in enumerate(
            (seed, label) for seed in (0, 1) for label in ("dense", "one_shot", "rigl")
        )
    ]
    assert names_in(tmp_path) == ["records", "tiny.toml"]
    assert len(list((tmp_path / "records" / "tiny").glob("*-seed?-*.json"))) == 6

    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    second = call("run", suite.name)
    assert (second.status, second.err) == (0, "")
    assert second.out == first.out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_an_unknown_method_ends_with_status_2_and_one_line(tmp_path):
    suite = write_suite(tmp_path, "[methods.rgil]")
    outcome = real("run", suite.name, cwd=tmp_path)
    assert (outcome.status, outcome.out) == (2, "")
    assert re.fullmatch(
        r"sparsebench: tiny\.toml: methods\.rgil: no such method: 'rgil'\. "
        r"Did you mean 'rigl'\? Known: [\w, ]+\.\n",
        outcome.err,
    )
    assert names_in(tmp_path) == ["tiny.toml"]


@pytest.mark.parametrize(
    ("fields", "piece"),
    [
        ({"models": '["lenet6"]'}, "models[0]: no such model: 'lenet6'. Did you mean 'lenet5'?"),
        ({"dataset": '"digit"'}, "dataset: no such data set: 'digit'. Did you mean 'digits'?"),
        ({"recipe": '"digit"'}, "recipe: no such recipe: 'digit'. Did you mean 'digits'?"),
        ({"methods": "[methods.rigl]\nstpo = 1"}, "no such option of rigl: 'stpo'. Did you mean"),
        ({"methods": "[methods.one_shot]", "budget": "{ steps = 9 }"}, "plans 10 steps, but the"),
        ({"sparsities": "[1.0]"}, "sparsity 1.0 lies outside [0, 1)"),
        ({"budget": "{ steps = 0 }"}, "budget: 0 is not a length"),
        ({"prunable": '"dpf"'}, "prunable = 'dpf' leaves LeNet300100 no weight"),
        ({"models": '["lenet5"]'}, "lenet5 takes images of at least 16x16, got 1x8x8"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_what_cannot_run_is_refused_with_one_line_and_nothing_written(
    command, fields, piece, call, tmp_path
):
    fields = {"methods": "[methods.rigl]"} | fields
    suite = write_suite(tmp_path, **fields)
    outcome = call(command, suite.name)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("sparsebench: tiny.toml: ")
    assert piece in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert names_in(tmp_path) == ["tiny.toml"]


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (("run", "smok"), "no such suite: 'smok'. Did you mean 'smoke'?"),
        (("plan", "none.toml"), "none.toml: cannot read the suite: No such file"),
        (("run", "smoke", "--only", "rgil*"), "--only rgil*: no cell has such a label"),
        (("run", "smoke", "--device", "gpu"), "--device gpu: cannot be used here"),
        (("run", "smoke", "--device", "meta"), "--device meta: cannot be used here"),
        (("run", "smoke", "--limit-minutes", "0"), "--limit-minutes 0.0: must be above 0"),
        (("run", "smoke", "--limit-minutes", "nan"), "--limit-minutes nan: must be above 0"),
        (("show", "0123456789ab"), "records: no such cell: '0123456789ab'. Known: none."),
        (("report",), "records: no records. Run a suite first"),
        (("report", "--by-sparsity"), "records: no records. Run a suite first"),
        (
            ("report", "smoke"),
            "suite.json: no such file. Run the suite first: sparsebench run smoke",
        ),
        (("count", "resnet21", "--input", "3x32x32"), "no such model: 'resnet21'. Did you mean"),
        (("count", "timm:resnet19", "--input", "3x32x32"), "Did you mean 'timm:resnet18'?"),
        (("count", "resnet20", "--input", "3x32"), "--input 3x32: give channels x height x width"),
        (("count", "resnet20", "--input", "3x0x32"), "--input 3x0x32: give channels x height"),
        (("count", "lenet5", "--input", "1x8x8"), "lenet5 takes images of at least 16x16"),
        (
            ("count", "resnet20", "--input", "3x32x32", "--option", "shortcut=C"),
            "shortcut: found 'C'; allowed: 'A', 'B'",
        ),
        (
            ("count", "resnet20", "--input", "3x32x32", "--option", "shortcut"),
            "--option shortcut: give name=value",
        ),
        (
            ("count", "lenet5", "--input", "1x28x28", "--scope", "erk"),
            "--scope erk: give --sparsity too, such as 0.9.",
        ),
        (
            ("count", "lenet5", "--input", "1x28x28", "--sparsity", "1"),
            "--sparsity 1: must be at least 0 and below 1.",
        ),
        (
            ("count", "lenet5", "--input", "1x28x28", "--sparsity", "nan"),
            "--sparsity nan: must be at least 0 and below 1.",
        ),
        (
            ("count", "lenet5", "--input", "1x28x28", "--sparsity", "0.9", "--scope", "global"),
            "--scope global: ranks the weights of all layers together, which only a trained",
        ),
        (
            ("count", "lenet5", "--input", "1x28x28", "--sparsity", "0.9", "--scope", "unifrm"),
            "--scope: no such scope: 'unifrm'. Did you mean 'uniform'? Known: er, erk, uniform.",
        ),
        (
            ("count", "lenet5", "--input", "1x28x28", "--prunable", "dfp"),
            "--prunable: no such preset: 'dfp'. Did you mean 'dpf'?",
        ),
        (
            ("count", "lenet_300_100", "--input", "1x28x28", "--prunable", "dpf"),
            "prunable = 'dpf' leaves LeNet300100 no weight",
        ),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_with_one_line_and_nothing_written(
    arguments, piece, call, tmp_path
):
    outcome = call(*arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("sparsebench: ")
    assert piece in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "method"),
        ("run",),
        ("runn", "smoke"),
        ("run", "smoke", "--worker", "2"),
        ("run", "smoke", "--workers", "-1"),
        ("run", "smoke", "--threads", "0"),
        ("count", "resnet20"),
        ("count", "resnet20", "--input", "3x32x32", "--classes", "0"),
    ],
    ids=str,
)
def test_a_command_line_of_wrong_form_ends_with_status_2(arguments, call, tmp_path):
    outcome = call(*arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert "Usage:" in outcome.err or "Error" in outcome.err
    assert names_in(tmp_path) == []


def test_a_missing_data_file_is_named_with_what_to_do(call, tmp_path, monkeypatch):
    import torchvision

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    suite = write_suite(tmp_path, dataset='"mnist"')
    for arguments in (("--data", "elsewhere"), ()):
        monkeypatch.setenv("SPARSEBENCH_DATA", "elsewhere")
        outcome = call("run", suite.name, *arguments)
        assert outcome.status == 2
        assert outcome.err.startswith("sparsebench: elsewhere/mnist.npz: no such file, and the")
        assert "SPARSEBENCH_DATA" in outcome.err
        assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "records").exists()


def test_a_damaged_data_file_is_named_and_kept(call, tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"damaged")
    suite = write_suite(tmp_path, dataset='"mnist"')
    outcome = call("run", suite.name, "--data", ".")
    assert outcome.status == 2
    assert outcome.err.startswith("sparsebench: mnist.npz: damaged or not an .npz file")
    assert len(outcome.err.splitlines()) == 1
    assert (tmp_path / "mnist.npz").read_bytes() == b"damaged"
    assert names_in(tmp_path) == ["mnist.npz", "tiny.toml"]


def test_without_a_folder_of_data_the_users_cache_is_used(call, tmp_path, monkeypatch):
    monkeypatch.delenv("SPARSEBENCH_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "sparsebench").mkdir(parents=True)
    (tmp_path / "cache" / "sparsebench" / "mnist.npz").write_bytes(b"")
    outcome = call("plan", write_suite(tmp_path, dataset='"mnist"').name)
    assert outcome.err.startswith(f"sparsebench: {tmp_path}/cache/sparsebench/mnist.npz: damaged")


@pytest.mark.parametrize("command", [("run", "tiny.toml"), ("plan", "tiny.toml"), ("report",)])
def test_a_damaged_record_is_named_and_kept(command, call, tmp_path):
    suite = write_suite(tmp_path, "[methods.dense]\n[methods.snip]")
    store = Store(tmp_path / "records", "tiny")
    plan = plan_of(suite)
    path = store.path(plan.manifest.cells[1].spec)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    if command == ("report",):
        store.put_manifest(plan.manifest)
    before = sorted(tmp_path.rglob("*"))
    outcome = call(*command)
    assert (outcome.status, outcome.out) == (2, "")
    relative = path.relative_to(tmp_path)
    assert outcome.err.startswith(f"sparsebench: {relative}: damaged record")
    assert "Move it away and run the suite again." in outcome.err
    assert path.read_text() == "{"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", ["methods", "models", "datasets", "recipes", "suites"])
def test_lists_are_tables_and_json(what, call):
    table = call("list", what)
    rows = json.loads(call("list", what, "--json").out)
    assert table.status == 0
    shown = [line.split("|")[1].strip() for line in table.out.splitlines()[2:]]
    assert shown == [row["name"] for row in rows]
    assert all(all(str(value) or name == "paper" for name, value in row.items()) for row in rows)
    expected = {
        "methods": set(METHODS),
        "models": {*MODELS, "timm:NAME"},
        "datasets": {"digits", "mnist", "cifar10", "synthetic"},
        "recipes": {"digits", "mnist-sgd", "dpf-resnet"},
        "suites": {"smoke", "quickstart", "mnist-lenet", "cifar10-resnet20-smoke"},
    }
    assert expected[what] <= set(shown)
    if what == "methods":
        controls = {row["name"]: row["controls"] for row in rows}
        assert (controls["dense"], controls["rigl"]) == ("none", "density")


def test_a_plan_shows_cells_and_what_is_done_and_writes_nothing(call, tmp_path):
    suite = write_suite(tmp_path, METHODS_USED)
    rows = json.loads(call("plan", suite.name, "--json").out)
    cells = plan_of(suite).manifest.cells
    assert [row["key"] for row in rows] == [cell.spec.key for cell in cells]
    assert [(row["label"], row["steps"], row["multiple"]) for row in rows] == [
        ("dense", 44, 1.0),
        ("one_shot", 52, 1.1818),
        ("rigl", 44, 1.0),
    ]
    assert {(row["status"], row["done"]) for row in rows} == {("to do", False)}
    assert names_in(tmp_path) == ["tiny.toml"]

    train(write_suite(tmp_path, "[methods.dense]"), tmp_path / "records")
    write_suite(tmp_path, METHODS_USED)
    rows = json.loads(call("plan", suite.name, "--json").out)
    assert [row["done"] for row in rows] == [True, False, False]
    table = call("plan", suite.name).out
    assert "3 cells, 2 to do; records in records/tiny" in table
    assert [line.split("|")[-2].strip() for line in table.splitlines()[2:5]] == [
        "ok",
        "to do",
        "to do",
    ]
    only = call("plan", suite.name, "--only", "*_shot", "--records", "other").out
    assert "1 cells, 1 to do; records in other/tiny" in only


def test_only_chooses_by_label_or_file_name(call, tmp_path):
    suite = write_suite(
        tmp_path, "[methods.rigl]\nevery = [5, 10]\n[methods.dense]", seeds="[0, 1]"
    )

    def chosen(only: str) -> list[tuple[str, int]]:
        rows = json.loads(call("plan", suite.name, "--only", only, "--json").out)
        return [(row["label"], row["seed"]) for row in rows]

    assert chosen("dense") == [("dense", 0), ("dense", 1)]
    assert chosen("rigl[every=10]") == [("rigl[every=10]", 0), ("rigl[every=10]", 1)]
    assert chosen("rigl*") == [(f"rigl[every={n}]", seed) for n in (5, 10) for seed in (0, 1)]
    assert chosen("*seed1*") == [("rigl[every=5]", 1), ("rigl[every=10]", 1), ("dense", 1)]


def test_run_only_leaves_the_others_to_do(call, tmp_path):
    suite = write_suite(tmp_path, METHODS_USED)
    outcome = call("run", suite.name, "--only", "dense", "--workers", "1")
    assert outcome.status == 0
    assert len(outcome.err.splitlines()) == 1
    assert re.search(r"\| one_shot +\| +90 \| +0/1 \|", outcome.out)
    assert len(list((tmp_path / "records" / "tiny").glob("*.json"))) == 2  # and suite.json


def test_a_cell_that_fails_gives_status_1_with_a_line_and_is_run_again(call, tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Fails(SparsityMethod):
        def start_phase(self, run):
            raise ValueError("on purpose,\nin two lines")

    register(monkeypatch, "fails", Fails, "none")
    suite = write_suite(tmp_path, "[methods.fails]\n[methods.dense]")
    for total in (2, 1):
        outcome = call("run", suite.name, "--workers", "1")
        assert outcome.status == 1
        lines = outcome.err.splitlines()
        assert len(lines) == total
        assert re.match(rf"\[1/{total}\] fails .* failed: ValueError: on purpose, in two", lines[0])
        assert re.search(r"\| dense +\|", outcome.out)
    assert len(names_in(tmp_path / "records" / "tiny" / "attempts")) == 2


def test_a_cell_that_diverges_gives_status_1_and_is_not_run_again(call, tmp_path):
    recipe = write_recipe(tmp_path, "batch = 64\nlr = 1e30")
    suite = write_suite(tmp_path, recipe=recipe)
    first = call("run", suite.name, "--workers", "1")
    assert first.status == 1
    assert re.search(r"diverged: the loss of step \d of 44 is not finite", first.err)
    second = call("run", suite.name)
    assert (second.status, second.err) == (1, "")


def test_show_gives_the_record_as_json_and_as_a_page(call, tmp_path):
    (record,) = train(write_suite(tmp_path, "[methods.rigl]"), tmp_path / "records")
    for name in (record.spec.key, record.spec.key[:6], record.spec.slug):
        shown = call("show", name, "--json")
        assert shown.status == 0
        assert msgspec.json.decode(shown.out, type=Record) == record
    path = Store(tmp_path / "records", "tiny").path(record.spec)
    assert read(path) == record

    page = call("show", record.spec.key)
    assert page.status == 0
    for piece in (
        record.spec.key,
        f"{record.top1:.2f}",
        "fc1.weight",
        "classifier.weight",
        "5,020",
    ):
        assert piece in page.out


def test_report_prints_the_table_of_each_suite(call, tmp_path):
    for name in ("tiny", "second"):
        train(write_suite(tmp_path, name=name, title=f'"Title of {name}"'), tmp_path / "records")
    everything = call("report")
    assert everything.status == 0
    assert [line for line in everything.out.splitlines() if line.startswith("#")] == [
        "## Title of second (second, lenet_300_100)",
        "## Title of tiny (tiny, lenet_300_100)",
    ]
    one = call("report", "tiny.toml", "--records", tmp_path / "records")
    assert one.out.count("## ") == 1
    assert one.out.strip() in everything.out
    short = call("report", "tiny", "--by-sparsity")
    assert "(tiny, lenet_300_100): top-1 % by sparsity %" in short.out
    assert call("report", "--by-sparsity").out.count("## ") == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("lenet_300_100", "--input", "1x28x28"),
            {"parameters": 266_610, "weights": 266_200, "bias": 410, "dense_macs": 266_200},
        ),
        (
            ("lenet5", "--input", "1x28x28"),
            {"parameters": 431_080, "conv_weights": 25_500, "dense_macs": 2_293_000},
        ),
        (
            ("resnet20", "--input", "3x32x32", "--option", "shortcut=B"),
            {"parameters": 272_474, "shortcut_weights": 2_560, "norm": 1_568},
        ),
        (
            ("resnet20", "--input", "3x32x32", "--classes", "100"),
            {"parameters": 269_722 + 64 * 90 + 90, "weights": 268_336 + 64 * 90},
        ),
        (
            ("timm:resnet18", "--input", "3x224x224"),  # with its own 1,000 classes
            {"parameters": 11_689_512, "dense_macs": 1_814_073_344},
        ),
    ],
    ids=str,
)
def test_count_gives_known_numbers(arguments, expected, call):
    outcome = call("count", *arguments, "--json")
    found = json.loads(outcome.out)
    assert outcome.status == 0
    assert expected == {name: found[name] for name in expected}
    assert found["weights"] == sum(layer["weights"] for layer in found["layers"])
    assert found["model"] == arguments[0]


def test_count_prints_layers_and_totals(call):
    text = call("count", "lenet_300_100", "--input", "1x28x28").out
    assert re.search(r"\| fc1\.weight +\| 300x784 +\| 235,200 +\| 235,200 +\|", text)
    assert re.search(r"\| parameters +\| 266,610 +\|", text)
    assert re.search(r"\| MACs A +\| 266,200 +\|", text)
    assert re.search(r"\| MACs B +\| 266,600 +\|", text)  # 300 and 100 ReLUs
    assert "left" not in text


RESNET50 = ("count", "timm:resnet50", "--input", "3x224x224", "--json", "--sparsity")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # RigL prints 0.42, 0.24 and 0.12 (Evci et al., 2020, figure 2).
        (("0.8", "--scope", "erk"), {"mac_fraction": 0.414}),
        (("0.9",), {"mac_fraction": 0.242, "scope": "erk"}),
        (("0.95", "--scope", "erk"), {"mac_fraction": 0.122}),
        # All layers but the first at the sparsity: 0.23 for 80 %.
        (("0.8", "--scope", "uniform", "--prunable", "rigl-uniform"), {"mac_fraction": 0.223}),
        # Lin et al., 2020, table 3: 6.79M and 4.45M left, 73.5 % and 82.6 %.
        (
            ("0.8", "--scope", "uniform", "--prunable", "dpf"),
            {"nonzero": 6_793_102, "sparsity_of_all": 0.734, "prunable": 23_454_912},
        ),
        (
            ("0.9", "--scope", "uniform", "--prunable", "dpf"),
            {"nonzero": 4_447_611, "sparsity_of_all": 0.826, "reached_sparsity": 0.9},
        ),
    ],
    ids=str,
)
def test_count_at_a_sparsity_gives_the_papers_numbers(arguments, expected, call):
    found = json.loads(call(*RESNET50, *arguments).out)
    rounded = {n: round(v, 3) if isinstance(v, float) else v for n, v in found.items()}
    assert expected == {name: rounded[name] for name in expected}
    layers = found["layers"]
    assert found["macs"] == sum(layer["macs"] for layer in layers)
    assert found["macs_b"] - found["macs"] == found["elementwise"] == 31_836_672
    assert found["prunable_nonzero"] == sum(r["nonzero"] for r in layers if r["prunable"])
    first = layers[0]
    assert first["macs"] * first["weights"] == first["dense_macs"] * first["nonzero"]


def test_count_prints_what_each_layer_keeps(call):
    arguments = ("--input", "1x28x28", "--sparsity", "0.9", "--scope", "uniform")
    text = call("count", "lenet_300_100", *arguments).out
    row = next(line for line in text.splitlines() if "fc2.weight" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
    assert cells == ["100x300", "30,000", "3,000", "0.1000", "30,000", "3,000", "100"]
    assert re.search(r"\| prunable left +\| 26,620 +\|", text)
    assert re.search(r"\| fraction of MACs A +\| 0\.1000 +\|", text)


def test_a_model_that_needs_values_is_counted_all_the_same(call, monkeypatch):
    import models

    def build(shape, classes):
        layer = torch.nn.Linear(4, classes)
        assert float(layer.weight.sum()) < 100  # which has no answer without values
        return torch.nn.Sequential(torch.nn.Flatten(), layer)

    monkeypatch.setattr(models, "_builder", lambda name: build)
    found = json.loads(call("count", "lenet5", "--input", "1x2x2", "--json").out)
    assert (found["weights"], found["nonzero"]) == (40, 50)


@pytest.mark.parametrize("model", ["conv6", "wrn_28_10", "densenet_bc_100_12", "alexnet_b"])
def test_large_networks_are_counted_at_a_sparsity(model, call):
    # How long that takes is for the benchmarks to say.
    done = call("count", model, "--input", "3x32x32", "--sparsity", "0.9", "--json")
    found = json.loads(done.out)
    assert found["prunable_nonzero"] == keep_count(found["prunable"], 0.1)


def test_an_interrupted_run_says_that_it_goes_on(call, tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Interrupts(SparsityMethod):
        def plan(self, budget, density):
            return (Phase("train", budget.steps),)

        def start_phase(self, run):
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

    register(monkeypatch, "interrupts", Interrupts, "none")
    outcome = call("run", write_suite(tmp_path, "[methods.interrupts]").name, "--workers", "1")
    assert outcome.status == 130
    assert outcome.err == "Stopped. The same command goes on from the last checkpoints.\n"
    assert not list((tmp_path / "records" / "tiny").glob("*-*.json"))


def test_a_folder_that_cannot_be_written_is_named(call, tmp_path):
    (tmp_path / "records").write_text("a file")
    outcome = call("run", write_suite(tmp_path).name, "--workers", "1")
    assert outcome.status == 2  # a wrong value, not a cell that failed
    assert outcome.err.startswith("sparsebench: --records: cannot write in records/tiny")
    assert len(outcome.err.splitlines()) == 1


def test_a_terminal_sees_a_bar_with_the_time_left(tmp_path, monkeypatch):
    records = [record_of(spec(seed=number)) for number in range(2)]
    cells = [Cell(f"m{one.spec.seed}", one.spec, 50, 1.0, 0) for one in records]
    main, other = pytest.importorskip("pty").openpty()
    seen = bytearray()

    def watch() -> None:
        while b"end of test" not in seen:
            seen.extend(os.read(main, 4096))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with open(other, "w") as terminal:  # noqa: PTH123  a descriptor
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        with live.View(cells) as view:
            view.progress(cells[0].spec.key, 25)
            view.finish(cells[0].spec.key, records[0])
            view.progress(cells[1].spec.key, 25)
            view.finish(cells[1].spec.key, dataclasses.replace(records[1], status="invalid"))
        terminal.write("end of test")
        terminal.flush()
        watcher.join(10)
    os.close(main)
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", bytes(seen)).decode()
    assert "[1/2] " in text
    assert "2/2 cells, 0 running, 1 not ok" in text
    assert "50/50 steps, " in text  # of 100: those before the first word were of an earlier run
    assert re.search(r"\d:\d\d:\d\d", text)


def test_without_a_terminal_there_is_no_bar():
    view = live.View([])
    assert view.bar is None
    assert not Console(stderr=True).is_terminal
