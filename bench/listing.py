"""What `sparsebench list` shows: methods, models, data sets, recipes, suites. No torch."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.recipes import Recipe
    from methods import MethodInfo


class Table(enum.StrEnum):
    """What `list` can show."""

    methods = enum.auto()
    models = enum.auto()
    datasets = enum.auto()
    recipes = enum.auto()
    suites = enum.auto()


def listing(what: Table) -> list[dict[str, Any]]:
    """Rows of a table of names."""
    if what is Table.methods:
        from methods import STAND_INS, names

        stand_ins = [_row(name, info) for name, info in STAND_INS.items()]
        return [*map(_method, names()), *stand_ins]
    if what is Table.models:
        from models import TIMM_PREFIX
        from models import names as model_names

        rows = [{"name": name, "summary": _model_summary(name)} for name in model_names()]
        return [*rows, {"name": f"{TIMM_PREFIX}NAME", "summary": "any model of timm"}]
    if what is Table.datasets:
        return _datasets()
    if what is Table.recipes:
        from bench import recipes

        loaded = {name: recipes.load(name, "") for name in recipes.names()}
        return [
            {"name": n, "length": _length(r), "batch": r.batch, "lr": r.lr, "title": r.title}
            for n, r in loaded.items()
        ]
    from bench import suite

    return [{"name": name, "title": suite.title(name)} for name in suite.names()]


def _datasets() -> list[dict[str, Any]]:
    """The table's data sets, folders, and those of installed packages; these say more when read."""
    from bench.datasets import DATASETS, names, summary
    from bench.errors import DataError
    from bench.folders import KINDS

    def row(name: str, text: str, shape: str = "?", classes: int | str = "?") -> dict[str, Any]:
        return {"name": name, "shape": shape, "classes": classes, "summary": text}

    rows = [
        row(name, info.summary, "x".join(map(str, info.shape)), info.classes)
        for name, info in DATASETS.items()
    ]
    rows += [row(name, text) for name, text in KINDS.items()]
    for name in names()[len(DATASETS) :]:
        try:
            rows.append(row(name, summary(name) or "?"))
        except DataError as error:  # of a package that cannot be loaded
            rows.append(row(name, str(error)))
    return rows


def conflicts(what: Table) -> list[str]:
    """In words, what installed packages offer under a name that a table has, so it is not used."""
    # Only the table that is asked for is imported: data sets bring numpy.
    if what is Table.methods:
        from methods import conflicts as found
    elif what is Table.models:
        from models import conflicts as found
    elif what is Table.datasets:
        from bench.datasets import conflicts as found
    else:
        return []
    return found()


def _model_summary(name: str) -> str:
    """What a model is, or why that of another package cannot be loaded."""
    from models import find_info

    try:
        info = find_info(name)
    except ValueError as error:
        return str(error)
    assert info is not None
    return info.summary or "?"


def _length(recipe: Recipe) -> str:
    """Of the run that a recipe is from; `-` where it does not say."""
    length = recipe.length
    if length is None:
        return "-"
    return f"{length.epochs:g} epochs" if length.steps is None else f"{length.steps:,} steps"


def _method(name: str) -> dict[str, Any]:
    """One row; a method of another package that cannot be loaded says so."""
    from methods import find_info

    try:
        info = find_info(name)
    except ValueError as error:
        return {"name": name, "paper": "", "controls": "?", "summary": str(error)}
    assert info is not None
    return _row(name, info)


def _row(name: str, info: MethodInfo) -> dict[str, Any]:
    row = {"paper": info.paper, "controls": info.controls, "summary": info.summary or "?"}
    return {"name": name, **row}
