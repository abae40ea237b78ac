"""Checkpoints by anybody: the cell goes on, or starts over and ends as if there had been none."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bench import checkpoint
from bench.errors import CheckpointError
from bench.record import FINAL, Record
from bench.runner import Finished, Task, moments
from bench.store import Store
from bench.trainer import Trainer
from tests.bench.cells import plan_of, tasks_of, write_suite
from tests.fuzz.harm import Tally, fuzz, only_inside
from tests.fuzz.mutations import MISSING, ODD, mutated, scratched

SIZES = [60, pytest.param(10_000, marks=pytest.mark.faults)]
JSON = ("cursor", "numbers", "snapshots", "slots")
NAMES = frozenset({"phase", "step", "total", "position", "phases", "name"})
SAVED_AT = 5

EVERY = 20
"""So many of the inputs are trained on to the end; of the others the first step is due."""


def walk(task: Task, steps: int | None = None) -> Record | Trainer:
    """Trains a cell to its record; or so many steps, and then the trainer as it stands."""
    run = moments(task)
    event = next(run)
    while not isinstance(event, Finished):
        if not isinstance(event, Trainer):
            event = next(run)
            continue
        if event.cursor.total == steps:
            return event
        try:
            event.compute()
        except Exception as error:  # as `bench.together` hands it back
            event = run.throw(error)
        else:
            event = next(run)
    return event.record


def begin(task: Task) -> Record | Trainer:
    """A cell up to its first step, or its record where it comes to none."""
    run = moments(task)
    event = next(run)
    while not isinstance(event, Finished | Trainer):
        event = next(run)
    run.close()
    return event.record if isinstance(event, Finished) else event


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    """A cell of several phases with a snapshot, an optimizer's memory and masks."""
    folder = tmp_path_factory.mktemp("cell")
    path = write_suite(
        folder,
        "[methods.lottery_ticket]",
        models='[{ name = "lenet_300_100", width = 0.05 }]',
        sparsities="[0.2]",
        budget="{ steps = 4, max_multiple = 9.0 }",
    )
    plan = plan_of(path)
    (found,) = tasks_of(plan, Store(folder / "inside", "tiny"))
    return found


@pytest.fixture(scope="module")
def saved(task) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of its checkpoint."""
    trainer = walk(task, SAVED_AT)
    assert isinstance(trainer, Trainer)
    checkpoint.write(trainer, task.checkpoint, task.cell.spec.key)
    with safe_open(task.checkpoint, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@st.composite
def damaged(draw: st.DrawFn, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which some are gone, or have other names, shapes, types or values."""
    found = dict(tensors)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(found)))
        value = found.pop(name)
        kind = draw(st.integers(0, 5))
        if kind == 1:
            found["../" + name] = value
        elif kind == 2:
            found[name] = value.reshape(-1)[: draw(st.integers(0, 4))].clone()
        elif kind == 3:
            found[name] = value.to(draw(st.sampled_from([torch.float16, torch.int64, torch.bool])))
        elif kind == 4:
            found[name] = torch.full_like(value, float("nan") if value.is_floating_point() else 3)
        elif kind == 5:
            found[name] = value[None].expand(2, *value.shape).clone()
    return found


@st.composite
def files(draw: st.DrawFn, saved: tuple[dict[str, str], dict[str, Tensor]]) -> bytes:
    """A checkpoint, changed; most of them with the checksums that go with it."""
    header, tensors = dict(saved[0]), draw(damaged(saved[1]))
    for name in draw(st.lists(st.sampled_from([*JSON, *sorted(header)]), max_size=2)):
        if name in JSON:
            values = ODD | st.just(MISSING) | st.none()
            tree = draw(mutated({"": json.loads(header[name])}, values, NAMES))
            header[name] = json.dumps(tree.get(""))
        elif name != "digest":
            header[name] = str(draw(ODD))
    if draw(st.integers(0, 9)):
        header["layout"] = checkpoint._layout(tensors)
        header.pop("digest", None)
        header["digest"] = checkpoint._digest(header, tensors)
    content = save(tensors, metadata=header)
    return content if draw(st.integers(0, 9)) else draw(scratched(content))


def plain(record: Record) -> Record:
    """What must be equal of two trainings of a cell."""
    return dataclasses.replace(record, times=None, environment=None, execution=None)  # type: ignore[arg-type]


def test_an_undamaged_checkpoint_goes_on_to_the_undisturbed_record(task, saved):
    whole = save(saved[1], metadata=saved[0])
    shutil.rmtree(task.checkpoint.parents[1])
    undisturbed = walk(task)
    task.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    task.checkpoint.write_bytes(whole)
    assert isinstance(undisturbed, Record)
    assert plain(walk(task)) == plain(undisturbed)


@pytest.mark.parametrize("examples", SIZES)
def test_a_checkpoint_by_anybody_is_taken_up_or_put_aside_and_the_cell_ends(examples, task, saved):
    store = task.checkpoint.parents[1]
    shutil.rmtree(store, ignore_errors=True)
    undisturbed = walk(task)
    assert isinstance(undisturbed, Record)
    probe = store.parent / "probe.safetensors"

    def check(content: bytes, tally: Tally) -> None:
        shutil.rmtree(store, ignore_errors=True)
        task.checkpoint.parent.mkdir(parents=True)
        task.checkpoint.write_bytes(content)
        probe.write_bytes(content)
        tally.parsed += readable(probe)
        with only_inside(store.parent):
            whole = tally.inputs % EVERY == 0
            ended = walk(task) if whole else begin(task)
            put_aside = any(task.checkpoint.parent.glob("*.damaged"))
        tally.attempt(functools.partial(_outcome, put_aside))
        if isinstance(ended, Trainer):
            assert (ended.cursor.total == 0) == put_aside
        elif put_aside:
            assert plain(ended) == plain(undisturbed)
        else:
            assert ended.status in FINAL or ended.reason

    tally = fuzz(files(saved), examples, check)
    assert tally.inputs >= examples
    assert tally.parsed >= tally.inputs / 2
    assert tally.accepted >= tally.inputs / 20
    assert len(tally.refused) >= tally.inputs / 10


def _outcome(put_aside: bool) -> None:
    if put_aside:
        raise CheckpointError("put aside")


def readable(path: Path) -> bool:
    """Whether it is a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool(file.metadata())
    except (SafetensorError, OSError):
        return False


def test_what_cannot_be_read_at_all_is_a_checkpoint_error(tmp_path):
    path = tmp_path / "a.safetensors"
    contents: list[Any] = [
        b"",
        b"\x00" * 8,
        b"\xff" * 64,
        b"{}",
        b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            checkpoint.begun(path, "0" * 12)
