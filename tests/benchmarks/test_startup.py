"""How long the command line takes to start, beside Python itself; and a cell, beside its steps."""

from __future__ import annotations

import itertools
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from bench.runner import moments
from bench.store import Store
from bench.trainer import Trainer
from tests.bench.cells import plan_of, tasks_of, write_suite
from tests.benchmarks.ratios import Beside

COMMANDS = ["--help", "list methods", "list models", "list suites"]


def output(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.benchmark(group="start-up")
@pytest.mark.parametrize("command", COMMANDS)
def test_start(command: str, beside: Beside) -> None:
    text = beside(
        f"start-up: {command} / python -c pass",
        lambda: output("-m", "bench", *command.split()),
        lambda: output("-c", "pass"),
        rounds=7,
    )
    assert len(text.splitlines()) > 5


@pytest.mark.benchmark(group="a cell begins")
def test_warm_start(beside: Beside, tmp_path: Path) -> None:
    """From the task to the first step, in a process that has trained a cell of the same data.

    It is compared with a hundred steps.
    """
    store = Store(tmp_path / "records", "tiny")
    (task,) = tasks_of(plan_of(write_suite(tmp_path, budget="{ steps = 1_000_000 }")), store)

    def begun() -> Trainer:
        with closing(moments(task)) as cell:
            return next(event for event in cell if isinstance(event, Trainer))

    steps = begun().run()
    assert (
        beside(
            "start-up: a cell / 100 steps of it",
            begun,
            lambda: list(itertools.islice(steps, 100)),
        ).total_steps
        == 1_000_000
    )
