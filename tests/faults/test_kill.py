"""A run that is killed and started again ends like one that was never stopped, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from bench.store import Store
from tests.bench.cells import (
    Command,
    sparsebench,
    stored,
    train,
    wait_for,
    write_recipe,
    write_suite,
)

METHODS = "[methods.rigl]\n[methods.dpf]\n[methods.one_shot]"


def small(folder: Path) -> Path:
    """A suite of a few seconds: three methods, some 2,800 steps."""
    return write_suite(folder, METHODS, budget="{ epochs = 40, max_multiple = 1.2 }")


def convolutional(folder: Path) -> Path:
    """A suite with crops and flips, a validation split, BatchNorm and Adam."""
    recipe = write_recipe(
        folder,
        'batch = 32\nlr = 0.002\noptimizer = "adam"\nwarmup = 0.1\ncrop = 1\nflip = true\n'
        "validation = 64",
    )
    return write_suite(
        folder,
        METHODS,
        recipe=recipe,
        models='["resnet20"]',
        sparsities="[0.5]",
        budget="{ steps = 40, max_multiple = 1.2 }",
    )


def saved(records: Path) -> dict[str, int]:
    """Steps in each checkpoint, by its cell."""
    found = {}
    for path in (records / "tiny" / "checkpoints").glob("*.safetensors"):
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        found[path.stem] = json.loads(header["__metadata__"]["cursor"])["total"]
    return found


def check(records: Path, undisturbed: Path) -> None:
    """The records and networks are those of an undisturbed run, and nothing else is left."""
    assert stored(records) == stored(undisturbed)
    assert len(stored(records)) == 3
    for record in Store(undisturbed, "tiny").records():
        weights = Store(records, "tiny").weights(record.spec)
        assert weights.read_bytes() == Store(undisturbed, "tiny").weights(record.spec).read_bytes()
    assert not list((records / "tiny" / "checkpoints").iterdir())
    assert not (records / "tiny" / "attempts").exists()


@pytest.mark.parametrize("suite", [small, convolutional])
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(suite, tmp_path):
    path = suite(tmp_path)
    undisturbed, records = tmp_path / "undisturbed", tmp_path / "records"
    assert {record.status for record in train(path, undisturbed)} == {"ok"}

    rng = random.Random(0)
    kills = in_training = 0
    before: dict[str, int] = {}
    while kills < 8:
        seconds = (0, 0, 0.05, 0.2)[kills % 4]
        run = Command(
            *("run", path, "--records", records, "--workers", "1"),
            *("--checkpoint-seconds", str(seconds)),
            output=tmp_path / "output.txt",
        )
        if kills == 3:
            time.sleep(rng.uniform(0.1, 0.4))  # before it has begun, perhaps
        else:
            old = before
            wait_for(
                lambda run=run, old=old: (
                    saved(records) not in ({}, old) or not run.process.is_alive()
                )
            )
            time.sleep(rng.uniform(0, 0.25))
        if not run.process.is_alive():
            break
        run.kill()
        kills += 1
        after = saved(records)
        # Nothing that was saved is ever lost: the cell is as far, or further, or done.
        for cell, steps in before.items():
            assert after.get(cell, 0) >= steps or (records / "tiny" / f"{cell}.json").exists()
        in_training += bool(after)
        before = after
    assert in_training >= 3

    last = Command(
        *("run", path, "--records", records, "--workers", "1"), output=tmp_path / "output.txt"
    )
    assert last.wait() == 0, last.said
    check(records, undisturbed)


def children(process: int) -> list[int]:
    """Processes that a process has started."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(one) for one in listed.split()]


def runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_two_workers_whose_parent_is_killed_stop_and_lose_nothing(tmp_path):
    path = small(tmp_path)
    undisturbed, records = tmp_path / "undisturbed", tmp_path / "records"
    train(path, undisturbed)
    arguments = ("run", path, "--records", records, "--workers", "2")
    arguments += ("--checkpoint-seconds", "0")

    run = sparsebench(*arguments, cwd=tmp_path)
    try:
        # Both train; or one has finished a cell before the other, on a busy machine, was there.
        wait_for(lambda: len(saved(records)) == 2 or stored(records), seconds=120)
        assert run.poll() is None, run.communicate()
        started = children(run.pid) if Path("/proc/self/task").exists() else []
    finally:
        run.send_signal(signal.SIGKILL)
        run.communicate()
    if started:
        assert len(started) >= 2
        # They notice when they next have something to say; one that is loading torch, after that.
        wait_for(lambda: not any(map(runs, started)))
    assert saved(records)

    # How many workers there are does not matter, and one needs no time to start.
    again = Command(*arguments, "--workers", "1", output=tmp_path / "output.txt")
    assert again.wait() == 0, again.said
    check(records, undisturbed)
