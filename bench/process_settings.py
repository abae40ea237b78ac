"""Settings that a process takes before its first cell."""

from __future__ import annotations

import ctypes
import sys

import torch

from bench.environment import commit

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`, from its malloc.h."""


def keep_memory() -> None:
    """Has the C library keep what is freed, in this process and from now on; glibc only.

    Else large tensors go back to the system after each layer and come as fresh pages for the next:
    on a CPU that costs a fifth of a training step, and up to half of a forward pass, in one network
    and not in its twin.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        assert library is not None
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


def set_up_process(threads: int) -> None:
    """Settings that a process takes before its first cell.

    Args:
        threads: of the CPU. Sums depend on it, so it is recorded; 1 gives the same bits anywhere
            on one kind of processor.
    """
    torch.set_num_threads(threads)
    # Weights that shrink to denormals make steps 2 to 3 times slower.
    torch.set_flush_denormal(True)
    keep_memory()
    commit()  # of the code as it was imported, not as it may be once a cell is done
