"""Batches as a CUDA graph has them: read from memory that stays, by operations that never wait."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from bench.crops import resident_crops
from bench.data import BatchStream, Data, to_device
from bench.datasets import Arrays, DatasetInfo
from bench.errors import DataError
from bench.recipes import Recipe
from tests.hot import NoWaiting, recorded

INFO = DatasetInfo((3, 7, 6), 4, (0.5, 0.25, 0.3), (0.25, 0.5, 0.2), "", "")
CPU = torch.device("cpu")

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "flip": {"flip": True},
    "crop": {"crop": 2},
    "crop and flip": {"crop": 2, "flip": True},
    "crop at mirrored borders": {"crop": 3, "flip": True, "padding": "reflect"},
    "turn": {"crop": 1, "flip": True, "rotate": 20.0},
}


def recipe(**fields: Any) -> Recipe:
    return Recipe(**{"title": "", "batch": 4, "lr": 0.1} | fields)


def arrays(count: int = 30) -> Arrays:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, 7, 6, 3), dtype=np.uint8)
    y = rng.integers(0, 4, count)
    return Arrays(INFO, x, y, x[:5], y[:5], "0123456789ab")


def stream(used: Recipe, data: Data | None = None, name: str = "order") -> BatchStream:
    return BatchStream(data or to_device(arrays(), used, CPU), used, 5, name)


@pytest.fixture(params=AUGMENTATIONS)
def used(request: Any) -> Recipe:
    """Every kind of augmentation."""
    return recipe(**AUGMENTATIONS[request.param])


@pytest.fixture(params=[True, False], ids=["copies", "no copies"])
def copies(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether mirrored copies are small enough."""
    if not request.param:
        monkeypatch.setattr("bench.crops.MIRRORED_BYTES", 0)
    chosen: bool = request.param
    return chosen


@pytest.mark.usefixtures("copies")
def test_reading_a_batch_waits_for_nothing(used):
    one = stream(used)
    one.seek(9)
    with NoWaiting():
        images, labels = one.read()
    wanted = stream(used).batch(9)
    assert torch.equal(images, wanted[0])
    assert torch.equal(labels, wanted[1])


@pytest.mark.usefixtures("copies")
def test_what_was_recorded_at_one_position_replays_at_any_other(used):
    one = stream(used)
    one.seek(0)
    replay = recorded(one)
    assert one.steps_per_epoch == 7
    for position in (0, 3, 8, 20, 1, 6):
        one.seek(position)
        images, labels = stream(used).batch(position)
        found = replay()
        assert torch.equal(found[0], images)
        assert torch.equal(found[1], labels)


def test_mirrored_copies_change_nothing_but_memory(used, monkeypatch):
    with_copies = [stream(used).batch(position) for position in range(16)]
    assert stream(used).data.known
    monkeypatch.setattr("bench.crops.MIRRORED_BYTES", 0)
    without = stream(used, to_device(arrays(), used, CPU))
    assert not any(crops.mirrored for crops in without.data.known.values())
    for position in range(16):
        images, labels = without.batch(position)
        assert torch.equal(images, with_copies[position][0])
        assert torch.equal(labels, with_copies[position][1])


def test_batches_that_were_read_stay_when_others_are_read(used):
    one = stream(used)
    first = one.batch(2)
    kept = [tensor.clone() for tensor in first]
    one.seek(2)
    again = one.read()
    one.batch(13)
    for tensor, was, other in zip(first, kept, again, strict=True):
        assert torch.equal(tensor, was)
        assert torch.equal(other, was)
        assert tensor.data_ptr() != other.data_ptr()


def test_streams_of_one_kind_share_their_crops():
    used = recipe(crop=2, flip=True)
    data = to_device(arrays(), used, CPU)
    stream(used, data)
    (crops,) = data.known.values()
    stream(used, data.without_test(), "method")
    assert list(data.known.values()) == [crops]
    BatchStream(data, used, 0, "method", augmented=False)
    assert len(data.known) == 2


def test_a_stream_without_augmentation_sees_no_mirrored_copies_of_another():
    used = recipe(flip=True)
    data = to_device(arrays(), used, CPU)
    stream(used, data).batch(0)
    plain = BatchStream(data, used, 0, "method", augmented=False)
    images, _ = plain.batch(0)
    assert plain.mirrored[:4].any()
    assert torch.equal(images, data.normalise(data.train.images[plain.order[:4]]))


def test_images_that_are_shown_as_they_are_are_not_copied():
    images = torch.from_numpy(arrays().x_train)
    crops = resident_crops(images, 0, "zero", flip=False)
    first = crops.read(torch.tensor([3]))
    images[3] += 1
    assert torch.equal(crops.read(torch.tensor([3])), first + 1)


def test_the_next_cell_finds_the_data_where_they_are():
    used, source = recipe(validation=4), arrays()
    one = to_device(source, used, CPU)
    assert to_device(source, used, CPU) is one
    assert to_device(source, dataclasses.replace(used, validation=5), CPU) is not one
    assert to_device(arrays(), used, CPU) is not one


@pytest.mark.parametrize("margin", [6, 9])
def test_borders_wider_than_the_image_cannot_be_reflected(margin):
    images = torch.from_numpy(arrays().x_train)
    with pytest.raises(
        DataError,
        match=f"^Images of 7x6 pixels have no reflected border of {margin}; allowed: crop = 5 at",
    ):
        resident_crops(images, margin, "reflect", flip=False)
    assert resident_crops(images, 5, "reflect", flip=False).shape == (7, 6, 3)
