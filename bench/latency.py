"""Inference time of a cell's network: dense, masked, compact, and 2:4 sparse where a GPU has it.

All of them take turns in one run, A B C A B C, so that a drift of the machine meets all alike; a
ratio is that of two times of the same round.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats  # type: ignore[import-untyped]
from tabulate import tabulate
from torch import Tensor, nn

from bench.datasets import DatasetInfo
from bench.environment import environment
from bench.errors import CannotCompact
from bench.finished import (
    cut,
    data_info,
    find_recipe,
    finished,
    masked_network,
    plain_network,
)
from bench.process_settings import keep_memory
from bench.record import Environment, Record

Run = Callable[[], object]
Timer = Callable[[Run], float]
"""Seconds that a run takes."""

DENSE, MASKED, COMPACT = "dense", "masked", "compact"
DENSE_HALF, SEMI_STRUCTURED = "dense, float16", "2:4, float16"
AGAINST = {SEMI_STRUCTURED: DENSE_HALF}
"""What a network's ratio is to, where that is not `DENSE`."""

WARM_UP = 3
"""Rounds that are not timed: kernels are chosen and memory is taken in the first."""

LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 10, 200, 10.0
"""Rounds for a batch size are those that fit in so many seconds, within these bounds."""

CONFIDENCE = 0.95
"""Of the intervals of ratios; it takes six rounds."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One network at one batch size; times in milliseconds for the whole batch.

    Attributes:
        network: which one.
        batch: images.
        median: over the rounds; `lower` and `upper` are the quartiles.
        ratio: median over the rounds of this network's time over that of `against`, in the same
            round; under 1 is faster.
        interval: that holds the median of the ratios with `CONFIDENCE`, by their order alone.
        against: which network the ratio is to.
    """

    network: str
    batch: int
    median: float
    lower: float
    upper: float
    ratio: float
    interval: tuple[float, float]
    against: str


@dataclass(frozen=True, slots=True)
class Latency:
    """What was measured, and where.

    Attributes:
        cell: its slug.
        input_shape: (channels, height, width).
        environment: device, threads and versions.
        rounds: by batch size.
        timings: batch by batch.
        notes: what was left out and why, and what was done for the purpose.
    """

    cell: str
    input_shape: tuple[int, int, int]
    environment: Environment
    rounds: dict[int, int]
    timings: tuple[Timing, ...]
    notes: tuple[str, ...]


def latency(
    path: Path,
    data: Path,
    device: str,
    batches: Sequence[int],
    rounds: int | None = None,
    recipe: Path | None = None,
) -> Latency:
    """Times the networks of one cell.

    Args:
        path: of the record.
        data: folder of the data sets, for those that must be read to know their shape.
        device: as torch names it.
        batches: images per call.
        rounds: turns of each network; None: see `SECONDS`.
        recipe: file of the cell's recipe, where the size of its images stands in it.

    Raises:
        UsageError: the cell left no network, or it is not here.
    """
    record, tensors = finished(path)
    info = data_info(record, find_recipe(record, recipe), data)
    place = torch.device(device)
    keep_memory()
    networks, notes = _networks(record, info, tensors, place)
    timer = cuda_seconds if place.type == "cuda" else seconds
    timings: list[Timing] = []
    done = {}
    for batch in dict.fromkeys(batches):
        runs = {name: _call(net, batch, info, place) for name, net in networks.items()}
        times = in_turns(runs, timer, rounds)
        done[batch] = len(times[DENSE])
        timings += [timing(name, batch, times) for name in times]
    where = environment(place)
    return Latency(record.spec.slug, info.shape, where, done, tuple(timings), tuple(notes))


def in_turns(runs: Mapping[str, Run], timer: Timer, rounds: int | None) -> dict[str, list[float]]:
    """Seconds of every run in every round; the runs of a round follow one another.

    Args:
        runs: by name.
        timer: measures one run.
        rounds: how many are timed; None: as many as fit in `SECONDS`, within the bounds.
    """
    for _ in range(WARM_UP):
        warm = sum(timer(run) for run in runs.values())
    if rounds is None:
        fitting = int(SECONDS / max(warm, SECONDS / MOST_ROUNDS))
        rounds = max(LEAST_ROUNDS, fitting)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timer(run))
    return times


def timing(name: str, batch: int, times: Mapping[str, Sequence[float]]) -> Timing:
    """The figures of one network.

    Args:
        name: of the network.
        batch: images per call.
        times: seconds by name and round.
    """
    against = AGAINST.get(name, DENSE)
    lower, median, upper = np.percentile(1000 * np.array(times[name]), [25, 50, 75])
    ratios = np.array(times[name]) / np.array(times[against])
    test = stats.quantile_test(ratios, p=0.5)
    low, high = test.confidence_interval(confidence_level=CONFIDENCE)
    return Timing(
        name,
        batch,
        float(median),
        float(lower),
        float(upper),
        float(np.median(ratios)),
        (float(low), float(high)),
        against,
    )


def seconds(run: Run) -> float:
    """Wall-clock of a run on the CPU."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def cuda_seconds(run: Run) -> float:
    """Time of a run on the GPU, from the first kernel's start on an idle device to the last's end.

    The launching of kernels counts where the GPU waits for it, as it does in use.
    """
    event: Any = torch.cuda.Event
    first, last = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000


def table(measured: Latency) -> str:
    """Markdown: a line for each network and batch size, and what must be known to read it."""
    rows = [
        {
            "network": one.network,
            "batch": one.batch,
            "ms per batch": f"{one.median:.3f}",
            "quartiles": f"{one.lower:.3f} to {one.upper:.3f}",
            "time to dense": f"{one.ratio:.3f}",
            f"{CONFIDENCE:.0%} interval": "{:.3f} to {:.3f}".format(*one.interval),
        }
        for one in measured.timings
    ]
    where = measured.environment
    rounds = ", ".join(f"{count} at batch {batch}" for batch, count in measured.rounds.items())
    footer = [
        f"{measured.cell}; images of {'x'.join(map(str, measured.input_shape))}; channels last.",
        "ms per batch: median over the rounds; time to dense: median of the ratios of times of "
        "the same round, under 1 is faster.",
        "masked computes what dense does, zeros included: how far its ratio is from 1 is noise.",
        f"device: {where.device}; threads: {where.threads}; torch: {where.torch}; "
        f"rounds: {rounds}, in which all networks take turns.",
        *measured.notes,
    ]
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n".join([text, "", *(f"- {line}" for line in footer)])


def _networks(
    record: Record, info: DatasetInfo, tensors: Mapping[str, Tensor], device: torch.device
) -> tuple[dict[str, nn.Module], list[str]]:
    """The networks that can be timed, on the device, and a line for each that cannot."""
    spec, notes = record.spec, []
    dense = plain_network(spec.model, dict(spec.model_options), info, spec.seed)
    masked = masked_network(record, info, tensors)
    networks = {DENSE: dense, MASKED: masked}
    try:
        networks[COMPACT] = cut(record, masked, info).model.eval()
    except CannotCompact as error:
        notes.append(f"no compact network: {error}")
    placed = {
        name: network.to(device).to(memory_format=torch.channels_last)
        for name, network in networks.items()
    }
    half, note = _half_networks(placed[DENSE], info, device)
    return placed | half, [*notes, note]


def _half_networks(
    dense: nn.Module, info: DatasetInfo, device: torch.device
) -> tuple[dict[str, nn.Module], str]:
    """The dense network in float16, and the same with 2:4 layers; none where there are no such.

    Returns:
        The networks, and what must be known of them or why there are none.
    """
    if reason := _no_semi_structured(device):
        return {}, f"no 2:4 network: {reason}."
    half = copy.deepcopy(dense).half()
    sparse = copy.deepcopy(half)
    linear = [module for module in sparse.modules() if isinstance(module, nn.Linear)]
    refused = [reason for layer in linear if (reason := to_semi_structured(layer))]
    taken = len(linear) - len(refused)
    if not taken:
        why = f" ({refused[0]})" if refused else ""
        return {}, f"no 2:4 network: torch takes none of the {len(linear)} linear layers{why}."
    try:
        _call(sparse, 1, info, device)()
    except (RuntimeError, NotImplementedError) as error:
        return {}, f"no 2:4 network: it does not run ({_line(error)})."
    return {DENSE_HALF: half, SEMI_STRUCTURED: sparse}, (
        f"2:4: {taken} of {len(linear)} linear layers of a fresh network, pruned by magnitude for "
        "the timing only; convolutions stay dense; its ratio is to the dense network in float16."
    )


def two_of_four(weight: Tensor) -> Tensor:
    """The weight (out, in) with the two smallest of every four inputs zeroed.

    Args:
        weight: `in` is a multiple of 4.
    """
    groups = weight.detach().view(-1, 4)
    smallest = groups.abs().topk(2, dim=1, largest=False).indices
    return groups.scatter(1, smallest, 0).view_as(weight)


def to_semi_structured(layer: nn.Linear) -> str:
    """Prunes a layer's weight to 2:4 and stores it so.

    Returns:
        Why torch has no kernel for it; empty where it has.
    """
    if layer.in_features % 4:
        return f"{layer.in_features} inputs are no multiple of 4"
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("ignore", message=".*prototype")  # torch says so of its format
        try:
            packed = torch.sparse.to_sparse_semi_structured(two_of_four(layer.weight))
        except (RuntimeError, ValueError) as error:  # torch keeps the list of shapes to itself
            return _line(error)
        layer.weight = nn.Parameter(packed, requires_grad=False)
    return ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _no_semi_structured(device: torch.device) -> str:
    """Why a device has no 2:4 kernels; empty where it has."""
    if device.type != "cuda":
        return "it needs a GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, this GPU has {major}.{minor}"
    return ""


def _call(network: nn.Module, batch: int, info: DatasetInfo, device: torch.device) -> Run:
    """One forward pass on random images in the network's own type."""
    dtype = next(
        value.dtype for value in network.state_dict().values() if value.is_floating_point()
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *info.shape, generator=generator).to(device, dtype)
    images = images.to(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.inference_mode():
            output: Tensor = network(images)
            return output

    return run
