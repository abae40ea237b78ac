"""What every method must satisfy, as functions that take a builder of fresh trainers.

A builder makes the same cell each time that it is called: new network, new data streams, new state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bench.step
from bench import checkpoint
from bench.scrutiny import cuts, differences_from_plain, outcome, run_tensors
from bench.scrutiny import network_weight as network_weight
from bench.trainer import Trainer
from bench.trial import ADAM, SGD
from methods.api import SparsityMethod
from tests.tiny import tiny_trainer, train

Builder = Callable[[], Trainer]

KEY = "0123456789ab"

SETTINGS = {"conv-sgd": ("conv", SGD), "mlp-adam": ("mlp", ADAM)}
"""Id -> model and recipe: BatchNorm with momentum buffers, and Adam's three buffers."""


def builder(
    method: SparsityMethod, setting: str = "conv-sgd", *, density: float = 0.1, steps: int = 24
) -> Builder:
    """Makes the tiny cell of one setting anew with every call."""
    model, recipe = SETTINGS[setting]
    return lambda: tiny_trainer(method, density=density, model=model, steps=steps, recipe=recipe)


def assert_resumes_bit_for_bit(build: Builder, folder: Path, at: Sequence[int] = ()) -> None:
    """Goes on from a checkpoint file at every cut, each time in a fresh trainer, to the next cut.

    Every file must hold what that of a run holds that was saved there and never left.
    """
    saved = build()
    chosen = list(at) or cuts(saved.plan)
    for cut in chosen:
        go_on(saved, cut)
        checkpoint.write(saved, folder / f"{cut} saved", KEY)
    expected = outcome(train(build()))
    assert outcome(train(saved)).differences(expected) == [], "saving has changed the run"

    resumed = build()
    for cut in chosen:
        go_on(resumed, cut)
        checkpoint.write(resumed, folder / f"{cut}", KEY)
        assert different(folder / f"{cut} saved", folder / f"{cut}") == [], f"before step {cut}"
        resumed = build()
        # What lies around must not matter: noise, and numbers of another run in the tensors.
        torch.manual_seed(cut)
        checkpoint.read(resumed, folder / f"{cut}", KEY)
        assert resumed.cursor.total == cut
    differences = outcome(train(resumed)).differences(expected)
    assert differences == [], f"resumed after step {cut} of {resumed.total_steps}"


def go_on(trainer: Trainer, step: int) -> None:
    """Trains until so many steps are done."""
    if trainer.cursor.total < step:
        next(done for done in trainer.run() if done == step)


def different(one: Path, other: Path) -> list[str]:
    """Names of the tensors in which two checkpoint files differ."""
    first, second = (
        {name: checkpoint.tensor_hash({name: tensor}) for name, tensor in load_file(path).items()}
        for path in (one, other)
    )
    assert first.keys() == second.keys()
    return [name for name in first if first[name] != second[name]]


def assert_plain(model: nn.Module, fresh: nn.Module) -> None:
    """The network has the modules and tensors of a fresh one, and parameters that are leaves."""
    assert differences_from_plain(model, fresh) == []
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
    assert all(p.is_leaf for p in model.parameters())


def addresses(trainer: Trainer) -> dict[str, int]:
    """Where the tensors of a run lie in memory."""
    return {name: tensor.data_ptr() for name, tensor in run_tensors(trainer).items()}


def assert_tensors_stay_in_place(trainer: Trainer) -> None:
    """No tensor of the run is replaced, from `prepare` to the last step."""
    prepared = addresses(trainer)
    for done in trainer.run():
        found = addresses(trainer)
        if done == 1:  # slots are made as the phase begins
            assert {name: found[name] for name in prepared} == prepared
            prepared = found
        assert found == prepared, f"after step {done}"


@contextmanager
def compiled_forward(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trainers compute with the compiled step, and a graph break or a recompilation is an error."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(bench.step.forward, backend="aot_eager", fullgraph=True)
    with (
        monkeypatch.context() as patch,
        torch._dynamo.config.patch(error_on_recompile=True),
        warnings.catch_warnings(),
    ):
        # torch traces an autograd.Function by making one, and then warns that one should not.
        warnings.filterwarnings("ignore", message=".*should not be instantiated")
        patch.setattr(bench.step, "forward", compiled)
        yield
    torch.compiler.reset()


def assert_compiles_once(build: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph serves the whole run, whatever the masks do, with the eager step's very bits."""
    expected = outcome(train(build()))
    trainer = build()
    seen: set[bytes] = set()
    with compiled_forward(monkeypatch):
        for _ in trainer.run():
            seen.add(b"".join(mask.numpy().tobytes() for mask in trainer.state.masks.values()))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    updates = sum(phase.updates.count(phase.steps) for phase in trainer.plan if phase.updates)
    # A filter whose BatchNorm shifts by 0 gets no gradient behind a ReLU: it stays the smallest.
    still = updates <= 3 or trainer.method.controls == "filters"
    assert len(seen) > 3 or still, "the masks must change for this test to say anything"
    assert outcome(trainer).differences(expected) == []
