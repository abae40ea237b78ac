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


Noise = Mapping[str, Pooled | None]
"""Of each figure by `figure_of`, the deviation of one run; None where no cell has two seeds."""


def figure_of(field: Field) -> str:
    """What a figure is named by; top-1 accuracies and errors are one, and have one noise."""
    return FIELDS["accuracy"].header if field.pooled else field.header


def noises(plan: Plan, cells: Sequence[Sequence[Cell]]) -> Noise:
    """The noise of each figure that has one, from its own values; each row's once.

    Counts on which all seeds agree are exact and have none.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for (_, line), shown in zip(plan, cells, strict=True):
        for asked, cell in zip(line, shown, strict=True):
            if cell.samples and (asked.field.better or not asked.field.counted):
                values = found.setdefault(figure_of(asked.field), {})
                values[id(asked.shown)] = list(cell.samples.values())
    counted = {field.header for field in FIELDS.values() if field.counted}
    pooled = {name: pooled_sd(values.values()) for name, values in found.items()}
    return {
        name: one
        for name, one in pooled.items()
        if one is None or one.sd > 0 or name not in counted
    }


def ranked(
    spec: TableSpec,
    plan: Plan,
    cells: Sequence[Sequence[Cell]],
    noise: Noise | None,
) -> list[list[Cell]]:
    """Cells with their ranks, within a line of methods, else within the lines of one target.

    The noise also gives them the intervals of their means; None: no statistics are asked for.
    """
    result = [list(line) for line in cells]
    if noise is not None:
        result = [
            [
                with_interval(cell, asked.field, noise.get(figure_of(asked.field)))
                for asked, cell in zip(line, shown, strict=True)
            ]
            for (_, line), shown in zip(plan, cells, strict=True)
        ]
    for places, field in families(spec, plan):
        found = {place: result[place[0]][place[1]] for place in places}
        compared = {place: cell for place, cell in found.items() if cell.is_comparable}
        if len(compared) < 2:
            continue
        sign = 1 if field.better == "higher" else -1
        for place, rank in ranks(compared, sign, noise, figure_of(field)).items():
            line, column = place
            best = rank == 1
            result[line][column] = dataclasses.replace(found[place], rank=rank, best=best)
    return result


Place = tuple[int, int]
"""Line and column."""


def families(spec: TableSpec, plan: Plan) -> Iterator[tuple[list[Place], Field]]:
    """The cells that are compared with each other, and their figure; never the dense ones."""
    if spec.layout == "rounds":
        return
    groups: dict[tuple[object, ...], tuple[list[Place], Field]] = {}
    for number, (words, line) in enumerate(plan):
        for column, asked in enumerate(line):
            if asked.question.method in ("dense", "small_dense") or not asked.field.better:
                continue
            key = (number,) if spec.layout == "methods" else (*words[:-1], column)
            places, _ = groups.setdefault((*key, asked.field.header), ([], asked.field))
            places.append((number, column))
    yield from groups.values()


def sizes(
    spec: TableSpec, plan: Plan, cells: Sequence[Sequence[Cell]]
) -> Iterator[tuple[str, int, int]]:
    """Of each family of two or more, its figure, the seeds of its smallest cell, and the pairs."""
    for places, field in families(spec, plan):
        found = [cells[line][column] for line, column in places]
        ns = [len(cell.samples) for cell in found if cell.is_comparable]
        if len(ns) > 1:
            yield figure_of(field), min(ns), math.comb(len(ns), 2)


def ranks(
    cells: Mapping[Place, Cell], sign: int, noise: Noise | None, figure: str
) -> dict[Place, int]:
    """Ranks; without statistics, or of exact counts, only what is written alike shares one."""
    if noise is not None and figure in noise:
        samples = {
            f"{line} {column}": {seed: sign * value for seed, value in cell.samples.items()}
            for (line, column), cell in cells.items()
        }
        found = tie_groups(samples, noise[figure])
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
    found = interval(list(cell.samples.values()), pooled)
    if found is not None and field.percent:
        found = dataclasses.replace(found, low=max(0.0, found.low), high=min(100.0, found.high))
    return dataclasses.replace(cell, interval=found)


def widest(plan: Plan, cells: Sequence[Sequence[Cell]]) -> tuple[list[Asked], float]:
    """The cells that spread most, at most half of a figure's, and how often as much as the others.

    None are where it is not much, or no more than chance makes of as many cells (F tests).
    """
    from scipy.special import fdtrc  # type: ignore[import-untyped]

    found: dict[str, dict[int, tuple[Asked, list[float]]]] = {}
    for (_, line), shown in zip(plan, cells, strict=True):
        for asked, cell in zip(line, shown, strict=True):
            if cell.deviation is not None and math.isfinite(cell.deviation):
                of_figure = found.setdefault(figure_of(asked.field), {})
                of_figure[id(asked.shown)] = (asked, list(cell.samples.values()))
    best: tuple[list[Asked], float] = [], UNEVEN
    for of_figure in found.values():
        ordered = sorted(of_figure.values(), key=lambda pair: -stdev(pair[1]))
        for count in range(1, len(ordered) // 2 + 1):
            top, rest = (
                pooled_sd(v for _, v in part) for part in (ordered[:count], ordered[count:])
            )
            if top is None or rest is None or not top.sd:
                continue
            ratio = top.sd / rest.sd if rest.sd else math.inf
            chance = fdtrc(top.freedom, rest.freedom, ratio**2) * math.comb(len(ordered), count)
            if ratio > best[1] and chance < CHANCE:
                best = [asked for asked, _ in ordered[:count]], ratio
    return best
