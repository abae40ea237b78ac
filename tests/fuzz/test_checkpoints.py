"""Checkpoints by anybody: the cell goes on, or starts over and ends as if there had been none."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from dataclasses import dataclass, field
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
from bench.record import FINAL, Record, decode, encode
from bench.runner import moments
from bench.store import Store
from bench.task import Finished, Note, Task
from bench.trainer import Trainer
from tests.bench.cells import plan_of, tasks_of, the_same, write_recipe, write_suite
from tests.fuzz.harm import Tally, fuzz, only_inside
from tests.fuzz.mutations import MISSING, ODD, mutated, scratched

SIZES = [60, pytest.param(10_000, marks=pytest.mark.faults)]
JSON = ("cursor", "numbers", "snapshots", "slots")
NAMES = frozenset({"phase", "step", "total", "position", "phases", "name"})
SAVED_AT = 5

EVERY = 20
"""So many of the inputs are trained on to the end, the others for one step."""

CELLS = {
    # several phases and a snapshot; an optimizer that counts; tensors of the method's own
    "lottery_ticket": "batch = 64\nlr = 0.1\nmomentum = 0.9",
    "rigl": 'batch = 64\nlr = 0.01\noptimizer = "adam"',
    "top_kast": "batch = 64\nlr = 0.1",
}
"""Methods, each with its recipe."""


@dataclass(frozen=True)
class Cell:
    """A cell, its checkpoint, and what it comes to undisturbed."""

    task: Task
    header: dict[str, str]
    tensors: dict[str, Tensor]
    record: Record

    def put(self, content: bytes) -> None:
        """Makes this its only file."""
        shutil.rmtree(self.task.checkpoint.parents[1], ignore_errors=True)
        self.task.checkpoint.parent.mkdir(parents=True)
        self.task.checkpoint.write_bytes(content)


@dataclass(frozen=True)
class File:
    """A checkpoint that is to be tried; hypothesis would write out all of it."""

    cell: Cell = field(repr=False)
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Walk:
    """How far a cell has come: to its record, or to a step that is due."""

    end: Record | Trainer
    first: int
    notes: tuple[str, ...]


def walk(task: Task, steps: float = float("inf")) -> Walk:
    """Trains a cell for so many steps, from wherever it goes on, or to its end."""
    run, first, done, notes = moments(task), None, 0, []
    event = next(run)
    while not isinstance(event, Finished):
        if isinstance(event, Note):
            notes.append(event.text)
        if not isinstance(event, Trainer):
            event = next(run)
            continue
        first = event.cursor.total if first is None else first
        if done == steps:
            run.close()
            return Walk(event, first, tuple(notes))
        done += 1
        try:
            event.compute()
        except Exception as error:  # as `bench.together` hands it back
            event = run.throw(error)
        else:
            event = next(run)
    return Walk(event.record, -1 if first is None else first, tuple(notes))


def made(folder: Path, method: str, recipe: str) -> Cell:
    """A cell of a few steps, saved in the midst of it."""
    path = write_suite(
        folder,
        f"[methods.{method}]",
        models='[{ name = "lenet_300_100", width = 0.05 }]',
        sparsities="[0.2]",
        budget="{ steps = 8, max_multiple = 9.0 }",
        recipe=write_recipe(folder, recipe),
    )
    (task,) = tasks_of(plan_of(path), Store(folder / "inside", "tiny"))
    walk(dataclasses.replace(task, checkpoint_seconds=0), SAVED_AT)
    with safe_open(task.checkpoint, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shutil.rmtree(task.checkpoint.parents[1])
    record = walk(task).end
    assert isinstance(record, Record)
    return Cell(task, header, tensors, record)


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> list[Cell]:
    return [made(tmp_path_factory.mktemp(name), name, recipe) for name, recipe in CELLS.items()]


@st.composite
def damaged(draw: st.DrawFn, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which some are gone, or have other names, shapes, types or values."""
    found = dict(tensors)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
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
def files(draw: st.DrawFn, cells: list[Cell]) -> File:
    """A cell and its checkpoint, changed; most of them with the checksums that go with it."""
    cell = draw(st.sampled_from(cells))
    header, tensors = dict(cell.header), draw(damaged(cell.tensors))
    for name in draw(st.lists(st.sampled_from([*JSON, *sorted(header)]), max_size=2)):
        if name in JSON:
            values = ODD | st.just(MISSING) | st.none()
            tree = draw(mutated({"": json.loads(header[name])}, values, NAMES))
            header[name] = json.dumps(tree.get(""))
        elif name not in ("digest", "compiled"):  # to compile takes seconds, and torch's caches
            header[name] = str(draw(ODD))
    if draw(st.integers(0, 9)):
        header["layout"] = checkpoint._layout(tensors)
        header.pop("digest", None)
        header["digest"] = checkpoint._digest(header, tensors)
    content = save(tensors, metadata=header)
    return File(cell, content if draw(st.integers(0, 9)) else draw(scratched(content)))


def test_an_undamaged_checkpoint_goes_on_to_the_undisturbed_record(cells):
    for cell in cells:
        cell.put(save(cell.tensors, metadata=cell.header))
        found = walk(cell.task)
        assert found.first == SAVED_AT
        assert the_same(found.end) == the_same(cell.record)


@pytest.mark.parametrize("examples", SIZES)
def test_a_checkpoint_by_anybody_is_taken_up_or_put_aside_and_the_cell_goes_on(
    examples, cells, tmp_path
):
    probe = tmp_path / "probe.safetensors"

    def check(file: File, tally: Tally) -> None:
        cell, content = file.cell, file.content
        cell.put(content)
        probe.write_bytes(content)
        tally.parsed += readable(probe)
        folder = cell.task.checkpoint.parent
        with only_inside(folder.parents[1]):
            found = walk(cell.task, float("inf") if tally.inputs % EVERY == 0 else 1)
        put_aside = any(folder.glob("*.damaged"))
        tally.attempt(functools.partial(_outcome, put_aside))
        assert all(note.isprintable() for note in found.notes), found.notes
        assert put_aside == any("damaged" in note for note in found.notes)
        assert found.first == 0 or not put_aside
        if isinstance(found.end, Record):
            check_record(found.end, cell.record if put_aside else None)

    tally = fuzz(files(cells), examples, check)
    assert tally.inputs >= examples
    assert tally.parsed >= tally.inputs / 2
    assert tally.accepted >= tally.inputs / 10
    assert len(tally.refused) >= tally.inputs / 10


def check_record(found: Record, undisturbed: Record | None) -> None:
    """It can be read again, and is the undisturbed one, or says what to do about the file."""
    assert decode(encode(found), "") == found
    if undisturbed:
        assert the_same(found) == the_same(undisturbed)
    else:
        assert found.status in FINAL or "to start over, delete" in found.reason, found


def _outcome(put_aside: bool) -> None:
    if put_aside:
        raise CheckpointError("put aside")


def readable(path: Path) -> bool:
    """Whether it is a safetensors file with a cursor that is JSON."""
    try:
        with safe_open(path, framework="pt") as file:
            json.loads((file.metadata() or {}).get("cursor", ""))
            return True
    except (SafetensorError, OSError, ValueError, RecursionError):
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
