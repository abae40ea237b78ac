"""Lin et al., 2020, arXiv:2006.07253: dynamic pruning with feedback."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parametrize

from bench.data import BatchStream
from bench.errors import SuiteError
from bench.resolve import make_method
from methods.allocation import allocate, keep_count
from methods.api import Budget, Cadence
from methods.dpf import DPF
from tests.tiny import (
    TINY_RECIPE,
    FakeRun,
    copied,
    hand_state,
    nonzero,
    tiny_data,
    tiny_model,
    tiny_trainer,
    train,
    watch_updates,
)

PLAIN_SGD = dataclasses.replace(TINY_RECIPE, momentum=0.0, nesterov=False, weight_decay=0.0)


def stopped_at(trainer, step):
    """Trains some steps; returns the iterator that goes on."""
    run = trainer.run()
    while next(run) < step:
        pass
    return run


def top(magnitudes: np.ndarray, keep: int) -> np.ndarray:
    mask = np.zeros(magnitudes.size, np.float32)
    mask[np.argsort(-magnitudes, kind="stable")[:keep]] = 1
    return mask


def flattened(tensors) -> np.ndarray:
    return np.concatenate([tensors[name].detach().numpy().reshape(-1) for name in tensors])


def masked_gradients(trainer, weights, images, labels):
    """dL/d(w m) of the plain network at the masked weights, by autograd."""
    masked = {
        name: (weight * trainer.state.masks[name]).requires_grad_()
        for name, weight in weights.items()
    }
    network = tiny_model("conv")
    others = {
        name: parameter.detach()
        for name, parameter in trainer.state.model.named_parameters()
        if "parametrizations" not in name
    }
    loss = functional.cross_entropy(functional_call(network, masked | others, (images,)), labels)
    return dict(zip(masked, torch.autograd.grad(loss, list(masked.values())), strict=True))


def test_a_masked_weight_moves_by_its_gradient_at_the_masked_network():
    # Eq. 2: w <- w - lr g(m w), for all w. Plain SGD at 0.05; steps 20 to 23 see no ranking.
    trainer = tiny_trainer("dpf", model="conv", density=0.2, recipe=PLAIN_SGD, steps=320)
    run = stopped_at(trainer, 20)
    for step in (20, 21, 22):
        before = copied(trainer.state.weights)
        images, labels = trainer.stream.batch(step)
        gradients = masked_gradients(trainer, before, images, labels)
        next(run)
        for name, weight in trainer.state.weights.items():
            expected = before[name] - 0.05 * gradients[name]
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-7)
            off = trainer.state.masks[name] == 0
            assert off.any()
            assert float((weight.detach() - before[name])[off].abs().mean()) > 1e-5


def test_the_forward_pass_ignores_masked_weights_whatever_their_value():
    trainer = tiny_trainer("dpf", model="conv", density=0.2, steps=64)
    stopped_at(trainer, 20)
    state = trainer.state
    state.model.eval()
    images, _ = trainer.stream.batch(3)
    with torch.no_grad():
        before = state.model(images)
        for name, weight in state.weights.items():
            weight[state.masks[name] == 0] += 1000
        assert torch.equal(state.model(images), before)
        for name, weight in state.weights.items():
            weight[state.masks[name] == 1] += 1
        assert not torch.equal(state.model(images), before)


@pytest.mark.parametrize("decay", ["dense", "masked"])
def test_momentum_and_weight_decay_reach_masked_weights(decay):
    # Nesterov 0.9 with decay 0.05 on the dense weight: d = g + 0.05 w, v <- 0.9 v + d,
    # w <- w - 0.05 (d + 0.9 v). On the masked weight, d = g + 0.05 m w.
    recipe = dataclasses.replace(TINY_RECIPE, weight_decay=0.05)
    trainer = tiny_trainer(DPF(decay=decay), model="conv", density=0.2, recipe=recipe, steps=64)
    run = stopped_at(trainer, 20)
    state = trainer.state
    before = copied(state.weights)
    memory = {
        n: state.optimizer.state[w]["momentum_buffer"].clone() for n, w in state.weights.items()
    }
    gradients = masked_gradients(trainer, before, *trainer.stream.batch(20))
    next(run)
    for name, weight in state.weights.items():
        decayed = before[name] * (state.masks[name] if decay == "masked" else 1)
        step = gradients[name] + 0.05 * decayed
        velocity = 0.9 * memory[name] + step
        expected = before[name] - 0.05 * (step + 0.9 * velocity)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-7)
        assert memory[name][state.masks[name] == 0].any()


def test_adamw_does_not_decay_masked_weights_by_the_gradient_and_is_refused():
    changes = {"optimizer": "adamw", "momentum": 0.0, "nesterov": False}
    recipe = dataclasses.replace(TINY_RECIPE, **changes)
    with pytest.raises(ValueError, match=r"decay = 'masked' is for .* not 'adamw'"):
        tiny_trainer(DPF(decay="masked"), recipe=recipe)
    train(tiny_trainer(DPF(), recipe=recipe, steps=3))


@pytest.mark.parametrize("every", [3, 4])
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_a_whole_run_is_algorithm_1(model, every):
    # 80 steps; the ramp ends at the second drop, 60, in levels of 60 // 20 = 3 steps. Reference:
    # dense weights w; every `every` steps the mask keeps the largest (1 - s) of them, with
    # s = 0.9 (1 - (1 - level / 60)^3); the gradient is taken at m w and SGD moves w.
    trainer = tiny_trainer(DPF(every=every), model=model, steps=80)
    network = tiny_model(model)
    names = list(trainer.state.masks)
    weights = {name: network.get_parameter(name) for name in names}
    lr = torch.tensor(0.05)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    stream = BatchStream(tiny_data(), TINY_RECIPE, 0, "order")

    def rank(step):
        level = min(step // 3 * 3, 60)
        density = 1 - 0.9 * (1 - (1 - level / 60) ** 3)
        flat = np.abs(flattened(weights))
        mask = torch.from_numpy(top(flat, int(density * flat.size + 0.5)))
        parts = mask.split([weight.numel() for weight in weights.values()])
        return {n: part.view(weights[n].shape) for n, part in zip(names, parts, strict=True)}

    run = trainer.run()
    for step in range(80):
        if step % every == 0:
            masks = rank(step)
        lr.fill_(0.05 if step < 40 else 0.005 if step < 60 else 0.0005)
        dense = copied(weights)
        with torch.no_grad():
            for name in names:
                weights[name].mul_(masks[name])
        images, labels = stream.batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        with torch.no_grad():
            for name in names:
                weights[name].copy_(dense[name])
        optimizer.step()
        next(run)
        for name in names:
            assert torch.equal(trainer.state.masks[name], masks[name]), (step, name)
            torch.testing.assert_close(
                trainer.state.weights[name], weights[name], rtol=1e-5, atol=1e-7
            )
    assert next(run, None) is None
    masks = rank(80)
    for name, value in trainer.state.model.state_dict().items():
        expected = network.state_dict()[name] * masks.get(name, 1)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_the_mask_is_ranked_every_sixteen_steps_to_the_end():
    trainer = tiny_trainer("dpf", steps=320)
    log = watch_updates(trainer)
    masks = []
    for _ in trainer.run():
        masks.append(copied(trainer.state.masks))
    assert [update.step for update in log] == list(range(0, 320, 16))
    # Seen from outside: masks change before these steps at most, and after the ramp (240) still do.
    changes = {
        step
        for step in range(1, 319)
        if any(not torch.equal(masks[step][n], masks[step - 1][n]) for n in masks[step])
    }
    assert changes <= set(range(16, 320, 16))
    assert changes >= set(range(16, 256, 16))


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (11, 1), (44, 2), (319, 15)])
def test_a_short_run_is_ranked_twenty_times(steps, every):
    (phase,) = DPF().plan(Budget(steps, 11, 300, ()), 0.1)
    assert phase.updates == Cadence(every)


def test_a_run_of_few_steps_is_more_than_one_shot_pruning():
    trainer = tiny_trainer("dpf", steps=11)
    log = watch_updates(trainer)
    train(trainer)
    left = [sum(nonzero(update.masks).values()) for update in log]
    total = sum(mask.numel() for mask in trainer.state.masks.values())
    assert len(left) == 11
    assert left == sorted(left, reverse=True)
    assert (left[0], left[-1]) == (total, keep_count(total, 0.1))


def test_ranking_takes_the_largest_dense_weights_and_writes_masks_alone():
    trainer = tiny_trainer("dpf", model="conv", steps=100)
    log = watch_updates(trainer)
    train(trainer)
    for update in log:
        assert all(torch.equal(update.weights[n], w) for n, w in update.old_weights.items())
        flat = np.abs(flattened(update.weights))
        found = flattened(update.masks)
        np.testing.assert_array_equal(found, top(flat, int(found.sum())))


def test_pruned_weights_return_with_the_value_they_have_had_since():
    recipe = dataclasses.replace(TINY_RECIPE, lr=0.2, drops=())
    trainer = tiny_trainer(DPF(every=2, end=0.25), density=0.3, recipe=recipe, steps=64)
    log = watch_updates(trainer)
    train(trainer)
    returned = 0
    for update in log[10:]:
        for name, mask in update.masks.items():
            back = (mask == 1) & (update.old_masks[name] == 0)
            returned += int(back.sum())
            assert bool((update.weights[name][back].abs() > 1e-6).all())
    assert returned > 20


@pytest.mark.parametrize(
    ("step", "nonzeros"),
    [
        # 10,000 weights to 1,000; 1200 steps, the second drop at 900 = 20 epochs of 45 steps.
        (0, 10_000),
        (44, 10_000),  # the first epoch is dense
        (45, 8_716),  # s = 0.9 (1 - 0.95^3) = 0.1283625: 8716.375
        (89, 8_716),
        (90, 7_561),  # progress 0.1: s = 0.2439
        (225, 4_797),  # 0.25: 0.5203125
        (450, 2_125),  # 0.5: 0.7875
        (494, 2_125),
        (675, 1_141),  # 0.75: 0.8859375
        (899, 1_001),  # 855 / 900: s = 0.9 (1 - 0.05^3) = 0.8998875: 1001.125
        (900, 1_000),
        (1199, 1_000),
    ],
)
def test_sparsity_follows_the_cubic_ramp_one_level_an_epoch(step, nonzeros):
    budget = Budget(1200, 45, 45 * 32, (0.5, 0.75))
    state = hand_state({"w": torch.arange(1, 10_001.0)})
    DPF().update(FakeRun(state, budget=budget, density=0.1, step=step))
    assert nonzero(state.masks) == {"w": nonzeros}
    assert bool(state.masks["w"][-nonzeros:].all())


@pytest.mark.parametrize(
    ("drops", "end", "before"),
    [
        # Twenty epochs before the end the density is 0.01 + 0.99 (20 / end)^3.
        ((0.5, 0.75), 225, 10_695),  # 0.99 * 0.00070233 = 0.0006953
        ((0.3, 0.6, 0.8), 180, 11_358),  # 0.99 * 0.00137174 = 0.0013580
        ((), 225, 10_695),
    ],
)
def test_the_ramp_ends_at_the_second_drop_of_the_learning_rate(drops, end, before):
    budget = Budget(3000, 10, 320, drops)  # 300 epochs
    for epoch, expected in ((end - 20, before), (end, 10_000), (299, 10_000)):
        state = hand_state({"w": torch.arange(1, 1_000_001.0)})
        DPF().update(FakeRun(state, budget=budget, density=0.01, step=10 * epoch))
        assert nonzero(state.masks) == {"w": expected}


def test_the_end_of_the_ramp_can_be_set():
    budget = Budget(1000, 10, 320, (0.5, 0.75))
    counts = []
    for step in (250, 490, 500):
        state = hand_state({"w": torch.arange(1, 100_001.0)})
        DPF(end=0.5).update(FakeRun(state, budget=budget, density=0.1, step=step))
        counts.append(nonzero(state.masks)["w"])
    assert counts == [21_250, 10_001, 10_000]  # s = 0.7875; 0.9 (1 - 0.02^3) = 0.8999928: 10000.72


def test_a_ramp_of_few_epochs_still_has_twenty_levels():
    # 100 steps in epochs of 50: the ramp of 75 steps has a level every 75 // 20 = 3 steps.
    budget = Budget(100, 50, 1600, (0.5, 0.75))
    counts = []
    for step in range(100):
        state = hand_state({"w": torch.arange(1, 100_001.0)})
        DPF().update(FakeRun(state, budget=budget, density=0.1, step=step))
        counts.append(nonzero(state.masks)["w"])
    assert counts == sorted(counts, reverse=True)
    assert [step for step in range(1, 100) if counts[step] < counts[step - 1]] == list(
        range(3, 76, 3)
    )


@pytest.mark.parametrize("steps", [1, 15, 16, 40, 81])
@pytest.mark.parametrize("density", [0.02, 0.1, 1 / 3])
def test_the_finished_network_is_exact_and_the_top_of_the_last_dense_weights(density, steps):
    trainer = tiny_trainer("dpf", model="conv", density=density, steps=steps)
    dense = {}
    for step in trainer.run():
        if step == steps:
            dense = copied(trainer.state.weights)
    flat = flattened(dense)
    mask = top(np.abs(flat), keep_count(1432, density))
    model = trainer.state.model
    found = {name: model.get_parameter(name) for name in trainer.state.masks}
    np.testing.assert_array_equal(flattened(found), flat * mask)
    np.testing.assert_array_equal(flattened(trainer.state.masks), mask)
    assert sum(nonzero(found).values()) == keep_count(1432, density)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


@pytest.mark.parametrize("scope", ["uniform", "erk"])
def test_the_layer_wise_option_ranks_each_layer_by_itself(scope):
    trainer = train(tiny_trainer(DPF(scope=scope)))
    shapes = {name: tuple(mask.shape) for name, mask in trainer.state.masks.items()}
    assert nonzero(trainer.state.masks) == allocate(shapes, 0.1, scope)


def test_the_papers_preset_leaves_the_classifier_dense():
    trainer = train(tiny_trainer("dpf", model="conv", prunable="dpf"))
    assert set(trainer.state.masks) == {"conv1.weight", "conv2.weight"}
    assert sum(nonzero(trainer.state.masks).values()) == keep_count(1368, 0.1)
    assert int(trainer.state.model.classifier.weight.count_nonzero()) == 64


def test_no_extra_batches_are_used():
    assert train(tiny_trainer("dpf")).cursor.extra_batches == 0


@pytest.mark.parametrize("options", [{"every": 0}, {"end": 0.0}, {"end": 1.01}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(SuiteError, match="lies outside"):
        make_method("dpf", options, "here")


# Fine-tuning.


def test_finetuning_comes_on_top_and_costs_a_fifth():
    budget = Budget(300, 10, 320, (0.5, 0.75))
    (alone,) = DPF().plan(budget, 0.1)
    train_phase, finetune = DPF(finetune=0.2).plan(budget, 0.1)
    assert train_phase == alone
    assert (finetune.name, finetune.steps, finetune.updates) == ("finetune", 60, None)
    assert train_phase.steps + finetune.steps == 1.2 * budget.steps


@pytest.mark.parametrize("recipe", [TINY_RECIPE, PLAIN_SGD], ids=["momentum", "plain"])
def test_finetuning_is_training_of_the_last_masked_network(recipe):
    # Straight-through gradients with fixed masks: what is kept trains as if the rest were cut.
    trainer = tiny_trainer(DPF(finetune=0.5, finetune_lr=0.4), density=0.2, recipe=recipe, steps=40)
    run = stopped_at(trainer, 40)
    state = trainer.state
    dense = copied(state.weights)
    others = {n: p for n, p in state.model.named_parameters() if "parametrizations" not in n}
    flat = flattened(dense)
    mask = top(np.abs(flat), keep_count(flat.size, 0.2))
    sizes = [weight.numel() for weight in dense.values()]
    masks = {
        name: torch.from_numpy(part).view(dense[name].shape)
        for name, part in zip(dense, np.split(mask, np.cumsum(sizes)[:-1]), strict=True)
    }
    network = tiny_model("mlp")
    network.load_state_dict({n: w * masks[n] for n, w in dense.items()} | copied(others))
    optimizer = torch.optim.SGD(
        network.parameters(),
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    for step in range(20):
        # From 0.4 of the recipe's rate down a cosine to 0; the optimizer remembers nothing.
        optimizer.param_groups[0]["lr"] = 0.05 * 0.4 * (1 + math.cos(math.pi * step / 20)) / 2
        images, labels = BatchStream(tiny_data(recipe), recipe, 0, "order").batch(40 + step)
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        with torch.no_grad():
            for name, kept in masks.items():
                network.get_parameter(name).mul_(kept)
        next(run)
        for name, kept in masks.items():
            assert torch.equal(state.masks[name], kept)
            torch.testing.assert_close(
                state.weights[name].detach() * kept,
                network.get_parameter(name).detach(),
                rtol=1e-4,
                atol=1e-6,
            )
    assert next(run, None) is None
    for name, value in state.model.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert sum(nonzero({n: state.model.get_parameter(n) for n in masks}).values()) == int(
        mask.sum()
    )


def test_masks_are_not_ranked_anew_while_or_after_finetuning():
    # At a high rate the kept weights change places with the largest of the others.
    trainer = tiny_trainer(DPF(finetune=1.0, finetune_lr=4.0), density=0.2, steps=40)
    log = watch_updates(trainer)
    masks, ranked_anew = {}, 0
    for step in trainer.run():
        masks = masks if step != 41 else copied(trainer.state.masks)
        if step == 80:
            flat = np.abs(flattened(trainer.state.weights))
            ranked_anew = top(flat, keep_count(flat.size, 0.2))
    assert [update.step for update in log] == list(range(0, 40, 2))
    found = flattened({n: trainer.state.model.get_parameter(n) for n in masks}) != 0
    np.testing.assert_array_equal(found, flattened(masks) != 0)
    assert (ranked_anew != flattened(masks)).any()


def test_a_finetuning_without_a_step_still_has_the_last_masks():
    trainer = tiny_trainer(DPF(finetune=0.2), model="conv", steps=4)
    assert [phase.steps for phase in trainer.plan] == [4, 0]
    dense = {}
    for step in trainer.run():
        if step == 4:
            dense = copied(trainer.state.weights)
    mask = top(np.abs(flattened(dense)), keep_count(1432, 0.1))
    found = {name: trainer.state.model.get_parameter(name) for name in dense}
    np.testing.assert_array_equal(flattened(found), flattened(dense) * mask)
