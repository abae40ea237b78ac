"""Where a record is made: device, versions, commit."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from bench.record import Environment

ROOT = Path(__file__).parent.parent

PACKAGES = ("bench", "methods", "models", "reports/*.py", "pyproject.toml")
"""What the harness is made of. Records and baselines are results, not what made them."""

SETTINGS = re.compile(
    r"(ATEN|CUBLAS|CUDNN|DNNL|MKL|NVIDIA_TF32|OMP|ONEDNN|OPENBLAS|TORCH_ALLOW_TF32)_.*"
)
"""Environment variables that choose kernels, threads or the order of sums."""

DRIVER = Path("/proc/driver/nvidia/version")


def environment(device: torch.device) -> Environment:
    """The environment of this process; memory as its peak so far, on the device or in all."""
    name, dirty, changes = commit()
    on_gpu = device.type == "cuda"
    return Environment(
        device=_device_name(device),
        threads=torch.get_num_threads(),
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=str(torch.__version__),
        sparsebench=version("sparsebench") or "checkout",
        commit=name,
        dirty=dirty,
        peak_memory_bytes=_peak_memory(device),
        changes=changes,
        kind=device.type,
        torchvision=version("torchvision"),
        timm=version("timm"),
        numpy=version("numpy"),
        cuda=str(torch.version.cuda or "") if on_gpu else "",
        cudnn=_cudnn() if on_gpu else "",
        driver=driver() if on_gpu else "",
        capability=_capability(device),
        settings=tuple(sorted((k, v) for k, v in os.environ.items() if SETTINGS.fullmatch(k))),
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


def _cudnn() -> str:
    return str(torch.backends.cudnn.version() or "")  # type: ignore[no-untyped-call]


def _capability(device: torch.device) -> str:
    if device.type == "cuda":
        return ".".join(map(str, torch.cuda.get_device_capability(device)))
    return str(torch.backends.cpu.get_cpu_capability())


@functools.cache
def version(package: str) -> str:
    """Version of an installed package, which is not imported; empty where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def driver() -> str:
    """Version of NVIDIA's driver, as Linux tells it; empty where it is not known."""
    try:
        found = re.search(r"Module(?: for \S+)?\s+(\d[\d.]+)", DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found[1] if found else ""


@functools.cache
def commit() -> tuple[str, bool, str]:
    """Commit of the harness's own files, whether any differs from it, and a hash of how.

    As they were when this process asked first: it goes on with the code that it has, though another
    commit is checked out before its records are written.

    `SPARSEBENCH_COMMIT` names it for copies without a repository.
    """
    given = os.environ.get("SPARSEBENCH_COMMIT")
    if given:
        return given, False, ""
    try:
        head = _git("rev-parse", "HEAD")
        top = _git("rev-parse", "--show-toplevel")
        if Path(top).resolve() != ROOT.resolve():  # installed inside somebody else's repository
            return "unknown", False, ""
        state = _git("status", "--porcelain", "--untracked-files=all", "--", *PACKAGES)
        return head, bool(state), _changes() if state else ""
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False, ""


def code() -> str:
    """The commit, and a hash of how files differ from it, if they do."""
    name, dirty, changes = commit()
    return f"{name} with local changes {changes}" if dirty else name


def _changes() -> str:
    """12 hex digits of how files differ from the commit; new ones count with their contents."""
    digest = hashlib.blake2b(_git("diff", "HEAD", "--", *PACKAGES).encode(), digest_size=6)
    new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", *PACKAGES)
    for name in filter(None, new.split("\0")):
        digest.update(name.encode())
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    # A difference may hold any bytes.
    result = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    return result.stdout.strip()
