"""Which method runs on which network: three steps each, for the table in `methods/README.md`."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.data import Data, to_device
from bench.datasets import Arrays, DatasetInfo
from bench.errors import BenchError, SuiteError
from bench.networks import make_model
from bench.process_settings import set_up_process
from bench.recipes import Recipe
from bench.scrutiny import finished
from bench.trial import train, trainer_of
from methods import METHODS, get_method

MODELS = {
    "lenet_300_100": "lenet_300_100",
    "lenet5": "lenet5",
    "conv4": "conv4",
    "resnet20": "resnet20",
    "wrn_16_2": "wrn_16_2",
    "vgg11": "vgg11",
    "resnet18": "timm:resnet18",
    "vit_tiny": "timm:vit_tiny_patch16_224",
    "mobilenetv3": "timm:mobilenetv3_small_050",
    "convnext": "timm:convnext_atto",
}
"""Column of the table -> model."""

INFO = DatasetInfo((3, 32, 32), 10, (0.5,) * 3, (0.25,) * 3, "", "random pixels")
RECIPE = Recipe(title="three steps", batch=8, lr=0.01, momentum=0.9, weight_decay=1e-4)
STEPS = 3
DENSITY = 0.2
BEGIN, END = "<!-- matrix: tox run -e matrix -->", "<!-- end of matrix -->"
README = Path(__file__).parent.parent / "methods" / "README.md"


def random_data() -> Data:
    """Random images of 3x32x32 in ten classes, 24 to train on."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (2, 24, 32, 32, 3), dtype=np.uint8)
    labels = np.tile(np.arange(10), 5)[:48].reshape(2, 24).astype(np.int64)
    arrays = Arrays(INFO, pixels[0], labels[0], pixels[1], labels[1], "0")
    return to_device(arrays, RECIPE, torch.device("cpu"))


def tried(method: str, model: str) -> str:
    """Trains a pair and bakes the network.

    Returns:
        Why the pair cannot be, or an empty text where it ran.

    Raises:
        BenchError: it ran, but what it left is wrong.
    """
    chosen = get_method(method)()

    def build(draw: int) -> nn.Module:
        return make_model(model, INFO, {}, seed=draw)

    try:
        data = random_data().without_test()
        trainer = trainer_of(chosen, build, RECIPE, data, density=DENSITY, steps=STEPS)
    except SuiteError:
        return "no filters to prune" if chosen.controls == "filters" else "nothing to prune"
    try:
        train(trainer)
    except RuntimeError as error:
        missing = re.search(r"derivative for aten::(\w+)_backward is not implemented", str(error))
        if missing is None:
            raise
        return f"needs a second derivative, and torch has none of {missing[1]}"
    if wrong := [text for texts in finished(trainer, build(0)).values() for text in texts]:
        raise BenchError(f"{method} on {model}: {'; '.join(wrong)}")
    return ""


def line(method: str) -> tuple[str, list[str]]:
    """A method's line of the table, trying it on every network, and the reasons of its gaps."""
    cells, reasons = [], []
    for column, model in MODELS.items():
        started = time.perf_counter()
        reason = tried(method, model)
        seconds = time.perf_counter() - started
        print(f"{method} {column}: {reason or 'yes'} ({seconds:.1f} s)", file=sys.stderr)
        cells.append("no" if reason else "yes")
        if reason:
            reasons.append(gap(method, column, reason))
    return f"| {stamp(method)} | {' | '.join(cells)} |", reasons


def heading() -> list[str]:
    """Head of the table."""
    return [f"| method | {' | '.join(MODELS)} |", f"|:--|{':-:|' * len(MODELS)}"]


def stamp(method: str) -> str:
    """A method with the version that the line is true of."""
    return f"`{method}` v{get_method(method).version}"


def gap(method: str, column: str, reason: str) -> str:
    """Why a method does not run on a network, as it stands below the table."""
    return f"- `{method}` on {column}: {reason}."


def shown() -> list[str]:
    """The lines of the table as it lies in the README, what stands below it included."""
    text = README.read_text(encoding="utf-8")
    return text.partition(BEGIN)[2].partition(END)[0].strip().split("\n")


def main() -> None:
    """Tries the methods named on the command line, or all, and writes the table anew."""
    set_up_process(threads=1)
    chosen = sys.argv[1:] or list(METHODS)
    old = shown()
    lines, reasons = {}, {}
    for method in METHODS:
        if method in chosen:
            lines[method], reasons[method] = line(method)
        else:
            lines[method] = next((x for x in old if x.startswith(f"| `{method}` ")), "")
            reasons[method] = [x for x in old if x.startswith(f"- `{method}` on ")]
    count = len(METHODS) * len(MODELS)
    table = [
        *heading(),
        *(text for text in lines.values() if text),
        "",
        f"{count - sum(map(len, reasons.values()))} of {count} pairs: trained {STEPS} steps on the "
        "CPU and made plain again. Not possible:",
        "",
        *(text for texts in reasons.values() for text in texts),
    ]
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    block = "\n".join(table)
    README.write_text(f"{before}{BEGIN}\n\n{block}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
