"""Small real runs and hand-written ones, for the tests of methods and harness.

`tiny_trainer("rigl", density=0.1)` is the real `Trainer` on the `synthetic` data with a network of
a few thousand weights; a run of 24 steps takes about 0.1 s. `train(trainer)` runs it to its end; in
a loop over `trainer.run()` a test can look at the state after each step, and `watch_updates`
keeps what it was before and after each update of the masks.

`hand_state({"w": [0.5, -0.1]})` is a `TrainState` whose tensors are written in the test, and
`FakeRun(state, ...)` is the smallest `methods.api.Run` around it: its gradients are what the test
says.

Import as `from tests.tiny import tiny_trainer, ...`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.data import Data
from bench.recipes import Recipe
from bench.trainer import Trainer
from bench.trial import TinyConv, TinyMLP, images, make_trainer, network, random_source
from bench.trial import train as train
from methods import get_method
from methods.api import (
    Budget,
    OptimizerSettings,
    Phase,
    Scores,
    Source,
    SparsityMethod,
    TrainState,
)

TINY_RECIPE = Recipe(
    title="tiny: 16 steps an epoch, drops at 50 % and 75 %",
    batch=32,
    lr=0.05,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    drops=(0.5, 0.75),
)
"""Momentum and weight decay are on: a method that leaves pruned weights to them is found out."""

STEPS_PER_EPOCH = 16
"""512 synthetic images in batches of 32."""

tiny_source = random_source

MODELS: dict[str, type[nn.Module]] = {"mlp": TinyMLP, "conv": TinyConv}


def tiny_model(name: str = "mlp", seed: int = 0) -> nn.Module:
    """A tiny network, its initial weights fixed by the seed; channels last, as in a real cell."""
    return network(name, seed)


def tiny_data(recipe: Recipe = TINY_RECIPE) -> Data:
    """The `synthetic` data on the CPU."""
    return images(recipe)


def tiny_trainer(
    method: str | SparsityMethod,
    *,
    density: float | None = 0.1,
    model: str = "mlp",
    steps: int = 24,
    seed: int = 0,
    recipe: Recipe | None = None,
    prunable: str = "all",
) -> Trainer:
    """A real trainer that has not begun.

    Args:
        method: a name of `methods.METHODS` with its defaults, or an instance with options.
        density: the target; ignored by methods that take none, such as `dense`.
        model: `mlp` or `conv` (with BatchNorm).
        steps: length of the budget; an epoch has 16 steps under the default recipe.
        seed: of the initial weights, the data order and the method's choices.
        recipe: how it is trained; None: `TINY_RECIPE`.
        prunable: preset of `bench.prunable`.
    """
    chosen = get_method(method)() if isinstance(method, str) else method
    return make_trainer(
        chosen,
        model,
        recipe or TINY_RECIPE,
        density=density,
        steps=steps,
        seed=seed,
        prunable=prunable,
    )


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that later steps do not write, such as `copied(trainer.state.masks)`."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def nonzero(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Non-zeros of each tensor."""
    return {name: int(tensor.count_nonzero()) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Update:
    """Copies of the state around one call of the method's `update`.

    Attributes:
        step: optimizer steps done in the phase.
        old_weights: and `old_masks`: before the update; `weights` and `masks`: after it.
        memory: optimizer memory after it: weight name -> buffer name -> tensor.
    """

    step: int
    old_weights: dict[str, Tensor]
    old_masks: dict[str, Tensor]
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    memory: dict[str, dict[str, Tensor]]


def watch_updates(trainer: Trainer) -> list[Update]:
    """A list that fills with an entry for each update as the trainer runs."""
    log: list[Update] = []
    plain = trainer.method.update

    def update(run: Trainer) -> None:
        state = run.state
        old_weights, old_masks = copied(state.weights), copied(state.masks)
        plain(run)
        memory = {
            name: copied(state.optimizer.state.get(weight, {}))
            for name, weight in state.weights.items()
        }
        log.append(
            Update(
                run.step,
                old_weights,
                old_masks,
                copied(state.weights),
                copied(state.masks),
                memory,
            )
        )

    object.__setattr__(trainer.method, "update", update)  # methods are frozen
    return log


Values = Tensor | Sequence[Any]


def hand_state(
    weights: Mapping[str, Values],
    masks: Mapping[str, Values] | None = None,
    momentum: Mapping[str, Values] | None = None,
    *,
    channels_last: bool = False,
) -> TrainState:
    """A state with tensors written by hand.

    Args:
        weights: name -> values; nested lists or tensors, any shape.
        masks: likewise; None: all ones.
        momentum: SGD's momentum buffers, likewise; None: the optimizer has no state yet, as before
            the first step.
        channels_last: memory layout of the 4-d tensors.
    """

    def tensor(values: Values) -> Tensor:
        made = torch.as_tensor(values, dtype=torch.float32).clone()
        if channels_last and made.ndim == 4:
            made = made.to(memory_format=torch.channels_last)
        return made

    parameters = {name: nn.Parameter(tensor(values)) for name, values in weights.items()}
    optimizer = torch.optim.SGD(list(parameters.values()), lr=0.1, momentum=0.9)
    for name, values in (momentum or {}).items():
        optimizer.state[parameters[name]]["momentum_buffer"] = tensor(values)
    made = {
        name: torch.ones_like(parameter.detach()) if masks is None else tensor(masks[name])
        for name, parameter in parameters.items()
    }
    # A module that holds the parameters; names with dots cannot be registered as they are.
    model = nn.ParameterList(parameters.values())
    return TrainState(model, parameters, made, optimizer, torch.tensor(0.1), torch.zeros(()))


def momentum_of(state: TrainState, name: str) -> Tensor:
    """SGD's momentum buffer of a weight."""
    buffer: Tensor = state.optimizer.state[state.weights[name]]["momentum_buffer"]
    return buffer


@dataclass
class FakeRun:
    """The least that implements `methods.api.Run`, with every value set by the test.

    Attributes:
        dense_gradients: what `gradients` returns.
        asked: the arguments of each call of `gradients`: (batches, augmented).
    """

    state: TrainState
    budget: Budget = Budget(1000, 100, 3200, (0.5, 0.75))  # noqa: RUF009  frozen
    density: float | None = 0.1
    phase: Phase = Phase("train", 1000)  # noqa: RUF009  frozen
    step: int = 0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    dense_gradients: Scores = field(default_factory=dict)
    asked: list[tuple[int, bool]] = field(default_factory=list)
    source: Source | None = None

    def fresh_weights(self, draw: int) -> dict[str, Tensor]:
        raise NotImplementedError("a FakeRun has no network; use tiny_trainer")

    def batches(self, count: int, *, augmented: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError("a FakeRun has no data; use tiny_trainer")

    input_shape: tuple[int, int, int] = (3, 16, 16)

    def logits(self, images: Tensor) -> Tensor:
        raise NotImplementedError("a FakeRun has no network; use tiny_trainer")

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError("a FakeRun has no network; use tiny_trainer")

    def gradients(self, batches: int = 1, *, augmented: bool = True) -> Scores:
        self.asked.append((batches, augmented))
        return self.dense_gradients


def started(
    method: SparsityMethod,
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    examples: int = 512,
    steps: int = 20,
    shape: tuple[int, ...] = (1, 28, 28),
) -> TrainState:
    """The state of a run of a plain network as its only phase begins, under SGD at 0.1."""
    names = method.prunable(model)
    masks = {name: torch.ones_like(model.get_parameter(name).detach()) for name in names}
    weights = method.prepare(model, masks, shape)
    own = set(map(id, weights.values()))
    others = {name: p for name, p in model.named_parameters() if id(p) not in own}
    lr = torch.tensor(0.1)
    optimizer = method.optimizer(weights, others, lr, OptimizerSettings(weight_decay=weight_decay))
    state = TrainState(model, weights, masks, optimizer, lr, torch.zeros(()))
    with torch.no_grad():
        method.start_phase(FakeRun(state, Budget(steps, 10, examples)))
        method.project(state)
    return state
