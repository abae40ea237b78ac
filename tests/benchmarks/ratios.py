"""Times as ratios to something that ran beside them, and their comparison with a baseline.

Seconds depend on the machine and on what else it does; the ratio of two things that took turns in
one run hardly does. The baseline holds such ratios, and where they were measured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from bench.environment import environment

BASELINE = Path(__file__).with_name("baseline.json")
FACTOR = 1.5
"""A ratio that has changed by more is pointed out; nothing fails."""


@dataclass(frozen=True)
class Baseline:
    """Ratios as they were, and the machine that they were measured on."""

    where: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def with_new(self, ratios: Mapping[str, float]) -> Baseline:
        """This baseline with ratios of this machine; those not measured stay."""
        rounded = {name: float(f"{ratio:.3g}") for name, ratio in ratios.items()}
        return replace(self, where=here(), ratios=dict(sorted((self.ratios | rounded).items())))

    def write(self, path: Path = BASELINE) -> None:
        """Writes the file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read(path: Path = BASELINE) -> Baseline:
    """The baseline in a file; an empty one where there is none."""
    if not path.exists():
        return Baseline()
    return Baseline(**json.loads(path.read_text(encoding="utf-8")))


def here() -> dict[str, str]:
    """What ratios may depend on."""
    place = environment(torch.device("cpu"))
    versions = {"torch": place.torch, "numpy": np.__version__, "python": place.python}
    return {"processor": place.device, **versions}


def report(now: Mapping[str, float], baseline: Baseline) -> Iterator[str]:
    """A table of all ratios, then a line for each that has changed by more than `FACTOR`."""
    rows, warnings = [], []
    for name, ratio in now.items():
        before = baseline.ratios.get(name)
        change = "new" if before is None else f"{ratio / before:.2f}"
        rows.append([name, f"{ratio:.3g}", "-" if before is None else f"{before:.3g}", change])
        if before is not None and not 1 / FACTOR <= ratio / before <= FACTOR:
            word = "slower" if ratio > before else "faster"
            times = max(ratio / before, before / ratio)
            warnings.append(f"warning: {name}: {times:.1f} times {word} than the baseline")
    headers = ["time / time of what it is compared with", "ratio now", "baseline", "change"]
    yield tabulate(
        rows, headers, disable_numparse=True, colalign=("left", "right", "right", "right")
    )
    yield from warnings
    if differing := [k for k, v in here().items() if baseline.where.get(k, v) != v]:
        places = ", ".join(f"{k} {baseline.where[k]}" for k in differing)
        yield f"the baseline was measured elsewhere: {places}"


class Beside:
    """Times a function in turns with a reference, and keeps the ratio of the two.

    Args:
        benchmark: pytest-benchmark's fixture; it times the function.
        ratios: takes the ratio under the name of the comparison.
        timer: that the fixture times with. `time.process_time` counts what the processor spent,
            so that others who use the machine hardly matter.
    """

    def __init__(
        self, benchmark: Any, ratios: dict[str, float], timer: Callable[[], float]
    ) -> None:
        self.benchmark, self.ratios, self.timer = benchmark, ratios, timer

    def __call__(
        self,
        name: str,
        function: Callable[[], Any],
        reference: Callable[[], Any],
        *,
        rounds: int = 20,
        number: int = 1,
    ) -> Any:
        """Runs reference and function in turns; the ratio is the median over the rounds.

        Args:
            name: of the comparison, such as `topk_mask, 1.5M / torch.sort`.
            function: what is measured.
            reference: what it is compared with.
            rounds: turns of each, besides a first one that warms up.
            number: calls in a turn.

        Returns:
            What the function returned last.
        """
        taken: list[float] = []

        def repeated() -> Any:
            for _ in range(number - 1):
                function()
            return function()

        def rival() -> None:
            started = self.timer()
            for _ in range(number):
                reference()
            taken.append(self.timer() - started)

        if self.benchmark.enabled:
            repeated()
            rival()
            taken.clear()
        result = self.benchmark.pedantic(repeated, setup=rival, rounds=rounds)
        if self.benchmark.enabled:
            own = self.benchmark.stats.stats.data
            pairs = zip(own, taken, strict=True)
            self.ratios[name] = statistics.median(one / other for one, other in pairs)
            self.benchmark.extra_info[name] = self.ratios[name]
        return result
