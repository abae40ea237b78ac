"""Every method of the table against the interface.

`golden/defaults.json` holds every method's version and the defaults of its options. After a
change, `python -m tests.contract.test_methods` writes it anew. It refuses if an option changed its
default, or went, without a raised `version`: the same key would then stand for other results.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import bench.step
import bench.trainer
from bench.datasets import DATASETS
from bench.errors import SuiteError
from bench.networks import make_model
from bench.prunable import prunable_names
from bench.resolve import make_method
from bench.trainer import Trainer
from methods import METHODS, get_method
from methods.api import Budget, SparsityMethod
from methods.dense import Dense
from methods.masking import PruneAtInit
from models import create_model
from tests.contract.checks import (
    SETTINGS,
    SGD,
    addresses,
    assert_compiles_once,
    assert_plain,
    assert_resumes_bit_for_bit,
    assert_tensors_stay_in_place,
    builder,
    network_weight,
    outcome,
)
from tests.tiny import (
    MODELS,
    TINY_RECIPE,
    tiny_data,
    tiny_model,
    tiny_source,
    tiny_trainer,
    train,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "defaults.json"

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "one_shot": [
        {"finetune": 0.0, "min_keep": 2},
        {"finetune": 0.5, "finetune_lr": 1.0, "scope": "uniform"},
    ],
    "gradual": [
        {"scope": "uniform", "finetune": 0.2},
        {"begin": 0.2, "end": 0.6, "every": 2, "scope": "erk"},
    ],
    "lottery_ticket": [
        {"strategy": "continue", "rewind": 0.25, "rate": 0.5},
        {"strategy": "one_shot", "output_rate": 0.9},
        {"scope": "global", "rate": 0.6},
    ],
    "ticket_control": [
        {"control": "resample"},
        {"control": "noise", "sigma": 3.0},
        {"control": "shuffle", "draw": 2},
    ],
    "random": [{"scope": "erk"}, {"scope": "er"}, {"scope": "global"}, {"layers_of_source": True}],
    "snip": [{"batches": 3}, {"scope": "erk"}, {"reinit": True}],
    "set": [
        {"per_sign": True, "grown": "normal"},
        {"scope": "uniform", "stop": 1.0, "drop_fraction": 0.9},
        {"epochs": True},
    ],
    "rigl": [
        {"batches": 2},
        {"scope": "uniform", "stop": 0.5, "from_start": True},
        {"scope": "global"},
    ],
    "dpf": [
        {"scope": "uniform", "every": 3},
        {"end": 0.5, "every": 1, "finetune": 0.5, "decay": "masked"},
    ],
    "dpf_filters": [
        {"scope": "uniform", "every": 3, "norm": "l2/sqrt(fan_in)"},
        {"bn_leak": True, "finetune": 0.2},
    ],
    "sfp": [{"ramp": 0.5}, {"bn_leak": True}],
    "magnitude_at_init": [{"scope": "uniform"}],
    "grasp": [{"batches": 2, "temperature": 1.0}],
    "synflow": [{"rounds": 3, "biases": True}],
    "ac_dc": [{"cycles": 1, "warmup": 0.0, "final": 0.5, "scope": "uniform"}],
    "deepr": [{"variant": "dsr"}, {"pooled": True, "scope": "uniform", "matched": False}],
    "soft_deepr": [{"active": 0.3, "target": 0.9, "scope": "uniform"}],
    "str": [{"s_init": -4.0, "decay": 0.1, "target": 0.8}],
    "l0": [{"gates": "weight", "average": 3}, {"lam": 30.0, "target": 0.8}],
    "variational_dropout": [
        {"kl": 3.0, "delay": 0.0, "log_sigma2_init": -5.0, "target": 0.8, "train_clip": True}
    ],
    "top_kast": [{"every": 3, "backward": 5.0, "scope": "global"}],
    "sparse_momentum": [
        {"growth": "random", "decay": "linear"},
        {"redistribution": "none", "scope": "erk"},
        {"redistribution": "size", "guard": "published"},
    ],
    "dsr": [{"dropped_weights": 20, "threshold": 0.1}, {"scope": "erk", "every": 1}],
    "granet": [{"initial": 1.0, "stop": 0.5}, {"scope": "uniform", "end": 0.4, "every": 2}],
    "mest": [{"soft_bound": True, "drop_fraction": 0.5}, {"gradient_weight": 0.0, "stop": 1.0}],
}
"""Options worth a run of their own, beside the defaults of every method in the table."""

CASES = [
    pytest.param(name, options, id=" ".join([name, *(f"{k}={v}" for k, v in options.items())]))
    for name in METHODS
    for options in [{}, *VARIANTS.get(name, [])]
]
every_case = pytest.mark.parametrize(("name", "options"), CASES)
every_sparse_case = pytest.mark.parametrize(
    ("name", "options"), [c for c in CASES if METHODS[str(c.values[0])].controls == "density"]
)
every_case_on_every_model = pytest.mark.parametrize(
    ("name", "options", "model"),
    [
        pytest.param(*case.values, model, id=f"{model}-{case.id}")
        for case in CASES
        for model in MODELS
        # Without a convolution there is no filter.
        if (model, METHODS[str(case.values[0])].controls) != ("mlp", "filters")
    ],
)
every_case_in_every_setting = pytest.mark.parametrize(
    ("name", "options", "setting"),
    [
        pytest.param(*case.values, setting, id=f"{setting}-{case.id}")
        for case in CASES
        for setting, (model, _) in SETTINGS.items()
        if (model, METHODS[str(case.values[0])].controls) != ("mlp", "filters")
    ],
)
every_method = pytest.mark.parametrize("name", METHODS)
every_model = pytest.mark.parametrize("model", MODELS)

MULTIPLES = {"one_shot": 1.2, "lottery_ticket": 12.0}
"""Length of the plan in budgets, for methods whose defaults cost more than one."""


CHANGES_DENSE = {"deepr", "ticket_control"}
"""Methods under which even the full network trains otherwise: signs are fixed in DeepR, and a
ticket's control starts from other weights, as does what has an option `reinit`."""


GATED = {"l0"}
"""Methods whose training passes see each weight through a random gate."""


def method_of(name: str, options: dict[str, Any]) -> SparsityMethod:
    return get_method(name)(**options)


def intervals(name: str) -> dict[str, str]:
    """Range of each option that has one."""
    fields = dataclasses.fields(get_method(name))
    return {f.name: f.metadata["interval"] for f in fields if "interval" in f.metadata}


# The plan.


@every_case
@pytest.mark.parametrize("steps", [3, 24, 1000])
def test_plan_is_a_list_of_phases_that_can_be_run(name, options, steps):
    plan = method_of(name, options).plan(Budget(steps, steps // 3, 512, (0.5, 0.75)), 0.1)
    assert sum(phase.steps for phase in plan) > 0
    assert all(phase.steps >= 0 for phase in plan)
    assert len({phase.name for phase in plan}) == len(plan)
    saved: set[str | None] = {None}
    for phase in plan:
        low, high = phase.lr_window
        assert 0 <= low <= high <= 1
        assert phase.density is None or 0.1 <= phase.density <= 1
        assert phase.updates is None or phase.updates.every >= 1
        assert phase.rewind_to in saved
        saved.add(phase.save_as)


@every_method
def test_plan_costs_the_budget_that_the_method_is_known_for(name):
    budget = Budget(1000, 100, 512, (0.5, 0.75))
    steps = sum(phase.steps for phase in get_method(name)().plan(budget, 0.1))
    assert steps == pytest.approx(1000 * MULTIPLES.get(name, 1.0))


@every_case
def test_plan_depends_on_its_arguments_alone(name, options):
    budget = Budget(24, 14, 448, (0.5, 0.75))
    method = method_of(name, options)
    torch.manual_seed(1)
    before = method.plan(budget, 0.1)
    train(tiny_trainer(method, model="conv", steps=3))
    torch.manual_seed(2)
    assert method.plan(budget, 0.1) == before
    assert method_of(name, options).plan(dataclasses.replace(budget), 0.1) == before


# The finished network.


# Of 12,448 weights, of 1,432, and of 24 filters, rounded half up.
KEPT = {
    ("mlp", 0.5): 6224,
    ("mlp", 0.1): 1245,
    ("mlp", 0.02): 249,
    ("conv", 0.5): 716,
    ("conv", 0.1): 143,
    ("conv", 0.02): 29,
    ("filters", 0.5): 12,
    ("filters", 0.1): 2,
    ("filters", 0.02): 0,
}


@every_case_on_every_model
@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
def test_finished_network_is_plain_finite_and_has_exactly_the_weights_asked_for(
    name, options, model, density
):
    method = method_of(name, options)
    trainer = train(tiny_trainer(method, model=model, density=density, steps=10))
    unit = "filters" if method.controls == "filters" else model
    assert_finished(trainer, KEPT[unit, density], tiny_model(model))


def assert_finished(trainer: Trainer, kept: int, fresh: torch.nn.Module) -> None:
    finished = trainer.state.model
    assert_plain(finished, fresh)
    assert all(math.isfinite(point.train_loss) for point in trainer.cursor.curve)
    assert len(trainer.cursor.curve) == trainer.total_steps
    weights = [finished.get_parameter(name) for name in trainer.state.masks]
    if trainer.method.controls == "density":
        assert sum(int(weight.count_nonzero()) for weight in weights) == kept
    elif trainer.method.controls == "filters":
        assert sum(int(weight.flatten(1).any(1).sum()) for weight in weights) == kept


@every_method
def test_finished_timm_network_is_plain_and_has_exactly_the_weights_asked_for(name):
    def resnet() -> torch.nn.Module:
        torch.manual_seed(0)
        return create_model("timm:resnet18", (3, 16, 16), 4, channels=(8, 16, 32, 64))

    model, method = resnet(), get_method(name)()
    density = None if method.controls in ("none", "penalty") else 0.1
    names = prunable_names(model, method, "dpf")
    trainer = Trainer(
        method,
        model,
        names,
        tiny_data(TINY_RECIPE),
        TINY_RECIPE,
        Budget(2, 16, 512, TINY_RECIPE.drops),
        density,
        0,
        source=tiny_source(model, names, density),
        fresh=lambda draw: resnet(),
    )
    count = len if method.controls == "filters" else torch.numel
    total = sum(count(mask) for mask in trainer.state.masks.values())
    assert_finished(train(trainer), math.floor(total / 10 + 0.5), resnet())


@every_case_on_every_model
def test_sparsity_zero_is_dense_training_bit_for_bit(name, options, model):
    method = method_of(name, options)
    if method.controls == "penalty" or name in CHANGES_DENSE or "reinit" in options:
        return
    if hasattr(method, "finetune"):  # fine-tuning trains on, so only a plan without it is dense
        method = dataclasses.replace(method, finetune=0.0)
    sparse = train(tiny_trainer(method, density=1.0, model=model, recipe=SGD))
    dense = train(tiny_trainer(Dense(), model=model, recipe=SGD))
    expected = dense.state.model.state_dict()
    for tensor_name, tensor in sparse.state.model.state_dict().items():
        assert torch.equal(tensor, expected[tensor_name]), tensor_name
    assert sparse.cursor.curve == dense.cursor.curve


@every_case_on_every_model
def test_gradients_that_a_method_does_not_pay_for_do_not_matter(name, options, model):
    """What it leaves out of its training MACs may be anything."""
    expected, changed = (
        train(spoiled(tiny_trainer(method_of(name, options), model=model, recipe=SGD), amount))
        for amount in (0.0, 1.0)
    )
    finished = changed.state.model.state_dict()
    for tensor_name, tensor in expected.state.model.state_dict().items():
        assert torch.equal(tensor, finished[tensor_name]), tensor_name


@pytest.mark.parametrize("name", ["dpf", "sparse_momentum", "sfp"])
def test_a_method_that_pays_too_little_is_found_out(name):
    model = "conv" if name == "sfp" else "mlp"
    kind = get_method(name)
    cheap = type("Cheap", (kind,), {"gradient_masks": SparsityMethod.gradient_masks})
    first, second = (
        train(spoiled(tiny_trainer(cheap(), model=model, recipe=SGD), amount)).state.weights
        for amount in (0.0, 1.0)
    )
    assert any(not torch.equal(first[weight], second[weight]) for weight in first)


def spoiled(trainer: Trainer, amount: float) -> Trainer:
    """Adds to the gradient of each weight outside of the method's `gradient_masks`."""

    def spoil(name: str, weight: torch.nn.Parameter) -> None:
        masks = trainer.method.gradient_masks(trainer)
        if masks is not None:
            assert weight.grad is not None
            weight.grad += amount * (masks[name] == 0)

    for name, weight in trainer.state.weights.items():
        weight.register_post_accumulate_grad_hook(functools.partial(spoil, name))
    return trainer


# The run.


@every_case_in_every_setting
def test_resume_equals_uninterrupted_from_a_cut_in_every_phase(
    name, options, setting, tmp_path, monkeypatch
):
    # A curve of 5 points: losses of several steps wait for their point when the run is cut.
    monkeypatch.setattr(bench.trainer, "CURVE_POINTS", 5)
    assert_resumes_bit_for_bit(builder(method_of(name, options), setting), tmp_path)


@pytest.mark.parametrize("name", ["rigl", "dpf", "one_shot"])
def test_resume_equals_uninterrupted_from_every_single_step(name, tmp_path):
    build = builder(get_method(name)(), steps=16)
    every_step = range(build().total_steps + 1)
    assert_resumes_bit_for_bit(build, tmp_path, every_step)


@every_case_in_every_setting
def test_tensors_of_a_run_are_never_replaced(name, options, setting):
    assert_tensors_stay_in_place(builder(method_of(name, options), setting)())


@every_sparse_case
@every_model
def test_pruned_weights_are_zero_in_the_forward_pass_after_every_step(name, options, model):
    trainer = tiny_trainer(method_of(name, options), model=model, recipe=SGD)
    for done in trainer.run():
        for weight, mask in trainer.state.masks.items():
            assert ((mask == 0) | (mask == 1)).all()
            pruned = network_weight(trainer.state.model, weight)[mask == 0]
            assert not pruned.any(), f"{weight} after step {done}"
    masks = torch.cat([mask.flatten() for mask in trainer.state.masks.values()])
    assert int(masks.sum()) == {"mlp": 1245, "conv": 143}[model]


@every_method
def test_same_cell_twice_gives_the_same_run(name):
    build = builder(get_method(name)())
    first = outcome(train(build()))
    torch.manual_seed(12345)  # what ran before does not matter
    torch.rand(7)
    assert outcome(train(build())).differences(first) == []


@every_method
def test_other_seed_gives_another_run(name):
    first, second = (
        train(tiny_trainer(name, model="conv", seed=seed, steps=4)).state for seed in (0, 1)
    )
    for key in first.masks:
        weights = [state.model.get_parameter(key) for state in (first, second)]
        assert not torch.equal(*weights)


@every_method
def test_network_and_data_of_a_seed_are_the_same_for_every_method(name, monkeypatch):
    def seen_by(method: str) -> tuple[dict[str, torch.Tensor], list[tuple[torch.Tensor, ...]]]:
        trainer = tiny_trainer(method, model="conv", recipe=SGD, steps=20)
        state = trainer.state
        start = {key: network_weight(state.model, key).clone() for key in state.masks}
        start |= {key: network_weight(state.model, key).clone() for key in plain_names}
        if method in GATED:  # the network's weights are those times a random gate
            start |= {key: weight.detach().clone() for key, weight in state.weights.items()}
        batches: list[tuple[torch.Tensor, ...]] = []

        def spy(model, method, state, images, labels, smoothing):
            batches.append((images, labels))
            return forward(model, method, state, images, labels, smoothing)

        with monkeypatch.context() as patch:
            patch.setattr(bench.step, "forward", spy)
            train(trainer)
        return start, batches[:20]

    forward = bench.step.forward
    plain_names = tiny_model("conv").state_dict().keys()
    start, batches = seen_by(name)
    expected_start, expected_batches = seen_by("dense")
    assert set(start) == set(expected_start) == set(plain_names)
    assert all(torch.equal(start[key], expected_start[key]) for key in start)
    for found, expected in zip(batches, expected_batches, strict=True):
        assert all(map(torch.equal, found, expected))


def test_initial_weights_follow_from_the_seed_whatever_ran_before():
    info = DATASETS["synthetic"]
    torch.manual_seed(5)
    first = make_model("lenet5", info, {}, seed=3).state_dict()
    torch.manual_seed(6)
    second = make_model("lenet5", info, {}, seed=3).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = make_model("lenet5", info, {}, seed=4).state_dict()
    assert not any(torch.equal(first[key], other[key]) for key in first)


@every_method
def test_step_compiles_into_one_graph_that_serves_all_masks(name, monkeypatch):
    options = {"every": 2} if "every" in intervals(name) else {}
    assert_compiles_once(builder(method_of(name, options), steps=12), monkeypatch)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if issubclass(get_method(name), PruneAtInit)]
)
def test_scoring_leaves_normalisation_statistics_noise_and_mode_alone(name):
    trainer = tiny_trainer(name, model="conv")
    before = {key: value.clone() for key, value in trainer.state.model.named_buffers()}
    noise = torch.get_rng_state()
    with torch.no_grad():
        trainer.method.start_phase(trainer)
    assert all(module.training for module in trainer.state.model.modules())
    assert torch.equal(torch.get_rng_state(), noise)
    for key, value in trainer.state.model.named_buffers():
        assert torch.equal(value, before[key])


def test_addresses_tell_a_replaced_tensor():
    trainer = tiny_trainer("random")
    before = addresses(trainer)
    trainer.state.masks["fc1.weight"] = trainer.state.masks["fc1.weight"].clone()
    assert {k for k, v in addresses(trainer).items() if v != before[k]} == {"mask fc1.weight"}


# The class.


@every_case
def test_method_is_a_value(name, options):
    method, same = method_of(name, options), method_of(name, options)
    assert method == same
    assert hash(method) == hash(same)
    # Printed as it is written.
    assert eval(repr(method), {type(method).__name__: type(method)}) == method
    assert options == {} or method != get_method(name)()
    for field in dataclasses.fields(method):
        with pytest.raises(FrozenInstanceError):
            setattr(method, field.name, getattr(method, field.name))


@every_method
def test_table_and_class_agree(name):
    kind = get_method(name)
    assert issubclass(kind, SparsityMethod)
    assert kind.controls == METHODS[name].controls
    assert kind.__doc__
    assert bool(kind.paper) == bool(METHODS[name].paper)


@every_method
def test_every_number_among_the_options_has_a_range(name):
    numbers = {
        field.name
        for field in dataclasses.fields(get_method(name))
        if str(field.type).split(" | ")[0] in ("int", "float")
    }
    assert numbers == intervals(name).keys()


RANGES = [
    pytest.param(name, option, interval, id=f"{name} {option} {interval}")
    for name in METHODS
    for option, interval in intervals(name).items()
]


@pytest.mark.parametrize(("name", "option", "interval"), RANGES)
def test_option_out_of_range_is_refused_by_name_value_and_range(name, option, interval):
    low, high = (float(end) for end in interval[1:-1].split(","))
    outside = [
        low if interval[0] == "(" else low - 1e-6,
        high if interval[-1] == ")" else high + 1e-6,
        math.nan,
    ]
    for value in outside:
        with pytest.raises(ValueError, match=option) as caught:
            get_method(name)(**{option: value})
        assert str(value) in str(caught.value)
        assert interval in str(caught.value)
    for value, closed in ((low, interval[0] == "["), (high, interval[-1] == "]")):
        if closed:
            get_method(name)(**{option: value})


@every_method
def test_suite_value_out_of_range_is_an_error_with_its_place(name):
    for option, interval in intervals(name).items():
        low, high = (float(end) for end in interval[1:-1].split(","))
        outside = math.floor(low) - 1 if math.isfinite(low) else math.ceil(high) + 1
        with pytest.raises(SuiteError, match=rf"s.toml: methods.x: {name}: .*{option} = {outside}"):
            make_method(name, {option: outside}, "s.toml: methods.x")


@every_method
def test_word_that_is_no_choice_is_refused_where_a_suite_is_read(name):
    hints = typing.get_type_hints(get_method(name))
    for field in dataclasses.fields(get_method(name)):
        if isinstance(field.default, str) and typing.get_origin(hints[field.name]) is Literal:
            with pytest.raises(SuiteError, match=rf"'nowhere'.*{field.name}"):
                make_method(name, {field.name: "nowhere"}, "s.toml")


# The snapshot of defaults.


def described() -> dict[str, dict[str, Any]]:
    """Version and defaults of every method, as the golden file holds them."""
    return {
        name: {
            "version": get_method(name).version,
            "controls": get_method(name).controls,
            "defaults": dataclasses.asdict(get_method(name)()),
        }
        for name in sorted(METHODS)
    }


def needs_a_version(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Options whose default changed or that went, under the same version; a new one is harmless."""
    if new["version"] != old["version"]:
        return []
    missing = object()
    return [o for o, v in old["defaults"].items() if new["defaults"].get(o, missing) != v]


@every_method
def test_defaults_are_those_of_the_golden_file(name):
    old, new = json.loads(GOLDEN.read_text()).get(name), described()[name]
    if old is not None:
        changed = needs_a_version(old, new)
        assert not changed, f"{name}: other defaults ({changed}): raise {name}'s version"
    assert new == old, "run `python -m tests.contract.test_methods` to write the golden file anew"


def test_golden_file_has_no_method_that_is_gone():
    assert json.loads(GOLDEN.read_text()).keys() == METHODS.keys()


def test_changed_default_needs_a_version_and_a_new_option_does_not():
    old = {"version": 1, "defaults": {"every": 100, "stop": 0.75}}
    assert needs_a_version(old, {"version": 1, "defaults": {"every": 50, "stop": 0.75}}) == [
        "every"
    ]
    assert needs_a_version(old, {"version": 1, "defaults": {"every": 100}}) == ["stop"]
    assert needs_a_version(old, {"version": 2, "defaults": {"every": 50, "stop": 0.75}}) == []
    assert needs_a_version(old, {"version": 1, "defaults": old["defaults"] | {"new": 0}}) == []


def write_golden() -> None:
    old = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    new = described()
    for name, entry in old.items():
        if name in new and (changed := needs_a_version(entry, new[name])):
            raise SystemExit(f"{name}: other defaults ({', '.join(changed)}): raise its version.")
    GOLDEN.write_text(json.dumps(new, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()
