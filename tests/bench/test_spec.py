"""Keys of cells. `golden/keys.json` holds known ones: a change of them orphans every record.

Where a change is meant, write the file anew: `python -m tests.bench.test_spec`
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from bench.errors import SuiteError
from bench.spec import BudgetSpec, CellSpec, content_hash
from tests.bench.cells import spec

GOLDEN = Path(__file__).parent.parent / "golden" / "keys.json"

SPECS = {
    "plain": spec(),
    "in steps": spec(budget=BudgetSpec(steps=300)),
    "penalty-driven": spec(method="l0", sparsity=None, options=(("lam", 1e-6),)),
    "with options": spec(options=(("every", 50), ("scope", "uniform"))),
    "another model": spec(model="timm:resnet18", model_options=(("drop_rate", 0.5),)),
    "another preset": spec(prunable="dpf"),
    "another version": spec(method_version=2),
    "another seed": spec(seed=7),
    "dense": spec(method="dense", sparsity=0.0),
}


def golden() -> str:
    """The content of `golden/keys.json` as the code makes it today."""
    rows = [
        {
            "what": name,
            "key": one.key,
            "slug": one.slug,
            "spec": msgspec.json.decode(msgspec.json.encode(one)),
        }
        for name, one in SPECS.items()
    ]
    return json.dumps(rows, indent=1) + "\n"


@pytest.mark.parametrize("name", SPECS)
def test_a_known_cell_keeps_its_key_and_its_name(name):
    (row,) = (row for row in json.loads(GOLDEN.read_text()) if row["what"] == name)
    one = msgspec.convert(row["spec"], type=CellSpec)
    assert (one.key, one.slug) == (row["key"], row["slug"])


def test_the_golden_file_holds_the_cells_of_this_file():
    assert GOLDEN.read_text(encoding="utf-8") == golden()


def test_all_the_known_keys_differ():
    assert len({one.key for one in SPECS.values()}) == len(SPECS)


def test_a_key_is_the_hash_of_what_is_not_at_its_default():
    # So a field that joins later with a neutral default leaves every key as it is.
    assert spec().key == content_hash(
        {
            "method": "rigl",
            "model": "resnet20",
            "sparsity": 0.9,
            "seed": 0,
            "budget": {"epochs": 30.0},
            "recipe_hash": "0123456789ab",
            "data_hash": "ba9876543210",
        }
    )


def test_fields_given_at_their_default_do_not_change_the_key():
    given = spec(prunable="all", method_version=1, options=(), model_options=())
    assert given.key == spec().key


def test_thirty_epochs_and_thirty_point_zero_are_one_budget():
    assert BudgetSpec(epochs=30) == BudgetSpec(epochs=30.0)
    assert spec(budget=BudgetSpec(epochs=30)).key == spec(budget=BudgetSpec(epochs=30.0)).key


def test_names_of_data_set_and_recipe_do_not_matter_but_their_contents_do():
    assert spec(dataset="mine", recipe="path/to/own.toml").key == spec().key
    assert spec(data_hash="0").key != spec().key
    assert spec(recipe_hash="0").key != spec().key


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "set"},
        {"model": "lenet5"},
        {"sparsity": 0.95},
        {"sparsity": None},
        {"seed": 1},
        {"budget": BudgetSpec(epochs=31)},
        {"budget": BudgetSpec(steps=30)},
        {"prunable": "dpf"},
        {"method_version": 2},
        {"options": (("every", 1),)},
        {"model_options": (("every", 1),)},
    ],
    ids=str,
)
def test_every_other_field_enters_the_key(changes):
    assert spec(**changes).key != spec().key


def test_a_key_survives_the_way_through_json():
    one = spec(options=(("drop_fraction", 1.0), ("every", 1), ("flag", True), ("scope", "er")))
    read = msgspec.json.decode(msgspec.json.encode(one), type=CellSpec)
    assert read == one
    assert read.key == one.key


def test_a_key_is_twelve_hex_digits():
    assert len(spec().key) == 12
    assert int(spec().key, 16) >= 0


def test_a_slug_says_what_the_cell_is_and_ends_in_the_key():
    assert spec(seed=3).slug == f"rigl-resnet20-s0.9-seed3-{spec(seed=3).key}"


def test_a_slug_can_be_a_file_name_on_any_system():
    slug = spec(model="timm:hub/resnet18", sparsity=None).slug
    assert slug.startswith("rigl-timm_hub_resnet18-seed0-")
    assert not set(slug) & set('/\\:*?"<>| ')


@pytest.mark.parametrize("lengths", [{}, {"epochs": 1, "steps": 1}])
def test_a_budget_has_either_epochs_or_steps(lengths):
    with pytest.raises(SuiteError, match=r"^budget: give either epochs or steps"):
        BudgetSpec(**lengths)


@pytest.mark.parametrize(
    "lengths", [{"steps": 0}, {"steps": -1}, {"epochs": 0.0}, {"epochs": float("inf")}], ids=str
)
def test_a_budget_is_above_zero_and_finite(lengths):
    (value,) = lengths.values()
    with pytest.raises(SuiteError, match=rf"^budget: {value} is not a length"):
        BudgetSpec(**lengths)


def test_a_budget_that_is_not_a_number_is_refused():
    with pytest.raises(SuiteError, match="not a length"):
        BudgetSpec(epochs=float("nan"))


if __name__ == "__main__":
    GOLDEN.write_text(golden(), encoding="utf-8")
