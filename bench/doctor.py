"""Whether this machine can run suites: what is wrong, and how to mend it.

Every check stands by itself and may raise anything; what it raises is what is wrong.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from bench import datasets, leases
from bench.errors import BenchError
from bench.processes import cores
from bench.store import Store, read, suites

ROOT = Path(__file__).parent.parent

State = Literal["fine", "note", "wrong"]

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "msgspec", "safetensors")
"""Those whose versions decide whether anything works; the others are asked for only if missing."""

CONTENTS = {"mnist": "47ef77565eff", "cifar10": "11f639c8434a"}
"""Hashes of data sets as torchvision's loader gives them, where they are known."""

NAMED = 5
"""Damaged files that are named; the others are counted."""

GIB = 2**30
LITTLE_DISK, LITTLE_MEMORY = 2 * GIB, 2 * GIB
"""Below these a run of small networks may still work; large ones will not."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        state: `wrong` makes the command end with status 1; a `note` does not.
        found: in words.
        mend: what to do; empty where there is nothing.
    """

    check: str
    state: State
    found: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look: folders of the data sets and of the records."""

    data: Path
    records: Path


def examine(places: Places) -> list[Finding]:
    """Every check; none of them downloads or trains anything, or leaves a file behind."""
    return [finding for name, check in CHECKS.items() for finding in _guarded(name, check, places)]


def _guarded(
    name: str, check: Callable[[Places], Iterator[Finding]], places: Places
) -> list[Finding]:
    """The findings of a check; whatever it raises is one too."""
    found = []
    try:
        for finding in check(places):
            found.append(finding)  # those before an error count
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        found.append(Finding(name, "wrong", reason, "read the message; else report it"))
    return found


def _python(places: Places) -> Iterator[Finding]:
    yield Finding("python", "fine", f"{platform.python_version()} ({sys.executable})")


def _libraries(places: Places) -> Iterator[Finding]:
    """Versions against what `pyproject.toml` allows."""
    for wanted in _requirements():
        asked = f"needs {wanted.name}{wanted.specifier}"
        mend = f'pip install "{wanted.name}{wanted.specifier}"'
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(wanted.name, "wrong", f"not installed; {asked}", mend)
            continue
        if not wanted.specifier.contains(Version(found), prereleases=True):
            yield Finding(wanted.name, "wrong", f"{found}; {asked}", mend)
        elif wanted.name in LIBRARIES:
            yield Finding(wanted.name, "fine", found)


def _requirements() -> list[Requirement]:
    """What the package asks for: of a checkout by its own file, else by what was installed."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        lines = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires("sparsebench") or []
    found = map(Requirement, lines)
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def _device(places: Places) -> Iterator[Finding]:
    import torch

    from bench.environment import driver

    system = driver() or ("there" if Path("/dev/nvidiactl").exists() else "")
    if not torch.cuda.is_available():
        if not system:
            yield Finding("device", "fine", f"{_processor()}; no NVIDIA GPU")
        elif torch.version.cuda is None:
            yield Finding(
                "device",
                "wrong",
                f"a GPU (driver {system}), but torch {torch.__version__} is built without CUDA",
                "install torch as https://pytorch.org/get-started says for your driver",
            )
        else:
            yield Finding(
                "device",
                "wrong",
                f"a GPU (driver {system}) that torch (CUDA {torch.version.cuda}) cannot use",
                "update the driver, install a torch for an older CUDA, or see CUDA_VISIBLE_DEVICES",
            )
        return
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        free, total = torch.cuda.mem_get_info(number)
        place = f"cuda:{number}"
        ones = torch.ones(64, 64, device=place)
        if float((ones @ ones).sum()) != 64.0**3:
            yield Finding(place, "wrong", f"{name} computes wrong sums", "have the GPU checked")
            continue
        about = f"{name}, CUDA {torch.version.cuda}, driver {system or 'unknown'}"
        text = f"{about}, {_gib(free)} of {_gib(total)} free"
        little = free < LITTLE_MEMORY
        mend = "end what else uses it, see nvidia-smi" if little else ""
        yield Finding(place, "note" if little else "fine", text, mend)


def _processor() -> str:
    import torch

    from bench.environment import environment

    found = environment(torch.device("cpu"))
    return f"{found.device} ({found.capability or found.platform})"


def _threads(places: Places) -> Iterator[Finding]:
    usable, here = cores(), os.cpu_count() or 1
    found = f"{usable} of {here} cores"
    quota = _quota()
    if quota is not None and quota < usable:
        yield Finding(
            "cores",
            "note",
            f"{found}, but a quota of {quota:.3g} for this container",
            f"run with --workers {max(1, int(quota))}",
        )
    else:
        yield Finding("cores", "fine", found)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > usable:
        mend = "unset it: --threads says how many a cell takes"
        yield Finding("threads", "note", f"OMP_NUM_THREADS={asked} of {usable} cores", mend)


def _quota() -> float | None:
    """Cores that a container may use, by its control group; None: all."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def _memory(places: Places) -> Iterator[Finding]:
    free = _free_memory()
    if free is None:
        yield Finding("memory", "note", "the system does not say how much is free")
    elif free < LITTLE_MEMORY:
        mend = "end other programs, or run with --workers 1"
        yield Finding("memory", "wrong", f"{_gib(free)} free", mend)
    else:
        yield Finding("memory", "fine", f"{_gib(free)} free")


def _free_memory() -> int | None:
    """Bytes of memory that can be had, in the machine and in the container; Linux only."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text(encoding="ascii"))
            found.append(int(limit) - used)
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _data(places: Places) -> Iterator[Finding]:
    """Data sets that are here: whether they can be read, and hold what they should."""
    folder = places.data
    if not folder.is_dir():
        text = f"{folder}: not there yet; `run` makes it and downloads"
        yield Finding("data", "note", text, "or name yours by --data or SPARSEBENCH_DATA")
        return
    recorded = _recorded(places.records)
    files = [folder / f"{name}.npz" for name in datasets.DATASETS]
    for file in filter(Path.exists, files):
        name = file.stem
        try:
            found = datasets.load(name, folder).hash
        except BenchError as error:
            yield Finding(f"data: {name}", "wrong", str(error), f"delete {file}, or restore it")
            continue
        expected = {CONTENTS[name]} if name in CONTENTS else recorded.get(name, {found})
        if found in expected:
            yield Finding(f"data: {name}", "fine", f"content {found}")
        else:
            origin = "torchvision's" if name in CONTENTS else "recorded"
            text = f"{file}: content {found}, {origin} {', '.join(sorted(expected))}"
            mend = "records of other data do not compare: delete the file to have it downloaded"
            yield Finding(f"data: {name}", "wrong", text, mend)
    if not any(map(Path.exists, files)):
        yield Finding("data", "note", f"{folder}: no data set yet; `run` downloads what it needs")


def _recorded(root: Path) -> dict[str, set[str]]:
    """Hashes of each data set that there are records of; damaged records are another check's."""
    found: dict[str, set[str]] = {}
    for path in _record_files(root):
        try:
            spec = read(path, brief=True).spec
        except BenchError:
            continue
        found.setdefault(spec.dataset, set()).add(spec.data_hash)
    return found


def _record_files(root: Path) -> list[Path]:
    stores = [Store(root, name) for name in suites(root)]
    return [path for store in stores for path in (*store.paths(), *store.attempt_paths())]


def _writable(places: Places) -> Iterator[Finding]:
    """Whether records can be written, and there is room for them; data likewise."""
    for name, folder in (("records", places.records), ("data", places.data)):
        there = _first_there(folder)
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"sparsebench")
        except OSError as error:
            # Data that are complete need no room.
            state: State = "wrong" if name == "records" else "note"
            text = f"{there}: cannot write there ({error.strerror})"
            yield Finding(f"{name} folder", state, text, f"name another by --{name}")
            continue
        free = shutil.disk_usage(there).free
        little = free < LITTLE_DISK
        mend = "make room: checkpoints and finished networks are written there" if little else ""
        made = "" if there == folder.absolute() else "; made by the first run"
        text = f"{folder}: {_gib(free)} free{made}"
        yield Finding(f"{name} folder", "wrong" if little else "fine", text, mend)


def _first_there(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _records(places: Places) -> Iterator[Finding]:
    """Whether every record and every list of cells can be read."""
    damaged, files = [], _record_files(places.records)
    for path in files:
        try:
            read(path)
        except BenchError as error:
            damaged.append(str(error))
    for name in suites(places.records):
        try:
            Store(places.records, name).manifest()
        except BenchError as error:
            damaged.append(str(error))
    for text in damaged[:NAMED]:
        yield Finding("records", "wrong", text, "as it says")
    if len(damaged) > NAMED:
        yield Finding("records", "wrong", f"{len(damaged) - NAMED} more like these", "as they say")
    if files and not damaged:
        yield Finding("records", "fine", f"{len(files)} can be read")


def _leftovers(places: Places) -> Iterator[Finding]:
    """What runners that were killed left behind; none of it keeps a run from going on."""
    root = places.records
    if not root.is_dir():
        return
    with tempfile.NamedTemporaryFile(dir=root) as file:  # the folder's own clock
        now = Path(file.name).stat().st_mtime
    ages = [now - path.stat().st_mtime for path in root.glob("*/locks/*.lock.*")]
    stale = sum(age > leases.STALE_SECONDS for age in ages)
    if stale:
        text = f"{stale} of {len(ages)} have not been renewed for {leases.STALE_SECONDS:g} s"
        yield Finding("leases", "note", text, "nothing: the next run takes their cells over")
    old = [path for path in root.rglob(".*.tmp") if now - path.stat().st_mtime > 3600]
    if old:
        text = f"{len(old)} half-written files over an hour old, such as {old[0]}"
        yield Finding("leftovers", "note", text, "delete them")
    if damaged := sorted(root.glob("*/checkpoints/*damaged*")):
        text = f"{len(damaged)} damaged checkpoints were put aside, such as {damaged[0]}"
        yield Finding("checkpoints", "note", text, "check the disk; delete them")


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


CHECKS: dict[str, Callable[[Places], Iterator[Finding]]] = {
    "python": _python,
    "libraries": _libraries,
    "device": _device,
    "cores": _threads,
    "memory": _memory,
    "data": _data,
    "folders": _writable,
    "records": _records,
    "leftovers": _leftovers,
}


def table(findings: list[Finding]) -> str:
    """What was found, for people."""
    from tabulate import tabulate

    rows = [(one.check, one.state, one.found, one.mend) for one in findings]
    headers = ("check", "state", "found", "what to do")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
