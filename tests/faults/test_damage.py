"""Files that are damaged, and disks that are full or read-only: for real, not by a patched library.

What `test_disk.py` makes fail write by write is here a small disk of its own (a tmpfs), where the
system lets the tests mount one. The next run completes the suite as if nothing had happened.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from bench import checkpoint
from bench.record import Record
from bench.store import Store
from tests.bench.cells import Command, digits_like, stored, wait_for, write_suite
from tests.faults.faulty import Place
from tests.faults.test_kill import children
from tests.faults.test_stop import begun

METHODS = '[methods.faulty]\nhook = "start_phase"\n[methods.one_shot]'
"""A cell that goes on never comes to this hook; one that starts over does."""

UNDISTURBED: dict[str, dict[str, Record]] = {}
"""Records of each suite by its text: how often they are made does not matter."""


def small(folder: Path) -> Path:
    """A suite of some seconds, where every step is saved: there is time for a fault."""
    return write_suite(folder, METHODS, budget="{ steps = 400, max_multiple = 1.2 }")


def finished(run: Command, status: int = 0) -> str:
    """What a command said that ended with this status, and without a traceback."""
    assert run.wait() == status, run.said
    assert "Traceback" not in run.said
    return run.said


def complete(place: Place, suite: Path, *options: str, records: Path | None = None) -> str:
    """What the same command says when all is well again."""
    place.fault.unlink(missing_ok=True)
    said = finished(place.run(suite, *options, records=records))
    same(place, suite, *options, records=records)
    return said


def same(place: Place, suite: Path, *options: str, records: Path | None = None) -> None:
    """All is as if there had been no fault, and nothing is left of it."""
    place.fault.unlink(missing_ok=True)
    text = suite.read_text()
    if text not in UNDISTURBED:
        finished(place.run(suite, *options, records=place.folder / "undisturbed"))
        UNDISTURBED[text] = stored(place.folder / "undisturbed")
    found = records or place.records
    assert stored(found) == UNDISTURBED[text]
    assert not list(found.glob("tiny/checkpoints/*.safetensors*"))
    assert not list(found.glob("tiny/locks/*")) + list(found.rglob("*.tmp"))


# Checkpoints


def stopped(place: Place, suite: Path) -> Path:
    """The newest checkpoint of a cell that was stopped in the middle, with one before it."""
    run = place.run(suite, "--checkpoint-seconds", "0")
    wait_for(lambda: list(place.records.glob("tiny/checkpoints/*.previous")), seconds=120)
    os.kill(run.process.pid, signal.SIGTERM)
    finished(run, 143)
    (path,) = place.records.glob("tiny/checkpoints/*.safetensors")
    return path


def flip(path: Path) -> None:
    """One bit in the middle of the tensors."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_version(path: Path) -> None:
    """Whole, but of a format to come."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["format"] = checkpoint.FORMAT.rpartition("-")[0] + "-99"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


DAMAGE = {
    "flip": (flip, "damaged checkpoint (its content changed)."),
    "cut": (cut, "damaged checkpoint ("),
    "empty": (empty, "damaged checkpoint ("),
    "version": (of_another_version, "its format is 'sparsebench-checkpoint-99', not"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_is_used(kind, place):
    if place.real and kind != "flip":
        pytest.skip("not run: that commands begin alike is tried with one damage")
    suite = small(place.folder)
    newest = stopped(place, suite)
    damage, text = DAMAGE[kind]
    damage(newest)
    place.fault.write_text("raises, training")  # should it start over
    said = finished(place.run(suite))
    (told,) = (line for line in said.splitlines() if text in line)
    assert told.startswith(f"{newest}: ")
    assert told.endswith(f"It is kept as {newest.stem}.damaged; the one before it is tried.")
    assert "starts over" not in said
    assert newest.with_suffix(".damaged").exists()
    same(place, suite)


def test_where_both_checkpoints_are_damaged_the_cell_starts_over(place):
    suite = small(place.folder)
    newest = stopped(place, suite)
    flip(newest)
    cut(checkpoint.previous(newest))
    place.fault.write_text("raises, training")
    said = finished(place.run(suite), 1)
    assert "failed: RuntimeError: the fault" in said
    assert said.count("damaged checkpoint (") == 2
    assert said.count("the cell starts over.") == 1
    place.fault.unlink()
    complete(place, suite)


def test_where_the_newest_checkpoint_is_gone_the_one_before_it_is_used(place):
    suite = small(place.folder)
    newest = stopped(place, suite)
    newest.unlink()
    place.fault.write_text("raises, training")
    assert "damaged" not in finished(place.run(suite))
    same(place, suite)


# Records


def test_a_record_that_was_cut_off_is_named_and_once_it_is_moved_away_comes_again(place):
    suite = write_suite(place.folder, METHODS)
    finished(place.run(suite))
    path, other = Store(place.records, "tiny").paths()
    whole = other.read_bytes()
    cut(path)
    (line,) = finished(place.run(suite), 2).splitlines()
    assert line.startswith(f"sparsebench: {path}: damaged record")
    assert line.endswith("Move it away and run the suite again.")
    path.rename(place.folder / "moved")
    assert "[1/1]" in complete(place, suite)
    assert other.read_bytes() == whole


def test_a_failed_try_that_was_cut_off_is_named_too(place):
    """It is no result, so it keeps no cell from training; the table would tell of it."""
    suite = write_suite(place.folder, '[methods.faulty]\nhook = "update"')
    place.fault.write_text("raises, training")
    finished(place.run(suite), 1)
    place.fault.unlink()
    (path,) = place.records.glob("tiny/attempts/*.json")
    cut(path)
    said = finished(place.run(suite), 2)
    assert f"sparsebench: {path}: damaged record" in said
    path.rename(place.folder / "moved")
    complete(place, suite)


# Disks


@pytest.fixture
def disk(place: Place) -> Iterator[Path]:
    """A disk of 1 MB of its own, less than a cell needs."""
    folder = place.folder / "disk"
    folder.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    if mounted.returncode:
        pytest.skip(f"not run: no disk can be mounted here ({mounted.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Of the system; where there is none, it says so as if it had been refused."""
    command = ["mount", *arguments]
    if shutil.which("mount") is None:
        return subprocess.CompletedProcess(command, 1, "", "no mount")
    return subprocess.run(command, capture_output=True, text=True, check=False)


def grow(disk: Path, size: str = "64m") -> None:
    mount("-o", f"remount,rw,size={size}", str(disk)).check_returncode()


@contextmanager
def filling(disk: Path) -> Iterator[None]:
    """Takes all room at once, and what a process gives back as soon as it does."""
    over = threading.Event()

    def fill() -> None:
        with (disk / "big").open("wb", 0) as file:
            while not over.is_set():
                try:
                    file.write(bytes(4096))
                except OSError:
                    over.wait(0.001)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        (disk / "big").unlink()


def test_a_disk_that_is_too_small_is_told_before_the_first_step(disk, place):
    suite = small(place.folder)
    records = disk / "records"
    said = finished(place.run(suite, records=records), 1)
    assert "Make room, and run the suite again" in said
    attempts = Store(records, "tiny").attempts()
    assert {(record.status, record.steps) for record in attempts} == {("failed", 0)}
    assert all("checkpoints, weights and masks need" in record.reason for record in attempts)
    grow(disk)
    complete(place, suite, records=records)


def test_a_disk_that_is_full_all_of_a_sudden_loses_nothing(disk, place):
    """Somebody else fills it while a cell trains: not even a failed try can be written."""
    grow(disk, "16m")
    suite = small(place.folder)
    records = disk / "records"
    run = place.run(suite, "--checkpoint-seconds", "0", records=records)
    wait_for(lambda: begun(records, 1), seconds=120)
    with filling(disk):
        said = finished(run, 1)
    assert "the last checkpoint stays." in said
    assert said.splitlines()[-1].startswith(f"sparsebench: {records / 'tiny'}: cannot write there")
    assert "No space left on device" in said.splitlines()[-1]
    assert list(records.glob("tiny/checkpoints/*.safetensors"))
    assert not list(records.rglob("*.tmp"))
    complete(place, suite, records=records)


def test_a_read_only_disk_is_told_in_a_line_before_anything_trains(disk, place):
    suite = small(place.folder)
    records = disk / "records"
    records.mkdir()
    mount("-o", "remount,ro", str(disk)).check_returncode()
    (line,) = finished(place.run(suite, records=records), 2).splitlines()
    assert line.startswith(f"sparsebench: --records: cannot write in {records / 'tiny'} (")
    assert "Read-only file system" in line
    grow(disk)
    complete(place, suite, records=records)


def _unprivileged() -> None:
    """Takes from root that it may write everywhere; others never could."""
    header = struct.pack("Ii", 0x20080522, 0)  # of the interface's third version; this process
    sets = (ctypes.c_uint32 * 6)()
    library = ctypes.CDLL(None)
    assert library.capget(header, sets) == 0
    for kind in (0, 1, 2):  # effective, permitted, inherited
        sets[kind] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert library.capset(header, sets) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="not run: root has no capabilities here")
@pytest.mark.parametrize("part", ["", "tiny/checkpoints", "tiny/weights", "tiny/locks"])
def test_a_folder_that_must_not_be_written_is_told_and_loses_nothing(part, place):
    if place.real:
        pytest.skip("not run: the command's process gives its rights away itself")
    suite = small(place.folder)
    closed = place.records / part
    closed.mkdir(parents=True)
    closed.chmod(0o500)
    try:
        run = place.run(suite, "--checkpoint-seconds", "0.1", also=_unprivileged)
        said = finished(run, {"": 2, "tiny/checkpoints": 0}.get(part, 1))
    finally:
        closed.chmod(0o700)
    assert "Permission denied" in said
    complete(place, suite)


# Data


def striped(count: int) -> dict[str, np.ndarray]:
    """Images that tell their class by the place of a stripe."""
    arrays = digits_like(count)
    for split in ("train", "test"):
        for image, label in zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True):
            image[2 * label : 2 * label + 3] = 255
    return arrays


def workers(run: Command) -> list[int]:
    """They are started by a process that the command has started for that."""
    return [worker for server in children(run.process.pid) for worker in children(server)]


def test_data_that_change_during_a_run_fail_the_cell_that_would_see_both(place):
    """The worker that has read them dies, and the cell would go on with others."""
    data = place.folder / "data"
    data.mkdir()
    np.savez(data / "mnist.npz", **striped(256))
    recipe = place.folder / "own.toml"
    recipe.write_text('title = "own"\nbatch = 32\nlr = 0.1\n')
    suite = write_suite(
        place.folder,
        "[methods.rigl]",
        dataset='"mnist"',
        recipe='"own.toml"',
        budget="{ steps = 300, max_multiple = 1.2 }",
    )
    options = ("--data", str(data))
    # Where a cell has a limit of time, a worker of its own trains it.
    run = place.run(suite, *options, "--checkpoint-seconds", "0", "--cell-timeout", "60")
    wait_for(lambda: begun(place.records, 1), seconds=120)
    kept = data / "kept"
    (data / "mnist.npz").rename(kept)
    np.savez(data / "mnist.npz", **striped(192))
    (worker,) = workers(run)
    os.kill(worker, signal.SIGKILL)
    said = finished(run, 1)
    assert said.count("it is tried again at the end") == 1
    assert f"mnist in {data} changed since the suite was resolved" in said
    attempts = Store(place.records, "tiny").attempts()
    assert [attempt.status for attempt in attempts] == ["lost", "failed"]
    assert attempts[-1].traceback == ""
    kept.replace(data / "mnist.npz")
    complete(place, suite, *options)
