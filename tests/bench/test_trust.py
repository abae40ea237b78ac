"""Files of other people: nothing of them runs, and no name in them leads out of the store."""

from __future__ import annotations

import ast
import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import datasets, suite
from bench.errors import BenchError, DataError, RecordError, SuiteError
from bench.exported import describe
from bench.initial import located
from bench.networks import make_model
from bench.planning import check_plan
from bench.record import decode, encode
from bench.store import Store, read
from methods.api import Phase
from tests.bench.cells import ROOT, train_one, write_suite


class Bomb:
    """What runs where it is unpickled."""

    def __reduce__(self):
        return (Path("exploded").touch, ())


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return train_one(write_suite(folder), folder / "records")


def test_no_module_unpickles_evaluates_or_imports_what_a_file_names():
    """The one place that runs a file is `conform FILE.py`, named on the command line."""
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
    running = {"eval", "exec", "compile", "__import__"}
    found = []
    for package in ("bench", "methods", "models", "reports"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    modules = [alias.name for alias in node.names]
                    modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                    found += [f"{name}: {m}" for m in modules if m.split(".")[0] in forbidden]
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    if called in running or called in ("torch.load", "torch.hub.load"):
                        found.append(f"{name}: {called}")
                    if called.endswith("exec_module") and name != "bench/interface.py":
                        found.append(f"{name}: {called}")
                    if called in ("np.load", "numpy.load") and "allow_pickle=False" not in (
                        ast.unparse(node)
                    ):
                        found.append(f"{name}: {called}")
    assert found == []


def test_pickled_arrays_in_a_data_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bombs = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "mnist.npz", x_train=bombs, y_train=bombs, x_test=bombs, y_test=bombs)
    with pytest.raises(DataError):
        datasets.load("mnist", tmp_path)
    assert not Path("exploded").exists()


def test_pickled_first_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("weights.safetensors").write_bytes(pickle.dumps(Bomb()))
    path = write_suite(tmp_path, init='"weights.safetensors"')
    from bench.resolve import resolve

    with pytest.raises(SuiteError, match="no safetensors file"):
        resolve(suite.load(str(path)), tmp_path)
    with pytest.raises(SuiteError):
        located("weights.pt", tmp_path, "init")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "option", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"]
)
def test_model_options_that_load_a_file_are_refused_from_records_too(option, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "weights.pth")
    options = {option: str(tmp_path / "weights.pth")}
    with pytest.raises(SuiteError, match=f"{option}: options that load a file"):
        make_model("timm:resnet10t", datasets.DATASETS["digits"], options, 0)


@pytest.mark.parametrize(
    "name", ["../outside", "/tmp/outside", "a/b", "a\\b", "a\nb", "", "x" * 300]
)
def test_a_method_whose_name_is_no_file_name_is_refused(name, record):
    with pytest.raises(SuiteError):
        dataclasses.replace(record.spec, method=name)
    text = encode(record).replace(b'"method":"dense"', b'"method":' + json.dumps(name).encode())
    with pytest.raises(RecordError, match="damaged record"):
        decode(text, "a.json")


def test_a_models_slashes_stay_in_one_file_name(record, tmp_path):
    spec = dataclasses.replace(record.spec, model="timm:../../x")
    store = Store(tmp_path, "tiny")
    for path in (store.path(spec), store.checkpoint(spec), store.weights(spec), store.masks(spec)):
        assert path.resolve().is_relative_to(tmp_path.resolve() / "tiny")
        assert ".." not in path.parts


def test_a_record_under_another_name_than_its_content_gives_is_refused(record, tmp_path):
    path = tmp_path / "tiny" / f"{record.spec.slug}x.json"
    path.parent.mkdir()
    path.write_bytes(encode(record))
    with pytest.raises(RecordError, match="edited or renamed"):
        read(path)


@pytest.mark.parametrize("name", ["../../outside", "a/b", "a\\b", "a\nb", ""])
def test_a_phase_whose_name_is_no_file_name_is_refused(name, record):
    tree = json.loads(encode(record))
    tree["phases"][0]["name"] = name
    with pytest.raises(RecordError, match="name"):
        decode(json.dumps(tree).encode(), "a.json")
    with pytest.raises(ValueError, match="its name is a file's"):
        check_plan((Phase(name=name, steps=1, density=1.0),))


@pytest.mark.parametrize("name", ["../other", "a/b", "-rf", "", "a\nb", "x" * 101])
def test_a_records_suite_is_a_name_and_no_path(name, record):
    text = encode(dataclasses.replace(record, suite=name))
    with pytest.raises(RecordError, match="is no name"):
        decode(text, "a.json")


@pytest.mark.parametrize(
    "text", ["method.py", "./method.py:Kind", "os:system", "package.module:Kind", "/tmp/a.py"]
)
def test_a_suite_may_not_name_code(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("method.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
    path = write_suite(tmp_path, f'[methods.own]\nmethod = "{text}"')
    with pytest.raises(SuiteError, match="a suite may not name code") as raised:
        suite.load(str(path))
    assert "sparsebench conform FILE.py" in str(raised.value)
    assert not Path("exploded").exists()


def test_a_suite_named_like_a_path_stays_in_its_folder(tmp_path):
    (tmp_path / "..x.toml").write_text("")
    with pytest.raises(SuiteError, match="name the file with"):
        suite.load(str(tmp_path / "..x.toml"))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 10**400},
        {"steps": -1},
        {"top1": 1e300},
        {"times": {"train_seconds": -1.0, "update_seconds": 0, "eval_seconds": 0, "started": ""}},
    ],
)
def test_numbers_that_nothing_can_be_computed_with_are_refused(change, record):
    with pytest.raises(RecordError):
        decode(json.dumps(json.loads(encode(record)) | change).encode(), "a.json")


def test_a_damaged_description_of_an_export_is_refused(tmp_path):
    for content in (b"\xff\xfe", b"[" * 5000, b"{}", pickle.dumps(Bomb())):
        (tmp_path / "network.json").write_bytes(content)
        with pytest.raises(BenchError):
            describe(tmp_path)
