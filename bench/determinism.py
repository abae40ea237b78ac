"""Whether a GPU computes the same bits each time. A CPU does so anyway, with any options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils import deterministic

from bench.errors import UsageError
from bench.record import Determinism

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""What cuBLAS takes for equal bits; it reads the variable once, when it starts."""

FILLS = "fill_uninitialized_memory"


def wants_strict(asked: Determinism | None, device: str) -> bool:
    """Whether a run must ask torch for equal bits.

    Args:
        asked: by `--determinism`; None: strict on a CPU, fast on a GPU.
        device: as torch names it.

    Raises:
        UsageError: the level cannot be had; says what to type.
    """
    if torch.device(device).type == "cpu":
        if asked == "fast":
            raise UsageError(
                "--determinism fast is for GPUs: on the CPU each cell is computed to the same "
                "bits anyway. Leave it out."
            )
        return False
    found = os.environ.get(WORKSPACE)
    if asked == "strict" and found not in WORKSPACES:
        raise UsageError(
            f"--determinism strict: {WORKSPACE} is {found or 'not set'}; allowed: "
            f"{', '.join(WORKSPACES)}. Type it before the command: "
            f"{WORKSPACE}={WORKSPACES[0]} sparsebench run ..."
        )
    return asked == "strict"


def level(strict: bool, device: str) -> Determinism:
    """What a record says of a cell."""
    return "strict" if strict or torch.device(device).type == "cpu" else "fast"


@contextmanager
def equal_bits(wanted: bool) -> Iterator[None]:
    """Has torch use deterministic algorithms only, while any of a process's cells wants it.

    An operation that has none then raises, and says so. Afterwards everything is as before.
    """
    if not wanted:
        yield
        return
    _SWITCH.enter()
    try:
        yield
    finally:
        _SWITCH.leave()


@dataclass(frozen=True, slots=True)
class _Switches:
    """Torch's settings that decide it; all are of the process."""

    algorithms: bool
    only_warns: bool
    cudnn: bool
    tries: bool
    fills: bool

    @classmethod
    def now(cls) -> _Switches:
        return cls(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            bool(getattr(deterministic, FILLS)),
        )

    def set(self) -> None:
        torch.use_deterministic_algorithms(self.algorithms, warn_only=self.only_warns)
        torch.backends.cudnn.deterministic = self.cudnn
        torch.backends.cudnn.benchmark = self.tries
        setattr(deterministic, FILLS, self.fills)


STRICT = _Switches(algorithms=True, only_warns=False, cudnn=True, tries=False, fills=False)
"""Memory that nobody has written is not filled: nothing reads it, and each step would pay."""


@dataclass
class _Switch:
    """Cells of one process take turns: the first of them turns it on, the last one off."""

    cells: int = 0
    before: _Switches | None = None

    def enter(self) -> None:
        if self.cells == 0:
            self.before = _Switches.now()
            STRICT.set()
        self.cells += 1

    def leave(self) -> None:
        self.cells -= 1
        if self.cells == 0 and self.before is not None:
            self.before.set()


_SWITCH = _Switch()
