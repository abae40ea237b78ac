"""Cells of filter methods: what is counted, and which are refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from bench import datasets, recipes
from bench.data import to_device
from bench.errors import SuiteError
from bench.evaluate import evaluate
from bench.store import Store
from methods.api import Cadence, Phase
from methods.dpf_filters import DPFFilters
from methods.sfp import SFP
from models import create_model
from tests.bench.cells import plan_of, register, stored, train, train_one, write_suite

# A quarter of ResNet-20 has 4, 8 and 16 filters: 7 * 4 + 6 * 8 + 6 * 16.
FILTERS = 172

COMMON = {
    "models": '[{ name = "resnet20", width = 0.25 }]',
    "prunable": '"dpf"',
    "sparsities": "[0.4]",
}


@dataclass(frozen=True)
class OneLess(DPFFilters):
    """Zeroes one filter more than it was asked to."""

    def finish(self, run):
        super().finish(run)
        weight = next(iter(run.state.weights))
        kept = run.state.model.get_parameter(weight)
        kept[int(kept.flatten(1).any(1).nonzero()[0])] = 0


@dataclass(frozen=True)
class Forgetful(SFP):
    """Does not zero the filters after the last step."""

    def plan(self, budget, density):
        return (Phase("train", budget.steps, updates=Cadence(1000)),)

    def finish(self, run):
        for weight in run.state.weights.values():
            weight[weight == 0] = 1e-3


def test_the_record_counts_filters(tmp_path):
    methods = "[methods.dpf_filters]\n[methods.sfp]"
    records = train(write_suite(tmp_path, methods, **COMMON), tmp_path / "records")
    for record in records:
        assert record.status == "ok", record.reason
        # 0.6 of 172 is 103.2; how many weights these have is nobody's target.
        assert record.counts.filters == (FILTERS, 103, 103)
        assert record.counts.target_nonzero is None
        kept = load_file(Store(tmp_path / "records", "tiny").weights(record.spec))
        names = [name for name, tensor in kept.items() if tensor.ndim == 4]
        left = {name: kept[name].flatten(1).any(1) for name in names}
        assert sum(int(rows.sum()) for rows in left.values()) == 103
        assert record.counts.prunable == sum(kept[name].numel() for name in names)
        assert record.counts.prunable_nonzero == sum(
            int(kept[name].count_nonzero()) for name in names
        )
        # Scale and shift behind a pruned filter are zero, and count as zeros of the whole.
        silent = {name: ~rows for name, rows in left.items()}
        for name, rows in silent.items():
            norm = name.removesuffix(".weight").replace("conv", "norm").replace("stem", "norm")
            assert not kept[f"{norm}.weight"][rows].any()
            assert not kept[f"{norm}.bias"][rows].any()
    assert stored(tmp_path / "records").keys() == {record.spec.key for record in records}


def test_the_accuracy_is_that_of_the_zeroed_network(tmp_path):
    record = train_one(write_suite(tmp_path, "[methods.sfp]", **COMMON), tmp_path / "records")
    arrays = datasets.load("digits", tmp_path)
    data = to_device(arrays, recipes.load("digits", "", tmp_path), torch.device("cpu"))
    model = create_model("resnet20", arrays.info.shape, arrays.info.classes, width=0.25)
    model.load_state_dict(load_file(Store(tmp_path / "records", "tiny").weights(record.spec)))
    found = evaluate(model, data.test, data)
    assert (found.top1, found.loss) == (record.top1, pytest.approx(record.test_loss))


@pytest.mark.parametrize(("kind", "found"), [(OneLess, 102), (Forgetful, FILTERS)])
def test_a_wrong_count_of_filters_is_invalid(kind, found, tmp_path, monkeypatch):
    register(monkeypatch, "wrong", kind, "filters")
    suite = write_suite(tmp_path, "[methods.wrong]", **COMMON, budget="{ steps = 4 }")
    record = train_one(suite, tmp_path / "records")
    assert record.status == "invalid"
    assert record.reason == f"{found} filters are not zero, but 103 were asked for"
    assert record.counts.filters == (FILTERS, 103, found)


@pytest.mark.parametrize("method", ["dpf_filters", "sfp"])
def test_a_sparsity_that_leaves_no_filter_is_refused(method, tmp_path):
    # 172 * 0.002 = 0.34 filters, of 16,974 weights.
    suite = write_suite(tmp_path, f"[methods.{method}]", **COMMON | {"sparsities": "[0.998]"})
    with pytest.raises(SuiteError) as caught:
        plan_of(suite)
    assert str(caught.value).endswith("sparsity 0.998 leaves none of the 172 filters of resnet20.")
    # One filter is enough, and weights are counted as ever.
    plan_of(write_suite(tmp_path, f"[methods.{method}]", **COMMON | {"sparsities": "[0.996]"}))
    plan_of(write_suite(tmp_path, "[methods.dpf]", **COMMON | {"sparsities": "[0.998]"}))


def test_a_network_without_convolutions_is_refused(tmp_path):
    with pytest.raises(SuiteError, match="leaves LeNet300100 no weight that SFP can prune"):
        plan_of(write_suite(tmp_path, "[methods.sfp]"))


def test_the_leak_is_another_cell(tmp_path):
    methods = '[methods.sfp]\n[methods.leak]\nmethod = "sfp"\nbn_leak = true'
    one, other = plan_of(write_suite(tmp_path, methods, **COMMON)).manifest.cells
    assert one.spec.options == ()
    assert other.spec == dataclasses.replace(one.spec, options=(("bn_leak", True),))
    assert one.spec.key != other.spec.key
