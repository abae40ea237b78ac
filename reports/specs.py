"""Specs of tables: TOML files that say which cells stand where, resolved against a paper's names.

    title = "..."
    dataset = "cifar10"
    layout = "methods"         # a column a method; "fields": a column a figure, a line a method;
                               # "rounds": the same with a line for each round of a lottery ticket
    paper = "dpf2020"          # optional: names of models and methods, and published figures
    table = "table4"           # of that paper
    target = "sparsity"        # or "density": what the targets of rows are
    figure = "accuracy"        # of layout "methods": the figure in its cells
    digits = 2                 # of accuracies
    columns = ["dense", "dpf"] # methods; for other layouts figures, see `reports.fields`
    methods = ["dpf"]          # for other layouts: the lines of each row
    rows = [{ model = "ResNet-20", targets = ["90%"] }]
    [filters]                  # which records may stand in it; a row can have its own
    prunable = "dpf"

Without a paper, and beside its names, a model is one of ours or `{ label, name, options }`, and a
method one of ours or `{ label, method, options }`. Options are all of those that differ from the
method's defaults: a record with others is another variant and stands in no cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

import msgspec

from bench.errors import SuiteError, UnknownName
from bench.spec import Options, Scalar
from reports import papers
from reports.fields import FIELDS
from reports.papers import Paper, PaperMethod, PaperModel, PaperTable, PublishedCell

FOLDER = Path(__file__).parent / "tables"

Layout = Literal["methods", "fields", "rounds"]

DIGITS = 10
"""Most decimals of an accuracy that a table can show."""

HEADINGS = {"sparsity": "target ratio", "density": "density"}
"""Of the column with the targets, in the papers' words."""


class Filters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What records must have to stand in a table; what is not given, any may have."""

    suite: str | None = None
    recipe: str | None = None
    epochs: float | None = None
    steps: int | None = None
    prunable: str | None = None
    init: str | None = None

    def with_own(self, other: Filters) -> Filters:
        """These, with what `other` gives in their place."""
        own = msgspec.structs.asdict(other).items()
        return msgspec.structs.replace(self, **{k: v for k, v in own if v is not None})


class ModelForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model of ours in a spec."""

    name: str
    label: str = ""
    options: dict[str, Scalar] = {}


class MethodForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A method of ours in a spec."""

    method: str
    label: str = ""
    options: dict[str, Scalar] = {}


class RowForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Lines of one model; `targets` are percents such as `90%`."""

    model: str | ModelForm
    targets: tuple[str, ...] = ("",)
    filters: Filters = Filters()


class TableForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The TOML file as it stands; the head of this module describes it."""

    title: str
    dataset: str
    columns: tuple[str | MethodForm, ...]
    rows: tuple[RowForm, ...]
    layout: Layout = "methods"
    methods: tuple[str | MethodForm, ...] = ()
    paper: str = ""
    table: str = ""
    target: Literal["sparsity", "density"] = "sparsity"
    figure: str = "accuracy"
    digits: int = 2
    filters: Filters = Filters()


@dataclass(frozen=True, slots=True)
class Question:
    """What is looked for in records, and what a paper has found.

    Attributes:
        model: label of the network; `name` is ours.
        column: label of the method; `method` is ours, empty where we have none.
        target: as the table shows it; `sparsity` is that as a fraction, None where none is asked.
        trained: the paper's network, with its recipe and budget; None without a paper.
    """

    model: str
    name: str
    model_options: Options
    column: str
    method: str
    options: Options
    target: str
    sparsity: float | None
    filters: Filters
    published: PublishedCell | None
    trained: PaperModel | None

    @property
    def sought(self) -> tuple[object, ...]:
        """What decides which record answers."""
        asked = self.method, self.options, self.sparsity
        return (self.name, self.model_options, *asked, self.filters)


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A table to be filled.

    Attributes:
        name: the file's stem.
        lines: the questions of each line: one for each column where columns are methods, else one.
        baselines: for each line, that of its dense network.
        columns: labels of methods, or names of figures.
        heading: of the column with the targets; empty where no line has one.
    """

    name: str
    title: str
    where: str
    dataset: str
    layout: Layout
    lines: tuple[tuple[Question, ...], ...]
    baselines: tuple[Question, ...]
    columns: tuple[str, ...]
    heading: str
    figure: str
    digits: int
    paper: Paper | None
    table: PaperTable | None

    @property
    def figures(self) -> tuple[str, ...]:
        """Names in `reports.fields.FIELDS` of what its cells show."""
        return (self.figure,) if self.layout == "methods" else self.columns

    @property
    def needs_layers(self) -> bool:
        """Whether records must be read with their layers."""
        return any(FIELDS[name].layers for name in self.figures)


def names() -> list[str]:
    """The specs that come with the harness."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str | Path) -> TableSpec:
    """A spec by name, or from a TOML file.

    Raises:
        SuiteError: there is no such spec, or it is wrong; says where and what is allowed.
    """
    text = str(name)
    if not (text.endswith(".toml") or "/" in text):
        if text not in names():
            raise UnknownName("", "table", text, [*names(), "a .toml file"])
        name = FOLDER / f"{text}.toml"
    path = Path(name)
    return resolve(papers.convert(papers.read(path), TableForm, path.name), path)


def resolve(form: TableForm, path: Path) -> TableSpec:
    """The spec with every name looked up.

    Raises:
        SuiteError: a name is unknown, or fields do not fit together; says where.
    """
    where = path.name
    names = Names(where, form, *published(form, where))
    is_grid = form.layout == "methods"
    methods = form.columns if is_grid else form.methods
    if not (form.rows and form.columns and methods) or (is_grid and form.methods):
        needs = "rows and columns" if is_grid else "rows, columns and methods"
        raise SuiteError(f"{where}: layout {form.layout!r} takes {needs}, none of them empty.")
    if not 0 <= form.digits <= DIGITS:
        raise SuiteError(f"{where}: digits = {form.digits}: give 0 to {DIGITS}.")
    once(where, form)
    figures = (form.figure,) if is_grid else form.columns
    for name in figures:
        if name not in FIELDS:
            kind = "figure" if is_grid else "column"
            place = f"{where}: {'figure' if is_grid else 'columns'}"
            raise UnknownName(place, kind, str(name), FIELDS)
    looked_up = [names.method(entry, index) for index, entry in enumerate(methods)]
    lines: list[tuple[Question, ...]] = []
    baselines = []
    for index, row in enumerate(form.rows):
        for target in row.targets:
            asked = [names.question(row, index, target, method) for method in looked_up]
            new = [tuple(asked)] if is_grid else [(one,) for one in asked]
            lines += new
            baselines += [names.question(row, index, target, names.dense)] * len(new)
    has_target = any(target for row in form.rows for target in row.targets)
    return TableSpec(
        name=path.stem,
        title=form.title,
        where=where,
        dataset=form.dataset,
        layout=form.layout,
        lines=tuple(lines),
        baselines=tuple(baselines),
        columns=tuple(m.label for _, m in looked_up) if is_grid else tuple(map(str, form.columns)),
        heading=HEADINGS[form.target] if has_target else "",
        figure=form.figure,
        digits=form.digits,
        paper=names.paper,
        table=names.table,
    )


def once(where: str, form: TableForm) -> None:
    """Checks that no column, method or target is given twice.

    Raises:
        SuiteError: one is; names it.
    """
    lists: dict[str, Sequence[object]] = {"columns": form.columns, "methods": form.methods}
    for index, row in enumerate(form.rows):
        place = f"rows[{index}].targets"
        lists[place] = [percent(target, f"{where}: {place}") for target in row.targets]
    for place, entries in lists.items():
        for index, entry in enumerate(entries):
            if entry in entries[:index]:
                raise SuiteError(f"{where}: {place}[{index}]: the same as another; give it once.")


def published(form: TableForm, where: str) -> tuple[Paper | None, PaperTable | None]:
    """The paper of a spec and its table.

    Raises:
        SuiteError: there is none of the name.
    """
    if not form.paper:
        return None, None
    paper = papers.load(form.paper, f"{where}: paper")
    if form.table not in paper.tables:
        raise UnknownName(f"{where}: table", f"table of {form.paper}", form.table, paper.tables)
    return paper, paper.tables[form.table]


Looked = tuple[str, PaperMethod]
"""A method, and the key by which its paper has it."""


@dataclass(frozen=True, slots=True)
class Names:
    """What the names of a spec mean: its paper's, or ours."""

    where: str
    form: TableForm
    paper: Paper | None
    table: PaperTable | None

    @property
    def dense(self) -> Looked:
        """The baseline."""
        own = self.paper.methods.get("dense") if self.paper else None
        return "dense", own or PaperMethod("dense", "dense")

    def method(self, entry: str | MethodForm, index: int) -> Looked:
        """A column, or a line where columns are figures."""
        if isinstance(entry, MethodForm):
            return "", PaperMethod(entry.label or entry.method, entry.method, entry.options)
        if self.paper is None:
            return entry, PaperMethod(entry, entry)
        if entry not in self.paper.methods:
            is_grid = self.form.layout == "methods"
            place = f"{self.where}: {'columns' if is_grid else 'methods'}[{index}]"
            raise UnknownName(place, "column" if is_grid else "method", entry, self.paper.methods)
        return entry, self.paper.methods[entry]

    def model(self, entry: str | ModelForm, index: int) -> tuple[str, PaperModel]:
        """The label of a row and the network that it means."""
        if isinstance(entry, ModelForm):
            return entry.label or entry.name, PaperModel(entry.name, entry.options)
        if self.paper is None:
            return entry, PaperModel(entry)
        if entry not in self.paper.models:
            raise UnknownName(f"{self.where}: rows[{index}]", "model", entry, self.paper.models)
        return entry, self.paper.models[entry]

    def question(self, row: RowForm, index: int, target: str, method: Looked) -> Question:
        """What one cell of a table asks."""
        label, model = self.model(row.model, index)
        key, found = method
        removed = self.removed(target, f"{self.where}: rows[{index}].targets")
        is_dense = found.method == "dense"
        place = Decimal(0) if is_dense else removed
        filters = self.form.filters.with_own(Filters(prunable=found.prunable or None))
        cell = self.table.find(label, key, place) if self.table else None
        return Question(
            model=label,
            name=model.name,
            model_options=ordered(model.options),
            column=found.label,
            method=found.method,
            options=ordered(model.methods.get(key, found.options)),
            target=target,
            sparsity=0.0 if is_dense else None if removed is None else float(removed),
            filters=filters.with_own(row.filters),
            published=cell,
            trained=found.trains(model) if isinstance(row.model, str) and self.paper else None,
        )

    def removed(self, target: str, where: str) -> Decimal | None:
        """The fraction of zeros that a target means."""
        if not target:
            return None
        share = papers.decimal(target, where) / 100
        if not 0 <= share <= 1:
            raise SuiteError(f"{where}: {target!r} lies outside 0% to 100%.")
        return 1 - share if self.form.target == "density" else share


def percent(target: str, where: str) -> Decimal | None:
    """A target as a number, whatever its digits; None where there is none."""
    return papers.decimal(target, where) if target else None


def ordered(options: Mapping[str, Scalar]) -> Options:
    """Options in the order of a cell's."""
    return tuple(sorted(options.items()))
