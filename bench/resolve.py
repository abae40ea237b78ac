"""From a suite to cells that will run: everything is checked before training."""

from __future__ import annotations

import dataclasses
import functools
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench import datasets, folders, recipes, streaming
from bench.controls import Asked, Joined, join
from bench.datasets import Arrays, DatasetInfo
from bench.errors import (
    BenchError,
    BudgetExceeded,
    DataError,
    SuiteError,
    UnknownName,
    with_choices,
)
from bench.folders import Folder
from bench.initial import RANDOM, content, located
from bench.networks import LOADING, probe
from bench.planning import MAX_STEPS, check_plan
from bench.prunable import PRESETS, check_shared, parametrised, prunable_names, shapes
from bench.recipes import Recipe
from bench.record import one_line, told
from bench.small import compared, nearest_width
from bench.spec import BudgetSpec, CellSpec, Options, Scalar
from bench.store import Cell, Manifest
from bench.suite import MethodTable, Question, Suite
from methods import STAND_INS, get_method
from methods.allocation import keep_count
from methods.api import Budget, Phase, SparsityMethod
from methods.dense import Dense
from models import TIMM_PREFIX, model_options

WEIGHT_OPTIONS = {"pretrained", *LOADING}
"""Keywords by which timm loads weights."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A suite with every cell resolved.

    Attributes:
        manifest: the cells.
        dataset: name of the data set.
        recipe: how every cell is trained.
        data: folder of the data sets.
        start: folder from which a relative path of the data set starts.
        notes: what people should know of the data and the models, a line each.
        init: where the first weights come from, see `bench.initial`.
        controls: keys of the cells that only the suite's `controls` ask for.
    """

    manifest: Manifest
    dataset: str
    recipe: Recipe
    data: Path
    init: str
    start: Path = Path()
    notes: tuple[str, ...] = ()
    controls: frozenset[str] = frozenset()


def resolve(suite: Suite, data: Path) -> Plan:
    """Checks every question of a suite against the classes and the data.

    Raises:
        UsageError: something cannot run as asked; nothing was trained or written.
    """
    presets = [(suite.where, suite.prunable), *((q.where, q.prunable) for q in suite.questions)]
    for where, preset in presets:
        if preset not in PRESETS:
            raise UnknownName(f"{where}: prunable", "preset", preset, PRESETS)
    recipe = recipes.load(suite.recipe, f"{suite.where}: recipe", suite.folder)
    _check_recipe(recipe, suite)
    arrays = load_data(suite.dataset, recipe, data, suite.folder)
    _check_crop(recipe, arrays.info, suite)
    init = located(suite.init, suite.folder, f"{suite.where}: init")
    rows = _Resolver(suite, recipe, arrays, init).rows()
    manifest = Manifest(suite.name, suite.title, rows.cells)
    notes = arrays.notes if isinstance(arrays, Folder) else ()
    notes += (*_left_out(suite, arrays.info), *rows.notes)
    return Plan(manifest, suite.dataset, recipe, data, init, suite.folder, notes, rows.added)


@functools.lru_cache(maxsize=2)
def load_arrays(name: str, folder: Path) -> Arrays:
    """A data set, kept in memory for the next cell."""
    return datasets.load(name, folder)


def load_data(name: str, recipe: Recipe, data: Path, start: Path) -> Arrays | Folder:
    """Any data set: arrays in memory, or a folder's list of files.

    Args:
        name: the suite's.
        recipe: says the size of a folder's images.
        data: folder of the data sets.
        start: folder from which a relative path in the name starts.

    Raises:
        DataError: it is missing, damaged, or not such data.
    """
    if not folders.is_folder(name):
        return load_arrays(name, data)
    return _load_folder(folders.locate(name, data, start), data, recipe.image_size)


@functools.lru_cache(maxsize=2)
def _load_folder(root: Path, data: Path, image_size: int) -> Folder:
    return folders.load(root, data, image_size)


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
    return Budget(steps, per_epoch, examples, recipe.drops, optimizer=recipe.optimizer)


def in_budgets(multiple: float, of: BudgetSpec, budget: Budget, recipe: Recipe) -> float:
    """What so many budgets of a source are, in those of a cell of the same recipe and data."""
    return multiple * (make_budget(of, recipe, budget.examples).steps / budget.steps)


def _check_recipe(recipe: Recipe, suite: Suite) -> None:
    """Whether the recipe says what a folder needs, and nothing that arrays have no use for."""
    where = f"{suite.where}: recipe {suite.recipe}"
    if not folders.is_folder(suite.dataset):
        plain = dataclasses.replace(
            recipe, image_size=0, area=(1.0, 1.0), crop_fraction=0.875, auto_augment=""
        )
        if recipe != plain:
            raise SuiteError(
                f"{where}: image_size, area, crop_fraction and auto_augment are for folders of "
                f"images; {suite.dataset} has arrays of pixels, which are cropped by crop."
            )
    elif not recipe.image_size:
        raise SuiteError(
            f"{where}: does not say image_size, the side in pixels of the squares that the images "
            f"of {suite.dataset} are made into. Add a line such as image_size = 224."
        )
    elif recipe.normalise == "mean_image":
        raise SuiteError(
            f'{where}: normalise = "mean_image" is for arrays of pixels; the images of '
            f"{suite.dataset} are normalised channel by channel (true), scaled (false), or "
            'made of length 1 ("unit").'
        )
    else:
        streaming.check(recipe, where)


def _left_out(suite: Suite, info: DatasetInfo) -> Iterator[str]:
    """Layers that no preset counts, for each model that has some."""
    asked = dict.fromkeys((q.model, tuple(q.model_options.items())) for q in suite.questions)
    for model, options in asked:
        if found := parametrised(probe(model, info, options)):
            yield f"{model}: not prunable, computed by a parametrisation: {', '.join(found)}"


def _check_crop(recipe: Recipe, info: DatasetInfo, suite: Suite) -> None:
    _, height, width = info.shape
    if recipe.crop >= min(height, width):
        raise SuiteError(
            f"{suite.where}: recipe {suite.recipe}: crop = {recipe.crop} is too much for images of "
            f"{height}x{width}; it must be below {min(height, width)}."
        )


def _check_different(cells: Iterable[Cell], suite: Suite) -> None:
    """Two rows that ask the same would be one record."""
    seen: dict[tuple[str, float | None], str] = {}
    for cell in cells:
        key = (cell.spec.key, cell.sparsity)
        if key in seen:
            raise SuiteError(
                f"{suite.where}: {seen[key]} and {cell.label} ask the same question "
                f"({cell.spec.slug}); options at their default make no difference."
            )
        seen[key] = cell.label


@dataclass
class _Resolver:
    """Turns the questions of one suite into cells."""

    suite: Suite
    recipe: Recipe
    arrays: Arrays | Folder
    first_weights: str = RANDOM

    def rows(self) -> Joined:
        """The cells of the suite, and of its controls where it asks for them."""
        own = self.cells()
        _check_different(own, self.suite)
        if not self.suite.controls:
            return Joined(tuple(own), frozenset(), ())
        pairs = zip(self.suite.questions, own, strict=True)
        return join([self.asked(*pair) for pair in pairs], self.cell)

    def asked(self, question: Question, cell: Cell) -> Asked:
        """A row, with what controls need to know of its method."""
        method = make_method(cell.spec.method, dict(cell.spec.options), question.where)
        all_layers = self.prunable(question, method) == self.prunable(question)
        return Asked(question, method, cell, all_layers)

    def cells(self) -> list[Cell]:
        """One for each question, in their order; those with a source after it was found."""
        found: dict[int, Cell] = {}
        questions = list(enumerate(self.suite.questions))
        for index, question in questions:
            if question.source is None:
                found[index] = self.cell(question, None)
        sources = [(q, found[i]) for i, q in questions if i in found and _leaves_masks(q)]
        for index, question in questions:
            if question.source is not None:
                found[index] = self.cell(question, _source_of(question, sources))
        return [found[index] for index, _ in questions]

    def cell(self, question: Question, source: Cell | None) -> Cell:
        """One row, checked against the classes and the data."""
        if question.method in STAND_INS:
            return self.small_dense(question)
        where = question.where
        with _asked(question):
            method = make_method(question.method, question.options, where)
            needs_source, lands_on_all = method.needs_source, method.lands_on_all
        if needs_source != (source is not None):
            raise SuiteError(_source_text(question, needs_source))
        asked = question.sparsity
        if lands_on_all and len(others := self.others(question)) > 1:
            # One cell answers for all the sparsities of the suite: that of the highest.
            if "also" in question.options:
                raise SuiteError(f"{where}.also: the suite's sparsities fill it in.")
            also = " ".join(map(repr, others[:-1]))  # every digit: the counts depend on it
            method = make_method(question.method, {**question.options, "also": also}, where)
            question = dataclasses.replace(question, sparsity=others[-1])
        cell = self.planned(question, method, source, asked)
        return dataclasses.replace(cell, sparsity=asked) if lands_on_all else cell

    def others(self, question: Question) -> list[float]:
        """Sparsities that the suite asks of the same row, ascending."""
        same = dataclasses.replace(question, sparsity=None)
        mine = self.prunable(question)
        return sorted(
            q.sparsity
            for q in self.suite.questions
            if q.sparsity is not None
            and dataclasses.replace(q, sparsity=None) == same
            # A preset may count other weights at another sparsity: that is another cell.
            and self.prunable(q) == mine
        )

    def prunable(self, question: Question, method: SparsityMethod | None = None) -> tuple[str, ...]:
        """Weights that the suite's preset counts for a row, and the method can prune."""
        model = probe(question.model, self.arrays.info, tuple(question.model_options.items()))
        with _asked(question):
            return prunable_names(model, method or Dense(), question.prunable, question.sparsity)

    def planned(
        self,
        question: Question,
        method: SparsityMethod,
        source: Cell | None,
        row: float | None = None,
    ) -> Cell:
        """The cell of a question, its plan checked; `row` is the sparsity whose round is meant."""
        suite, where = self.suite, question.where
        _check_model_options(question, suite)
        budget = self.budget(question)
        density = None if question.sparsity is None else 1 - question.sparsity
        budget = self.with_shapes(budget, question, method, density)
        with _asked(question):
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
        spec = CellSpec(
            method=question.method,
            model=question.model,
            dataset=suite.dataset,
            recipe=suite.recipe,
            sparsity=question.sparsity,
            seed=question.seed,
            budget=question.budget,
            recipe_hash=self.recipe.hash,
            data_hash=self.arrays.hash,
            prunable=question.prunable,
            method_version=method.version,
            options=_differing(method),
            model_options=_differing_model_options(question),
            source=source.spec.key if source else None,
            init=self.init(question),
        )
        updates = sum(phase.updates.count(phase.steps) for phase in plan if phase.updates)
        paid = 0.0
        if source:
            paid = in_budgets(source.multiple, source.spec.budget, budget, self.recipe)
        if method.lands_on_all and row is not None:
            steps = _steps_to(plan, budget, 1 - row)
        return Cell(question.label, spec, steps, steps / budget.steps + paid, updates)

    def init(self, question: Question) -> str:
        """Content of the first weights."""
        options = tuple(question.model_options.items())
        try:
            return content(self.first_weights, question.model, self.arrays.info, options)
        except SuiteError as error:
            raise SuiteError(f"{self.suite.where}: {error}") from error

    def budget(self, question: Question) -> Budget:
        """The question's budget in steps."""
        where, recipe = question.where, self.recipe
        examples = len(self.arrays.y_train) - recipe.validation
        if examples < recipe.batch:
            raise DataError(
                f"{where}: {len(self.arrays.y_train)} training images less {recipe.validation} for "
                f"validation do not fill one batch of {recipe.batch}."
            )
        try:
            return make_budget(question.budget, recipe, examples)
        except SuiteError as error:
            raise SuiteError(f"{where}: {error}") from error

    def with_shapes(
        self, budget: Budget, question: Question, method: SparsityMethod, density: float | None
    ) -> Budget:
        """The budget with the prunable weights' shapes, once some of them are to remain."""
        with _asked(question):
            try:
                options = tuple(question.model_options.items())
                model = probe(question.model, self.arrays.info, options)
                names = prunable_names(model, method, question.prunable, question.sparsity)
                check_shared(model, method, names, self.arrays.info.shape)
            except SuiteError as error:
                raise SuiteError(f"{question.where}: {error}") from error
        weights = sum(model.get_parameter(name).numel() for name in names)
        if density is not None and keep_count(weights, density) == 0:
            raise SuiteError(
                f"{question.where}: sparsity {question.sparsity} leaves none of the {weights} "
                f"prunable weights of {question.model}."
            )
        if density is not None and method.controls == "filters":
            filters = sum(len(model.get_parameter(name)) for name in names)
            if keep_count(filters, density) == 0:
                raise SuiteError(
                    f"{question.where}: sparsity {question.sparsity} leaves none of the {filters} "
                    f"filters of {question.model}."
                )
        return dataclasses.replace(budget, shapes=shapes(model, names))

    def small_dense(self, question: Question) -> Cell:
        """The dense network of the width whose prunable weights come nearest to the row's."""
        assert question.sparsity is not None
        asked, where, info = question.sparsity, question.where, self.arrays.info
        if question.options or question.source:
            raise SuiteError(f"{where}: small_dense has no options and no source.")
        dense = dataclasses.replace(question, method="dense", sparsity=0.0)
        full = self.planned(dense, make_method("dense", {}, where), None)
        options = tuple(question.model_options.items())
        if self.first_weights != RANDOM:
            why = "it starts from given weights, and a narrower network has none"
            return dataclasses.replace(full, sparsity=asked, skipped=why)
        try:
            width = nearest_width(question.model, info, options, question.prunable, asked)
        except SuiteError as error:
            return dataclasses.replace(full, sparsity=asked, skipped=str(error))
        small = dataclasses.replace(dense, model_options={**question.model_options, "width": width})
        cell = self.planned(small, make_method("dense", {}, where), None)
        preset = question.prunable
        against = compared(question.model, info, options, width, preset, asked)
        return dataclasses.replace(cell, sparsity=asked, against=against)


@contextmanager
def _asked(question: Question) -> Iterator[None]:
    """Whatever the hooks of anybody's method may raise, as one line.

    Raises:
        SuiteError: says where it was raised.
    """
    try:
        yield
    except (BenchError, KeyboardInterrupt):
        raise
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = one_line(told(error))
        raise SuiteError(
            f"{question.where}: {question.method}: {reason} ({place.name}, line {place.lineno} of "
            f"{place.filename}). Mend the method, or leave it out of the suite."
        ) from error


def _steps_to(plan: Sequence[Phase], budget: Budget, density: float) -> int:
    """Steps up to the end of the measured phase that lands on a density."""
    total = sum(math.prod(shape) for _, shape in budget.shapes)
    done = 0
    for phase in plan:
        done += phase.steps
        kept = keep_count(total, 1.0 if phase.density is None else phase.density)
        if phase.measured and kept == keep_count(total, density):
            return done
    return done


def _source_of(question: Question, candidates: list[tuple[Question, Cell]]) -> Cell:
    """The cell of the named row with the same model, seed and sparsity."""
    place, wanted = f"{question.where}.source", question.source or ""
    labels = dict.fromkeys(source.label for source, _ in candidates)
    if wanted not in labels:
        raise UnknownName(place, "row to take masks from", wanted, labels)
    for source, cell in candidates:
        same = (source.model, source.model_options, source.seed, source.prunable, cell.asked)
        mine = (
            question.model,
            question.model_options,
            question.seed,
            question.prunable,
            question.sparsity,
        )
        if source.label == wanted and same == mine:
            return cell
    raise SuiteError(
        f"{place}: {wanted} has no cell at sparsity {question.sparsity} of the weights that "
        f"{question.prunable!r} counts."
    )


def _leaves_masks(question: Question) -> bool:
    """Whether a row's masks fit others of its sparsity: no filters, no narrower network."""
    return question.method not in STAND_INS and get_method(question.method).controls == "density"


def _source_text(question: Question, needed: bool) -> str:
    if needed:
        text = "needs the masks of another row: set source = 'LABEL', a label of this suite"
    else:
        text = "takes nothing from a source with these options: leave source out"
    return f"{question.where}: {question.method} {text}."


def _check_model_options(question: Question, suite: Suite) -> None:
    if question.model.startswith(TIMM_PREFIX):
        if loaded := WEIGHT_OPTIONS & question.model_options.keys():
            name = ", ".join(sorted(loaded))
            raise SuiteError(
                f"{suite.where}: models: {question.model}: {name}: set init = 'pretrained' or a "
                ".safetensors file in the suite instead, so that the key knows it."
            )
    else:
        allowed = model_options(question.model)
        for option in question.model_options:
            if option not in allowed:
                place = f"{suite.where}: models"
                raise UnknownName(place, f"option of {question.model}", option, allowed)


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
