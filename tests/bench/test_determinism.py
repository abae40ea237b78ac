"""Levels of determinism: what `strict` sets, that it is undone, and what is refused."""

from __future__ import annotations

import pytest
import torch

from bench.determinism import WORKSPACE, _Switches, equal_bits, level, wants_strict
from bench.errors import UsageError
from bench.runner import moments
from bench.store import Store
from bench.task import Ways
from tests.bench.cells import plan_of, tasks_of, train_one, write_suite


@pytest.fixture(autouse=True)
def as_it_was():
    before = _Switches.now()
    yield
    before.set()


def test_strict_has_torch_use_deterministic_algorithms_and_undoes_it():
    torch.backends.cudnn.benchmark = True
    before = _Switches.now()
    with equal_bits(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
    assert _Switches.now() == before
    assert torch.backends.cudnn.benchmark


def test_fast_changes_nothing():
    before = _Switches.now()
    with equal_bits(False):
        assert _Switches.now() == before


def test_it_is_undone_after_an_error():
    before = _Switches.now()
    with pytest.raises(ZeroDivisionError), equal_bits(True):
        _ = 1 / 0
    assert _Switches.now() == before


def test_cells_that_take_turns_stay_strict_until_the_last_has_ended():
    first, second = equal_bits(True), equal_bits(True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.are_deterministic_algorithms_enabled()
    second.__exit__(None, None, None)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_cell_that_asks_is_computed_with_deterministic_algorithms(tmp_path):
    plan = plan_of(write_suite(tmp_path))
    (task,) = tasks_of(plan, Store(tmp_path / "records", "tiny"), ways=Ways(strict=True))
    run = moments(task)
    next(run)
    assert torch.are_deterministic_algorithms_enabled()
    run.close()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_record_says_how_it_was_computed(tmp_path):
    record = train_one(write_suite(tmp_path), tmp_path / "records")
    assert record.execution is not None
    assert record.execution.determinism == "strict"


@pytest.mark.parametrize(
    ("strict", "device", "said"),
    [(False, "cpu", "strict"), (False, "cuda:1", "fast"), (True, "cuda", "strict")],
)
def test_a_cpu_is_strict_and_a_gpu_fast_unless_asked(strict, device, said):
    assert level(strict, device) == said


def test_a_cpu_needs_nothing_set():
    assert not wants_strict(None, "cpu")
    assert not wants_strict("strict", "cpu")


def test_fast_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match="--determinism fast is for GPUs"):
        wants_strict("fast", "cpu")


def test_a_gpu_is_fast_unless_asked(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    assert not wants_strict(None, "cuda")
    assert not wants_strict("fast", "cuda")
    assert wants_strict("strict", "cuda")


@pytest.mark.parametrize("value", [None, "", ":0:0"])
def test_strict_on_a_gpu_says_which_variable_is_missing(value, monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    if value is not None:
        monkeypatch.setenv(WORKSPACE, value)
    with pytest.raises(UsageError, match=f"{WORKSPACE}=:4096:8 sparsebench run"):
        wants_strict("strict", "cuda")


def test_the_command_line_refuses_fast_on_a_cpu(call, tmp_path):
    path = write_suite(tmp_path)
    outcome = call("run", path, "--device", "cpu", "--determinism", "fast")
    assert outcome.status == 2
    assert "--determinism fast is for GPUs" in outcome.err


@pytest.mark.gpu
def test_two_strict_trainings_on_a_gpu_give_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    path = write_suite(tmp_path, "[methods.rigl]", models='["resnet20"]', sparsities="[0.5]")
    changes = {"device": "cuda", "ways": Ways(strict=True)}
    records = [train_one(path, tmp_path / name, **changes) for name in "ab"]
    assert records[0].weights_hash == records[1].weights_hash
