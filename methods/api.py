"""What a sparsity method is, and what the harness gives it.

A method is a frozen dataclass of hyperparameters; everything that changes during a run is a tensor
in `TrainState`. So a method can be hashed, printed and compared, and one generic function
checkpoints every method. Hooks that run in every step see tensors only and may be captured in a
CUDA graph; hooks between steps see the `Run` and may do anything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

Scores = dict[str, Tensor]
"""Weight name -> tensor of that weight's shape."""

Controls = Literal["none", "density", "filters", "penalty"]

Shape = tuple[int, int, int]
"""(channels, height, width) of one image."""


def option(default: Any, interval: str) -> Any:
    """A hyperparameter with its range, for the body of a method.

    Args:
        default: the paper's value.
        interval: the values allowed, such as "(0, 1]" or "[1, inf)"; round brackets leave the end
            out.
    """
    return field(default=default, metadata={"interval": interval})


def _inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


@dataclass(frozen=True, slots=True)
class Budget:
    """The length of one ordinary training run.

    Attributes:
        steps: optimizer steps.
        steps_per_epoch: steps in one pass over the training set.
        examples: size of the training set; penalties quoted per example divide by it.
        lr_drops: decay points of the recipe as fractions of the run, ascending; may be empty.
        shapes: (name, shape) of each prunable weight, in the model's order; empty where no model is
            at hand.
        optimizer: the recipe's, by name.
    """

    steps: int
    steps_per_epoch: int
    examples: int
    lr_drops: tuple[float, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    optimizer: str = "sgd"

    def require_coupled_decay(self, what: str) -> None:
        """Refuses optimizers whose weight decay is no part of the gradient.

        Args:
            what: needs it.

        Raises:
            ValueError: the optimizer is none of `sgd` and `adam`, torch's or timm's; names it.
        """
        if self.optimizer.removeprefix("timm:") not in ("sgd", "momentum", "nesterov", "adam"):
            raise ValueError(
                f"{what} is for weight decay in the gradient, and so for optimizer = 'sgd' and "
                f"'adam', not '{self.optimizer}'"
            )

    def second_drop(self, default: float = 0.75) -> int:
        """Step of the second learning-rate decay, where ramps of sparsity end (Lin et al., 2020).

        Args:
            default: fraction of the run to use where the recipe has fewer than two decays.
        """
        fraction = self.lr_drops[1] if len(self.lr_drops) > 1 else default
        return round(fraction * self.steps)


@dataclass(frozen=True, slots=True)
class Cadence:
    """Mask updates at `start`, `start + every`, ... below `stop` (None: to the phase's end)."""

    every: int
    start: int = 0
    stop: int | None = None

    def due(self, step: int) -> bool:
        """Whether an update comes before optimizer step `step`, counted from 0 in the phase."""
        inside = step >= self.start and (self.stop is None or step < self.stop)
        return inside and (step - self.start) % self.every == 0

    def count(self, steps: int) -> int:
        """Number of updates in a phase of `steps` steps."""
        stop = steps if self.stop is None else min(self.stop, steps)
        return len(range(self.start, stop, self.every))


@dataclass(frozen=True, slots=True)
class LearningRate:
    """A schedule of a phase's own: `peak` times the recipe's base rate, then down a cosine to 0."""

    peak: float

    def factor(self, fraction: float) -> float:
        """What the recipe's base rate is multiplied by when `fraction` of the phase is done."""
        return self.peak * (1 + math.cos(math.pi * fraction)) / 2


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of ordinary training between two interventions. Pure data.

    Attributes:
        name: unique within a plan.
        steps: optimizer steps; may be 0, for instance to snapshot the initialisation.
        lr_window: part of the recipe's schedule that the phase covers, as fractions.
        lr: a schedule of the phase's own, in place of the recipe's.
        density: asks `start_phase` to prune to this density; None leaves the masks alone.
        updates: when `update` runs.
        rewind_to: snapshot that is loaded after `start_phase`: weights, buffers, optimizer and
            position in the data.
        save_as: name of the snapshot taken at the end.
        measured: the network at the end of the phase is a result of its own: the harness tests and
            counts it. The model must then be plain, with its pruned weights at zero.
        validate_every: steps between looks at the validation loss; the network of the least one is
            tested too. Needs `measured`, and a recipe that holds images out.
    """

    name: str
    steps: int
    lr_window: tuple[float, float] = (0.0, 1.0)
    lr: LearningRate | None = None
    density: float | None = None
    updates: Cadence | None = None
    rewind_to: str | None = None
    save_as: str | None = None
    measured: bool = False
    validate_every: int | None = None


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """The recipe's optimizer. Without momentum or betas of its own where the name has none.

    Attributes:
        name: `sgd`, `adam` or `adamw`; else whatever `factory` makes is called.
        factory: makes an optimizer from parameters or groups, and from the keywords `lr` (the base
            rate, a number), `momentum` and `weight_decay`; None: torch's of that name.
    """

    name: str = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    factory: Callable[..., Optimizer] | None = None

    def build(
        self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: Tensor
    ) -> Optimizer:
        """The optimizer over parameters, or over torch's parameter groups.

        Args:
            parameters: a group may set what differs, such as `weight_decay`.
            lr: () tensor, read anew in every step.
        """
        groups: Any = list(parameters)
        if self.factory is not None:
            decay, momentum = self.weight_decay, self.momentum
            made = self.factory(groups, lr=float(lr), momentum=momentum, weight_decay=decay)
            for group in made.param_groups:
                group["lr"] = lr
            return made
        if self.name == "sgd":
            return torch.optim.SGD(
                groups,
                lr=lr,
                momentum=self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
                fused=True,
            )
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        # Without its say-so, Adam refuses to be recorded as a CUDA graph.
        return kind(
            groups,
            lr=lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=True,
            capturable=lr.is_cuda,
        )


@dataclass
class TrainState:
    """Every tensor of a run. Written in place: no tensor is ever replaced after `prepare`.

    Attributes:
        model: the network in training, with the method's parametrizations if it has any.
        weights: prunable weights as the optimizer sees them, by their name in the plain model.
        masks: same keys, shapes and dtype; 1 keeps, 0 prunes.
        optimizer: has one state entry per trained parameter.
        lr: () learning rate, filled before each step.
        progress: () in [0, 1], over all phases.
        slots: the method's own tensors, such as `slots["sign"][name]`; made in `start_phase`.
    """

    model: nn.Module
    weights: dict[str, nn.Parameter]
    masks: dict[str, Tensor]
    optimizer: Optimizer
    lr: Tensor
    progress: Tensor
    slots: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def check_slots(self) -> None:
        """Checks that every slot can be saved.

        Raises:
            TypeError: one holds something else than tensors by name.
        """
        for slot, values in self.slots.items():
            if not isinstance(values, dict):
                kind = type(values).__name__
                raise TypeError(
                    f"slots[{slot!r}] is a {kind}; allowed: a dict of tensors by name, such as "
                    'slots["momentum"][weight]'
                )
            for name, value in values.items():
                if not isinstance(value, Tensor):
                    kind = type(value).__name__
                    raise TypeError(f"slots[{slot!r}][{name!r}] is a {kind}, and no tensor")


@dataclass(frozen=True, slots=True)
class Source:
    """What another cell left, for the controls that start from it.

    Attributes:
        masks: its masks at this cell's sparsity, by name of the weight; 1 keeps, 0 prunes.
    """

    masks: Mapping[str, Tensor]


class Run(Protocol):
    """The harness, as a method may see it between steps."""

    @property
    def state(self) -> TrainState:
        """Every tensor of the run."""

    @property
    def budget(self) -> Budget:
        """The length of one ordinary training run."""

    @property
    def density(self) -> float | None:
        """The cell's target in (0, 1]; None for penalty-driven methods."""

    @property
    def phase(self) -> Phase:
        """The phase that is running."""

    @property
    def step(self) -> int:
        """Optimizer steps done in this phase."""

    @property
    def generator(self) -> torch.Generator:
        """The method's own random stream, on the CPU, seeded by the cell."""

    @property
    def input_shape(self) -> Shape:
        """(channels, height, width) of one image."""

    @property
    def source(self) -> Source | None:
        """What the cell that this one names as its source left; None where it names none."""

    def fresh_weights(self, draw: int) -> dict[str, Tensor]:
        """Every parameter and buffer of the plain network, initialised anew.

        Args:
            draw: from 1 on; each gives another initialisation, fixed by the cell's seed.
        """

    def batches(self, count: int, *, augmented: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches from a stream of the method's own; they are metered in the record."""

    def logits(self, images: Tensor) -> Tensor:
        """The network's outputs, (B, classes); leaves buffers and random streams untouched.

        It comes with its graph, but hooks run without gradient tracking: what is computed from it
        and differentiated again stands under `torch.enable_grad()`.
        """

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Data term of the loss, () tensor, from `logits`."""

    def gradients(self, batches: int = 1, *, augmented: bool = True) -> Scores:
        """Mean gradient of the data term over extra batches, for every weight, masked or not."""


@dataclass(frozen=True)
class SparsityMethod:
    """Base of all methods. Every hook has a default; with all defaults it is dense training.

    Subclasses are frozen dataclasses: fields are hyperparameters with the paper's values as
    defaults, and with their range given by `option`. Every hook but `penalty` runs without gradient
    tracking.

    Attributes:
        paper: where the method is from.
        controls: what a cell's sparsity means: nothing, the density of the prunable weights, the
            fraction of filters, or nothing because a penalty drives it.
        version: raised whenever the method's results change; enters the cell's key.
    """

    paper: ClassVar[str] = ""
    controls: ClassVar[Controls] = "density"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Checks every `option` against its range.

        Raises:
            ValueError: names the option, its value and its range.
        """
        for entry in dataclasses.fields(self):
            interval = entry.metadata.get("interval")
            value = getattr(self, entry.name)
            if interval and value is not None and not _inside(value, interval):
                raise ValueError(f"{entry.name} = {value} lies outside {interval}")

    @property
    def needs_source(self) -> bool:
        """Whether the cell must name another one as its source, see `Run.source`."""
        return False

    @property
    def lands_on_all(self) -> bool:
        """Whether one run passes every sparsity asked for, with a measured phase at each.

        Such a method has an option `also`: the lower sparsities, as text such as "0.8 0.9".
        """
        return False

    @property
    def cuttable(self) -> bool:
        """Whether what is pruned may be cut out of the finished network.

        False for a method that leaves a pruned channel sending on a constant.
        """
        return True

    def final_density(self, density: float | None) -> float | None:
        """Density that a penalty-driven method lands on, to the weight; None: on none.

        Other methods are not asked: they are given theirs.

        Args:
            density: None.
        """
        return None

    # Once, and again after a resume: structure.

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """The phases of a run. Depends on nothing but its arguments."""
        return (Phase("train", budget.steps),)

    def prunable(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the weights that the method can prune; the suite's preset is met with them."""
        return tuple(
            f"{name}.weight" if name else "weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | _ConvNd)
        )

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor], input_shape: Shape
    ) -> dict[str, nn.Parameter]:
        """Changes the module where the method needs it, and names the tensors to be optimized.

        Args:
            model: the plain network.
            masks: one per prunable weight, all ones; these very tensors stay the run's masks.
            input_shape: (channels, height, width) of one image.

        Returns:
            For each key of `masks`, the parameter that the optimizer sees.
        """
        parameters = dict(model.named_parameters())
        return {name: parameters[name] for name in masks}

    def optimizer(
        self,
        weights: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        lr: Tensor,
        settings: OptimizerSettings,
    ) -> Optimizer:
        """The optimizer of the run.

        Args:
            weights: what `prepare` returned.
            others: all other parameters, by their name in the prepared model.
            lr: () tensor that the optimizer reads in every step.
            settings: the recipe's optimizer.
        """
        return settings.build([*weights.values(), *others.values()], lr)

    # Between steps, eager, may wait for the device: values.

    def start_phase(self, run: Run) -> None:
        """Runs once as a phase begins; not again when it is resumed."""

    def update(self, run: Run) -> None:
        """Runs before the steps that the phase's `updates` name."""

    def finish(self, run: Run) -> None:
        """Leaves a plain module with exact zeros in `run.state.model`."""

    def open_probability(self, state: TrainState) -> Scores | None:
        """Probability that each prunable weight is not zero in a training pass.

        For methods with random gates, of the weight's shape; the harness computes the expected L0
        norm and the expected MACs from it, before `finish`.
        """
        return None

    # What the training costs in theory; read between steps.

    def forward_masks(self, run: Run) -> Mapping[str, Tensor] | None:
        """Masks of the weights that a training pass multiplies by; None: all of them."""
        return run.state.masks

    def gradient_masks(self, run: Run) -> Mapping[str, Tensor] | None:
        """Masks of the weights whose gradient every step of the phase needs; None: all of them."""
        return run.state.masks

    # In every step: in place, no wait for the device, captured.

    def penalty(self, state: TrainState) -> Tensor | None:
        """() term added to the data loss."""
        return None

    def edit_gradients(self, state: TrainState) -> None:
        """Runs after backward, before the optimizer."""

    def project(self, state: TrainState) -> None:
        """Runs after the optimizer, and after each start of a phase."""
