"""Published numbers, digit by digit, and what their papers' names are called here."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from bench.errors import SuiteError, UnknownName, with_choices
from bench.spec import BudgetSpec, Scalar

FOLDER = Path(__file__).parent / "papers"

Form = TypeVar("Form", bound=msgspec.Struct)

FIGURES = (
    "top1",
    "error",
    "deviation",
    "gain",
    "dense_top1",
    "top5",
    "dense_top5",
    "reached",
    "parameters",
)
"""Fields of a published cell that hold a number as text."""


class PublishedCell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a paper prints for one network, in its own digits.

    Attributes:
        model: the paper's name, as `method` is; both stand in the paper's file.
        sparsity: target in percent, such as `90%`; or `density`, what remains. Neither where the
            method takes none.
        top1: test accuracy in percent; or `error`, 100 less that.
        gain: points by which a lottery ticket is better than the dense network, both at the step of
            least validation loss.
        earlier: percent of the dense network's steps by which a ticket comes sooner to that step.
        compression: weights over those that are left.
        deviation: of accuracy, error or gain, over seeds.
        reached: percent of all parameters that are zero.
        parameters: millions that are left.
        architecture: units that each layer has left.
        failed: why there is no figure.
        unverified: not read in the paper, but remembered of it.
        same_protocol: ours follows the paper's; or `differs`, the name of what does not. One of the
            two is given, before ours is run.
    """

    model: str
    method: str
    sparsity: str = ""
    density: str = ""
    top1: str = ""
    error: str = ""
    gain: str = ""
    earlier: str = ""
    compression: str = ""
    deviation: str = ""
    dense_top1: str = ""
    top5: str = ""
    dense_top5: str = ""
    reached: str = ""
    parameters: str = ""
    architecture: str = ""
    failed: str = ""
    unverified: bool = False
    same_protocol: bool = False
    differs: str = ""

    @property
    def target(self) -> Decimal | None:
        """Fraction of zeros asked for; None where none can be."""
        if self.density:
            return 1 - fraction(self.density)
        return fraction(self.sparsity) if self.sparsity else None


class PaperModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A paper's network: which of ours it is, and how long the paper trains it by which recipe.

    Attributes:
        methods: options that a method has on this network, in place of its usual ones.
    """

    name: str
    options: dict[str, Scalar] = {}
    recipe: str = ""
    epochs: float | None = None
    steps: int | None = None
    methods: dict[str, dict[str, Scalar]] = {}

    @property
    def budget(self) -> BudgetSpec | None:
        """The paper's length of training; None where it is not known."""
        if self.epochs is None and self.steps is None:
            return None
        return BudgetSpec(self.epochs, self.steps)


class PaperMethod(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A paper's method: which of ours it is, with which options; no name where we have none.

    Attributes:
        prunable: our preset of the weights that it prunes, where a table's methods differ in that.
        recipe: by which it is trained, in place of the network's, with its length.
    """

    label: str
    method: str = ""
    options: dict[str, Scalar] = {}
    prunable: str = ""
    recipe: str = ""
    epochs: float | None = None
    steps: int | None = None

    def trains(self, model: PaperModel) -> PaperModel:
        """The network with the recipe and length by which this method trains it."""
        if not self.recipe:
            return model
        return msgspec.structs.replace(
            model, recipe=self.recipe, epochs=self.epochs, steps=self.steps
        )


class PaperTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table of a paper.

    Attributes:
        protocol: how its networks were trained, in words.
        prunable: our presets that are the weights which the paper prunes.
        seeds: how many its figures are over; None: it does not say.
        unsaid: what the paper does not say of its protocol, and what ours is.
        notes: what else to know of its figures.
    """

    title: str
    protocol: str = ""
    prunable: tuple[str, ...] = ()
    seeds: int | None = None
    unsaid: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cells: tuple[PublishedCell, ...] = ()

    def find(self, model: str, method: str, target: Decimal | None) -> PublishedCell | None:
        """The cell of a network, method and fraction of zeros; None where the paper has none."""
        place = (model, method, target)
        return next((c for c in self.cells if (c.model, c.method, c.target) == place), None)


class Paper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A paper's names and tables; `differences` are the reasons that cells name."""

    title: str
    authors: str
    arxiv: str
    models: dict[str, PaperModel]
    methods: dict[str, PaperMethod]
    tables: dict[str, PaperTable]
    differences: dict[str, str] = {}


def names() -> list[str]:
    """The papers at hand."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str, where: str = "paper") -> Paper:
    """A paper by name.

    Raises:
        SuiteError: there is no such paper, or its file is wrong; says where and what is allowed.
    """
    if name not in names():
        raise UnknownName(where, "paper", name, names())
    return _load(FOLDER / f"{name}.toml")


@functools.cache
def _load(path: Path) -> Paper:
    return checked(convert(read(path), Paper, path.name), path.name)


def checked(paper: Paper, where: str) -> Paper:
    """The paper, once every cell is known to name what there is.

    Raises:
        SuiteError: a cell does not; names it.
    """
    for table, index, cell in _cells(paper):
        place = f"{where}: tables.{table}.cells[{index}]"
        for kind, name, known in (
            ("model", cell.model, paper.models),
            ("method", cell.method, paper.methods),
            ("difference", cell.differs, {"": "", **paper.differences}),
        ):
            if name not in known:
                raise UnknownName(place, kind, name, filter(None, known))
        if cell.same_protocol == bool(cell.differs):
            raise SuiteError(f"{place}: give either same_protocol = true or differs = 'NAME'.")
        for text in ("sparsity", "density", *FIGURES):
            if value := getattr(cell, text):
                decimal(value, f"{place}.{text}")
    return paper


def fraction(percent: str) -> Decimal:
    """A text such as `97.5%` as a fraction."""
    return decimal(percent) / 100


def decimal(text: str, where: str = "") -> Decimal:
    """A published figure, with its digits.

    Raises:
        SuiteError: it is none; names `where`.
    """
    try:
        value = Decimal(text.removesuffix("%"))
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite():
        raise SuiteError(f"{where}: {text!r} is no number; write it as it is printed.")
    return value


def read(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        SuiteError: it cannot be read, or is none.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SuiteError(f"{path}: cannot read the file: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not a TOML file ({error}).") from error


def convert(raw: Mapping[str, Any], kind: type[Form], where: str) -> Form:
    """A form of a file, its fields checked by name first, to offer the nearest.

    Raises:
        SuiteError: a field is unknown, missing or of a wrong type; names the place.
    """
    for key in raw:
        if key not in kind.__struct_fields__:
            raise UnknownName(where, "field", key, kind.__struct_fields__)
    try:
        return msgspec.convert(raw, type=kind)
    except (msgspec.ValidationError, SuiteError) as error:
        raise SuiteError(f"{where}: {with_choices(error, kind)}.") from error


def _cells(paper: Paper) -> Iterator[tuple[str, int, PublishedCell]]:
    """Every published cell with its place."""
    for name, table in paper.tables.items():
        for index, cell in enumerate(table.cells):
            yield name, index, cell
