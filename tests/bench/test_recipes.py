"""Recipes: contents and hash, the learning rate worked by hand, errors.

What each built-in recipe holds is tested in `test_recipes_of_papers`, what recipes borrow from timm
in `test_timm_training`.
"""

from __future__ import annotations

import math

import pytest

from bench import recipes
from bench.errors import SuiteError, UnknownName
from bench.recipes import Recipe
from bench.spec import BudgetSpec

PLAIN = 'title = "mine"\nbatch = 64\nlr = 0.1\n'


def recipe(**fields: object) -> Recipe:
    return Recipe(**{"title": "", "batch": 64, "lr": 0.1} | fields)  # type: ignore[arg-type]


def refusal(folder, text: str) -> str:
    (folder / "own.toml").write_text(text, encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        recipes.load("own.toml", "tiny.toml: recipe", folder)
    return str(caught.value)


@pytest.mark.parametrize("name", recipes.names())
def test_every_built_in_recipe_loads_and_has_a_title(name):
    loaded = recipes.load(name, "")
    assert loaded.title
    assert loaded.lr_at(0.999) <= loaded.lr


def test_there_are_the_recipes_that_the_suites_need():
    assert {"digits", "mnist-sgd", "dpf-resnet"} <= set(recipes.names())


def test_the_hash_ignores_title_and_length_and_nothing_else():
    assert recipe(title="one").hash == recipe(title="two").hash
    assert recipe(epochs=3.0).hash == recipe(steps=7).hash == recipe().hash
    changes = {
        "batch": 65,
        "lr": 0.2,
        "optimizer": "adam",
        "momentum": 0.9,
        "betas": (0.8, 0.999),
        "weight_decay": 1e-4,
        "schedule": "cosine",
        "drops": (0.5,),
        "factor": 0.2,
        "warmup": 0.1,
        "crop": 1,
        "padding": "reflect",
        "flip": True,
        "validation": 9,
        "label_smoothing": 0.1,
        "rotate": 10.0,
        "normalise": False,
        "initialisation": "glorot_normal",
        "image_size": 224,
        "area": (0.08, 1.0),
        "crop_fraction": 0.9,
        "auto_augment": "rand-m9-mstd0.5",
        "warmup_from": 0.1,
        "warmup_shape": "constant",
        "precision": "bf16",
    }
    # What a field needs beside it, or it would do nothing.
    needs: dict[str, dict[str, object]] = {
        "nesterov": {"momentum": 0.9},
        "betas": {"optimizer": "adam"},
        "factor": {"drops": (0.5,)},
        "padding": {"crop": 1},
        "warmup_from": {"warmup": 0.1},
        "warmup_shape": {"warmup": 0.1},
    }
    changes["nesterov"] = True
    changed = {n: recipe(**needs.get(n, {}), **{n: value}).hash for n, value in changes.items()}
    timm: dict[str, object] = {"optimizer": "timm:lamb", "schedule": "timm:cosine"}
    for name in ("optimizer_options", "schedule_options"):
        changed[name] = recipe(**timm, **{name: (("k", 1),)}).hash
    changed["nothing"] = recipe().hash
    ignored = {"title", "epochs", "steps"}
    assert changed.keys() == set(Recipe.__slots__) - ignored | {"nothing"}
    assert len(set(changed.values())) == len(changed)


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adam", "momentum": 0.9},
        {"optimizer": "adamw", "momentum": 0.9},
        {"betas": (0.8, 0.999)},
        {"warmup_from": 0.1},
        {"warmup_shape": "constant"},
        {"factor": 0.2},
        {"schedule": "linear", "drops": (0.5,), "factor": 0.2},
        {"padding": "reflect"},
    ],
    ids=str,
)
def test_a_field_that_would_do_nothing_is_refused_by_name(fields):
    with pytest.raises(ValueError, match="|".join(fields)):
        recipe(**fields)


def test_fields_given_at_their_default_do_not_change_the_hash():
    assert recipe(momentum=0.0, drops=(), padding="zero").hash == recipe().hash


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("digits", "16494c226f95"),
        ("mnist-sgd", "2d9c71d38c29"),
        ("dpf-resnet", "fc73ac6b2afe"),
        ("sm-mnist", "ae0d52066370"),
        ("lth-lenet", "6b5786484e69"),
    ],
)
def test_a_known_recipe_keeps_its_hash(name, known):
    # It enters every cell's key: committed records could not be found again.
    assert recipes.load(name, "").hash == known


def test_the_length_is_that_of_the_source():
    assert recipe(epochs=3.0).length == BudgetSpec(epochs=3.0)
    assert recipe(steps=7).length == BudgetSpec(steps=7)
    assert recipe().length is None


def test_a_step_schedule_drops_at_its_fractions():
    decayed = recipe(lr=0.2, drops=(0.5, 0.75), factor=0.1)
    rates = [decayed.lr_at(fraction) for fraction in (0, 0.49, 0.5, 0.74, 0.75, 0.99)]
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002])


@pytest.mark.parametrize("steps", [10, 30, 44, 100, 6000, 117_300])
@pytest.mark.parametrize("tenths", [1, 3, 5, 7, 9])
def test_a_drop_falls_on_the_exact_step(steps, tenths):
    # The trainer asks at step / steps, and 0.3 is no binary fraction.
    decayed = recipe(lr=1.0, drops=(tenths / 10,))
    first = next(step for step in range(steps) if decayed.lr_at(step / steps) < 1)
    assert first == -(-tenths * steps // 10)  # the ceiling of the product, in integers


@pytest.mark.parametrize(
    ("low", "steps", "drop", "first"), [(0.1, 90, 0.3, 20), (0.1, 90, 0.9, 80), (0.3, 70, 0.4, 10)]
)
def test_a_drop_inside_a_window_of_a_phase_falls_on_the_exact_step(low, steps, drop, first):
    # A round that starts later in the schedule; 0.3 + 10 / 70 * 0.7 is 0.39999999999999997.
    decayed = recipe(lr=1.0, drops=(drop,))
    rates = [decayed.lr_at(low + step / steps * (1.0 - low)) for step in range(steps)]
    assert next(step for step, rate in enumerate(rates) if rate < 1) == first


def test_a_cosine_schedule_falls_to_zero():
    cosine = recipe(lr=0.4, schedule="cosine")
    assert cosine.lr_at(0) == pytest.approx(0.4)
    assert cosine.lr_at(0.25) == pytest.approx(0.4 * (1 + math.sqrt(0.5)) / 2)
    assert cosine.lr_at(0.5) == pytest.approx(0.2)
    assert cosine.lr_at(1) == pytest.approx(0)


def test_warm_up_rises_from_zero_and_multiplies_the_schedule():
    warm = recipe(lr=0.4, warmup=0.2, drops=(0.1, 0.5))
    assert warm.lr_at(0) == 0
    assert warm.lr_at(0.05) == pytest.approx(0.4 * 0.25)
    assert warm.lr_at(0.1) == pytest.approx(0.4 * 0.1 * 0.5)  # dropped once, half warm
    assert warm.lr_at(0.2) == pytest.approx(0.4 * 0.1)
    assert warm.lr_at(0.5) == pytest.approx(0.4 * 0.01)


def test_warm_up_multiplies_a_cosine():
    warm = recipe(lr=0.4, warmup=0.5, schedule="cosine")
    assert warm.lr_at(0.25) == pytest.approx(0.5 * 0.4 * (1 + math.sqrt(0.5)) / 2)


def test_warm_up_can_begin_at_a_part_of_the_rate():
    # Goyal et al. 2017: from 0.1 to 0.4.
    warm = recipe(lr=0.4, warmup=0.1, warmup_from=0.25)
    assert [warm.lr_at(x) for x in (0, 0.05, 0.1)] == pytest.approx([0.1, 0.25, 0.4])


@pytest.mark.parametrize("start", [0.0, 0.1])
def test_a_constant_warm_up_stays_and_then_jumps(start):
    warm = recipe(lr=0.1, warmup=0.02, warmup_from=start, warmup_shape="constant")
    rates = [warm.lr_at(step / 1000) for step in range(1000)]
    assert rates == pytest.approx([0.1 * start] * 20 + [0.1] * 980)


def test_a_linear_schedule_falls_to_zero_from_the_start_or_from_its_drop():
    whole, half = recipe(schedule="linear"), recipe(schedule="linear", drops=(0.5,))
    quarters = (0, 0.25, 0.5, 0.75, 1)
    assert [whole.lr_at(x) for x in quarters] == pytest.approx([0.1, 0.075, 0.05, 0.025, 0])
    assert [half.lr_at(x) for x in quarters] == pytest.approx([0.1, 0.1, 0.1, 0.05, 0])


def test_without_drops_the_rate_is_constant():
    assert {recipe().lr_at(fraction) for fraction in (0, 0.5, 1)} == {0.1}


@pytest.mark.parametrize(
    ("line", "piece"),
    [
        ("batch = 0", "batch = 0: must be at least 1"),
        ("lr = 0.0", "lr = 0.0: must be above 0 and finite"),
        ("lr = nan", "lr = nan: must be above 0 and finite"),
        ("lr = inf", "lr = inf: must be above 0 and finite"),
        ("momentum = 1.0", "momentum = 1.0: must lie in [0, 1)"),
        ("nesterov = true", "nesterov = true needs a momentum above 0"),
        ("betas = [2.0, 0.9]", "betas = [2.0, 0.9]: must lie in [0, 1)"),
        ("weight_decay = -1.0", "weight_decay = -1.0: must be at least 0"),
        ("drops = [0.7, 0.5]", "drops = [0.7, 0.5]: must ascend inside (0, 1)"),
        ("drops = [0.5, 1.0]", "drops = [0.5, 1.0]: must ascend inside (0, 1)"),
        ("drops = [0.5, 0.5]", "drops = [0.5, 0.5]: must ascend inside (0, 1)"),
        ("factor = 0.0", "factor = 0.0: must lie in (0, 1]"),
        ("warmup = 1.0", "warmup = 1.0: must lie in [0, 1)"),
        ("crop = -1", "crop = -1: must be at least 0"),
        ("validation = -1", "validation = -1: must be at least 0"),
        ('lr = "high"', "Expected `float`, got `str` - at `$.lr`"),
        ('padding = "zeros"', "Invalid enum value 'zeros' - at `$.padding`"),
        ('schedule = "stpe"', "no such schedule: 'stpe'. Did you mean 'step'? Known: cosine,"),
        ('optimizer = "sdg"', "no such optimizer: 'sdg'. Did you mean 'sgd'? Known: adam,"),
        ("optimizer = 3", "Expected `str`, got `int` - at `$.optimizer`"),
        ("epochs = 0", "epochs = 0.0: must be above 0 and finite"),
        ("steps = 0", "steps = 0: must be at least 1"),
        ("epochs = 3\nsteps = 3", "give epochs or steps, not both"),
        ('schedule = "cosine"\ndrops = [0.5]', "drops = [0.5]: schedule = 'cosine' has none"),
        ('schedule = "linear"\ndrops = [0.4, 0.5]', "schedule = 'linear' takes one at most"),
        ("warmup_from = 1.5", "warmup_from = 1.5: must lie in [0, 1]"),
        ("optimizer_options = { eps = 1.0 }", "optimizer_options are for a timm: optimizer"),
        ("schedule_options = { lr_min = 1.0 }", "schedule_options are for a timm: schedule"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(line, piece, tmp_path):
    name = line.split(" = ")[0]
    kept = [row for row in PLAIN.splitlines() if not row.startswith(f"{name} ")]
    message = refusal(tmp_path, "\n".join([*kept, line]))
    assert "own.toml: " in message
    assert piece in message
    assert "\n" not in message


def test_an_unknown_field_is_named_with_the_nearest(tmp_path):
    message = refusal(tmp_path, PLAIN + "momentun = 0.9")
    assert "own.toml: no such field of a recipe: 'momentun'. Did you mean 'momentum'?" in message


def test_a_missing_field_is_named(tmp_path):
    assert "missing required field `lr`" in refusal(tmp_path, 'title = "x"\nbatch = 1')


@pytest.mark.parametrize("text", ["batch = ", "batch"])
def test_a_file_that_is_not_toml_is_named(text, tmp_path):
    assert "own.toml: not a TOML file" in refusal(tmp_path, text)


def test_an_unknown_recipe_is_named_with_its_place():
    with pytest.raises(UnknownName, match=r"^tiny.toml: recipe: no such recipe: 'digts'\. Did you"):
        recipes.load("digts", "tiny.toml: recipe")
    with pytest.raises(UnknownName, match="no such recipe"):
        recipes.load("../recipes/digits", "")


def test_a_missing_file_is_named_with_its_place(tmp_path):
    with pytest.raises(
        SuiteError, match=r"^tiny.toml: recipe: cannot read recipe .*none\.toml: No"
    ):
        recipes.load("none.toml", "tiny.toml: recipe", tmp_path)
