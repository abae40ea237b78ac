"""A checkpoint whose checksums are right and whose content cannot be of the run is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from bench import checkpoint
from bench.errors import CheckpointError
from bench.recipes import Recipe
from bench.trainer import Trainer
from methods.lottery import LotteryTicket
from tests.tiny import tiny_trainer, train

KEY = "0123456789ab"
STEPS = 13
ADAM = Recipe(title="", batch=32, lr=0.001, optimizer="adam", validation=64)
TIMM = Recipe(title="", batch=32, lr=0.001, optimizer="timm:nadamw", validation=64)
MOMENTUM = "optimizer//0.momentum_buffer"

Header, Tensors = dict[str, str], dict[str, Tensor]


def rigl() -> Trainer:
    return tiny_trainer("rigl")


def adam() -> Trainer:
    return tiny_trainer("rigl", recipe=ADAM)


def timm() -> Trainer:
    return tiny_trainer("rigl", recipe=TIMM)


def rounds() -> Trainer:
    """Several phases, which go back to a snapshot."""
    return tiny_trainer(LotteryTicket(), density=0.64, steps=6)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.safetensors"


def saved(path: Path, run: Callable[[], Trainer]) -> tuple[Header, Tensors]:
    """Header and tensors of a run after some steps, without its checksums."""
    trainer = run()
    for _ in itertools.islice(trainer.run(), STEPS):
        pass
    checkpoint.write(trainer, path, KEY)
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    del header["digest"], header["layout"]
    return header, tensors


def put(path: Path, header: Header, tensors: Tensors) -> None:
    """Writes them with checksums that are right."""
    header = header | {"layout": checkpoint._layout(tensors)}
    header["digest"] = checkpoint._digest(header, tensors)
    path.write_bytes(save(tensors, metadata=header))


def go_on(path: Path, run: Callable[[], Trainer]) -> Trainer:
    checkpoint.begun(path, KEY)
    resumed = run()
    checkpoint.read(resumed, path, KEY)
    return resumed


def refused(path: Path, run: Callable[[], Trainer], text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        go_on(path, run)
    said = str(caught.value)
    assert said.startswith(f"{path}: damaged checkpoint (")
    assert text in said
    assert said.isprintable()


def test_what_was_not_changed_is_taken_up(path):
    for run in (rigl, adam, timm, rounds):
        put(path, *saved(path, run))
        assert go_on(path, run).cursor.total == STEPS


CURSORS: list[tuple[dict[str, Any], str]] = [
    ({"phase": 99}, "no step 1 of phase 99 is in the plan"),
    ({"phase": -1}, "`int` >= 0"),
    ({"phase": 0.5}, "Expected `int`"),
    ({"step": 10**6}, "no step 1000000 of phase 3 is in the plan"),
    ({"step": -1}, "`int` >= 0"),
    ({"phase": 1}, "the phases before phase 1 are not those of the plan"),
    ({"phases": []}, "the phases before phase 3 are not those of the plan"),
    ({"phase_seconds": [1.0]}, "times of 1 phases, where 3 have ended"),
    ({"phase_seconds": [1.0, 1.0, -1.0]}, "`float` >= 0"),
    ({"total": 7}, "7 steps in all, which are not those of the phases"),
    *(({name: 10**15}, "not what a run can have counted") for name in ("position", "drawn")),
    *(({name: 10**15}, "not what a run can have counted") for name in ("scored", "updates")),
    *(({name: -1}, "`int` >= 0") for name in ("position", "drawn", "scored", "updates")),
    *(({f"{name}_seconds": -1.0}, "`float` >= 0") for name in ("train", "update", "eval")),
    ({"train_seconds": 1e200}, "`float` <= 1e+100"),
    ({"curve": [[10**400, 1.0]]}, "`int` <= 1000000000000000000"),
    ({"curve": [[-1, 1.0]]}, "`int` >= 0"),
    ({"origins": [{"commit": "\x1b[2J", "place": ""}]}, "not one line"),
    ({"mask_updates": [[-1, 0.1, 0.1, 0.1, 0.1]]}, "`int` >= 0"),
]


@pytest.mark.parametrize(("changes", "text"), CURSORS, ids=lambda value: str(value)[:40])
def test_a_cursor_that_is_not_of_the_plan_is_refused(changes, text, path):
    header, tensors = saved(path, rounds)
    cursor = json.loads(header["cursor"])
    assert (cursor["phase"], cursor["step"]) == (3, 1)
    put(path, header | {"cursor": json.dumps(cursor | changes)}, tensors)
    refused(path, rounds, text)


def test_phases_of_other_names_or_lengths_are_refused(path):
    header, tensors = saved(path, rounds)
    for field, value in (("name", "elsewhere"), ("steps", 3)):
        cursor = json.loads(header["cursor"])
        cursor["phases"][1][field] = value
        put(path, header | {"cursor": json.dumps(cursor)}, tensors)
        refused(path, rounds, "the phases before phase 3 are not those of the plan")


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("width", "0", "`int` >= 1"),
        ("width", "5000", "`int` <= 4096"),
        ("width", "many", "invalid literal"),
        ("counted", "-1", "`int` >= 0"),
        ("counted", "14", "the cost of 14 steps, where 13 are done"),
        ("place", "a\x1b[2Jb", "is no place"),
        ("slots", '{"sign": ["fc1.weight"]}', "lacks 'fc1.weight'"),
        ("slots", "[" * 10_000, ""),
        ("numbers", '{"momentum": 1}', "the optimizer has no 'momentum'"),
        ("numbers", '{"99.step": 1}', "the optimizer has no '99.step'"),
        ("numbers", '{"0.momentum_buffer": 1}', "remembers no '0.momentum_buffer'"),
        ("numbers", '{"group0.lr": 1}', "'group0.lr' is an option of the optimizer"),
        ("numbers", '{"group7.lr": 1}', "the optimizer has no 'group7.lr'"),
    ],
)
def test_a_header_that_is_not_of_the_run_is_refused(field, value, text, path):
    header, tensors = saved(path, rigl)
    put(path, header | {field: value}, tensors)
    refused(path, rigl, text)


@pytest.mark.parametrize(
    "name", ["losses", "meter", "mask//fc1.weight", "change//fc1.weight", MOMENTUM]
)
def test_a_tensor_of_another_shape_or_type_is_not_stretched_or_rounded(name, path):
    header, tensors = saved(path, rigl)
    one = tensors[name]
    for other in (one.new_zeros(()), one[None].clone(), one.to(torch.float16), one.new_zeros(5)):
        put(path, header, tensors | {name: other})
        refused(path, rigl, "that of the run")


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, float("nan")])
def test_a_mask_of_other_numbers_is_refused(value, path):
    header, tensors = saved(path, rigl)
    tensors["mask//fc1.weight"][0, 0] = value
    put(path, header, tensors)
    refused(path, rigl, "the mask of fc1.weight holds other numbers than 0 and 1")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e300])
def test_a_cost_that_no_record_can_hold_is_refused(value, path):
    header, tensors = saved(path, rigl)
    tensors["meter"][0] = value
    put(path, header, tensors)
    refused(path, rigl, "not what a training can have cost")


def test_a_tensor_that_lacks_is_named(path):
    header, tensors = saved(path, rigl)
    for name in ("losses", "mask//fc1.weight", "change//fc1.weight", "rng/cpu"):
        rest = {other: value for other, value in tensors.items() if other != name}
        put(path, header, rest)
        refused(path, rigl, f"lacks '{name.rpartition('//')[2]}'")


def test_a_name_of_a_tensor_cannot_write_to_the_terminal(path):
    header, tensors = saved(path, rigl)
    put(path, header, tensors | {"model//a\x1b[2J\nb": torch.zeros(1)})
    refused(path, rigl, "damaged checkpoint")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("0.other", "the optimizer remembers no '0.other'"),
        ("99.momentum_buffer", "the optimizer has no '99.momentum_buffer'"),
        ("-1.momentum_buffer", "the optimizer has no '-1.momentum_buffer'"),
        ("group0.lr", "'group0.lr' is an option of the optimizer, and no memory"),
    ],
)
def test_the_optimizer_is_given_no_more_than_it_remembers(name, text, path):
    header, tensors = saved(path, rigl)
    put(path, header, tensors | {f"optimizer//{name}": torch.tensor(5.0)})
    refused(path, rigl, text)


def test_options_of_an_optimizer_of_others_stay_too(path):
    header, tensors = saved(path, timm)
    put(path, header, tensors | {"optimizer//group0.lr": torch.tensor(5.0)})
    refused(path, timm, "'group0.lr' is an option of the optimizer, and no memory")


@pytest.mark.parametrize(("run", "entry"), [(rigl, "momentum_buffer"), (adam, "step")])
def test_what_the_optimizer_has_forgotten_of_one_parameter_begins_at_0(run, entry, path):
    header, tensors = saved(path, run)
    tensors = {name: v for name, v in tensors.items() if not name.startswith("optimizer//1.")}
    put(path, header, tensors)
    resumed = go_on(path, run)
    memory = resumed.state.optimizer.state[resumed.optimized()[1]]
    assert entry in memory
    assert not any(value.count_nonzero() for value in memory.values())
    train(resumed)
    assert resumed.cursor.total == resumed.total_steps


def test_a_run_goes_on_though_its_file_is_cut_short_afterwards(path):
    put(path, *saved(path, rounds))
    resumed = go_on(path, rounds)
    path.write_bytes(b"")  # not by the harness, which renames; what is mapped would end the process
    train(resumed)
    assert resumed.cursor.total == resumed.total_steps


def test_a_snapshot_that_does_not_fit_is_refused(path):
    header, tensors = saved(path, rounds)
    name = "snapshot/start/model//fc1.weight"
    rest = {other: value for other, value in tensors.items() if other != name}
    for changed, text in (
        (rest, "snapshot 'start' has other tensors than the network"),
        (tensors | {name: tensors[name][:1].clone()}, "that of the run"),
        (
            tensors | {"snapshot/start/optimizer//0.momentum_buffer": torch.zeros(3)},
            "that of the run",
        ),
        (
            {n: v for n, v in tensors.items() if not n.startswith("snapshot/start/model")},
            "lacks 'snapshot/start/model'",
        ),
    ):
        put(path, header, changed)
        refused(path, rounds, text)


@pytest.mark.parametrize(
    ("snapshots", "text"),
    [
        ({}, "no snapshot of phases that have ended: 'start'"),
        ({"start": [10**15, {}]}, "snapshot 'start' is of batch 1000000000000000"),
        ({"start": [-1, {}]}, "`int` >= 0"),
        ({"start": [3, {"x": 1}]}, "the optimizer has no 'x'"),
    ],
)
def test_a_list_of_snapshots_that_the_plan_does_not_know_is_refused(snapshots, text, path):
    header, tensors = saved(path, rounds)
    put(path, header | {"snapshots": json.dumps(snapshots)}, tensors)
    refused(path, rounds, text)
