"""Every cell as the page embeds it: what its record says, a thinned curve, its layers, its command.

A cell is unpacked when somebody opens it, so a page of 10,000 cells starts as fast as one of ten.
"""

from __future__ import annotations

import base64
import functools
import itertools
import math
import shlex
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from bench import suite
from bench.record import CurvePoint, Record
from reports.record_page import facts

Point = TypeVar("Point", bound=msgspec.Struct)

POINTS = 50
"""Of a curve; more are not seen in a plot of this size."""

BATCH = 16
"""Cells packed together: neighbours share their layers and environments, which then cost little."""


WITHOUT_FILES = ("digits", "synthetic")
"""Data sets that `run` makes itself; others lie in the folder of `--data`, or name their own."""


@dataclass(slots=True)
class Packed:
    """The cells of a suite, and what its tables need of them.

    Attributes:
        keys: of the cells, in the order in which they are packed.
        batches: base64 of deflated JSON, a list of `BATCH` cells each (the last has fewer).
        records: without their curves, see `light`.
    """

    keys: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def packed(records: Iterable[Record]) -> Packed:
    """Packs cells as they come, so that memory never holds all that is in all of them."""
    found = Packed()
    iterator = iter(records)
    while batch := list(itertools.islice(iterator, BATCH)):
        found.batches.append(pack([cell(record) for record in batch]))
        found.keys += [record.spec.key for record in batch]
        found.records += map(light, batch)
    return found


def pack(things: list[dict[str, Any]]) -> str:
    """Text that `unpacked` in page.js reads; no character of it means anything to HTML."""
    return base64.b64encode(zlib.compress(msgspec.json.encode(things))).decode("ascii")


def light(record: Record) -> Record:
    """The record with what tables and charts read, its mask updates thinned."""
    return replace(record, curve=(), mask_updates=thinned(record.mask_updates), traceback="")


def cell(record: Record) -> dict[str, Any]:
    """What the page shows of a cell; its names are those that `page.js` reads."""
    return {
        "key": record.spec.key,
        "label": record.label,
        "command": command(record),
        "facts": facts(record),
        "rounds": rounds(record),
        "curve": columns(record.curve, CurvePoint.__struct_fields__),
        "updates": columns(record.mask_updates, ("step", "flipped", "iou")),
        "layers": [
            [line.name, "x".join(map(str, line.shape)), line.weights, line.nonzero]
            for line in record.layers
        ],
    }


def rounds(record: Record) -> list[list[str]]:
    """Phases that are results of their own: each answers for a row of another sparsity."""
    return [
        [
            phase.name,
            f"{100 * phase.counts.reached_sparsity:.2f}" if phase.counts else "",
            f"{phase.counts.prunable_nonzero:,}" if phase.counts else "",
            "" if phase.top1 is None else f"{phase.top1:.2f}",
            " ".join([phase.status, phase.reason]).strip(),
        ]
        for phase in record.phases
        if phase.status
    ]


def command(record: Record) -> str:
    """The command that trains the cell again, beside the record and not over it.

    `DIR` stands in it for the folder of the data set's files, where it has any.
    """
    built_in = record.suite in built_in_suites()
    name = record.suite if built_in else f"{record.suite}.toml"
    words = ["sparsebench", "run", name, "--only", record.spec.slug, "--records", "reproduced"]
    dataset = record.spec.dataset
    if dataset not in WITHOUT_FILES and not dataset.startswith("imagefolder:"):
        words += ["--data", "DIR"]
    return shlex.join(words)


@functools.cache
def built_in_suites() -> frozenset[str]:
    """Names that need no file."""
    return frozenset(suite.names())


def columns(
    points: Sequence[msgspec.Struct], names: Sequence[str]
) -> dict[str, list[float | None]]:
    """A curve, thinned and rounded, a list for each field that is known."""
    kept = thinned(points)
    lists = {name: [rounded(getattr(point, name)) for point in kept] for name in names}
    return {name: values for name, values in lists.items() if any(v is not None for v in values)}


def thinned(points: Sequence[Point]) -> tuple[Point, ...]:
    """At most `POINTS` of them, evenly chosen, the last one always."""
    step = -(-len(points) // POINTS) or 1
    return tuple(points[(len(points) - 1) % step :: step])


def rounded(value: float | None) -> float | None:
    """A step as it is; a fraction to four significant digits, and what is not finite as unknown."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None
