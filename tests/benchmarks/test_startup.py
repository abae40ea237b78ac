"""How long the command line takes to start, beside Python itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
