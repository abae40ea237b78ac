"""Every built-in recipe of a paper: what the paper or its code says, written out once more by hand.

Rates are given at iterations of the paper's own run on its own data, before any rounding to
fractions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from bench import recipes
from bench.listing import Table, listing
from bench.recipes import Recipe
from bench.resolve import make_budget
from bench.spec import BudgetSpec

OURS = {"digits", "mnist-sgd"}
"""Of no paper: short runs for trying things out."""

MNIST, CIFAR, IMAGENET = 60_000, 50_000, 1_281_167

Rate = Callable[[int], float]
"""Learning rate of the step after so many."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        images: in the training set, those held out among them.
        steps: length of the paper's run.
        rate: by iteration.
        changes: iterations at which the rate jumps.
        optimizer: `adam`, or `sgd` or `nesterov` and the momentum.
        decay: of weights.
        images_as: borders that crops take and how far they reach, and `flip`.
        held: images held out.
        more: fields that differ from their defaults besides.
    """

    images: int
    steps: int
    batch: int
    rate: Rate
    changes: tuple[int, ...]
    optimizer: str
    decay: float
    images_as: str = ""
    held: int = 0
    more: tuple[tuple[str, object], ...] = ()


def constant(lr: float) -> Rate:
    return lambda step: lr


def pieces(*parts: tuple[int, float]) -> Rate:
    """Rates that hold from an iteration on."""
    return lambda step: [rate for start, rate in parts if step >= start][-1]


GLOROT = (("initialisation", "glorot_normal"),)
HE = (("initialisation", "he_fan_out"),)
LECUN = (("initialisation", "lecun_normal"),)
SMALL = (("initialisation", "normal"),)
LINEAR = (("initialisation", "normal_linear"),)
UNIT = (("normalise", False),)
LENGTH = (("normalise", "unit"),)
CENTRED = (("normalise", "mean_image"),)
FOLDER = (("image_size", 224), ("area", (0.08, 1.0)), ("flip", True))
ZERO, REFLECT = "zero 4 flip", "reflect 4 flip"


def lth_lenet(lr: float, optimizer: str, images: tuple[tuple[str, object], ...] = LENGTH) -> Row:
    more = (*GLOROT, *images)
    return Row(MNIST, 50_000, 60, constant(lr), (), optimizer, 0, held=5000, more=more)


def lth_conv(steps: int, lr: float) -> Row:
    return Row(CIFAR, steps, 60, constant(lr), (), "adam", 0, held=5000, more=GLOROT)


def lth_deep(steps: int, batch: int, rate: Rate, *changes: int) -> Row:
    return Row(CIFAR, steps, batch, rate, changes, "sgd 0.9", 1e-4, ZERO, 5000, GLOROT)


def resnet18_warmup(step: int) -> float:
    if step < 20_000:
        return 0.03 * step / 20_000
    return 0.003 if step < 25_000 else 0.0003


def vgg19_warmup(step: int) -> float:
    if step < 10_000:
        return 0.1 * step / 10_000
    return pieces((0, 0.1), (56_240, 0.01), (84_360, 0.001))(step)


def dpf_imagenet(step: int) -> float:
    epoch = step / 1251
    if epoch < 5:
        return 0.1 + 0.3 * epoch / 5
    return 0.4 * 0.1 ** sum(epoch >= drop for drop in (30, 60, 80))


def rigl_imagenet(step: int) -> float:
    epoch = step * 4096 / IMAGENET
    if epoch < 5:
        return 1.6 * epoch / 5
    return 1.6 * 0.1 ** sum(epoch >= drop for drop in (30, 70, 90))


def cosine_with_warmup(step: int) -> float:
    """To 1e-3; the paper's code steps by epochs."""
    fraction = step / 500_400
    return 0.128 * (1 + math.cos(math.pi * fraction)) * min(1, fraction / 0.05)


def vd_half(lr: float, per_epoch: int) -> Rate:
    return lambda step: lr * min(1.0, 2 - step / per_epoch / 100)


def wrn(steps_per_epoch: int, lr: float = 0.1) -> tuple[Rate, tuple[int, ...]]:
    """A fifth at epochs 60, 120 and 160."""
    drops = tuple(epoch * steps_per_epoch for epoch in (60, 120, 160))
    return pieces((0, lr), *zip(drops, (lr / 5, lr / 25, lr / 125), strict=True)), drops


def tenths(lr: float, *drops: int) -> tuple[Rate, tuple[int, ...]]:
    return pieces((0, lr), *((at, lr * 0.1**n) for n, at in enumerate(drops, 1))), drops


NEST, SGD = "nesterov 0.9", "sgd 0.9"
TABLE = {
    "dpf-resnet": Row(CIFAR, 117_000, 128, *tenths(0.2, 150 * 390, 225 * 390), NEST, 1e-4, ZERO),
    "dpf-wrn": Row(CIFAR, 78_000, 128, *wrn(390), NEST, 5e-4, ZERO),
    "dpf-imagenet": Row(
        IMAGENET,
        90 * 1251,
        1024,
        dpf_imagenet,
        (30 * 1251, 60 * 1251, 80 * 1251),
        NEST,
        1e-4,
        more=FOLDER,
    ),
    "lth-lenet": lth_lenet(1.2e-3, "adam"),
    "lth-lenet-pixels": lth_lenet(1.2e-3, "adam", UNIT),
    "lth-lenet-sgd": lth_lenet(0.8, "sgd"),
    "lth-conv2": lth_conv(20_000, 2e-4),
    "lth-conv4": lth_conv(25_000, 3e-4),
    "lth-conv6": lth_conv(30_000, 3e-4),
    "lth-conv2-dropout": lth_conv(60_000, 3e-4),
    "lth-conv4-dropout": lth_conv(75_000, 2e-4),
    "lth-conv6-dropout": lth_conv(90_000, 2e-4),
    "lth-resnet18": lth_deep(
        30_000, 128, pieces((0, 0.1), (20_000, 0.01), (25_000, 0.001)), 20_000, 25_000
    ),
    "lth-resnet18-low": lth_deep(
        30_000, 128, pieces((0, 0.01), (20_000, 1e-3), (25_000, 1e-4)), 20_000, 25_000
    ),
    "lth-resnet18-warmup": lth_deep(30_000, 128, resnet18_warmup, 20_000, 25_000),
    "lth-vgg19": lth_deep(
        112_480, 64, pieces((0, 0.1), (80 * 703, 0.01), (120 * 703, 0.001)), 56_240, 84_360
    ),
    "lth-vgg19-low": lth_deep(
        112_480, 64, pieces((0, 0.01), (80 * 703, 1e-3), (120 * 703, 1e-4)), 56_240, 84_360
    ),
    "lth-vgg19-warmup": lth_deep(112_480, 64, vgg19_warmup, 56_240, 84_360),
    "open-lth": Row(CIFAR, 160 * 390, 128, *tenths(0.1, 80 * 390, 120 * 390), SGD, 1e-4, ZERO),
    "sm-mnist": Row(MNIST, 54_000, 100, *tenths(0.1, 25_000, 50_000), NEST, 5e-4, held=6000),
    "sm-cifar": Row(
        CIFAR, 87_750, 128, *tenths(0.1, 30_000, 60_000), NEST, 5e-4, REFLECT, held=5000
    ),
    "dsr-wrn": Row(CIFAR, 100_000, 100, *wrn(500), NEST, 5e-4, REFLECT),
    "dsr-wrn-static": Row(
        CIFAR,
        200_000,
        100,
        pieces((0, 0.1), (120 * 500, 0.02), (220 * 500, 0.004), (350 * 500, 0.0008)),
        (60_000, 110_000, 175_000),
        NEST,
        5e-4,
        REFLECT,
    ),
    "dsr-wrn-prune": Row(
        CIFAR,
        25_000,
        100,
        pieces((0, 0), (500, 0.02), (25 * 500, 0.004), (35 * 500, 0.0008)),
        (500, 12_500, 17_500),
        NEST,
        1e-4,
        REFLECT,
    ),
    # The steps of decay are those of its wide ResNet: the code has none for MNIST.
    "dsr-mnist": Row(
        MNIST,
        60_000,
        100,
        pieces((0, 0.1), (18_000, 0.02), (36_000, 0.004), (48_000, 0.0008)),
        (18_000, 36_000, 48_000),
        NEST,
        1e-4,
    ),
    "dsr-imagenet": Row(
        IMAGENET,
        500_400,
        256,
        *tenths(0.1, 30 * 5004, 60 * 5004, 90 * 5004),
        NEST,
        1e-4,
        more=FOLDER,
    ),
    "snip-mnist": Row(
        MNIST,
        135_000,
        100,
        *tenths(0.1, 25_000, 50_000, 75_000, 100_000, 125_000),
        SGD,
        5e-4,
        held=6000,
        more=LECUN,
    ),
    "snip-cifar": Row(
        CIFAR,
        87_750,
        128,
        *tenths(0.1, 30_000, 60_000),
        SGD,
        5e-4,
        ZERO,
        held=5000,
        more=LECUN,
    ),
    "snip-vgg": Row(
        CIFAR,
        150_000,
        128,
        pieces((0, 0.1), (30_000, 0.02), (60_000, 0.004), (90_000, 0.0008), (120_000, 0.00016)),
        (30_000, 60_000, 90_000, 120_000),
        SGD,
        5e-4,
        ZERO,
        held=5000,
        more=LECUN,
    ),
    "grasp-vgg19": Row(
        CIFAR, 160 * 390, 128, *tenths(0.1, 80 * 390, 120 * 390), SGD, 5e-4, ZERO, more=HE
    ),
    "grasp-resnet32": Row(
        CIFAR, 160 * 390, 128, *tenths(0.1, 80 * 390, 120 * 390), SGD, 1e-4, ZERO, more=HE
    ),
    "rigl-wrn": Row(
        CIFAR,
        97_656,
        128,
        pieces((0, 0.1), (30_000, 0.02), (60_000, 0.004), (90_000, 0.0008)),
        (30_000, 60_000, 90_000),
        NEST,
        5e-4,
        REFLECT,
    ),
    "rigl-imagenet": Row(
        IMAGENET,
        32_000,
        4096,
        rigl_imagenet,
        (9384, 21_895, 28_151),  # the first steps past epochs 30, 70 and 90
        NEST,
        1e-4,
        more=(*FOLDER, ("label_smoothing", 0.1)),
    ),
    "l0-mlp": Row(MNIST, 120_000, 100, constant(1e-3), (), "adam", 5e-4, more=(*UNIT, *HE)),
    "l0-lenet5": Row(MNIST, 120_000, 100, constant(1e-3), (), "adam", 5e-4, more=UNIT),
    "l0-wrn": Row(CIFAR, 78_000, 128, *wrn(390), NEST, 5e-4, ZERO),
    "vd-lenet": Row(
        MNIST,
        120_000,
        100,
        lambda k: 1e-3 * (1 - k / 120_000),
        (),
        "adam",
        0,
        more=(*CENTRED, *LINEAR),
    ),
    "vd-lenet-300": Row(
        MNIST, 120_000, 100, vd_half(1e-3, 600), (), "adam", 0, more=(*CENTRED, *SMALL)
    ),
    "vd-vgg": Row(CIFAR, 100_000, 100, vd_half(1e-5, 500), (), "adam", 0),
    "sfp-resnet": Row(
        CIFAR,
        78_000,
        128,
        pieces((0, 0.01), (390, 0.1), (60 * 390, 0.02), (120 * 390, 0.004), (160 * 390, 0.0008)),
        (390, 23_400, 46_800, 62_400),
        NEST,
        5e-4,
        ZERO,
        more=HE,
    ),
    "set-mlp": Row(
        CIFAR, 500_000, 100, constant(0.01), (), SGD, 0, "zero 3 flip", more=(("rotate", 10.0),)
    ),
    "deepr-lenet": Row(
        MNIST,
        55_000,
        10,
        lambda step: 0.5 * 0.8 ** (step // 5500),
        tuple(range(5500, 55_000, 5500)),
        "sgd",
        0,
        held=5000,
        more=UNIT,
    ),
    "soft-deepr-lenet": Row(MNIST, 55_000, 10, constant(0.05), (), "sgd", 0, held=5000, more=UNIT),
    "synflow-vgg": Row(CIFAR, 160 * 390, 128, *tenths(0.1, 60 * 390, 120 * 390), NEST, 1e-4, ZERO),
    "synflow-resnet18": Row(
        CIFAR, 160 * 390, 128, *tenths(0.01, 60 * 390, 120 * 390), NEST, 5e-4, ZERO
    ),
    "ac-dc-resnet20": Row(
        CIFAR, 78_000, 128, *tenths(0.1, 65 * 390, 125 * 390, 185 * 390), SGD, 5e-4, ZERO
    ),
    "str-imagenet": Row(
        IMAGENET,
        500_400,
        256,
        cosine_with_warmup,
        (),
        "sgd 0.875",
        2.251757813e-5,
        more=(*FOLDER, ("label_smoothing", 0.1)),
    ),
}


def length(recipe: Recipe, row: Row, part: int = 1) -> int:
    """Steps of a run of the recipe's own length, or of a part of it, on the paper's data."""
    spec = recipe.length
    assert spec is not None
    if part > 1:
        epochs, steps = spec.epochs, spec.steps
        spec = BudgetSpec(epochs and epochs / part, steps and steps // part)
    return make_budget(spec, recipe, row.images - row.held).steps


def test_every_recipe_has_its_row():
    assert TABLE.keys() | OURS == set(recipes.names())


def test_every_paper_of_the_table_of_budgets_has_a_recipe():
    papers = {"dpf", "lth", "open-lth", "sm", "dsr", "snip", "grasp", "rigl", "l0", "vd", "sfp"}
    papers |= {"set", "deepr", "synflow", "ac-dc", "str"}
    assert not [paper for paper in papers if not any(n.startswith(paper) for n in TABLE)]


@pytest.mark.parametrize(("name", "row"), TABLE.items(), ids=TABLE)
def test_the_run_is_as_long_as_the_papers(name, row):
    assert length(recipes.load(name, ""), row) == row.steps


@pytest.mark.parametrize(("name", "row"), TABLE.items(), ids=TABLE)
def test_the_rate_is_the_papers_at_its_iterations(name, row):
    recipe = recipes.load(name, "")
    near = {at + by for at in row.changes for by in (-1, 0, 1)}
    evenly = {part * (row.steps - 1) // 97 for part in range(98)}
    for step in sorted(near | evenly):
        found = recipe.lr_at(step / row.steps)
        assert found == pytest.approx(row.rate(step), rel=1e-5, abs=1e-9), step


@pytest.mark.parametrize(("name", "row"), TABLE.items(), ids=TABLE)
def test_the_rate_jumps_there_and_nowhere_else(name, row):
    # The table's own: a row that forgot a change would be checked at fewer places.
    rates = [row.rate(step) for step in range(row.steps)]
    jumps = [
        step
        for step in range(50, row.steps - 50)  # a rate that is all but 0 doubles in a step
        if abs(rates[step] - rates[step - 1]) > 0.15 * max(rates[step], rates[step - 1])
        and step > 50
    ]
    assert tuple(jumps) == row.changes


@pytest.mark.parametrize(("name", "row"), TABLE.items(), ids=TABLE)
def test_a_tenth_of_the_length_scales_what_is_quoted_in_steps(name, row):
    recipe = recipes.load(name, "")
    short = length(recipe, row, part=10)
    assert abs(short - row.steps / 10) < 1
    for change in row.changes:
        first = -(-change * short // row.steps)  # the ceiling, in integers
        before, after = (recipe.lr_at(step / short) for step in (first - 1, first))
        if recipe.warmup <= change / row.steps - 1e-6:
            assert after == pytest.approx(before * row.rate(change) / row.rate(change - 1))
        else:
            assert after == pytest.approx(row.rate(change))
            assert after != pytest.approx(before, rel=0.1)


@pytest.mark.parametrize(("name", "row"), TABLE.items(), ids=TABLE)
def test_everything_else_is_the_papers_too(name, row):
    recipe = recipes.load(name, "")
    kind, _, momentum = row.optimizer.partition(" ")
    expected = {
        "batch": row.batch,
        "optimizer": "adam" if kind == "adam" else "sgd",
        "momentum": float(momentum or 0),
        "nesterov": kind == "nesterov",
        "weight_decay": row.decay,
        "validation": row.held,
    }
    if row.images_as:
        padding, crop, _ = row.images_as.split()
        expected |= {"padding": padding, "crop": int(crop), "flip": True}
    expected |= dict(row.more)
    length_and_rate = {"title", "epochs", "steps", "lr", "schedule", "drops", "factor"}
    length_and_rate |= {"warmup", "warmup_from", "warmup_shape"}
    for field in dataclasses.fields(Recipe):
        if field.name not in length_and_rate:
            found = getattr(recipe, field.name)
            assert found == expected.get(field.name, field.default), field.name


def test_titles_tell_recipes_apart_and_say_what_was_not_checked():
    titles = {name: recipes.load(name, "").title for name in TABLE}
    assert len(set(titles.values())) == len(titles)
    for name in ("sm-cifar", "rigl-imagenet", "synflow-resnet18"):
        assert "from memory" in titles[name]


def test_the_readme_lists_every_recipe_with_its_length_and_batch():
    lines = (recipes.FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in lines if row[:3] == "| `"]
    listed = {row["name"]: (row["length"], str(row["batch"])) for row in listing(Table.recipes)}
    assert {row[0].strip("`"): (row[3], row[4]) for row in cells} == listed
