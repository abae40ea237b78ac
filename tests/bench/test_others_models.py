"""A suite may name a model that another package offers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import launch
from bench.errors import SuiteError
from bench.store import Store
from bench.suite import load
from models import conflicts, create_model, find_info, is_known, model_options, names, others
from tests.bench.cells import plan_of, train_one, write_suite

SOURCE = '''
import functools
from torch import nn

def narrow(input_shape, classes, *, width=1.0, norm=False):
    """A linear layer behind another one.

    More that nobody asks for.
    """
    channels, rows, columns = input_shape
    if rows < 4:
        raise LookupError("too small")
    units = max(1, round(32 * width))
    layers = [nn.Flatten(), nn.Linear(channels * rows * columns, units), nn.ReLU()]
    if norm:
        layers.append(nn.BatchNorm1d(units))
    return nn.Sequential(*layers, nn.Linear(units, classes))

def shared(input_shape, classes, *, width=1.0):
    """Two layers that stand in two places each."""
    channels = round(8 * width)
    if channels % 2:
        raise ValueError("an odd number of channels")
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    norm = nn.BatchNorm2d(channels)
    stem = nn.Conv2d(input_shape[0], channels, 3)
    body = [conv, norm, nn.ReLU(), conv, norm, nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(stem, *body, *head)

def tied(input_shape, classes):
    """Two layers of one weight."""
    channels, rows, columns = input_shape
    first, middle = nn.Linear(channels * rows * columns, 32), nn.Linear(32, 32)
    last = nn.Linear(32, 32)
    last.weight = middle.weight
    layers = [first, nn.ReLU(), middle, nn.ReLU(), last, nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(32, classes))

def normed(input_shape, classes):
    """Its middle layer's weight is computed."""
    channels, rows, columns = input_shape
    middle = nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32))
    first = nn.Linear(channels * rows * columns, 32)
    layers = [first, nn.ReLU(), middle, nn.ReLU(), nn.Linear(32, classes)]
    return nn.Sequential(nn.Flatten(), *layers)

wide = functools.partial(narrow, width=4.0)

def blind(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(7, classes))

def keyword(input_shape, *, depth):
    """Needs what no suite gives."""

def word(input_shape, classes):
    return "no module"
'''


@pytest.fixture
def offer(package):
    """Installs a package whose module has the text above, and offers models."""

    def install(name: str = "outside", **offers: str) -> None:
        package(SOURCE, name, others.GROUP, **offers)

    return install


def models_of(folder: Path, entry: str, method: str = "[methods.dense]") -> Path:
    return write_suite(folder, method, models=f"[{entry}]")


def test_a_model_of_another_package_is_found_by_name(offer):
    assert "narrow" not in names()
    offer(narrow="outside_methods:narrow", wide="outside_methods:wide")
    assert names()[-2:] == ["narrow", "wide"]
    assert is_known("narrow")
    assert "outside_methods" not in sys.modules  # a name alone loads nothing
    assert find_info("narrow").summary == "A linear layer behind another one."
    assert find_info("wide").summary == "A linear layer behind another one."
    assert model_options("narrow") == {"width": 1.0, "norm": False}
    assert create_model("narrow", (1, 8, 8), 3, width=0.5)[1].weight.shape == (16, 64)
    assert create_model("wide", (1, 8, 8))[-1].weight.shape == (10, 128)


def test_a_suite_plans_and_trains_it_and_its_smaller_kin(tmp_path, offer):
    offer(narrow="outside_methods:narrow")
    entry = "{ name = 'narrow', norm = true }"
    path = models_of(tmp_path, entry, "[methods.random]\n[methods.small_dense]\nsparsities=[0.5]")
    plan = plan_of(path)
    store = Store(tmp_path / "records", "tiny")
    cells = list(plan.manifest.cells)
    launch.train(plan, store, cells, launch.Settings("cpu", workers=1))
    sparse, small = (store.get(cell.spec) for cell in cells[-2:])
    assert (sparse.status, small.status) == ("ok", "ok")
    assert sparse.spec.model_options == (("norm", True),)
    assert dict(small.spec.model_options)["width"] == pytest.approx(0.5, abs=0.03)


def test_the_command_line_lists_counts_and_plans_it(tmp_path, offer, call):
    offer(narrow="outside_methods:narrow", lenet5="outside_methods:narrow", lost="nowhere:lost")
    listed = call("list", "models", "--json")
    rows = {row["name"]: row["summary"] for row in json.loads(listed.out)}
    assert rows["narrow"] == "A linear layer behind another one."
    assert rows["lenet5"].startswith("LeNet-5 as in Caffe")
    assert "model 'lost' of outside cannot be loaded from nowhere:lost" in rows["lost"]
    expected = "model 'lenet5' of outside is not used: the table has one of that name"
    assert conflicts() == [expected]
    assert listed.err == f"sparsebench: {expected}.\n"

    counted = call("count", "narrow", "--input", "1x28x28", "--option", "norm=true", "--json")
    totals = json.loads(counted.out)
    assert (totals["weights"], totals["norm"]) == (32 * 784 + 320, 64)

    path = models_of(tmp_path, "'narrow'")
    rows = json.loads(call("plan", path, "--json").out)
    assert [row["model"] for row in rows] == ["narrow"]


def test_a_wrong_option_is_refused_with_the_allowed_ones(tmp_path, offer, call):
    offer(narrow="outside_methods:narrow")
    path = models_of(tmp_path, "{ name = 'narrow', widht = 2 }")
    outcome = call("plan", path)
    assert outcome.status == 2
    expected = "no such option of narrow: 'widht'. Did you mean 'width'? Known: norm, width."
    assert expected in outcome.err
    outcome = call("count", "narrow", "--input", "1x28x28", "--option", "depth=2")
    assert outcome.status == 2
    assert "narrow: no such option: depth = 2; allowed: width, norm" in outcome.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lost", r"models\[0\]: model 'lost' of outside cannot be loaded from nowhere:lost \("),
        ("keyword", r"outside_methods:keyword is no function f\(input_shape, classes, \*, option"),
        ("number", r"outside_methods:__name__ is no function"),
        ("twice", "model 'twice' of .* is offered by .* too: uninstall one of them"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, offer, name, message):
    offer(
        lost="nowhere:lost",
        keyword="outside_methods:keyword",
        number="outside_methods:__name__",
        twice="outside_methods:narrow",
    )
    offer("another", twice="outside_methods:wide")
    with pytest.raises(SuiteError, match=message):
        load(str(models_of(tmp_path, f"'{name}'")))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("narrow", "1x3x3", "narrow cannot be built for images of 1x3x3 with classes = 10: too"),
        ("blind", "1x28x28", "model blind with images of 1x28x28: "),
        ("word", "1x28x28", "model 'word' of outside: str is no nn.Module"),
    ],
)
def test_a_model_that_cannot_take_the_images_is_refused_with_the_sizes(
    offer, call, name, shape, message
):
    offer(**{one: f"outside_methods:{one}" for one in ("narrow", "blind", "word")})
    outcome = call("count", name, "--input", shape)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_suite_refuses_a_model_that_cannot_take_its_images(tmp_path, offer):
    offer(blind="outside_methods:blind")
    with pytest.raises(SuiteError, match=r"model blind cannot take images of 1x8x8 \("):
        plan_of(models_of(tmp_path, "'blind'"))


def test_an_unknown_name_offers_those_of_packages_too(tmp_path, offer):
    offer(narrow="outside_methods:narrow")
    with pytest.raises(SuiteError, match="Did you mean 'narrow'"):
        load(str(models_of(tmp_path, "'narow'")))


@pytest.mark.parametrize("method", ["random", "rigl", "synflow", "dpf", "sfp"])
def test_a_network_with_shared_layers_is_trained_counted_and_tested(tmp_path, offer, method):
    offer(shared="outside_methods:shared")
    path = models_of(tmp_path, '"shared"', f"[methods.{method}]\nsparsities = [0.5]")
    record = train_one(path, tmp_path / "records")
    assert (record.status, record.reason) == ("ok", "") or "chance" in record.reason
    layers = {layer.name: layer for layer in record.layers}
    assert layers.keys() == {"0.weight", "1.weight", "9.weight"}
    assert layers["1.weight"].dense_macs == 2 * 36 * 576  # 6x6 positions, twice
    assert record.counts.live <= record.counts.prunable_nonzero
    assert record.counts.live_macs <= record.counts.macs
    assert record.counts.compact is not None or method == "sfp"


def test_a_width_that_the_builder_refuses_skips_the_smaller_network(tmp_path, offer, call):
    offer(shared="outside_methods:shared")
    path = models_of(tmp_path, '"shared"', "[methods.small_dense]\nsparsities = [0.5]")
    outcome = call("plan", path)
    assert outcome.status == 0
    assert "skipped" in outcome.out
    (cell,) = plan_of(path).manifest.cells
    assert "an odd number of channels" in cell.skipped


@pytest.mark.parametrize("method", ["rigl", "dpf", "top_kast", "soft_deepr"])
def test_a_layer_whose_weight_is_computed_stays_as_it_is(tmp_path, offer, call, method):
    offer(normed="outside_methods:normed")
    options = "" if method == "soft_deepr" else "sparsities = [0.5]"
    path = models_of(tmp_path, '"normed"', f"[methods.{method}]\n{options}")
    planned = call("plan", path)
    assert "normed: not prunable, computed by a parametrisation: 3." in planned.err
    record = train_one(path, tmp_path / "records")
    # Soft-DeepR does not learn in so short a run; `invalid` would be another network.
    assert record.status == "ok" or "chance" in record.reason
    assert record.counts.prunable == 64 * 32 + 32 * 10


@pytest.mark.parametrize("method", ["dpf", "l0", "variational_dropout"])
def test_a_method_that_cannot_prune_a_shared_weight_is_refused_before_anything_trains(
    method, tmp_path, offer
):
    offer(tied="outside_methods:tied")
    path = models_of(tmp_path, "'tied'", f"[methods.{method}]")
    with pytest.raises(SuiteError, match=r"3\.weight and 5\.weight are one weight, which this"):
        plan_of(path)


def test_a_shared_weight_is_pruned_and_counted_once(tmp_path, offer):
    offer(tied="outside_methods:tied")
    record = train_one(models_of(tmp_path, "'tied'", "[methods.random]"), tmp_path / "records")
    assert record.counts.prunable_nonzero == record.counts.target_nonzero
    assert record.counts.prunable == 64 * 32 + 32 * 32 + 32 * 10
