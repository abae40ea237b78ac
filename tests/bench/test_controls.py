"""`controls = true`: which rows it adds, that none repeats another, and what their masks are."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from bench import inspection, suite
from bench.datasets import DATASETS
from bench.errors import SuiteError
from bench.launch import CELL_FAILED, DONE, Settings, left, train, verdict, without_lost
from bench.networks import make_model
from bench.store import Store
from methods.allocation import allocate
from methods.controls import LAYERS_BY_SCOPE, MAGNITUDE, RANDOM, REINITIALISED, mask_controls
from methods.masking import PruneAtInit
from reports.aggregate import aggregate
from reports.footnotes import footnotes
from reports.suite_table import stored_table
from tests.bench.cells import ROOT, plan_of, register, train_one, write_recipe, write_suite

CONTROLS = (RANDOM, MAGNITUDE, REINITIALISED)


def plan_with(folder, methods, **fields):
    return plan_of(write_suite(folder, methods, **{"controls": "true"} | fields))


def labels(plan):
    return list(dict.fromkeys(cell.label for cell in plan.manifest.cells))


def cell_of(plan, label, seed=0, sparsity=None):
    (cell,) = (
        cell
        for cell in plan.manifest.cells
        if cell.label == label
        and cell.spec.seed == seed
        and (sparsity is None or cell.asked == sparsity)
    )
    return cell


def test_without_the_word_nothing_is_added(tmp_path):
    plan = plan_of(write_suite(tmp_path, "[methods.dpf]"))
    assert labels(plan) == ["dpf"]
    assert plan.controls == frozenset()
    assert plan_with(tmp_path, "[methods.dpf]", controls="false").manifest == plan.manifest


def test_each_method_stands_beside_its_controls(tmp_path):
    asked = {"sparsities": "[0.5, 0.9]", "seeds": "[0, 3]"}
    plan = plan_with(tmp_path, "[methods.dpf]\n[methods.sparse_momentum]", **asked)
    assert labels(plan) == [
        "dense",
        "small_dense",
        "dpf",
        *(f"dpf: {name}" for name in CONTROLS),
        "sparse_momentum",
        *(f"sparse_momentum: {name}" for name in CONTROLS),
    ]
    dense = [cell for cell in plan.manifest.cells if cell.label == "dense"]
    assert [(cell.asked, cell.spec.seed) for cell in dense] == [(0.0, 0), (0.0, 3)]
    small = [cell for cell in plan.manifest.cells if cell.label == "small_dense"]
    assert {(cell.asked, cell.spec.seed) for cell in small} == {
        (sparsity, seed) for sparsity in (0.5, 0.9) for seed in (0, 3)
    }
    # 2 dense, 4 small, and 2 methods with 3 controls at 2 sparsities with 2 seeds.
    assert len(plan.controls) == 2 + 4 + 2 * 3 * 4
    assert len(plan.manifest.cells) == len(plan.controls) + 8


def test_a_control_is_one_run_from_the_cell_of_the_same_seed_and_sparsity(tmp_path):
    asked = {"sparsities": "[0.5, 0.9]", "seeds": "[0, 3]"}
    plan = plan_with(tmp_path, "[methods.one_shot]", **asked)
    made = {RANDOM: "random", MAGNITUDE: "magnitude_at_init", REINITIALISED: "ticket_control"}
    for name, method in made.items():
        for seed in (0, 3):
            for sparsity in (0.5, 0.9):
                cell = cell_of(plan, f"one_shot: {name}", seed, sparsity)
                source = cell_of(plan, "one_shot", seed, sparsity)
                assert (cell.spec.method, cell.spec.source) == (method, source.spec.key)
                assert cell.steps == 44  # of the source's 52, no fine-tuning
                assert cell.multiple == pytest.approx(1 + 52 / 44)


def test_controls_leave_the_keys_of_the_methods_as_they_were(tmp_path):
    methods = "[methods.dense]\n[methods.small_dense]\n[methods.rigl]\n[methods.snip]"
    alone = plan_of(write_suite(tmp_path, methods)).manifest.cells
    found = plan_with(tmp_path, methods).manifest.cells
    assert [cell for cell in found if ": " not in cell.label] == list(alone)


def test_what_the_suite_has_under_another_label_is_not_added(tmp_path):
    methods = '[methods.baseline]\nmethod = "dense"\n[methods.narrow]\nmethod = "small_dense"\n'
    plan = plan_with(tmp_path, methods + "[methods.dpf]")
    assert {"baseline", "narrow"} < set(labels(plan))
    assert not {"dense", "small_dense"} & set(labels(plan))
    # Its own sparsity only: the other is still to be compared with.
    narrow = f"{methods}sparsities = [0.5]\n[methods.dpf]"
    plan = plan_with(tmp_path, narrow, sparsities="[0.5, 0.9]")
    assert cell_of(plan, "small_dense").asked == 0.9


def test_a_budget_of_its_own_has_a_dense_network_of_its_own(tmp_path):
    methods = "[methods.dpf]\n[methods.snip]\nbudget = { steps = 9 }"
    plan = plan_with(tmp_path, methods)
    steps = {(cell.label, cell.steps) for cell in plan.manifest.cells}
    assert {("dense", 44), ("dense", 9), ("small_dense", 44), ("small_dense", 9)} < steps
    assert {(f"snip: {name}", 9) for name in CONTROLS} < steps


def test_methods_of_one_layer_rule_share_the_cells_of_their_controls(tmp_path):
    methods = (
        '[methods.rigl]\n[methods.set]\n[methods.random_erk]\nmethod = "random"\nscope = "erk"'
    )
    plan = plan_with(tmp_path, methods)
    rows = {cell.label: cell.spec for cell in plan.manifest.cells}
    assert rows["rigl: random masks"] == rows["set: random masks"] == rows["random_erk"]
    shared = ("rigl: magnitude masks", "set: magnitude masks", "random_erk: magnitude masks")
    assert len({rows[label].key for label in shared}) == 1
    # The masks themselves are each method's own.
    assert rows["rigl: re-initialised"] != rows["set: re-initialised"]
    # dense, small_dense, the magnitude masks, and two re-initialised.
    assert len(plan.controls) == 5


def test_controls_of_different_layers_are_not_shared(tmp_path):
    plan = plan_with(
        tmp_path, '[methods.rigl]\nscope = ["erk", "uniform", "global"]\n[methods.dsr]'
    )
    random = {cell.label: cell.spec for cell in plan.manifest.cells if cell.label.endswith(RANDOM)}
    assert len({spec.key for spec in random.values()}) == 4
    assert random[f"rigl[scope=global]: {RANDOM}"].source is not None
    assert random[f"dsr: {RANDOM}"].source is not None  # uniform at the start only
    assert random[f"rigl[scope=uniform]: {RANDOM}"].source is None


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("random", [MAGNITUDE]),
        ("magnitude_at_init", [RANDOM, REINITIALISED]),
        ("dpf", list(CONTROLS)),
    ],
)
def test_a_control_that_would_be_the_method_itself_is_left_out(method, expected):
    for scope in ("global", "erk"):
        assert [control.name for control in mask_controls(method, scope)] == expected


FEWER = """
[methods.dpf_filters]
[methods.l0]
[methods.str]
target = 0.75
[methods.random]
[methods.snip]
[methods.shuffled]
method = "ticket_control"
control = "shuffle"
source = "snip"
"""


def test_what_has_fewer_controls_is_said_with_the_reason(tmp_path):
    plan = plan_with(tmp_path, FEWER, models='["resnet20"]')
    own = [label for label in labels(plan) if ": " in label]
    assert own == ["random: magnitude masks", *(f"snip: {name}" for name in CONTROLS)]
    small = {cell.asked for cell in plan.manifest.cells if cell.label == "small_dense"}
    assert small == {0.9, 0.75}
    assert list(plan.notes) == [
        "controls: dpf_filters: takes filters, not weights: only dense",
        "controls: l0: a penalty decides its masks: only dense",
        "controls: str: a penalty decides its masks: only dense and small_dense",
        "controls: random: its masks are random and know nothing of the weights: of masks, only "
        "magnitude masks",
        "controls: shuffled: starts from another row, so it is a control itself: only dense and "
        "small_dense",
    ]


def test_nothing_is_compared_with_where_nothing_is_pruned(tmp_path):
    assert labels(plan_with(tmp_path, "[methods.dense]")) == ["dense"]
    plan = plan_with(tmp_path, "[methods.dpf]", sparsities="[0.0]")
    assert labels(plan) == ["dense", "dpf"]


@dataclass(frozen=True)
class FirstLayers(PruneAtInit):
    """Leaves the last layer alone."""

    def prunable(self, model):
        return super().prunable(model)[:-1]


def test_a_method_that_leaves_out_layers_has_no_controls_of_masks(tmp_path, monkeypatch):
    register(monkeypatch, "first_layers", FirstLayers)
    plan = plan_with(tmp_path, "[methods.first_layers]")
    assert labels(plan) == ["dense", "small_dense", "first_layers"]
    (note,) = plan.notes
    assert note.startswith("controls: first_layers: leaves out layers that its controls prune")


@pytest.mark.parametrize(
    ("methods", "label"),
    [
        ('[methods.dpf]\n[methods."dpf: random masks"]\nmethod = "random"', "dpf: random masks"),
        ('[methods.dense]\nmethod = "dpf"', "dense"),
    ],
)
def test_a_label_of_a_control_cannot_be_taken(methods, label, tmp_path):
    with pytest.raises(SuiteError, match=rf"methods.{label}: '{label}' is the label of a control"):
        plan_with(tmp_path, methods)


def test_the_word_is_true_or_false(tmp_path):
    with pytest.raises(SuiteError, match=r"tiny\.toml: Expected `bool`, got `str`.*controls"):
        suite.load(str(write_suite(tmp_path, "[methods.dpf]", controls='"all"')))


def test_the_plan_says_what_controls_add(tmp_path, call):
    path = write_suite(tmp_path, "[methods.rigl]\n[methods.dpf]", controls="true")
    said = call("plan", path.name).out
    # Two methods; dense, small_dense and three controls of each method besides.
    assert "10 cells, 10 to do; records in records/tiny" in said
    assert "controls add 8 of the cells, and 352 of their 440 steps" in said
    rows = json.loads(call("plan", path.name, "--json").out)
    assert [row["label"] for row in rows if row["multiple"] == 2] == [
        "rigl: re-initialised",
        *(f"dpf: {name}" for name in CONTROLS),
    ]
    write_suite(tmp_path, "[methods.rigl]\n[methods.dpf]")
    assert "controls" not in call("plan", path.name).out


TRAINED = "[methods.dpf]\n[methods.rigl]\n[methods.dsr]\n[methods.lottery_ticket]\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A suite whose methods have layers known beforehand, found out, moved, and of rounds."""
    folder = tmp_path_factory.mktemp("controls")
    recipe = write_recipe(folder, "batch = 50\nlr = 0.1\nmomentum = 0.9\nvalidation = 137")
    plan = plan_with(
        folder,
        TRAINED,
        recipe=recipe,
        sparsities="[0.5, 0.3]",
        seeds="[1]",
        budget="{ steps = 20, max_multiple = 9 }",
    )
    store = Store(folder / "records", "tiny")
    train(plan, store, list(plan.manifest.cells), Settings("cpu", workers=1))
    assert verdict(store, list(plan.manifest.cells)) == DONE
    return plan, store


every_row = pytest.mark.parametrize("label", ["dpf", "rigl", "dsr", "lottery_ticket"])


def pairs(run, label, name):
    """Each cell of a control, with the one whose layers or masks it has."""
    plan, _ = run
    for sparsity in (0.5, 0.3):
        control = cell_of(plan, f"{label}: {name}", 1, sparsity)
        yield control, cell_of(plan, label, 1, sparsity)


def kept(run, cell):
    """Where the network that answers a cell is not zero; None for a round before the last."""
    _, store = run
    if cell.label == "lottery_ticket" and cell.asked != cell.spec.sparsity:
        return None
    weights = load_file(store.weights(cell.spec))
    return {name: w != 0 for name, w in weights.items() if name.endswith("weight")}


@every_row
@pytest.mark.parametrize("name", [RANDOM, MAGNITUDE])
def test_layers_keep_as_many_weights_as_the_methods(run, label, name):
    compared = 0
    for control, source in pairs(run, label, name):
        masks, theirs = kept(run, control), kept(run, source)
        if theirs is not None:
            assert {n: int(m.sum()) for n, m in masks.items()} == {
                n: int(m.sum()) for n, m in theirs.items()
            }
            assert any(not torch.equal(masks[n], theirs[n]) for n in masks)
            compared += 1
    assert compared == (1 if label == "lottery_ticket" else 2)


@every_row
def test_a_re_initialised_network_has_the_methods_masks(run, label):
    for control, source in pairs(run, label, REINITIALISED):
        masks, theirs = kept(run, control), kept(run, source)
        if theirs is not None:
            assert all(torch.equal(masks[n], theirs[n]) for n in masks)


@pytest.mark.parametrize("method", sorted(LAYERS_BY_SCOPE))
def test_layers_that_are_known_beforehand_are_those_of_the_finished_network(method, tmp_path):
    recipe = write_recipe(tmp_path, "batch = 50\nlr = 0.1\nmomentum = 0.9")
    asked = {"recipe": recipe, "sparsities": "[0.8]", "budget": "{ steps = 24, max_multiple = 2 }"}
    record = train_one(
        write_suite(tmp_path, f'[methods.{method}]\nscope = "erk"', **asked), tmp_path
    )
    shapes = {line.name: line.shape for line in record.layers if line.prunable}
    found = {line.name: line.nonzero for line in record.layers if line.prunable}
    assert found == allocate(shapes, 0.2, "erk")


def test_what_starts_from_a_cell_that_diverged_is_skipped_with_the_reason(tmp_path):
    recipe = write_recipe(tmp_path, "batch = 50\nlr = 1e30")
    plan = plan_with(tmp_path, "[methods.dpf]", recipe=recipe, budget="{ steps = 5 }")
    store = Store(tmp_path / "records", "tiny")
    train(plan, store, list(plan.manifest.cells), Settings("cpu", workers=1))
    source = store.get(cell_of(plan, "dpf").spec)
    assert source is not None
    assert source.status == "diverged"
    assert store.attempts() == []
    reason = f"the source {source.spec.slug} is diverged: {source.reason}"
    ended = without_lost(plan, store)
    assert ended.manifest == store.manifest()
    for name in CONTROLS:
        assert cell_of(ended, f"dpf: {name}").skipped == reason
    assert left(store, list(ended.manifest.cells)) == 0
    assert verdict(store, list(ended.manifest.cells)) == CELL_FAILED
    assert f"skipped: dpf: random masks, lenet_300_100: {reason}" in stored_table(store)


def test_a_seed_whose_source_diverged_is_skipped_beside_one_that_is_not(tmp_path):
    plan = plan_with(tmp_path, "[methods.dpf]", seeds="[0, 1]")
    lost = cell_of(plan, f"dpf: {RANDOM}", 1)
    cells = [
        dataclasses.replace(cell, skipped="why") if cell is lost else cell
        for cell in plan.manifest.cells
    ]
    results = aggregate(dataclasses.replace(plan.manifest, cells=tuple(cells)), [])
    (row,) = (row for row in results.rows if row.label == lost.label)
    assert (row.statuses, row.skipped) == (("missing", "skipped"), "")
    line = f"skipped: dpf: {RANDOM}, lenet_300_100, 90 %, seed 1: why"
    assert line in list(footnotes(results, []))


def test_snips_own_new_weights_are_not_those_of_its_control(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "CHANCE_FACTOR", 0.0)  # nothing is learnt
    plan = plan_with(tmp_path, "[methods.snip]\nreinit = true", budget="{ steps = 2 }")
    store = Store(tmp_path / "records", "tiny")
    train(plan, store, list(plan.manifest.cells), Settings("cpu", workers=1))
    one, other = (
        load_file(store.weights(cell_of(plan, label).spec))["fc1.weight"]
        for label in ("snip", f"snip: {REINITIALISED}")
    )
    assert torch.equal(one != 0, other != 0)
    assert not (one == other)[one != 0].any()


def test_initial_weights_are_the_seeds_and_others_where_re_initialised(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "CHANCE_FACTOR", 0.0)  # nothing is learnt
    recipe = write_recipe(tmp_path, "batch = 50\nlr = 1e-30")
    asked = {"recipe": recipe, "seeds": "[3]", "budget": "{ steps = 2 }"}
    plan = plan_with(tmp_path, "[methods.dpf]", **asked)
    store = Store(tmp_path / "records", "tiny")
    train(plan, store, list(plan.manifest.cells), Settings("cpu", workers=1))
    first = make_model("lenet_300_100", DATASETS["digits"], {}, 3).state_dict()
    ends = {
        name: load_file(store.weights(cell_of(plan, f"dpf: {name}", seed=3).spec))
        for name in CONTROLS
    }
    for name in (n for n in first if n.endswith("weight")):
        kept = {control: end[name] != 0 for control, end in ends.items()}
        for control in (RANDOM, MAGNITUDE):
            assert torch.equal(ends[control][name], first[name] * kept[control])
        kept[MAGNITUDE], sizes = kept[MAGNITUDE].flatten(), first[name].abs().flatten()
        largest = sizes.topk(int(kept[MAGNITUDE].sum())).indices
        assert kept[MAGNITUDE][largest].all()
        again = kept[REINITIALISED]
        assert not (ends[REINITIALISED][name] == first[name])[again].any()


def test_a_table_says_once_what_the_rows_of_controls_are(run):
    _, store = run
    table = stored_table(store)
    assert table.count("`NAME: re-initialised` has its masks") == 1
    assert "starts from the masks of another row" not in table


def test_a_row_that_shares_a_controls_cell_is_named_as_the_source(tmp_path):
    largest = '[methods.largest]\nmethod = "magnitude_at_init"\nscope = "erk"\n'
    for methods in ("[methods.rigl]\n" + largest, largest + "[methods.rigl]\n"):
        plan = plan_with(tmp_path, methods)
        rows = {row.label: row for row in aggregate(plan.manifest, []).rows}
        assert rows["rigl: magnitude masks"].keys == rows["largest"].keys
        assert rows["largest: re-initialised"].source == "largest"


def test_the_example_of_the_readme_adds_what_it_says(tmp_path, call):
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8").partition("### Controls")[2]
    (tmp_path / "two.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    said = call("plan", "two.toml").out.splitlines()[-1]
    cells, steps = re.findall(r"\d+ of (?:its|their) \d+", text)
    assert said == f"controls add {cells.split()[0]} of the cells, and {steps} steps"
