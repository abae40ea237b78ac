"""From a suite to cells that will run: everything is checked before training."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from bench import datasets, recipes
from bench.datasets import Arrays, DatasetInfo
from bench.errors import BudgetExceeded, DataError, SuiteError, UnknownName, with_choices
from bench.planning import MAX_STEPS, check_plan
from bench.prunable import PRESETS, prunable_names
from bench.recipes import Recipe
from bench.seeds import derive
from bench.spec import BudgetSpec, CellSpec, Options, Scalar
from bench.store import Cell, Manifest
from bench.suite import MethodTable, Question, Suite
from methods import get_method
from methods.allocation import keep_count
from methods.api import Budget, SparsityMethod
from models import TIMM_PREFIX, create_model, is_known, model_options, names_like


@dataclass(frozen=True, slots=True)
class Plan:
    """A suite with every cell resolved.

    Attributes:
        manifest: the cells.
        dataset: name of the data set.
        recipe: how every cell is trained.
        data: folder of the data sets.
    """

    manifest: Manifest
    dataset: str
    recipe: Recipe
    data: Path


def resolve(suite: Suite, data: Path) -> Plan:
    """Checks every question of a suite against the classes and the data.

    Raises:
        UsageError: something cannot run as asked; nothing was trained or written.
    """
    if suite.prunable not in PRESETS:
        raise UnknownName(f"{suite.where}: prunable", "preset", suite.prunable, PRESETS)
    recipe = recipes.load(suite.recipe, f"{suite.where}: recipe", suite.folder)
    arrays = load_arrays(suite.dataset, data)
    _check_crop(recipe, arrays.info, suite)
    cells = tuple(_cell(question, suite, recipe, arrays) for question in suite.questions)
    _check_different(cells, suite)
    return Plan(Manifest(suite.name, suite.title, cells), suite.dataset, recipe, data)


@functools.lru_cache(maxsize=2)
def load_arrays(name: str, folder: Path) -> Arrays:
    """A data set, kept in memory for the next cell."""
    return datasets.load(name, folder)


def make_method(name: str, options: Mapping[str, Scalar], where: str) -> SparsityMethod:
    """An instance of a method, its options checked by name, type and range.

    Raises:
        SuiteError: names the option, what was found and what is allowed.
    """
    kind = get_method(name)
    allowed = {field.name for field in dataclasses.fields(kind)}
    for option in options:
        if option not in allowed:
            known = allowed | set(MethodTable.__struct_fields__)
            raise UnknownName(where, f"option of {name}", option, known)
    try:
        return msgspec.convert(dict(options), type=kind)
    except (msgspec.ValidationError, ValueError) as error:
        raise SuiteError(f"{where}: {name}: {with_choices(error, kind)}.") from error


def make_model(name: str, info: DatasetInfo, options: Mapping[str, Scalar], seed: int) -> nn.Module:
    """A freshly initialised network; the same for every method with the same seed.

    Raises:
        SuiteError: no such model or option, or the model cannot take the data set's images.
    """
    if not is_known(name):
        raise UnknownName("", "model", name, names_like(name))
    torch.manual_seed(derive(seed, "init"))
    try:
        return create_model(name, info.shape, info.classes, **options)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise SuiteError(f"model {name}: {error}.") from error


def make_budget(spec: BudgetSpec, recipe: Recipe, examples: int) -> Budget:
    """The budget in steps.

    Raises:
        SuiteError: less than one step.
    """
    per_epoch = examples // recipe.batch
    length = spec.steps if spec.steps is not None else (spec.epochs or 0) * per_epoch
    if not 0.5 < length < MAX_STEPS:
        raise SuiteError(f"budget: {length:g} steps; allowed: from 1 to {MAX_STEPS:g}.")
    steps = max(1, round(length))
    return Budget(steps, per_epoch, examples, recipe.drops)


def _check_crop(recipe: Recipe, info: DatasetInfo, suite: Suite) -> None:
    _, height, width = info.shape
    if recipe.crop >= min(height, width):
        raise SuiteError(
            f"{suite.where}: recipe {suite.recipe}: crop = {recipe.crop} is too much for images of "
            f"{height}x{width}; it must be below {min(height, width)}."
        )


def _check_different(cells: Iterable[Cell], suite: Suite) -> None:
    """Two rows that ask the same would be one record."""
    seen: dict[str, str] = {}
    for cell in cells:
        key = cell.spec.key
        if key in seen:
            raise SuiteError(
                f"{suite.where}: {seen[key]} and {cell.label} ask the same question "
                f"({cell.spec.slug}); options at their default make no difference."
            )
        seen[key] = cell.label


def _cell(question: Question, suite: Suite, recipe: Recipe, arrays: Arrays) -> Cell:
    where = question.where
    method = make_method(question.method, question.options, where)
    if not question.model.startswith(TIMM_PREFIX):
        allowed = model_options(question.model)
        for option in question.model_options:
            if option not in allowed:
                place = f"{suite.where}: models"
                raise UnknownName(place, f"option of {question.model}", option, allowed)
    examples = len(arrays.y_train) - recipe.validation
    if examples < recipe.batch:
        raise DataError(
            f"{where}: {len(arrays.y_train)} training images less {recipe.validation} for "
            f"validation do not fill one batch of {recipe.batch}."
        )
    try:
        budget = make_budget(question.budget, recipe, examples)
    except SuiteError as error:
        raise SuiteError(f"{where}: {error}") from error
    density = None if question.sparsity is None else 1 - question.sparsity
    try:
        plan = method.plan(budget, density)
        check_plan(plan)
    except ValueError as error:
        raise SuiteError(f"{where}: {question.method}: {error}.") from error
    steps = sum(phase.steps for phase in plan)
    multiple = steps / budget.steps
    if multiple > question.max_multiple + 1e-9:
        raise BudgetExceeded(
            f"{where}: {question.method} plans {steps} steps, but the budget allows "
            f"{question.max_multiple:g} x {budget.steps}. Set budget.max_multiple to at least "
            f"{math.ceil(1000 * multiple) / 1000:g}."
        )
    _check_prunable(question, suite, method, arrays.info, density)
    spec = CellSpec(
        method=question.method,
        model=question.model,
        dataset=suite.dataset,
        recipe=suite.recipe,
        sparsity=question.sparsity,
        seed=question.seed,
        budget=question.budget,
        recipe_hash=recipe.hash,
        data_hash=arrays.hash,
        prunable=suite.prunable,
        method_version=method.version,
        options=_differing(method),
        model_options=_differing_model_options(question),
    )
    updates = sum(phase.updates.count(phase.steps) for phase in plan if phase.updates)
    return Cell(question.label, spec, steps, multiple, updates)


def _differing(method: SparsityMethod) -> Options:
    """Options that are not at their default, in the type that the class gives them."""
    default: Any = type(method)()
    return tuple(
        sorted(
            (field.name, getattr(method, field.name))
            for field in dataclasses.fields(method)
            if getattr(method, field.name) != getattr(default, field.name)
        )
    )


def _differing_model_options(question: Question) -> Options:
    defaults = model_options(question.model)
    return tuple(
        sorted(
            # timm's options have no declared type: 0 and 0.0 must be one question.
            (name, int(value) if isinstance(value, float) and value.is_integer() else value)
            for name, value in question.model_options.items()
            if name not in defaults or defaults[name] != value
        )
    )


def _check_prunable(
    question: Question,
    suite: Suite,
    method: SparsityMethod,
    info: DatasetInfo,
    density: float | None,
) -> None:
    try:
        model = _probe(question.model, info, tuple(question.model_options.items()))
        names = prunable_names(model, method, suite.prunable)
    except SuiteError as error:
        raise SuiteError(f"{question.where}: {error}") from error
    weights = sum(model.get_parameter(name).numel() for name in names)
    if density is not None and keep_count(weights, density) == 0:
        raise SuiteError(
            f"{question.where}: sparsity {question.sparsity} leaves none of the {weights} prunable "
            f"weights of {question.model}."
        )


@functools.lru_cache(maxsize=8)
def _probe(name: str, info: DatasetInfo, options: Options) -> nn.Module:
    """A network to ask questions of, once one image went through it."""
    model = make_model(name, info, dict(options), 0).eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, *info.shape))
    except RuntimeError as error:
        size = "x".join(map(str, info.shape))
        raise SuiteError(f"model {name} cannot take images of {size} ({error}).") from error
    if output.shape != (1, info.classes):
        raise SuiteError(
            f"model {name} returns {tuple(output.shape)} for one image; expected "
            f"(1, {info.classes})."
        )
    return model
