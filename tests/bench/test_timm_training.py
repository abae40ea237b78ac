"""What recipes borrow from timm: schedules as timm has them, optimizers that a run can resume."""

from __future__ import annotations

import functools
import itertools

import pytest
import timm.optim
import timm.scheduler
import torch

from bench import checkpoint, recipes
from bench.errors import SuiteError
from bench.recipes import Recipe
from bench.scrutiny import outcome
from bench.timm_training import unfit
from bench.trainer import Trainer, optimizer_settings
from methods.masking import reset_optimizer
from methods.sparse_momentum import momenta
from tests.tiny import TINY_RECIPE, FakeRun, nonzero, tiny_trainer, train, watch_updates

KEY = "0123456789ab"
PLAIN = 'title = "mine"\nbatch = 64\nlr = 0.1\n'


def loaded(folder, text: str) -> Recipe:
    (folder / "own.toml").write_text(PLAIN + text, encoding="utf-8")
    return recipes.load("own.toml", "tiny.toml: recipe", folder)


def refusal(folder, text: str) -> str:
    with pytest.raises(SuiteError) as caught:
        loaded(folder, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def borrowing(name: str, lr: float = 0.01, **fields: object) -> Recipe:
    """A tiny recipe with an optimizer of timm, with momentum where it has one."""
    momentum = 0.9 if timm.optim.get_optimizer_info(name).has_momentum else 0.0
    return Recipe(
        title="",
        batch=32,
        lr=lr,
        optimizer=f"timm:{name}",
        momentum=momentum,
        weight_decay=1e-3,
        drops=(0.5,),
        **fields,  # type: ignore[arg-type]
    )


def usable() -> list[str]:
    """Optimizers of this version of timm that a recipe may name."""
    infos = {name: timm.optim.get_optimizer_info(name) for name in timm.optim.list_optimizers()}
    own = [n for n, i in infos.items() if not isinstance(i.opt_class, str) and not i.second_order]
    return [name for name in own if unfit(name, (), borrowing(name).momentum) is None]


@functools.cache
def names_in_use() -> tuple[str, ...]:
    return tuple(usable())


# Schedules


def timms(steps: int, lr: float = 0.4, **keywords: object) -> list[float]:
    """The rate of each step of a run of timm's own training loop, which sets it by update."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    keywords = {"step_on_epochs": False, "updates_per_epoch": 1} | keywords
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=steps, **keywords)
    rates = []
    for step in range(steps):
        scheduler.step_update(step)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


@pytest.mark.parametrize(
    ("fields", "keywords"),
    [
        ({"schedule": "timm:cosine"}, {"sched": "cosine"}),
        (
            {"schedule": "timm:cosine", "warmup": 0.1, "warmup_from": 0.25},
            {"sched": "cosine", "warmup_epochs": 20, "warmup_lr": 0.1},
        ),
        (
            {"schedule": "timm:cosine", "schedule_options": (("k_decay", 2), ("lr_min", 0.1))},
            {"sched": "cosine", "k_decay": 2.0, "min_lr": 0.1},
        ),
        ({"schedule": "timm:tanh"}, {"sched": "tanh"}),
        (
            {"schedule": "timm:poly", "schedule_options": (("power", 0.9),)},
            {"sched": "poly", "decay_rate": 0.9},
        ),
        (
            {"schedule": "timm:step", "drops": (0.3,), "factor": 0.2},
            {"sched": "step", "decay_epochs": 60, "decay_rate": 0.2},
        ),
        (
            {"schedule": "timm:multistep", "drops": (0.3, 0.6), "warmup": 0.05},
            # timm decays one update before a milestone.
            {
                "sched": "multistep",
                "decay_milestones": [61, 121],
                "warmup_epochs": 10,
                "warmup_lr": 0,
            },
        ),
    ],
    ids=str,
)
def test_a_schedule_of_timm_gives_timms_rates(fields, keywords):
    recipe = Recipe(title="", batch=1, lr=0.4, **fields)
    recipe.check_timm("here")
    assert [recipe.lr_at(step / 200) for step in range(200)] == pytest.approx(
        timms(200, **keywords), rel=1e-6, abs=1e-9
    )


def test_all_cycles_and_the_warm_up_before_them_fit_into_the_run():
    options = (("cycle_decay", 0.5), ("cycle_limit", 2), ("warmup_prefix", True))
    recipe = Recipe(
        title="", batch=1, lr=1.0, schedule="timm:cosine", warmup=0.2, schedule_options=options
    )
    rates = [recipe.lr_at(tenth / 10) for tenth in range(11)]
    # Two tenths of warm-up, then two cycles of four tenths, the second half as high.
    assert rates == pytest.approx(
        [0, 0.5, 1, 0.8535534, 0.5, 0.1464466, 0.5, 0.4267767, 0.25, 0.0732233, 0], abs=1e-6
    )


def test_noise_of_timm_stays_inside_its_range_and_is_the_same_each_time():
    options = (("noise_range_t", (0.4, 0.6)),)
    noisy = Recipe(title="", batch=1, lr=1.0, schedule="timm:cosine", schedule_options=options)
    plain = Recipe(title="", batch=1, lr=1.0, schedule="timm:cosine")
    differs = [noisy.lr_at(k / 20) != plain.lr_at(k / 20) for k in range(20)]
    assert differs == [8 <= k < 12 for k in range(20)]
    assert noisy.lr_at(0.5) == noisy.lr_at(0.5)


@pytest.mark.parametrize("tenths", [1, 3, 6, 7])
@pytest.mark.parametrize("steps", [30, 44, 6000])
def test_a_milestone_falls_on_the_exact_step(steps, tenths):
    decayed = Recipe(title="", batch=1, lr=1.0, schedule="timm:multistep", drops=(tenths / 10,))
    first = next(step for step in range(steps) if decayed.lr_at(step / steps) < 1)
    assert first == -(-tenths * steps // 10)


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ('schedule = "timm:plateau"', "it looks at a metric"),
        ('schedule = "timm:cosin"', "no such schedule of timm: 'cosin'. Did you mean 'cosine'?"),
        ('schedule = "timm:step"', "give one drop"),
        ('schedule = "timm:cosine"\ndrops = [0.5]', "drops = [0.5]: it has none"),
        (
            'schedule = "timm:cosine"\nwarmup = 0.1\nwarmup_shape = "constant"',
            "warmup_shape = 'constant' is not for timm's schedules",
        ),
        (
            'schedule = "timm:cosine"\nschedule_options = { warmup_t = 3 }',
            "schedule_options.warmup_t: warmup fills it",
        ),
        (
            'schedule = "timm:cosine"\nschedule_options = { cycle_limt = 3 }',
            "no such keyword: 'cycle_limt'. Did you mean 'cycle_limit'?",
        ),
        (
            'schedule = "timm:cosine"\nschedule_options = { lr_min = -1 }',
            "schedule = 'timm:cosine': timm refuses the options",
        ),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_when_it_is_read(text, piece, tmp_path):
    assert piece in refusal(tmp_path, text)


# Optimizers


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ('optimizer = "timm:lmab"', "no such optimizer of timm: 'lmab'. Did you mean 'lamb'?"),
        ('optimizer = "timm:adahessian"', "it needs the graph of the gradients"),
        ('optimizer = "timm:fusedsgd"', "it is of the package apex, which is not used here"),
        ('optimizer = "timm:lamb"\nmomentum = 0.9', "momentum = 0.9: it takes none"),
        ('optimizer = "timm:sgdw"', "timm says: Nesterov momentum requires a momentum"),
        ('optimizer = "timm:lamb"\nbetas = [0.8, 0.9]', "give timm's as optimizer_options.betas"),
        (
            'optimizer = "timm:sgdw"\nmomentum = 0.9\nnesterov = true',
            "nesterov = true is for sgd; of timm's optimizers, the name says it",
        ),
        (
            'optimizer = "timm:lamb"\noptimizer_options = { lr = 1.0 }',
            "optimizer_options.lr: lr is a field of the recipe itself",
        ),
        (
            'optimizer = "timm:lamb"\noptimizer_options = { epz = 1.0 }',
            "unexpected keyword argument 'epz'",
        ),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused_when_it_is_read(text, piece, tmp_path):
    assert piece in refusal(tmp_path, text)


def test_an_optimizer_with_state_on_itself_is_refused_when_it_is_read(tmp_path):
    text = 'optimizer = "timm:kron"\nmomentum = 0.9'
    assert "on itself, which no checkpoint holds" in refusal(tmp_path, text)


def test_keywords_reach_timms_class_and_the_hash(tmp_path):
    text = 'optimizer = "timm:adan"\noptimizer_options = { eps = 1.0, betas = [0.9, 0.8, 0.7] }'
    found = loaded(tmp_path, text)
    assert found.optimizer_options == (("betas", (0.9, 0.8, 0.7)), ("eps", 1))
    group = tiny_trainer("dense", recipe=found).state.optimizer.param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.9, 0.8, 0.7), 1)
    turned = 'optimizer = "timm:adan"\noptimizer_options = { betas = [0.9, 0.8, 0.7], eps = 1 }'
    assert loaded(tmp_path, turned).hash == found.hash
    assert loaded(tmp_path, 'optimizer = "timm:adan"').hash != found.hash


def test_reading_an_optimizer_leaves_the_random_stream_alone(tmp_path):
    unfit.cache_clear()
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    loaded(tmp_path, 'optimizer = "timm:adamw"')
    assert torch.equal(torch.rand(2), wanted)


def test_timms_sgd_trains_like_our_own():
    same = Recipe(title="", batch=32, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    theirs = Recipe(
        title="", batch=32, lr=0.05, momentum=0.9, optimizer="timm:sgd", weight_decay=5e-4
    )
    one, other = (train(tiny_trainer("rigl", recipe=r)) for r in (same, theirs))
    for name, weight in one.state.weights.items():
        assert torch.allclose(weight, other.state.weights[name], atol=1e-6)


@pytest.mark.parametrize("name", ["lamb", "sgdw", "adamw", "lion", "adan", "lars", "muon"])
def test_the_runs_learning_rate_is_what_the_optimizer_takes(name):
    def after(lr: float) -> list[torch.Tensor]:
        trainer = tiny_trainer("dense", recipe=borrowing(name, 0.01))
        steps = trainer.run()
        next(steps)
        object.__setattr__(trainer, "_lr", lambda: lr)
        before = {n: w.detach().clone() for n, w in trainer.state.weights.items()}
        next(steps)
        assert all(
            group["lr"] is trainer.state.lr for group in trainer.state.optimizer.param_groups
        )
        return [w.detach() - before[n] for n, w in trainer.state.weights.items()]

    still, slow, fast = after(0.0), after(0.005), after(0.01)
    for none, half, whole in zip(still, slow, fast, strict=True):
        assert not none.any()
        assert torch.allclose(2 * half, whole, rtol=1e-3, atol=1e-6)


def test_weight_decay_that_follows_the_rate_knows_the_base_rate():
    # It is scaled by lr / base rate; the base is a number, not the tensor that changes.
    settings = optimizer_settings(borrowing("adamc", 0.1))
    lr = torch.tensor(0.1)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = settings.build([weight], lr)
    lr.fill_(0.05)
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert weight.detach().flatten().tolist() == pytest.approx(
        [1 - 0.05 * 0.5 * 1e-3] * 4, abs=1e-7
    )


def test_most_of_timms_optimizers_can_be_used():
    assert {"lamb", "sgdw", "adan", "lion", "adamw", "lars"} <= set(names_in_use())
    assert "kron" not in names_in_use()


def resumed(make, done: int, folder) -> Trainer:
    """A run that was saved after some steps, read anew."""
    saved = make()
    for _ in itertools.islice(saved.run(), done):
        pass
    checkpoint.write(saved, folder / "run", KEY)
    other = make()
    checkpoint.read(other, folder / "run", KEY)
    return other


@pytest.mark.parametrize("name", names_in_use())
def test_a_run_with_an_optimizer_of_timm_resumes_bit_for_bit(name, tmp_path):
    make = functools.partial(tiny_trainer, "rigl", recipe=borrowing(name), steps=4, model="conv")
    wanted = outcome(train(make()))
    other = resumed(make, 2, tmp_path)
    assert outcome(train(other)).differences(wanted) == []


@pytest.mark.parametrize("name", ["lamb", "adan", "nadam", "adopt"])
def test_a_lottery_ticket_begins_each_round_with_an_optimizer_that_remembers_nothing(
    name, tmp_path
):
    trainer = tiny_trainer("lottery_ticket", recipe=borrowing(name), density=0.64, steps=5)
    seen = []
    for _ in trainer.run():
        if trainer.step == 1:
            memory = trainer.optimizer_tensors() | trainer.optimizer_numbers()
            seen.append({key: float(v) for key, v in memory.items() if key.endswith(".step")})
    assert len(seen) > 1
    assert set().union(*(counts.values() for counts in seen)) == {1.0}
    make = functools.partial(
        tiny_trainer, "lottery_ticket", recipe=borrowing(name), density=0.64, steps=5
    )
    wanted = outcome(train(make()))
    assert outcome(train(resumed(make, 7, tmp_path))).differences(wanted) == []


# Each remembers other things: in the groups, as plain numbers, from a start that is not 0.
@pytest.mark.parametrize(
    "name",
    ["adan", "adopt", "adafactor", "lamb", "laprop", "mars", "muon", "nadam", "novograd"],
)
def test_an_optimizer_that_forgets_all_goes_on_like_a_new_one(name):
    def step(trainer: Trainer) -> None:
        for parameter in trainer.optimized():
            parameter.grad = torch.full(parameter.shape, 0.25)
        trainer.state.optimizer.step()

    used, new = (tiny_trainer("dense", recipe=borrowing(name)) for _ in range(2))
    for _ in range(3):
        step(used)
    used.state.model.load_state_dict(new.state.model.state_dict())
    reset_optimizer(used.state)
    for _ in range(2):
        step(used)
        step(new)
    for one, other in zip(used.optimized(), new.optimized(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["lamb", "sgdw", "adabelief", "lion", "adafactor"])
@pytest.mark.parametrize("method", ["rigl", "sparse_momentum", "set", "ac_dc", "dpf"])
def test_methods_that_rewire_keep_their_density(method, name):
    trainer = tiny_trainer(method, recipe=borrowing(name), steps=40, density=0.2)
    masks = []
    for _ in trainer.run():
        masks.append({layer: mask.clone() for layer, mask in trainer.state.masks.items()})
    sizes = [mask.numel() for mask in trainer.state.masks.values()]
    assert sum(nonzero(trainer.state.masks).values()) == round(0.2 * sum(sizes))
    pairs = itertools.pairwise(masks)
    assert any(not torch.equal(old[layer], new[layer]) for old, new in pairs for layer in new)


@pytest.mark.parametrize("name", ["lamb", "sgdw", "lion", "adan"])
def test_rigl_makes_timms_optimizers_forget_what_closes(name):
    trainer = tiny_trainer("rigl", recipe=borrowing(name), density=0.2)
    log = watch_updates(trainer)
    train(trainer)
    assert len(log) > 1
    for update in log:
        for layer, mask in update.masks.items():
            alike = [v for v in update.memory[layer].values() if v.shape == mask.shape]
            assert alike
            assert not any(value[mask == 0].any() for value in alike)


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("sgdw", lambda m: m["momentum_buffer"]),
        ("lamb", lambda m: m["exp_avg"] / (m["exp_avg_sq"].sqrt() + 1e-8)),
        ("lion", lambda m: m["exp_avg"]),
        ("adabelief", lambda m: m["exp_avg"]),
    ],
)
def test_sparse_momentum_reads_the_momentum_of_timms_optimizers(name, buffers):
    trainer = tiny_trainer("dense", recipe=borrowing(name))
    for _ in itertools.islice(trainer.run(), 3):
        pass
    state = trainer.state
    run = FakeRun(state)
    found = momenta(run)
    assert run.asked == []
    for layer, weight in state.weights.items():
        assert torch.equal(found[layer], buffers(state.optimizer.state[weight]).abs())


def test_dpf_that_takes_decay_off_refuses_an_optimizer_whose_decay_is_none_of_the_gradients():
    from methods.dpf import DPF

    with pytest.raises(ValueError, match=r"decay = 'masked' is for .*, not 'timm:sgdw'"):
        tiny_trainer(DPF(decay="masked"), recipe=borrowing("sgdw"))
    train(tiny_trainer(DPF(decay="masked"), recipe=borrowing("momentum")))


def test_a_recipe_of_our_own_asks_timm_nothing():
    assert optimizer_settings(TINY_RECIPE).factory is None
