"""Leases: one owner at a time, whoever is killed, stopped, slow or released in between."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench import leases
from bench.leases import Leases
from tests.bench.cells import ROOT

ELSEWHERE = b'{"id": "1", "machine": "another", "pid": 1, "started": "5"}\n'


class Clock:
    """The observer's clock, set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_lease_has_one_owner_until_it_is_given_back(tmp_path):
    name = tmp_path / "locks" / "cell.lock"
    with Leases() as one, Leases() as other:
        lease = one.acquire(name)
        assert lease is not None
        assert lease.held()
        assert other.acquire(name) is None
        assert one.acquire(name) is None
        one.release(lease)
        assert files(name.parent) == []
        again = other.acquire(name)
        assert again is not None
        assert again.held()
        assert not lease.held()
    assert files(name.parent) == []


def test_names_that_begin_alike_are_different_leases(tmp_path):
    with Leases() as one, Leases() as other:
        assert one.acquire(tmp_path / "cell.lock")
        assert other.acquire(tmp_path / "cell.lock.more")
        assert other.acquire(tmp_path / "cell")


def test_the_lease_of_a_process_that_was_killed_is_free_at_once(tmp_path):
    name = tmp_path / "cell.lock"
    code = (
        "import os, sys; from pathlib import Path; from bench.leases import Leases\n"
        "assert Leases().acquire(Path(sys.argv[1])); os._exit(9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, check=False)
    assert ended.returncode == 9
    assert files(tmp_path) == ["cell.lock.1"]
    with Leases() as here:
        lease = here.acquire(name)
        assert lease is not None
        assert files(tmp_path) == ["cell.lock.2"]


def test_a_process_that_has_the_number_of_one_that_ended_is_another(tmp_path):
    name = tmp_path / "cell.lock"
    with Leases() as here:
        lease = here.acquire(name)
        assert lease is not None
        owner = json.loads(lease.owner)
    if not owner["started"]:
        pytest.skip("not run: this system does not say when a process began")
    (tmp_path / "cell.lock.1").write_text(json.dumps(owner | {"started": "1"}) + "\n")
    with Leases() as here:
        assert here.acquire(name)


@pytest.mark.parametrize("content", [ELSEWHERE, b"", b"[]\n", b'{"machine": 1, "pid": [\n'])
def test_a_lease_without_a_beat_goes_stale_by_the_clock_of_who_looks(content, tmp_path, clock):
    name, file = tmp_path / "cell.lock", tmp_path / "cell.lock.1"
    file.write_bytes(content)
    with Leases(stale_seconds=10) as here:
        assert here.acquire(name) is None
        clock.now += 9
        assert here.acquire(name) is None
        file.write_bytes(content + b".")  # a beat: the count starts over
        assert here.acquire(name) is None
        clock.now += 9
        assert here.acquire(name) is None
        clock.now += 1
        lease = here.acquire(name)
        assert lease is not None
        assert lease.held()
        assert files(tmp_path) == ["cell.lock.2"]


def test_an_owner_notices_that_it_was_taken_for_dead_and_leaves_the_other_alone(tmp_path, clock):
    name = tmp_path / "cell.lock"
    with Leases(stale_seconds=10) as here, Leases() as slow:
        lease = slow.acquire(name)
        assert lease is not None
        assert here.acquire(name) is None
        clock.now += 10
        taken = here.acquire(name)
        assert taken is not None
        assert not lease.held()
        lease.beat()  # it wakes, and does not know yet
        assert taken.held()
        slow.release(lease)
        assert taken.held()
        assert files(tmp_path) == ["cell.lock.2"]


def test_a_lease_is_lost_as_soon_as_there_is_a_higher_one(tmp_path):
    """Though its own file is still there: the other has yet to clear up."""
    with Leases() as here:
        lease = here.acquire(tmp_path / "cell.lock")
        assert lease is not None
        (tmp_path / "cell.lock.2").write_bytes(ELSEWHERE)
        assert not lease.held()


def test_of_many_who_find_a_lease_stale_one_gets_it(tmp_path):
    for turn in range(20):
        name = tmp_path / f"{turn}.lock"
        (tmp_path / f"{turn}.lock.1").write_bytes(ELSEWHERE)
        runners = [Leases(stale_seconds=0) for _ in range(6)]
        for runner in runners:
            assert runner.acquire(name) is None  # the first look
        start = threading.Barrier(len(runners))
        found = []

        def race(runner: Leases, name: Path = name, start=start, found=found) -> None:
            start.wait()
            if lease := runner.acquire(name):
                found.append(lease)

        racers = [threading.Thread(target=race, args=(runner,)) for runner in runners]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert sum(lease.held() for lease in found) == 1
        for runner in runners:
            runner.__exit__(None, None, None)


def test_a_lease_that_was_given_back_and_taken_anew_meanwhile_is_left_alone(
    tmp_path, clock, monkeypatch
):
    name = tmp_path / "cell.lock"
    create = leases._create
    with Leases(stale_seconds=10) as here, Leases() as slow, Leases() as third:
        lease = slow.acquire(name)
        assert lease is not None
        assert here.acquire(name) is None
        clock.now += 10
        theirs = []

        def late(name: Path, number: int) -> leases.Lease | None:
            """Between the look and the file, the slow one wakes, ends, and a third begins."""
            monkeypatch.setattr(leases, "_create", create)
            slow.release(lease)
            theirs.append(third.acquire(name))
            return create(name, number)

        monkeypatch.setattr(leases, "_create", late)
        assert here.acquire(name) is None
        assert theirs[0] is not None
        assert theirs[0].held()
        assert files(tmp_path) == ["cell.lock.1"]


def test_the_one_who_lists_a_folder_too_late_gives_up(tmp_path, monkeypatch):
    """A folder that is listed while a file comes and another goes may show neither."""
    name = tmp_path / "cell.lock"
    numbers = leases._numbers
    with Leases() as here, Leases() as other:
        (tmp_path / "cell.lock.1").write_bytes(b"")
        other._seen[tmp_path / "cell.lock.1"] = (b"", -1000.0)
        lease = other.acquire(name)
        assert lease is not None
        assert lease.number == 2
        looks: list[list[int]] = [[]]
        monkeypatch.setattr(leases, "_numbers", lambda of: looks.pop() if looks else numbers(of))
        assert here.acquire(name) is None
        assert not looks
        assert lease.held()
        assert files(tmp_path) == ["cell.lock.2"]


def test_leases_beat_until_they_are_given_back(tmp_path):
    name, file = tmp_path / "cell.lock", tmp_path / "cell.lock.1"
    others = set(threading.enumerate())  # of other tests, whose runners were left as they were
    with Leases(stale_seconds=0.08) as here:
        lease = here.acquire(name)
        assert lease is not None
        assert set(threading.enumerate()) - others
        until = time.monotonic() + 20
        while file.stat().st_size < len(lease.owner) + 3:
            assert time.monotonic() < until
            time.sleep(0.005)
        assert file.read_bytes().startswith(lease.owner)
        here.release(lease)
        time.sleep(0.03)
        assert files(tmp_path) == []
    assert not set(threading.enumerate()) - others


def test_a_full_disk_leaves_no_lease_without_an_owner(tmp_path, monkeypatch):
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(leases.os, "write", full)
    with Leases() as here, pytest.raises(OSError, match="No space"):
        here.acquire(tmp_path / "cell.lock")
    assert files(tmp_path) == []


def test_a_beat_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    def full(self) -> None:
        beats.append(1)
        raise OSError(28, "No space left on device")

    beats: list[int] = []
    monkeypatch.setattr(leases.Lease, "beat", full)
    with Leases(stale_seconds=0.01) as here:
        lease = here.acquire(tmp_path / "cell.lock")
        assert lease is not None
        until = time.monotonic() + 20
        while len(beats) < 3:
            assert time.monotonic() < until
            time.sleep(0.005)
        assert lease.held()


def test_a_folder_that_bears_a_leases_name_is_stepped_over(tmp_path):
    (tmp_path / "cell.lock.1").mkdir()
    with Leases() as here, Leases() as other:
        lease = here.acquire(tmp_path / "cell.lock")
        assert lease is not None
        assert lease.number == 2
        assert lease.held()
        assert other.acquire(tmp_path / "cell.lock") is None
    assert files(tmp_path) == ["cell.lock.1"]


@pytest.mark.parametrize("end", ["99999999999999999999", "01", "0", "\u0661", "1.tmp"])
def test_names_that_no_lease_has_count_for_nothing(end, tmp_path):
    (tmp_path / f"cell.lock.{end}").write_bytes(ELSEWHERE)
    with Leases() as here:
        lease = here.acquire(tmp_path / "cell.lock")
        assert lease is not None
        assert lease.number == 1
    assert files(tmp_path) == [f"cell.lock.{end}"]
