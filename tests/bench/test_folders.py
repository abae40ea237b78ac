"""Folders of images: real JPEG files of digits, damaged ones among them, from scan to record."""

from __future__ import annotations

import functools
import io
import os
import random
import re
import shutil
import signal
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from bench import executors, folders, launch
from bench.data import BatchStream, Data
from bench.errors import BenchError, DataError, SuiteError
from bench.evaluate import evaluate
from bench.folders import Folder
from bench.recipes import Recipe
from bench.store import Store
from bench.streaming import Decoders, Files, Making, decoded, to_device
from bench.task import Finished, Progress, Task
from bench.together import run_cell
from tests.bench.cells import (
    forking,
    plan_of,
    tasks_of,
    the_same,
    train,
    train_one,
    write_recipe,
    write_suite,
)
from tests.hot import NoWaiting, recorded

CLASSES = 3
CPU = torch.device("cpu")
RECIPE = """batch = 8
lr = 0.05
flip = true
crop = 1
image_size = 16
area = [0.5, 1.0]
validation = 8"""
MODEL = '["lenet_300_100"]'


@functools.cache
def digits() -> Any:
    return load_digits(n_class=CLASSES)


def picture(number: int) -> Image.Image:
    """A digit of 32x24 pixels, grey."""
    pixels = (digits().images[number] * 15.9).astype(np.uint8)
    return Image.fromarray(pixels).resize((24, 32))


def save(folder: Path, numbers: range) -> None:
    """Digits as JPEG files, a folder a class."""
    for number in numbers:
        path = folder / f"digit-{digits().target[number]}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path, quality=95)


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """80 training and 40 test images in 3 classes; not to be written in."""
    root = tmp_path_factory.mktemp("images") / "digits"
    save(root / "train", range(80))
    save(root / "val", range(80, 120))
    return root


@pytest.fixture
def images(original, tmp_path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(original, tmp_path / "digits"))


@pytest.fixture(scope="session", autouse=True)
def server() -> None:
    """What decodes is forked from the server that other tests use, which has loaded torch."""
    forking()
    forkserver.ensure_running()


def read(root: Path, data: Path | None = None, size: int = 16) -> Folder:
    return folders.load(root, data or root.parent / "data", size)


def recipe(**fields: object) -> Recipe:
    common = {"title": "", "batch": 8, "lr": 0.1, "image_size": 16}
    return Recipe(**common | fields)  # type: ignore[arg-type]


def complaint(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(root)
    message = str(caught.value)
    assert message.startswith(str(root))
    assert "\n" not in message
    return message


# Which files


def test_a_folder_of_classes_is_read_with_its_labels(images):
    found = read(images)
    assert (len(found.x_train), len(found.x_test)) == (80, 40)
    assert found.info.shape == (3, 16, 16)
    assert found.info.classes == CLASSES
    assert found.notes == ()
    for paths, labels in ((found.x_train, found.y_train), (found.x_test, found.y_test)):
        assert [f"digit-{label}" for label in labels] == [Path(path).parent.name for path in paths]
        assert labels.dtype == np.int64


@pytest.mark.parametrize("name", ["test", "validation"])
def test_the_test_images_may_lie_in_a_folder_of_another_name(name, images):
    wanted = read(images).hash
    (images / "val").rename(images / name)
    assert read(images).hash == wanted


def test_of_two_test_folders_one_is_read_and_a_note_says_which(images):
    shutil.copytree(images / "train", images / "test")
    found = read(images)
    assert len(found.x_test) == 80
    assert found.notes == (f"{images}: the test images are those of test/; val/ is not read",)


def test_without_a_test_folder_a_fifth_of_each_class_is_set_aside_by_content(images, tmp_path):
    found = read(images / "train")
    counts = np.bincount(digits().target[:80])
    assert np.bincount(found.y_test).tolist() == (counts // 5).tolist()
    assert np.bincount(found.y_train).tolist() == (counts - counts // 5).tolist()
    assert not set(found.x_train) & set(found.x_test)
    (note,) = found.notes
    assert "a fixed fifth of each class is tested on" in note

    # The names of the files do not matter.
    shutil.copytree(images / "train", tmp_path / "other")
    for number, path in enumerate(sorted((tmp_path / "other").rglob("*.jpg"), reverse=True)):
        path.rename(path.with_name(f"{number:03}.jpg"))
    moved = read(tmp_path / "other")
    assert moved.hash == found.hash
    for one, two in zip(found.x_test, moved.x_test, strict=True):
        assert Path(one).read_bytes() == Path(two).read_bytes()


def test_the_hash_sees_contents_labels_and_split_and_no_paths(images, tmp_path):
    hashes = [read(images).hash]
    copy = shutil.copytree(images, tmp_path / "elsewhere")
    for path in list(copy.rglob("*.jpg")):
        path.rename(path.with_name(f"x{path.name}"))
    assert read(copy).hash == hashes[0]

    one = next((copy / "train" / "digit-0").iterdir())
    picture(119).save(one)
    hashes.append(read(copy).hash)
    one.rename(copy / "train" / "digit-1" / "moved.jpg")
    hashes.append(read(copy).hash)
    (copy / "train" / "digit-1" / "moved.jpg").rename(copy / "val" / "digit-1" / "moved.jpg")
    hashes.append(read(copy).hash)
    assert len(set(hashes)) == 4


def test_files_that_are_no_images_are_left_out_and_named_in_one_line(images):
    wanted = read(images)
    for name in ("train/notes.txt", "train/digit-0/more.csv", "val/digit-1/a/b.json"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_text("text")
    (images / "train" / "digit-0" / ".DS_Store").write_bytes(b"\0")
    found = read(images)
    assert found.hash == wanted.hash
    (note,) = found.notes
    assert note == (
        f"{images}: left out, not images by their names: "
        "train/notes.txt, train/digit-0/more.csv, val/digit-1/a/b.json"
    )
    for number in range(9):
        (images / "train" / "digit-0" / f"{number}.log").write_text("")
    assert read(images).notes[0].endswith(" and 7 more")


def test_images_that_cannot_be_decoded_are_refused_by_name(images):
    whole = (images / "train" / "digit-0" / "0.jpg").read_bytes()
    (images / "train" / "digit-0" / "cut.jpg").write_bytes(whole[:-150])
    (images / "val" / "digit-2" / "text.JPG").write_text("no image at all")
    (images / "val" / "digit-2" / "empty.png").write_bytes(b"")
    message = complaint(images)
    assert "3 of 123 images cannot be decoded" in message
    assert re.search(r"train/digit-0/cut\.jpg \([^)]*truncated[^)]*\)", message)
    assert "val/digit-2/text.JPG (not an image)" in message
    assert "val/digit-2/empty.png (not an image)" in message
    assert "Replace them by whole ones, or take them away." in message
    assert complaint(images) == message  # from the index too
    for name in ("train/digit-0/cut.jpg", "val/digit-2/text.JPG", "val/digit-2/empty.png"):
        (images / name).unlink()
    assert len(read(images).x_train) == 80


def test_a_link_that_leads_nowhere_is_named(images):
    (images / "train" / "digit-0" / "gone.jpg").symlink_to(images / "nowhere.jpg")
    assert "train/digit-0/gone.jpg (No such file or directory)" in complaint(images)


def test_many_damaged_images_are_counted(images):
    for path in (images / "val" / "digit-0").iterdir():
        path.write_bytes(b"\xff\xd8\xff")
    count = len(list((images / "val" / "digit-0").iterdir()))
    message = complaint(images)
    assert message.count("val/digit-0/") == folders.NAMED
    assert f"{count} of 120 images" in message
    assert f" and {count - folders.NAMED} more" in message


def test_processes_that_check_find_the_same(images, monkeypatch):
    (images / "train" / "digit-0" / "text.jpg").write_text("no image at all")
    paths = sorted(images.rglob("*.jpg"))
    wanted = folders._inspected(images, paths)
    monkeypatch.setattr(folders, "IN_THIS_PROCESS", 0)
    monkeypatch.setattr(folders, "cores", lambda: 2)
    assert folders._inspected(images, paths) == wanted
    assert [fault for _, fault in wanted if fault] == ["not an image"]


def test_a_long_check_gives_a_word_now_and_then(images, monkeypatch, capsys):
    monkeypatch.setattr(folders, "IN_THIS_PROCESS", 0)
    monkeypatch.setattr(folders, "cores", lambda: 1)
    monkeypatch.setattr(folders, "WORD_SECONDS", 0.0)
    folders._inspected(images, sorted(images.rglob("*.jpg")))
    assert f"sparsebench: {images}: 1 of 120 images checked" in capsys.readouterr().err


def test_what_is_known_of_a_file_is_not_found_out_again(images, monkeypatch):
    looked: list[str] = []
    inspect = folders.inspect
    monkeypatch.setattr(
        folders, "inspect", lambda path: (looked.append(path.name), inspect(path))[1]
    )
    first = read(images)
    assert len(looked) == 120
    looked.clear()
    assert read(images).hash == first.hash
    assert looked == []

    one = images / "train" / "digit-0" / "0.jpg"
    state = one.stat()
    os.utime(one, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert read(images).hash == first.hash
    assert looked == ["0.jpg"]
    picture(119).save(one)
    assert read(images).hash != first.hash
    assert looked == ["0.jpg", "0.jpg"]


def test_a_damaged_index_is_made_again(images):
    wanted = read(images)
    (index,) = (images.parent / "data" / "folders").iterdir()
    content = index.read_bytes()
    for damaged in (b"", content[:-20], b"\x81\xa1a\x01"):
        index.write_bytes(damaged)
        assert read(images).hash == wanted.hash
        assert index.read_bytes() == content


def test_an_index_that_cannot_be_written_is_said(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the index of .* Name a folder by --data"):
        read(images, tmp_path / "file" / "data")


def test_classes_that_one_part_lacks_are_named(images):
    shutil.copytree(images / "val" / "digit-0", images / "val" / "digit-9")
    (images / "train" / "digit-9").mkdir()  # no images, so no class
    assert complaint(images) == (
        f"{images}/train: has no images of 1 classes that the other part has: digit-9. "
        "Training and test images must be of the same classes."
    )
    shutil.rmtree(images / "val" / "digit-9")
    shutil.rmtree(images / "val" / "digit-1")
    assert complaint(images).startswith(f"{images}/val: has no images of 1 classes")


def test_folders_without_what_is_needed_are_refused(images, tmp_path):
    assert "no such folder. Put the images there" in complaint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images in folders of classes" in complaint(tmp_path / "empty")
    (images / "val").rename(images / "holdout")
    assert "has train/, but no classes in test, val, validation" in complaint(images)
    single = tmp_path / "single"
    save(single, range(20))
    save(single / "few", range(1))
    assert "1 classes have a single image: few" in complaint(single)


def test_a_class_may_be_called_train(images):
    (images / "train" / "digit-0").rename(images / "train" / "train")
    found = read(images / "train")
    assert found.info.classes == CLASSES


# What a file becomes


def rgb(image: Image.Image, kind: str, **options: Any) -> np.ndarray:
    """Pixels after a file of this kind was written and read."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    made = folders.decode(stream)
    assert made.mode == "RGB"
    return np.asarray(made)


@pytest.fixture
def colours() -> Image.Image:
    """4x2 pixels: a row of red, green, blue, white over a row of greys."""
    rows = [
        [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3],
        [(v,) * 3 for v in (0, 80, 160, 240)],
    ]
    return Image.fromarray(np.array(rows, np.uint8))


def test_every_kind_of_picture_becomes_rgb(colours):
    wanted = np.asarray(colours)
    assert np.array_equal(rgb(colours, "PNG"), wanted)
    assert np.array_equal(rgb(colours.convert("RGBA"), "PNG"), wanted)
    assert np.array_equal(rgb(colours.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), wanted)
    grey = np.asarray(colours.convert("L"))[..., None].repeat(3, 2)
    assert np.array_equal(rgb(colours.convert("L"), "PNG"), grey)
    assert np.array_equal(rgb(colours.convert("LA"), "PNG"), grey)
    assert rgb(colours.convert("1"), "PNG").max() == 255
    flat = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(rgb(flat, "JPEG", quality=95).astype(int) - (255, 0, 0)).max() < 8
    # Frames but the first are not looked at.
    assert np.array_equal(
        rgb(colours, "GIF", save_all=True, append_images=[flat.convert("RGB").resize((4, 2))])[1],
        wanted[1],
    )


def test_a_palette_with_transparent_entries_becomes_rgb_without_a_warning(colours):
    palette = colours.convert("P", palette=Image.Palette.ADAPTIVE)
    pixels = rgb(palette, "PNG", transparency=bytes([0, 128, 255]))
    assert np.array_equal(pixels, np.asarray(colours))


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off():
    deep = Image.fromarray((np.arange(8, dtype=np.uint16) * 8192).reshape(2, 4))
    assert rgb(deep, "PNG")[..., 0].tolist() == [[0, 32, 64, 96], [128, 160, 192, 224]]


def test_a_picture_is_turned_as_its_exif_says(colours):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    assert np.array_equal(rgb(colours, "PNG", exif=exif), np.rot90(np.asarray(colours), -1))


def test_tests_resize_the_shorter_side_and_take_the_centre(images):
    path = str(images / "train" / "digit-0" / "0.jpg")
    found = decoded([path], (), Making(16, 0.8))[0]
    image = folders.decode(path)  # 24x32
    resized = image.resize((20, 26), Image.Resampling.BILINEAR)
    wanted = np.asarray(resized.crop((2, 5, 18, 21)))
    assert np.array_equal(found, wanted)


def test_a_random_crop_is_a_function_of_its_seed_alone(images):
    paths = [str(images / "train" / "digit-0" / "0.jpg")] * 3
    making = Making(16, 0.875, (0.3, 1.0), "rand-m9-mstd0.5")
    state = random.getstate()
    legacy = np.random.get_state()  # noqa: NPY002
    noise = torch.random.get_rng_state()
    try:
        one, other, again = decoded(paths, [5, 6, 5], making)
        alone = decoded(paths[:1], [6], making)[0]
    finally:
        random.setstate(state)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.random.set_rng_state(noise)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert np.array_equal(other, alone)


# Batches


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory) -> Folder:
    return read(original, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def opened(folder):
    """Makes data of the folder; their processes end with the module."""
    made: list[Data] = []

    @functools.cache
    def make(count: int = 1, **fields: object) -> Data:
        made.append(to_device(folder, recipe(**fields), CPU, count))
        return made[-1]

    yield make
    for data in made:
        data.close()


AUGMENTED: dict[str, Any] = {"area": (0.4, 1.0), "crop": 2, "flip": True}


def test_batches_do_not_depend_on_processes_or_on_what_was_asked_before(opened):
    used = recipe(**AUGMENTED)
    one = BatchStream(opened(1, **AUGMENTED), used, 3, "order")
    assert one.steps_per_epoch == 10
    in_order = [one.batch(position) for position in range(12)]
    other = BatchStream(opened(2, **AUGMENTED), used, 3, "order")
    for position in (11, 0, 7, 8, 2):
        for stream in (one, other):
            images, labels = stream.batch(position)
            assert torch.equal(images, in_order[position][0])
            assert torch.equal(labels, in_order[position][1])
    assert in_order[0][0].shape == (8, 3, 16, 16)
    assert in_order[0][0].dtype == torch.float32


@pytest.mark.parametrize("fields", [{}, AUGMENTED | {"padding": "reflect"}], ids=["plain", "all"])
def test_what_was_recorded_of_one_batch_of_files_replays_for_others(opened, fields):
    stream, other = (BatchStream(opened(1, **fields), recipe(**fields), 3, "order") for _ in "ab")
    stream.seek(1)
    with NoWaiting():
        stream.read()
    replay = recorded(stream)
    for position in (1, 2, 13, 4):
        stream.seek(position)
        for found, wanted in zip(replay(), other.batch(position), strict=True):
            assert torch.equal(found, wanted)


def test_a_batch_of_files_that_is_there_is_not_decoded_again(opened, monkeypatch):
    data = opened(1, **AUGMENTED)
    stream = BatchStream(data, recipe(**AUGMENTED), 3, "order")
    images, _ = stream.batch(4)
    monkeypatch.setattr(data.decoders, "submit", None)
    assert torch.equal(stream.batch(4)[0], images)


def test_an_image_is_cropped_anew_in_each_epoch_stream_and_seed(opened):
    fields: dict[str, Any] = {"area": (0.4, 1.0)}
    data, used = opened(1, **fields), recipe(**fields)

    def crop(seed: int, name: str, epoch: int) -> torch.Tensor:
        """What the stream makes of image 0."""
        stream = BatchStream(data, used, seed, name)
        order = stream.plan.draw(stream.plan.generator(epoch))
        at = int((order == 0).nonzero())
        return stream.batch(epoch * 10 + at // 8)[0][at % 8]

    same = crop(0, "order", 0)
    assert torch.equal(same, crop(0, "order", 0))
    for other in (crop(0, "order", 1), crop(0, "method", 0), crop(1, "order", 0)):
        assert not torch.equal(same, other)


@pytest.mark.parametrize(("padding", "mode"), [("zero", "constant"), ("reflect", "reflect")])
def test_a_batch_is_its_files_with_the_ordinary_crops_and_flips(opened, folder, padding, mode):
    fields: dict[str, Any] = {"crop": 2, "flip": True, "padding": padding}
    data = opened(1, **fields)
    stream = BatchStream(data, recipe(**fields), 0, "order")
    images, labels = stream.batch(3)
    part = slice(24, 32)
    numbers = stream.order[part].tolist()
    assert labels.tolist() == [int(folder.y_train[n]) for n in numbers]
    squares = decoded([folder.x_train[n] for n in numbers], (), Making(16, 0.875))
    for i in range(8):
        padded = np.pad(squares[i], ((2, 2), (2, 2), (0, 0)), mode=mode)
        row, column = int(stream.rows[24 + i]), int(stream.columns[24 + i])
        wanted = padded[row : row + 16, column : column + 16]
        if stream.mirrored[24 + i]:
            wanted = wanted[:, ::-1]
        wanted = (wanted / 255 - folders.MEAN) / folders.STD
        assert np.allclose(images[i].permute(1, 2, 0).numpy(), wanted, atol=1e-5)


def test_a_stream_without_augmentation_shows_the_centres(opened, folder):
    data = opened(1, **AUGMENTED)
    stream = BatchStream(data, recipe(**AUGMENTED), 0, "method", augmented=False)
    images, _ = stream.batch(0)
    files = [folder.x_train[n] for n in stream.order[:8].tolist()]
    squares = torch.from_numpy(decoded(files, (), Making(16, 0.875)))
    assert torch.equal(images, data.normalise(squares))


def test_streaming_leaves_the_global_random_streams_alone(opened):
    states = (random.getstate(), str(np.random.get_state()), torch.random.get_rng_state())  # noqa: NPY002
    BatchStream(opened(1, **AUGMENTED), recipe(**AUGMENTED), 9, "order").batch(4)
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), states[2])


def test_slices_of_a_split_are_its_images_in_order(opened, folder):
    data = opened(1, validation=10)
    assert (len(data.train), len(data.validation), len(data.test)) == (70, 10, 40)
    whole = torch.from_numpy(decoded(folder.x_test, (), Making(16, 0.875)))
    parts = [data.test.images[start : start + 16] for start in range(0, 40, 16)]
    assert [len(part) for part in parts] == [16, 16, 8]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(data.test.images[30:], whole[30:])
    assert data.without_test().test.images[:5].shape == (0, 16, 16, 3)
    assert len(data.without_test().test) == 0


def test_the_validation_images_are_fixed_by_the_content(opened, folder):
    data = opened(1, validation=10)
    held, kept = data.validation.images.paths, data.train.images.paths
    assert sorted([*held, *kept]) == sorted(folder.x_train)
    assert held != kept[:10]
    again = to_device(folder, recipe(validation=10, batch=4), CPU, 1)
    again.close()
    assert again.validation.images.paths == held


class Mean(torch.nn.Module):
    """Scores classes by the mean of an image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, -mean, mean * 0 - 0.5], 1)


def test_a_network_is_evaluated_on_every_file(opened, folder):
    data = opened(1)
    squares = torch.from_numpy(decoded(folder.x_test, (), Making(16, 0.875)))
    logits = Mean()(data.normalise(squares))
    hits = (logits.argmax(1).numpy() == folder.y_test).mean()
    assert evaluate(Mean(), data.test, data).top1 == pytest.approx(100 * hits)


def test_a_file_that_vanishes_later_is_named(images):
    found = read(images)
    data = to_device(found, recipe(), CPU, 1)
    try:
        Path(found.x_test[5]).unlink()
        with pytest.raises(
            DataError, match=f"^{re.escape(found.x_test[5])}: cannot be decoded any"
        ):
            evaluate(Mean(), data.test, data)
    finally:
        data.close()


def test_a_decoder_that_is_killed_is_an_error_and_the_next_ones_start_anew(original):
    path = str(original / "train" / "digit-0" / "0.jpg")
    files = Files([path] * 40, Making(8, 1.0), Decoders(1), CPU)
    try:
        wanted = files[0:4]
        assert files.decoders._pool is not None
        (process,) = files.decoders._pool._processes
        os.kill(process, signal.SIGKILL)
        with pytest.raises(BenchError, match="process that decodes images died"):
            [files[start : start + 4] for start in range(4, 40, 4)]
        assert torch.equal(files[0:4], wanted)
    finally:
        files.decoders.close()


def _hold(connection: Any, path: str) -> None:
    """Starts a decoder, tells its process, and waits for its own end."""
    decoders = Decoders(1)
    decoders.submit([path], (), Making(8, 1.0)).result()
    assert decoders._pool is not None
    connection.send(list(decoders._pool._processes))
    time.sleep(60)


def test_decoders_do_not_outlive_a_parent_that_is_killed(original):
    context = forking()
    here, there = context.Pipe()
    path = str(original / "train" / "digit-0" / "0.jpg")
    parent = context.Process(target=_hold, args=(there, path))
    parent.start()
    assert here.poll(60)
    (decoder,) = here.recv()
    assert runs(decoder)
    parent.kill()
    parent.join()
    end = time.monotonic() + 20
    while runs(decoder):
        assert time.monotonic() < end, "still there"
        time.sleep(0.02)


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


# Cells


def suite_of(
    tmp_path: Path, images: Path, text: str = RECIPE, methods: str = "", **fields: str
) -> Path:
    common = {
        "dataset": f'"imagefolder:{images}"',
        "recipe": write_recipe(tmp_path, text),
        "models": MODEL,
        "sparsities": "[0.5]",
        "budget": "{ steps = 20, max_multiple = 1.2 }",
    }
    return write_suite(tmp_path, methods or "[methods.dense]", **common | fields)


def test_a_cell_is_the_same_with_one_decoder_and_with_two_and_after_a_stop(images, tmp_path):
    methods = "[methods.rigl]\nevery = 4"
    suite = suite_of(tmp_path, images, methods=methods)
    first = train_one(suite, tmp_path / "one", data=tmp_path, decoders=1)
    assert first.status in ("ok", "diverged")
    assert first.steps == 20
    assert first.weights_hash
    second = train_one(suite, tmp_path / "two", data=tmp_path, decoders=2)
    assert the_same(second) == the_same(first)

    # Left in the middle, as by a kill after a checkpoint.
    plan = plan_of(suite, tmp_path)
    store = Store(tmp_path / "three", "tiny")
    (task,) = tasks_of(plan, store, decoders=1, checkpoint_seconds=0)
    running = run_cell(task)
    while not task.checkpoint.exists():
        assert isinstance(next(running), Progress)
    running.close()
    *_, last = run_cell(task)
    assert isinstance(last, Finished)
    assert the_same(last.record) == the_same(first)


def test_a_folder_beside_the_suite_is_found_and_its_key_knows_no_path(images, tmp_path):
    wanted = plan_of(suite_of(tmp_path, images), tmp_path / "data").manifest.cells
    other = tmp_path / "other"
    shutil.copytree(images, other / "pictures")
    suite = suite_of(other, images, dataset='"imagefolder:pictures"')
    plan = plan_of(suite, tmp_path / "data")
    assert [cell.spec.key for cell in plan.manifest.cells] == [cell.spec.key for cell in wanted]
    assert plan.manifest.cells[0].spec.dataset == "imagefolder:pictures"
    assert plan.start == other


def test_imagenet_is_a_folder_beside_the_other_data_sets(images, tmp_path):
    wanted = plan_of(suite_of(tmp_path, images), tmp_path).manifest.cells
    images.rename(tmp_path / "imagenet")
    found = plan_of(suite_of(tmp_path, images, dataset='"imagenet"'), tmp_path).manifest.cells
    assert [cell.spec.key for cell in found] == [cell.spec.key for cell in wanted]


def test_a_file_that_is_damaged_in_the_meantime_fails_the_cell_by_name(images, tmp_path):
    suite = suite_of(tmp_path, images)
    plan = plan_of(suite, tmp_path)
    for path in images.glob("val/digit-0/*.jpg"):
        path.write_bytes(path.read_bytes()[:-150])
    store = Store(tmp_path / "records", "tiny")
    (task,) = tasks_of(plan, store)
    *_, last = run_cell(task)
    assert isinstance(last, Finished)
    assert last.record.status == "failed"
    assert re.match(
        r".*val/digit-0/\d+\.jpg: cannot be decoded any more \(.*truncated.*\)",
        last.record.reason,
    )


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        (RECIPE.replace("image_size = 16", ""), "recipe own.toml: does not say image_size"),
        (f'{RECIPE}\nnormalise = "mean_image"', 'normalise = "mean_image" is for arrays of pixels'),
        (RECIPE.replace("crop = 1", "crop = 16"), "crop = 16 is too much for images of 16x16"),
        (f'{RECIPE}\nauto_augment = "bogus"', "auto_augment = 'bogus': timm cannot make that"),
        (RECIPE.replace("validation = 8", "validation = 75"), "80 training images less 75"),
    ],
)
def test_recipes_that_do_not_fit_a_folder_are_refused(text, piece, images, tmp_path):
    with pytest.raises((SuiteError, DataError)) as caught:
        plan_of(suite_of(tmp_path, images, text), tmp_path)
    assert piece in str(caught.value)


def test_crops_by_area_are_refused_for_arrays(tmp_path):
    suite = write_suite(tmp_path, recipe=write_recipe(tmp_path, RECIPE))
    with pytest.raises(SuiteError, match="auto_augment are for folders of images; digits"):
        plan_of(suite, tmp_path)


def test_the_command_line_says_what_it_leaves_out_and_refuses_the_rest(images, tmp_path, call):
    (images / "train" / "notes.txt").write_text("text")
    suite = suite_of(tmp_path, images)
    planned = call("plan", suite, "--data", tmp_path)
    assert planned.status == 0
    assert planned.err.splitlines() == [
        f"sparsebench: {images}: left out, not images by their names: train/notes.txt."
    ]
    (images / "train" / "digit-0" / "text.jpg").write_text("no image")
    folders_changed = call(
        "run", suite_of(tmp_path, images, name="again"), "--data", tmp_path / "b"
    )
    assert folders_changed.status == 2
    (line,) = folders_changed.err.splitlines()
    assert "1 of 121 images cannot be decoded: train/digit-0/text.jpg (not an image)" in line
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("dataset", "model"),
    [("digits", "lenet5"), ("digits", "vgg11"), ("folder", "timm:vit_tiny_patch16_224")],
)
def test_a_model_that_cannot_take_the_images_is_refused_with_the_sizes(
    dataset, model, images, tmp_path, call
):
    models = f'["{model}"]'
    suite = (
        suite_of(
            tmp_path, images, RECIPE.replace("image_size = 16", "image_size = 12"), models=models
        )
        if dataset == "folder"
        else write_suite(tmp_path, models=models)
    )
    refused = call("plan", suite, "--data", tmp_path)
    assert refused.status == 2
    (line,) = refused.err.splitlines()
    assert ("1x8x8" if dataset == "digits" else "3x12x12") in line


@pytest.mark.parametrize(("asked", "workers", "found"), [(3, 2, 3), (0, 2, 2), (0, 1, 5)])
def test_how_many_decoders_a_cell_gets(asked, workers, found, images, tmp_path, monkeypatch):
    tasks: list[Task] = []
    monkeypatch.setattr(launch, "cores", lambda: 5)
    monkeypatch.setattr(
        launch, "perform", lambda queue, _: tasks.extend(queue.tasks) or (_ for _ in ())
    )
    plan = plan_of(suite_of(tmp_path, images, seeds="[0, 1]"), tmp_path)
    settings = launch.Settings("cpu", workers=workers, decoders=asked)
    store = Store(tmp_path / "records", "tiny")
    launch.train(plan, store, list(plan.manifest.cells), settings)
    assert [task.decoders for task in tasks] == [found, found]
    assert {task.start for task in tasks} == {tmp_path}


def test_workers_may_have_decoders(images, tmp_path, monkeypatch):
    # Two cells side by side, each in a process with another of its own that decodes.
    context = forking()
    monkeypatch.setattr(executors.processes, "context", lambda: context)
    suite = suite_of(tmp_path, images, seeds="[0, 1]")
    records = train(suite, tmp_path / "records", workers=2, data=tmp_path)
    assert [record.steps for record in records] == [20, 20], records


def test_grey_pictures_of_many_bits_are_scaled_or_refused(tmp_path):
    # A 16-bit PGM opens as 32-bit integers.
    path = tmp_path / "deep.pgm"
    path.write_bytes(b"P5 2 1 65535\n" + bytes([0x00, 0x00, 0x80, 0xFF]))
    with Image.open(path) as opened:
        assert opened.mode.startswith("I")
    assert np.asarray(folders.decode(str(path)))[..., 0].tolist() == [[0, 128]]
    for mode, word in (("I", "more than 16 bits"), ("F", "fractions")):
        Image.fromarray(np.full((2, 2), 70000, np.int32)).convert(mode).save(tmp_path / "x.tiff")
        assert word in folders.inspect(tmp_path / "x.tiff")[1]


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    assert folders.inspect(tmp_path / "x.jpg") == ("", "not a regular file")


def test_a_link_that_leads_back_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
    (tmp_path / "set" / "a" / "again").symlink_to(tmp_path / "set", target_is_directory=True)
    with pytest.raises(DataError, match=r"again: leads back to .*set, in which it lies"):
        read(tmp_path / "set")


def test_a_folder_without_images_is_no_class_and_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for shade in range(4):
            Image.new("L", (4, 4), 60 * shade).save(tmp_path / "set" / name / f"{shade}.png")
    (tmp_path / "set" / "void").mkdir()
    found = read(tmp_path / "set")
    assert found.info.classes == 2
    assert any("no classes, for want of images: void" in note for note in found.notes)


def test_copies_of_a_picture_are_all_tested_on_or_none(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for shade in range(10):  # five pictures, twice each: a fifth is one
            image = Image.new("L", (4, 4), 40 * (shade % 5) + (name == "b"))
            image.save(tmp_path / "set" / name / f"{shade}.png")
    found = read(tmp_path / "set")
    contents = [
        {Path(path).read_bytes() for path in part} for part in (found.x_train, found.x_test)
    ]
    assert not contents[0] & contents[1]
    assert (len(found.x_train), len(found.x_test)) == (16, 4)


def test_a_class_of_one_picture_and_its_copies_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for copy in range(3):
            Image.new("L", (4, 4), 90).save(tmp_path / "set" / name / f"{copy}.png")
    with pytest.raises(DataError, match="2 classes have a single image: a, b"):
        read(tmp_path / "set")
