"""Everything that can go wrong, and what the command line returns for it.

BenchError                  one line: where, what was found, what is allowed, what to do
├── UsageError              refused before training; nothing was written (exit status 2)
│   ├── SuiteError          a suite, a recipe, an option or a command-line value is wrong
│   │   ├── UnknownName     no such method, model, data set, recipe, suite or option
│   │   └── BudgetExceeded  a plan costs more than the suite allows
│   ├── DataError           a data file is missing, damaged or does not fit the model
│   ├── RecordError         a record in the store is damaged, edited or of another schema
│   └── CannotCompact       a network cannot be made smaller without changing its outputs
├── CheckpointError         a checkpoint is damaged or belongs to another cell
├── RankLost                a process that trained a cell together with this one is gone
└── CellError               one cell went wrong: it becomes a record, the suite goes on
    ├── Diverged            a loss that is not finite
    ├── ContractBroken      a method left something else than the plain network
    ├── RanksDiffer         processes that train a cell together have come to different masks
    ├── SourceMissing       the cell whose masks this one needs has left none
    ├── NotStored           what it leaves cannot be written: no room, or read-only
    └── TimedOut            it has taken all the time that one cell may
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable
from typing import Literal


class BenchError(Exception):
    """Base of all errors whose text is meant for the user."""

    exit_code = 1


class UsageError(BenchError):
    """What was asked cannot be done; nothing was trained or written."""

    exit_code = 2


class SuiteError(UsageError):
    """A suite, recipe, option or command-line value is wrong."""


class UnknownName(SuiteError):
    """A name that no table holds.

    Args:
        where: the place in the input, such as `suite.toml: methods.rgil`.
        kind: what the name should be, such as `method`.
        name: what was found.
        known: the names that are allowed.
    """

    def __init__(self, where: str, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        place = f"{where}: " if where else ""
        listed = ", ".join(names) or "none"
        super().__init__(f"{place}no such {kind}: {name!r}.{hint} Known: {listed}.")


def with_choices(error: Exception, kind: type) -> str:
    """What msgspec found wrong in a dataclass, with the values that a closed choice allows."""
    field = re.search(r"\$\.(\w+)`", str(error))
    hint = typing.get_type_hints(kind).get(field[1]) if field else None
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    return f"{error}. Allowed: {', '.join(map(repr, choices))}" if choices else str(error)


class BudgetExceeded(SuiteError):
    """A method plans more optimizer steps than the suite's budget multiple allows."""


class DataError(UsageError):
    """A data set is missing, damaged, or does not fit what is asked of it."""


class RecordError(UsageError):
    """A record in the store cannot be trusted as it lies there."""


class CannotCompact(UsageError):
    """A network cannot be made physically smaller without changing what it computes."""


class CheckpointError(BenchError):
    """A checkpoint cannot be read, or is another cell's."""


class RankLost(BenchError):
    """A process that trains a cell together with this one died, hangs, or failed by itself."""


class CellError(BenchError):
    """One cell went wrong; its record carries the reason."""


class Diverged(CellError):
    """Training left the finite numbers."""


class ContractBroken(CellError):
    """A method left something else than the plain network."""


class RanksDiffer(CellError):
    """What must be the same in all processes that train a cell together is not."""


class SourceMissing(CellError):
    """The cell that this one names as its source has no usable result here."""


class NotStored(CellError):
    """What a cell leaves cannot be written; its last checkpoint is as it was."""


class TimedOut(CellError):
    """A cell has taken all the time that one may; it is saved."""
