"""Methods that break the rules are caught, in words; ours keep them; files and packages are found.

The cheats stand in this file, which imports the harness: what `harness` says of them is left out.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

import methods
from bench import interface
from bench.conformance import CHECKS, SETTINGS, Setting, check_method
from bench.errors import UnknownName, UsageError
from methods import METHODS, get_method
from methods.api import Budget, Cadence, Phase, SparsityMethod, option
from methods.drop_grow import DropGrow
from methods.masking import MaskedMethod, PruneAtInit
from methods.parametrizations import MaskSTE, attach, bake
from methods.penalised import PenaltyMethod
from methods.sfp import SFP
from tests.bench.cells import ROOT, sparsebench

CONV, MLP, TIMM = (dataclasses.replace(setting, others=()) for setting in SETTINGS)
QUICK = (dataclasses.replace(CONV, steps=10),)
SHORT = (*QUICK, dataclasses.replace(TIMM, steps=2))


def broken(
    method: SparsityMethod | type[SparsityMethod], settings: tuple[Setting, ...] = QUICK
) -> list[str]:
    """What is broken, each with its check."""
    report = check_method(method, settings)
    assert not report.ok
    return [text for text in report.broken if not text.startswith("harness: ")]


def test_every_check_is_told_where_a_method_conforms():
    report = check_method(get_method("random")())
    assert report.ok, report.text
    assert [finding.check for finding in report.findings] == list(CHECKS)
    assert report.text.splitlines()[-1] == "RandomPruning conforms."
    assert "it trains to the end (conv net, MLP, timm resnet18)" in report.text
    assert "resume: a run cut in any phase goes on as if it had not been (conv net, MLP)" in (
        report.text
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_ours_conforms(name):
    report = check_method(get_method(name))
    assert report.ok, report.text


# Masks and counts.


@dataclass(frozen=True)
class NoProjection(PruneAtInit):
    """Prunes weights and momentum once, and lets decay and gradients bring them back."""

    def start_phase(self, run):
        super().start_phase(run)
        super().project(run.state)

    def project(self, state):
        pass

    def finish(self, run):
        super().project(run.state)
        super().finish(run)


def test_masks_that_are_not_applied_after_every_step():
    (text,) = broken(NoProjection)
    assert text.startswith("masks hold: conv1.weight has ")
    assert text.endswith(
        "non-zero weights outside its mask after step 2 (conv net, SGD with momentum and weight "
        "decay)"
    )


@dataclass(frozen=True)
class MasksGradientsOnly(NoProjection):
    """Momentum is clean and gradients are masked, but weights are not made zero."""

    def start_phase(self, run):
        PruneAtInit.start_phase(self, run)

    def edit_gradients(self, state):
        for name, mask in state.masks.items():
            state.weights[name].grad.mul_(mask)


def test_masked_gradients_are_not_enough():
    (text,) = broken(MasksGradientsOnly)
    assert "outside its mask after step 1" in text


@dataclass(frozen=True)
class OffByOne(PruneAtInit):
    def finish(self, run):
        super().finish(run)
        weight = run.state.weights["conv2.weight"]
        weight[tuple(weight.nonzero()[0])] = 0


def test_a_count_that_is_off_by_one():
    assert broken(OffByOne) == [
        "density exact: 142 are not zero of 1432 prunable weights, but 143 were asked for "
        "(density 0.1) (conv net, SGD with momentum and weight decay)"
    ]


@dataclass(frozen=True)
class OffInLargeNetworks(PruneAtInit):
    def prune(self, run, density):
        super().prune(run, density / 2 if len(run.state.masks) > 3 else density)


def test_a_density_that_is_wrong_on_one_network_only():
    (text,) = broken(OffInLargeNetworks, SHORT)
    assert text.startswith("density exact: ")
    assert text.endswith("(timm resnet18, SGD with momentum and weight decay)")


@dataclass(frozen=True)
class OffWhereSparse(PruneAtInit):
    def prune(self, run, density):
        super().prune(run, max(density, 0.05))


def test_a_density_that_is_wrong_only_where_it_is_low():
    (text,) = broken(OffWhereSparse, (dataclasses.replace(QUICK[0], others=(0.5, 0.02)),))
    assert "72 are not zero of 1432 prunable weights, but 29 were asked for (density 0.02)" in text


@dataclass(frozen=True)
class FewerMasks(PruneAtInit):
    """The network has the count asked for, the masks that others start from have not."""

    def finish(self, run):
        super().finish(run)
        next(iter(run.state.masks.values())).zero_()


def test_masks_that_say_something_else_than_the_weights():
    (text,) = broken(FewerMasks)
    assert "density exact: the masks keep " in text
    assert "but 143 were asked for" in text


@dataclass(frozen=True)
class HalfMasks(PruneAtInit):
    def start_phase(self, run):
        super().start_phase(run)
        for mask in run.state.masks.values():
            mask.mul_(0.5)


def test_masks_of_other_values():
    assert any("the mask of conv1.weight holds other values" in text for text in broken(HalfMasks))


@dataclass(frozen=True)
class PromisesNothing(PruneAtInit):
    """Keeps five times the weights, and says that nothing was promised."""

    def final_density(self, density):
        return None

    def prune(self, run, density):
        super().prune(run, 5 * density)


def test_a_density_that_the_cell_sets_is_not_the_methods_to_withdraw():
    assert broken(PromisesNothing) == [
        "density exact: 716 are not zero of 1432 prunable weights, but 143 were asked for "
        "(density 0.1) (conv net, SGD with momentum and weight decay)"
    ]


@dataclass(frozen=True)
class FewerFilters(SFP):
    def finish(self, run):
        super().finish(run)
        run.state.weights["conv2.weight"].zero_()


def test_a_count_of_filters_that_is_off():
    (text,) = broken(FewerFilters)
    assert text.startswith("density exact: ")
    assert "of 24 prunable filters, but 2 were asked for (density 0.1)" in text


# What the forward pass of training computes with.


def dense_buffers(model):
    return {name: tensor for name, tensor in model.named_buffers() if name.startswith("dense")}


@dataclass(frozen=True)
class DenseForward(PruneAtInit):
    """Between steps the masks hold; each forward pass begins by copying dense weights in."""

    def prepare(self, model, masks, input_shape):
        weights = super().prepare(model, masks, input_shape)
        for number, weight in enumerate(weights.values()):
            model.register_buffer(f"dense{number}", weight.detach().clone())
        self.listen(model, weights)
        return weights

    def listen(self, model, weights):
        def fill(network, inputs):
            if network.training:
                torch._foreach_copy_(
                    [weight.data for weight in weights.values()],
                    list(dense_buffers(network).values()),
                )

        model.register_forward_pre_hook(fill)

    def project(self, state):
        for weight, dense in zip(
            state.weights.values(), dense_buffers(state.model).values(), strict=True
        ):
            if weight.count_nonzero() > 0.9 * weight.numel():
                dense.copy_(weight)
        super().project(state)

    def finish(self, run):
        model = run.state.model
        model._forward_pre_hooks.clear()
        for name in dense_buffers(model):
            model._buffers.pop(name)
        super().finish(run)


@dataclass(frozen=True)
class DenseInside(DenseForward):
    """The module's own hooks put dense weights in, and take them out behind the pass."""

    def listen(self, model, weights):
        weight = weights["conv2.weight"]
        sparse = weight.detach().clone()

        def fill(module, inputs):
            if model.training:
                sparse.copy_(weight)
                weight.data.copy_(model.dense1)

        def clear(module, inputs, output):
            if model.training:
                weight.data.copy_(sparse)
                return output.clone()
            return None

        model.conv2.register_forward_pre_hook(fill)
        model.conv2.register_forward_hook(clear)

    def finish(self, run):
        super().finish(run)
        run.state.model.conv2._forward_pre_hooks.clear()
        run.state.model.conv2._forward_hooks.clear()


@dataclass(frozen=True)
class LaterForward(PruneAtInit):
    """Writes over a module's forward pass while it trains."""

    def start_phase(self, run):
        super().start_phase(run)
        conv = run.state.model.conv2
        dense = torch.randn_like(conv.weight)
        conv.forward = lambda x: nn.functional.conv2d(x, conv.weight + dense, None, 2, 1)

    def finish(self, run):
        super().finish(run)
        del run.state.model.conv2.forward


@dataclass(frozen=True)
class PassesModulesBy(PruneAtInit):
    """Computes with its own weights, and with no module of the network."""

    def start_phase(self, run):
        super().start_phase(run)
        model = run.state.model
        dense = torch.randn(3 * 16 * 16, 4)
        model.forward = lambda x: x.flatten(1) @ dense + sum(p.sum() for p in model.parameters())

    def finish(self, run):
        super().finish(run)
        del run.state.model.forward


@pytest.mark.parametrize(
    ("cheat", "words"),
    [
        (
            DenseForward,
            "conv1.weight has 113 non-zero weights outside its mask in the forward pass of step 1; "
            "the method has left a forward pre-hook on the network",
        ),
        (
            DenseInside,
            "conv2 computes something else than with conv2.weight in the forward pass of step 1; "
            "the method has left a forward hook on conv2",
        ),
        (
            LaterForward,
            "conv2 computes something else than with conv2.weight in the forward pass of step 1; "
            "the method has left another forward on conv2",
        ),
        (PassesModulesBy, "no training pass calls the module of conv1.weight"),
    ],
)
def test_a_forward_pass_of_training_that_is_not_sparse(cheat, words):
    found = broken(cheat)
    assert f"masks hold: {words} (conv net, SGD with momentum and weight decay)" in found


# What nobody counts.


@dataclass(frozen=True)
class Rewired(DropGrow):
    """What `unmetered` cheats do in each update, of which a run of 10 steps has 7."""

    every: int = 1

    def update(self, run):
        images, _ = next(iter(run.batches(1)))
        for _ in range(5):
            self.compute(run, images)
        super().update(run)

    def compute(self, run, images):
        """Nothing more."""


class ByModel:
    def compute(self, run, images):
        run.state.model(images)


class ByForward:
    def compute(self, run, images):
        run.state.model.eval()
        run.state.model.forward(images)
        run.state.model.train()


class OneByOne:
    def compute(self, run, images):
        run.state.model(images[3:4])


@pytest.mark.parametrize("how", [ByModel, ByForward, OneByOne])
def test_forward_passes_on_data_that_are_not_metered(how):
    cheat = dataclass(frozen=True)(type("Cheat", (how, Rewired), {}))
    assert broken(cheat) == [
        "metered: it computes 35 forward passes that nobody meters (conv net, SGD with momentum "
        "and weight decay)"
    ]


class Metered:
    def compute(self, run, images):
        run.logits(images)


class WithoutData:
    def compute(self, run, images):
        run.state.model.eval()
        run.state.model(torch.ones(1, *run.input_shape))
        run.state.model.train()


@pytest.mark.parametrize("how", [Metered, WithoutData])
def test_forward_passes_that_the_meter_has_or_that_see_no_data_are_fine(how):
    found = check_method(dataclass(frozen=True)(type("Fine", (how, Rewired), {})), QUICK)
    assert [text for text in found.broken if not text.startswith("harness: ")] == []


@dataclass(frozen=True)
class TwoPasses(PruneAtInit):
    """A hook on the network computes each step twice."""

    def prepare(self, model, masks, input_shape):
        inside = []

        def again(network, inputs):
            if network.training and not inside:
                inside.append(True)
                network(*inputs)
                inside.clear()

        model.register_forward_pre_hook(again)
        return super().prepare(model, masks, input_shape)

    def finish(self, run):
        super().finish(run)
        run.state.model._forward_pre_hooks.clear()


def test_a_hook_on_the_network_that_computes_more():
    assert "metered: it computes 10 forward passes that nobody meters" in " ".join(
        broken(TwoPasses)
    )


# State that a checkpoint does not have.


@dataclass(frozen=True)
class StateOnMethod(PruneAtInit):
    def start_phase(self, run):
        super().start_phase(run)
        object.__setattr__(self, "scale", float(next(iter(run.state.weights.values())).abs().sum()))

    def edit_gradients(self, state):
        scale = getattr(self, "scale", 1.0)
        for weight in state.weights.values():
            weight.grad.mul_(scale)


def test_state_on_the_method():
    (text,) = broken(StateOnMethod)
    assert "resume: cut after step 7 of 10 and resumed, it ends with another model " in text
    assert "kept outside TrainState: attribute 'scale' of the method" in text


STEPS: dict[str, int] = {}


@dataclass(frozen=True)
class StateInGlobal(PruneAtInit):
    def start_phase(self, run):
        super().start_phase(run)
        STEPS["done"] = 0

    def edit_gradients(self, state):
        STEPS["done"] += 1
        for weight in state.weights.values():
            weight.grad.div_(STEPS["done"])


def test_state_in_a_global():
    (text,) = broken(StateInGlobal)
    assert "resumed, it ends with another" in text
    assert text.startswith("resume: cut after step 7 of 10")
    assert "kept outside TrainState: global STEPS" in text


KEPT: dict[str, torch.Tensor] = {}


@dataclass(frozen=True)
class ConstantInGlobal(PruneAtInit):
    """What it keeps is the same in every run of this cell, but a new process does not have it."""

    def start_phase(self, run):
        super().start_phase(run)
        KEPT["start"] = next(iter(run.state.weights.values())).clone()

    def edit_gradients(self, state):
        next(iter(state.weights.values())).grad.add_(KEPT["start"])


def test_a_constant_in_a_global_is_no_better():
    (text,) = broken(ConstantInGlobal)
    assert text.startswith("resume: cut after step 7 of 10 and resumed, it ends with another")
    assert "kept outside TrainState: global KEPT" in text


@dataclass(frozen=True)
class StateOnParameter(PruneAtInit):
    def start_phase(self, run):
        super().start_phase(run)
        for weight in run.state.weights.values():
            weight.first = weight.detach().clone()

    def edit_gradients(self, state):
        for weight in state.weights.values():
            weight.grad.add_(weight.first, alpha=1e-3)


def test_state_on_a_parameter():
    (text,) = broken(StateOnParameter)
    assert "resumed, it raises AttributeError: 'Parameter' object has no attribute 'first'" in text
    assert "(test_conformance.py:" in text
    assert "kept outside TrainState: attribute 'first' of the parameter " in text


@dataclass(frozen=True)
class NumberInSlot(PruneAtInit):
    def start_phase(self, run):
        super().start_phase(run)
        run.state.slots["number"] = {"of steps": 3}


def test_a_slot_that_is_no_tensor():
    assert any(
        "slots['number']['of steps'] is a int, and no tensor" in t for t in broken(NumberInSlot)
    )


@dataclass(frozen=True)
class TensorForSlot(PruneAtInit):
    def start_phase(self, run):
        super().start_phase(run)
        run.state.slots["mean"] = torch.zeros(3)


def test_a_slot_that_is_no_dict():
    assert any(
        "slots['mean'] is a Tensor; allowed: a dict of tensors by name" in text
        for text in broken(TensorForSlot)
    )


@pytest.mark.parametrize("period", [2, 3, 4, 5])
def test_state_in_the_groups_of_the_optimizer(period):
    @dataclass(frozen=True)
    class CountsInGroup(DropGrow):
        every: int = 1

        def optimizer(self, weights, others, lr, settings):
            made = super().optimizer(weights, others, lr, settings)
            made.param_groups[0]["count"] = 0
            return made

        def update(self, run):
            group = run.state.optimizer.param_groups[0]
            group["count"] += 1
            if group["count"] % period == 0:
                super().update(run)

    named, cut = broken(CountsInGroup, (CONV,))
    assert named.startswith(
        "resume: param_groups[0]['count'] of the optimizer changes: state outside TrainState"
    )
    assert cut.startswith("resume: cut after step ")


def test_state_that_joins_a_group_later_is_told_too():
    # Optimizers do that, so it is saved; a method's own state belongs elsewhere all the same.
    @dataclass(frozen=True)
    class JoinsGroup(DropGrow):
        every: int = 1

        def update(self, run):
            group = run.state.optimizer.param_groups[0]
            group["count"] = group.get("count", 0) + 1
            if group["count"] % 2 == 0:
                super().update(run)

    (named,) = broken(JoinsGroup, (CONV,))
    assert "param_groups[0]['count'] of the optimizer changes" in named


@dataclass(frozen=True)
class OwnRate(PruneAtInit):
    def optimizer(self, weights, others, lr, settings):
        return super().optimizer(weights, others, lr.clone(), settings)


@dataclass(frozen=True)
class OwnRateLater(PruneAtInit):
    def start_phase(self, run):
        super().start_phase(run)
        run.state.optimizer.param_groups[0]["lr"] = torch.tensor(0.003)


def test_a_learning_rate_that_is_not_the_recipes():
    (text,) = broken(OwnRate)
    assert text.startswith(
        "interface: optimizer has a learning rate of its own; every group's lr must be the tensor"
    )
    assert any("param_groups[0]['lr'] of the optimizer changes" in t for t in broken(OwnRateLater))


# Structure and tensors.


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@dataclass(frozen=True)
class SwappedModule(PruneAtInit):
    def prepare(self, model, masks, input_shape):
        swapped = Doubled(16, 4)
        swapped.load_state_dict(model.classifier.state_dict())
        model.classifier = swapped
        return super().prepare(model, masks, input_shape)


@dataclass(frozen=True)
class LeftParametrization(MaskedMethod):
    def plan(self, budget: Budget, density: float | None):
        return (Phase("train", budget.steps, density=density),)

    def prepare(self, model, masks, input_shape):
        return {name: attach(model, name, MaskSTE(mask)) for name, mask in masks.items()}


@dataclass(frozen=True)
class LeftBuffer(PruneAtInit):
    def prepare(self, model, masks, input_shape):
        model.conv1.register_buffer("mask", masks["conv1.weight"])
        return super().prepare(model, masks, input_shape)


@dataclass(frozen=True)
class LeftForward(PruneAtInit):
    def finish(self, run):
        super().finish(run)
        run.state.model.conv1.forward = lambda x: 2 * nn.Conv2d.forward(run.state.model.conv1, x)


@pytest.mark.parametrize(
    ("cheat", "words"),
    [
        (SwappedModule, "classifier is a Doubled, in the plain network a Linear"),
        (LeftParametrization, "conv1 is a ParametrizedConv2d, in the plain network a Conv2d"),
        (LeftBuffer, "a tensor conv1.mask is left that the plain network does not have"),
        (LeftForward, "it computes something else than the plain network with the same tensors"),
    ],
)
def test_structure_that_is_left_changed(cheat, words):
    found = [text for text in broken(cheat) if not text.startswith("masks hold: classifier ")]
    assert {text.partition(":")[0] for text in found} == {"plain network"}
    assert f"plain network: {words} (conv net, SGD with momentum and weight decay)" in found


@dataclass(frozen=True)
class MeasuredTooEarly(LeftParametrization):
    def plan(self, budget: Budget, density: float | None):
        half = budget.steps // 2
        return (
            Phase("first", half, (0.0, 0.5), density=density, measured=True),
            Phase("second", half, (0.5, 1.0)),
        )

    def finish(self, run):
        super().finish(run)
        bake(run.state.model)


def test_a_measured_phase_that_does_not_end_with_the_plain_network():
    (text,) = broken(MeasuredTooEarly)
    assert text.startswith("plain network: the measured phase 'first' ends with another one")


@dataclass(frozen=True)
class ReplacesMasks(PruneAtInit):
    def project(self, state):
        for name, mask in state.masks.items():
            state.masks[name] = mask.clone()
        super().project(state)


@dataclass(frozen=True)
class ReplacesData(PruneAtInit):
    def project(self, state):
        for name, weight in state.weights.items():
            weight.data = weight.data * state.masks[name]


@pytest.mark.parametrize(
    ("cheat", "name"), [(ReplacesMasks, "mask conv1.weight"), (ReplacesData, "weight conv1.weight")]
)
def test_tensors_that_are_replaced(cheat, name):
    found = broken(cheat)
    assert any(
        text.startswith(f"same tensors: after step 1 another tensor stands for the {name}, ")
        and "write in place" in text
        for text in found
    )


# Chance.


def by_numpy(run):
    return np.random.rand()  # noqa: NPY002  what the cheat does


def by_random(run):
    return random.random()


def by_time(run):
    return time.perf_counter() % 1


@pytest.mark.parametrize("source", [by_numpy, by_random, by_time], ids=lambda s: s.__name__)
def test_chance_that_is_not_the_runs(source):
    @dataclass(frozen=True)
    class ByChance(PruneAtInit):
        def scores(self, run):
            scores = super().scores(run)
            return {name: (score * (1000 * source(run))) % 1 for name, score in scores.items()}

    (text,) = broken(ByChance)
    assert text.startswith("same twice: trained again, the same cell differs in model ")


def test_chance_of_the_run_is_fine():
    report = check_method(get_method("random")(), QUICK)
    assert report.ok, report.text


# Errors, words, and what hooks return.


@dataclass(frozen=True)
class FailsInUpdate(PruneAtInit):
    def plan(self, budget: Budget, density: float | None):
        return (Phase("train", budget.steps, density=density, updates=Cadence(4, start=4)),)

    def update(self, run):
        raise ValueError("a score is missing,\nthat of conv1")


def test_an_error_is_a_finding_with_its_line():
    found = broken(FailsInUpdate, (*QUICK, MLP))
    line = FailsInUpdate.update.__code__.co_firstlineno + 1
    error = "runs: it raises ValueError: a score is missing, that of conv1"
    assert found == [
        f"{error} (test_conformance.py:{line}) (conv net, SGD with momentum and weight decay)",
        f"{error} (test_conformance.py:{line}) (MLP, Adam with weight decay)",
    ]


@dataclass(frozen=True)
class Diverges(PruneAtInit):
    def edit_gradients(self, state):
        for weight in state.weights.values():
            weight.grad.fill_(float("inf"))


def test_numbers_that_are_not_finite():
    (text,) = broken(Diverges)
    assert text.startswith("runs: it leaves the finite numbers: the loss of step 2 of 10 is not")


@dataclass(frozen=True)
class Prints(PruneAtInit):
    def start_phase(self, run):
        super().start_phase(run)
        print("density", run.density)


def test_a_method_that_prints(capsys):
    assert broken(Prints) == ["silent: it prints, such as 'density 0.1'"]
    assert capsys.readouterr().out == ""


@dataclass(frozen=True)
class PrintsBehind(PruneAtInit):
    def start_phase(self, run):
        super().start_phase(run)
        print("density", run.density, file=sys.__stdout__)


def test_a_method_that_prints_to_the_stream_of_the_process(capfd):
    before = sys.__stdout__
    assert broken(PrintsBehind) == ["silent: it prints, such as 'density 0.1'"]
    assert capfd.readouterr().out == ""
    assert sys.__stdout__ is before


class Resets:
    def scores(self, harness):
        harness.cursor.train_seconds = 0.0
        return super().scores(harness)


class Asks:
    def scores(self, harness):
        getattr(harness, "cur" + "sor", None)
        return super().scores(harness)


class Unwraps:
    def scores(self, harness):
        return super().scores(harness.batches.__self__)


@pytest.mark.parametrize("how", [Resets, Asks])
def test_a_method_that_asks_its_run_for_more_by_another_name(how):
    report = check_method(dataclass(frozen=True)(type("Cheat", (how, PruneAtInit), {})), QUICK)
    line = how.scores.__code__.co_firstlineno + 1
    assert (
        "harness: it asks its run for 'cursor', which methods.api.Run does not have "
        f"(test_conformance.py:{line})"
    ) in report.broken
    assert not report.ok


def test_the_trainer_is_not_behind_the_runs_functions():
    (text,) = broken(dataclass(frozen=True)(type("Cheat", (Unwraps, PruneAtInit), {})))
    assert "AttributeError: 'function' object has no attribute '__self__'" in text


@dataclass(frozen=True)
class LooksAtTest(PruneAtInit):
    def start_phase(self, run):
        super().start_phase(run)
        len(sys._getframe(1).f_locals["run"].data.test.labels)  # of what calls it


def test_a_method_that_looks_at_the_test_images():
    line = LooksAtTest.start_phase.__code__.co_firstlineno + 2
    assert broken(LooksAtTest) == [
        f"no test data: it asks for the test images (test_conformance.py:{line})"
    ]


def returning(hook: str, value: object) -> SparsityMethod:
    """A method of which one hook returns something."""
    made = type("Returning", (PruneAtInit,), {hook: lambda *_, **__: value})
    return dataclass(frozen=True)(made)()


@pytest.mark.parametrize(
    ("hook", "value", "words"),
    [
        ("plan", None, "plan returns a NoneType; allowed: a tuple of Phase"),
        ("plan", [Phase("train", 3)], "plan returns a list of Phase; allowed: a tuple of Phase"),
        ("plan", ("train", 3), "plan returns a tuple of str; allowed: a tuple of Phase"),
        ("plan", (Phase("train", 0),), "plan: the plan has no step to train"),
        ("plan", (Phase("a", 1), Phase("a", 1)), "plan: phases must have different names"),
        (
            "plan",
            (Phase("a", 1, rewind_to="start"),),
            "plan: phase 'a': rewind_to = 'start'; saved before it: nothing",
        ),
        ("prunable", "conv1.weight", "prunable returns a str; allowed: a tuple of names"),
        (
            "prunable",
            ("conv3.weight",),
            "prunable returns 'conv3.weight', which is no parameter of the network",
        ),
        ("prepare", None, "prepare returns a NoneType; allowed: a dict with exactly the keys of"),
        (
            "prepare",
            MappingProxyType({"conv1.weight": torch.zeros(3)}),
            "prepare returns a mappingproxy; allowed: a dict with exactly the keys of masks",
        ),
        ("optimizer", None, "optimizer returns a NoneType; allowed: a torch.optim.Optimizer"),
        ("penalty", 0.1, "penalty returns a float; allowed: None or a tensor of shape ()"),
        ("penalty", torch.zeros(2), "penalty returns a Tensor of shape (2,); allowed: None or"),
    ],
)
def test_hooks_that_return_something_else(hook, value, words):
    (text,) = broken(returning(hook, value))
    assert text.startswith(f"interface: {words}")
    assert text.endswith("(conv net, SGD with momentum and weight decay)")


class Undecorated(PruneAtInit):
    pass


@dataclass(frozen=True)
class NeedsAnOption(PruneAtInit):
    share: float = dataclasses.field(kw_only=True)


@dataclass(frozen=True)
class Neither(PruneAtInit):
    controls = "layers"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Undecorated, "Undecorated is not decorated with @dataclass(frozen=True)"),
        (NeedsAnOption, "NeedsAnOption() raises TypeError: "),
        (Neither, "controls = 'layers'; allowed: none, density, filters, penalty"),
        (dict, "<class 'dict'> is no subclass of methods.api.SparsityMethod"),
    ],
)
def test_classes_that_are_no_methods(kind, words):
    found = broken(kind)
    assert found[0].startswith(f"interface: {words}")
    assert "runs" not in {finding.check for finding in check_method(kind, QUICK).findings}


# What cannot be checked.


@dataclass(frozen=True)
class NeedsMore(PruneAtInit):
    least: int = option(100, "[1, inf)")

    def plan(self, budget: Budget, density: float | None):
        if budget.steps < self.least:
            raise ValueError(f"a budget of at least {self.least} steps")
        return super().plan(budget, density)


def test_a_method_that_needs_something_else_is_not_called_broken_and_does_not_conform():
    report = check_method(NeedsMore(), QUICK)
    assert not [text for text in report.broken if not text.startswith("harness: ")]
    assert not report.ok
    assert "not checked  runs: the method needs something else: a budget of at least 100" in (
        report.text
    )
    assert check_method(NeedsMore(least=5), QUICK).broken == report.broken  # its options are kept
    assert any(f.check == "runs" and f.ok for f in check_method(NeedsMore(least=5), QUICK).findings)


def test_a_network_without_a_weight_to_prune_is_left_out():
    report = check_method(SFP(), (*QUICK, MLP))
    assert report.ok, report.text
    assert (
        "not checked  runs: prunable = 'all' leaves TinyMLP no weight that SFP can" in report.text
    )


@dataclass(frozen=True)
class Shrinks(PenaltyMethod):
    price: float = option(1e-3, "[0, inf)")

    def penalty(self, state):
        return self.price * sum(weight.abs().sum() for weight in state.weights.values())

    def importance(self, run):
        return {name: weight.abs() for name, weight in run.state.weights.items()}


def test_a_penalty_promises_no_density_but_with_a_target():
    report = check_method(Shrinks(), QUICK)
    assert "not checked  density exact: nothing was promised: controls = 'penalty'" in report.text
    landed = check_method(Shrinks(target=0.8), QUICK)
    assert "holds        density exact: " in landed.text


def test_the_random_stream_of_the_process_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_method(get_method("random")(), QUICK)
    assert torch.equal(torch.get_rng_state(), before)


# Files and packages.

PLAIN = """
from dataclasses import dataclass
from methods.masking import PruneAtInit

@dataclass(frozen=True)
class Plain(PruneAtInit):
    '''Keeps the largest.'''
"""


def test_a_file_that_knows_the_harness(tmp_path):
    (tmp_path / "knows.py").write_text(
        "from bench import seeds\nimport models.lenet\n"
        f"{PLAIN}\n    def finish(self, run):\n        run.stream.batch(0)\n"
    )
    found = check_method(interface.load(str(tmp_path / "knows.py")), QUICK).broken
    assert found == (
        "harness: it imports bench (knows.py:1)",
        "harness: it imports models.lenet (knows.py:2)",
        "harness: it asks its run for 'stream', which methods.api.Run does not have (knows.py:12)",
    )


def test_a_file_that_names_the_harness_in_a_string(tmp_path):
    (tmp_path / "names.py").write_text(
        f"import sys, importlib\n{PLAIN}\n    def finish(self, run):\n"
        '        sys.modules["bench.datasets"]\n'
        '        importlib.import_module("bench.data")\n'
    )
    assert check_method(interface.load(str(tmp_path / "names.py")), QUICK).broken == (
        "harness: it names 'bench.datasets' in sys.modules (names.py:11)",
        "harness: it names 'bench.data' in importlib.import_module (names.py:12)",
    )


def test_a_file_that_comes_with_others(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("SHARE = 0.5\n")
    (tmp_path / "mine.py").write_text(f"from helper_of_mine import SHARE\n{PLAIN}")
    before = list(sys.path)
    assert interface.load(str(tmp_path / "mine.py")).__name__ == "Plain"
    assert sys.path == before
    del sys.modules["helper_of_mine"]


def test_a_file_of_several_methods_is_asked_for_by_class(tmp_path):
    file = tmp_path / "two.py"
    file.write_text(PLAIN + PLAIN.replace("Plain", "Other"))
    assert interface.load(f"{file}:Other").__name__ == "Other"
    with pytest.raises(
        UsageError, match=r"two.py holds 2 methods \(Plain, Other\); name one, such"
    ):
        interface.load(str(file))
    with pytest.raises(UnknownName, match=r"no such method: 'Plane'. Did you mean 'Plain'\?"):
        interface.load(f"{file}:Plane")
    with pytest.raises(UnknownName):  # imported, not defined there
        interface.load(f"{file}:PruneAtInit")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds 0 methods."),
        ("x = 1\ny = =\n", r"cannot be imported, it raises SyntaxError: .* \(bad.py:2\)"),
        ("x = 1\n\nraise OSError('no\\nway')", r"it raises OSError: no way \(bad.py:3\)"),
    ],
)
def test_files_without_a_method(text, words, tmp_path):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UsageError, match=words):
        interface.load(str(tmp_path / "bad.py"))
    with pytest.raises(UsageError, match=r"none.py: no such file"):
        interface.load(str(tmp_path / "none.py"))


def test_a_method_of_a_package_is_found_by_its_name(package, call):
    assert methods.find_info("plain") is None
    package(PLAIN, plain="outside_methods:Plain")
    assert methods.names() == [*METHODS, "plain"]
    assert "outside_methods" not in sys.modules  # nothing is loaded before it is asked for
    assert get_method("plain").__name__ == "Plain"
    info = methods.find_info("plain")
    assert (info.target, info.controls, info.summary) == (
        "outside_methods:Plain",
        "density",
        "Keeps the largest.",
    )
    assert methods.find_info("rigl") is METHODS["rigl"]
    rows = json.loads(call("list", "methods", "--json").out)
    assert next(row for row in rows if row["name"] == "plain") == {
        "name": "plain",
        "paper": "",
        "controls": "density",
        "summary": "Keeps the largest.",
    }


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("outside_methods:None", "no attribute 'None'"),
        ("missing_module:Plain", "cannot be loaded from missing_module:Plain (ModuleNotFound"),
        ("outside_methods:dataclass", "is no subclass of methods.api.SparsityMethod"),
    ],
)
def test_a_package_whose_method_cannot_be_used_says_so(target, words, package, call):
    package(PLAIN, plain=target)
    with pytest.raises(ValueError, match="method 'plain' of outside") as caught:
        methods.find_info("plain")
    assert words in str(caught.value)
    assert words in call("list", "methods").out  # the list goes on
    outcome = call("conform", "plain")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("sparsebench: method 'plain' of outside")


def test_names_of_ours_win(package, call):
    package(PLAIN, rigl="outside_methods:Plain")
    assert methods.names() == list(METHODS)
    assert get_method("rigl").__name__ == "RigL"
    assert call("list", "methods").err == (
        "sparsebench: method 'rigl' of outside is not used: the table has one of that name.\n"
    )


def test_two_packages_with_one_name_are_named(package):
    package(PLAIN, "outside", plain="outside_methods:Plain")
    package(PLAIN, "others", plain="outside_methods:Plain")
    with pytest.raises(ValueError, match=r"is offered by o.* too: uninstall one of them"):
        get_method("plain")


# The command line.


@pytest.fixture
def quick(monkeypatch):
    """`conform` on the smallest cell."""
    monkeypatch.setattr(check_method, "__defaults__", (QUICK,))


@pytest.mark.usefixtures("quick")
def test_conform_by_name_and_file(call, tmp_path):
    named = call("conform", "random")
    assert (named.status, named.err) == (0, "")
    assert named.out.splitlines()[-1] == "RandomPruning conforms."
    (tmp_path / "mine.py").write_text(PLAIN)
    assert call("conform", "mine.py").out.splitlines()[-1] == "Plain conforms."
    (tmp_path / "mine.py").write_text(f"{PLAIN}\n    def project(self, state):\n        pass\n")
    wrong = call("conform", "./mine.py:Plain")
    assert (wrong.status, wrong.err) == (1, "")
    assert "\nBROKEN       masks hold: conv1.weight has " in wrong.out
    assert wrong.out.splitlines()[-1] == "Plain does not conform."
    found = json.loads(call("conform", "mine.py", "--json").out)
    assert (found["method"], found["ok"]) == ("Plain", False)
    assert {"check", "ok", "text"} == found["findings"][0].keys()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rgil", "no such method: 'rgil'. Did you mean 'rigl'?"),
        ("mine.py", "mine.py: no such file."),
        ("random_pruning", "no such method: 'random_pruning'."),
    ],
)
def test_what_cannot_be_found_is_status_2(name, words, call):
    outcome = call("conform", name)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"sparsebench: {words}")
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.usefixtures("quick")
def test_a_new_method_conforms_as_it_is_and_with_scores_of_its_own(call, tmp_path):
    made = call("new", "method", "my_method")
    assert made.status == 0
    assert "sparsebench conform ./my_method.py" in made.out
    assert 'my_method = "my_method:MyMethod"' in made.out
    text = (tmp_path / "my_method.py").read_text()
    assert call("conform", "./my_method.py").status == 0
    noise = text.replace("from methods.masking import PruneAtInit", "from methods.masking import *")
    noise = noise.replace(
        "return {name: weight.detach().abs() for name, weight in run.state.weights.items()}",
        "return random_scores(run)",
    )
    assert noise.count("random_scores") == 1
    (tmp_path / "my_method.py").write_text(noise)
    outcome = call("conform", "./my_method.py")
    assert outcome.status == 0, outcome.out


def run_pytest(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_test_of_a_new_method_passes_in_a_clone_and_elsewhere(call, tmp_path):
    clone = tmp_path / "clone"
    (clone / "tests" / "papers").mkdir(parents=True)
    for package_of_ours in ("methods", "bench", "models"):
        (clone / package_of_ours).mkdir()
        for file in (ROOT / package_of_ours).glob("*.py"):
            (clone / package_of_ours / file.name).symlink_to(file)
    for name in ("__init__.py", "tiny.py"):
        (clone / "tests" / name).symlink_to(ROOT / "tests" / name)
    made = call("new", "method", "my_method", "--to", "clone")
    assert made.status == 0, made.err
    assert "Add this line to METHODS in methods/__init__.py" in made.out
    assert 'MethodInfo("my_method:MyMethod", "", "density", ' in made.out
    run_pytest(clone, "tests/papers/test_my_method.py")

    assert call("new", "method", "my_method", "--to", "elsewhere").status == 0
    run_pytest(tmp_path / "elsewhere", "test_my_method.py")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("My-Method", "'My-Method' is no name for a method; give small letters"),
        ("2nd", "'2nd' is no name"),
        ("class", "'class' is no name"),
        ("rigl", "there is a method 'rigl' already"),
        ("small_dense", "there is a method 'small_dense' already"),
        ("torch", "there is a module 'torch' already"),
    ],
)
def test_names_that_a_new_method_cannot_have(name, words, call, tmp_path):
    outcome = call("new", "method", name)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"sparsebench: {words}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["mine.py", "test_mine.py"])
def test_nothing_is_written_over(taken, call, tmp_path):
    (tmp_path / taken).write_text("precious")
    outcome = call("new", "method", "mine")
    assert outcome.status == 2
    assert f"{taken} is there already; nothing was written." in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "precious"


def test_conform_as_a_user_types_it(tmp_path):
    process = sparsebench("conform", "random", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[-1] == "RandomPruning conforms."
