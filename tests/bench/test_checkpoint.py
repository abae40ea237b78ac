"""A run on disk: it comes back whole or is refused; the old file stays until the new one is there.

That a resumed run ends bit for bit like one that was never stopped is tested in `tests/contract`
for every method, and in `tests/faults` for a process that is killed.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from bench import checkpoint
from bench.checkpoint import read, tensor_hash, write
from bench.errors import CheckpointError
from bench.recipes import Recipe
from bench.trainer import Trainer
from tests.tiny import tiny_trainer, train

KEY = "0123456789ab"
ADAM = Recipe(title="", batch=32, lr=0.001, optimizer="adam", validation=64)


def advanced(done: int, method: str = "rigl", **fields: object) -> Trainer:
    """A run that has done some steps."""
    trainer = tiny_trainer(method, **fields)  # type: ignore[arg-type]
    for _ in itertools.islice(trainer.run(), done):
        pass
    return trainer


def ended(trainer: Trainer) -> tuple[str, object, object]:
    """Weights, curve and phases of a run, taken to its end."""
    return outcome(train(trainer))


def outcome(trainer: Trainer) -> tuple[str, object, object]:
    """Weights, curve and phases of a run as it stands."""
    tensors = {name: value.contiguous() for name, value in trainer.state.model.state_dict().items()}
    return tensor_hash(tensors), trainer.cursor.curve, trainer.cursor.phases


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "run.safetensors"


@pytest.mark.parametrize("fields", [{}, {"model": "conv"}, {"recipe": ADAM}], ids=str)
@pytest.mark.parametrize("method", ["dense", "one_shot", "set", "rigl", "dpf"])
def test_a_run_goes_on_where_it_was_saved(method, fields, path):
    wanted = ended(tiny_trainer(method, **fields))
    for steps in (1, 13, 24):
        write(advanced(steps, method, **fields), path, KEY)
        resumed = tiny_trainer(method, **fields)
        torch.manual_seed(99)  # must come from the file
        read(resumed, path, KEY)
        assert resumed.cursor.total == steps
        assert ended(resumed) == wanted


def test_a_run_goes_on_between_two_points_of_its_curve(path):
    # 401 steps make a point every 3 steps.
    wanted = ended(tiny_trainer("dense", steps=401))
    write(advanced(200, "dense", steps=401), path, KEY)
    resumed = tiny_trainer("dense", steps=401)
    read(resumed, path, KEY)
    assert ended(resumed) == wanted


def test_random_streams_come_back(path):
    one = advanced(12, "set")
    torch.manual_seed(7)
    write(one, path, KEY)
    wanted = torch.rand(3), torch.rand(3, generator=one.generator)
    other = tiny_trainer("set")
    read(other, path, KEY)
    found = torch.rand(3), torch.rand(3, generator=other.generator)
    assert torch.equal(torch.stack(found), torch.stack(wanted))


def test_saving_does_not_change_the_run(path):
    wanted = ended(tiny_trainer("dpf"))
    trainer = tiny_trainer("dpf")
    for _ in trainer.run():
        write(trainer, path, KEY)
    assert outcome(trainer) == wanted


def test_what_the_run_cost_comes_back(path):
    one = advanced(12, "rigl")
    write(one, path, KEY)
    other = tiny_trainer("rigl")
    read(other, path, KEY)
    assert other.cursor == one.cursor
    assert other.cursor.extra_batches > 0
    assert other.cursor.train_seconds >= other.cursor.update_seconds > 0


def test_a_checkpoint_of_another_cell_is_refused(path):
    write(advanced(3), path, "another cell")
    with pytest.raises(CheckpointError, match=f"not a checkpoint of cell {KEY}"):
        read(tiny_trainer("rigl"), path, KEY)


def test_a_checkpoint_of_another_format_is_refused(path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "FORMAT", "sparsebench-checkpoint-0")
        write(advanced(3), path, KEY)
    with pytest.raises(CheckpointError, match="not a checkpoint of cell"):
        read(tiny_trainer("rigl"), path, KEY)


def test_a_checkpoint_that_does_not_fit_the_network_is_refused(path):
    write(advanced(3, model="conv"), path, KEY)
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        read(tiny_trainer("rigl"), path, KEY)


@pytest.mark.parametrize("content", [b"", b"12345", b"\0" * 100, b"\xff" * 100])
def test_a_file_that_is_no_checkpoint_is_refused(content, path):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name}: damaged checkpoint"):
        read(tiny_trainer("rigl"), path, KEY)
    assert path.read_bytes() == content


def test_a_missing_file_is_refused(path):
    with pytest.raises(CheckpointError):
        read(tiny_trainer("rigl"), path, KEY)


def test_a_truncated_checkpoint_is_refused(path):
    write(advanced(3), path, KEY)
    whole = path.read_bytes()
    for length in (1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read(tiny_trainer("rigl"), path, KEY)


def test_a_flipped_bit_anywhere_is_found(path):
    write(advanced(3), path, KEY)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, header // 60), *range(header, len(whole), len(whole) // 40)]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read(tiny_trainer("rigl"), path, KEY)


def rewritten(path: Path, **changes: str | None) -> None:
    """Changes a checkpoint's header, as another version or a stranger would, with a right hash."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header.pop("digest")
    header |= {name: value for name, value in changes.items() if value is not None}
    for name, value in changes.items():
        if value is None:
            header.pop(name)
    header["digest"] = checkpoint._digest(header, tensors)
    path.write_bytes(save(tensors, metadata=header))


def test_other_types_or_shapes_of_the_same_bytes_are_found(path):
    write(advanced(3), path, KEY)
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for changed in (tensors["losses"].view(torch.int32), tensors["losses"].reshape(1, -1)):
        path.write_bytes(save(tensors | {"losses": changed}, metadata=header))
        with pytest.raises(CheckpointError, match="its content changed"):
            read(tiny_trainer("rigl"), path, KEY)


def test_a_checkpoint_from_before_its_way_was_recorded_still_goes_on(path):
    wanted = ended(tiny_trainer("rigl"))
    write(advanced(13), path, KEY)
    rewritten(path, layout=None, compiled=None, place=None)
    assert checkpoint.begun(path, KEY) == checkpoint.Begun(1, False, "")
    resumed = tiny_trainer("rigl")
    read(resumed, path, KEY)
    assert ended(resumed) == wanted


def test_a_checkpoint_says_how_its_run_was_computed(path):
    one = advanced(3)
    one.width = 4
    one.hot.compiled = True
    write(one, path, KEY)
    found = checkpoint.begun(path, KEY)
    assert (found.stack, found.compiled) == (4, True)
    assert found.place == checkpoint.place(torch.device("cpu"))
    assert f"1 thread, torch {torch.__version__}" in found.place


@pytest.mark.parametrize("content", [b"", b"\0" * 100])
def test_how_a_damaged_run_was_computed_is_not_told(content, path):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name}: damaged checkpoint"):
        checkpoint.begun(path, KEY)


def test_its_size_is_foreseen(path):
    trainer = advanced(3)
    write(trainer, path, KEY)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == checkpoint.size(trainer)


def steps_in(path: Path) -> int:
    trainer = tiny_trainer("rigl")
    read(trainer, path, KEY)
    return trainer.cursor.total


@pytest.mark.parametrize("links", [True, False])
def test_the_checkpoint_before_the_newest_is_kept(links, path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    trainer = tiny_trainer("rigl")
    for done in trainer.run():
        write(trainer, path, KEY)
        files = checkpoint.kept(path)
        assert [steps_in(file) for file in files] == [done, done - 1][: done if done < 2 else 2]
        if done == 4:
            break
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "run.safetensors",
        "run.safetensors.previous",
    ]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("breaks", ["open", "write", "fsync", "replace"])
def test_a_disk_that_refuses_keeps_the_checkpoint_and_nothing_half(
    breaks, number, path, monkeypatch
):
    trainer = tiny_trainer("rigl")
    steps = trainer.run()
    for _ in range(2):
        next(steps)
        write(trainer, path, KEY)
    next(steps)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    class Full(io.FileIO):
        def write(self, content):
            super().write(bytes(content)[:100])
            refuse()

    with monkeypatch.context() as patched:
        if breaks == "write":
            patched.setattr(Path, "open", lambda self, mode: Full(self, mode))
        else:
            place = os if breaks == "fsync" else Path
            patched.setattr(place, breaks, refuse)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            write(trainer, path, KEY)
    assert steps_in(checkpoint.kept(path)[0]) == 2
    assert not list(path.parent.glob("*.tmp")) + list(path.parent.glob(".*"))


@pytest.mark.parametrize("breaks", ["fsync", "replace"])
def test_a_crash_in_the_middle_of_writing_leaves_the_old_checkpoint(breaks, path, monkeypatch):
    trainer = tiny_trainer("rigl")
    steps = trainer.run()
    next(steps)
    write(trainer, path, KEY)
    next(steps)

    def crash(*_: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync") if breaks == "fsync" else (Path, "replace")), crash)
        with pytest.raises(OSError, match="gone"):
            write(trainer, path, KEY)
    resumed = tiny_trainer("rigl")
    read(resumed, path, KEY)
    assert resumed.cursor.total == 1


def test_the_hash_of_tensors_sees_names_and_bits():
    tensors = {"a": torch.zeros(3), "b": torch.tensor(1.0)}
    wanted = tensor_hash(tensors)
    assert tensor_hash(dict(reversed(tensors.items()))) == wanted
    assert tensor_hash({"a": torch.zeros(3), "c": torch.tensor(1.0)}) != wanted
    assert tensor_hash({"a": -torch.zeros(3), "b": torch.tensor(1.0)}) != wanted
    assert len(wanted) == 32
