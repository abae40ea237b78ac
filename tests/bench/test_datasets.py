"""Data sets: the embedded ones, the .npz files, the download that makes them, and damaged files."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torchvision

from bench import datasets
from bench.datasets import ARRAYS, DATASETS, Arrays
from bench.errors import DataError, UnknownName
from tests.bench.cells import digits_like, write_recipe, write_suite


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
    ("name", "kind", "shape"),
    [
        ("fashion_mnist", "FashionMNIST", (28, 28)),
        ("cifar10", "CIFAR10", (32, 32, 3)),
        ("cifar100", "CIFAR100", (32, 32, 3)),
    ],
)
def test_every_data_set_of_the_table_is_had_from_its_own_class(name, kind, shape, monkeypatch):
    info = DATASETS[name]

    class Loader:
        def __init__(self, root: str, *, train: bool, download: bool) -> None:
            assert download
            self.data = np.full((info.classes, *shape), 7 if train else 9, np.uint8)
            self.targets = list(range(info.classes))

    monkeypatch.setattr(torchvision.datasets, kind, Loader)
    with tempfile.TemporaryDirectory() as folder:
        arrays = datasets.load(name, Path(folder))
    assert arrays.x_train.shape[1:] == (*shape[:2], 3 if len(shape) == 3 else 1)
    assert arrays.info.shape == (arrays.x_train.shape[3], *shape[:2])
    assert (arrays.x_train.max(), arrays.x_test.min()) == (7, 9)
    assert len(info.mean) == len(info.std) == info.shape[0]
    assert arrays.y_test.max() + 1 == info.classes


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


OUTSIDE = '''
from pathlib import Path
import numpy as np

pixels = np.arange(40 * 6 * 5, dtype=np.int64).reshape(40, 6, 5) % 251

def blobs(folder: Path):
    """Forty blobs.

    And more about them.
    """
    assert isinstance(folder, Path)
    x, y = pixels.astype(np.uint8), np.arange(40) % 3
    return {"x_train": x[:30], "y_train": y[:30], "x_test": x[30:], "y_test": y[30:]}

def changed(**arrays):
    return blobs(Path()) | arrays

def as_list(folder): return [1, 2]
def too_few(folder): return {name: value for name, value in blobs(folder).items() if "y" in name}
def floats(folder): return changed(x_train=pixels[:30] / 255)
def other_size(folder): return changed(x_test=pixels[30:, :4].astype(np.uint8))
def fewer(folder): return changed(y_train=np.zeros(29, np.int64))
def below(folder): return changed(y_test=np.arange(10) - 1)
def fractions(folder): return changed(y_test=np.arange(10) / 2)
def fails(folder): raise RuntimeError("no such server")
constant = 3
'''
OFFERS = ("blobs", "as_list", "too_few", "floats", "other_size", "fewer", "below", "fractions")
OFFERS += ("fails", "constant")


@pytest.fixture
def others(package):
    """A package that offers data sets, most of them wrong."""
    offers = {name: f"outside_methods:{name}" for name in OFFERS}
    package(OUTSIDE, group="sparsebench.datasets", lost="nowhere:lost", **offers)


@pytest.mark.usefixtures("others")
def test_a_data_set_of_another_package_is_described_by_its_arrays(tmp_path):
    arrays = datasets.load("blobs", tmp_path)
    assert arrays.info.shape == (1, 6, 5)
    assert arrays.info.classes == 3
    assert arrays.info.summary == "Forty blobs."
    assert (arrays.x_train.shape, arrays.x_test.shape) == ((30, 6, 5, 1), (10, 6, 5, 1))
    check_constants(arrays)


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("as_list", "returned list; expected a mapping with x_train, y_train, x_test, y_test"),
        ("too_few", "has no x_train, x_test"),
        ("floats", "x_train is float64 (30, 6, 5); expected uint8"),
        ("other_size", "x_test is uint8 (10, 4, 5, 1) and y_test (10,); expected uint8 (N, 6, 5"),
        ("fewer", "x_train is uint8 (30, 6, 5, 1) and y_train (29,); expected"),
        ("below", "y_test holds labels from -1 to 8"),
        ("fractions", "y_train and y_test are int64 (30,), float64 (10,); expected integers"),
        ("fails", "cannot be read (RuntimeError: no such server)"),
        ("constant", "outside_methods:constant is no function"),
        ("lost", "cannot be loaded from nowhere:lost (ModuleNotFoundError"),
    ],
)
def test_what_another_package_does_wrong_is_said_in_one_line(name, piece, tmp_path):
    with pytest.raises(DataError) as caught:
        datasets.load(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"data set {name!r} of outside")
    assert piece in message
    assert "\n" not in message


@pytest.mark.usefixtures("others")
def test_data_sets_of_other_packages_are_listed_and_trained_on(tmp_path, call):
    listed = call("list", "datasets")
    assert (listed.status, listed.err) == (0, "")
    assert "Forty blobs." in listed.out
    assert "cannot be loaded from nowhere:lost" in listed.out
    recipe = write_recipe(tmp_path, "batch = 8\nlr = 0.1")
    suite = write_suite(tmp_path, dataset='"blobs"', recipe=recipe)
    planned = call("plan", suite)
    assert planned.status == 0, planned.err
    refused = call("plan", write_suite(tmp_path, dataset='"floats"', recipe=recipe))
    assert refused.status == 2
    assert refused.err.count("\n") == 1


def test_two_packages_with_one_name_are_a_conflict(package, tmp_path, call):
    offers = {"blobs": "outside_methods:blobs", "mnist": "outside_methods:blobs"}
    package(OUTSIDE, group="sparsebench.datasets", **offers)
    package(OUTSIDE, name="second", group="sparsebench.datasets", blobs="outside_methods:blobs")
    with pytest.raises(DataError, match=r"of (outside|second) is offered by .* too: uninstall one"):
        datasets.load("blobs", tmp_path)
    said = call("list", "datasets").err
    assert "data set 'mnist' of outside is not used: the table has one of that name." in said
