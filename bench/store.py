"""A folder of records, one file per cell, written by rename: none is half there. No torch.

ROOT/SUITE/suite.json               the cells that the suite asks for
ROOT/SUITE/<slug>.json              a final record
ROOT/SUITE/attempts/<slug>-N.json   a failed try; the cell runs again next time
ROOT/SUITE/checkpoints/, weights/, masks/, locks/
"""

from __future__ import annotations

import functools
import itertools
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec

from bench.errors import RecordError, SuiteError, UnknownName
from bench.record import FINAL, SCHEMA, Amount, Count, Positive, Record, agreeing, decode, encode
from bench.spec import CellSpec

BULK = frozenset({"layers", "curve", "mask_updates", "last_changes"})
"""Most of a record's bytes, which no table reads."""


@dataclass(frozen=True, slots=True)
class Against:
    """The network at its full width, and what the narrower one has of its prunable weights.

    Attributes:
        parameters: of the full width; `dense_macs`, for one image, likewise.
        prunable: weights of the full width that the suite's preset counts.
        kept: weights of the narrower network that it counts.
    """

    parameters: Positive
    prunable: Positive
    dense_macs: Positive
    kept: Count


@dataclass(frozen=True, slots=True)
class Cell:
    """A row of a suite's table for one seed, resolved and checked, and the cell that answers it.

    Attributes:
        label: the row's name in the suite's tables; variants of a method differ by it.
        steps: optimizer steps that the method plans up to the row's result; `multiple` is that over
            the budget's, with the source's.
        updates: mask updates that it plans.
        sparsity: that the row asks for, where it is not the cell's own: a cell of several rounds
            answers several rows, and a small dense network stands for a sparse one.
        against: the network that the row's ratios count against, where it is not the cell's own.
        skipped: why the row cannot be run; empty where it can.
    """

    label: str
    spec: CellSpec
    steps: Count
    multiple: Amount
    updates: Count
    sparsity: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    against: Against | None = None
    skipped: str = ""

    @property
    def asked(self) -> float | None:
        """Sparsity that the row asks for."""
        return self.spec.sparsity if self.sparsity is None else self.sparsity


@dataclass(frozen=True, slots=True)
class Manifest:
    """The cells of a suite as it was last run, so that a table can tell missing from stale."""

    suite: str
    title: str
    cells: tuple[Cell, ...]


def write_atomically(path: Path, content: bytes, former: Path | None = None) -> None:
    """Writes beside the target, syncs, renames: a reader sees the old file or the new one.

    Args:
        path: the target.
        content: all of it.
        former: where the old file is kept, if there is one.

    Raises:
        OSError: nothing has changed but perhaps `former`, and nothing half written is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A number of the process would not do: containers that share a folder have equal ones.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if former is not None and path.exists():
            _keep(path, former)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # on a full disk it would only take room
            temporary.unlink(missing_ok=True)
        raise
    _sync_names(path.parent)


def write_once(path: Path, content: bytes) -> bool:
    """As `write_atomically`, but what is there already stays, whoever writes at the same time.

    Returns:
        Whether it was written.

    Raises:
        OSError: it cannot be.
    """
    if path.exists():
        return False
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}.new")
    write_atomically(own, content)
    try:
        path.hardlink_to(own)
    except FileExistsError:
        return False
    except OSError:  # no links on this file system, where a moment is left for another to be first
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
    _sync_names(path.parent)
    return True


def _keep(path: Path, former: Path) -> None:
    """Gives a file a second name, so that it is never away; its only name where links are not."""
    former.unlink(missing_ok=True)
    try:
        former.hardlink_to(path)
    except OSError:
        path.replace(former)


def _sync_names(folder: Path) -> None:
    """Brings a folder's names to the disk: a rename that is lost in a power cut undoes a write."""
    with suppress(OSError):  # not on Windows, nor on every file system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Store:
    """The records of one suite.

    Args:
        root: folder of all suites' records.
        suite: the suite's name; its records lie in a folder of that name.
    """

    def __init__(self, root: Path, suite: str) -> None:
        self.suite = suite
        self.folder = root / suite

    def path(self, spec: CellSpec) -> Path:
        """Where the record of a cell lies once it is final."""
        return self.folder / f"{spec.slug}.json"

    def checkpoint(self, spec: CellSpec) -> Path:
        """Where the unfinished training of a cell is kept."""
        return self.folder / "checkpoints" / f"{spec.slug}.safetensors"

    def weights(self, spec: CellSpec) -> Path:
        """Where the finished network of a cell is kept."""
        return self.folder / "weights" / f"{spec.slug}.safetensors"

    def masks(self, spec: CellSpec) -> Path:
        """Folder of the masks that a cell had at the end of its measured phases."""
        return self.folder / "masks" / spec.slug

    def lock(self, spec: CellSpec) -> Path:
        """File that a runner locks while it trains the cell."""
        return self.folder / "locks" / f"{spec.slug}.lock"

    def has(self, spec: CellSpec) -> bool:
        """Whether there is a final record of a cell; it is not read."""
        return self.path(spec).exists()

    def get(self, spec: CellSpec, *, brief: bool = False) -> Record | None:
        """The final record of a cell, or None where it is still to do.

        Args:
            spec: the question.
            brief: leaves out what `BULK` names.

        Raises:
            RecordError: the file is damaged, or holds another cell.
        """
        path = self.path(spec)
        return read(path, brief=brief) if path.exists() else None

    def put(self, record: Record) -> Path:
        """Writes a record once: a final one at its place, a failed one under `attempts/`.

        Raises:
            RecordError: a final record of this cell is there already.
        """
        names: Iterable[Path] = [self.path(record.spec)]
        if record.status not in FINAL:
            folder = self.folder / "attempts"
            names = (folder / f"{record.spec.slug}-{n}.json" for n in itertools.count(1))
        content = encode(record)
        for path in names:
            if write_once(path, content):
                return path
        raise RecordError(f"{path}: this cell has a record already; records are never edited.")

    def records(self, *, brief: bool = False) -> Iterator[Record]:
        """Every final record of the suite, in the order of their file names.

        Args:
            brief: leaves out what `BULK` names, and takes less than half of the time.

        Raises:
            RecordError: a file is damaged or was edited.
        """
        for path in self.paths():
            yield read(path, brief=brief)

    def paths(self) -> list[Path]:
        """Files of the final records, in the order of their names."""
        names = sorted(path.name for path in self.folder.glob("*.json"))
        return [self.folder / name for name in names if name != "suite.json"]

    def attempts(self) -> list[Record]:
        """Every failed try, a cell's last one behind its others.

        Raises:
            RecordError: a file is damaged or was edited.
        """
        return list(map(read, self.attempt_paths()))

    def attempt_paths(self) -> list[Path]:
        """Files of the failed tries, a cell's in the order of their numbers; clocks may be set."""
        paths = (self.folder / "attempts").glob("*.json")
        return sorted(paths, key=lambda path: (len(path.name), path.name))

    def put_manifest(self, manifest: Manifest) -> None:
        """Writes the list of the suite's cells."""
        text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        write_atomically(self.folder / "suite.json", text + b"\n")

    def manifest(self) -> Manifest:
        """The list of the suite's cells.

        Raises:
            RecordError: there is none, or it is damaged.
        """
        path = self.folder / "suite.json"
        if not path.exists():
            raise RecordError(f"{path}: no such file. Run the suite first: {command(self.suite)}")
        try:
            return msgspec.json.decode(path.read_bytes(), type=Manifest)
        except (msgspec.MsgspecError, SuiteError, ValueError, RecursionError, OSError) as error:
            advice = f"Delete it and run the suite again: {command(self.suite)}"
            raise RecordError(f"{path}: damaged list of cells ({error}). {advice}") from error


def command(suite: str) -> str:
    """What to type to run a suite: its file's name, where it does not come with the harness."""
    known = Path(__file__).parent / "suites" / f"{suite}.toml"
    return f"sparsebench run {suite if known.exists() else known.name}"


def read(path: Path, *, brief: bool = False) -> Record:
    """The record in a file.

    Args:
        path: the file.
        brief: leaves out what `BULK` names; that it is JSON is all that is checked of it.

    Raises:
        RecordError: it is damaged, or its content no longer gives its name and the key in it.
    """
    try:
        text = path.read_bytes()
        record = (_decode_brief(text) if brief else None) or decode(text, str(path))
    except OSError as error:
        raise RecordError(f"{path}: cannot read the record: {error.strerror}.") from error
    stem = path.stem.rpartition("-")[0] if path.parent.name == "attempts" else path.stem
    if stem != record.spec.slug:
        raise RecordError(
            f"{path}: the file was edited or renamed (its content has key {record.spec.key} and "
            f"belongs to {record.spec.slug}). Restore it, or move it away and run the suite again."
        )
    if record.status not in FINAL and path.parent.name != "attempts":
        raise RecordError(
            f"{path}: status {record.status!r} does not belong here; final are {', '.join(FINAL)}. "
            "The file was edited: restore it, or move it away and run the suite again."
        )
    return record


def _decode_brief(text: bytes) -> Record | None:
    """The record without its bulk; None where something is wrong, which `decode` puts in words."""
    try:
        found = _brief_decoder().decode(text)
        record = Record(**msgspec.structs.asdict(found))
        return agreeing(record) if found.schema == SCHEMA else None
    except (msgspec.MsgspecError, SuiteError, ValueError, RecursionError):
        return None


@functools.cache
def _brief_decoder() -> msgspec.json.Decoder[Any]:
    """Skips what it does not know, without making objects of it: ten times faster."""
    types = get_type_hints(Record, include_extras=True)
    light = [field for field in fields(Record) if field.name not in BULK]
    brief = [
        (f.name, types[f.name]) if f.default is MISSING else (f.name, types[f.name], f.default)
        for f in light
    ]
    return msgspec.json.Decoder(msgspec.defstruct("Brief", brief, frozen=True))


def suites(root: Path) -> list[str]:
    """Names of the suites that have records under `root`."""
    return sorted({path.parent.name for path in root.glob("*/*.json")})


def find(root: Path, text: str) -> Path:
    """The one record whose `SUITE/slug` contains `text`: a key, part of one, or a file name.

    Failed tries are looked at where no final record matches; of a cell's, its last is taken.

    Raises:
        UnknownName: there is none, or more than one.
    """
    paths = [path for path in sorted(root.glob("*/*.json")) if path.name != "suite.json"]
    finals = {str(path.relative_to(root).with_suffix("")): path for path in paths}
    folders = sorted(root.glob("*/attempts"))
    tries = {
        str(path.relative_to(root).with_suffix("")): path
        for folder in folders
        for path in Store(root, folder.parent.name).attempt_paths()
    }
    wanted = text.removesuffix(".json")
    if exact := (finals | tries).get(wanted):
        return exact
    found = {name: path for name, path in finals.items() if wanted in name}
    if not found:
        # A whole file name means that try: the first is not the tenth.
        named = [name for name in tries if name.endswith(f"/{wanted}")]
        named = named or [name for name in tries if wanted in name]
        last = {name.rpartition("-")[0]: name for name in named}
        found = {name: tries[name] for name in last.values()}
    if len(found) != 1:
        kind = "cell" if not found else f"single cell ({len(found)} match)"
        raise UnknownName(str(root), kind, text, list(found or finals | tries)[:10])
    return next(iter(found.values()))
