"""Our training loop beside facebookresearch/open_lth's, in turns on one machine.

    python tests/benchmarks/against_peers.py --open-lth DIR --data DIR [--what lenet ...]

DIR of open_lth is a checkout, which stays as it is; that of the data holds mnist.npz and
cifar10.npz. Each loop is a live process of one thread that trains for some seconds when told. The
table gives images per second (median over the slices) and ratios of medians within rounds. Without
a checkout, ours is compared with the floors alone.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
if __name__ in ("__main__", "__mp_main__") and str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # as a script, of which Python knows the folder only

from tests.benchmarks import contestants  # noqa: E402
from tests.benchmarks.contestants import LENET, RESNET20, Case  # noqa: E402
from tests.benchmarks.turns import Loop, Rates, race, started  # noqa: E402

PEER, BARE, PASSES, PIL = "open_lth", "bare loop", "forward + backward", "torchvision PIL"
OURS = "ours"


def main() -> None:
    """Runs what is asked for, and prints a markdown table each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--open-lth", type=Path, help="a checkout of facebookresearch/open_lth")
    parser.add_argument("--data", type=Path, required=True, help="folder of the .npz files")
    parser.add_argument("--what", action="append", choices=RACES, help="repeatable; default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a slice")
    parser.add_argument("--rounds", type=int, default=8, help="slices of each loop")
    parser.add_argument("--only", help="loops to run, such as 'ours,open_lth'")
    parser.add_argument("--steps", type=int, default=3000, help="of each cell of the suite")
    parser.add_argument("--stack", type=int, default=1, help="small cells computed as one network")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the processor's seconds, not the wall's: where others use the machine too "
        "(not those of the suite, whose workers have no parent that counts them)",
    )
    options = parser.parse_args()
    for folder in filter(None, (options.open_lth, options.data)):
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    if "suite" in (options.what or ()) and not options.open_lth:
        parser.error("--what suite needs --open-lth")
    for what in options.what or [name for name in RACES if options.open_lth or name != "suite"]:
        RACES[what](options)


def _training(options: argparse.Namespace, title: str, case: Case, precisions: list[str]) -> None:
    data = options.data
    loops: dict[str, Loop] = {}
    if options.open_lth:
        loops[PEER] = functools.partial(
            contestants.open_lth, case=case, data=data, checkout=options.open_lth
        )
    for precision in precisions:
        name = f"{OURS}, {precision}" if precision else OURS
        loops[name] = functools.partial(contestants.ours, case=case, data=data, precision=precision)
    if case == LENET and options.stack > 1:
        loops[f"{OURS}, {options.stack} cells stacked"] = functools.partial(
            contestants.ours, case=case, data=data, stack=options.stack
        )
    loops[BARE] = functools.partial(contestants.bare, case=case, data=data)
    loops[PASSES] = functools.partial(contestants.passes, case=case, data=data)
    _run(options, title, loops)


def _lenet(options: argparse.Namespace) -> None:
    _training(options, "LeNet-300-100, MNIST, batch 60, Adam", LENET, [""])


def _resnet20(options: argparse.Namespace) -> None:
    title = "ResNet-20, CIFAR-10, batch 128, SGD, crop and flip"
    _training(options, title, RESNET20, ["", "bf16"])


def _data(options: argparse.Namespace) -> None:
    for title, case in (("MNIST, batches of 60", LENET), ("CIFAR-10, batches of 128", RESNET20)):
        loops: dict[str, Loop] = {}
        if options.open_lth:
            loops[PEER] = functools.partial(
                contestants.open_lth_data, case=case, data=options.data, checkout=options.open_lth
            )
        loops[PIL] = functools.partial(contestants.pil_data, case=case, data=options.data)
        loops[OURS] = functools.partial(contestants.our_data, case=case, data=options.data)
        _run(options, f"data path alone, {title}", loops)


def _run(options: argparse.Namespace, title: str, loops: Mapping[str, Loop]) -> None:
    chosen = options.only.split(",") if options.only else list(loops)
    loops = {name: loop for name, loop in loops.items() if name in chosen}
    clock = " of the processor's time" if options.cpu_time else ""
    print(f"\n{title}; {options.seconds:g} s{clock} a slice\n")
    rates = race(loops, options.rounds, options.seconds, cpu_time=options.cpu_time)
    print(table(rates), flush=True)


def table(rates: Rates) -> str:
    """A line for each contestant, with its ratio to every one that is a measure."""
    measures = [name for name in (PEER, PIL, BARE, PASSES) if name in rates.of]
    rows = []
    for name, found in rates.of.items():
        ratios = [f"{rates.ratio(name, to):.2f}" for to in measures]
        rows.append([name, f"{rates.median(name):,.0f}", *ratios, len(found)])
    headers = ["loop", "images/s", *(f"/ {name}" for name in measures), "slices"]
    right = ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=["left", *right])


def _suite(options: argparse.Namespace) -> None:
    """16 cells of LeNet through the command line on two cores, between slices of open_lth."""
    found: dict[str, list[float]] = {PEER: [], OURS: []}
    loop = functools.partial(
        contestants.open_lth, case=LENET, data=options.data, checkout=options.open_lth
    )
    with started(loop) as run:
        run(options.seconds)
        before = run(options.seconds)
        for number in range(options.rounds):
            found[OURS].append(suite_rate(options))
            after = run(options.seconds)
            # The clock of a shared machine changes over the minutes that a suite takes.
            found[PEER].append((before + after) / 2)
            before = after
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    stacked = f", --stack {options.stack}" if options.stack > 1 else ""
    print(f"\n16 cells of LeNet-300-100, {options.steps} steps each, --workers 2{stacked}\n")
    print(table(Rates({name: tuple(rates) for name, rates in found.items()})), flush=True)


def suite_rate(options: argparse.Namespace) -> float:
    """Images per second of a suite of 16 cells, from the command's start to its end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suite = contestants.write_suite(LENET, folder, options.steps, seeds=16)
        command = [sys.executable, "-m", "bench", "run", str(suite), "--workers", "2"]
        command += ["--data", str(options.data), "--records", str(folder / "records")]
        command += ["--stack", str(options.stack)] if options.stack > 1 else []
        began = time.perf_counter()
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        seconds = time.perf_counter() - began
        assert len(list((folder / "records" / "peer-suite").glob("dense-*.json"))) == 16
    return 16 * options.steps * LENET.batch / seconds


RACES = {"lenet": _lenet, "resnet20": _resnet20, "data": _data, "suite": _suite}


if __name__ == "__main__":
    main()
