"""What fuzzed files must never do: raise anything but our errors, or write outside a folder."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from bench import presence
from bench.errors import BenchError

CHANGES = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate"}
CACHES = ("/__pycache__", "/torchinductor_")
"""What Python and torch write for themselves, when a module is imported."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Tally:
    """What became of the inputs."""

    inputs: int = 0
    parsed: int = 0
    accepted: int = 0
    refused: list[str] = field(default_factory=list)

    def attempt(self, action: Callable[[], object]) -> None:
        """Does something with an input; one of our errors, in one plain line, is an answer too."""
        try:
            action()
        except BenchError as error:
            self.refused.append(str(error))
            fine = bool(str(error).strip()) and "Traceback" not in str(error)
        else:
            self.accepted += 1
            fine = True
        assert fine, self.refused[-1:]


def fuzz(inputs: SearchStrategy[Any], examples: int, check: Callable[[Any, Tally], None]) -> Tally:
    """Checks so many inputs; the same ones each time.

    Args:
        inputs: draws them.
        examples: how many.
        check: raises where something is wrong, and keeps the tally.

    Raises:
        Exception: the first that a check raised, with the number of its input.
    """
    tally = Tally()
    failed: list[Exception] = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def one(drawn: Any) -> None:
        if failed:
            return
        tally.inputs += 1
        try:
            check(drawn, tally)
        except Exception as error:
            error.add_note(f"input {tally.inputs}")
            failed.append(error)

    one()
    # Not raised in there: hypothesis would try to write out the input, and fail by its length.
    if failed:
        raise failed[0]
    return tally


class _Watch:
    """The folder in which files may change, while anybody asks; an audit hook stays for ever."""

    allowed: tuple[str, ...] | None = None
    outside: list[str]


def _look(event: str, arguments: tuple[Any, ...]) -> None:
    if _Watch.allowed is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = bool(flags & WRITING) if isinstance(flags, int) else "r" not in (mode or "r")
        paths = [path] if writes else []
    elif event in CHANGES:
        paths = list(arguments[:2] if event in ("os.rename", "os.link") else arguments[:1])
    else:
        return
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            place = str(Path(os.fsdecode(path)).resolve())
            own = any(part in place for part in CACHES)
            if not own and not place.startswith(_Watch.allowed):
                _Watch.outside.append(f"{event} {place}")


@contextmanager
def only_inside(folder: Path) -> Iterator[None]:
    """Fails where a file outside a folder was written, made, renamed or deleted.

    But for those by which runs see each other.
    """
    inside = (str(folder.resolve()) + os.sep, str(presence.folder().resolve()), "/dev/")
    _Watch.outside, _Watch.allowed = [], inside
    try:
        yield
    finally:
        _Watch.allowed = None
    assert not _Watch.outside, _Watch.outside


tempfile.gettempdir()  # tries by a file, the first time
sys.addaudithook(_look)
