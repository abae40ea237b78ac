"""A clock that jumps back and forth by years, in every process of a run: nothing goes by it.

Deadlines, intervals, leases and times of records are of the monotonic clock; dates are for people.
"""

from __future__ import annotations

import datetime as dates
import os
import shutil
import signal
import subprocess
import time
from typing import Any

import pytest

from bench import runner
from bench.store import Store
from tests.bench.cells import stored, wait_for, write_suite
from tests.faults.faulty import Place
from tests.faults.test_kill import saved

YEARS = 5 * 365 * 86400

METHODS = '[methods.faulty]\nhook = "update"\n[methods.one_shot]'

LIBRARY = f"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static time_t jump(void) {{
    static unsigned calls;
    return __sync_fetch_and_add(&calls, 1) % 2 ? {YEARS} : -{YEARS};
}}

int clock_gettime(clockid_t clock, struct timespec *found) {{
    static int (*next)(clockid_t, struct timespec *);
    if (!next) next = dlsym(RTLD_NEXT, "clock_gettime");
    int status = next(clock, found);
    if (clock == CLOCK_REALTIME && !status) found->tv_sec += jump();
    return status;
}}

int gettimeofday(struct timeval *restrict found, void *restrict zone) {{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return 0;
}}

time_t time(time_t *found) {{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}}
"""
"""Goes before the C library, so that whatever asks for the date gets a wrong one."""


def _jumping() -> None:
    """The same for a process that has begun, as far as Python asks."""
    now, calls = time.time, [0]

    def jumped() -> float:
        calls[0] += 1
        return now() + (YEARS if calls[0] % 2 else -YEARS)

    class Jumping(dates.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> dates.datetime:
            return dates.datetime.fromtimestamp(jumped(), tz)

    time.time = jumped
    time.time_ns = lambda: int(1e9 * jumped())
    runner.datetime = Jumping  # type: ignore[attr-defined, misc]


@pytest.fixture
def clock(place: Place) -> dict[str, Any]:
    """What `Place.run` is to be given for a clock that jumps."""
    if not place.real:
        return {"also": _jumping}
    compiler = shutil.which("cc")
    if compiler is None or os.uname().sysname != "Linux":
        pytest.skip("not run: no C compiler, or not Linux")
    source, library = place.folder / "jump.c", place.folder / "jump.so"
    source.write_text(LIBRARY)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def years(place: Place) -> set[int]:
    """In which cells began, as their records say."""
    store = Store(place.records, "tiny")
    records = [*store.records(), *store.attempts()]
    assert all(record.times.train_seconds >= 0 for record in records)
    return {dates.datetime.fromisoformat(record.times.started).year for record in records}


def test_a_clock_that_jumps_changes_nothing_but_dates(place, clock):
    """Limits do not end a run early, intervals pass, a stop is saved, and tries stay in order."""
    budget = "{ steps = 1000, max_multiple = 1.2 }"
    suite = write_suite(place.folder, METHODS, budget=budget)
    limits: tuple[str, ...] = ("--limit-minutes", "30", "--checkpoint-seconds", "0.05")
    if place.real:  # with such a limit cells have a worker, whose clock jumps too then
        limits += ("--cell-timeout", "20")
    place.fault.write_text("memory")
    short = place.run(suite, *limits, "--retries", "2", **clock)
    assert short.wait() == 1, short.said
    attempts = Store(place.records, "tiny").attempts()
    assert [attempt.status for attempt in attempts] == ["out-of-memory"] * 3
    place.fault.unlink()

    before = saved(place.records)
    stopped = place.run(suite, *limits, **clock)
    wait_for(lambda: saved(place.records) not in ({}, before), seconds=120)
    os.kill(stopped.process.pid, signal.SIGTERM)
    assert stopped.wait() == 143, stopped.said
    assert saved(place.records)

    again = place.run(suite, *limits, **clock)
    assert again.wait() == 0, again.said
    assert "Traceback" not in again.said
    undisturbed = place.run(suite, records=place.folder / "undisturbed")
    assert undisturbed.wait() == 0, undisturbed.said
    assert stored(place.records) == stored(place.folder / "undisturbed")
    now = dates.datetime.now().year
    assert not years(place) & {now}  # the clock did jump


def test_two_runners_whose_clocks_jump_train_each_cell_once(place, clock):
    suite = write_suite(place.folder, METHODS, seeds="[0, 1, 2]")
    other = Place(place.folder / "other", place.real)
    other.install()
    runners = [one.run(suite, records=place.records, **clock) for one in (place, other)]
    assert [one.wait() for one in runners] == [0, 0], [one.said for one in runners]
    lines = [line for one in runners for line in one.said.splitlines() if line.startswith("[")]
    assert len(lines) == 6
    undisturbed = place.run(suite, records=place.folder / "undisturbed")
    assert undisturbed.wait() == 0, undisturbed.said
    assert stored(place.records) == stored(place.folder / "undisturbed")
    assert not list(place.records.glob("tiny/attempts/*"))
