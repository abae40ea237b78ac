"""Measures every figure of a GPU, in about 6 minutes, and writes them into bench/PERFORMANCE.md.

    python tests/benchmarks/gpu_figures.py [--data DIR] [--open-lth DIR] [--out FILE]

DIR of the data holds cifar10.npz (default: SPARSEBENCH_DATA); without it, made-up images stand for
CIFAR-10, and the accuracy is not measured. Rehearsed on a CPU by `--device cpu --quick --out FILE`,
whose figures mean nothing and stay out of PERFORMANCE.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # as a script, of which Python knows the folder only

PERFORMANCE = ROOT / "bench" / "PERFORMANCE.md"
BEGIN, END = "<!-- gpu figures -->", "<!-- end of gpu figures -->"

HEADERS = ("figure", "aim", "reached", "fraction", "remark")

FORMULAS = """\
Floors are of memory traffic: bytes that an image moves, forward and backward, in bf16 with separate
passes of BatchNorm, over the memory's bandwidth as a copy reaches it. An image of ResNet-20 moves
5.3 MB, so an epoch of 50,000 takes 61 ms at 4.3 TB/s; WRN-28-2 13.1 MB, ResNet-50 5.9 MB at 32x32
and 286 MB at 224x224. Outside of steps: (seconds of a short cell - its steps * seconds of a step) /
seconds of the steps of 300 epochs. All in bf16 at batch 128, contestants in turns."""

Row = tuple[str, str, str, str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; the exit status is 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal, with --quick and --out")
    parser.add_argument("--quick", action="store_true", help="tiny counts: sees that all runs")
    parser.add_argument("--data", type=Path, help="folder of cifar10.npz")
    parser.add_argument(
        "--open-lth",
        type=Path,
        default=os.environ.get("SPARSEBENCH_OPEN_LTH"),
        help="a checkout of facebookresearch/open_lth (default: SPARSEBENCH_OPEN_LTH)",
    )
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    options = parser.parse_args(arguments)
    rehearsal = options.quick or not options.device.startswith("cuda")
    if rehearsal and not (options.quick and options.out):
        parser.error(
            f"--device {options.device}: figures of a GPU are measured on a GPU; for a rehearsal "
            "give --quick and --out FILE, which PERFORMANCE.md does not hear of"
        )
    if rehearsal and options.out.resolve() == PERFORMANCE:
        parser.error(f"--out {options.out}: a rehearsal is nothing for PERFORMANCE.md")

    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("not run: no CUDA device")
        return 0

    from tests.benchmarks.gpu_measures import QUICK, Found, Place, Size, make_data, measured

    torch.set_num_threads(1)
    size = QUICK if options.quick else Size()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.data or Path(os.environ.get("SPARSEBENCH_DATA") or scratch)
        real = (folder / "cifar10.npz").exists() and not options.quick
        if not real:
            folder = Path(scratch)
            make_data(folder, size.images)
        place = Place(torch.device(options.device), size, folder, real, options.open_lth)
        figures = list(measured(place))
    rows: list[Row] = [
        (name, aim, found.reached, found.fraction, found.remark)
        if isinstance(found, Found)
        else (name, aim, found, "", "")
        for name, aim, found in figures
    ]
    where = surroundings(options.device, real)
    text = block(rows, where, rehearsal)
    print(text)
    if options.out:
        values = {name: f.value for name, _, f in figures if isinstance(f, Found)}
        whole = {"rehearsal": rehearsal, "where": where, "values": values, "rows": rows}
        options.out.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    if not rehearsal:
        write_block(text)
    return int(any(row[2].startswith("failed") for row in rows))


def surroundings(device: str, real: bool) -> str:
    """One line: where and when it was measured."""
    import torch

    from bench.environment import environment

    found = environment(torch.device(device))
    commit = found.commit + (" with changes" if found.dirty else "")
    images = "CIFAR-10" if real else "made-up images of CIFAR-10's shape"
    day = datetime.now(UTC).date().isoformat()
    return f"{found.device}, torch {found.torch}, commit {commit}, {day}; {images}"


def block(rows: Sequence[Row], where: str, rehearsal: bool) -> str:
    """Markdown of the figures, without the markers around it."""
    heading = "REHEARSAL: these figures mean nothing\n\n" if rehearsal else ""
    cells = [[cell.replace("|", "/") for cell in row] for row in rows]
    table = tabulate(cells, HEADERS, tablefmt="pipe", disable_numparse=True)
    return f"{heading}{where}\n\n{FORMULAS}\n\n{table}"


def write_block(text: str, path: Path | None = None) -> None:
    """Puts the figures where PERFORMANCE.md has its block; all else there stays.

    Raises:
        ValueError: the file has no such block.
    """
    path = path or PERFORMANCE
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: has no line {BEGIN}, or no {END} after it.")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
