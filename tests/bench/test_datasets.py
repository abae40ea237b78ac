"""Data sets: the embedded ones, the .npz files, the download that makes them, and damaged files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torchvision

from bench import datasets
from bench.datasets import ARRAYS, DATASETS, Arrays
from bench.errors import DataError, UnknownName
from tests.bench.cells import digits_like


def save(folder: Path, **changes: object) -> Path:
    """An mnist.npz of 64 + 64 random images; a change to None leaves an array out."""
    path = folder / "mnist.npz"
    arrays = {name: value for name, value in digits_like(**changes).items() if value is not None}
    np.savez(path, **arrays)
    return path


def complaint(folder: Path) -> str:
    """The message for the mnist.npz in a folder, which must stay as it is."""
    path = folder / "mnist.npz"
    before = path.read_bytes()
    with pytest.raises(DataError) as caught:
        datasets.load("mnist", folder)
    assert path.read_bytes() == before
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def check_constants(arrays: Arrays) -> None:
    """The normalisation constants are those of the training images, to 4 digits."""
    values = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(arrays.info.mean, arrays.info.std, strict=True)):
        counts = np.bincount(arrays.x_train[..., channel].reshape(-1), minlength=256)
        found = np.average(values, weights=counts)
        spread = np.average((values - found) ** 2, weights=counts) ** 0.5
        assert (mean, std) == pytest.approx((found, spread), abs=0.6e-4)


class Download:
    """A class of `torchvision.datasets` that needs no network."""

    calls: list[tuple[str, bool, bool]] = []  # noqa: RUF012  emptied by each test

    def __init__(self, root: str, *, train: bool, download: bool) -> None:
        self.calls.append((root, train, download))
        Path(root, "raw.bin").write_bytes(b"as torchvision leaves it")
        arrays = digits_like()
        split = "train" if train else "test"
        self.data = arrays[f"x_{split}"]
        self.targets = list(map(int, arrays[f"y_{split}"]))


@pytest.fixture
def download(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "MNIST", Download)
    monkeypatch.setattr(Download, "calls", [])
    return Download


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("digits", (1437, 8, 8, 1), (360, 8, 8, 1)),
        ("synthetic", (512, 16, 16, 3), (256, 16, 16, 3)),
    ],
)
def test_embedded_data_sets_have_their_shapes(name, train, test):
    arrays = datasets.load(name, Path("nowhere"))
    assert (arrays.x_train.shape, arrays.x_test.shape) == (train, test)
    assert (arrays.y_train.shape, arrays.y_test.shape) == (train[:1], test[:1])
    assert (arrays.x_train.dtype, arrays.y_train.dtype) == (np.uint8, np.int64)
    assert set(arrays.y_train) == set(arrays.y_test) == set(range(arrays.info.classes))


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_normalisation_constants_are_those_of_the_data(name):
    check_constants(datasets.load(name, Path("nowhere")))


def test_digits_use_the_whole_range_of_grey():
    pixels = datasets.load("digits", Path("nowhere")).x_train
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_training_and_test_images_are_different_ones():
    arrays = datasets.load("digits", Path("nowhere"))
    train = {image.tobytes() for image in arrays.x_train}
    assert not [image for image in arrays.x_test if image.tobytes() in train]


def test_a_known_data_set_keeps_its_hash():
    # It enters every cell's key.
    assert datasets.load("digits", Path("nowhere")).hash == "00cc2bb831e7"
    assert datasets.load("synthetic", Path("a")).hash == datasets.load("synthetic", Path("b")).hash


def test_the_hash_sees_pixels_labels_and_their_split(tmp_path):
    def hash_of(**changes: object) -> str:
        save(tmp_path, **changes)
        return datasets.load("mnist", tmp_path).hash

    plain = digits_like()
    pixels, labels = plain["x_test"].copy(), plain["y_train"].copy()
    pixels[5, 3, 2] ^= 1
    labels[7] = (labels[7] + 1) % 10
    swapped = {"x_train": plain["x_test"], "x_test": plain["x_train"]}
    found = [hash_of(), hash_of(x_test=pixels), hash_of(y_train=labels), hash_of(**swapped)]
    assert len(set(found)) == 4


def test_the_hash_does_not_depend_on_how_the_file_is_written(tmp_path):
    path = save(tmp_path)
    plain = datasets.load("mnist", tmp_path).hash
    arrays = digits_like()
    arrays["y_train"] = arrays["y_train"].astype(np.int32)
    arrays["x_train"] = arrays["x_train"][..., None]
    np.savez_compressed(path, **dict(reversed(arrays.items())))
    assert datasets.load("mnist", tmp_path).hash == plain


def test_the_hash_sees_the_normalisation(tmp_path, monkeypatch):
    save(tmp_path)
    before = datasets.load("mnist", tmp_path).hash
    info = DATASETS["mnist"]
    changed = datasets.DatasetInfo(info.shape, 10, (0.5,), info.std, info.torchvision, "")
    monkeypatch.setitem(DATASETS, "mnist", changed)
    assert datasets.load("mnist", tmp_path).hash != before


def test_an_unknown_data_set_is_named_with_the_nearest(tmp_path):
    with pytest.raises(UnknownName, match=r"no such data set: 'minst'\. Did you mean 'mnist'\?"):
        datasets.load("minst", tmp_path)


def test_a_missing_file_is_downloaded_once_and_cached(tmp_path, download):
    folder = tmp_path / "data"
    first = datasets.load("mnist", folder)
    assert [(train, wanted) for _, train, wanted in download.calls] == [(True, True), (False, True)]
    assert [path.name for path in folder.iterdir()] == ["mnist.npz"]
    with np.load(folder / "mnist.npz") as file:
        assert sorted(file) == sorted(ARRAYS)
        assert {str(file[name].dtype) for name in file} == {"uint8"}
    assert np.array_equal(first.x_train[..., 0], digits_like()["x_train"])
    assert np.array_equal(first.y_test, digits_like()["y_test"])

    download.calls.clear()
    assert datasets.load("mnist", folder).hash == first.hash
    assert download.calls == []


@pytest.mark.parametrize(
    "error",
    [OSError("no route to host"), RuntimeError("File not found or corrupted.\nno route to host")],
)
def test_a_failed_download_names_the_file_and_what_to_do(error, tmp_path, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, "MNIST", fails)
    with pytest.raises(DataError) as caught:
        datasets.load("mnist", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'mnist.npz'}: no such file, and the download failed")
    assert "no route to host" in message
    assert "--data or SPARSEBENCH_DATA" in message
    assert "\n" not in message
    assert not list(tmp_path.glob("*.npz*"))


def test_a_download_that_ends_half_way_leaves_no_file(tmp_path, download, monkeypatch):
    def only_train(root: str, *, train: bool, download: bool) -> Download:
        if not train:
            raise OSError("connection reset")
        return Download(root, train=train, download=download)

    monkeypatch.setattr(torchvision.datasets, "MNIST", only_train)
    with pytest.raises(DataError, match="connection reset"):
        datasets.load("mnist", tmp_path)
    assert not list(tmp_path.glob("*.npz"))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_file_that_is_there_is_never_downloaded(tmp_path, download):
    save(tmp_path)
    datasets.load("mnist", tmp_path)
    assert download.calls == []


def test_a_truncated_file_is_named(tmp_path, download):
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:-3000])
    assert "damaged or not an .npz file" in complaint(tmp_path)
    assert "Delete it to have it downloaded again" in complaint(tmp_path)
    assert download.calls == []


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04"])
def test_a_file_that_is_no_npz_is_named(content, tmp_path):
    (tmp_path / "mnist.npz").write_bytes(content)
    assert "damaged or not an .npz file" in complaint(tmp_path)


def test_an_npy_file_in_its_place_is_named(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    (tmp_path / "mnist.npz").write_bytes(buffer.getvalue())
    assert "damaged or not an .npz file" in complaint(tmp_path)


def test_a_zip_of_other_things_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "mnist.npz", "w") as file:
        for name in ARRAYS:
            file.writestr(f"{name}.npy", "text")
    complaint(tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_anywhere_is_found_or_does_no_harm(compressed, tmp_path):
    path = save(tmp_path)
    if compressed:
        np.savez_compressed(path, **digits_like())
    whole = path.read_bytes()
    wanted = datasets.load("mnist", tmp_path).hash
    found = 0
    for position in range(20, len(whole), len(whole) // 300):
        content = bytearray(whole)
        content[position] ^= 0x10
        path.write_bytes(content)
        try:
            assert datasets.load("mnist", tmp_path).hash == wanted
        except DataError:
            found += 1
    assert found > 200


@pytest.mark.parametrize("name", ARRAYS)
def test_a_missing_array_is_named(name, tmp_path):
    save(tmp_path, **{name: None})
    assert f"has no {name}." in complaint(tmp_path)


LABELS = np.arange(64) % 10
PIXELS = np.zeros((64, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("changes", "piece"),
    [
        ({"x_train": PIXELS.astype(np.float32)}, "x_train is float32 (64, 28, 28"),
        ({"x_test": PIXELS[:, :8, :8]}, "x_test is uint8 (64, 8, 8, 1)"),
        ({"x_test": PIXELS[:60]}, "y_test (64,); expected uint8 (N, 28, 28, 1)"),
        ({"x_train": PIXELS[..., None].repeat(3, 3)}, "x_train is uint8 (64, 28, 28, 3)"),
        ({"x_train": PIXELS[0]}, "x_train is uint8 (28, 28)"),
        ({"y_train": LABELS[:, None]}, "y_train (64, 1)"),
        ({"y_train": np.array(3)}, "y_train ()"),
        ({"x_test": PIXELS[:0], "y_test": LABELS[:0]}, "the same N above 0"),
        (
            {"y_train": LABELS + 1},
            "y_train holds labels from 1 to 10; expected integers from 0 to 9",
        ),
        ({"y_test": LABELS - 1}, "y_test holds labels from -1 to 8"),
        ({"y_test": LABELS.astype(np.float64)}, "y_test holds labels of type float64"),
        ({"y_test": LABELS.astype(str)}, "y_test holds labels of type <U"),
        ({"y_test": LABELS.astype(object)}, "damaged or not an .npz file"),
    ],
    ids=str,
)
def test_wrong_arrays_are_named_with_what_is_expected(changes, piece, tmp_path):
    save(tmp_path, **changes)
    assert piece in complaint(tmp_path)


def test_pickled_code_in_a_file_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path(tmp_path / "ran").touch, ()

    save(tmp_path, y_test=np.array([Bomb()] * 64, dtype=object))
    complaint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "train", "test", "known"),
    [
        ("mnist", (60_000, 28, 28, 1), (10_000, 28, 28, 1), "47ef77565eff"),
        ("cifar10", (50_000, 32, 32, 3), (10_000, 32, 32, 3), "11f639c8434a"),
    ],
)
def test_the_real_data_is_the_known_one(name, train, test, known, real_data):
    arrays = datasets.load(name, real_data)
    assert (arrays.x_train.shape, arrays.x_test.shape) == (train, test)
    assert arrays.hash == known
    check_constants(arrays)
