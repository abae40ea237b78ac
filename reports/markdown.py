"""The one layout of all reports: a title, a table, footnotes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from tabulate import tabulate


def section(
    title: str,
    headers: Sequence[str],
    lines: Sequence[Sequence[str]],
    words: Collection[str],
    notes: Iterable[str],
) -> str:
    """A markdown section.

    Args:
        title: text of the heading.
        headers: names of the columns.
        lines: finished texts, one list per row.
        words: columns that stand to the left; the others hold numbers and stand to the right.
        notes: one footnote each.
    """
    table = tabulate(
        lines,
        headers=headers,
        tablefmt="pipe",
        disable_numparse=True,  # every figure is rounded already, and `98.00` must stay so
        # of no rows, tabulate 0.9 makes no columns to align
        colalign=["left" if name in words else "right" for name in headers] if lines else None,
    )
    below = "".join(f"- {note}\n" for note in notes)
    return f"## {title}\n\n{table}\n\n{below}"
