"""The short table of a suite: a line for each method, a column for each sparsity."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.store import Store
from reports.aggregate import Row, aggregate, asked_text, full_model
from reports.footnotes import CONDITIONS, footnotes, varies
from reports.markdown import section
from reports.suite_table import WORDS, accuracy, number

TOP_K = " by top-k"


def by_sparsity(root: Path, suite: str) -> str:
    """Accuracy over sparsity, with the footnotes of the full table.

    Args:
        root: folder of all suites' records.
        suite: whose records are shown.

    Raises:
        RecordError: there is no such suite, or a record is damaged; names the file.
    """
    source = Store(root, suite)
    manifest = source.manifest()
    results = aggregate(manifest, source.records(brief=True))
    told, lines = grouped(results.rows)
    asked = sorted({text for found in lines.values() for text in found}, key=place)
    models = dict.fromkeys(line[0] for line in lines)
    skipped = 0 if len(models) > 1 else 1
    table = []
    for line, found in lines.items():
        cells = [cell(found[text]) if text in found else "" for text in asked]
        table.append([*line[skipped:], *cells, multiples(found)])
    headers = [*("model", "method")[skipped:], *told, *asked, "budget multiple"]
    about = "" if len(models) > 1 else f", {next(iter(models), '')}"
    title = f"{manifest.title or suite} ({suite}{about}): top-1 % by sparsity %"
    notes = footnotes(results, source.attempts(), accuracy_only=True)
    below = (*notes, *reached_notes(results.rows))
    return section(title, headers, table, WORDS, below)


def grouped(rows: Sequence[Row]) -> tuple[list[str], dict[tuple[str, ...], dict[str, Row]]]:
    """The lines of a short table.

    Returns:
        Names of the conditions in which rows differ; and each line's rows by their sparsity, under
        its model, its name and its texts of those conditions.
    """
    told = [name for name, text in CONDITIONS.items() if varies(rows, text)]
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        texts = (CONDITIONS[name](row.spec) for name in told)
        line = (full_model(row, rows), line_name(row), *texts)
        lines.setdefault(line, {})[sparsity_text(row)] = row
    return told, lines


def line_name(row: Row) -> str:
    """The row's label; a grid over targets is one line."""
    if not asked_text(row.spec).endswith(TOP_K):
        return row.label
    bare = re.sub(r"target=[^,\]]*,?", "", row.label).replace("[]", "").replace(",]", "]")
    return bare + TOP_K


def sparsity_text(row: Row) -> str:
    """The row's column."""
    return asked_text(row.spec).removesuffix(TOP_K)


def place(text: str) -> tuple[bool, float]:
    """Columns ascend; what no sparsity was asked for stands last."""
    return (True, 0.0) if text == "penalty" else (False, float(text))


def cell(row: Row) -> str:
    """Accuracy, and whether a layer was emptied; for a penalty, the sparsity that it reached."""
    return accuracy(row) + (" dead" if row.dead else "") + reached(row)


def reached(row: Row) -> str:
    """The sparsity that a penalty reached; nothing where one was asked for, or none is known."""
    if asked_text(row.spec) != "penalty" or row.reached_sparsity is None:
        return ""
    return f" (at {100 * row.reached_sparsity:.1f})"


def reached_notes(rows: Iterable[Row]) -> Iterator[str]:
    """What stands behind the accuracy of a penalty."""
    if any(reached(row) for row in rows):
        yield "(at ...): the sparsity that it reached, in %."


def multiples(found: dict[str, Row]) -> str:
    """What the line costs, from its cheapest cell to its dearest."""
    texts = [number(row.multiple, ".2f") for row in found.values() if row.multiple is not None]
    ordered = sorted(dict.fromkeys(texts), key=float)
    return " to ".join(dict.fromkeys([ordered[0], ordered[-1]])) if ordered else "-"
