"""The data sets: a table, and arrays of pixels from one .npz file each. No torch.

A data set is `<folder>/<name>.npz` with uint8 `x_train`, `x_test` of shape (N, H, W) or (N, H, W,
C) and integer `y_train`, `y_test` of shape (N,). A missing file is made once by torchvision's
loader. Installed packages offer data sets of their own as functions that return such arrays.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.errors import DataError, UnknownName
from bench.store import write_atomically

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
ARRAYS = ("x_train", "y_train", "x_test", "y_test")

FOLDER_PREFIX = "imagefolder:"
"""`imagefolder:PATH` is any folder of classes, see `bench.folders`."""

GROUP = "sparsebench.datasets"
"""Entry points by which other packages offer data sets: name -> module:function."""


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What is known of a data set before it is read.

    Attributes:
        shape: (channels, height, width).
        classes: labels lie in [0, classes).
        mean: per channel, of the training set scaled to [0, 1]; `std` likewise.
        torchvision: class in `torchvision.datasets` that downloads it; empty: it is made here.
        summary: one line.
    """

    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    torchvision: str
    summary: str


DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(
        (1, 8, 8), 10, (0.3049,), (0.3757,), "", "1,797 digits of scikit-learn, embedded"
    ),
    "mnist": DatasetInfo(
        (1, 28, 28), 10, (0.1307,), (0.3081,), "MNIST", "60,000 + 10,000 handwritten digits"
    ),
    "fashion_mnist": DatasetInfo(
        (1, 28, 28),
        10,
        (0.2860,),
        (0.3530,),
        "FashionMNIST",
        "60,000 + 10,000 pictures of clothes, in 10 classes",
    ),
    "cifar10": DatasetInfo(
        (3, 32, 32),
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        "CIFAR10",
        "50,000 + 10,000 small photographs in 10 classes",
    ),
    "cifar100": DatasetInfo(
        (3, 32, 32),
        100,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        "CIFAR100",
        "50,000 + 10,000 small photographs in 100 classes",
    ),
    "synthetic": DatasetInfo(
        (3, 16, 16),
        4,
        (0.4978, 0.5005, 0.4982),
        (0.2331, 0.2304, 0.2303),
        "",
        "512 + 256 noisy patterns in 4 classes, for tests",
    ),
}


@dataclass(frozen=True, slots=True)
class Arrays:
    """A data set in memory.

    Attributes:
        info: the table's entry.
        x_train: uint8 (N, H, W, C); `x_test` likewise.
        y_train: int64 (N,); `y_test` likewise.
        hash: 12 hex digits of the content, normalisation included.
    """

    info: DatasetInfo
    x_train: Pixels
    y_train: Labels
    x_test: Pixels
    y_test: Labels
    hash: str


def names() -> list[str]:
    """Every data set of arrays that a suite can name: the table's, and installed packages'."""
    return [*DATASETS, *_entry_points(tuple(sys.path))]


def load(name: str, folder: Path) -> Arrays:
    """Reads a data set; downloads it first where its file is missing.

    Raises:
        UnknownName: no data set has this name.
        DataError: the file is damaged or does not hold such data, or cannot be had; or an
            installed package offers the name, and what it offers cannot be used.
    """
    if name not in names():
        raise UnknownName("", "data set", name, names())
    if name not in DATASETS:
        return _others(name, folder)
    info = DATASETS[name]
    if not info.torchvision:
        return _checked(info, name, EMBEDDED[name]())
    path = folder / f"{name}.npz"
    if not path.exists():
        _download(name, info, path)
    return _checked(info, str(path), _read(path))


def _read(path: Path) -> dict[str, NDArray[Any]]:
    advice = (
        f"Delete it to have it downloaded again, or replace it by one with {', '.join(ARRAYS)}."
    )
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path}: damaged or not an .npz file (no zip of arrays). {advice}")
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            missing = [array for array in ARRAYS if array not in file]
            if missing:
                raise DataError(f"{path}: has no {', '.join(missing)}. {advice}")
            found = {array: file[array] for array in ARRAYS}
    except DataError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise DataError(f"{path}: damaged or not an .npz file ({error}). {advice}") from error
    if strange := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
        raise DataError(f"{path}: {', '.join(strange)} is no array. {advice}")
    return found


def summary(name: str) -> str:
    """One line about a data set of an installed package, from its function's docstring.

    Raises:
        DataError: the function cannot be loaded.
    """
    return (_function(name)[1].__doc__ or "").strip().partition("\n")[0]


def conflicts() -> list[str]:
    """In words, the entry points that are not used because the table has their name."""
    return [
        f"data set {point.name!r} of {_package(point)} is not used: the table has one of that name"
        for point in importlib.metadata.entry_points(group=GROUP)
        if point.name in DATASETS or point.name.startswith(FOLDER_PREFIX)
    ]


@functools.lru_cache(maxsize=4)
def _entry_points(path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Data sets of installed packages, by name; nothing of them is loaded.

    Args:
        path: `sys.path`, on which packages are looked for.
    """
    found: dict[str, list[EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        if point.name not in DATASETS and not point.name.startswith(FOLDER_PREFIX):
            found.setdefault(point.name, []).append(point)
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an installed package"


def _function(name: str) -> tuple[str, Callable[[Path], object]]:
    """What to call it in errors, and the function of an installed package."""
    first, *others = _entry_points(tuple(sys.path))[name]
    place = f"data set {name!r} of {_package(first)}"
    if others:
        raise DataError(f"{place} is offered by {_package(others[0])} too: uninstall one of them.")
    try:
        loaded: Callable[[Path], object] = first.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{place} cannot be loaded from {first.value} ({reason}).") from error
    if not callable(loaded):
        raise DataError(f"{place}: {first.value} is no function of the folder of the data sets.")
    return place, loaded


def _others(name: str, folder: Path) -> Arrays:
    """The data set that an installed package's function returns, described by its own arrays."""
    place, function = _function(name)
    try:
        arrays = function(folder)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{place} cannot be read ({reason}).") from error
    if not isinstance(arrays, Mapping):
        raise DataError(
            f"{place} returned {type(arrays).__name__}; expected a mapping with "
            f"{', '.join(ARRAYS)}."
        )
    found = {array: np.asarray(arrays[array]) for array in ARRAYS if array in arrays}
    if missing := [array for array in ARRAYS if array not in found]:
        raise DataError(f"{place}: has no {', '.join(missing)}.")
    return _checked(_described(place, found, summary(name)), place, found)


def _described(place: str, arrays: dict[str, NDArray[Any]], text: str) -> DatasetInfo:
    """Shape, classes and normalisation of arrays, as far as they are such arrays."""
    x, labels = arrays["x_train"], [arrays["y_train"], arrays["y_test"]]
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or 0 in x.shape:
        raise DataError(
            f"{place}: x_train is {x.dtype} {x.shape}; expected uint8 (N, H, W) or (N, H, W, C), N "
            "above 0."
        )
    if not all(np.issubdtype(y.dtype, np.integer) and y.size for y in labels):
        found = ", ".join(f"{y.dtype} {y.shape}" for y in labels)
        raise DataError(f"{place}: y_train and y_test are {found}; expected integers (N,).")
    pixels = x if x.ndim == 4 else x[..., None]
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(pixels.shape[3]):
        counts = np.bincount(pixels[..., channel].reshape(-1), minlength=256)
        average = np.average(values, weights=counts)
        mean.append(round(float(average), 4))
        spread = np.average((values - average) ** 2, weights=counts) ** 0.5
        std.append(round(float(spread), 4) or 1.0)  # a channel of one value stays as it is
    classes = int(max(y.max() for y in labels)) + 1
    shape = (pixels.shape[3], pixels.shape[1], pixels.shape[2])
    return DatasetInfo(shape, classes, tuple(mean), tuple(std), "", text)


def _checked(info: DatasetInfo, where: str, arrays: dict[str, NDArray[Any]]) -> Arrays:
    channels, height, width = info.shape
    digest = hashlib.blake2b(digest_size=6)
    digest.update(repr((info.shape, info.classes, info.mean, info.std)).encode())
    parts: dict[str, NDArray[Any]] = {}
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.ndim == 3:
            x = x[..., None]
        expected = (y.size, height, width, channels)
        if x.dtype != np.uint8 or x.shape != expected or y.ndim != 1 or y.size == 0:
            raise DataError(
                f"{where}: x_{split} is {x.dtype} {x.shape} and y_{split} {y.shape}; expected "
                f"uint8 (N, {height}, {width}, {channels}) and (N,) with the same N above 0."
            )
        whole = np.issubdtype(y.dtype, np.integer)
        if not whole or y.min() < 0 or y.max() >= info.classes:
            found = f"from {y.min()} to {y.max()}" if whole else f"of type {y.dtype}"
            raise DataError(
                f"{where}: y_{split} holds labels {found}; expected integers from 0 to "
                f"{info.classes - 1}."
            )
        parts[f"x_{split}"] = np.ascontiguousarray(x)
        parts[f"y_{split}"] = np.ascontiguousarray(y, dtype=np.int64)
    for array in ARRAYS:
        digest.update(repr(parts[array].shape).encode())
        digest.update(parts[array].data)
    return Arrays(info, hash=digest.hexdigest(), **parts)


def _download(name: str, info: DatasetInfo, path: Path) -> None:
    """Makes the .npz by torchvision's loader, which checks its checksums."""
    from filelock import FileLock
    from torchvision import datasets

    lock = path.with_suffix(".lock")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if path.exists():  # another process made it while this one waited
                return
            loader = getattr(datasets, info.torchvision)
            arrays: dict[str, NDArray[Any]] = {}
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                for split in ("train", "test"):
                    loaded = loader(folder, train=split == "train", download=True)
                    arrays[f"x_{split}"] = np.asarray(loaded.data, dtype=np.uint8)
                    arrays[f"y_{split}"] = np.asarray(loaded.targets, dtype=np.uint8)
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
            write_atomically(path, buffer.getvalue())
        lock.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # leave nothing behind that was not there
            lock.unlink(missing_ok=True)
            for parent in made:
                parent.rmdir()
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{path}: no such file, and the download failed ({reason}). Put the file there (uint8 "
            f"{', '.join(ARRAYS)}), or name its folder by --data or SPARSEBENCH_DATA."
        ) from error


def _digits() -> dict[str, NDArray[Any]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = np.round(digits.images * (255 / 16)).astype(np.uint8)
    # The file's order goes by writer, so its end is no fair test set.
    order = np.random.default_rng(0).permutation(len(x))
    test, train = order[:360], order[360:]
    y = digits.target
    return {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}


def _synthetic() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    patterns = rng.uniform(64, 192, size=(4, 16, 16, 3))
    arrays: dict[str, NDArray[Any]] = {}
    for split, count in (("train", 512), ("test", 256)):
        y = rng.integers(0, 4, size=count)
        noise = rng.normal(0, 48, size=(count, 16, 16, 3))
        arrays[f"x_{split}"] = np.clip(patterns[y] + noise, 0, 255).astype(np.uint8)
        arrays[f"y_{split}"] = y
    return arrays


EMBEDDED: dict[str, Callable[[], dict[str, NDArray[Any]]]] = {
    "digits": _digits,
    "synthetic": _synthetic,
}
