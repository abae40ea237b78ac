"""Which cells of a table are best, and how sure their means are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import stdev

from reports.cells import Asked, Cell, Plan
from reports.fields import FIELDS, Field
from reports.specs import TableSpec
from reports.statistics import Pooled, interval, pooled_sd, tie_groups

UNEVEN, CHANCE = 5, 0.01
"""How many times the others' deviation is much, and how often chance may give as much."""


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
    result = [list(line) for line in cells]
    if statistics:
        result = [
            [
                with_interval(cell, asked.field, pooled)
                for asked, cell in zip(line, shown, strict=True)
            ]
            for (_, line), shown in zip(plan, cells, strict=True)
        ]
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


def with_interval(cell: Cell, field: Field, pooled: Pooled | None) -> Cell:
    """The cell with the interval of its mean; figures that are counted have none.

    No accuracy lies outside 0 to 100, but what Student's t and a pooled deviation give can.
    """
    if cell.counted or not cell.samples:
        return cell
    found = interval(list(cell.samples.values()), pooled if field.pooled else None)
    if found is not None and field.percent:
        found = dataclasses.replace(found, low=max(0.0, found.low), high=min(100.0, found.high))
    return dataclasses.replace(cell, interval=found)


def widest(plan: Plan, cells: Sequence[Sequence[Cell]]) -> tuple[list[Asked], float]:
    """The cells that spread most, at most half of all, and how many times as much as the others.

    None are where it is not much, or no more than chance makes of as many cells (F tests).
    """
    from scipy.special import fdtrc  # type: ignore[import-untyped]

    found = {
        id(asked.row): (asked, list(cell.samples.values()))
        for (_, line), shown in zip(plan, cells, strict=True)
        for asked, cell in zip(line, shown, strict=True)
        if asked.field.pooled and cell.deviation is not None and math.isfinite(cell.deviation)
    }
    ordered = sorted(found.values(), key=lambda pair: -stdev(pair[1]))
    best: tuple[list[Asked], float] = [], UNEVEN
    for count in range(1, len(ordered) // 2 + 1):
        top, rest = (pooled_sd(v for _, v in part) for part in (ordered[:count], ordered[count:]))
        if top is None or rest is None or not top.sd:
            continue
        ratio = top.sd / rest.sd if rest.sd else math.inf
        chance = fdtrc(top.freedom, rest.freedom, ratio**2) * math.comb(len(ordered), count)
        if ratio > best[1] and chance < CHANCE:
            best = [asked for asked, _ in ordered[:count]], ratio
    return best
