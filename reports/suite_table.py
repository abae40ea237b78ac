"""Markdown tables of a suite's records, with the conditions they were measured under."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from bench import store
from bench.errors import RecordError
from bench.record import Record
from bench.spec import CellSpec
from bench.store import Manifest, Store
from reports.aggregate import CellStatus, Row, aggregate, asked_text, model_text, options_text
from reports.footnotes import CONDITIONS, footnotes, varies
from reports.markdown import section

Columns = dict[str, Callable[[Row], str]]

OPTIONAL: dict[str, Callable[[Row], object]] = {
    "effective sparsity %": lambda row: row.effective_sparsity is not None,
    "parameters once cut": lambda row: row.of_filters and row.compact_parameters,
    "MACs once cut": lambda row: row.of_filters and row.compact_macs,
    "training MACs": lambda row: row.train_macs is not None,
}
"""Columns that are there only if some row needs them."""

WORDS = {"model", "method", "options", *CONDITIONS}


def suite_table(
    manifest: Manifest, records: Iterable[Record], attempts: Sequence[Record] = ()
) -> str:
    """One suite as a markdown table with its title above and its footnotes below.

    Args:
        manifest: the cells that the suite asks for.
        records: its final records; those of other cells are counted, not shown.
        attempts: failed tries that lie beside the records, the last of a cell behind the others.
    """
    results = aggregate(manifest, records)
    models = {model_text(row.spec) for row in results.rows}
    about = ", ".join([manifest.suite, *(models if len(models) == 1 else ())])
    title = f"{manifest.title or manifest.suite} ({about})"
    shown = columns(results.rows)
    lines = [[text(row) for text in shown.values()] for row in results.rows]
    return section(title, list(shown), lines, WORDS, footnotes(results, attempts))


def report(root: Path, suites: Sequence[str] | None = None) -> str:
    """The tables of the named suites, or of all that have records under `root`.

    Raises:
        RecordError: there is no such suite, or a record is damaged; names the file.
    """
    names = store.suites(root) if suites is None else suites
    if not names:
        raise RecordError(f"{root}: no records. Run a suite first: sparsebench run SUITE")
    return "\n".join(stored_table(Store(root, name)) for name in names)


def stored_table(source: Store) -> str:
    """The table of one suite as it lies in its folder."""
    return suite_table(source.manifest(), source.records(brief=True), source.attempts())


def columns(rows: Sequence[Row]) -> Columns:
    """Header and text of each column; what all rows share has none."""
    shown: Columns = {"method": lambda row: row.label}
    if varies(rows, model_text):
        shown = {"model": of_spec(model_text)} | shown
    labels = {row.label for row in rows}
    if any(varies((row for row in rows if row.label == label), options) for label in labels):
        shown["options"] = of_spec(options)
    shown |= {name: of_spec(text) for name, text in CONDITIONS.items() if varies(rows, text)}
    shown |= {
        "sparsity asked %": of_spec(asked_text),
        "n": seeds,
        "top-1 %": accuracy,
        "reached sparsity %": lambda row: percent(row, row.reached_sparsity),
        "effective sparsity %": lambda row: percent(row, row.effective_sparsity),
        "parameters left": parameters,
        "MACs left": macs,
        "parameters once cut": lambda row: number(row.compact_parameters, ",.0f"),
        "MACs once cut": lambda row: number(row.compact_macs, ",.0f"),
        "training MACs": lambda row: number(row.train_macs, ".3g"),
        "train seconds": lambda row: number(row.train_seconds, ",.1f"),
        "budget multiple": lambda row: number(row.multiple, ".2f"),
    }
    hidden = {header for header, known in OPTIONAL.items() if not any(map(known, rows))}
    return {header: text for header, text in shown.items() if header not in hidden}


def of_spec(text: Callable[[CellSpec], str]) -> Callable[[Row], str]:
    """A column that depends on the question alone."""
    return lambda row: text(row.spec)


def options(spec: CellSpec) -> str:
    """Options of the method that differ from its defaults."""
    return options_text(spec.options)


def seeds(row: Row) -> str:
    """Seeds that finished, over those asked for where some are missing."""
    done = len(row.finished)
    return str(done) if done == row.asked else f"{done}/{row.asked}"


def accuracy(row: Row) -> str:
    """Mean and standard deviation over `ok` seeds, then a mark for each kind that is not."""
    parts = []
    if row.top1 is not None:
        spread = "" if row.deviation is None else f" ± {row.deviation:.2f}"
        parts.append(f"{row.top1:.2f}{spread}")
    return ", ".join([*parts, *marks(row.statuses)]) or "-"


def marks(statuses: Sequence[CellStatus]) -> Iterator[str]:
    """A mark for each kind of seed that has no accuracy though it ended, such as `* 1 of 3`."""
    for status, mark in (("diverged", "*"), ("invalid", "invalid")):
        if count := statuses.count(status):
            yield f"{mark} {count} of {len(statuses)}"


def percent(row: Row, sparsity: float | None) -> str:
    """With two significant digits of the density; `dead` where a layer was emptied."""
    if sparsity is None:
        return "-"
    density = 100 * (1 - sparsity)
    digits = 1 - math.floor(math.log10(density)) if density > 0 else 2
    return f"{100 - density:.{max(2, digits)}f}{' dead' if row.dead else ''}"


def parameters(row: Row) -> str:
    """Non-zero parameters and their share of all."""
    if row.nonzero is None or row.total_sparsity is None:
        return "-"
    return f"{row.nonzero:,.0f} ({100 * (1 - row.total_sparsity):.2f} %)"


def macs(row: Row) -> str:
    """Multiply-adds left and their share of the dense ones."""
    if row.macs is None or row.macs_fraction is None:
        return "-"
    left = f"{row.macs / 1e6:,.2f} M" if row.macs >= 1e5 else f"{row.macs:,.0f}"
    return f"{left} ({100 * row.macs_fraction:.2f} %)"


def number(value: float | None, form: str) -> str:
    """A number, or the mark for one that was not measured."""
    return "-" if value is None else format(value, form)
