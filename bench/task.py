"""What a process is given to run a cell, and what it says meanwhile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from bench.distributed import Group
from bench.initial import RANDOM
from bench.recipes import Recipe
from bench.record import Record, Timing
from bench.sources import SourceFiles
from bench.store import Cell


@dataclass(frozen=True, slots=True)
class Ways:
    """How steps may be computed; none changes what is computed, but for rounding.

    Attributes:
        stack: cells that are computed as one batched network; 1: each alone.
        graph: replays steps as a CUDA graph, on a GPU.
        compiled: `torch.compile` makes the forward and backward passes.
        strict: a GPU computes by algorithms that give the same bits each time.
    """

    stack: int = 1
    graph: bool = True
    compiled: bool = False
    strict: bool = False


ALONE = Ways()


@dataclass(frozen=True, slots=True)
class Task:
    """A cell with all that a process needs to run it.

    Attributes:
        data: folder of the data sets.
        checkpoint: file of the unfinished run; `weights`, of the finished network; `masks`, folder
            of those of measured phases.
        device: as torch names it.
        checkpoint_seconds: wall-clock between checkpoints.
        deadline: of `time.monotonic`, by which all is to be saved; infinity: never.
        timeout_seconds: of training and tests, in all tries together, as the record's times count
            them; then the cell is saved and gives up.
        source: files of the cell's source, if it names one.
        init: where the first weights come from, see `bench.initial`.
        start: folder from which a relative path of the data set starts.
        decoders: processes that decode images.
        ways: how its steps are computed, where the cell allows it.
        timing: whether other cells of the run use the device meanwhile.
        group: processes that train it together, see `bench.distributed`.
    """

    cell: Cell
    suite: str
    recipe: Recipe
    data: Path
    checkpoint: Path
    weights: Path
    masks: Path
    device: str
    checkpoint_seconds: float
    deadline: float
    source: SourceFiles | None = None
    init: str = RANDOM
    start: Path = Path()
    decoders: int = 1
    ways: Ways = ALONE
    timing: Timing = "exclusive"
    timeout_seconds: float = math.inf
    group: Group = Group()  # noqa: RUF009  frozen


@dataclass(frozen=True, slots=True)
class Progress:
    """Steps done of a cell that is training."""

    key: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something that people should know, while the cell goes on."""

    key: str
    text: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """The cell is saved, and goes on when it is run again.

    Attributes:
        late: the deadline came, so that no other cell should begin; else somebody asked to stop.
    """

    key: str
    done: int
    late: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The cell has its record."""

    key: str
    record: Record


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Another runner of the folder has finished the cell meanwhile."""

    key: str
    record: Record


Event = Progress | Note | Stopped | Finished | Elsewhere
