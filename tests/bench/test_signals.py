"""A wish to stop: the first signal is remembered, the second ends at once, workers wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from bench import signals
from tests.bench.cells import ROOT

HEARD = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def heard():
    """No signal is ignored, whatever started the tests."""
    former = {number: signal.signal(number, signal.default_int_handler) for number in HEARD}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_the_first_signal_is_remembered_with_its_exit_status(number, status):
    with signals.listen():
        assert not signals.stop_requested()
        assert signals.exit_status() == 0
        signal.raise_signal(number)
        assert signals.stop_requested()
        assert signals.exit_status() == status


def test_afterwards_handlers_and_memory_are_as_they_were():
    with signals.listen():
        signal.raise_signal(signal.SIGTERM)
    assert not signals.stop_requested()
    assert [signal.getsignal(number) for number in HEARD] == [signal.default_int_handler] * 3


def test_a_second_signal_ends_at_once_and_the_status_is_the_firsts():
    with signals.listen():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.exit_status() == 143
        assert {signal.getsignal(number) for number in HEARD} == {signal.SIG_DFL}
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.listen():
        signal.raise_signal(signal.SIGHUP)
        assert not signals.stop_requested()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_request_counts_as_a_signal_and_the_first_wins():
    with signals.listen():
        signals.request()
        signals.request(signal.SIGINT)
        assert signals.exit_status() == 143


def test_in_another_thread_only_a_request_counts():
    found = []

    def inside() -> None:
        with signals.listen():
            found.append(signal.getsignal(signal.SIGTERM) is signal.default_int_handler)
            signals.request()
            found.append(signals.stop_requested())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [True, True]


def test_a_worker_heeds_only_sigterm_and_any_number_of_them():
    code = """
    import signal
    from bench import signals

    signals.request(signal.SIGINT)  # as if forked off a parent that had one
    signals.follow()
    assert not signals.stop_requested()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.raise_signal(number)
    assert not signals.stop_requested()
    for _ in range(3):
        signal.raise_signal(signal.SIGTERM)
    print(signals.exit_status())
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (run.stdout, run.returncode) == ("143\n", 0), run.stderr
