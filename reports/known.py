"""Whether what a table's spec names is there at all: what nothing has is a slip and no gap."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.errors import UnknownName
from bench.spec import CellSpec
from reports.folders import stores
from reports.grid_notes import some
from reports.matching import CONDITIONS, Found, own_options, questions
from reports.specs import Question, TableSpec


@dataclass(frozen=True, slots=True)
class Known:
    """Names of the harness and of installed packages; the command line has them from their tables.

    Attributes:
        prefixes: of names that are given out elsewhere, such as `timm:`.
    """

    methods: Collection[str]
    models: Collection[str]
    datasets: Collection[str]
    prefixes: tuple[str, ...] = ()


KINDS: dict[str, tuple[str, Callable[[Question], str], Callable[[CellSpec], str]]] = {
    "methods": ("method", lambda question: question.method, lambda spec: spec.method),
    "models": ("model", lambda question: question.name, lambda spec: spec.model),
}
"""Field of `Known` -> what to call such a name, and where a question and a cell have it."""


def check(spec: TableSpec, known: Known, root: Path) -> None:
    """Checks the names of a spec that are ours.

    Args:
        spec: the table.
        known: names that are allowed, beside those that records have.
        root: folder of all suites' records, read only where a name is not known.

    Raises:
        UnknownName: neither has one; says where and what is allowed.
    """
    for field, (kind, of, in_cell) in KINDS.items():
        listed = "columns" if field == "methods" and spec.layout == "methods" else field
        place = f"{spec.where}: {'rows' if field == 'models' else listed}"
        for name in dict.fromkeys(filter(None, map(of, questions(spec)))):
            _check(place, kind, name, getattr(known, field), known.prefixes, in_cell, root)
    place, names = f"{spec.where}: dataset", known.datasets
    _check(place, "data set", spec.dataset, names, known.prefixes, lambda cell: cell.dataset, root)


def _check(
    place: str,
    kind: str,
    name: str,
    names: Collection[str],
    prefixes: tuple[str, ...],
    in_cell: Callable[[CellSpec], str],
    root: Path,
) -> None:
    if name in names or name.startswith(prefixes):
        return
    cells = (cell for store in stores(root).values() for cell in store.manifest().cells)
    if name not in (run := {in_cell(cell.spec) for cell in cells}):
        raise UnknownName(place, kind, name, {*names, *run})


def doubts(spec: TableSpec, found: tuple[Found, ...]) -> Iterator[str]:
    """What a spec asks for that no record of its networks and methods has, and what they have.

    It may not have been run yet; it may be a slip.
    """
    asked = list(questions(spec))
    for name in (*CONDITIONS, "suite"):
        has = {value for one in found for value in _values(one, name)} - {None}
        there = some(sorted(map(str, has)))
        for value in dict.fromkeys(getattr(q.filters, name) for q in asked):
            if found and value is not None and value not in has:
                yield f"no record passes the filter {name} = {value}; there are: {there or 'none'}."
    options: dict[str, set[str]] = {}
    for row in (row for one in found for row in one.rows):
        options.setdefault(row.spec.method, set()).update(key for key, _ in own_options(row.spec))
    for method, option in dict.fromkeys((q.method, key) for q in asked for key, _ in q.options):
        if method in options and option not in options[method]:
            there = some(sorted(options[method])) or "none"
            yield f"no record of {method} has an option {option}; options there: {there}."


def _values(found: Found, name: str) -> set[object]:
    if name == "suite":
        return {found.suite}
    return {CONDITIONS[name](row.spec) for row in found.rows}
