"""Several runners on one folder, of which some are killed or stopped: each cell is done once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import leases
from bench.leases import Leases
from bench.live import View
from bench.store import Store
from tests.bench.cells import Command, plan_of, stored, train, wait_for, write_suite

METHODS = "[methods.dense]\n[methods.rigl]\n[methods.one_shot]"
STALE_SECONDS = 1.5


class Runner(Command):
    """`sparsebench run` whose leases go stale soon."""

    def __init__(self, suite: Path, records: Path, output: Path, *more: str) -> None:
        texts = ("run", suite, "--records", records, *more)
        super().__init__(*texts, output=output, prepare=be_impatient)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process."""
        os.kill(self.process.pid, number)

    @property
    def trained(self) -> list[str]:
        """Keys of the cells of which it wrote the record."""
        lines = [line for line in self.said.splitlines() if line.startswith("[")]
        return [next(word for word in line.split() if len(word) == 12) for line in lines]


def be_impatient() -> None:
    """In the process of a command."""
    leases.STALE_SECONDS = STALE_SECONDS


@contextmanager
def ended(*runners: Runner) -> Iterator[None]:
    """Leaves none behind, whatever happens."""
    try:
        yield
    finally:
        for runner in runners:
            if runner.process.is_alive():
                runner.send(signal.SIGCONT)
                runner.kill()


def checkpoints(records: Path) -> list[Path]:
    return list((records / "tiny" / "checkpoints").glob("*.safetensors"))


def long(folder: Path) -> Path:
    """One cell of some seconds."""
    return write_suite(folder, "[methods.rigl]", budget="{ steps = 4000, max_multiple = 1.2 }")


@pytest.mark.parametrize("seeds", [2, pytest.param(10, marks=pytest.mark.faults)])
def test_two_runners_of_30_cells_leave_30_records_of_30_trainings(seeds, tmp_path):
    """Six of them where there is no time for all."""
    cells = 3 * seeds
    suite = write_suite(tmp_path, METHODS, seeds=str(list(range(seeds))))
    records = tmp_path / "records"
    runners = [
        Runner(suite, records, tmp_path / f"{number}.txt", "--workers", "1") for number in range(2)
    ]
    with ended(*runners):
        assert [runner.wait() for runner in runners] == [0, 0], [one.said for one in runners]
    trained = [key for runner in runners for key in runner.trained]
    assert len(trained) == len(set(trained)) == cells
    assert all(runner.trained for runner in runners)
    assert len(stored(records)) == cells
    # Each runner knows of all cells at the end, but for those that were done before it began.
    for runner in runners:
        others = cells - len(runner.trained)
        assert f"[{cells}/{cells}]" in runner.said or "Other runners finished" in runner.said
        assert f"Other runners finished {others + 1} of" not in runner.said
    assert not (records / "tiny" / "attempts").exists()
    assert not list((records / "tiny" / "locks").iterdir())
    assert stored(records) == {
        record.spec.key: record for record in stored_alone(suite, tmp_path / "alone")
    }


def test_the_live_view_comes_to_its_total_where_others_finish_cells(tmp_path, capsys):
    suite = write_suite(tmp_path, METHODS)
    first, second, third = train(suite, tmp_path / "records")
    with View(plan_of(suite).manifest.cells) as view:
        view.progress(first.spec.key, 10)  # from a checkpoint
        view.progress(first.spec.key, 30)
        view.finish_elsewhere(first.spec.key, first)
        view.finish(second.spec.key, second)
        view.finish_elsewhere(third.spec.key, third)
        assert view._summary() == "3/3 cells, 0 running"
        # These are what this run has had to do.
        wanted = 20 + view.cells[second.spec.key].steps
        assert sum(view.done.values()) - sum(view.before.values()) == wanted
    assert capsys.readouterr().err.splitlines()[-1] == "Other runners finished 2 of the 3 cells."


@pytest.mark.parametrize("pid", ["9" * 30, "-1", "0", "true", '"1"', "[" * 100_000])
def test_a_lease_that_names_a_process_that_cannot_be_keeps_nobody(pid, tmp_path):
    """Somebody else wrote it, or a disk damaged it: it goes stale as any other, or is free."""
    name = tmp_path / "cell.lock"
    machine = json.dumps(leases._machine())
    text = f'{{"id": "1", "machine": {machine}, "pid": {pid}, "started": "1"}}\n'
    (tmp_path / "cell.lock.1").write_text(text)
    with Leases(stale_seconds=0) as here:
        assert here.acquire(name) or here.acquire(name)


def stored_alone(suite: Path, records: Path) -> list:
    train(suite, records)
    return list(stored(records).values())


@pytest.mark.parametrize("machine", ["this", "another"])
def test_the_cells_of_a_runner_that_was_killed_are_taken_over(machine, tmp_path):
    suite = long(tmp_path)
    train(suite, tmp_path / "undisturbed")
    records = tmp_path / "records"
    options = ("--workers", "1", "--checkpoint-seconds", "0.1")
    first = Runner(suite, records, tmp_path / "first.txt", *options)
    with ended(first):
        wait_for(lambda: checkpoints(records))
        first.kill()
    (lease,) = (records / "tiny" / "locks").iterdir()
    if machine == "another":  # where nobody can see that the process is gone
        owner, beats = lease.read_bytes().split(b"\n")
        lease.write_bytes(json.dumps(json.loads(owner) | {"machine": "x"}).encode() + b"\n" + beats)
    second = Runner(suite, records, tmp_path / "second.txt", *options)
    with ended(second):
        assert second.wait() == 0, second.said
    assert len(second.trained) == 1
    assert stored(records) == stored(tmp_path / "undisturbed")
    assert not list((records / "tiny" / "locks").iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="not run: no SIGSTOP here")
@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.faults)])
def test_a_runner_that_was_stopped_for_long_writes_over_nothing_when_it_goes_on(workers, tmp_path):
    """With two workers only the one who hands out cells is stopped: its workers go on."""
    suite = write_suite(
        tmp_path,
        "[methods.rigl]\n[methods.one_shot]",
        budget="{ steps = 4000, max_multiple = 1.2 }",
    )
    train(suite, tmp_path / "undisturbed")
    records = tmp_path / "records"
    options = ("--workers", workers, "--checkpoint-seconds", "0.1")
    stopped = Runner(suite, records, tmp_path / "stopped.txt", *options)
    other = None
    try:
        wait_for(lambda: len(checkpoints(records)) == int(workers))
        stopped.send(signal.SIGSTOP)
        other = Runner(suite, records, tmp_path / "other.txt", "--workers", "1")
        assert other.wait() == 0, other.said
        written = {path: path.read_bytes() for path in Store(records, "tiny").paths()}
        assert len(written) == 2
        stopped.send(signal.SIGCONT)
        assert stopped.wait() == 0, stopped.said
    finally:
        with ended(*filter(None, [stopped, other])):
            pass
    assert len(other.trained) == 2
    assert stopped.trained == []
    assert "no sign of life" in stopped.said
    assert {path: path.read_bytes() for path in Store(records, "tiny").paths()} == written
    assert stored(records) == stored(tmp_path / "undisturbed")
    assert not (records / "tiny" / "attempts").exists()
    assert not list((records / "tiny" / "locks").iterdir())
