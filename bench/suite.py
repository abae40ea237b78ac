"""A suite: a TOML file of methods, models, sparsities and seeds, and its questions. No torch."""

from __future__ import annotations

import itertools
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench import datasets, folders, recipes
from bench.errors import SuiteError, UnknownName
from bench.record import SUITE_NAME
from bench.spec import BudgetSpec, Scalar
from methods import STAND_INS, MethodInfo, find_info
from methods import names as method_names
from models import TIMM_PREFIX
from models import find_info as find_model
from models import names as model_names

FOLDER = Path(__file__).parent / "suites"

MAX_SEED = 2**63 - 1

MAX_CELLS = 100_000
"""More than anybody trains: a slip, which would take minutes to resolve."""


class BudgetTable(msgspec.Struct, forbid_unknown_fields=True):
    """`budget` in a suite: a length, and how many of it a method may spend.

    Where a suite gives no length, it takes the recipe's own: that of the run it is from.
    """

    epochs: float | None = None
    steps: int | None = None
    max_multiple: float | None = None


class SuiteFile(msgspec.Struct, forbid_unknown_fields=True):
    """The TOML file as it stands; the README of this folder describes the fields."""

    dataset: str
    recipe: str
    models: list[str | dict[str, Scalar]]
    methods: dict[str, Any]
    budget: BudgetTable = msgspec.field(default_factory=BudgetTable)
    title: str = ""
    sparsities: list[float] = []
    seeds: list[int] = msgspec.field(default_factory=lambda: [0])
    prunable: str = "all"
    init: str = "random"
    controls: bool = False


class MethodTable(msgspec.Struct, forbid_unknown_fields=True):
    """What a `[methods.LABEL]` may set besides the method's own options."""

    method: str | None = None
    budget: BudgetTable | None = None
    sparsities: list[float] | None = None
    source: str | None = None
    prunable: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """One cell as a suite asks for it, its options not yet checked by the method's class.

    Attributes:
        where: place in the suite, for errors.
        max_multiple: how many budgets the method may spend.
        prunable: preset of weights that count.
        source: label of the suite's row whose masks the cell starts from.
    """

    where: str
    label: str
    method: str
    options: dict[str, Scalar]
    model: str
    model_options: dict[str, Scalar]
    sparsity: float | None
    seed: int
    budget: BudgetSpec
    max_multiple: float
    prunable: str
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite whose form is right: names exist, numbers are in range.

    Attributes:
        name: the file's stem; records lie in a folder of that name.
        folder: where the file lies; paths of a recipe and of images start there.
        init: `random`, `pretrained`, or a file of weights.
        controls: whether the controls of each method are added, see `bench.controls`.
    """

    name: str
    title: str
    where: str
    folder: Path
    dataset: str
    recipe: str
    prunable: str
    init: str
    questions: tuple[Question, ...]
    controls: bool = False


def names() -> list[str]:
    """The suites that come with the harness."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def title(name: str) -> str:
    """Title of a suite that comes with the harness."""
    raw = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    return str(raw.get("title", ""))


def load(name: str) -> Suite:
    """A suite by name, or from a TOML file.

    Raises:
        SuiteError: there is no such suite, or it is wrong; says where and what is allowed.
    """
    is_path = name.endswith(".toml") or "/" in name
    if not is_path and name not in names():
        raise UnknownName("", "suite", name, [*names(), "a .toml file"])
    path = Path(name) if is_path else FOLDER / f"{name}.toml"
    where = path.name
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SuiteError(f"{path}: cannot read the suite: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SuiteError(f"{path}: not a TOML file ({error}).") from error
    if not SUITE_NAME.fullmatch(path.stem):
        raise SuiteError(
            f"{path}: name the file with letters, digits, '.', '_' and '-' only, "
            "100 of them at most."
        )
    if isinstance(raw.get("budget"), dict):
        _convert(raw["budget"], BudgetTable, f"{where}: budget")
    file = _convert(raw, SuiteFile, where)
    if not file.title.isprintable():
        raise SuiteError(f"{where}: title = {file.title!r}: give one line.")
    known = datasets.names()
    if file.dataset not in known and not folders.is_folder(file.dataset):
        known += folders.KINDS
        raise UnknownName(f"{where}: dataset", "data set", file.dataset, known)
    return Suite(
        name=path.stem,
        title=file.title or path.stem,
        where=where,
        folder=path.parent,
        dataset=file.dataset,
        recipe=file.recipe,
        prunable=file.prunable,
        init=file.init,
        questions=tuple(_questions(file, where, path.parent)),
        controls=file.controls,
    )


def _convert(raw: Mapping[str, Any], kind: Any, where: str) -> Any:
    """Checks names by hand, to offer the nearest, then types by msgspec, which names the place."""
    allowed = kind.__struct_fields__
    for key in raw:
        if key not in allowed:
            raise UnknownName(where, "field", key, allowed)
    try:
        return msgspec.convert(raw, type=kind)
    except msgspec.ValidationError as error:
        raise SuiteError(f"{where}: {error}.") from error


def _questions(file: SuiteFile, where: str, folder: Path) -> Iterator[Question]:
    _check_seeds(file.seeds, where)
    common = _common_budget(file, where, folder)
    if not file.models or not file.methods:
        raise SuiteError(f"{where}: models and methods may not be empty.")
    models = [_model(entry, f"{where}: models[{i}]") for i, entry in enumerate(file.models)]
    seen: set[tuple[object, ...]] = set()
    for label, table in file.methods.items():
        place = f"{where}: methods.{label}"
        _check_label(label, f"{where}: methods")
        if not isinstance(table, dict):
            raise SuiteError(f"{place}: found {table!r}; give a table: [methods.{label}]")
        if isinstance(table.get("budget"), dict):
            _convert(table["budget"], BudgetTable, f"{place}.budget")
        own = {key: value for key, value in table.items() if key in MethodTable.__struct_fields__}
        settings: MethodTable = _convert(own, MethodTable, place)
        method = settings.method or label
        info = _method(method, place)
        sparsities = _sparsities(method, info, settings, file, place)
        budget, multiple = _budget(common, settings.budget, file.recipe, place)
        options = {key: value for key, value in table.items() if key not in own}
        for suffix, chosen in _grid(options, place):
            _check_label(label + suffix, place)
            for (model, model_options), sparsity in itertools.product(models, sparsities):
                for seed in file.seeds:
                    question = Question(
                        place,
                        label + suffix,
                        method,
                        chosen,
                        model,
                        model_options,
                        sparsity,
                        seed,
                        budget,
                        multiple,
                        file.prunable if settings.prunable is None else settings.prunable,
                        settings.source,
                    )
                    identity = (label + suffix, model, str(model_options), sparsity, seed)
                    if identity in seen:
                        raise SuiteError(f"{place}: asked for twice: {identity}.")
                    seen.add(identity)
                    if len(seen) > MAX_CELLS:
                        raise SuiteError(
                            f"{where}: asks for more than {MAX_CELLS:,} cells; make several suites."
                        )
                    yield question


def _check_label(label: str, place: str) -> None:
    if not label.isprintable() or not label or "|" in label:
        raise SuiteError(f"{place}: {label!r} is no label; give one line without '|'.")


def _check_seeds(seeds: list[int], where: str) -> None:
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) > MAX_SEED:
        found = textwrap.shorten(str(seeds), 80)
        raise SuiteError(
            f"{where}: seeds = {found}: give different integers from 0 to {MAX_SEED:,}."
        )


def _model(entry: str | dict[str, Scalar], where: str) -> tuple[str, dict[str, Scalar]]:
    options: dict[str, Scalar] = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise SuiteError(f"{where}: needs a name, such as {{ name = 'resnet20', shortcut = 'B' }}.")
    try:
        known = name.startswith(TIMM_PREFIX) or find_model(name) is not None
    except ValueError as error:
        raise SuiteError(f"{where}: {error}.") from error
    if not known:
        raise UnknownName(where, "model", name, [*model_names(), f"{TIMM_PREFIX}NAME"])
    return name, options


def _method(name: str, place: str) -> MethodInfo:
    """What is known of a method, others' own included. A suite names no code to load."""
    if re.search(r"[/:\\]|\.py$", name):
        raise SuiteError(
            f"{place}: method = {name!r}: a suite may not name code, as anybody's would run. "
            "Install the file as a package that offers the method under a name "
            "(`sparsebench new method` writes one that shows how); to try a file: "
            "sparsebench conform FILE.py"
        )
    try:
        info = STAND_INS.get(name) or find_info(name)
    except ValueError as error:
        raise SuiteError(f"{place}: {error}.") from error
    if info is None:
        raise UnknownName(place, "method", name, [*method_names(), *STAND_INS])
    return info


def _sparsities(
    method: str, info: MethodInfo, settings: MethodTable, file: SuiteFile, place: str
) -> list[float] | list[None]:
    controls = info.controls
    if controls == "none":
        if settings.sparsities is not None:
            raise SuiteError(f"{place}.sparsities: {method} has no sparsity to set.")
        return [0.0]
    if controls == "penalty":
        if settings.sparsities is not None:
            raise SuiteError(
                f"{place}.sparsities: a penalty drives {method}; give a grid of its coefficient."
            )
        return [None]
    sparsities = file.sparsities if settings.sparsities is None else settings.sparsities
    if not sparsities or len(set(sparsities)) != len(sparsities):
        raise SuiteError(f"{place}: sparsities = {sparsities}: give different numbers in [0, 1).")
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise SuiteError(
                f"{place}: sparsity {sparsity} lies outside [0, 1). It is the fraction of zeros: "
                "0.9 leaves a tenth of the weights."
            )
    return sparsities


def _common_budget(file: SuiteFile, where: str, folder: Path) -> BudgetTable:
    """The suite's budget, its length the recipe's where the suite gives none."""
    if _has_length(file.budget):
        return file.budget
    length = recipes.load(file.recipe, f"{where}: recipe", folder).length
    if length is None:
        return file.budget
    return msgspec.structs.replace(file.budget, epochs=length.epochs, steps=length.steps)


def _has_length(budget: BudgetTable) -> bool:
    return budget.epochs is not None or budget.steps is not None


def _budget(
    common: BudgetTable, own: BudgetTable | None, recipe: str, place: str
) -> tuple[BudgetSpec, float]:
    """A method's own length replaces the suite's; its own multiple likewise."""
    length = own if own and _has_length(own) else common
    if not _has_length(length):
        raise SuiteError(
            f"{place}: budget: give either epochs or steps, such as {{ epochs = 10 }}; recipe "
            f"{recipe} does not say how long its own run is."
        )
    multiple = own.max_multiple if own and own.max_multiple is not None else common.max_multiple
    multiple = 1.0 if multiple is None else multiple
    if not multiple >= 1:
        raise SuiteError(f"{place}: budget.max_multiple = {multiple}: must be at least 1.")
    try:
        return BudgetSpec(length.epochs, length.steps), multiple
    except SuiteError as error:
        raise SuiteError(f"{place}: {error}") from error


def _grid(options: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Scalar]]]:
    """Every combination of list-valued options, with the suffix that tells it in a label."""
    axes: list[list[Any]] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, bool | int | float | str) for v in values):
            raise SuiteError(f"{place}.{name}: {value!r} is neither a value nor a list of values.")
        axes.append(values)
    for combination in itertools.product(*axes):
        chosen = dict(zip(options, combination, strict=True))
        varied = [f"{n}={chosen[n]}" for n, value in options.items() if isinstance(value, list)]
        yield (f"[{','.join(varied)}]" if varied else ""), chosen
