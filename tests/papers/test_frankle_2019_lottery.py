"""Frankle & Carbin, 2019, arXiv:1803.03635: lottery tickets and their controls."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bench.evaluate import evaluate
from bench.prunable import prunable_names, shapes
from bench.trial import network
from methods.allocation import keep_count
from methods.api import Budget, Phase, Source
from methods.lottery import LotteryTicket, TicketControl
from methods.masking import ProjectedMethod
from models import create_model
from tests.tiny import TINY_RECIPE, copied, nonzero, tiny_data, tiny_trainer, train

CONV = LotteryTicket(conv_rate=0.1)
GLOBAL = LotteryTicket(scope="global")

# Of TinyConv's 1,432 weights 716 are left at 50 %: 1,432 -> 1,152 -> 928 -> 748 -> 716.
ROUNDS = 4
STEPS = 20


def budget_of(name, shape=(3, 32, 32), method=CONV, **options):
    """A budget with the shapes of a real model's prunable weights, and the number of all."""
    with torch.device("meta"):
        model = create_model(name, shape, 10, **options)
    names = prunable_names(model, method, "lth")
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    return Budget(1000, 100, 3200, shapes=shapes(model, names)), weights


LENET = budget_of("lenet_300_100", (1, 28, 28), LotteryTicket())[0]


# (network, its options, method) -> percent of all weights that are left after k rounds: the labels
# of the paper's axes. Shortcuts and the classifiers of normalised networks count as left.
LEFT = {
    # (265,200 * 0.8^k + 1,000 * 0.9^k) / 266,200
    "lenet_300_100": ({}, LotteryTicket(), {3: 51.3, 7: 21.1, 9: 13.5, 15: 3.6}),
    # 38,592 and 2,560 * 0.9^k, 4,259,840 * 0.8^k, of 4,300,992
    "conv2": ({}, CONV, {11: 8.8}),
    # 259,776 and 2,560 * 0.9^k, 2,162,688 * 0.8^k, of 2,425,024
    "conv4": ({}, CONV, {11: 11.1, 12: 9.2}),
    # (267,696 * 0.8^k + 2,560 + 640) / 270,896
    "resnet20": ({"shortcut": "B"}, GLOBAL, {4: 41.7, 6: 27.1, 7: 21.9}),
    # (20,018,880 * 0.8^k + 5,120) / 20,024,000
    "vgg19": ({}, GLOBAL, {15: 3.5, 19: 1.5}),
}


@pytest.mark.parametrize("name", LEFT)
def test_the_weights_left_after_k_rounds_are_those_of_the_papers_axes(name):
    options, method, expected = LEFT[name]
    shape = (1, 28, 28) if name.startswith("lenet") else (3, 32, 32)
    budget, weights = budget_of(name, shape, method, **options)
    unpruned = weights - sum(math.prod(one) for _, one in budget.shapes)
    levels = method.levels(budget, 0.01)
    found = {k: sum(levels[k - 1].values()) + unpruned for k in expected}
    assert {k: round(100 * left / weights, 1) for k, left in found.items()} == expected


def test_every_layer_shrinks_by_its_own_rate():
    for k, level in enumerate(LotteryTicket().levels(LENET, 0.04), 1):
        if k < 15:  # the 15th round lands on 4 %, before it would come to 3.6 %
            expected = {
                "fc1.weight": 235_200 * 0.8**k,
                "fc2.weight": 30_000 * 0.8**k,
                "classifier.weight": 1_000 * 0.9**k,  # the output layer at half the rate
            }
            assert level == pytest.approx(expected, abs=3)  # a rounding in each round
    assert k == 15


def test_convolutions_linear_layers_and_the_output_have_rates_of_their_own():
    conv6, _ = budget_of("conv6")
    method = LotteryTicket(conv_rate=0.15)
    assert list(method.rates(conv6).values()) == [0.15] * 6 + [0.2] * 2 + [0.1]
    ours = LotteryTicket(rate=0.3, output_rate=0.05)
    assert list(ours.rates(conv6).values()) == [0.3] * 8 + [0.05]
    # Where the preset leaves the classifier out, the last layer is an ordinary one.
    resnet, _ = budget_of("resnet20")
    assert set(LotteryTicket().rates(resnet).values()) == {0.2}
    assert set(LotteryTicket(scope="global").rates(conv6).values()) == {0.2}


@pytest.mark.parametrize(
    ("density", "rounds"), [(0.5, 4), (0.2, 8), (0.1, 11), (0.05, 14), (0.01, 21)]
)
def test_the_last_round_takes_a_free_rate_and_lands_to_the_weight(density, rounds):
    # ceil(ln D / ln 0.8) rounds; at 90 % the 11th would go on to 91.4 %.
    for method in (LotteryTicket(), GLOBAL):
        totals = [266_200, *(sum(level.values()) for level in method.levels(LENET, density))]
        assert totals[-1] == keep_count(266_200, density)
        assert len(totals) == 1 + rounds
        left = [after / before for before, after in itertools.pairwise(totals)]
        assert left[:-1] == pytest.approx([0.8] * (rounds - 1), abs=5e-3)  # the output's part
        assert 0.8 - 1e-3 < left[-1] < 1


def test_rounds_land_on_every_sparsity_that_the_suite_asks_for():
    method = LotteryTicket(also="0.8 0.5 0")
    totals = [sum(level.values()) for level in method.levels(LENET, 0.1)]
    landings = [133_100, 53_240, 26_620]
    assert [total for total in totals if total in landings] == landings
    # Each landing starts anew from where it is: 4 rounds to 50 %, 5 from there to 80 %, 4 to 90 %.
    assert [totals.index(landing) for landing in landings] == [3, 8, 12]
    assert totals[-1] == 26_620
    phases = method.plan(LENET, 0.1)
    assert [round(266_200 * phase.density) for phase in phases[2:]] == totals
    assert all(phase.rewind_to == "start" and phase.measured for phase in phases[2:])


@pytest.mark.parametrize("also", ["0.9", "0.95", "-0.1", "half", "0.5,0.8"])
def test_what_else_to_land_on_lies_below_the_sparsity(also):
    with pytest.raises(ValueError, match=r"also = .* allowed: sparsities in \[0, 0\.9\)"):
        LotteryTicket(also=also).plan(LENET, 0.1)


def test_one_shot_is_one_round_to_the_counts_that_rounds_arrive_at():
    # With one rate for the single round, the linear layers of Conv-4 would be empty at 99 %.
    for density in (0.1, 0.01, 0.001):
        conv4, _ = budget_of("conv4")
        method = dataclasses.replace(CONV, strategy="one_shot")
        (level,) = method.levels(conv4, density)
        assert level == CONV.levels(conv4, density)[-1]
        assert min(level.values()) > 0
    assert [phase.name for phase in method.plan(conv4, 0.1)] == ["start", "round-0", "round-1"]


def test_a_plan_is_one_training_for_the_dense_network_and_one_for_each_round():
    start, *rounds = LotteryTicket().plan(LENET, 0.1)
    assert (start.steps, start.save_as) == (0, "start")
    assert [phase.name for phase in rounds] == [f"round-{r}" for r in range(12)]
    assert {(phase.steps, phase.lr_window) for phase in rounds} == {(1000, (0.0, 1.0))}
    # 100 steps between looks in the paper's trainings; a short one has 20.
    assert {phase.validate_every for phase in rounds} == {50}
    long = dataclasses.replace(LENET, steps=50_000)
    assert {p.validate_every for p in LotteryTicket().plan(long, 0.1)[1:]} == {100}


def test_rewinding_trains_every_round_from_step_k():
    start, *rounds = LotteryTicket(rewind=0.07).plan(LENET, 0.1)
    assert (start.steps, start.lr_window, start.save_as) == (70, (0.0, 0.07), "start")
    assert {(phase.steps, phase.lr_window) for phase in rounds} == {(930, (0.07, 1.0))}


def watched(method, *, density=0.5, model="conv", steps=STEPS, recipe=None):
    """A run, and what its phases were before their first step and after their last."""
    trainer = tiny_trainer(method, density=density, model=model, steps=steps, recipe=recipe)
    begun, ended = {}, {}
    step = trainer._prepare_step

    def look():
        memory = [copied(trainer.state.optimizer.state[p]) for p in trainer.state.optimizer.state]
        return (
            copied(trainer.state.model.state_dict()),
            copied(trainer.state.masks),
            memory,
            (trainer.cursor.position, float(trainer.state.lr)),
        )

    def prepare():
        if trainer.step == 0:
            begun[trainer.phase.name] = look()
        step()

    trainer._prepare_step = prepare
    for _ in trainer.run():
        if trainer.step == trainer.phase.steps:
            ended[trainer.phase.name] = look()
    return trainer, begun, ended


def masked(model, masks):
    """What of a network's tensors the masks leave."""
    return {name: value * masks[name] if name in masks else value for name, value in model.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


ADAM = dataclasses.replace(TINY_RECIPE, optimizer="adam", momentum=0.0, nesterov=False, lr=0.002)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("recipe", [TINY_RECIPE, ADAM], ids=["sgd", "adam"])
def test_every_round_starts_from_the_masked_initialisation_and_nothing_else(scope, recipe):
    trainer, begun, ended = watched(LotteryTicket(scope=scope), recipe=recipe)
    first = begun["round-0"]
    assert len(begun) == 1 + ROUNDS
    for r in range(1, 1 + ROUNDS):
        model, masks, memory, place = begun[f"round-{r}"]
        # Weights exactly m * theta_0; biases, BatchNorm and its statistics as they were.
        assert same(model, masked(first[0], masks))
        assert "norm1.running_mean" in model
        assert not same(model, masked(ended["round-0"][0], masks))
        # The optimizer, its count of steps, the data and the learning rate start over.
        assert memory
        assert all(not value.any() for buffers in memory for value in buffers.values())
        assert place == first[3] == (0, pytest.approx(recipe.lr))
    assert trainer.cursor.position == STEPS


def test_a_layer_loses_the_smallest_of_its_trained_surviving_weights():
    trainer, begun, ended = watched(LotteryTicket())
    levels = trainer.method.levels(trainer.budget, 0.5)
    for r, level in enumerate(levels, 1):
        (model, before, *_), after = ended[f"round-{r - 1}"], begun[f"round-{r}"][1]
        assert nonzero(after) == level
        for name, mask in after.items():
            size = model[name].abs().masked_fill(before[name] == 0, -1).numpy()
            smallest_kept = np.sort(size, axis=None)[-level[name]]
            np.testing.assert_array_equal(mask.numpy() == 1, size >= smallest_kept)
    # Of 216, 1,152 and 64 at 0.2, 0.2 and 0.1: 172.8, 921.6 and 57.6, together 1,152; of equal
    # remainders the earlier layer's is rounded up.
    assert list(levels[0].values()) == [173, 922, 57]


def test_global_pruning_ranks_all_layers_together():
    _, begun, ended = watched(LotteryTicket(scope="global"))
    # 0.8 of 1,432, 1,146, 917, 734; then the landing.
    assert [sum(nonzero(begun[f"round-{r}"][1]).values()) for r in range(1, 5)] == [
        *(1_146, 917, 734, 716)
    ]
    for r in range(1, 1 + ROUNDS):
        (model, before, *_), after = ended[f"round-{r - 1}"], begun[f"round-{r}"][1]
        kept = torch.cat([model[name].abs()[mask != 0] for name, mask in after.items()])
        lost = [model[n].abs()[(before[n] != 0) & (mask == 0)] for n, mask in after.items()]
        assert torch.cat(lost).max() <= kept.min()


@pytest.mark.parametrize("strategy", ["reset", "continue"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_are_nested(strategy, scope):
    _, begun, ended = watched(LotteryTicket(strategy, scope))
    for r in range(1 + ROUNDS):
        masks = ended[f"round-{r}"][1]
        assert same(begun[f"round-{r}"][1], masks)
        if r:
            old = ended[f"round-{r - 1}"][1]
            assert all(torch.equal(mask * old[name], mask) for name, mask in masks.items())
            assert sum(nonzero(masks).values()) < sum(nonzero(old).values())


def test_a_pruned_weight_never_comes_back_where_trained_weights_are_zero():
    trainer = tiny_trainer(LotteryTicket(), density=0.5, model="conv", steps=4)
    old = copied(trainer.state.masks)
    for _ in trainer.run():
        masks = trainer.state.masks
        assert all(torch.equal(mask * old[name], mask) for name, mask in masks.items())
        old = copied(masks)
        if trainer.phase.name != "round-0":  # first a mask that does not just go by the index
            with torch.no_grad():
                trainer.state.weights["classifier.weight"].zero_()
    assert nonzero(old)["classifier.weight"] < 64


@dataclass(frozen=True)
class Fixed(ProjectedMethod):
    """Trains the source's masks from the initialisation as it is."""

    @property
    def needs_source(self):
        return True

    def start_phase(self, run):
        for name, mask in run.source.masks.items():
            run.state.masks[name].copy_(mask)


@pytest.mark.parametrize("recipe", [TINY_RECIPE, ADAM], ids=["sgd", "adam"])
def test_rounds_are_ordinary_trainings(recipe):
    recipe = dataclasses.replace(recipe, warmup=0.3, validation=64)
    trainer, _, ended = watched(LotteryTicket(), recipe=recipe)
    dense = train(tiny_trainer("dense", model="conv", steps=STEPS, recipe=recipe))
    assert same(ended["round-0"][0], dense.state.model.state_dict())
    # What looks at the validation loss, and earlier rounds, have left changes nothing.
    ticket = tiny_trainer(Fixed(), density=0.5, model="conv", steps=STEPS, recipe=recipe)
    ticket.source = Source(trainer.state.masks)
    train(ticket)
    assert same(trainer.state.model.state_dict(), ticket.state.model.state_dict())
    assert trainer.cursor.phases[-1].least is not None


def test_late_rewinding_goes_back_to_the_weights_and_the_optimizer_of_step_k():
    method = LotteryTicket(rewind=0.25)
    trainer, begun, ended = watched(method)
    weights, _, memory, place = ended["start"]
    assert place[0] == 5  # a quarter of 20 steps
    for r in range(1, 1 + ROUNDS):
        model, masks, now, (position, lr) = begun[f"round-{r}"]
        assert same(model, masked(weights, masks))
        assert not same(model, masked(begun["start"][0], masks))
        assert len(now) == len(memory) > 0
        assert all(same(*buffers) for buffers in zip(memory, now, strict=True))
        assert (position, lr) == (5, begun["round-0"][3][1])
    assert [phase.steps for phase in trainer.cursor.phases] == [5] + [15] * (1 + ROUNDS)
    # Start and first round together are one ordinary training.
    dense = train(tiny_trainer("dense", model="conv", steps=STEPS))
    assert same(ended["round-0"][0], dense.state.model.state_dict())


def test_continued_training_resets_the_weights_once_at_the_end():
    trainer, begun, ended = watched(LotteryTicket("continue"))
    for r in range(1, ROUNDS):
        model, masks, memory, (position, _) = begun[f"round-{r}"]
        assert same(model, masked(ended[f"round-{r - 1}"][0], masks))
        assert any(value.any() for buffers in memory for value in buffers.values())
        assert position == r * STEPS  # the data goes on too
    model, masks, memory, (position, _) = begun[f"round-{ROUNDS}"]
    assert same(model, masked(begun["round-0"][0], masks))
    assert position == 0
    assert all(not value.any() for buffers in memory for value in buffers.values())
    assert [phase.measured for phase in trainer.plan] == [False, True, False, False, False, True]
    assert not LotteryTicket("continue").lands_on_all


def test_one_shot_prunes_the_trained_network_once_and_resets():
    trainer, begun, ended = watched(LotteryTicket("one_shot"))
    assert list(begun) == ["round-0", "round-1"]
    assert trainer.cursor.total == 2 * STEPS
    model, masks, *_ = begun["round-1"]
    assert same(model, masked(begun["round-0"][0], masks))
    trained = ended["round-0"][0]
    assert sum(nonzero(masks).values()) == 716
    for name, mask in masks.items():
        size = trained[name].abs()
        assert size[mask == 0].max() <= size[mask != 0].min()


def test_each_round_hands_out_its_network_with_exactly_its_weights():
    trainer = train(tiny_trainer(LotteryTicket(also="0.15"), density=0.5, model="conv", steps=4))
    phases = trainer.cursor.phases
    totals = [sum(int(one.end[n].count_nonzero()) for n in one.masks) for one in trainer.ended]
    # To 85 % at once, as one round would go on to 1,152.
    assert totals[:2] == [1_432, 1_217]
    assert totals[-1] == 716
    assert [phases[one.index].density for one in trainer.ended] == [n / 1_432 for n in totals]
    assert same(trainer.ended[-1].end, trainer.state.model.state_dict())


def test_a_kept_weight_that_happens_to_be_zero_still_counts_in_its_round():
    recipe = dataclasses.replace(TINY_RECIPE, validation=64)
    trainer = tiny_trainer(LotteryTicket(), density=0.5, model="conv", steps=4, recipe=recipe)
    for _ in trainer.run():
        for name, weight in trainer.state.weights.items():
            with torch.no_grad():
                weight[tuple(trainer.state.masks[name].nonzero()[0])] = 0.0
    assert len(trainer.ended) == 1 + ROUNDS
    for one in trainer.ended:
        kept = nonzero(one.masks)
        assert {name: int(one.end[name].count_nonzero()) for name in kept} == kept
        assert {name: int(one.least[name].count_nonzero()) for name in kept} == kept


def test_the_least_validation_loss_of_a_round_is_found_afterwards():
    # A rate this high makes the loss rise and fall; looks are every 2 of 40 steps.
    recipe = dataclasses.replace(TINY_RECIPE, validation=128, lr=0.5, drops=())
    trainer = tiny_trainer(LotteryTicket(), density=0.5, model="conv", steps=41, recipe=recipe)
    data = tiny_data(recipe)
    looks: dict[str, dict[int, float]] = {}
    states = {}
    for _ in trainer.run():
        name, step = trainer.phase.name, trainer.step
        if step % 2 == 0 or step == 41:
            looks.setdefault(name, {})[step] = evaluate(
                trainer.state.model, data.validation, data
            ).loss
            states[name, step] = copied(trainer.state.model.state_dict())
            trainer.state.model.train()
    assert [ended.index for ended in trainer.ended] == list(range(1, 2 + ROUNDS))
    early = 0
    for ended in trainer.ended:
        phase = trainer.cursor.phases[ended.index]
        seen = looks[phase.name]
        assert len(seen) == 21
        best = min(seen, key=seen.__getitem__)
        assert (phase.least.step, phase.least.validation_loss) == (best, seen[best])
        assert same(ended.least, states[phase.name, best])
        assert phase.steps == 41  # it stops nothing
        early += best < 41
    assert early > 0


def test_a_loss_that_is_not_finite_is_never_the_least():
    recipe = dataclasses.replace(TINY_RECIPE, validation=128)
    trainer = tiny_trainer(LotteryTicket(), density=0.9, steps=20, recipe=recipe)
    plain, losses = trainer._validate, iter([math.nan, math.inf])
    trainer._validate = lambda: dataclasses.replace(plain(), loss=next(losses, 3.0))
    train(trainer)
    leasts = [phase.least for phase in trainer.cursor.phases[1:]]
    assert [(least.step, least.validation_loss) for least in leasts] == [(3, 3.0), (1, 3.0)]


def test_without_held_out_images_there_is_no_least():
    trainer = train(tiny_trainer(LotteryTicket(), density=0.5, model="conv", steps=4))
    assert all(phase.least is None for phase in trainer.cursor.phases)
    assert all(ended.least is None for ended in trainer.ended)


def begun(method, *, density=0.25, seed=0, model="mlp"):
    """A control before its first step: its weights, before they are masked, and its run."""
    trainer = tiny_trainer(method, density=density, seed=seed, model=model)
    with torch.no_grad():
        method.start_phase(trainer)
    return copied(trainer.state.model.state_dict()), trainer


def initial(draw=0, model="mlp"):
    """Initial weights of seed 0; other draws are initialised anew."""
    return copied(network(model, 0, draw).state_dict())


CONTROLS = ["reinit", "resample", "noise", "shuffle"]


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_trains_once_with_as_many_weights_as_the_ticket(control):
    method = TicketControl(control)
    trainer = tiny_trainer(method, density=0.25)
    wanted = copied(trainer.source.masks)
    assert method.plan(LENET, 0.1) == (Phase("train", 1000, measured=True, validate_every=50),)
    for _ in trainer.run():
        assert nonzero(trainer.state.masks) == nonzero(wanted)
        assert nonzero(trainer.state.weights) == nonzero(wanted)
    assert same(trainer.state.masks, wanted) == (control != "shuffle")


@pytest.mark.parametrize("control", CONTROLS)
def test_draws_differ_and_each_comes_again(control):
    draws = {}
    for draw in (1, 2, 3):
        weights, trainer = begun(TicketControl(control, draw=draw))
        again, second = begun(TicketControl(control, draw=draw))
        assert same(weights, again)
        assert same(trainer.state.masks, second.state.masks)
        draws[draw] = masked(weights, trainer.state.masks)
    for one, two in itertools.combinations(draws.values(), 2):
        assert not any(torch.equal(one[name], two[name]) for name in trainer.state.masks)


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_random_reinitialisation_draws_every_parameter_anew(model):
    weights, trainer = begun(TicketControl("reinit", draw=2), model=model)
    assert same(weights, initial(2, model))
    assert not any(torch.equal(weights[n], initial(model=model)[n]) for n in trainer.state.masks)
    assert same(trainer.state.masks, trainer.source.masks)


def test_drawing_anew_leaves_the_noise_of_the_training_alone():
    for control in CONTROLS:
        trainer = tiny_trainer(TicketControl(control), density=0.25)
        before = torch.get_rng_state()
        with torch.no_grad():
            trainer.method.start_phase(trainer)
        assert torch.equal(torch.get_rng_state(), before)


def test_resampling_draws_from_the_weights_that_the_ticket_keeps_of_the_layer():
    weights, trainer = begun(TicketControl("resample"))
    old = initial()
    for name, mask in trainer.source.masks.items():
        pool, drawn = old[name][mask != 0], weights[name][mask != 0]
        assert set(drawn.tolist()) <= set(pool.tolist())
        assert not torch.equal(drawn, pool)
    # With replacement: of 3,072 or so values, 1 - 1/e are drawn at least once.
    name = "fc1.weight"
    pool, drawn = (v[name][trainer.source.masks[name] != 0] for v in (old, weights))
    assert len(set(drawn.tolist())) / len(set(pool.tolist())) == pytest.approx(0.632, abs=0.03)
    assert float(drawn.std()) == pytest.approx(float(pool.std()), rel=0.05)
    assert all(torch.equal(weights[n], old[n]) for n in old if n.endswith("bias"))


def test_resampling_knows_an_emptied_layer():
    trainer = tiny_trainer(TicketControl("resample"), density=0.25)
    trainer.source.masks["fc2.weight"].zero_()
    with torch.no_grad():
        trainer.method.start_phase(trainer)
    assert all(weight.isfinite().all() for weight in trainer.state.weights.values())


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 3.0])
def test_noise_is_measured_in_deviations_of_the_layers_initial_weights(sigma):
    weights, trainer = begun(TicketControl("noise", sigma=sigma))
    old = initial()
    for name in trainer.state.masks:
        noise = (weights[name] - old[name]) / old[name].std()
        # Mean and deviation of n normal numbers, four of their own deviations wide.
        n = noise.numel()
        assert abs(float(noise.mean())) < 4 * sigma / math.sqrt(n)
        assert abs(float(noise.std()) / sigma - 1) < 4 / math.sqrt(2 * n)
    assert all(torch.equal(weights[n], old[n]) for n in old if n.endswith("bias"))
    assert same(trainer.state.masks, trainer.source.masks)


def test_shuffling_permutes_the_mask_within_each_layer():
    weights, trainer = begun(TicketControl("shuffle"))
    assert same(weights, initial())
    old, new = trainer.source.masks, trainer.state.masks
    assert nonzero(old) == nonzero(new)
    # By chance a quarter of the kept weights is kept again: 768 of 3,072, deviation 21.
    kept = int(old["fc1.weight"].sum())
    both = int((old["fc1.weight"] * new["fc1.weight"]).sum())
    assert both == pytest.approx(kept**2 / 12_288, abs=4 * 21)


def test_masks_that_were_drawn_at_random_are_drawn_otherwise_by_their_control():
    # The same seed: 90 % of fc1 is zero, so by chance a tenth of the kept is kept again.
    drawn = tiny_trainer("random")
    next(drawn.run())
    trainer = tiny_trainer(TicketControl("shuffle"))
    trainer.source = Source(drawn.state.masks)
    next(trainer.run())
    old, new = drawn.state.masks["fc1.weight"], trainer.state.masks["fc1.weight"]
    assert float((old * new).sum() / old.sum()) == pytest.approx(0.1, abs=0.05)


def test_shuffling_can_draw_all_parameters_anew_too():
    weights, trainer = begun(TicketControl("shuffle", fresh=True))
    assert same(weights, initial(1))
    assert same(trainer.state.masks, begun(TicketControl("shuffle"))[1].state.masks)


def test_controls_of_another_seed_are_others():
    one, two = (begun(TicketControl("shuffle"), seed=seed)[1].state.masks for seed in (0, 1))
    assert not any(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LotteryTicket, {"rate": 0.0}),
        (LotteryTicket, {"rate": 1.0}),
        (LotteryTicket, {"conv_rate": 1.0}),
        (LotteryTicket, {"output_rate": 0.0}),
        (LotteryTicket, {"rewind": 1.0}),
        (TicketControl, {"draw": 0}),
        (TicketControl, {"sigma": 0.0}),
    ],
)
def test_options_have_ranges(kind, options):
    with pytest.raises(ValueError, match="lies outside"):
        kind(**options)


def test_a_rewind_that_leaves_no_step_to_train_is_refused():
    # round(0.99 * 50) = 50 (49.5 to even), round(0.98 * 50) = 49.
    budget = dataclasses.replace(LENET, steps=50)
    with pytest.raises(ValueError, match=r"rewind = 0.99 leaves none of 50 steps to train"):
        LotteryTicket(rewind=0.99).plan(budget, 0.1)
    assert LotteryTicket(rewind=0.98).plan(budget, 0.1)[1].steps == 1


@pytest.mark.parametrize("strategy", ["continue", "one_shot"])
def test_sparsities_on_the_way_are_refused_where_the_strategy_lands_on_one(strategy):
    with pytest.raises(ValueError, match=f"also = '0.5', but '{strategy}' lands on one sparsity"):
        LotteryTicket(strategy, also="0.5").plan(LENET, 0.1)


@pytest.mark.parametrize("control", CONTROLS)
def test_an_option_that_the_control_does_not_use_is_refused(control):
    for option, value, user in (("sigma", 1.0, "noise"), ("fresh", True, "shuffle")):
        if control == user:
            TicketControl(control, **{option: value})
        else:
            with pytest.raises(ValueError, match=f"{option} is for control = '{user}'"):
                TicketControl(control, **{option: value})


@pytest.mark.parametrize("name", ["conv_rate", "output_rate"])
def test_a_rate_of_some_layers_is_refused_where_all_are_ranked_together(name):
    with pytest.raises(ValueError, match=f"{name} is for scope = 'layer', not 'global'"):
        LotteryTicket(scope="global", **{name: 0.1})


def test_noise_without_sigma_is_that_of_one_deviation():
    (plain, _), (one, _) = begun(TicketControl("noise")), begun(TicketControl("noise", sigma=1.0))
    assert same(plain, one)
