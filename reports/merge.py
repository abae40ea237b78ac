"""Joins the records that several machines made of the same suites.

Everything is read and checked before anything is written, files are copied byte for byte, and none
is ever overwritten: what lies in the target already counts as the first source.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.errors import RecordError, UsageError
from bench.store import Cell, Manifest, Store, read, write_atomically
from reports.folders import stores
from reports.footnotes import plural

WRITERS = 16
"""Files that are copied at a time."""


@dataclass(slots=True)
class Joined:
    """What one suite of the target will hold, and what of it is still to copy.

    Attributes:
        target: where it is written.
        manifest: cells of all sources.
        copies: target file -> where it comes from; those that are there already are not in it.
        records: final records of the target once joined; `attempts`, failed tries, likewise.
        left_aside: records that differ from the one taken of their cell.
    """

    target: Store
    manifest: Manifest
    copies: dict[Path, Path] = field(default_factory=dict)
    records: int = 0
    attempts: int = 0
    left_aside: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f"{self.target.folder}: {plural(len(self.manifest.cells), 'cell')}, "
            f"{plural(self.records, 'record')}, {plural(self.attempts, 'failed attempt')}; "
            f"{plural(len(self.copies), 'file')} copied"
        )
        aside = "".join(f"\n  left aside: {path}" for path in self.left_aside)
        return text + aside


def merge(
    sources: Sequence[Path], out: Path, *, keep_first: bool = False, with_weights: bool = False
) -> list[Joined]:
    """Joins folders of records into `out`; run again, it changes nothing.

    Args:
        sources: folders of records, or suites' folders in them.
        out: folder of all suites' records; may hold some already.
        keep_first: of two different records of one cell, takes that of the first source.
        with_weights: copies the finished networks and their masks too, as far as there are any.

    Returns:
        What became of each suite.

    Raises:
        RecordError: a source has no records, a record is damaged, two of one cell differ, or two
            lists of cells contradict each other; names the files. Nothing was written.
        UsageError: `out` cannot be written.
    """
    found: dict[str, list[Store]] = {}
    for source in sources:
        for name, store in stores(source).items():
            found.setdefault(name, []).append(store)
    joined = [
        _join(Store(out, name), those, keep_first=keep_first, with_weights=with_weights)
        for name, those in found.items()
    ]
    try:
        for suite in joined:
            _write(suite)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot write there ({error}).") from error
    return joined


def _join(target: Store, sources: list[Store], *, keep_first: bool, with_weights: bool) -> Joined:
    """Decides what a suite of the target holds; reads everything and writes nothing."""
    if any(target.folder.rglob("*.json")):
        sources = [target, *sources]
    taken, left_aside = _records(sources)
    if left_aside and not keep_first:
        raise _conflict(taken, left_aside)
    joined = Joined(target, _united(sources, taken), left_aside=left_aside)
    attempts = _attempts(sources)
    joined.records, joined.attempts = len(taken), len(attempts)
    copies = {target.folder / name: origins[0] for name, origins in taken.items()}
    copies |= {target.folder / "attempts" / name: path for name, path in attempts.items()}
    if with_weights:
        copies |= dict(_weights(target, taken))
    joined.copies = {to: origin for to, origin in copies.items() if not to.exists()}
    return joined


def _united(sources: Sequence[Store], taken: Collection[str]) -> Manifest:
    """The cells of all lists, those of the first in front.

    A cell is skipped where one machine knows why and none has run it: that a source has left no
    masks, say, is known only where it was trained.

    Args:
        sources: folders of one suite.
        taken: file names of the joined records.

    Raises:
        RecordError: two lists ask for the same row of the same cell, but otherwise.
    """
    first = sources[0].manifest()
    cells: dict[tuple[str, str, float | None], tuple[Cell, Store]] = {}
    for source in sources:
        for found in source.manifest().cells:
            done = f"{found.spec.slug}.json" in taken
            cell = replace(found, skipped="") if done else found
            # a cell of several rounds, or one that is its own control, answers several rows
            row = (cell.spec.key, cell.label, cell.asked)
            known, where = cells.setdefault(row, (cell, source))
            if replace(known, skipped=cell.skipped) != cell:
                raise RecordError(
                    f"{where.folder / 'suite.json'} and {source.folder / 'suite.json'}: they do "
                    f"not agree on {cell.label}, {cell.spec.slug}. Nothing was written; run the "
                    f"suite with one version of its file, then merge again."
                )
            if not known.skipped:
                cells[row] = (cell, where)
    return replace(first, cells=tuple(cell for cell, _ in cells.values()))


def _records(sources: Sequence[Store]) -> tuple[dict[str, list[Path]], list[Path]]:
    """File name of each record -> the equal files that hold it; and those that differ from these.

    Raises:
        RecordError: a record is damaged or was edited.
    """
    taken: dict[str, list[Path]] = {}
    aside = []
    for path in _finals(sources):
        read(path, brief=True)
        origins = taken.setdefault(path.name, [path])
        if origins[0] != path:
            if origins[0].read_bytes() == path.read_bytes():
                origins.append(path)
            else:
                aside.append(path)
    return taken, aside


def _finals(sources: Sequence[Store]) -> Iterator[Path]:
    for source in sources:
        yield from (path for path in source.paths() if path.name != "suite.json")


def _conflict(taken: dict[str, list[Path]], aside: list[Path]) -> RecordError:
    kept, other = taken[aside[0].name][0], aside[0]
    more = f" So do {plural(len(aside) - 1, 'other pair')}." if len(aside) > 1 else ""
    return RecordError(
        f"{kept} and {other}: two different records of one cell.{more} Move one away, or take that "
        "of the folder named first with --keep-first. Nothing was written."
    )


def _attempts(sources: Sequence[Store]) -> dict[str, Path]:
    """Name of each failed try in the target -> a file that holds it.

    Equal ones of several sources count once; those of one source are tries of their own.
    Machines number their tries alike, so all but the first source's may get another number.
    """
    named: dict[str, Path] = {}
    kept: Counter[tuple[str, bytes]] = Counter()
    for source in sources:
        own: Counter[tuple[str, bytes]] = Counter()
        for path in source.attempt_paths():
            read(path, brief=True)
            slug = path.stem.rpartition("-")[0]
            content = (slug, hashlib.blake2b(path.read_bytes()).digest())
            own[content] += 1
            if own[content] <= kept[content]:
                continue
            kept[content] += 1
            numbers = (f"{slug}-{n}.json" for n in itertools.count(1))
            name = (
                path.name if path.name not in named else next(n for n in numbers if n not in named)
            )
            named[name] = path
    return named


def _weights(target: Store, taken: dict[str, list[Path]]) -> Iterator[tuple[Path, Path]]:
    """Network and masks of each record, from the first folder that has both it and them."""
    for name, origins in taken.items():
        slug = name.removesuffix(".json")
        for pattern in (f"weights/{slug}.safetensors", f"masks/{slug}/*.safetensors"):
            files = (sorted(path.parent.glob(pattern)) for path in origins)
            for path in next(filter(None, files), ()):
                yield target.folder / path.relative_to(path.parents[pattern.count("/")]), path


def _write(joined: Joined) -> None:
    """Writes the list of cells, then what it asks for: who reads meanwhile sees some missing."""
    target = joined.target
    exists = (target.folder / "suite.json").exists()
    if not exists or target.manifest() != joined.manifest:
        target.put_manifest(joined.manifest)
    # each waits for its disk, so several wait at a time
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(_copy, joined.copies, joined.copies.values()))


def _copy(to: Path, origin: Path) -> None:
    write_atomically(to, origin.read_bytes())
