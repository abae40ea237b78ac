"""Tiny real cells on which methods are tried, and a witness of what their hooks do there."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import datasets
from bench.data import Data, to_device
from bench.prunable import prunable_names, shapes
from bench.recipes import Recipe
from bench.seeds import derive
from bench.trainer import Trainer
from methods.allocation import keep_count
from methods.api import Budget, Run, Source, SparsityMethod
from methods.masking import topk_mask
from models import create_model

RUN = {name for name in vars(Run) if not name.startswith("_")}
"""What a method may ask of its run."""

BETWEEN = ("start_phase", "update", "finish", "open_probability")
IN_STEPS = ("penalty", "edit_gradients", "project")
"""Hooks of a method, by when they run."""

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


class TinyMLP(nn.Module):
    """768-16-8-4 on flattened images: 12,448 weights in three layers, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3 * 16 * 16, 16)
        self.fc2 = nn.Linear(16, 8)
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 16, 16) to logits (B, 4)."""
        x = torch.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.classifier(torch.relu(self.fc2(x)))
        return logits


class TinyConv(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a classifier: 216 + 1,152 + 64 = 1,432 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 16, 16) to logits (B, 4)."""
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def tiny_resnet() -> nn.Module:
    """ResNet-18 of timm with an eighth of its channels."""
    return create_model("timm:resnet18", (3, 16, 16), 4, channels=(8, 16, 32, 64))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": TinyMLP,
    "conv": TinyConv,
    "timm": tiny_resnet,
}


def network(name: str, seed: int = 0, draw: int = 0) -> nn.Module:
    """A tiny network, its initial weights fixed by seed and draw; channels last, as in a cell."""
    torch.manual_seed(derive(seed, "init", *([draw] if draw else [])))
    return NETWORKS[name]().to(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=8)
def images(recipe: Recipe) -> Data:
    """The `synthetic` data on the CPU."""
    return to_device(datasets.load("synthetic", Path()), recipe, torch.device("cpu"))


def make_trainer(
    method: SparsityMethod,
    model: str,
    recipe: Recipe,
    *,
    density: float | None = 0.1,
    steps: int = 24,
    seed: int = 0,
    prunable: str = "all",
    data: Data | None = None,
) -> Trainer:
    """A real trainer of a tiny cell that has not begun.

    Args:
        method: an instance.
        model: name in `NETWORKS`.
        recipe: how it is trained.
        density: the target; ignored by methods that take none, such as `dense`.
        steps: length of the budget.
        seed: of the initial weights, the data order and the method's choices.
        prunable: preset of `bench.prunable`.
        data: None: all of `images(recipe)`.
    """
    return trainer_of(
        method,
        functools.partial(network, model, seed),
        recipe,
        data or images(recipe),
        density=density,
        steps=steps,
        seed=seed,
        prunable=prunable,
    )


def trainer_of(
    method: SparsityMethod,
    build: Callable[[int], nn.Module],
    recipe: Recipe,
    data: Data,
    *,
    density: float | None,
    steps: int,
    seed: int = 0,
    prunable: str = "all",
) -> Trainer:
    """A real trainer of any network that has not begun; a source, if needed, is made by chance.

    Args:
        method: an instance.
        build: makes the network from the number of a draw; draw 0 is trained.
        recipe: how it is trained.
        data: what on.
        density: the target; ignored by methods that take none, such as `dense`.
        steps: length of the budget.
        seed: of the data order and the method's choices.
        prunable: preset of `bench.prunable`.

    Raises:
        SuiteError: the method finds nothing to prune.
    """
    made = build(0)
    names = prunable_names(made, method, prunable)
    density = density if method.controls in ("density", "filters") else None
    return Trainer(
        method,
        made,
        names,
        data,
        recipe,
        budget_of(steps, recipe, data, made, names),
        density,
        seed,
        source=random_source(made, names, density, seed) if method.needs_source else None,
        fresh=build,
    )


def budget_of(
    steps: int, recipe: Recipe, data: Data, model: nn.Module, names: Sequence[str]
) -> Budget:
    """A budget of so many steps for a network with these prunable weights."""
    size = len(data.train)
    kept = shapes(model, names)
    return Budget(steps, size // recipe.batch, size, recipe.drops, kept, recipe.optimizer)


def random_source(
    model: nn.Module, names: Sequence[str], density: float | None, seed: int = 0
) -> Source:
    """Random masks over all layers together, with as many ones as a cell of this density keeps."""
    weights = {name: model.get_parameter(name).detach() for name in names}
    sizes = [weight.numel() for weight in weights.values()]
    scores = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(seed))
    kept = topk_mask(scores, keep_count(sum(sizes), 1.0 if density is None else density))
    parts = zip(weights.items(), torch.split(kept, sizes), strict=True)
    return Source({name: part.view(weight.shape) for (name, weight), part in parts})


def train(trainer: Trainer) -> Trainer:
    """Trains to the end, `finish` included."""
    for _ in trainer.run():
        pass
    return trainer


def without_test(data: Data, on_touch: Callable[[], None]) -> Data:
    """The data as a trainer gets it, telling when somebody looks for the test images."""

    class Watched:
        def __getattr__(self, name: str) -> Tensor:
            on_touch()
            empty: Tensor = getattr(data.train, name)[:0]
            return empty

        def __len__(self) -> int:
            on_touch()
            return 0

    watched: Any = Watched()
    return dataclasses.replace(data, test=watched)


class Witness:
    """Sees what a method asks of its run, and the forward passes in its hooks and in the steps.

    It stays outside: what a run computes is the same, bit for bit.

    Attributes:
        leaks: what a training pass computed with, where that was not the weight inside its mask.
    """

    def __init__(self, on_ask: Callable[[str], object]) -> None:
        """Notes by `on_ask` each name asked for that `methods.api.Run` does not have."""
        self._on_ask = on_ask
        self._depth = 0  # of hooks that are running
        self._data_free = False
        self._handed: list[Tensor] = []
        self._handles: list[Any] = []
        self._trainer: Trainer | None = None
        self._passes = 0  # of the whole network, in steps
        self._in_hooks: Counter[str] = Counter()  # calls of a weight's module
        self._in_steps: Counter[str] = Counter()
        self.leaks: list[str] = []

    def over(self, method: SparsityMethod) -> SparsityMethod:
        """The same instance, each hook of which is seen and is given a `methods.api.Run` only."""
        kind: Any = type(method)
        hooks = {name: self._hook(getattr(kind, name)) for name in (*BETWEEN, *IN_STEPS)}
        names = {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        object.__setattr__(method, "__class__", type(kind.__name__, (kind,), names | hooks))
        return method

    def attend(self, trainer: Trainer) -> None:
        """Follows the forward passes of a run, from here on."""
        self._trainer = trainer
        self._listen()

    def leave(self) -> None:
        """Takes its hooks from the network."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def unmetered(self) -> int:
        """Forward passes that are neither a step's nor counted in `scored`.

        What hooks compute on a batch of one image that holds no training data is left out: the
        meter counts batches of data.
        """
        assert self._trainer is not None
        cursor = self._trainer.cursor
        steps = max(1, cursor.total)
        # Modules are counted, since `model.forward` and parts of a network pass the whole one by.
        per_pass = {name: max(1, self._in_steps[name] // steps) for name in self._in_hooks}
        passes = max((calls // per_pass[n] for n, calls in self._in_hooks.items()), default=0)
        return max(0, passes - cursor.scored) + max(0, self._passes - cursor.total)

    @property
    def unused(self) -> list[str]:
        """Weights whose module no training pass has called."""
        assert self._trainer is not None
        return [name for name in self._trainer.state.masks if not self._in_steps[name]]

    def _hook(self, plain: Callable[[SparsityMethod, Any], Any]) -> Callable[..., Any]:
        def hook(method: SparsityMethod, run: Any) -> Any:
            self._depth += 1
            try:
                return plain(method, self._narrowed(run) if isinstance(run, Trainer) else run)
            finally:
                self._depth -= 1
                if self._handles and isinstance(run, Trainer):
                    self._listen()  # last again, and on modules that are new

        return hook

    def _narrowed(self, run: Trainer) -> object:
        """The run with the names of `methods.api.Run`, and nothing else."""

        def batches(count: int, *, augmented: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in run.batches(count, augmented=augmented):
                self._handed.append(images)
                yield images, labels

        class NarrowRun:
            __slots__ = ()

            def __getattr__(_, name: str) -> Any:  # noqa: N805  `self` is the witness
                if name in RUN:
                    value = batches if name == "batches" else getattr(run, name)
                    # A bound method would tell whose it is.
                    return (lambda *a, **k: value(*a, **k)) if callable(value) else value
                if not name.startswith("__"):
                    self._on_ask(name)
                raise NotOfRun(f"it {asks(name)}")

        return NarrowRun()

    def _listen(self) -> None:
        """Hooks on the network and on the module of each weight, behind all others."""
        assert self._trainer is not None
        model = self._trainer.state.model

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._depth:
                self._data_free = bool(inputs) and self._is_data_free(inputs[0])
            elif torch.is_grad_enabled():
                self._passes += 1

        def after(*_: Any) -> None:
            self._data_free = False

        self.leave()
        self._handles += [
            model.register_forward_pre_hook(before),
            model.register_forward_hook(after, always_call=True),
        ]
        modules = dict(model.named_modules())
        for name in self._trainer.state.masks:
            if module := modules.get(name.rpartition(".")[0]):
                self._handles += [module.register_forward_hook(self._seen(name))]

    def _is_data_free(self, images: Tensor) -> bool:
        alike = [batch for batch in self._handed if batch.shape[1:] == images.shape[1:]]
        return len(images) == 1 and not any((b == images).flatten(1).all(1).any() for b in alike)

    def _seen(self, name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            assert self._trainer is not None
            if self._depth:
                self._in_hooks[name] += not self._data_free
            elif torch.is_grad_enabled():  # what is validated computes without
                self._in_steps[name] += 1
                if self._trainer.method.controls == "density" and not self.leaks:
                    with torch.no_grad(), torch.random.fork_rng([]):
                        self._compare(name, module, inputs[0], output)

        return hook

    def _compare(self, name: str, module: Any, images: Tensor, output: Tensor) -> None:
        """Notes where a module's output is not that of its weight inside the mask."""
        assert self._trainer is not None
        path, _, tensor = name.rpartition(".")
        weight, expected, fault = getattr(module, tensor), output, ""
        if isinstance(module, nn.Linear):
            expected = functional.linear(images, weight, module.bias)
        elif isinstance(module, nn.Conv2d):
            expected = nn.Conv2d._conv_forward(module, images, weight, module.bias)
        if count := int(weight[self._trainer.state.masks[name] == 0].count_nonzero()):
            fault = f"{name} has {count} non-zero weights outside its mask"
        elif not torch.allclose(output, expected, rtol=1e-3, atol=1e-5):
            if not torch.equal(weight, getattr(module, tensor)):
                return  # a parametrization draws it: the tensor in use is not to be had
            fault = f"{path} computes something else than with {name}"
        if fault:
            step = self._trainer.cursor.total + 1
            self.leaks.append(f"{fault} in the forward pass of step {step}{self._suspect()}")

    def _suspect(self) -> str:
        """The first module that has another's hook, or whose `forward` was written over."""
        assert self._trainer is not None
        own = {handle.id for handle in self._handles}
        found = [
            f"{kind} on {name or 'the network'}"
            for name, module in self._trainer.state.model.named_modules()
            for kind, there in (
                ("a forward hook", module._forward_hooks.keys() - own),
                ("a forward pre-hook", module._forward_pre_hooks.keys() - own),
                ("another forward", "forward" in vars(module)),
            )
            if there
        ]
        return f"; the method has left {found[0]}" if found else ""


def asks(name: str) -> str:
    """What is wrong with a name that a method asks for, for people."""
    return f"asks its run for {name!r}, which methods.api.Run does not have"


class NotOfRun(AttributeError):
    """A method asked its run for something that `methods.api.Run` does not have."""
