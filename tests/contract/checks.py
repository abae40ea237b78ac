"""What every method must satisfy, as functions that take a builder of fresh trainers.

A builder makes the same cell each time that it is called: new network, new data streams, new state.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bench.trainer
from bench import checkpoint
from bench.recipes import Recipe
from bench.trainer import Trainer
from methods.api import Phase, SparsityMethod
from tests.tiny import copied, tiny_trainer, train

Builder = Callable[[], Trainer]

KEY = "0123456789ab"

SGD = Recipe(
    title="momentum, weight decay, crops, flips; 448 images make 14 steps an epoch",
    batch=32,
    lr=0.05,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    drops=(0.5, 0.75),
    warmup=0.1,
    crop=2,
    flip=True,
    validation=64,
)
ADAM = Recipe(
    title="Adam with weight decay, crops at mirrored borders, cosine",
    batch=32,
    lr=0.01,
    optimizer="adam",
    weight_decay=1e-3,
    schedule="cosine",
    crop=2,
    padding="reflect",
    flip=True,
    validation=64,
)
SETTINGS = {"conv-sgd": ("conv", SGD), "mlp-adam": ("mlp", ADAM)}
"""Id -> model and recipe: BatchNorm with momentum buffers, and Adam's three buffers."""


def builder(
    method: SparsityMethod, setting: str = "conv-sgd", *, density: float = 0.1, steps: int = 24
) -> Builder:
    """Makes the tiny cell of one setting anew with every call."""
    model, recipe = SETTINGS[setting]
    return lambda: tiny_trainer(method, density=density, model=model, steps=steps, recipe=recipe)


@dataclass
class Outcome:
    """Everything that a finished run leaves, apart from times."""

    tensors: dict[str, Tensor]
    counters: dict[str, object]

    def differences(self, other: Outcome) -> list[str]:
        """Names of what is not the same, bit for bit."""
        assert self.tensors.keys() == other.tensors.keys()
        found = [n for n, t in self.tensors.items() if not torch.equal(t, other.tensors[n])]
        return found + [n for n, value in self.counters.items() if value != other.counters[n]]


def outcome(trainer: Trainer) -> Outcome:
    """What a run left; to be taken after its end."""
    state, cursor = trainer.state, trainer.cursor
    tensors = {f"model {name}": tensor for name, tensor in state.model.state_dict().items()}
    tensors |= {f"mask {name}": mask for name, mask in state.masks.items()}
    tensors |= {f"optimizer {n}": tensor for n, tensor in trainer.optimizer_tensors().items()}
    tensors |= {f"slot {s} {n}": t for s, values in state.slots.items() for n, t in values.items()}
    tensors |= {
        f"snapshot {name} {n}": tensor
        for name, snapshot in trainer.snapshots.items()
        for n, tensor in (snapshot.model | snapshot.optimizer).items()
    }
    tensors |= {"lr": state.lr, "progress": state.progress}
    tensors |= {"generator": trainer.generator.get_state(), "global": torch.get_rng_state()}
    counters: dict[str, object] = {
        name: getattr(cursor, name)
        for name in ("phase", "step", "position", "total", "extra_batches", "curve", "phases")
    }
    counters["numbers"] = trainer.optimizer_numbers()
    counters["snapshots"] = {n: (s.position, s.numbers) for n, s in trainer.snapshots.items()}
    return Outcome(copied(tensors), counters)


def cuts(plan: Sequence[Phase]) -> list[int]:
    """Steps done at the cuts: none, and the first, a middle and the last step of each phase."""
    ends = list(itertools.accumulate(phase.steps for phase in plan))
    inside = {
        start + step
        for start, phase in zip([0, *ends], plan, strict=False)
        for step in (1, phase.steps // 2, phase.steps)
        if 1 <= step <= phase.steps
    }
    return sorted({0} | inside)


def assert_resumes_bit_for_bit(build: Builder, folder: Path, at: Sequence[int] = ()) -> None:
    """Goes on from a checkpoint file at every cut, each time in a fresh trainer."""
    reference = build()
    chosen = list(at) or cuts(reference.plan)
    if 0 in chosen:
        checkpoint.write(reference, folder / "0", KEY)
    for done in reference.run():
        if done in chosen:
            checkpoint.write(reference, folder / str(done), KEY)
    expected = outcome(reference)

    assert outcome(train(build())).differences(expected) == [], "saving has changed the run"
    for cut in chosen:
        resumed = build()
        # What lies around must not matter: noise, and numbers of another run in the tensors.
        torch.manual_seed(cut)
        checkpoint.read(resumed, folder / str(cut), KEY)
        assert resumed.cursor.total == cut
        differences = outcome(train(resumed)).differences(expected)
        assert differences == [], f"resumed after step {cut} of {reference.total_steps}"


def structure(model: nn.Module) -> tuple[dict[str, type], dict[str, torch.Size]]:
    """Module types and tensor shapes by name."""
    modules = {name: type(module) for name, module in model.named_modules()}
    return modules, {name: tensor.shape for name, tensor in model.state_dict().items()}


def assert_plain(model: nn.Module, fresh: nn.Module) -> None:
    """The network has the modules and tensors of a fresh one, and parameters that are leaves."""
    assert structure(model) == structure(fresh)
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
    assert all(p.is_leaf and p.isfinite().all() for p in model.parameters())
    assert dict(model.named_parameters()).keys() == dict(fresh.named_parameters()).keys()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(module, hook) for module in model.modules() for hook in hooks)


def network_weight(model: nn.Module, name: str) -> Tensor:
    """The weight that the forward pass uses, behind the method's parametrization if it has one."""
    path, _, tensor = name.rpartition(".")
    weight: Tensor = getattr(model.get_submodule(path), tensor)
    return weight.detach()


def addresses(trainer: Trainer) -> dict[str, int]:
    """Where the tensors of a run lie in memory."""
    state = trainer.state
    tensors: dict[str, Tensor] = {"lr": state.lr, "progress": state.progress}
    tensors |= {f"mask {name}": mask for name, mask in state.masks.items()}
    tensors |= {f"weight {name}": weight for name, weight in state.weights.items()}
    tensors |= {f"parameter {name}": p for name, p in state.model.named_parameters()}
    tensors |= {f"buffer {name}": buffer for name, buffer in state.model.named_buffers()}
    tensors |= {f"slot {s} {n}": t for s, values in state.slots.items() for n, t in values.items()}
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


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
    compiled = torch.compile(bench.trainer.forward, backend="aot_eager", fullgraph=True)
    with (
        monkeypatch.context() as patch,
        torch._dynamo.config.patch(error_on_recompile=True),
        warnings.catch_warnings(),
    ):
        # torch traces an autograd.Function by making one, and then warns that one should not.
        warnings.filterwarnings("ignore", message=".*should not be instantiated")
        patch.setattr(bench.trainer, "forward", compiled)
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
    assert len(seen) > 3 or updates <= 3, "the masks must change for this test to say anything"
    assert outcome(trainer).differences(expected) == []
