"""Folders of images in classes: which files belong, whether each can be decoded. No torch.

ROOT/train/CLASS/*.jpg with ROOT/test, ROOT/val or ROOT/validation alike; or ROOT/CLASS/*.jpg alone,
of which a fixed fifth of each class are the test images. What was found out about a file is kept in
an index under the data folder, so that each is decoded for the check only once.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bench.datasets import FOLDER_PREFIX, DatasetInfo, Labels, Pixels
from bench.errors import DataError
from bench.processes import cores
from bench.signals import SIGNALS
from bench.store import write_atomically

KINDS = {
    "imagenet": "<data>/imagenet with train/ and val/, a folder a class",
    f"{FOLDER_PREFIX}PATH": "a folder of classes, the images as files; the recipe says image_size",
}
"""Data sets that are folders, by name."""

TEST_FOLDERS = ("test", "val", "validation")
"""Names of the folder with the test images; the first that has classes is read."""

TEST_SHARE = 5
"""Without such a folder one image in so many is a test image."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training pixels, as timm and torchvision use them for all photographs."""

NAMED = 5
"""Files that a message names; the others are counted."""

IN_THIS_PROCESS = 200
"""So few new files are read sooner than processes start."""

WORD_SECONDS = 10.0
"""Pause between words about a check that takes long."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A data set that is read from its files again and again; `Arrays` for what fits in memory.

    Images are in the order of label and content, so nothing depends on where files lie or what they
    are called.

    Attributes:
        info: shape (3, side, side), classes, ImageNet's mean and standard deviation.
        x_train: absolute paths; `x_test` likewise.
        y_train: int64 (N,); `y_test` likewise.
        hash: 12 hex digits of all files' contents with their labels and split.
        notes: what people should know, a line each.
    """

    info: DatasetInfo
    x_train: tuple[str, ...]
    y_train: Labels
    x_test: tuple[str, ...]
    y_test: Labels
    hash: str
    notes: tuple[str, ...] = ()


class Seen(msgspec.Struct, array_like=True, frozen=True):
    """What was found out about a file: its state, its content's digest, and why it is no image."""

    size: int
    mtime_ns: int
    digest: str = ""
    fault: str = ""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the images of a folder lie.

    Attributes:
        train: folder of classes; `test` likewise, None: a part of `train` is set aside.
        note: what people should know.
    """

    train: Path
    test: Path | None
    note: str = ""


def is_folder(name: str) -> bool:
    """Whether a data set of this name is a folder of images."""
    return name in KINDS or name.startswith(FOLDER_PREFIX)


def locate(name: str, data: Path, start: Path) -> Path:
    """The folder that a data set's name means.

    Args:
        name: `imagenet` or `imagefolder:PATH`.
        data: folder of the data sets.
        start: folder from which a relative PATH starts.
    """
    if name in KINDS:
        return (data / name).absolute()
    return (start / Path(name.removeprefix(FOLDER_PREFIX)).expanduser()).absolute()


def load(root: Path, data: Path, image_size: int) -> Folder:
    """Reads which images there are; decodes those once that the index does not know.

    Args:
        root: the folder.
        data: folder of the data sets, which keeps the index.
        image_size: side in pixels of the squares that the images are made into.

    Raises:
        DataError: the folder is missing or has no classes, its parts have different classes, or
            images cannot be decoded; names them.
    """
    layout = _layout(root)
    strange: list[str] = []
    found = [
        _images(part, root, strange) for part in (layout.train, layout.test) if part is not None
    ]
    if not found[0]:
        raise DataError(
            f"{root}: no images in folders of classes. Expected train/CLASS/*.jpg with "
            f"{', '.join(TEST_FOLDERS)} alike, or CLASS/*.jpg."
        )
    if layout.test is not None:
        _check_classes(layout, *found)
    seen = _check(root, data, [file for part in found for files in part.values() for file in files])
    classes = sorted(found[0])
    parts = [_sorted(part, classes, seen) for part in found]
    if layout.test is None:
        parts = _set_aside(root, parts[0], classes, seen)
    notes = [layout.note] if layout.note else []
    if empty := sorted(_folders_in(layout.train) - found[0].keys()):
        notes.append(f"{layout.train}: no classes, for want of images: {_named(empty)}")
    if strange:
        notes.append(f"{root}: left out, not images by their names: {_named(strange)}")
    (train, y_train), (test, y_test) = parts
    digest = hashlib.blake2b(repr((len(classes), MEAN, STD)).encode(), digest_size=6)
    for files, labels in parts:
        content = [(int(y), seen[file].digest) for file, y in zip(files, labels, strict=True)]
        digest.update(repr(content).encode())
    summary = f"{len(train):,} + {len(test):,} images in {len(classes)} classes"
    return Folder(
        DatasetInfo((3, image_size, image_size), len(classes), MEAN, STD, "", summary),
        tuple(f"{root}/{file}" for file in train),
        y_train,
        tuple(f"{root}/{file}" for file in test),
        y_test,
        digest.hexdigest(),
        tuple(notes),
    )


def decode(stream: str | io.BytesIO) -> Image.Image:
    """A whole picture as RGB: turned as its EXIF says, one frame, transparency dropped.

    Raises:
        Exception: of nearly any kind, for a damaged file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata and large pictures
        with Image.open(stream) as image:
            picture = ImageOps.exif_transpose(image)
            if picture.mode[0] in "IF":  # `convert` would cut off what is above 255
                return Image.fromarray(_eight_bits(picture)).convert("RGB")
            if "transparency" in picture.info:
                picture = picture.convert("RGBA")
            return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Pixels:
    """Grey pixels of 16 bits, by their upper half."""
    pixels = np.asarray(picture)
    if picture.mode == "F" or pixels.min() < 0 or pixels.max() >= 1 << 16:
        kind = "fractions" if picture.mode == "F" else "more than 16 bits"
        raise ValueError(f"grey pixels of {kind}, whose range nobody knows")
    return (pixels >> 8).astype(np.uint8)


def processes(count: int, prepare: Callable[[], object] | None = None) -> ProcessPoolExecutor:
    """Processes that end when this one does, however it ends.

    Args:
        count: how many.
        prepare: called in each of them first; a module's function.
    """
    # To fork a process that has threads, as torch has, can leave locks held for ever.
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        # What takes seconds to import is loaded once for all.
        context.set_forkserver_preload(["bench.streaming", "timm.data.transforms_factory"])
    return ProcessPoolExecutor(count, context, _attend, (prepare,))


def _attend(prepare: Callable[[], object] | None) -> None:
    """Sets up a helping process: to stop is its parent's matter, and it does not outlive it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    if prepare:
        prepare()


def _layout(root: Path) -> _Layout:
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder. Put the images there (train/CLASS/*.jpg and val/CLASS/*.jpg, "
            "or CLASS/*.jpg), or name another folder."
        )
    if not _has_folders(root / "train"):
        return _Layout(
            root, None, f"{root}: has no test folder: a fixed fifth of each class is tested on"
        )
    tests = [name for name in TEST_FOLDERS if _has_folders(root / name)]
    if not tests:
        raise DataError(
            f"{root}: has train/, but no classes in {', '.join(TEST_FOLDERS)}. Add one of them, "
            "or name the train folder itself to have a fifth of it tested on."
        )
    note = ""
    if len(tests) > 1:
        unread = " and ".join(f"{name}/" for name in tests[1:])
        note = f"{root}: the test images are those of {tests[0]}/; {unread} is not read"
    return _Layout(root / "train", root / tests[0], note)


def _has_folders(path: Path) -> bool:
    return path.is_dir() and bool(_folders_in(path))


def _folders_in(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir() if entry.name[0] != "." and entry.is_dir()}


def _images(part: Path, root: Path, strange: list[str]) -> dict[str, list[str]]:
    """Class -> its images, as paths from the root; adds other files to `strange`.

    Hidden files are nobody's images. A class without images is none.
    """
    known = _extensions()
    found: dict[str, list[str]] = {}
    for folder, below, files in os.walk(part, followlinks=True):
        below[:] = sorted(name for name in below if name[0] != ".")
        for name in below:
            _check_link(Path(folder, name))
        inside = Path(folder).relative_to(part).parts
        place = Path(folder).relative_to(root).as_posix()
        for name in sorted(files):
            if name[0] == ".":
                continue
            file = name if place == "." else f"{place}/{name}"
            if inside and os.path.splitext(name)[1].lower() in known:  # noqa: PTH122  a million
                found.setdefault(inside[0], []).append(file)
            else:
                strange.append(file)
    return found


def _check_link(folder: Path) -> None:
    """Refuses a link to a folder above it, which would have no end."""
    if folder.is_symlink():
        home, target = folder.parent.resolve(), folder.resolve()
        if target == home or target in home.parents:
            raise DataError(f"{folder}: leads back to {target}, in which it lies.")


def _extensions() -> set[str]:
    """Endings of the files that PIL can open."""
    return {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _check_classes(layout: _Layout, train: Iterable[str], test: Iterable[str]) -> None:
    for name, lacking in (
        (layout.test, sorted(set(train) - set(test))),
        (layout.train, sorted(set(test) - set(train))),
    ):
        if lacking:
            raise DataError(
                f"{name}: has no images of {len(lacking)} classes that the other part has: "
                f"{_named(lacking)}. Training and test images must be of the same classes."
            )


def _check(root: Path, data: Path, files: Sequence[str]) -> dict[str, Seen]:
    """What is known of each file, from the index or by decoding it."""
    name = hashlib.blake2b(str(root).encode(), digest_size=6).hexdigest()
    path = data / "folders" / f"{root.name}-{name}.msgpack"
    index = _read_index(path)
    seen: dict[str, Seen] = {}
    for file in files:
        now, old = _state(f"{root}/{file}"), index.get(file)
        same = old and (old.size, old.mtime_ns) == (now.size, now.mtime_ns)
        seen[file] = old if old and same else now
    new = [file for file, one in seen.items() if not one.digest]
    found = _inspected(root, [root / file for file in new])
    for file, (digest, fault) in zip(new, found, strict=True):
        seen[file] = Seen(seen[file].size, seen[file].mtime_ns, digest, fault)
    if seen != index:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, msgspec.msgpack.encode(seen))
        except OSError as error:
            raise DataError(
                f"{path}: cannot write the index of {root} there ({error.strerror}). Name a "
                "folder by --data or SPARSEBENCH_DATA."
            ) from error
    if faulty := [f"{file} ({one.fault})" for file, one in seen.items() if one.fault]:
        raise DataError(
            f"{root}: {len(faulty)} of {len(seen)} images cannot be decoded: {_named(faulty)}. "
            "Replace them by whole ones, or take them away."
        )
    return seen


def _state(path: str) -> Seen:
    """Size and time of a file; a link that leads nowhere has none."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return Seen(-1, -1)
    return Seen(found.st_size, found.st_mtime_ns)


def _read_index(path: Path) -> dict[str, Seen]:
    """The index; empty where it is missing or damaged, which costs time and nothing else."""
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=dict[str, Seen])
    except (OSError, msgspec.MsgspecError):
        return {}


def _inspected(root: Path, paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Digest and fault of each file, in their order."""
    if len(paths) < IN_THIS_PROCESS:
        return [inspect(path) for path in paths]
    found: list[tuple[str, str]] = []
    next_word = time.monotonic() + WORD_SECONDS
    with processes(cores()) as pool:
        try:
            for one in pool.map(inspect, paths, chunksize=50):
                found.append(one)
                if time.monotonic() > next_word:
                    text = f"{root}: {len(found):,} of {len(paths):,} images checked, once for all"
                    print(f"sparsebench: {text}", file=sys.stderr)
                    next_word += WORD_SECONDS
        except BrokenProcessPool as error:
            raise DataError(
                f"{root}: a process died while it decoded images (out of memory?), after "
                f"{len(found)} of {len(paths)}."
            ) from error
    return found


def inspect(path: Path) -> tuple[str, str]:
    """Digest of a file's content, and why it cannot be decoded; empty where it can."""
    digest = ""
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            return digest, "not a regular file"
        content = path.read_bytes()
        digest = hashlib.blake2b(content, digest_size=12).hexdigest()
        decode(io.BytesIO(content))
    except Exception as error:  # a damaged image can raise nearly anything
        return digest, fault(error)
    return digest, ""


def fault(error: Exception) -> str:
    """Why a file cannot be read, in a few words; never empty."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return " ".join(str(error).split()) or type(error).__name__


def _sorted(
    part: dict[str, list[str]], classes: Sequence[str], seen: dict[str, Seen]
) -> tuple[list[str], Labels]:
    """Files by label and content, and their labels."""
    files = [file for name in classes for file in sorted(part[name], key=lambda f: seen[f].digest)]
    labels = np.repeat(np.arange(len(classes)), [len(part[name]) for name in classes])
    return files, labels


def _set_aside(
    root: Path, part: tuple[list[str], Labels], classes: Sequence[str], seen: dict[str, Seen]
) -> list[tuple[list[str], Labels]]:
    """Training and test images, of each class those of the least digests: as good as by chance."""
    files, labels = part
    digests = np.array([seen[file].digest for file in files])
    tested = np.zeros(len(files), dtype=bool)
    few = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        border = digests[members[max(1, len(members) // TEST_SHARE) - 1]]
        tested[members] = digests[members] <= border  # copies of a picture stay together
        if tested[members].all():
            few.append(name)
    if few:
        raise DataError(
            f"{root}: {len(few)} classes have a single image: {_named(few)}. Without a test folder "
            "each needs two or more that differ."
        )
    return [
        ([file for file, wanted in zip(files, chosen, strict=True) if wanted], labels[chosen])
        for chosen in (~tested, tested)
    ]


def _named(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
