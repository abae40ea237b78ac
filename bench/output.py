"""How commands print, for people and for programs."""

from __future__ import annotations

from typing import Any


def print_json(value: object) -> None:
    """Prints a value object for programs."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=1).decode())


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints rows below the names of their columns."""
    from tabulate import tabulate

    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
