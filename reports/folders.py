"""Which suites a folder of records holds."""

from __future__ import annotations

from pathlib import Path

from bench import store
from bench.errors import RecordError
from bench.store import Store

MANIFEST = "suite.json"


def is_records(folder: Path) -> bool:
    """Whether this is a root of records, or a suite's own folder in one."""
    return (folder / MANIFEST).is_file() or bool(store.suites(folder))


def stores(folder: Path) -> dict[str, Store]:
    """The suites under a root of records by name, or the one whose own folder this is.

    Raises:
        RecordError: there is none.
    """
    if folder.name in ("", ".."):  # `.` has a name only once it is resolved
        folder = folder.resolve()
    if (folder / MANIFEST).is_file():
        return {folder.name: Store(folder.parent, folder.name)}
    found = store.suites(folder)
    if not found:
        raise RecordError(
            f"{folder}: no records there; give a folder of records, or that of one suite in it."
        )
    return {name: Store(folder, name) for name in found}
