"""Where a record is made: device, versions, commit."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from bench.record import Environment

ROOT = Path(__file__).parent.parent


def environment(device: torch.device) -> Environment:
    """The environment of this process; memory as its peak so far, on the device or in all."""
    commit, dirty = _commit()
    return Environment(
        device=_device_name(device),
        threads=torch.get_num_threads(),
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=str(torch.__version__),
        sparsebench=_version(),
        commit=commit,
        dirty=dirty,
        peak_memory_bytes=_peak_memory(device),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version() -> str:
    try:
        return importlib.metadata.version("sparsebench")
    except importlib.metadata.PackageNotFoundError:
        return "checkout"


@functools.cache
def _commit() -> tuple[str, bool]:
    """Commit of the harness's own files, and whether any differs from it.

    `SPARSEBENCH_COMMIT` names it for copies without a repository.
    """
    given = os.environ.get("SPARSEBENCH_COMMIT")
    if given:
        return given, False
    # Records and baselines are results, not what made them.
    packages = ["bench", "methods", "models", "reports/*.py", "pyproject.toml"]
    try:
        commit = _git("rev-parse", "HEAD")
        top = _git("rev-parse", "--show-toplevel")
        if Path(top).resolve() != ROOT.resolve():  # installed inside somebody else's repository
            return "unknown", False
        return commit, bool(_git("status", "--porcelain", "--", *packages))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return result.stdout.strip()
