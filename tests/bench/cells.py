"""Suites on disk and their cells, for tests of the harness: from a TOML text to records.

The data set is `digits`: 1,437 training images, so 22 steps an epoch at batch 64.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import suite
from bench.executors import execute
from bench.record import Record
from bench.resolve import Plan, resolve
from bench.spec import BudgetSpec, CellSpec
from bench.store import Store
from bench.task import Finished, Task
from methods import METHODS, MethodInfo
from methods.api import Controls, SparsityMethod

ROOT = Path(__file__).parent.parent.parent

COMMON: dict[str, str] = {
    "dataset": '"digits"',
    "recipe": '"digits"',
    "models": '["lenet_300_100"]',
    "sparsities": "[0.9]",
    "budget": "{ epochs = 2, max_multiple = 1.2 }",
}


def toml(methods: str = "[methods.dense]", **fields: str) -> str:
    """Text of a suite; `fields` are TOML values that replace or join the common ones."""
    lines = [f"{name} = {value}" for name, value in (COMMON | fields).items()]
    return "\n".join([*lines, methods, ""])


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    status: int
    out: str
    err: str


def write_suite(
    folder: Path, methods: str = "[methods.dense]", name: str = "tiny", **fields: str
) -> Path:
    """A suite as a file."""
    path = folder / f"{name}.toml"
    path.write_text(toml(methods, **fields), encoding="utf-8")
    return path


def write_recipe(folder: Path, text: str, name: str = "own") -> str:
    """A recipe as a file; its TOML value for `write_suite(recipe=...)`."""
    (folder / f"{name}.toml").write_text(f'title = "own"\n{text}\n', encoding="utf-8")
    return f'"{name}.toml"'


def plan_of(path: Path, data: Path = Path()) -> Plan:
    """The cells of a suite file."""
    return resolve(suite.load(str(path)), data)


def tasks_of(plan: Plan, store: Store, **changes: Any) -> list[Task]:
    """What `sparsebench run` makes of a plan on a CPU."""
    return [
        dataclasses.replace(
            Task(
                cell=cell,
                suite=plan.manifest.suite,
                recipe=plan.recipe,
                data=plan.data,
                checkpoint=store.checkpoint(cell.spec),
                weights=store.weights(cell.spec),
                masks=store.masks(cell.spec),
                device="cpu",
                checkpoint_seconds=60,
                deadline=math.inf,
                init=plan.init,
            ),
            **changes,
        )
        for cell in plan.manifest.cells
    ]


def train(path: Path, records: Path, workers: int = 1, **changes: Any) -> list[Record]:
    """Trains every cell of a suite file; the records in the order in which they came."""
    plan = plan_of(path, changes.pop("data", Path()))
    store = Store(records, plan.manifest.suite)
    store.put_manifest(plan.manifest)
    events = list(execute(tasks_of(plan, store, **changes), store, workers, threads=1))
    return [event.record for event in events if isinstance(event, Finished)]


def train_one(path: Path, records: Path, **changes: Any) -> Record:
    """Trains the only cell of a suite file."""
    (record,) = train(path, records, **changes)
    return record


def the_same(record: Record) -> Record:
    """A record without what may differ between two runs of the same cell: where and when."""
    where = {"times": None, "environment": None, "execution": None}
    return dataclasses.replace(record, **where)  # type: ignore[arg-type]


def by_key(records: Sequence[Record]) -> dict[str, Record]:
    """Records by their cell, without times and environment."""
    return {record.spec.key: the_same(record) for record in records}


def stored(records: Path, suite: str = "tiny") -> dict[str, Record]:
    """What lies in a folder of records, as `by_key` gives it."""
    return by_key(list(Store(records, suite).records()))


def register(
    monkeypatch: Any, name: str, kind: type[SparsityMethod], controls: Controls = "density"
) -> None:
    """Adds a method to the table for one test."""
    module = type(sys)(f"methods.{name}")
    module.Method = type(kind.__name__, (kind,), {"controls": controls})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"methods.{name}", module)
    monkeypatch.setitem(METHODS, name, MethodInfo(f"{name}:Method", "", controls, ""))


class Command:
    """`sparsebench` in a process of its own that starts at once: torch is loaded before it forks.

    Args:
        arguments: of the command line.
        output: file for what it prints, both streams.
        prepare: is called in the process before the command.
    """

    def __init__(
        self, *arguments: str | Path, output: Path, prepare: Callable[[], None] | None = None
    ) -> None:
        self.output = output
        texts = ["sparsebench", *map(str, arguments)]
        # The server has the environment of its own start; what tests set comes after that.
        start = (texts, str(output), dict(os.environ), prepare)
        self.process: Any = forking().Process(target=_command, args=start)
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """Exit status; minus the signal where one ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "still running"
        return int(self.process.exitcode)

    def kill(self) -> None:
        """Ends it without a chance to save anything."""
        self.process.kill()
        self.process.join()

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def forking() -> Any:
    """Processes from a server that has loaded what takes seconds to import."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["bench.launch", "reports.suite_table", "sklearn.datasets", "torch._dynamo"]
    )
    return context


def _command(
    texts: list[str],
    output: str,
    environment: dict[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = texts
    if prepare is not None:
        prepare()
    from bench.cli import main

    main()


def sparsebench(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts the command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def digits_like(
    count: int = 64, classes: int = 10, size: tuple[int, ...] = (28, 28), **changes: Any
) -> dict[str, Any]:
    """Arrays as in an .npz of MNIST, with `count` random images in each half."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split in ("train", "test"):
        arrays[f"x_{split}"] = rng.integers(0, 256, size=(count, *size), dtype=np.uint8)
        arrays[f"y_{split}"] = (np.arange(count) % classes).astype(np.uint8)
    return arrays | changes


def spec(**changes: Any) -> CellSpec:
    """A question with short made-up hashes."""
    fields: dict[str, Any] = {
        "method": "rigl",
        "model": "resnet20",
        "dataset": "cifar10",
        "recipe": "dpf-resnet",
        "sparsity": 0.9,
        "seed": 0,
        "budget": BudgetSpec(epochs=30),
        "recipe_hash": "0123456789ab",
        "data_hash": "ba9876543210",
    }
    return CellSpec(**fields | changes)
