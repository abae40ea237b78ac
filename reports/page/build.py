"""From records to the page: one HTML file with its data, styles, scripts and libraries in it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench.store import Store
from reports import reproduction
from reports.aggregate import aggregate, model_text
from reports.chart import Chart
from reports.folders import stores
from reports.footnotes import footnotes
from reports.grid import filled
from reports.page import libraries
from reports.page.cells import BATCH, pack, packed, rounded
from reports.page.tables import Table, table
from reports.render import render as as_text
from reports.reproduction import Score
from reports.series import KINDS

FOLDER = Path(__file__).parent
TITLE = "Sparsity methods compared"


@dataclass(frozen=True, slots=True)
class Section:
    """One suite on the page.

    Attributes:
        name: of the suite, for links.
        title: its heading.
        table: its rows.
        notes: what stands below the table.
        charts: its plots, by the name of their kind.
        keys: of its cells; seeds likewise, in the same order.
        batches: its cells, see `reports.page.cells`.
    """

    name: str
    title: str
    table: Table
    notes: tuple[str, ...]
    charts: dict[str, tuple[Chart, ...]]
    keys: tuple[str, ...]
    seeds: tuple[int, ...]
    batches: tuple[str, ...]


def page(root: Path, title: str = TITLE) -> str:
    """The page of all records under a folder.

    Args:
        root: folder of the records of all suites, or of one.
        title: heading of the page.

    Raises:
        RecordError: there are none, or one is damaged; names the file.
    """
    sources = stores(root).values()
    score = reproduction.reproduction(root)
    return render(title, [section(store) for store in sources], paper_tables(sources), score)


def section(store: Store) -> Section:
    """What the page shows of a suite."""
    manifest = store.manifest()
    cells = packed(store.records())
    results = aggregate(manifest, cells.records)
    models = dict.fromkeys(model_text(row.spec) for row in results.rows)
    about = ", ".join([manifest.suite, *(models if len(models) == 1 else ())])
    return Section(
        name=store.suite,
        title=f"{manifest.title or manifest.suite} ({about})",
        table=table(results.rows, {key: place for place, key in enumerate(cells.keys)}),
        notes=tuple(footnotes(results, store.attempts())),
        charts={name: found for name, kind in KINDS.items() if (found := kind.make(results))},
        keys=tuple(cells.keys),
        seeds=tuple(record.spec.seed for record in cells.records),
        batches=tuple(cells.batches),
    )


def paper_tables(sources: Iterable[Store]) -> list[Markup]:
    """The papers' tables that these suites have records for, as HTML with its texts escaped."""
    return [Markup(as_text(grid, "html", published=True)) for grid in filled(sources)]


def render(title: str, sections: Sequence[Section], papers: Sequence[Markup], score: Score) -> str:
    """The page's text; a browser runs no script in it but ours."""
    tables, plots = libraries.tables(), libraries.plots()
    script = inline((FOLDER / "page.js").read_text(encoding="utf-8"), "script")
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        policy=Markup(policy(script)),
        style=inline((FOLDER / "page.css").read_text(encoding="utf-8"), "style"),
        script=script,
        table_style=inline(tables.style, "style"),
        table_script=embedded(tables.script),
        plot_script=embedded(plots.script),
        notices=[tables.notice, plots.notice],
        suites=[
            {
                "title": one.title,
                "notes": one.notes,
                "charts": one.charts,
                "plots": embedded(drawn(one.charts)),
                "cells": embedded(one.batches),
            }
            for one in sections
        ],
        papers=papers,
        reproduction=told(score),
        data=embedded({"batch": BATCH, "suites": [content(one) for one in sections]}),
    )


def told(score: Score) -> dict[str, Any]:
    """The reproduction score as the page shows it."""
    headers, lines = reproduction.table(score)
    ran = score.score is not None
    notes = list(reproduction.notes(score)) if ran else [f"{reproduction.waiting(score)}."]
    heading = reproduction.heading(score)
    return {"heading": heading, "headers": headers, "lines": lines, "notes": notes}


def content(one: Section) -> dict[str, Any]:
    """What the page's script reads of a suite."""
    return {
        "name": one.name,
        "columns": one.table.columns,
        "rows": one.table.rows,
        "keys": one.keys,
        "seeds": one.seeds,
    }


def drawn(charts: Mapping[str, Sequence[Chart]]) -> dict[str, str]:
    """The charts of each kind, packed."""
    return {name: pack([drawable(chart) for chart in found]) for name, found in charts.items()}


def drawable(chart: Chart) -> dict[str, Any]:
    """A chart as `page.js` draws it: without what stands in the page, its figures rounded."""
    fields = dataclasses.asdict(chart)
    for curve in fields["series"]:
        curve |= {name: [rounded(v) for v in curve[name]] for name in ("x", "y", "low", "high")}
    return {name: value for name, value in fields.items() if name not in ("title", "notes", "name")}


def embedded(value: object) -> Markup:
    """JSON that cannot end the element it stands in, whatever texts it holds."""
    text = msgspec.json.encode(value).decode()
    return Markup(text.replace("<", "\\u003c"))


def inline(text: str, element: str) -> Markup:
    """The text of a library or of our own as the content of an element.

    Raises:
        ValueError: it would end the element.
    """
    if f"</{element}" in text.lower() or "<!--" in text:
        raise ValueError(f"this text would end its own <{element}>")
    return Markup(text.replace("\r\n", "\n"))  # as a browser reads it, and the policy's hash does


def policy(script: str) -> str:
    """The page's rule: this script and what it makes itself, nothing from anywhere else.

    Should a text of a record ever become markup, the browser still does not run it.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return (
        f"default-src 'none'; script-src 'sha256-{digest}' blob:; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
