"""Kills of one executor, one after the other, and what must hold after each and at the end."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load

from bench.checkpoint import tensor_hash
from bench.spec import content_hash
from bench.store import Store, read
from tests.bench.cells import stored, wait_for
from tests.faults.killer import Desk, Doomed
from tests.faults.test_kill import runs

SITES = {
    "checkpoint": ("half", "sync", "link", "rename", "names"),
    "record": ("half", "sync", "rename", "link", "unlink"),
    "update": ("begin", "middle", "end"),
    "finish": ("hook", "test", "half", "sync", "rename", "checkpoint", "lease"),
}
"""Where in a phase, see `killer`. Of the finish the third to fifth are those of its weights."""


@dataclass(frozen=True)
class Kill:
    """One to come.

    Attributes:
        phase: `training`, or one of `SITES`.
        where: a site; in training whose process is killed, `driver` or `worker`.
        before: how often the site is passed before.
    """

    phase: str
    where: str
    before: int = 0

    @property
    def site(self) -> str:
        """As processes call it."""
        of_weights = self.phase == "finish" and self.where in SITES["record"]
        return f"{'weights' if of_weights else self.phase} {self.where}"


def plan(seed: int, drivers: int, workers: int, each: int, first: int = 0) -> list[Kill]:
    """Kills in a random order.

    Args:
        seed: of the order, and of how often sites are passed before.
        drivers: killed in training; `workers`, likewise.
        each: kills in every other phase.
        first: of a phase's sites, so that several plans come to all.
    """
    rng = random.Random(seed)
    kills = [Kill("training", "driver")] * drivers + [Kill("training", "worker")] * workers
    passes = {"checkpoint": 6, "update": 20}  # of the others a cell has one or two
    for phase, sites in SITES.items():
        for number in range(first, first + each):
            before = rng.randrange(passes.get(phase, 1))
            kills.append(Kill(phase, sites[number % len(sites)], before))
    rng.shuffle(kills)
    return kills


@dataclass
class Campaign:
    """Kills of one executor, on as many folders of records as they take.

    Attributes:
        suite: file of the suite that is trained.
        undisturbed: records of a run that nothing disturbed.
        folder: of the records, and of what is written down about the runs.
        options: of the command.
        landed: kills by phase, and by whether the driver died.
        trained: how often a cell came to its last step.
        rounds: folders of records.
    """

    suite: Path
    undisturbed: Path
    folder: Path
    options: tuple[str, ...]
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    landed: Counter[tuple[str, str]] = field(default_factory=Counter)
    trained: int = 0
    rounds: int = 0

    def wage(self, kills: list[Kill]) -> None:
        """Carries out all; where the suite is done before, it is looked at, and begins anew."""
        kills = list(kills)
        while kills:
            self.rounds += 1
            self.records = self.folder / f"records{self.rounds}"
            self.desk = Desk(self.folder / f"desk{self.rounds}")
            self.desk.folder.mkdir()
            left = len(kills)
            while self.run(kills) != 0:
                pass
            assert len(kills) < left, f"nobody ever came to {kills[-1].site}"
            check_records(self.records, self.undisturbed)
            self.trained += check_log(self.desk.notes(), set(stored(self.undisturbed)))

    def run(self, kills: list[Kill]) -> int:
        """One command, until it comes to its end or is killed; its exit status."""
        self.desk.clear()
        command = Doomed(
            *("run", self.suite, "--records", self.records, "--checkpoint-seconds", "0.05"),
            *self.options,
            output=self.folder / "output.txt",
            desk=self.desk,
        )
        driver = command.process
        self.desk.note("started", driver.pid)
        try:
            while kills and driver.is_alive():
                victim = self.carry_out(kills[-1], driver)
                if victim:
                    whose = "driver" if victim == driver.pid else "worker"
                    self.landed[kills.pop().phase, whose] += 1
                    self.look()
            status = command.wait(300)
        finally:
            if driver.is_alive():
                command.kill()
        assert status in (0, -signal.SIGKILL), command.said
        assert "Traceback" not in command.said, command.said
        assert "damaged" not in command.said, command.said
        return status

    def look(self) -> None:
        """After a kill no file is half written. What is saved is noted."""
        check_files(self.records)
        for path in self.records.glob("*/checkpoints/*.safetensors"):
            with suppress(FileNotFoundError):  # others go on
                self.desk.note("saved", path.stem.rpartition("-")[2], steps_in(path))

    def carry_out(self, kill: Kill, driver: Any) -> int:
        """Who was killed; 0 where the command was at its end before."""
        victim = self.in_training(kill, driver) if kill.phase == "training" else 0
        if kill.phase != "training":
            victim = self.at_site(kill, driver)
        if victim == driver.pid:
            driver.join()
        elif victim:
            wait_for(lambda: not runs(victim))
        return victim

    def at_site(self, kill: Kill, driver: Any) -> int:
        """Has whoever comes to a site kill itself there."""
        before = self.killed()
        self.desk.want(len(before), kill.site, kill.before)
        wait_for(lambda: not (driver.is_alive() and self.desk.order.exists()), seconds=600)
        if self.desk.withdraw():
            return 0
        wait_for(lambda: len(self.killed()) > len(before))
        pid, *site = self.killed()[-1]
        assert " ".join(site) == kill.site
        return int(pid)

    def in_training(self, kill: Kill, driver: Any) -> int:
        """Kills at a random time, once a cell is between its first step and its last."""
        while driver.is_alive():
            time.sleep(self.rng.uniform(0, 0.25))
            for pid in filter(runs, self.desk.pids()):
                with stopped(pid):
                    steps = self.desk.training(pid)
                    if steps is None or not runs(pid):
                        continue
                    victim = int(driver.pid) if kill.where == "driver" else pid
                    self.desk.note("killed", victim, "training", *steps)
                    os.kill(victim, signal.SIGKILL)
                    wait_for(lambda victim=victim: not runs(victim))
                    return victim
        return 0

    def killed(self) -> list[list[str]]:
        """Process and place of each kill in these records."""
        return [words for what, *words in self.desk.notes() if what == "killed"]


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that stands still, if it is there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: threads(pid) <= set("TtZX"))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def threads(pid: int) -> set[str]:
    """States of a process's threads."""
    states = set()
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            states.add(path.read_text().rpartition(")")[2].split()[0])
    return states


def check_files(records: Path) -> None:
    """Every file is whole, whoever still writes, or has the name of one that is under way."""
    for path in [path for path in records.rglob("*") if path.is_file()]:
        with suppress(FileNotFoundError):  # taken away meanwhile
            check_file(path)


def check_file(path: Path) -> None:
    if path.name.startswith(".") and path.suffix in (".tmp", ".new"):
        return
    if path.name == "suite.json":
        assert Store(path.parent.parent, path.parent.name).manifest().cells
    elif path.suffix == ".json":
        assert read(path).spec.slug in path.name
    elif path.parent.name == "checkpoints" and path.suffix in (".safetensors", ".previous"):
        steps_in(path)
    elif path.parent.name in ("weights", "masks"):
        with safe_open(path, framework="pt") as file:
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
    else:
        assert path.parent.name == "locks", f"{path}: whose is it?"
        assert path.suffix.removeprefix(".").isdecimal()


def steps_in(path: Path) -> int:
    """Steps in a checkpoint, which is whole."""
    content = path.read_bytes()  # at once, for another may take its name meanwhile
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])["__metadata__"]
    tensors = load(content)
    assert header.pop("digest") == tensor_hash(tensors) + content_hash(header), path
    return int(json.loads(header["cursor"])["total"])


def check_records(records: Path, undisturbed: Path) -> None:
    """Records and networks are those of an undisturbed run, and nothing else is left."""
    store, other = Store(records, "tiny"), Store(undisturbed, "tiny")
    for record in other.records():
        ours = store.get(record.spec)
        assert ours is not None
        assert (ours.weights_hash, ours.top1) == (record.weights_hash, record.top1)
        assert store.weights(record.spec).read_bytes() == other.weights(record.spec).read_bytes()
    assert stored(records) == stored(undisturbed)
    check_files(records)
    assert {record.status for record in store.attempts()} <= {"lost"}
    there = {path for path in records.rglob("*") if path.is_file()}
    wanted = {store.folder / path.relative_to(other.folder) for path in files(other.folder)}
    assert there - set(store.attempt_paths()) == wanted


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def check_log(notes: list[list[str]], keys: set[str]) -> int:
    """No cell was trained by two at once, to its end twice, or from further back than was saved.

    Args:
        notes: of what the cells went through, in order.
        keys: of the cells.

    Returns:
        How often one came to its last step: more often than there are cells where a kill came
        after the last step, and before the record.
    """
    driver, dead = "", set()
    holders: dict[str, list[str]] = {}
    ended: set[tuple[str, ...]] = set()
    recorded: set[str] = set()
    saved: Counter[str] = Counter()
    for what, pid, *words in notes:
        key = words[0] if words else ""
        match what:
            case "started":
                driver = pid
            case "killed":
                dead.add(pid)
            case "saved":
                saved[pid] = int(key)
            case "begun":
                assert words[1] == "False", f"{key} has a record, and is trained"
                before = holders.get(key, [])
                assert not before or dead & set(before), f"{key} is taken from one that is well"
                holders[key] = [pid, driver]
            case "from":
                assert int(words[1]) >= saved[key], f"{key} goes on from before what was saved"
            case "trained":
                assert holders[key][0] == pid, f"{key} is trained by two"
                assert (key, *holders[key]) not in ended, f"{key} is trained to its end twice"
                ended.add((key, *holders[key]))
            case "record":
                assert key not in recorded, f"{key} has two records"
                recorded.add(key)
    assert recorded == keys
    return len(ended)
