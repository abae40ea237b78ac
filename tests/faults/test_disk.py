"""A disk that is full, read-only or loses bytes in the middle of a run: a clear end, nothing lost.

The faults are made in a process of the command's own; the next run completes the suite as if
nothing had happened.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bench.store import Store
from tests.bench.cells import Command, stored, train, write_suite
from tests.faults.test_stop import Heard

METHODS = "[methods.rigl]\n[methods.dpf]\n[methods.one_shot]"


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    return write_suite(folder, METHODS, budget="{ epochs = 5, max_multiple = 1.2 }")


@pytest.fixture(scope="module")
def undisturbed(suite):
    """Records of a run that nothing disturbs."""
    train(suite, suite.parent / "undisturbed")
    return suite.parent / "undisturbed"


class Refusing:
    """To be called in the command's process: from the `after`-th write on, none succeeds.

    Args:
        after: writes of the store that are still done.
        number: of the error.
        only: part of the path of those that fail.
    """

    def __init__(self, after: int, number: int, only: str = "") -> None:
        self.after, self.number, self.only = after, number, only

    def __call__(self) -> None:
        open_, left = Path.open, self.after

        def opened(path: Path, *arguments: object, **options: object) -> object:
            nonlocal left
            if path.suffix == ".tmp" and self.only in str(path):
                left -= 1
                if left < 0:
                    raise OSError(self.number, os.strerror(self.number), str(path))
            return open_(path, *arguments, **options)  # type: ignore[call-overload]

        Path.open = opened  # type: ignore[method-assign, assignment]


def complete(records: Path, undisturbed: Path) -> None:
    """The records and networks are those of an undisturbed run, and nothing is half written."""
    assert len(stored(records)) == 3
    assert stored(records) == stored(undisturbed)
    for record in Store(undisturbed, "tiny").records():
        ours, theirs = (
            Store(place, "tiny").weights(record.spec) for place in (records, undisturbed)
        )
        assert ours.read_bytes() == theirs.read_bytes()
    assert not list(records.glob("tiny/checkpoints/*")) + list(records.rglob("*.tmp"))


def again(suite: Path, records: Path, tmp_path: Path) -> None:
    """The same command, when the disk is well again."""
    run = Command("run", suite, "--records", records, "--workers", "1", output=tmp_path / "again")
    assert run.wait() == 0, run.said


@pytest.mark.parametrize(
    ("after", "number"),
    [
        (0, errno.EROFS),
        (5, errno.ENOSPC),
        *(
            pytest.param(after, number, marks=pytest.mark.faults)
            for after, number in ((0, errno.ENOSPC), (1, errno.EROFS), (40, errno.ENOSPC))
        ),
    ],
)
def test_a_store_that_cannot_be_written_any_more_ends_the_run_with_one_line(
    after, number, suite, undisturbed, tmp_path
):
    records = tmp_path / "records"
    run = Heard(
        *("run", suite, "--records", records, "--workers", "1", "--checkpoint-seconds", "0"),
        output=tmp_path / "output.txt",
        prepare=Refusing(after, number),
    )
    status = run.wait()
    assert status == (2 if after == 0 else 1), run.said  # 2: nothing was trained
    assert "Traceback" not in run.said
    last = run.said.splitlines()[-1]
    assert last.startswith("sparsebench: ")
    assert "cannot write" in last
    assert os.strerror(number) in last
    assert not list(records.rglob("*.tmp"))
    assert not stored(records) if records.exists() else True
    again(suite, records, tmp_path)
    complete(records, undisturbed)


def test_a_disk_without_room_for_weights_fails_the_cells_and_they_go_on_later(
    suite, undisturbed, tmp_path
):
    records = tmp_path / "records"
    run = Heard(
        *("run", suite, "--records", records, "--workers", "1", "--checkpoint-seconds", "0"),
        output=tmp_path / "output.txt",
        prepare=Refusing(0, errno.ENOSPC, "weights"),
    )
    assert run.wait() == 1, run.said
    assert run.said.count("cannot be written (No space left on device)") >= 3
    store = Store(records, "tiny")
    assert {record.status for record in store.attempts()} == {"failed"}
    assert len(list((store.folder / "checkpoints").glob("*.safetensors"))) == 3
    again(suite, records, tmp_path)
    complete(records, undisturbed)


def test_a_record_that_was_cut_off_is_named_and_once_it_is_moved_away_comes_again(
    suite, undisturbed, tmp_path
):
    records = tmp_path / "records"
    again(suite, records, tmp_path)
    path = Store(records, "tiny").paths()[1]
    path.write_bytes(path.read_bytes()[:1000])
    run = Command("run", suite, "--records", records, "--workers", "1", output=tmp_path / "out")
    assert run.wait() == 2
    assert f"{path}: damaged record" in run.said
    assert "Move it away and run the suite again." in run.said
    path.rename(tmp_path / "moved")
    again(suite, records, tmp_path)
    complete(records, undisturbed)
