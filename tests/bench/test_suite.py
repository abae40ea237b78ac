"""Suites: what a TOML file makes, and one line for everything that is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from bench import suite
from bench.errors import BudgetExceeded, DataError, SuiteError, UnknownName
from bench.launch import left
from bench.recipes import Recipe
from bench.resolve import make_budget, resolve
from bench.spec import BudgetSpec
from bench.store import Against, Store
from methods import METHODS, MethodInfo
from tests.bench.cells import plan_of, toml, write_recipe, write_suite


def questions(folder: Path, methods: str, **fields: str) -> list[suite.Question]:
    return list(suite.load(str(write_suite(folder, methods, **fields))).questions)


def refusal(folder: Path, methods: str = "[methods.rigl]", **fields: str) -> str:
    """The message for a suite that cannot be run."""
    path = write_suite(folder, methods, **fields)
    with pytest.raises(SuiteError) as caught:
        resolve(suite.load(str(path)), folder)
    return str(caught.value)


# What is wrong -> pieces of the one line that says so. Each line begins with the file's name.
WRONG: dict[str, tuple[str, dict[str, str], list[str]]] = {
    "unknown method": (
        "[methods.rgil]",
        {},
        [
            "methods.rgil: no such method: 'rgil'.",
            "Did you mean 'rigl'?",
            "Known: ",
            "dense",
            "dpf",
        ],
    ),
    "unknown method behind a label": (
        '[methods.mine]\nmethod = "desne"',
        {},
        ["methods.mine: no such method: 'desne'.", "Did you mean 'dense'?"],
    ),
    "unknown option": (
        "[methods.rigl]\nevry = 10",
        {},
        ["methods.rigl: no such option of rigl: 'evry'.", "Did you mean 'every'?", "drop_fraction"],
    ),
    "setting spelled as an option": (
        "[methods.rigl]\nsparsity = [0.5]",
        {},
        ["no such option of rigl: 'sparsity'.", "Did you mean 'sparsities'?", "budget"],
    ),
    "option of a wrong type": (
        '[methods.rigl]\nevery = "often"',
        {},
        ["methods.rigl: rigl: Expected `int`, got `str`", "every"],
    ),
    "option out of range": (
        "[methods.rigl]\nevery = 0",
        {},
        ["methods.rigl: rigl: every = 0 lies outside [1, inf)"],
    ),
    "option that is not a scalar": (
        "[methods.rigl]\nevery = [[1], 2]",
        {},
        ["methods.rigl.every: [[1], 2] is neither a value nor a list of values."],
    ),
    "empty grid": ("[methods.rigl]\nevery = []", {}, ["methods.rigl.every: [] is neither"]),
    "method that is no table": (
        "[methods]\nrigl = 3",
        {},
        ["methods.rigl: found 3; give a table: [methods.rigl]"],
    ),
    "unknown model": (
        "[methods.rigl]",
        {"models": '["resnet20", "resnt20"]'},
        ["models[1]: no such model: 'resnt20'.", "Did you mean 'resnet20'?", "timm:NAME"],
    ),
    "unknown timm model": (
        "[methods.rigl]",
        {"models": '["timm:resnet19"]'},
        ["no such model: 'timm:resnet19'.", "Did you mean 'timm:resnet18'?"],
    ),
    "model without a name": (
        "[methods.rigl]",
        {"models": '[{ shortcut = "B" }]'},
        ["models[0]: needs a name, such as { name = 'resnet20', shortcut = 'B' }."],
    ),
    "unknown option of a model": (
        "[methods.rigl]",
        {"models": '[{ name = "resnet20", shortct = "B" }]'},
        ["models: no such option of resnet20: 'shortct'", "Did you mean 'shortcut'?"],
    ),
    "option of a model that is not allowed": (
        "[methods.rigl]",
        {"models": '[{ name = "resnet20", shortcut = "C" }]'},
        ["model resnet20:", "shortcut: found 'C'; allowed: 'A', 'B'"],
    ),
    "unknown data set": (
        "[methods.rigl]",
        {"dataset": '"minst"'},
        ["dataset: no such data set: 'minst'.", "Did you mean 'mnist'?", "cifar10", "digits"],
    ),
    "unknown recipe": (
        "[methods.rigl]",
        {"recipe": '"digts"'},
        ["recipe: no such recipe: 'digts'.", "Did you mean 'digits'?", "mnist-sgd"],
    ),
    "missing recipe file": (
        "[methods.rigl]",
        {"recipe": '"none.toml"'},
        ["recipe: cannot read recipe", "none.toml: No such file"],
    ),
    "unknown preset": (
        "[methods.rigl]",
        {"prunable": '"dbf"'},
        [
            "prunable: no such preset: 'dbf'.",
            "Did you mean 'dpf'?",
            "Known: all, dpf, dsr, lth, rigl-erk, rigl-uniform.",
        ],
    ),
    "unknown field": (
        "[methods.rigl]",
        {"sparsitis": "[0.5]"},
        [
            "no such field: 'sparsitis'.",
            "Did you mean 'sparsities'?",
            "Known: budget, controls, dataset",
        ],
    ),
    "field of a wrong type": (
        "[methods.rigl]",
        {"seeds": '["one"]'},
        ["Expected `int`, got `str`", "seeds"],
    ),
    "unknown field of the budget": (
        "[methods.rigl]",
        {"budget": "{ epoch = 3 }"},
        ["budget: no such field: 'epoch'.", "Did you mean 'epochs'?", "max_multiple, steps"],
    ),
    "unknown field of a method's budget": (
        "[methods.rigl]\nbudget = { stpes = 3 }",
        {},
        ["methods.rigl.budget: no such field: 'stpes'.", "Did you mean 'steps'?"],
    ),
    "no budget at all": (
        "[methods.rigl]",
        {"budget": "{ max_multiple = 2 }"},
        ["methods.rigl: budget: give either epochs or steps"],
    ),
    "a recipe that says no length either": (
        "[methods.rigl]",
        {"budget": "{}"},
        ["methods.rigl: budget: give either", "recipe digits does not say how long its own run"],
    ),
    "two budgets": (
        "[methods.rigl]",
        {"budget": "{ epochs = 2, steps = 3 }"},
        ["methods.rigl: budget: give either epochs or steps"],
    ),
    "budget of 0 steps": (
        "[methods.rigl]",
        {"budget": "{ steps = 0 }"},
        ["methods.rigl: budget: 0 is not a length; it must be above 0."],
    ),
    "budget of less than one step": (
        "[methods.rigl]",
        {"budget": "{ epochs = 0.001 }"},
        ["methods.rigl: budget: 0.022 steps; allowed: from 1 to "],
    ),
    "endless budget": (
        "[methods.rigl]",
        {"budget": "{ epochs = 1e308 }"},
        ["methods.rigl: budget: inf steps; allowed: from 1 to "],
    ),
    "multiple below one": (
        "[methods.rigl]",
        {"budget": "{ steps = 9, max_multiple = 0.5 }"},
        ["methods.rigl: budget.max_multiple = 0.5: must be at least 1."],
    ),
    "plan over its multiple": (
        "[methods.one_shot]",
        {"budget": "{ steps = 40 }"},
        [
            "methods.one_shot: one_shot plans 48 steps, but the budget allows 1 x 40.",
            "Set budget.max_multiple to at least 1.2.",
        ],
    ),
    "sparsity of 1": (
        "[methods.rigl]",
        {"sparsities": "[1.0]"},
        ["methods.rigl: sparsity 1.0 lies outside [0, 1).", "0.9 leaves a tenth"],
    ),
    "negative sparsity": (
        "[methods.rigl]\nsparsities = [0.5, -0.1]",
        {},
        ["methods.rigl: sparsity -0.1 lies outside [0, 1)."],
    ),
    "sparsity that is not a number": (
        "[methods.rigl]",
        {"sparsities": "[nan]"},
        ["sparsity nan lies outside [0, 1)."],
    ),
    "sparsity that leaves nothing": (
        "[methods.rigl]",
        {"sparsities": "[0.999999]"},
        ["sparsity 0.999999 leaves none of the 50200 prunable weights of lenet_300_100."],
    ),
    "same sparsity twice": (
        "[methods.rigl]",
        {"sparsities": "[0.5, 0.5]"},
        ["methods.rigl: sparsities = [0.5, 0.5]: give different numbers in [0, 1)."],
    ),
    "no sparsities": (
        "[methods.rigl]",
        {"sparsities": "[]"},
        ["methods.rigl: sparsities = []: give different numbers in [0, 1)."],
    ),
    "sparsity for the dense network": (
        "[methods.dense]\nsparsities = [0.5]",
        {},
        ["methods.dense.sparsities: dense has no sparsity to set."],
    ),
    "same seed twice": ("[methods.rigl]", {"seeds": "[3, 3]"}, ["seeds = [3, 3]: give different"]),
    "negative seed": ("[methods.rigl]", {"seeds": "[-1]"}, ["seeds = [-1]: give different"]),
    "no seeds": ("[methods.rigl]", {"seeds": "[]"}, ["seeds = []: give different"]),
    "no methods": ("[methods]", {}, ["models and methods may not be empty."]),
    "no models": ("[methods.rigl]", {"models": "[]"}, ["models and methods may not be empty."]),
    "nothing to prune": (
        "[methods.rigl]",
        {"prunable": '"dpf"'},
        ["methods.rigl: prunable = 'dpf' leaves LeNet300100 no weight that RigL can prune."],
    ),
    "images too small for the model": (
        "[methods.rigl]",
        {"models": '["lenet5"]'},
        ["model lenet5:", "at least 16x16, got 1x8x8"],
    ),
    "same question under two labels": (
        '[methods.a]\nmethod = "rigl"\n[methods.b]\nmethod = "rigl"\nevery = 100',
        {},
        ["a and b ask the same question (rigl-lenet_300_100-s0.9-seed0-"],
    ),
    "same model twice": (
        "[methods.rigl]",
        {"models": '["resnet20", { name = "resnet20", shortcut = "A" }]'},
        ["rigl and rigl ask the same question"],
    ),
    "same value twice in a grid": (
        "[methods.rigl]\nevery = [10, 10]",
        {},
        ["methods.rigl: asked for twice:", "rigl[every=10]"],
    ),
    "source that no row is": (
        '[methods.rigl]\n[methods.control]\nmethod = "ticket_control"\nsource = "rgil"',
        {},
        [
            "methods.control.source: no such row to take masks from: 'rgil'.",
            "Did you mean 'rigl'? Known: rigl.",
        ],
    ),
    "source that has one itself": (
        """[methods.rigl]
[methods.a]
method = "ticket_control"
source = "rigl"
[methods.b]
method = "ticket_control"
control = "noise"
source = "a"
""",
        {},
        ["methods.b.source: no such row to take masks from: 'a'.", "Known: rigl."],
    ),
    "source of filters": (
        '[methods.dpf_filters]\n[methods.rigl]\n[methods.ticket_control]\nsource = "dpf_filters"',
        {"models": '["resnet20"]', "sparsities": "[0.5]"},
        ["no such row to take masks from: 'dpf_filters'.", "Known: rigl."],
    ),
    "narrower network as a source": (
        '[methods.small_dense]\n[methods.ticket_control]\nsource = "small_dense"',
        {},
        ["no such row to take masks from: 'small_dense'.", "Known: none."],
    ),
    "no source where one is needed": (
        "[methods.ticket_control]",
        {},
        [
            "methods.ticket_control: ticket_control needs the masks of another row: "
            "set source = 'LABEL', a label of this suite."
        ],
    ),
    "no source with an option that needs one": (
        "[methods.random]\nlayers_of_source = true",
        {},
        ["methods.random: random needs the masks of another row: set source = 'LABEL'"],
    ),
    "source where none is needed": (
        '[methods.dpf]\n[methods.random]\nsource = "dpf"',
        {},
        [
            "methods.random: random takes nothing from a source with these options: "
            "leave source out."
        ],
    ),
    "source without the sparsity": (
        '[methods.rigl]\nsparsities = [0.5]\n[methods.ticket_control]\nsource = "rigl"',
        {},
        ["rigl has no cell at sparsity 0.9 of the weights that 'all' counts."],
    ),
    "small_dense with an option": (
        "[methods.small_dense]\nwidth = 0.5",
        {},
        ["methods.small_dense: small_dense has no options and no source."],
    ),
    "small_dense with a source": (
        '[methods.rigl]\n[methods.small_dense]\nsource = "rigl"',
        {},
        ["methods.small_dense: small_dense has no options and no source."],
    ),
    "rounds to land on, by hand and by the suite": (
        '[methods.lottery_ticket]\nalso = "0.3"',
        {"sparsities": "[0.5, 0.8]"},
        ["methods.lottery_ticket.also: the suite's sparsities fill it in."],
    ),
    "rounds to land on that are none": (
        '[methods.lottery_ticket]\nalso = "0.95"',
        {},
        ["methods.lottery_ticket: lottery_ticket: also = '0.95'; allowed: sparsities in [0, 0.9)"],
    ),
    "rounds over their multiple": (
        "[methods.lottery_ticket]",
        {},
        [
            "lottery_ticket plans 528 steps, but the budget allows 1.2 x 44.",
            "Set budget.max_multiple to at least 12.",
        ],
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_gets_one_line_with_its_place_and_what_is_allowed(what, tmp_path):
    methods, fields, pieces = WRONG[what]
    message = refusal(tmp_path, methods, **fields)
    assert message.startswith("tiny.toml: ")
    assert "\n" not in message
    for piece in pieces:
        assert piece in message


def test_wrong_names_are_told_apart_from_wrong_values(tmp_path):
    with pytest.raises(UnknownName):
        questions(tmp_path, "[methods.rgil]")
    with pytest.raises(BudgetExceeded):
        plan_of(write_suite(tmp_path, "[methods.one_shot]", budget="{ steps = 40 }"))


@pytest.mark.parametrize(
    ("said", "budget", "expected"),
    [
        ("epochs = 3", None, BudgetSpec(epochs=3)),
        ("steps = 70", None, BudgetSpec(steps=70)),
        ("steps = 70", "{ max_multiple = 1.5 }", BudgetSpec(steps=70)),
        ("epochs = 3", "{ steps = 9 }", BudgetSpec(steps=9)),
    ],
)
def test_a_suite_without_a_length_takes_the_recipes(said, budget, expected, tmp_path):
    recipe = write_recipe(tmp_path, f"batch = 64\nlr = 0.1\n{said}")
    path = write_suite(tmp_path, "[methods.rigl]", recipe=recipe, budget=budget or "{}")
    if budget is None:
        lines = [row for row in path.read_text().splitlines() if not row.startswith("budget")]
        path.write_text("\n".join(lines))
    (question,) = suite.load(str(path)).questions
    assert question.budget == expected
    assert question.max_multiple == (1.5 if budget and "multiple" in budget else 1.0)


def test_the_recipes_length_makes_the_key_that_the_same_budget_makes(tmp_path):
    text = "batch = 64\nlr = 0.1"
    silent = write_recipe(tmp_path, text, "silent")
    said = write_recipe(tmp_path, f"{text}\nepochs = 2", "said")
    one = write_suite(tmp_path, name="one", recipe=silent, budget="{ epochs = 2 }")
    other = write_suite(tmp_path, name="other", recipe=said, budget="{}")
    keys = [[cell.spec.key for cell in plan_of(path).manifest.cells] for path in (one, other)]
    assert keys[0] == keys[1]


def test_a_method_with_a_length_of_its_own_needs_no_other(tmp_path):
    methods = "[methods.rigl]\nbudget = { steps = 9 }"
    (question,) = questions(tmp_path, methods, budget="{}")
    assert question.budget == BudgetSpec(steps=9)


@pytest.mark.parametrize("field", ["dataset", "recipe", "models", "methods"])
def test_a_missing_field_is_named(field, tmp_path):
    lines = toml("[methods.dense]").splitlines()
    path = tmp_path / "tiny.toml"
    path.write_text("\n".join(line for line in lines if not re.match(rf"\[?{field}\b", line)))
    with pytest.raises(SuiteError, match=f"^tiny.toml: .*`{field}`"):
        suite.load(str(path))


def test_the_multiple_that_a_message_names_is_enough(tmp_path):
    for steps in range(1, 60):
        budget = f"{{ steps = {steps}"
        message = ""
        try:
            plan_of(write_suite(tmp_path, "[methods.one_shot]", budget=budget + " }"))
        except BudgetExceeded as error:
            message = str(error)
        if message:
            (wanted,) = re.findall(r"at least ([0-9.]+)\.$", message)
            enough = f"{budget}, max_multiple = {wanted} }}"
            plan_of(write_suite(tmp_path, "[methods.one_shot]", budget=enough))


def test_an_unknown_suite_is_named_with_the_nearest():
    with pytest.raises(UnknownName, match=r"no such suite: 'smok'\. Did you mean 'smoke'\?"):
        suite.load("smok")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SuiteError, match=r"none\.toml: cannot read the suite: No such file"):
        suite.load(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("content", [b"dataset = ", b"\xff\xfe", b"[methods"])
def test_a_file_that_is_not_toml_is_named(content, tmp_path):
    path = tmp_path / "odd.toml"
    path.write_bytes(content)
    with pytest.raises(SuiteError, match=r"odd\.toml: not a TOML file") as caught:
        suite.load(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["two words", ".hidden", "x" * 101])
def test_a_file_name_must_be_fit_for_a_folder(name, tmp_path):
    with pytest.raises(SuiteError, match="name the file with letters, digits"):
        suite.load(str(write_suite(tmp_path, name=name)))


def test_a_suite_takes_its_name_from_its_file(tmp_path):
    loaded = suite.load(str(write_suite(tmp_path, name="my.suite-2")))
    assert (loaded.name, loaded.title, loaded.where) == (
        "my.suite-2",
        "my.suite-2",
        "my.suite-2.toml",
    )
    assert suite.load(str(write_suite(tmp_path, title='"A title"'))).title == "A title"


@pytest.mark.parametrize("name", suite.names())
def test_every_built_in_suite_is_right_and_has_a_title(name):
    loaded = suite.load(name)
    assert loaded.title == suite.title(name) != ""
    assert len({question.label for question in loaded.questions}) >= 2


def test_there_are_the_four_suites_of_the_first_version():
    assert {"smoke", "quickstart", "mnist-lenet", "cifar10-resnet20-smoke"} <= set(suite.names())


def test_cells_are_the_product_of_methods_models_sparsities_and_seeds(tmp_path):
    found = questions(
        tmp_path,
        "[methods.rigl]\n[methods.dpf]",
        models='["lenet_300_100", { name = "resnet20", shortcut = "B" }]',
        sparsities="[0.5, 0.9]",
        seeds="[0, 4]",
    )
    asked = [(one.method, one.model, one.sparsity, one.seed) for one in found]
    assert asked == [
        (method, model, sparsity, seed)
        for method in ("rigl", "dpf")
        for model in ("lenet_300_100", "resnet20")
        for sparsity in (0.5, 0.9)
        for seed in (0, 4)
    ]
    assert {str(one.model_options) for one in found} == {"{}", "{'shortcut': 'B'}"}


def test_the_default_seed_is_zero(tmp_path):
    assert [one.seed for one in questions(tmp_path, "[methods.rigl]")] == [0]


def test_list_valued_options_are_a_grid_and_stand_in_the_label(tmp_path):
    found = questions(
        tmp_path, '[methods.rigl]\nevery = [10, 20]\nscope = ["erk", "uniform"]\nstop = 0.5'
    )
    assert [(one.label, one.options) for one in found] == [
        (f"rigl[every={every},scope={scope}]", {"every": every, "scope": scope, "stop": 0.5})
        for every in (10, 20)
        for scope in ("erk", "uniform")
    ]


def test_a_label_names_a_variant_and_the_key_ignores_it(tmp_path):
    one = plan_of(write_suite(tmp_path, '[methods.often]\nmethod = "rigl"\nevery = 5'))
    two = plan_of(write_suite(tmp_path, "[methods.rigl]\nevery = 5"))
    assert [cell.label for cell in one.manifest.cells] == ["often"]
    assert one.manifest.cells[0].spec == two.manifest.cells[0].spec
    assert one.manifest.cells[0].spec.options == (("every", 5),)


def test_options_at_their_default_do_not_change_the_key(tmp_path):
    one = plan_of(write_suite(tmp_path, "[methods.rigl]\nevery = 100\nstop = 0.75"))
    two = plan_of(write_suite(tmp_path, "[methods.rigl]"))
    assert one.manifest.cells[0].spec.key == two.manifest.cells[0].spec.key


def test_a_whole_number_for_a_fraction_is_the_same_question(tmp_path):
    one = plan_of(write_suite(tmp_path, "[methods.rigl]\nstop = 1", sparsities="[0]"))
    two = plan_of(write_suite(tmp_path, "[methods.rigl]\nstop = 1.0", sparsities="[0.0]"))
    assert one.manifest.cells[0].spec.key == two.manifest.cells[0].spec.key


def test_a_methods_own_sparsities_replace_the_suites(tmp_path):
    found = questions(tmp_path, "[methods.rigl]\nsparsities = [0.3]\n[methods.dpf]")
    assert [(one.method, one.sparsity) for one in found] == [("rigl", 0.3), ("dpf", 0.9)]


def test_a_methods_own_budget_replaces_the_suites(tmp_path):
    found = questions(
        tmp_path,
        """
[methods.dense]
[methods.rigl]
budget = { steps = 7 }
[methods.dpf]
budget = { max_multiple = 3 }
[methods.one_shot]
budget = { epochs = 5, max_multiple = 2 }
""",
        budget="{ epochs = 1, max_multiple = 1.5 }",
    )
    assert [(one.method, one.budget, one.max_multiple) for one in found] == [
        ("dense", BudgetSpec(epochs=1), 1.5),
        ("rigl", BudgetSpec(steps=7), 1.5),
        ("dpf", BudgetSpec(epochs=1), 3),
        ("one_shot", BudgetSpec(epochs=5), 2),
    ]


def test_the_multiple_is_one_unless_said_otherwise(tmp_path):
    assert questions(tmp_path, "[methods.rigl]", budget="{ steps = 3 }")[0].max_multiple == 1


def test_dense_is_one_cell_a_seed_at_sparsity_zero(tmp_path):
    found = questions(tmp_path, "[methods.dense]", sparsities="[0.5, 0.9]", seeds="[0, 1]")
    assert [(one.sparsity, one.seed) for one in found] == [(0.0, 0), (0.0, 1)]


def test_a_penalty_driven_method_has_a_grid_and_no_sparsity(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "gates", MethodInfo("gates:Gates", "", "penalty", ""))
    found = questions(tmp_path, "[methods.gates]\nlam = [1e-6, 1e-5]", sparsities="[0.5, 0.9]")
    assert [(one.sparsity, one.options) for one in found] == [
        (None, {"lam": 1e-6}),
        (None, {"lam": 1e-5}),
    ]
    with pytest.raises(SuiteError, match="a penalty drives gates; give a grid of its coefficient"):
        questions(tmp_path, "[methods.gates]\nsparsities = [0.5]")


def test_a_method_that_prunes_filters_takes_sparsities(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "sfp", MethodInfo("sfp:SFP", "", "filters", ""))
    assert [one.sparsity for one in questions(tmp_path, "[methods.sfp]")] == [0.9]


def test_a_recipe_of_ones_own_lies_beside_the_suite(tmp_path):
    recipe = write_recipe(tmp_path, "batch = 32\nlr = 0.3")
    plan = plan_of(write_suite(tmp_path, recipe=recipe, budget="{ epochs = 1 }"))
    assert (plan.recipe.batch, plan.recipe.lr) == (32, 0.3)
    assert plan.manifest.cells[0].steps == 1437 // 32


def test_too_few_images_for_a_batch_are_refused(tmp_path):
    recipe = write_recipe(tmp_path, "batch = 1000\nlr = 0.3\nvalidation = 500")
    with pytest.raises(
        DataError, match=r"^tiny.toml: methods.dense: 1437 training images less 500"
    ):
        plan_of(write_suite(tmp_path, recipe=recipe))


def test_a_crop_that_cannot_be_reflected_is_refused(tmp_path):
    recipe = write_recipe(tmp_path, 'batch = 64\nlr = 0.3\ncrop = 8\npadding = "reflect"')
    message = refusal(tmp_path, recipe=recipe)
    assert message.startswith("tiny.toml: recipe own.toml: crop = 8 is too much for images of 8x8")


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (BudgetSpec(steps=7), 7),
        (BudgetSpec(epochs=2), 44),
        (BudgetSpec(epochs=0.5), 11),
        (BudgetSpec(epochs=0.03), 1),
    ],
    ids=str,
)
def test_epochs_become_steps_of_whole_batches(budget, steps):
    recipe = Recipe(title="", batch=64, lr=0.1, drops=(0.5, 0.75))
    made = make_budget(budget, recipe, 1437)
    assert (made.steps, made.steps_per_epoch, made.examples) == (steps, 22, 1437)
    assert made.lr_drops == (0.5, 0.75)


def test_a_plan_knows_steps_multiple_and_updates(tmp_path):
    methods = "[methods.dense]\n[methods.one_shot]\n[methods.dpf]"
    cells = plan_of(write_suite(tmp_path, methods)).manifest.cells
    found = {cell.label: (cell.steps, cell.multiple, cell.updates) for cell in cells}
    assert found["dense"] == (44, 1.0, 0)
    assert found["one_shot"] == (52, 52 / 44, 0)  # 44 steps, and a fifth of them on top
    assert found["dpf"] == (44, 1.0, 22)  # every 44 // 20 steps


@pytest.mark.parametrize("label", ["two\nlines", "", "bell\x07"])
def test_a_label_is_one_line_of_text(label, tmp_path):
    path = tmp_path / "odd.toml"
    path.write_text(
        'dataset = "digits"\nrecipe = "digits"\nmodels = ["lenet_300_100"]\nsparsities = [0.5]\n'
        f'budget = {{ steps = 5 }}\n[methods.{json.dumps(label)}]\nmethod = "rigl"\n'
    )
    with pytest.raises(SuiteError, match="is no label"):
        suite.load(str(path))


@pytest.mark.parametrize("value", [r"er\nk", "er|k"])
def test_a_value_of_a_grid_makes_no_label_of_two_lines_or_columns(value, tmp_path):
    path = write_suite(tmp_path, f'[methods.random]\nscope = ["uniform", "{value}"]')
    with pytest.raises(SuiteError, match=r"methods\.random: 'random\[scope=er.*\]' is no label"):
        suite.load(str(path))


def test_a_whole_number_is_one_option_of_a_timm_model_however_it_is_written(tmp_path):
    asked = '[{{ name = "timm:resnet18", drop_rate = {} }}]'
    keys = {
        plan_of(write_suite(tmp_path, "[methods.dense]", models=asked.format(value)))
        .manifest.cells[0]
        .spec.key
        for value in ("0", "0.0")
    }
    assert len(keys) == 1


ROUNDS = "{ epochs = 2, max_multiple = 14 }"


def cells_of(folder, methods, **fields):
    return plan_of(write_suite(folder, methods, **fields)).manifest.cells


def test_the_sparsities_of_a_ticket_are_rounds_of_one_cell(tmp_path):
    asked = {"sparsities": "[0.8, 0.123456789, 0.5]", "seeds": "[0, 1]", "budget": ROUNDS}
    cells = cells_of(tmp_path, "[methods.lottery_ticket]", **asked)
    assert [(cell.asked, cell.spec.seed) for cell in cells] == [
        (sparsity, seed) for sparsity in (0.8, 0.123456789, 0.5) for seed in (0, 1)
    ]
    assert len({cell.spec.key for cell in cells}) == 2
    for cell in cells:
        assert cell.spec.sparsity == 0.8
        # Every digit: a row looks for the round with exactly its count of weights.
        assert dict(cell.spec.options) == {"also": "0.123456789 0.5"}
        # One round to 12.3 %, three to 50 %, five to 80 %, and the dense training.
        rounds = {0.123456789: 1, 0.5: 4, 0.8: 9}[cell.asked]
        assert cell.multiple == 1 + rounds


def test_tickets_that_do_not_pass_every_sparsity_have_a_cell_for_each(tmp_path):
    methods = '[methods.lottery_ticket]\nstrategy = ["continue", "one_shot"]'
    cells = cells_of(tmp_path, methods, sparsities="[0.5, 0.8]", budget=ROUNDS)
    assert [(cell.spec.sparsity, cell.sparsity, cell.multiple) for cell in cells] == [
        (0.5, None, 5),
        (0.8, None, 9),
        (0.5, None, 2),
        (0.8, None, 2),
    ]
    assert len({cell.spec.key for cell in cells}) == 4


def test_more_rounds_can_be_asked_for_by_hand_at_one_sparsity(tmp_path):
    methods = '[methods.lottery_ticket]\nalso = "0.5"\nsparsities = [0.8]'
    (cell,) = cells_of(tmp_path, methods, budget=ROUNDS)
    assert (cell.asked, cell.spec.options, cell.multiple) == (0.8, (("also", "0.5"),), 10)


def test_a_source_is_the_cell_of_the_same_model_seed_and_sparsity(tmp_path):
    methods = """
[methods.control]
method = "ticket_control"
source = "often"
[methods.often]
method = "rigl"
every = 5
[methods.rigl]
"""
    models = '["lenet_300_100", { name = "resnet20", shortcut = "B" }, "resnet20"]'
    asked = {"models": models, "sparsities": "[0.5, 0.9]", "seeds": "[0, 4]"}
    cells = cells_of(tmp_path, methods, **asked)
    assert [cell.label for cell in cells] == ["control"] * 12 + ["often"] * 12 + ["rigl"] * 12
    for control, source in zip(cells[:12], cells[12:24], strict=True):
        assert control.spec.source == source.spec.key
        assert (control.multiple, source.multiple) == (2, 1)  # its own training and the source's
        assert control.steps == 44
    assert all(cell.spec.source is None for cell in cells[12:])


def test_a_control_of_rounds_names_their_one_cell(tmp_path):
    methods = '[methods.lottery_ticket]\n[methods.ticket_control]\nsource = "lottery_ticket"'
    cells = cells_of(tmp_path, methods, sparsities="[0.5, 0.8]", budget=ROUNDS)
    assert {cell.spec.source for cell in cells[2:]} == {cells[0].spec.key}
    assert [cell.spec.sparsity for cell in cells[2:]] == [0.5, 0.8]


def test_sparsities_of_other_prunable_weights_are_other_cells(tmp_path):
    asked = {
        "sparsities": "[0.8, 0.9, 0.99]",
        "prunable": '"rigl-erk"',
        "budget": "{ steps = 40, max_multiple = 30 }",
    }
    low, middle, high = cells_of(tmp_path, "[methods.lottery_ticket]", **asked)
    # From 99 % on the first layer is dense, and counts no more.
    assert low.spec == middle.spec
    assert (low.spec.sparsity, high.spec.sparsity) == (0.9, 0.99)
    assert (dict(low.spec.options), dict(high.spec.options)) == ({"also": "0.8"}, {})
    assert low.multiple < middle.multiple < high.multiple


def test_a_suite_of_more_cells_than_anybody_trains_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "MAX_CELLS", 5)
    path = write_suite(tmp_path, "[methods.rigl]", seeds="[0, 1, 2, 3, 4]")
    assert len(suite.load(str(path)).questions) == 5
    path = write_suite(tmp_path, "[methods.rigl]", seeds="[0, 1, 2, 3, 4, 5]")
    with pytest.raises(SuiteError, match="asks for more than 5 cells; make several suites"):
        suite.load(str(path))


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_a_seed_that_no_generator_takes_is_refused(tmp_path, seed):
    path = write_suite(tmp_path, "[methods.rigl]", seeds=f"[{seed}]")
    with pytest.raises(SuiteError, match="seeds"):
        suite.load(str(path))


def test_a_width_that_would_fill_the_memory_is_refused(tmp_path):
    models = '[{ name = "lenet_300_100", width = 1e308 }]'
    with pytest.raises(SuiteError, match=r"width: found 1e\+308, of 300 units; allowed"):
        cells_of(tmp_path, "[methods.rigl]", models=models)


def test_a_method_can_prune_other_weights_than_the_suite(tmp_path):
    methods = '[methods.rigl]\n[methods.snip]\nprunable = "all"'
    rigl, snip = cells_of(tmp_path, methods, prunable='"rigl-uniform"')
    assert (rigl.spec.prunable, snip.spec.prunable) == ("rigl-uniform", "all")


def test_a_control_takes_the_masks_of_a_source_that_prunes_the_same_weights(tmp_path):
    control = '[methods.ticket_control]\nsource = "rigl"\nprunable = "rigl-uniform"'
    with pytest.raises(SuiteError, match="of the weights that 'rigl-uniform' counts"):
        cells_of(tmp_path, f"[methods.rigl]\n{control}")
    own = '[methods.rigl]\nprunable = "rigl-uniform"'
    rigl, shuffled = cells_of(tmp_path, f"{own}\n{control}")
    assert shuffled.spec.source == rigl.spec.key


def test_a_method_with_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(SuiteError, match=r"methods\.snip: prunable: no such preset: 'dbf'"):
        cells_of(tmp_path, '[methods.snip]\nprunable = "dbf"')


def test_a_small_dense_row_is_the_dense_network_of_another_width(tmp_path):
    methods = "[methods.small_dense]\n[methods.dense]"
    small, dense = cells_of(tmp_path, methods)
    (option,) = small.spec.model_options
    assert option[0] == "width"
    assert 0.1 < option[1] < 0.3
    assert dataclasses.replace(small.spec, model_options=()) == dense.spec
    assert (small.label, small.asked, small.spec.sparsity) == ("small_dense", 0.9, 0.0)
    (_, width) = option
    units = round(300 * width), round(100 * width)
    kept = 64 * units[0] + units[0] * units[1] + 10 * units[1]
    assert (small.against, dense.against) == (Against(50_610, 50_200, 50_200, kept), None)
    assert (small.steps, small.skipped) == (44, "")


def test_a_small_dense_row_of_a_model_without_a_width_is_skipped_with_the_reason(tmp_path):
    methods = "[methods.small_dense]\n[methods.dense]"
    models = '["timm:resnet18", "lenet_300_100"]'
    cells = cells_of(tmp_path, methods, models=models)
    reason = "timm:resnet18 has no option `width`, so there is no smaller one of it"
    assert [cell.skipped for cell in cells] == [reason, "", "", ""]
    assert (cells[0].label, cells[0].asked, cells[0].spec.model) == (
        "small_dense",
        0.9,
        "timm:resnet18",
    )
    # It is never left to do.
    store = Store(tmp_path / "records", "tiny")
    assert (left(store, [cells[0]]), left(store, list(cells))) == (0, 3)
