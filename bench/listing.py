"""What `sparsebench list` shows: methods, models, data sets, recipes, suites. No torch."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        from models import MODELS, TIMM_PREFIX

        rows = [{"name": name, "summary": model.summary} for name, model in MODELS.items()]
        return [*rows, {"name": f"{TIMM_PREFIX}NAME", "summary": "any model of timm"}]
    if what is Table.datasets:
        from bench.datasets import DATASETS

        return [
            {
                "name": n,
                "shape": "x".join(map(str, d.shape)),
                "classes": d.classes,
                "summary": d.summary,
            }
            for n, d in DATASETS.items()
        ]
    if what is Table.recipes:
        from bench import recipes

        loaded = {name: recipes.load(name, "") for name in recipes.names()}
        return [
            {"name": n, "batch": r.batch, "lr": r.lr, "title": r.title} for n, r in loaded.items()
        ]
    from bench import suite

    return [{"name": name, "title": suite.title(name)} for name in suite.names()]


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
