"""Training recipes: everything about training that is not the method. No torch."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from bench.errors import SuiteError, UnknownName, with_choices
from bench.spec import BudgetSpec, Scalar, content_hash, without_defaults

if TYPE_CHECKING:
    from bench.timm_training import Schedule

FOLDER = Path(__file__).parent / "recipes"

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("step", "cosine", "linear")
TIMM_PREFIX = "timm:"
"""Optimizers and schedules of timm go by this and their own name."""

Keywords = tuple[tuple[str, Scalar | tuple[Scalar, ...]], ...]
"""Sorted by name."""

AT = 1e-9
"""Keeps a drop at 0.3 on the step that is 0.3 of the run, whatever binary fractions do."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained, whatever the method.

    Attributes:
        title: what the recipe is and where it is from; for people.
        batch: images per optimizer step. An epoch leaves out what does not fill its last batch.
        lr: base learning rate.
        optimizer: `sgd`, `adam` or `adamw`; `betas` are Adam's, `momentum` and `nesterov` SGD's. Or
            `timm:` and a name of timm's, which gets `momentum` if it has one, `weight_decay` and
            `optimizer_options`; everything else is its own default.
        weight_decay: L2 coefficient on every parameter, as in torch's optimizers.
        schedule: `step` multiplies the rate by `factor` at each of `drops`; `cosine` falls to 0;
            `linear` falls to 0 on a line, from the start or from the one drop on. Or `timm:` and
            `cosine`, `tanh`, `poly`, `step` or `multistep`, see `bench.timm_training`.
        drops: decay points as fractions of the run, ascending.
        warmup: fraction of the run in which the rate rises; multiplies the schedule. timm's
            schedules do it their way: the rise comes in the schedule's place.
        crop: pixels of padding for random crops; 0: no crops.
        padding: what is padded: zeros (black) or the image reflected.
        flip: mirrors half of the images.
        validation: images held out of the training set, the same ones for every seed.
        epochs: length of the run that the recipe is from; or `steps`, its optimizer steps. A suite
            without a budget takes it. Not part of the recipe's hash.
        warmup_from: part of the rate at which the warm-up begins.
        warmup_shape: `linear` rises from there; `constant` stays there until the warm-up ends.
        optimizer_options: more keywords of a `timm:` optimizer, a table in the file;
            `schedule_options`, of a `timm:` schedule.
        label_smoothing: part of the target that is spread over all classes.
        rotate: degrees by which an image is turned at most, to either side.
        normalise: whether pixels get mean 0 and variance 1 by the training set's figures; else they
            are scaled to [0, 1]. `unit`: each image is scaled to length 1, as Keras's `normalize`
            does with flat images. `mean_image`: scaled to [0, 1], less the mean of the images to
            train on, pixel by pixel.
        initialisation: of random weights: `model` leaves them as the model draws them; see
            `models.initialise` for the others.
        image_size: side in pixels of the square that images of a folder are made into; other data
            sets have their own size.
        area: range of the part of a folder's image that a random crop takes; (1, 1): no such crop,
            images are resized and their centre is taken.
        crop_fraction: part of a resized side that the centre takes, in tests.
        auto_augment: timm's name of a policy for images of a folder, such as `rand-m9-mstd0.5`.
        precision: of products: `fp32`; `tf32`, on GPUs that have it; `bf16`, in training by
            autocast, with weights, statistics and losses in fp32, and all of a test in fp32.
    """

    title: str
    batch: int
    lr: float
    optimizer: str = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: str = "step"
    drops: tuple[float, ...] = ()
    factor: float = 0.1
    warmup: float = 0.0
    crop: int = 0
    padding: Literal["zero", "reflect"] = "zero"
    flip: bool = False
    validation: int = 0
    epochs: float | None = None
    steps: int | None = None
    warmup_from: float = 0.0
    warmup_shape: Literal["linear", "constant"] = "linear"
    optimizer_options: Keywords = ()
    schedule_options: Keywords = ()
    label_smoothing: float = 0.0
    rotate: float = 0.0
    normalise: bool | Literal["unit", "mean_image"] = True
    initialisation: Literal[
        "model", "glorot_normal", "he_fan_out", "lecun_normal", "normal", "normal_linear"
    ] = "model"
    image_size: int = 0
    area: tuple[float, float] = (1.0, 1.0)
    crop_fraction: float = 0.875
    auto_augment: str = ""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: names the field, its value and what is allowed.
        """
        checks = {
            f"batch = {self.batch}: must be at least 1": self.batch >= 1,
            f"lr = {self.lr}: must be above 0 and finite": 0 < self.lr < math.inf,
            f"momentum = {self.momentum}: must lie in [0, 1)": 0 <= self.momentum < 1,
            f"betas = {list(self.betas)}: must lie in [0, 1)": all(0 <= b < 1 for b in self.betas),
            "nesterov = true needs a momentum above 0": not self.nesterov or self.momentum > 0,
            f"weight_decay = {self.weight_decay}: must be at least 0": 0
            <= self.weight_decay
            < math.inf,
            f"drops = {list(self.drops)}: must ascend inside (0, 1)": list(self.drops)
            == sorted({drop for drop in self.drops if 0 < drop < 1}),
            f"factor = {self.factor}: must lie in (0, 1]": 0 < self.factor <= 1,
            f"warmup = {self.warmup}: must lie in [0, 1)": 0 <= self.warmup < 1,
            f"crop = {self.crop}: must be at least 0": self.crop >= 0,
            f"validation = {self.validation}: must be at least 0": self.validation >= 0,
            f"warmup_from = {self.warmup_from}: must lie in [0, 1]": 0 <= self.warmup_from <= 1,
            f"label_smoothing = {self.label_smoothing}: must lie in [0, 1)": 0
            <= self.label_smoothing
            < 1,
            f"rotate = {self.rotate}: must lie in [0, 180]": 0 <= self.rotate <= 180,
            f"image_size = {self.image_size}: must be at least 0": self.image_size >= 0,
            f"area = {list(self.area)}: must ascend in (0, 1]": 0
            < self.area[0]
            <= self.area[1]
            <= 1,
            f"crop_fraction = {self.crop_fraction}: must lie in (0, 1]": 0
            < self.crop_fraction
            <= 1,
        }
        checks |= self._checks_of_names()
        for message, fine in checks.items():
            if not fine:
                raise ValueError(message)

    def _checks_of_names(self) -> dict[str, bool]:
        """What goes together: fields that would do nothing are refused."""
        timm, scheduled = _is_timm(self.optimizer), _is_timm(self.schedule)
        drops = f"drops = {list(self.drops)}: schedule = '{self.schedule}'"
        return {
            f"optimizer = '{self.optimizer}': no such optimizer": timm
            or self.optimizer in OPTIMIZERS,
            f"schedule = '{self.schedule}': no such schedule": scheduled
            or self.schedule in SCHEDULES,
            f"{drops} has none": self.schedule != "cosine" or not self.drops,
            f"{drops} takes one at most": self.schedule != "linear" or len(self.drops) < 2,
            "give epochs or steps, not both": self.epochs is None or self.steps is None,
            f"epochs = {self.epochs}: must be above 0 and finite": self.epochs is None
            or 0 < self.epochs < math.inf,
            f"steps = {self.steps}: must be at least 1": self.steps is None or self.steps > 0,
            "optimizer_options are for a timm: optimizer": timm or not self.optimizer_options,
            "schedule_options are for a timm: schedule": scheduled or not self.schedule_options,
            "nesterov = true is for sgd; of timm's optimizers, the name says it": not self.nesterov
            or not timm,
            "betas are for adam and adamw; give timm's as optimizer_options.betas": not timm
            or self.betas == (0.9, 0.999),
            "warmup_shape = 'constant' is not for timm's schedules": not scheduled
            or self.warmup_shape == "linear",
            f"momentum = {self.momentum} is not for {self.optimizer}": self.optimizer == "sgd"
            or timm
            or not self.momentum,
            "betas are not for sgd": self.optimizer != "sgd" or self.betas == (0.9, 0.999),
            "warmup_from and warmup_shape need a warmup": self.warmup > 0
            or (self.warmup_from, self.warmup_shape) == (0.0, "linear"),
            f"factor = {self.factor} needs drops": bool(self.drops) or self.factor == 0.1,
            f"factor = {self.factor} is not for a linear schedule": self.schedule != "linear"
            or self.factor == 0.1,
            f"padding = '{self.padding}' needs a crop": self.crop > 0 or self.padding == "zero",
        }

    @property
    def hash(self) -> str:
        """Content of the recipe but its title and length; fields at their default are left out."""
        return content_hash(without_defaults(self, but="title epochs steps"))

    @property
    def length(self) -> BudgetSpec | None:
        """Length of the run that the recipe is from; None where it does not say."""
        said = self.epochs is not None or self.steps is not None
        return BudgetSpec(self.epochs, self.steps) if said else None

    def lr_at(self, fraction: float) -> float:
        """Learning rate when `fraction` of the run is done."""
        if _is_timm(self.schedule):
            return self._timm_schedule().lr_at(fraction)
        rate = self.lr
        if self.schedule == "cosine":
            rate *= (1 + math.cos(math.pi * fraction)) / 2
        elif self.schedule == "linear":
            begin = self.drops[0] if self.drops else 0.0
            rate *= min(1.0, (1 - fraction) / (1 - begin))
        else:
            rate *= self.factor ** sum(fraction >= drop - AT for drop in self.drops)
        return rate * self._warmed(fraction)

    def _timm_schedule(self) -> Schedule:
        from bench.timm_training import Schedule

        return Schedule(
            name=self.schedule.removeprefix(TIMM_PREFIX),
            lr=self.lr,
            drops=self.drops,
            factor=self.factor,
            warmup=self.warmup,
            warmup_from=self.warmup_from,
            options=self.schedule_options,
        )

    def check_timm(self, where: str) -> None:
        """Checks what the recipe borrows from timm; imports it only where there is something.

        Raises:
            SuiteError: `where`, and why it cannot work.
        """
        if _is_timm(self.optimizer):
            from bench.timm_training import check_optimizer

            name = self.optimizer.removeprefix(TIMM_PREFIX)
            check_optimizer(name, self.optimizer_options, self.momentum, where)
        if _is_timm(self.schedule):
            self._timm_schedule().check(where)

    def _warmed(self, fraction: float) -> float:
        """Part of the schedule's rate that warm-up leaves."""
        if fraction >= self.warmup - AT:
            return 1.0
        risen = fraction / self.warmup if self.warmup_shape == "linear" else 0.0
        return self.warmup_from + (1 - self.warmup_from) * risen


def _is_timm(name: str) -> bool:
    return name.startswith(TIMM_PREFIX)


def names() -> list[str]:
    """The recipes that come with the harness."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str, where: str, relative_to: Path | None = None) -> Recipe:
    """A recipe by name, or from a TOML file.

    Args:
        name: one of `names()`, or a path that ends in `.toml`.
        where: place in the input, for errors.
        relative_to: folder that a path starts from.

    Raises:
        SuiteError: there is no such recipe, or it is wrong.
    """
    path = FOLDER / f"{name}.toml"
    if name.endswith(".toml"):
        path = (relative_to or Path()) / name
    elif name not in names():
        raise UnknownName(where, "recipe", name, names())
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SuiteError(f"{where}: cannot read recipe {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SuiteError(f"{path}: not a TOML file ({error}).") from error
    _check_names(raw, str(path))
    for field in ("optimizer_options", "schedule_options"):
        if isinstance(raw.get(field), dict):
            raw[field] = sorted((key, _canonical(value)) for key, value in raw[field].items())
    try:
        found = msgspec.convert(raw, type=Recipe)
    except (msgspec.ValidationError, ValueError) as error:
        raise SuiteError(f"{path}: {with_choices(error, Recipe)}.") from error
    found.check_timm(str(path))
    return found


def _check_names(raw: dict[str, object], where: str) -> None:
    """Names of fields, optimizers and schedules, with the nearest where there is none such."""
    fields = {field.name for field in dataclasses.fields(Recipe)}
    for key in raw:
        if key not in fields:
            raise UnknownName(where, "field of a recipe", key, fields)
    for field, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        name = raw.get(field)
        if isinstance(name, str) and name not in known and not _is_timm(name):
            raise UnknownName(where, field, name, [*known, f"{TIMM_PREFIX}NAME"])


def _canonical(value: object) -> object:
    """1 and 1.0 are one value, and must give one hash."""
    if isinstance(value, list):
        return [_canonical(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
