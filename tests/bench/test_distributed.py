"""One cell on several devices: two real processes that talk over gloo, beside one by itself."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn import functional

from bench import checkpoint
from bench import distributed as ours
from bench.data import BatchStream, Order
from bench.distributed import ALONE, Group, Pace, checksum, join
from bench.errors import RankLost, RanksDiffer, UsageError
from bench.evaluate import evaluate
from bench.launch import Settings
from bench.prunable import prunable_names
from bench.recipes import Recipe
from bench.record import Record
from bench.sharing import SharedStep, draws_weights, plain_batch_norm, whole_batch_norm
from bench.signals import listen, request
from bench.step import Step
from bench.store import Store
from bench.task import Finished, Ways
from bench.together import run_cell
from bench.trainer import Trainer
from methods import get_method
from methods.api import Budget, Cadence, Phase, SparsityMethod
from tests.bench.cells import (
    ROOT,
    Command,
    forking,
    plan_of,
    register,
    tasks_of,
    train,
    wait_for,
    write_recipe,
    write_suite,
)
from tests.tiny import tiny_data, tiny_model

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="not run: this torch has no gloo",
)

SGD = Recipe(title="", batch=32, lr=0.05, momentum=0.9, weight_decay=5e-4, flip=True, crop=2)
WITHOUT_NORM = ("dense", "rigl", "dpf", "snip", "grasp", "gradual", "set", "l0", "deepr")
"""Scores at first, from gradients and by second derivatives; growth by gradients and by chance; a
penalty and drawn gates; masks that change in each step."""
WITH_NORM = ("rigl", "dpf", "grasp")
STEPS = 50
SECONDS = 100

Tensors = dict[str, Tensor]


def run_of(
    method: SparsityMethod,
    model: nn.Module,
    group: Group = ALONE,
    recipe: Recipe = SGD,
    seed: int = 0,
) -> Trainer:
    """A run that has not begun, on this rank's share of the `synthetic` data."""
    data = tiny_data(recipe)
    names = prunable_names(model, method, "all")
    kind: Callable[..., Step] = functools.partial(SharedStep, group=group)
    return Trainer(
        method,
        model,
        names,
        data,
        recipe,
        Budget(STEPS, len(data.train) // recipe.batch, len(data.train)),
        None if method.controls in ("none", "penalty") else 0.2,
        seed,
        step=kind if group.size > 1 else Step,
        group=group,
    )


def outcome(trainer: Trainer) -> Tensors:
    """What a run comes to: weights, buffers and masks."""
    for _ in trainer.run():
        pass
    found = {f"state/{name}": value for name, value in trainer.state.model.state_dict().items()}
    found |= {f"mask/{name}": mask for name, mask in trainer.state.masks.items()}
    found["macs"] = torch.tensor([phase.train_macs for phase in trainer.cursor.phases])
    found["curve"] = torch.tensor([point.train_loss for point in trainer.cursor.curve])
    return {name: value.detach().contiguous().clone() for name, value in found.items()}


def trained(group: Group) -> Tensors:
    """What the methods come to."""
    found = {}
    for network, names in (("mlp", WITHOUT_NORM), ("conv", WITH_NORM)):
        for name in names:
            # Of this run of seed 0, a ReLU stands at its kink: a last bit is amplified 10^5 times.
            seed = 1 if (network, name) == ("conv", "dpf") else 0
            run = run_of(get_method(name)(), tiny_model(network), group, seed=seed)
            found |= {f"{network}/{name}/{key}": value for key, value in outcome(run).items()}
    return found


def text(words: str) -> Tensor:
    """Words as a tensor, to be sent."""
    return torch.tensor(list(words.encode()), dtype=torch.uint8)


def words(tensor: Tensor) -> str:
    """What `text` was given."""
    return bytes(tensor.tolist()).decode()


class Strays(SparsityMethod):
    """Masks that depend on the process, in the second update."""

    def plan(self, budget, density):
        return (Phase("train", budget.steps, updates=Cadence(10, 5)),)

    def update(self, run):
        if run.step == 15:
            run.state.masks["fc2.weight"][0, distributed.get_rank()] = 0


class StraysInSteps(SparsityMethod):
    """The same, in a hook of each step."""

    def project(self, state):
        if float(state.progress) > 0.5:
            state.masks["fc2.weight"][0, distributed.get_rank()] = 0


class Breaks(SparsityMethod):
    """Has a mistake in a hook, on the ranks that are told."""

    ranks: tuple[int, ...] = (0, 1)

    def edit_gradients(self, state):
        if float(state.progress) > 0.5 and distributed.get_rank() in self.ranks:
            raise ValueError("a mistake")


class BreaksOnOne(Breaks):
    ranks = (1,)


def ends_of_cells(group: Group, folder: Path) -> Tensors:
    """How cells end: one that fails on both ranks, a good one, one that fails on one rank."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        register(patch, "breaks", Breaks)
        register(patch, "breaks_on_one", BreaksOnOne)
        own = folder / f"rank{group.rank}"
        own.mkdir()
        suite = write_suite(own, "[methods.breaks]\n[methods.rigl]\n[methods.breaks_on_one]")
        announced = group.cells()
        for task in tasks_of(plan_of(suite), Store(own, "tiny"), group=group):
            if not group.leads:
                assert next(announced) == task.cell.spec.key
            try:
                *_, last = run_cell(task)
                assert isinstance(last, Finished)
                end = f"{last.record.status}: {last.record.reason}"
            except RankLost as error:
                end = f"lost: {error}"
            found[f"end of {task.cell.label}"] = text(end)
        found["written"] = torch.tensor(len(list(own.rglob("*.safetensors"))))
    return found


def error_of(method: SparsityMethod, group: Group) -> Tensor:
    """What is said of it."""
    try:
        outcome(run_of(method, tiny_model(), group))
    except RanksDiffer as error:
        return text(str(error))
    return text("no error")


class Noisy(nn.Module):
    """Dropout before the classifier; keeps what it let through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier = nn.Linear(768, 4)
        self.seen = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        noise = functional.dropout(torch.ones(len(x), 768), 0.5, self.training)
        self.seen = noise if self.training else self.seen
        found: Tensor = self.classifier(x.flatten(1) * noise)
        return found


def normalised(group: Group) -> Tensors:
    """Batch normalisation of a batch's share, its gradients and their gradients."""
    batch = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    whole, mine = batch, group.part(8)
    share = whole[mine.start : mine.stop].clone().requires_grad_()
    weight = torch.tensor([0.5, 1.0, 2.0]).requires_grad_()
    layer = nn.BatchNorm2d(3)
    with torch.no_grad():
        layer.weight.copy_(weight)
    with whole_batch_norm(group, fused=True):
        outputs = layer(share)
    loss = (outputs.sin() * (1 + share)).sum()
    (first,) = torch.autograd.grad(loss, share, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), share)
    found = {"outputs": outputs, "first": first, "second": second}
    found |= {"mean": layer.running_mean, "variance": layer.running_var}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def agreed(group: Group) -> Tensor:
    """Steps at which a wish of the second rank reaches this one."""
    pace, found = Pace(group), []
    for step in range(40):
        wish = (group.rank == 1 and step == 12, step == 30)
        found.append([float(granted) for granted in pace.agree(*wish)])
    return torch.tensor(found)


def resumed(group: Group, path: Path) -> Tensor:
    """The last weights of a run that goes on from a checkpoint of another."""
    run = run_of(get_method("dense")(), Noisy(), group)
    for done in run.run():
        if done == 20:
            break
    if group.leads:
        checkpoint.write(run, path, "key")
    with group.in_turn("writing"):
        again = run_of(get_method("dense")(), Noisy(), group)
    checkpoint.read(again, path, "key")
    outcome(again)
    return again.state.model.classifier.weight


def own_scores(group: Group) -> Tensor:
    """Gradients as a method finds them by itself, in a hook that tracks none."""
    run = run_of(get_method("dense")(), tiny_model("conv"), group)
    with torch.no_grad():
        ((images, labels),) = run.batches(1)
        outputs = run.logits(images)
    with torch.enable_grad():
        loss = functional.cross_entropy(outputs, labels)
    (found,) = torch.autograd.grad(loss, [run.state.weights["conv1.weight"]])
    return found


def looked_into(group: Group, folder: Path) -> Tensors:
    """Smaller things, tried by both ranks."""
    model, data = tiny_model("conv"), tiny_data(SGD)
    found = {"stray": error_of(Strays(), group), "stray in steps": error_of(StraysInSteps(), group)}
    run = run_of(get_method("dense")(), Noisy(), group)
    outcome(run)
    found["resumed weight"] = resumed(group, folder / "checkpoint")
    found |= {"noise": run.state.model.seen, "noisy weight": run.state.model.classifier.weight}
    found["scores"] = run_of(get_method("dense")(), model, group).gradients(2)["conv1.weight"]
    found["own scores"] = own_scores(group)
    found |= {f"norm/{name}": value for name, value in normalised(group).items()}
    tested = evaluate(model, data.test, data, group), evaluate(model, data.train, data, group)
    found["tested"] = torch.tensor([[e.loss, e.top1] for e in tested], dtype=torch.float64)
    found["agreed"] = agreed(group)
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def job(group: Group, folder: Path) -> Tensors:
    """All that two ranks do for these tests, since to start them takes longest."""
    return trained(group) | looked_into(group, folder) | ends_of_cells(group, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks come to."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [forking().Process(target=_rank, args=(folder, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def _rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    url = f"file://{folder / 'meet'}?rank={rank}&world_size=2"
    group = join("cpu", url, patience=SECONDS / 2, grace=2)
    save_file(job(group, folder), folder / f"{rank}.safetensors")
    group.close()


@pytest.fixture(scope="module")
def alone():
    """What one process comes to."""
    return trained(ALONE)


def of(tensors: Tensors, run: str) -> Tensors:
    """The part of one run."""
    return {key.removeprefix(run): v for key, v in tensors.items() if key.startswith(f"{run}/")}


RUNS = [f"mlp/{name}" for name in WITHOUT_NORM] + [f"conv/{name}" for name in WITH_NORM]


@pytest.mark.parametrize("run", RUNS)
def test_weights_buffers_and_masks_are_the_same_on_both_ranks(run, ranks):
    first, second = (of(tensors, run) for tensors in ranks)
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    assert any(name.startswith("/mask/") for name in first)


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_come_to_what_one_process_does(run, ranks, alone):
    shared, single = of(ranks[0], run), of(alone, run)
    assert shared.keys() == single.keys()
    for name, value in single.items():
        if name.startswith("/mask/"):
            assert torch.equal(shared[name], value), name
        elif name in ("/macs", "/curve"):
            torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(shared[name], value, rtol=0, atol=1e-5, msg=name)


def test_ranks_whose_masks_differ_end_with_the_update_the_layer_and_the_rank(ranks):
    for tensors in ranks:
        said = words(tensors["stray"])
        assert said.startswith(
            "after step 15, phase train, mask update 2: mask of fc2.weight on rank 1 is not that "
            "of rank 0."
        )
        assert "mask of fc2.weight on rank 1" in words(tensors["stray in steps"])


def test_dropout_differs_from_rank_to_rank_and_weights_do_not(ranks):
    first, second = ranks
    assert not torch.equal(first["noise"], second["noise"])
    assert torch.equal(first["noisy weight"], second["noisy weight"])


def test_a_shared_run_goes_on_as_if_it_had_not_been_stopped(ranks):
    for tensors in ranks:
        assert torch.equal(tensors["resumed weight"], tensors["noisy weight"])


def test_a_cell_that_fails_on_all_ranks_has_its_record_and_the_next_one_runs(ranks):
    for tensors in ranks:
        assert words(tensors["end of breaks"]) == "failed: ValueError: a mistake"
        assert words(tensors["end of rigl"]) == "ok: "


def test_a_cell_that_fails_on_one_rank_has_no_record_and_all_ranks_end(ranks):
    first, second = (words(tensors["end of breaks_on_one"]) for tensors in ranks)
    assert second.startswith("lost: ")
    assert "rank 1: failed (ValueError: a mistake)" in second
    assert "rank 0 died or hangs" in second  # it waits for the mean of the gradients
    assert first.startswith("lost: ")
    assert "rank 1: failed (ValueError: a mistake)" in first


def test_only_the_first_rank_writes_files(ranks):
    assert [int(tensors["written"]) for tensors in ranks] == [1, 0]


def test_scores_are_those_of_the_whole_batch_on_all_ranks(ranks):
    wanted = run_of(get_method("dense")(), tiny_model("conv")).gradients(2)["conv1.weight"]
    assert torch.equal(ranks[0]["scores"], ranks[1]["scores"])
    torch.testing.assert_close(ranks[0]["scores"], wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(ranks[0]["own scores"], ranks[1]["own scores"])
    torch.testing.assert_close(ranks[0]["own scores"], own_scores(ALONE), rtol=1e-4, atol=1e-6)


def test_batch_normalisation_is_that_of_the_whole_batch_and_so_are_its_derivatives(ranks):
    wanted = normalised(ALONE)
    for name in ("outputs", "first", "second"):
        joined = torch.cat([tensors[f"norm/{name}"] for tensors in ranks])
        torch.testing.assert_close(joined, wanted[name], rtol=1e-3, atol=1e-4)
    for name in ("mean", "variance"):
        assert torch.equal(ranks[0][f"norm/{name}"], ranks[1][f"norm/{name}"])
        torch.testing.assert_close(ranks[0][f"norm/{name}"], wanted[name])
    assert functional.batch_norm is plain_batch_norm


def test_a_shared_test_gives_the_figures_of_one_process_to_the_last_bit(ranks):
    model, data = tiny_model("conv"), tiny_data(SGD)
    wanted = [[e.loss, e.top1] for e in (evaluate(model, s, data) for s in (data.test, data.train))]
    for tensors in ranks:
        assert tensors["tested"].tolist() == wanted


def test_what_one_rank_wishes_all_do_at_the_same_step(ranks):
    first, second = (tensors["agreed"] for tensors in ranks)
    assert torch.equal(first, second)
    assert first[:12].sum() == 0
    assert first.sum(0).tolist()[0] == 1
    assert first[:, 1].nonzero().min() >= 30


def test_a_process_by_itself_has_its_own_wishes_at_once():
    pace = Pace(ALONE)
    assert pace.agree(True, False) == (True, False)
    assert pace.agree(False, True) == (False, True)


@pytest.mark.parametrize("augmented", [True, False])
def test_the_shares_of_a_batch_make_the_batch_of_one_process(augmented):
    data, stream = tiny_data(SGD), functools.partial(BatchStream, augmented=augmented)
    whole = stream(data, SGD, 3, "order")
    shares = [stream(data, SGD, 3, "order", share=(part, 4)) for part in range(4)]
    for position in (0, 15, 16, 40):
        images, labels = whole.batch(position)
        parts = [share.batch(position) for share in shares]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
        assert {len(part[1]) for part in parts} == {8}


def test_the_shares_of_an_order_follow_each_other():
    orders = [Order((0, "order"), 100, 12, (part, 3)) for part in range(3)]
    assert [order.part(9) for order in orders] == [
        (1, slice(12, 16)),
        (1, slice(16, 20)),
        (1, slice(20, 24)),
    ]


def test_a_hash_sees_every_bit_and_its_place():
    ones = torch.ones(50)
    hashes = {int(checksum(ones))}
    for one in range(50):
        for other in range(one):
            changed = ones.clone()
            changed[[one, other]] = 0
            hashes.add(int(checksum(changed)))
    assert len(hashes) == 1 + 50 * 49 / 2
    assert checksum(torch.tensor(0.0)) != checksum(torch.tensor(-0.0))
    assert checksum(torch.arange(6).view(2, 3).t()) == checksum(torch.tensor([0, 3, 1, 4, 2, 5]))


def test_gates_are_drawn_alike_on_all_ranks_and_masks_draw_nothing():
    drawn = {name: run_of(get_method(name)(), tiny_model()) for name in ("l0", "dpf", "rigl")}
    found = {name: draws_weights(run.state.model) for name, run in drawn.items()}
    assert found == {"l0": True, "dpf": False, "rigl": False}


def test_options_that_do_not_go_together_with_torchrun_are_refused():
    group = Group(0, 2, "cpu")
    Settings("cpu", ways=Ways(graph=False), group=group)
    for options, named in (
        ({"workers": 2, "ways": Ways(graph=False)}, "--workers: not with torchrun"),
        ({"ways": Ways(stack=4)}, "--stack and --graph: not with torchrun"),
        ({"places": 2, "ways": Ways(graph=False)}, "--cells-per-device: not with"),
        ({"ways": Ways(graph=False, compiled=True)}, "--compile: not with"),
    ):
        with pytest.raises(UsageError, match=named):
            Settings("cpu", group=group, **options)


def test_a_device_is_not_chosen_by_hand_where_each_process_has_its_own():
    with pytest.raises(UsageError, match="--device cuda:1: with torchrun give auto, cpu or cuda"):
        join("cuda:1")


class Launched:
    """Two processes of a command, as `torchrun` starts them, from a server that has loaded torch.

    Args:
        folder: they run in it, and what they print goes there.
        arguments: of the command line.
    """

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        # As torchrun's agent does: what the processes leave word in outlives them.
        self.store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "WORLD_SIZE": "2",
        }
        self.commands: list[Command] = []
        for rank in ("0", "1"):
            environment = common | {"RANK": rank, "LOCAL_RANK": rank}
            prepare = functools.partial(_launch, environment)
            output = folder / f"rank{rank}.txt"
            self.commands.append(Command(*arguments, output=output, prepare=prepare))
        self.processes = [command.process for command in self.commands]

    def wait(self) -> list[int]:
        """Exit statuses."""
        return [command.wait(SECONDS) for command in self.commands]

    def said(self, rank: int) -> str:
        """What one has printed so far."""
        return self.commands[rank].said


def _launch(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    ours.meet = functools.partial(ours.join, grace=2.0)


def compared(records: Path, other: Path) -> list[tuple[Record, Record]]:
    """Records of the same cells in two folders."""
    found, wanted = (list(Store(folder, "tiny").records()) for folder in (records, other))
    assert len(found) == len(wanted) > 0
    by_key = {record.spec.key: record for record in wanted}
    return [(record, by_key[record.spec.key]) for record in found]


def weights_of(records: Path, record: Record) -> Tensors:
    """A cell's finished network."""
    return load_file(Store(records, "tiny").weights(record.spec))


def test_a_suite_under_torchrun_gives_the_records_of_one_process(tmp_path):
    rounds = "[methods.lottery_ticket]\nbudget = { epochs = 1, max_multiple = 20 }"
    suite = write_suite(
        tmp_path,
        f"[methods.rigl]\n[methods.dpf]\n{rounds}",
        recipe=write_recipe(tmp_path, "batch = 64\nlr = 0.05\nvalidation = 64"),
        budget="{ epochs = 2, max_multiple = 1.2 }",
        sparsities="[0.5]",
    )
    records, single = tmp_path / "records", tmp_path / "single"
    launched = Launched(tmp_path, "run", suite, "--records", records, "--device", "cpu")
    train(suite, single)
    assert launched.wait() == [0, 0], launched.said(0) + launched.said(1)
    for record, wanted in compared(records, single):
        assert (record.status, record.steps) == (wanted.status, wanted.steps)
        assert (record.execution.devices, wanted.execution.devices) == (2, 1)
        assert record.counts == wanted.counts
        assert record.train_macs == pytest.approx(wanted.train_macs)
        assert record.top1 == pytest.approx(wanted.top1, abs=1)
        assert [phase.counts for phase in record.phases] == [p.counts for p in wanted.phases]
        assert [update.step for update in record.mask_updates] == [
            update.step for update in wanted.mask_updates
        ]
        for name, weight in weights_of(single, wanted).items():
            torch.testing.assert_close(weights_of(records, record)[name], weight, rtol=0, atol=1e-4)
    assert "rigl" in launched.said(0)
    assert launched.said(1) == ""


def test_a_run_whose_rank_dies_says_so_and_goes_on_where_it_was(tmp_path):
    suite = write_suite(tmp_path, "[methods.rigl]", budget="{ epochs = 20 }")
    records, undisturbed = tmp_path / "records", tmp_path / "undisturbed"

    def launch(folder: Path, *more: str) -> Launched:
        return Launched(tmp_path, "run", suite, "--records", folder, "--device", "cpu", *more)

    first = launch(records, "--checkpoint-seconds", "0")
    checkpoints = records / "tiny" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("*.previous")), SECONDS)
    first.processes[1].kill()
    assert first.wait()[0] == 1
    assert "rank 1 died or hangs" in first.said(0)
    assert "rank 0: failed" in first.said(0)
    assert list(Store(records, "tiny").records()) == []

    (saved,) = checkpoints.glob("*.safetensors")
    before = saved.stat().st_mtime_ns
    second = launch(records, "--checkpoint-seconds", "0")
    wait_for(lambda: saved.stat().st_mtime_ns != before, SECONDS)
    for process in second.processes:
        process.terminate()
    assert second.wait() == [143, 0]
    assert "Saved and stopped." in second.said(0)

    assert launch(records).wait() == [0, 0]
    assert launch(undisturbed).wait() == [0, 0]
    ((record, wanted),) = compared(records, undisturbed)
    assert record.weights_hash == wanted.weights_hash
    assert record.curve == wanted.curve
    assert not list(checkpoints.iterdir())


def test_a_rank_that_is_to_stop_waits_for_none_that_was_ended(tmp_path):
    """As where SIGTERM comes to all, and to one of them before it listens."""
    suite = write_suite(tmp_path, "[methods.rigl]", budget="{ epochs = 100 }")
    options = ("--records", tmp_path / "records", "--device", "cpu", "--checkpoint-seconds", "0")
    launched = Launched(tmp_path, "run", suite, *options)
    wait_for(
        lambda: list((tmp_path / "records" / "tiny" / "checkpoints").glob("*.previous")), SECONDS
    )
    leader, other = (process.pid for process in launched.processes)
    os.kill(other, signal.SIGSTOP)  # so that the first waits for its gradients
    os.kill(leader, signal.SIGTERM)
    os.kill(other, signal.SIGKILL)
    assert launched.wait() == [143, -signal.SIGKILL]
    note, last = (line for line in launched.said(0).splitlines() if not line.startswith("[W"))
    assert note.startswith("rigl: an error while it was to stop (RuntimeError: ")
    assert last == "Saved and stopped. The same command goes on."
    assert not list((tmp_path / "records" / "tiny" / "locks").iterdir())


@pytest.fixture
def pair(monkeypatch) -> tuple[Group, Group]:
    """Two ranks of one process, which only leave each other word, and would wait for days."""
    monkeypatch.setattr(ours, "HURRY_SECONDS", 0.05)
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = (Group(rank, 2, "cpu", 10**5, 10**5, store) for rank in range(2))
    return first, second


def test_who_is_to_stop_does_not_wait_for_the_first_rank(pair):
    first, second = pair
    with listen():
        assert first.begin("key") == 1
        begun = second.cells()
        assert next(begun) == "key"
        request()
        assert list(begun) == []
        with pytest.raises(RuntimeError, match="in vain"), second.in_turn("reading"):
            pass
        with pytest.raises(RankLost, match="rank 0 died or hangs; rank 1: failed"):
            second.end(1, "failed", "an error")


def test_a_rank_that_leaves_by_an_error_while_it_is_to_stop_has_left_word(pair):
    first, second = pair
    first.end(1, "stopped", "an error")
    second.end(1, "stopped")


@pytest.mark.faults  # three processes that import torch take as long as all the rest
def test_torchrun_itself_starts_it(tmp_path):
    suite = write_suite(tmp_path, "[methods.rigl]")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bench"]
    options = ["run", str(suite), "--records", str(tmp_path / "records"), "--device", "cpu"]
    ran = subprocess.run(
        [sys.executable, *command, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert ran.returncode == 0, ran.stderr
    ((path),) = (tmp_path / "records" / "tiny").glob("rigl*.json")
    assert json.loads(path.read_text())["execution"]["devices"] == 2
    assert ran.stdout.count("| rigl") == 1
