"""Which cells of a table are best, and how sure their means are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from reports.cells import Cell, Plan
from reports.fields import FIELDS
from reports.specs import TableSpec
from reports.statistics import Pooled, interval, tie_groups


def noisy(plan: Plan, cells: Sequence[Sequence[Cell]]) -> list[list[float]]:
    """The values of each row that the noise is taken from, accuracies or errors; each once."""
    found = {}
    for (_, line), shown in zip(plan, cells, strict=True):
        for asked, cell in zip(line, shown, strict=True):
            if asked.field in (FIELDS["accuracy"], FIELDS["error"]):
                found[id(asked.row)] = list(cell.samples.values())
    return list(found.values())


def ranked(
    spec: TableSpec,
    plan: Plan,
    cells: Sequence[Sequence[Cell]],
    statistics: bool,
    pooled: Pooled | None,
) -> list[list[Cell]]:
    """Cells with their ranks, within a line of methods, else within the lines of one target.

    Statistics also give them the intervals of their means.
    """
    result = [[with_interval(c, pooled) if statistics else c for c in line] for line in cells]
    for places, better in families(spec, plan):
        found = {place: result[place[0]][place[1]] for place in places}
        compared = {place: cell for place, cell in found.items() if cell.is_comparable}
        if len(compared) < 2:
            continue
        sign = 1 if better == "higher" else -1
        for place, rank in ranks(compared, sign, statistics, pooled).items():
            line, column = place
            best = rank == 1
            result[line][column] = dataclasses.replace(found[place], rank=rank, best=best)
    return result


Place = tuple[int, int]
"""Line and column."""


def families(spec: TableSpec, plan: Plan) -> Iterator[tuple[list[Place], str]]:
    """The cells that are compared with each other, and which is best; never the dense ones."""
    if spec.layout == "rounds":
        return
    groups: dict[tuple[object, ...], list[Place]] = {}
    for number, (words, line) in enumerate(plan):
        for column, asked in enumerate(line):
            if asked.question.method in ("dense", "small_dense") or not asked.field.better:
                continue
            key = (number,) if spec.layout == "methods" else (*words[:-1], column)
            groups.setdefault((*key, asked.field.better), []).append((number, column))
    for group, places in groups.items():
        yield places, str(group[-1])


def sizes(
    spec: TableSpec, plan: Plan, cells: Sequence[Sequence[Cell]]
) -> Iterator[tuple[int, int]]:
    """Of each family of two or more, the seeds of its smallest cell and the number of pairs."""
    for places, _ in families(spec, plan):
        found = [cells[line][column] for line, column in places]
        ns = [len(cell.samples) for cell in found if cell.is_comparable]
        if len(ns) > 1:
            yield min(ns), math.comb(len(ns), 2)


def ranks(
    cells: Mapping[Place, Cell], sign: int, statistics: bool, pooled: Pooled | None
) -> dict[Place, int]:
    """Ranks; without statistics only what is written alike shares one."""
    if statistics:
        samples = {
            f"{line} {column}": {seed: sign * value for seed, value in cell.samples.items()}
            for (line, column), cell in cells.items()
        }
        found = tie_groups(samples, pooled)
        return {(line, column): found[f"{line} {column}"] for line, column in cells}
    written = {p: sign * float(format(c.mean, c.form.replace(",", ""))) for p, c in cells.items()}
    return {
        place: 1 + sum(other > value for other in written.values())
        for place, value in written.items()
    }


def with_interval(cell: Cell, pooled: Pooled | None) -> Cell:
    """The cell with the interval of its mean; figures that are counted have none."""
    if cell.counted or not cell.samples:
        return cell
    return dataclasses.replace(cell, interval=interval(list(cell.samples.values()), pooled))
