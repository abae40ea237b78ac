"""Training recipes: everything about training that is not the method. No torch."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from bench.errors import SuiteError, UnknownName, with_choices
from bench.spec import content_hash, without_defaults

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained, whatever the method.

    Attributes:
        title: what the recipe is and where it is from; for people.
        batch: images per optimizer step. An epoch leaves out what does not fill its last batch.
        lr: base learning rate.
        optimizer: `sgd`, `adam` or `adamw`; `betas` are Adam's, `momentum` and `nesterov` SGD's.
        weight_decay: L2 coefficient on every parameter, as in torch's optimizers.
        schedule: `step` multiplies the rate by `factor` at each of `drops`; `cosine` falls to 0.
        drops: decay points as fractions of the run, ascending.
        warmup: fraction of the run in which the rate rises linearly from 0; multiplies the
            schedule.
        crop: pixels of padding for random crops; 0: no crops.
        padding: what is padded: zeros (black) or the image reflected.
        flip: mirrors half of the images.
        validation: images held out of the training set, the same ones for every seed.
    """

    title: str
    batch: int
    lr: float
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["step", "cosine"] = "step"
    drops: tuple[float, ...] = ()
    factor: float = 0.1
    warmup: float = 0.0
    crop: int = 0
    padding: Literal["zero", "reflect"] = "zero"
    flip: bool = False
    validation: int = 0

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
        }
        for message, fine in checks.items():
            if not fine:
                raise ValueError(message)

    @property
    def hash(self) -> str:
        """Content of the recipe without its title; fields at their default are left out."""
        return content_hash(without_defaults(self, but="title"))

    def lr_at(self, fraction: float) -> float:
        """Learning rate when `fraction` of the run is done."""
        rate = self.lr
        if self.schedule == "cosine":
            rate *= (1 + math.cos(math.pi * fraction)) / 2
        else:
            # The tolerance keeps a drop at 0.3 on the step that is 0.3 of the run.
            rate *= self.factor ** sum(fraction >= drop - 1e-9 for drop in self.drops)
        return rate * min(1.0, fraction / self.warmup) if self.warmup else rate


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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not a TOML file ({error}).") from error
    fields = {field.name for field in dataclasses.fields(Recipe)}
    for key in raw:
        if key not in fields:
            raise UnknownName(str(path), "field of a recipe", key, fields)
    try:
        return msgspec.convert(raw, type=Recipe)
    except (msgspec.ValidationError, ValueError) as error:
        raise SuiteError(f"{path}: {with_choices(error, Recipe)}.") from error
