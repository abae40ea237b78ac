"""Batches on the device: order, crops, flips, normalisation, and the validation split."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import datasets
from bench.crops import MIRRORED_BYTES, resident_crops, rotated
from bench.data import BatchStream, Data, to_device
from bench.datasets import Arrays, DatasetInfo
from bench.errors import DataError
from bench.recipes import Recipe

INFO = DatasetInfo((2, 6, 5), 3, (0.25, 0.5), (0.5, 0.25), "", "")
CPU = torch.device("cpu")


def recipe(**fields: object) -> Recipe:
    return Recipe(**{"title": "", "batch": 4, "lr": 0.1} | fields)  # type: ignore[arg-type]


def arrays(count: int = 22, digest: str = "0123456789ab") -> Arrays:
    """Random images; the first pixel is the image's number, so that it can be found again."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, size=(count, 6, 5, 2), dtype=np.uint8)
    x[:, 0, 0, 0] = np.arange(count)
    y = (np.arange(count) % 3).astype(np.int64)
    return Arrays(INFO, x, y, x[:3], y[:3], digest)


def data(used: Recipe | None = None, **changes: object) -> Data:
    return to_device(arrays(**changes), used or recipe(), CPU)  # type: ignore[arg-type]


def stream(seed: int = 0, name: str = "order", **fields: object) -> BatchStream:
    return BatchStream(data(), recipe(**fields), seed, name)


def numbers(images: torch.Tensor) -> list[int]:
    """Numbers of the images in a batch, from their first pixel."""
    first = images[:, 0, 0, 0] * (255 * INFO.std[0]) + 255 * INFO.mean[0]
    return first.round().int().tolist()


def epoch(of: BatchStream, number: int) -> list[int]:
    steps = range(number * of.steps_per_epoch, (number + 1) * of.steps_per_epoch)
    return [one for step in steps for one in numbers(of.batch(step)[0])]


def test_an_epoch_shows_each_image_at_most_once_and_fills_every_batch():
    order = epoch(stream(), 0)
    assert len(order) == 20  # 5 batches of 4; 2 of the 22 images are left out
    assert len(set(order)) == 20
    assert order != sorted(order)


def test_an_epoch_that_batches_fill_shows_each_image_once():
    used = recipe(batch=11)
    assert sorted(epoch(BatchStream(data(), used, 0, "order"), 0)) == list(range(22))


def test_what_an_epoch_leaves_out_changes_from_epoch_to_epoch():
    one = stream()
    left = {frozenset(range(22)) - frozenset(epoch(one, number)) for number in range(6)}
    assert len(left) > 1


def test_every_epoch_has_another_order():
    one = stream()
    assert len({tuple(epoch(one, number)) for number in range(5)}) == 5


def test_labels_belong_to_their_images():
    images, labels = stream().batch(3)
    assert labels.tolist() == [number % 3 for number in numbers(images)]


def test_the_same_seed_gives_the_same_batches():
    one, two = stream(5, crop=1, flip=True), stream(5, crop=1, flip=True)
    for position in range(12):
        assert torch.equal(one.batch(position)[0], two.batch(position)[0])
        assert torch.equal(one.batch(position)[1], two.batch(position)[1])


def test_another_seed_or_stream_gives_other_batches():
    orders = [epoch(stream(0), 0), epoch(stream(1), 0), epoch(stream(0, "method"), 0)]
    assert len(set(map(tuple, orders))) == 3


def test_a_stream_does_not_see_what_others_draw():
    wanted = epoch(stream(crop=1), 1)
    one, other = stream(crop=1), stream(name="method", crop=1)
    found = []
    for position in range(5, 10):
        torch.rand(7)  # the global stream does not matter either
        other.batch(3 * position)
        found += numbers(one.batch(position)[0])
    assert found == wanted
    torch.manual_seed(123)
    assert epoch(stream(crop=1), 1) == wanted


def test_drawing_batches_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    stream(crop=1, flip=True).batch(17)
    assert torch.equal(torch.rand(3), wanted)


def test_any_position_can_be_had_without_those_before_it():
    one = stream(crop=1, flip=True)
    in_order = [one.batch(position)[0] for position in range(15)]
    for position in (14, 0, 7, 6):
        assert torch.equal(stream(crop=1, flip=True).batch(position)[0], in_order[position])
        assert torch.equal(one.batch(position)[0], in_order[position])


def naive(pixels: np.ndarray, margin: int, padding: str, row: int, column: int) -> np.ndarray:
    """A crop of one image (H, W, C), written out."""
    width = ((margin, margin), (margin, margin), (0, 0))
    mode = "constant" if padding == "zero" else "reflect"
    padded = np.pad(pixels, width, mode=mode)
    height, length, _ = pixels.shape
    return padded[row : row + height, column : column + length]


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("padding", ["zero", "reflect"])
@pytest.mark.parametrize("margin", [0, 1, 3])
def test_every_crop_equals_a_naive_loop(margin, padding, copies):
    pixels = arrays(5).x_train
    crops = resident_crops(torch.from_numpy(pixels), margin, padding, flip=copies)
    assert crops.mirrored == copies
    sides = torch.arange(2 * margin + 1)
    drawn = torch.cartesian_prod(torch.arange(5), sides, sides, torch.arange(2))
    image, row, column, mirrored = drawn.unbind(1)
    found = crops.read(crops.starts(image, row, column, mirrored == 1))
    assert found.shape == (len(image), 6, 5, 2)
    for at in range(len(image)):
        wanted = naive(pixels[image[at]], margin, padding, int(row[at]), int(column[at]))
        if copies and mirrored[at]:
            wanted = wanted[:, ::-1]
        assert np.array_equal(found[at].numpy(), wanted)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("margin", "padding"), [(0, "zero"), (2, "zero"), (2, "reflect")])
def test_a_batch_equals_a_naive_loop(margin, flip, padding):
    one = stream(crop=margin, flip=flip, padding=padding)
    pixels = arrays().x_train
    for position in (0, 4, 8):
        found = one.batch(position)[0]
        for i in range(4):
            at = position % 5 * 4 + i
            wanted = pixels[int(one.order[at])]
            wanted = naive(wanted, margin, padding, int(one.rows[at]), int(one.columns[at]))
            if flip and one.mirrored[at]:
                wanted = wanted[:, ::-1]
            wanted = (wanted / 255 - INFO.mean) / INFO.std
            assert np.allclose(found[i].permute(1, 2, 0).numpy(), wanted, atol=1e-5)


def test_crops_and_flips_are_spread_evenly():
    one = BatchStream(data(count=200), recipe(crop=2, flip=True), 0, "order")
    one.batch(0)
    for offsets in (one.rows, one.columns):
        counts = torch.bincount(offsets, minlength=5)
        assert len(counts) == 5
        assert counts.min() > 20  # 40 expected
    assert 70 < int(one.mirrored.sum()) < 130
    assert not torch.equal(one.rows, one.columns)


def test_a_stream_without_augmentation_shows_whole_images():
    used = recipe(crop=2, flip=True)
    one = BatchStream(data(), used, 0, "order", augmented=False)
    images = one.batch(0)[0]
    plain = data().normalise(torch.from_numpy(arrays().x_train[one.order[:4].numpy()]))
    assert torch.equal(images, plain)


def test_augmentation_does_not_change_the_order():
    plain, cropped = stream(), stream(crop=2)
    assert torch.equal(plain.batch(7)[1], cropped.batch(7)[1])


def test_the_training_images_are_not_written():
    used = data()
    before = used.train.images.clone()
    one = BatchStream(used, recipe(crop=1, flip=True), 0, "order")
    for position in range(10):
        one.batch(position)[0].zero_()
    assert torch.equal(used.train.images, before)


def test_normalised_pixels_have_zero_mean_and_unit_variance():
    for name in ("digits", "synthetic"):
        used = to_device(datasets.load(name, Path("nowhere")), recipe(), CPU)
        images = used.normalise(used.train.images)
        assert images.dtype == torch.float32
        channels = images.permute(1, 0, 2, 3).flatten(1)
        assert channels.mean(1).abs().max() < 1e-3
        assert (channels.std(1) - 1).abs().max() < 1e-3


def test_normalisation_by_hand():
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 6, 5, 2)
    # (0 - 0.25) / 0.5 and (1 - 0.5) / 0.25
    assert data().normalise(images).unique(dim=2).squeeze().tolist() == [[-0.5] * 5, [2.0] * 5]


def test_batches_are_channels_last():
    images, _ = stream(crop=1, flip=True).batch(0)
    assert images.shape == (4, 2, 6, 5)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_the_validation_split_is_fixed_by_the_data():
    used = recipe(validation=6)
    one, two = data(used), data(used)
    assert len(one.train) == 16
    assert torch.equal(one.validation.images, two.validation.images)
    other = data(used, digest="ffffffffffff")
    assert not torch.equal(one.validation.images, other.validation.images)


def test_the_validation_split_is_not_the_end_of_the_file():
    held = data(recipe(validation=6)).validation.images[:, 0, 0, 0].tolist()
    assert held == sorted(held) != list(range(16, 22))


def test_training_and_validation_images_are_disjoint_and_complete():
    used = data(recipe(validation=6))
    parts = [split.images[:, 0, 0, 0].tolist() for split in (used.train, used.validation)]
    assert sorted(parts[0] + parts[1]) == list(range(22))
    for split, ids in zip((used.train, used.validation), parts, strict=True):
        assert split.labels.tolist() == [number % 3 for number in ids]


def test_held_images_are_never_trained_on():
    used = recipe(validation=6)
    split = data(used)
    held = set(split.validation.images[:, 0, 0, 0].tolist())
    one = BatchStream(split, used, 0, "order")
    assert not held & {n for number in range(4) for n in epoch(one, number)}


def test_without_a_split_every_image_is_trained_on():
    used = data()
    assert (len(used.train), len(used.validation), len(used.test)) == (22, 0, 3)


def test_too_few_images_for_one_batch_are_refused():
    used = recipe(batch=4, validation=19)
    with pytest.raises(
        DataError, match="22 training images less 19 for validation do not fill one"
    ):
        data(used)
    assert len(data(dataclasses.replace(used, validation=18)).train) == 4


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({}, "cce1a61353b7fcf5"),
        ({"crop": 1}, "b10da39848d815ba"),
        ({"flip": True}, "826e6f8c3c1150d9"),
        ({"crop": 2, "flip": True, "padding": "reflect", "validation": 6}, "2e65d6e21d7c8569"),
    ],
)
@pytest.mark.parametrize("most", [MIRRORED_BYTES, 0], ids=["mirrored copies", "no copies"])
def test_batches_are_those_of_the_first_release(fields, known, most, monkeypatch):
    # Committed records were trained on them.
    monkeypatch.setattr("bench.crops.MIRRORED_BYTES", most)
    used = recipe(**fields)
    one = BatchStream(data(used), used, 3, "order")
    digest = hashlib.blake2b(digest_size=8)
    for position in (0, 4, 5, 11):
        for tensor in one.batch(position):
            digest.update(tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest() == known


def test_without_normalisation_pixels_are_scaled_to_one():
    used = data(recipe(normalise=False))
    images = used.normalise(used.test.images)
    assert torch.equal(images.permute(0, 2, 3, 1), used.test.images / 255)


def test_images_of_length_one_are_what_keras_makes_of_flat_ones():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 2), dtype=np.uint8)
    pixels[3] = 0
    flat = pixels.reshape(4, -1).astype(np.float64)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    wanted = (flat / np.where(length == 0, 1, length)).reshape(pixels.shape)
    images = data(recipe(normalise="unit")).normalise(torch.from_numpy(pixels))
    assert images.dtype == torch.float32
    assert np.abs(images.permute(0, 2, 3, 1).numpy() - wanted).max() < 1e-6
    assert not images[3].any()


def test_the_mean_image_is_that_of_the_images_to_train_on():
    used = data(recipe(normalise="mean_image", validation=5))
    train = used.train.images.numpy().astype(np.float64)
    assert len(train) == len(arrays().x_train) - 5
    for split in (used.train, used.validation, used.test):
        wanted = (split.images.numpy() - train.mean(0)) / 255
        found = used.normalise(split.images).permute(0, 2, 3, 1).numpy()
        assert np.abs(found - wanted).max() < 1e-6
    assert np.abs(used.normalise(used.train.images).mean(0).numpy()).max() < 1e-6


def test_a_quarter_turn_is_that_of_numpy():
    square = torch.from_numpy(arrays(3).x_train[:, :5])
    turned = rotated(square, torch.tensor([90.0, -90.0, 0.0]))
    wanted = [np.rot90(square[i].numpy(), turns) for i, turns in ((0, 1), (1, -1), (2, 0))]
    assert torch.allclose(turned, torch.from_numpy(np.stack(wanted)).float(), atol=1e-3)


def test_half_a_turn_of_an_image_that_is_no_square():
    images = torch.from_numpy(arrays(1).x_train)
    turned = rotated(images, torch.tensor([180.0]))
    assert torch.allclose(turned, images.flip(1, 2).float(), atol=1e-3)


def test_a_turn_keeps_distances_in_images_that_are_no_squares():
    # One bright pixel 4 to the right of the centre ends 4 above it.
    images = torch.zeros(1, 11, 21, 1, dtype=torch.uint8)
    images[0, 5, 14] = 200
    turned = rotated(images, torch.tensor([90.0]))[0, :, :, 0]
    assert turned[1, 10] == pytest.approx(200, abs=0.1)
    assert turned.sum() == pytest.approx(200, abs=0.5)


def test_what_lies_outside_a_turned_image_is_as_at_its_border():
    images = torch.full((1, 8, 8, 1), 77, dtype=torch.uint8)
    assert torch.allclose(rotated(images, torch.tensor([45.0])), torch.tensor(77.0))


def test_angles_are_spread_to_either_side_and_leave_the_rest_of_the_stream():
    used = data(count=200)
    one = BatchStream(used, recipe(rotate=10.0, flip=True, crop=1), 0, "order")
    plain = BatchStream(used, recipe(flip=True, crop=1), 0, "order")
    one.batch(0)
    plain.batch(0)
    assert torch.equal(one.order, plain.order)
    assert torch.equal(one.rows, plain.rows)
    assert torch.equal(one.mirrored, plain.mirrored)
    assert -10 <= one.angles.min() < -8
    assert 8 < one.angles.max() <= 10
    whole = BatchStream(used, recipe(rotate=10.0), 0, "order", augmented=False)
    assert whole.rotate == 0


def test_a_turned_batch_is_its_images_turned():
    turning = stream(rotate=30.0)
    found, _ = turning.batch(6)
    part = slice(4, 8)
    pixels = torch.from_numpy(arrays().x_train)[turning.order[part]]
    assert torch.equal(found, data().normalise(rotated(pixels, turning.angles[part])))
