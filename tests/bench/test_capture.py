"""Recorded steps, on a tape where a GPU would have a graph: they train as steps that are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import capture, checkpoint
from bench.capture import WARM_UP, Captured, why_not
from bench.recipes import Recipe
from bench.step import Step
from bench.trainer import Trainer
from methods import METHODS, ranking
from tests.bench import tape
from tests.bench.devices import ADAM, RECIPE, assert_equal, outcome, tiny_run

CPU = torch.device("cpu")


@pytest.fixture
def recordings(monkeypatch) -> list[Captured]:
    """Lets the CPU record; fills with the step of each recording."""
    made: list[Captured] = []

    def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        replay = tape.recorded(work, device)
        made.append(work.__self__)  # type: ignore[attr-defined]
        return replay

    monkeypatch.setattr(capture, "recorded", recorded)
    monkeypatch.setattr(ranking, "on_host", lambda _: False)
    monkeypatch.setattr(capture, "why_not", lambda step: "")
    return made


@pytest.mark.parametrize(
    ("name", "recipe"),
    [(name, RECIPE) for name in METHODS]
    + [(name, ADAM) for name in ("dense", "dpf", "deepr", "soft_deepr", "l0")],
)
def test_replayed_steps_train_as_eager_ones_do(name, recipe, recordings):
    steps = 6 if name == "lottery_ticket" else 64 if name == "ac_dc" else 16  # of each round
    eager = finish(tiny_run(name, "cpu", recipe=recipe, steps=steps))
    trainer = captured(name, recipe, steps)  # it seeds the noise of all that follows
    assert_equal(finish(trainer), eager)
    assert recordings
    assert hot(trainer).replayed


@pytest.mark.parametrize("name", ["rigl", "lottery_ticket", "deepr", "l0", "top_kast"])
def test_a_recorded_run_goes_on_from_its_checkpoint_bit_for_bit(name, recordings, tmp_path):
    steps = 8 if name == "lottery_ticket" else 24
    whole = finish(tiny_run(name, "cpu", steps=steps))
    first = captured(name, steps=steps)
    for done in first.run():
        if done == first.total_steps // 2:
            checkpoint.write(first, tmp_path / "run", "key")
            break
    again = captured(name, steps=steps)
    checkpoint.read(again, tmp_path / "run", "key")
    assert_equal(finish(again), whole)
    assert hot(again).replayed


def test_the_first_steps_are_computed_and_the_others_replayed(recordings, monkeypatch):
    computed: list[int] = []
    trainer = captured("dense")
    plain = Step.compute
    monkeypatch.setattr(
        Step, "compute", lambda step: (computed.append(trainer.cursor.total), plain(step))[1]
    )
    finish(trainer)
    # The last is the recording, which computes no step.
    assert computed == [*range(WARM_UP), WARM_UP]
    assert len(recordings) == 1


def test_a_step_is_recorded_anew_when_its_tensors_were_replaced(recordings):
    runs = captured("top_kast", steps=40), tiny_run("top_kast", "cpu", steps=40)
    for run in runs:
        for done in run.run():
            if done == 12:
                held = run.state.slots["held"]
                run.state.slots["held"] = {name: value.clone() for name, value in held.items()}
                run.hot.changed()
    assert len(recordings) == 2
    assert_equal(*map(outcome, runs))


def test_a_recording_stays_while_masks_are_only_written(recordings):
    trainer = captured("rigl", steps=40)
    finish(trainer)
    assert trainer.cursor.updates > 0
    assert len(recordings) == 1


@pytest.mark.parametrize("name", ["rigl", "l0", "deepr", "dpf"])
def test_a_recording_that_fails_leaves_the_run_as_it_was(name, monkeypatch):
    tries: list[int] = []

    def broken(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        tries.append(1)
        tape.recorded(work, device)  # and then
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(capture, "recorded", broken)
    monkeypatch.setattr(capture, "why_not", lambda step: "")
    eager = finish(tiny_run(name, "cpu"))
    trainer = captured(name)
    assert_equal(finish(trainer), eager)
    assert len(tries) == 1
    assert not hot(trainer).replayed
    reason = "recording failed: operation not permitted when stream is capturing"
    assert hot(trainer).reason == reason


def test_gradients_of_a_broken_recording_are_dropped(monkeypatch):
    def broken(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        for parameter in trainer.state.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        raise RuntimeError("no")

    monkeypatch.setattr(capture, "recorded", broken)
    monkeypatch.setattr(capture, "why_not", lambda step: "")
    trainer = captured("dense")
    assert_equal(finish(trainer), finish(tiny_run("dense", "cpu")))


def test_errors_of_a_step_are_not_taken_for_those_of_a_recording(monkeypatch):
    monkeypatch.setattr(capture, "why_not", lambda step: "on a whim")
    trainer = captured("dense")

    def wrong(*_: object) -> None:
        raise RuntimeError("from the network")

    trainer.state.model.register_forward_pre_hook(wrong)
    with pytest.raises(RuntimeError, match="from the network"):
        finish(trainer)
    assert hot(trainer).reason == "on a whim"


def test_on_a_cpu_steps_are_computed_and_the_reason_is_said():
    trainer = captured("dense")
    finish(trainer)
    assert why_not(hot(trainer)) == hot(trainer).reason == "the device is cpu"
    assert not hot(trainer).replayed


def test_the_tape_is_no_pushover():
    # A step that counts on the host gives other numbers on the tape than when it is computed.
    counter = {"steps": 0}
    total = torch.zeros(())

    class Work:
        state, loss = tiny_run("dense", "cpu").state, total

        def __call__(self) -> None:
            counter["steps"] += 1
            total.add_(counter["steps"])

    work = Work()
    replay = tape.recorded(work.__call__, CPU)
    assert total == 0
    for _ in range(3):
        replay()
    assert total == 3  # 1 + 1 + 1; computed, it would be 1 + 2 + 3


def captured(name: str, recipe: Recipe = RECIPE, steps: int = 24) -> Trainer:
    return tiny_run(name, "cpu", recipe=recipe, steps=steps, step=Captured)


def hot(trainer: Trainer) -> Captured:
    assert isinstance(trainer.hot, Captured)
    return trainer.hot


def finish(trainer: Trainer) -> dict[str, torch.Tensor]:
    for _ in trainer.run():
        pass
    return outcome(trainer)
