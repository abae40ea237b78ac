"""`beside`, and the table of ratios after a run; `--write-baseline` makes them the baseline."""

from __future__ import annotations

import time
from typing import Any

import pytest

from bench.process_settings import set_up_process
from tests.benchmarks import ratios

FOUND = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-baseline", action="store_true", help="keep the measured ratios as the baseline"
    )


@pytest.fixture
def beside(benchmark: Any, request: pytest.FixtureRequest) -> ratios.Beside:
    """Times a function in turns with a reference."""
    found = request.config.stash.setdefault(FOUND, {})
    marker = request.node.get_closest_marker("benchmark")
    return ratios.Beside(benchmark, found, marker.kwargs.get("timer", time.perf_counter))


@pytest.fixture(scope="session")
def measuring(request: pytest.FixtureRequest) -> bool:
    """Whether times are taken; else once through, small, is enough."""
    config = request.config
    # Beside pytest-xdist, pytest-benchmark takes none.
    return not config.getoption("benchmark_disable") and not config.getoption("numprocesses", None)


@pytest.fixture(scope="session", autouse=True)
def as_in_a_run() -> None:
    """One thread, and memory that is kept, as in the processes that train."""
    set_up_process(threads=1)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(FOUND, {})
    if not found:
        return
    baseline = ratios.read()
    terminalreporter.section("ratios of times, each measured in turns")
    for line in ratios.report(found, baseline):
        terminalreporter.write_line(line)
    if config.getoption("--write-baseline"):
        baseline.with_new(found).write()
        terminalreporter.write_line(f"written: {ratios.BASELINE}")
