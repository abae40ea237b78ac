"""What is asked of the harness: value objects, their key and their name. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from bench.errors import SuiteError

Scalar = bool | int | float | str
Options = tuple[tuple[str, Scalar], ...]

UNSAFE = {"method": set("/\\"), "model": set("\\")}
"""What a name may not hold. A slash in a model's is common; file names have `_` for it."""

LONGEST_NAMES = 180
"""Bytes; a file name has 255, some of them for the rest of the slug and its endings."""

LARGEST = 2**63


@dataclass(frozen=True, slots=True)
class BudgetSpec:
    """The length of one ordinary training run: a number of epochs, or of optimizer steps.

    Raises:
        SuiteError: neither or both are given, or the length is not positive.
    """

    epochs: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise SuiteError("budget: give either epochs or steps, such as { epochs = 10 }.")
        # 30 and 30.0 epochs are one budget and must give one key.
        if self.epochs is not None:
            object.__setattr__(self, "epochs", float(self.epochs))
        length = self.epochs if self.epochs is not None else self.steps
        if length is None or not 0 < length < float("inf"):
            raise SuiteError(f"budget: {length} is not a length; it must be above 0.")


@dataclass(frozen=True, slots=True)
class CellSpec:
    """One question asked of the harness; equal questions have equal keys.

    Attributes:
        method: name in `methods.METHODS`.
        model: name in `models.MODELS`, or `timm:NAME`.
        dataset: name in `bench.datasets.DATASETS`; for people, the key takes `data_hash`.
        recipe: name of the recipe; for people, the key takes `recipe_hash`.
        sparsity: fraction of zeros among the prunable weights (or of filters), in [0, 1);
            None for penalty-driven methods.
        seed: seeds the initial weights, data order, augmentation and the method.
        budget: length of one ordinary training run.
        prunable: preset of weights that count, see `bench.prunable`.
        method_version: version of the method's results.
        options: the method's options that differ from its defaults, sorted by name.
        model_options: likewise for the model.
        source: key of the cell whose masks this one starts from.
        init: `random`, or where the first weights come from with the hash of their content.
        recipe_hash: content of the resolved recipe.
        data_hash: content of the data.
    """

    method: str
    model: str
    dataset: str
    recipe: str
    sparsity: float | None
    seed: int
    budget: BudgetSpec
    recipe_hash: str
    data_hash: str
    prunable: str = "all"
    method_version: int = 1
    options: Options = ()
    model_options: Options = ()
    source: str | None = None
    init: str = "random"

    def __post_init__(self) -> None:
        """Checks what the names of files are made of, and numbers that no key can be made of.

        Specs are read from other people's records: a name must not lead out of the store.

        Raises:
            SuiteError: names the field, what was found and what is allowed.
        """
        for field, name in (("method", self.method), ("model", self.model)):
            if not name.isprintable() or not name or UNSAFE[field] & set(name):
                raise SuiteError(f"{field} = {name!r}: no name; give one line without / and \\.")
        if len(f"{self.method}{self.model}".encode()) > LONGEST_NAMES:
            raise SuiteError(f"method and model have names of over {LONGEST_NAMES} bytes together.")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise SuiteError(f"sparsity = {self.sparsity:g}: must lie in [0, 1).")
        values = [value for _, value in self.options + self.model_options]
        numbers = [self.seed, self.method_version, self.budget.steps or 0, *values]
        if not all(-LARGEST <= n < LARGEST for n in numbers if isinstance(n, int)):
            raise SuiteError("seed, budget, version and options: allowed: integers of 64 bits.")

    @property
    def key(self) -> str:
        """12 hex digits of the content; fields at their default are left out.

        So a later version may add a field with a neutral default and keep every key. The names
        of the data set and of the recipe do not enter: their contents do.
        """
        content = without_defaults(self, but="dataset recipe")
        return content_hash(content | {"budget": without_defaults(self.budget)})

    @property
    def slug(self) -> str:
        """File name of the cell: people first, key last."""
        model = self.model.replace(":", "_").replace("/", "_")
        sparsity = "" if self.sparsity is None else f"-s{self.sparsity:g}"
        return f"{self.method}-{model}{sparsity}-seed{self.seed}-{self.key}"


def without_defaults(value: Any, but: str = "") -> dict[str, Any]:
    """Fields of a dataclass that are not at their default; `but` names those to leave out."""
    return {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if field.name not in but.split() and getattr(value, field.name) != field.default
    }


def content_hash(content: object) -> str:
    """12 hex digits of the canonical JSON of any value that msgspec can write."""
    text = msgspec.json.encode(msgspec.to_builtins(content), order="sorted")
    return hashlib.blake2s(text, digest_size=6).hexdigest()
