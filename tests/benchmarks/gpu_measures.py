"""What `gpu_figures` measures, each by a function that gives its figures by name.

Everything is measured with the code of a cell: trainers, captured steps, `run_cells`. Contestants
take turns, A B A B, and ratios are medians of the ratios within rounds.
"""

from __future__ import annotations

import collections
import functools
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import datasets, suite
from bench.capture import Captured
from bench.data import Data, to_device
from bench.datasets import Arrays, DatasetInfo
from bench.networks import make_model
from bench.packing import Fixed, packing
from bench.prunable import prunable_names, shapes
from bench.recipes import Recipe
from bench.resolve import Plan, resolve
from bench.runner import moments
from bench.step import Step, set_precision
from bench.store import Store
from bench.task import Finished, Progress, Stopped, Ways
from bench.together import run_cells
from bench.trainer import Trainer
from methods import METHODS, get_method
from methods.api import Budget
from methods.ranking import kth_largest, write_top
from tests.bench.cells import tasks_of
from tests.benchmarks.peer_loader import peer_loader
from tests.benchmarks.turns import started
from tests.hot import NoWaiting

EPOCH = 50_000
"""Images of an epoch of CIFAR-10."""

BANDWIDTH = 4.3e12
"""Bytes per second for which the floors below were computed."""

MEGABYTES = {"resnet20": 5.3, "wrn_28_2": 13.1, "resnet50 at 32": 5.9, "resnet50 at 224": 286.0}
"""Memory traffic of an image, forward and backward, in bf16 with separate passes of BatchNorm."""

RECIPE = """
title = "ResNet-20 as in DPF, in bf16"
batch = {batch}
lr = 0.2
momentum = 0.9
nesterov = true
weight_decay = 1e-4
drops = [0.5, 0.75]
crop = 4
flip = true
precision = "bf16"
"""

SUITE = """
title = "dense"
dataset = "cifar10"
recipe = "figures.toml"
models = ["resnet20"]
sparsities = [0.0]
seeds = {seeds}
budget = {budget}
[methods.dense]
"""

STATIC = ("one_shot", "random")
DYNAMIC = ("dpf", "rigl", "set", "sparse_momentum", "gradual")
NOISY = ("deepr", "l0", "variational_dropout")
BOUNDS = dict.fromkeys(STATIC, 1.0) | dict.fromkeys(DYNAMIC, 2.0)
"""Overhead over dense in percent that a method may have."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        batch: images of a step.
        seconds: of a slice; at least one step is done.
        rounds: slices of each contestant, besides a first one that warms up.
        chunk: steps between two looks at the clock.
        cells: numbers of cells side by side; 0: as many as fit.
        weights: of the mask update.
        steps: of a method's run, in so many slices as there are rounds.
        images: of the training set, if it is made up.
        large: side of ResNet-50's large images.
        short: steps of the cell of which the overhead is measured.
        methods: whose steps may not wait.
        epochs: of the cell whose accuracy is looked at.
    """

    batch: int = 128
    seconds: float = 1.0
    rounds: int = 5
    chunk: int = 50
    cells: tuple[int, ...] = (1, 2, 4, 8, 16, 0)
    weights: int = 23_345_472
    steps: int = 4000
    images: int = EPOCH
    large: int = 224
    short: int = 1000
    epochs: int = 300
    methods: tuple[str, ...] = tuple(METHODS)


QUICK = Size(
    batch=2,
    seconds=0.0,
    rounds=1,
    chunk=1,
    cells=(1, 2),
    weights=20_000,
    steps=6,
    images=64,
    large=64,
    short=6,
    epochs=1,
    methods=("dense", "l0"),
)
"""Enough to see that everything runs."""


@dataclass(frozen=True)
class Found:
    """A figure.

    Attributes:
        reached: with its unit.
        fraction: of the floor or of the aim; empty: there is none.
        remark: what holds the rest.
        value: the number alone.
    """

    reached: str
    value: float
    fraction: str = ""
    remark: str = ""


Figures = dict[str, Found]


@dataclass(frozen=True)
class Place:
    """Where and how much is measured.

    Attributes:
        device: on which everything is measured.
        size: how much of it.
        data: folder with cifar10.npz.
        real: whether its images are CIFAR-10's.
        open_lth: a checkout; None: not at hand.
    """

    device: torch.device
    size: Size
    data: Path
    real: bool
    open_lth: Path | None = None

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until everything is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    @property
    def recipe(self) -> Recipe:
        """ResNet-20's, in bf16."""
        return Recipe(
            title="",
            batch=self.size.batch,
            lr=0.2,
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
            crop=4,
            flip=True,
            precision="bf16",
        )

    def plan(self, folder: Path, seeds: int, budget: str) -> Plan:
        """A suite of dense ResNet-20 cells."""
        (folder / "figures.toml").write_text(RECIPE.format(batch=self.size.batch), encoding="utf-8")
        path = folder / "suite.toml"
        path.write_text(SUITE.format(seeds=list(range(seeds)), budget=budget), encoding="utf-8")
        return resolve(suite.load(str(path)), self.data)


class NotHere(Exception):
    """What a figure needs is not at hand; says what."""


def make_data(folder: Path, images: int) -> None:
    """Writes a cifar10.npz of patterns with noise: no real images, but of their shape."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, size=(10, 32, 32, 3), dtype=np.int16)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 10, size=count)
        noise = rng.integers(-64, 64, size=(count, 32, 32, 3), dtype=np.int16)
        return np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8), labels

    x_train, y_train = split(images)
    x_test, y_test = split(max(10, images // 5))
    np.savez(folder / "cifar10.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


class Live:
    """A run that goes on for as many steps as are wanted.

    Args:
        place: where.
        name: of the method.
        model: of the network.
        data: on the device.
        recipe: how it is trained.
        steps: of the whole run, which are not reached.
        kind: of its steps.
        compiled: whether `torch.compile` makes the passes.
    """

    def __init__(
        self,
        place: Place,
        name: str,
        model: str,
        data: Data,
        recipe: Recipe,
        *,
        steps: int = 10**6,
        kind: type[Step] = Captured,
        compiled: bool = False,
    ) -> None:
        self.place, self.batch = place, recipe.batch
        self.stream = torch.cuda.Stream(place.device) if place.cuda else None
        set_precision(recipe)
        method = get_method(name)()
        with self._own():
            network = make_model(model, data.info, {}, 0).to(place.device)
            network = network.to(memory_format=torch.channels_last)
            names = prunable_names(network, method, "all")
            size = len(data.train)
            budget = Budget(steps, size // recipe.batch, size, (), shapes(network, names))
            density = 0.1 if METHODS[name].controls == "density" else None
            self.trainer = Trainer(
                method,
                network,
                names,
                data.without_test(),
                recipe,
                budget,
                density,
                0,
                step=functools.partial(kind, compiled=compiled),
            )
        self.steps = self.trainer.run()

    def _own(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def go(self, count: int) -> None:
        """Does so many steps, without waiting for them."""
        with self._own():
            done = sum(1 for _ in itertools.islice(self.steps, count))
        if done < count:
            raise RuntimeError("the run has ended")

    def at_step(self, work: Callable[[Callable[[], None]], Any]) -> Any:
        """What work gives of the function that computes the next step."""
        with self._own():
            for moment in self.trainer.moments():
                if moment is None:
                    return work(self.trainer.hot.compute)
        raise RuntimeError("the run has ended")

    def rate(self, seconds: float) -> float:
        """Images per second over a slice."""
        chunk = self.place.size.chunk
        self.place.wait()
        started_at, images = time.perf_counter(), 0
        while True:
            self.go(chunk)
            images += chunk * self.batch
            if time.perf_counter() - started_at >= seconds:
                break
        self.place.wait()
        return images / (time.perf_counter() - started_at)

    def time_of(self, count: int) -> float:
        """Seconds of so many steps."""
        self.place.wait()
        started_at = time.perf_counter()
        self.go(count)
        self.place.wait()
        return time.perf_counter() - started_at


@functools.lru_cache(maxsize=1)
def cifar(place: Place) -> Data:
    """CIFAR-10, or what stands for it, on the device."""
    return to_device(datasets.load("cifar10", place.data), place.recipe, place.device)


def pictures(place: Place, side: int, recipe: Recipe) -> Data:
    """Random images of a side, no more than a few batches."""
    count = max(4 * recipe.batch, 64)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, size=(count, side, side, 3), dtype=np.uint8)
    y = rng.integers(0, 10, size=count)
    info = DatasetInfo((3, side, side), 10, (0.5,) * 3, (0.25,) * 3, "", "random")
    return to_device(Arrays(info, x, y, x[:10], y[:10], f"{side:012x}"), recipe, place.device)


def alternated(place: Place, lives: Mapping[str, Live]) -> dict[str, list[float]]:
    """Images per second of each, in turns; the first slice of each warms up."""
    found: dict[str, list[float]] = {name: [] for name in lives}
    for number in range(place.size.rounds + 1):
        for name, live in lives.items():
            rate = live.rate(place.size.seconds)
            if number:
                found[name].append(rate)
    return found


def ratio(found: Mapping[str, list[float]], name: str, to: str) -> float:
    """Median of the ratios within rounds."""
    return statistics.median(a / b for a, b in zip(found[name], found[to], strict=True))


def of_floor(place: Place, name: str, rate: float) -> str:
    """What part a rate is of what the memory's bandwidth would let through."""
    floor = bandwidth(place) / (MEGABYTES[name] * 1e6)
    return f"{rate / floor:.2f} of the floor, {floor:,.0f} images/s"


@functools.cache
def bandwidth(place: Place) -> float:
    """Bytes per second that a copy reads and writes, the best of some."""
    numbers = torch.empty(2**28 if place.cuda else 2**22, device=place.device)
    target, best = torch.empty_like(numbers), float("inf")
    for _ in range(10):
        best = min(best, seconds_of(place, lambda: target.copy_(numbers)))
    return 2 * numbers.numel() * numbers.element_size() / best


def seconds_of(place: Place, work: Callable[[], object]) -> float:
    """Of one call, the device waited for."""
    place.wait()
    started_at = time.perf_counter()
    work()
    place.wait()
    return time.perf_counter() - started_at


def measure_bandwidth(place: Place) -> Figures:
    """The memory's, by which floors are scaled."""
    found = bandwidth(place)
    what = f"{found / 1e12:.3g} TB/s"
    return {"memory bandwidth, by a copy": Found(what, found, f"{found / BANDWIDTH:.2f} of 4.3")}


def measure_one_cell(place: Place) -> Figures:
    """One ResNet-20, captured and eager."""
    make = functools.partial(Live, place, "dense", "resnet20", cifar(place), place.recipe)
    lives = {"captured": make(), "eager": make(kind=Step)}
    rates = alternated(place, lives)
    captured = statistics.median(rates["captured"])
    against, eager = ratio(rates, "captured", "eager"), statistics.median(rates["eager"])
    return {
        "ResNet-20, one cell": Found(
            f"{captured:,.0f} images/s",
            captured,
            of_floor(place, "resnet20", captured),
            held_by(lives["captured"]),
        ),
        "ResNet-20, captured / its own eager loop": Found(
            f"{against:.2f} times",
            against,
            f"{against / 2.5:.2f} of the aim",
            f"eager {eager:,.0f}",
        ),
    }


def measure_compiled(place: Place) -> Figures:
    """Passes made by torch.compile, beside those that are not; all are replayed as graphs."""
    if not place.cuda:
        raise NotHere("the compiler is tried on a GPU")
    data, figures = cifar(place), {}
    for model, title in (("resnet20", "ResNet-20"), ("wrn_28_2", "WRN-28-2")):
        make = functools.partial(Live, place, "dense", model, data, place.recipe)
        lives = {"on": make(compiled=True), "off": make()}
        begun = lives["on"].time_of(1)
        rates = alternated(place, lives)
        gain, rate = ratio(rates, "on", "off"), statistics.median(rates["on"])
        figures[f"{title}, torch.compile on / off"] = Found(
            f"{gain:.2f} times",
            gain,
            of_floor(place, model, rate),
            f"compiled in {begun:.0f} s; {held_by(lives['on'])}",
        )
    return figures


def held_by(live: Live) -> str:
    """Kernels of some steps: how many, how long, and what part of the time they fill."""
    if not live.place.cuda:
        return ""
    from torch.profiler import ProfilerActivity, profile

    steps = 20
    taken = live.time_of(steps) / steps
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        live.time_of(steps)
    kernels = [event for event in found.events() if on_device(event)]
    if not kernels:
        return "the profiler saw no kernel"
    total = sum(event.time_range.elapsed_us() for event in kernels) / steps
    by_name: collections.Counter[str] = collections.Counter()
    for event in kernels:
        by_name[event.name[:40]] += event.time_range.elapsed_us()
    top = ", ".join(f"{name} {us / steps / total:.0%}" for name, us in by_name.most_common(3))
    return (
        f"{1e3 * taken:.2f} ms a step: {len(kernels) / steps:.0f} kernels fill "
        f"{total / 1e6 / taken:.0%} of it; most: {top}"
    )


def on_device(event: Any) -> bool:
    """Whether a profiler's event is work of the GPU."""
    marked = getattr(event, "is_user_annotation", False)
    return event.device_type == torch.autograd.DeviceType.CUDA and not marked


def measure_side_by_side(place: Place) -> Figures:
    """Several ResNet-20 cells in one process."""
    figures = {}
    for count in place.size.cells:
        rate, running = together(place, count)
        name = "as many cells as fit" if count == 0 else f"{count} cells"
        name = f"ResNet-20, {name}, in sum".replace("1 cells", "1 cell")
        remark = f"{running} cells" if count == 0 else ""
        fraction = of_floor(place, "resnet20", rate)
        figures[name] = Found(f"{rate:,.0f} images/s", rate, fraction, remark)
    return figures


def together(place: Place, count: int) -> tuple[float, int]:
    """Images per second in sum of cells as `run --cells-per-device` trains them, and their number.

    What the host has ordered is ahead of what is done by a few steps at most, against thousands.
    """
    settle, measure = (2.0, 4.0) if place.size.seconds else (0.0, 0.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = place.plan(folder, count or 64, "{ steps = 9000000 }")
        left = tasks_of(plan, Store(folder / "records", "suite"), device=str(place.device))
        done: dict[str, list[tuple[float, int]]] = collections.defaultdict(list)
        newest = time.perf_counter()
        events = run_cells(lambda _: left.pop(0) if left else None, packing(count, place.device))
        with closing(events):
            for event in events:
                if isinstance(event, Finished):
                    raise RuntimeError(f"a cell ended: {event.record.reason}")
                if not isinstance(event, Progress):
                    continue
                now = time.perf_counter()
                if event.key not in done:
                    newest = now
                    place.wait()
                if now - newest >= settle:
                    done[event.key].append((now, event.done))
                else:
                    done[event.key] = []
                whole = count == 0 or len(done) == count
                since = now - newest >= settle + measure
                if whole and since and all(len(looks) > 1 for looks in done.values()):
                    break
            place.wait()
        rates = [
            (looks[-1][1] - looks[0][1]) * place.size.batch / (looks[-1][0] - looks[0][0])
            for looks in done.values()
        ]
        return sum(rates), len(rates)


def measure_network(place: Place, what: str, model: str, floor: str, side: int) -> Figures:
    """Another network beside the memory's floor."""
    data = cifar(place)
    if side:
        data = pictures(place, min(side, place.size.large), place.recipe)
    live = Live(place, "dense", model, data, place.recipe)
    rate = statistics.median(alternated(place, {what: live})[what])
    figures = {
        what: Found(f"{rate:,.0f} images/s", rate, of_floor(place, floor, rate), held_by(live))
    }
    del live
    if place.cuda:
        torch.cuda.empty_cache()
    return figures


def measure_launches(place: Place) -> Figures:
    """What static masks add to a step."""
    data = cifar(place)
    counts = {}
    for name in ("dense", *STATIC):
        live = Live(place, name, "resnet20", data, place.recipe, steps=1000, kind=Step)
        live.go(3)
        counts[name] = orders(live)
    most = max(counts[name] - counts["dense"] for name in STATIC)
    remark = f"dense {counts['dense']}"
    return {"launches of a step that static masks add": Found(str(most), most, "", remark)}


def orders(live: Live) -> int:
    """Kernels and copies of one eager step; on a CPU, operations that are no views."""
    if not live.place.cuda:
        with Operations() as found:
            live.at_step(lambda compute: compute())
        return found.count
    from torch.profiler import ProfilerActivity, profile

    def profiled(compute: Callable[[], None]) -> int:
        live.place.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            compute()
            live.place.wait()
        return sum(map(on_device, found.events()))

    return int(live.at_step(profiled))


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def measure_waits(place: Place) -> Figures:
    """Methods in whose steps the host waits."""
    data, waiting = cifar(place), []
    for name in place.size.methods:
        if METHODS[name].controls == "filters" or get_method(name)().needs_source:
            continue
        live = Live(place, name, "resnet20", data, place.recipe, steps=1000, kind=Step)
        live.go(1)
        if live.at_step(functools.partial(waits, place)):
            waiting.append(name)
    found = f"{len(waiting)} {', '.join(waiting)}".strip()
    return {"methods whose steps wait for the device": Found(found, len(waiting))}


def waits(place: Place, compute: Callable[[], None]) -> bool:
    """Whether the host does."""
    try:
        if not place.cuda:
            with NoWaiting():
                compute()
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it does not find every wait
            torch.cuda.set_sync_debug_mode("error")
        try:
            compute()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    except (RuntimeError, AssertionError):
        return True
    return False


def measure_ranking(place: Place) -> Figures:
    """A global mask update, and selections beside it."""
    size, layers = place.size.weights, 29
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(size, generator=generator).to(place.device)
    weights = torch.split(flat, -(-size // layers))
    masks = [torch.empty_like(weight) for weight in weights]
    keep = size // 10

    def update() -> None:
        write_top(masks, torch._foreach_abs(list(weights)), keep)

    scores = flat.abs()
    contestants_: dict[str, Callable[[], object]] = {
        "global mask update of 23M weights": update,
        "k-th largest of 23M": lambda: kth_largest(scores, keep),
        "k-th largest of 23M, torch.topk": lambda: scores.topk(keep),
        "k-th largest of 23M, torch.sort": lambda: scores.sort(),
        "k-th largest of 23M, torch.kthvalue": lambda: scores.kthvalue(size - keep + 1),
    }
    taken: dict[str, list[float]] = {name: [] for name in contestants_}
    for number in range(place.size.rounds + 1):
        for name, work in contestants_.items():
            seconds = seconds_of(place, work)
            if number:
                taken[name].append(seconds)
    assert sum(int(mask.sum()) for mask in masks) == keep
    own = statistics.median(taken["k-th largest of 23M"])
    figures = {}
    for name, times in taken.items():
        middle = statistics.median(times)
        update_ = name.startswith("global")
        fraction = (
            f"{5e-3 / middle:.1f} of the aim" if update_ else f"{middle / own:.1f} times ours"
        )
        figures[name] = Found(f"{1e3 * middle:.2f} ms", middle, fraction)
    return figures


def measure_outside(place: Place) -> Figures:
    """What a cell costs besides its steps: a short one, measured whole and less its steps.

    overhead = (seconds of the cell - steps * seconds of a step) / (seconds of 300 epochs of steps)
    """
    short = place.size.short
    live = Live(place, "dense", "resnet20", cifar(place), place.recipe)
    live.go(10)
    per_step = live.time_of(short) / short
    taken, begun = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = place.plan(folder, place.size.rounds + 1, f"{{ steps = {short} }}")
        for task in tasks_of(plan, Store(folder / "records", "suite"), device=str(place.device)):
            place.wait()
            started_at = time.perf_counter()
            left = [task]
            events = run_cells(lambda _, left=left: left.pop() if left else None, Fixed(1))  # type: ignore[misc]
            ends = [event for event in events if isinstance(event, Finished)]
            taken.append(time.perf_counter() - started_at)
            if ends[0].record.status == "failed":
                raise RuntimeError(ends[0].record.reason)
            begun.append(first_step(place, task))
    whole = 300 * (EPOCH // place.size.batch) * per_step
    extra = statistics.median(taken[1:]) - short * per_step
    start = statistics.median(begun[1:])
    return {
        "ResNet-20 of 300 epochs, outside of steps": Found(
            f"{extra / whole:.2%}",
            extra / whole,
            f"{extra / whole / 0.03:.2f} of what is allowed",
            f"{extra:.2f} s beside {whole:.0f} s, from a cell of {short} steps",
        ),
        "a warm process begins a cell": Found(f"{1e3 * start:.0f} ms", start),
    }


def first_step(place: Place, task: Any) -> float:
    """Seconds until the first step of a cell is due."""
    stream = torch.cuda.Stream(place.device) if place.cuda else None
    place.wait()
    started_at = time.perf_counter()
    with torch.cuda.stream(stream) if stream else nullcontext(), closing(moments(task)) as found:
        next(found)
        return time.perf_counter() - started_at


def measure_methods(place: Place, model: str, title: str, steps: int) -> Figures:
    """Steps of methods beside dense ones, their mask updates included."""
    figures, rounds, data = {}, place.size.rounds, cifar(place)
    steps = min(steps, place.size.steps)
    names = ("dense", *STATIC, *DYNAMIC, *NOISY)
    lives = {n: Live(place, n, model, data, place.recipe, steps=steps) for n in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name, live in lives.items():
            seconds = live.time_of(steps // (rounds + 2))
            if number:
                taken[name].append(seconds)
    for name in names[1:]:
        more = 100 * (ratio(taken, name, "dense") - 1)
        bound = BOUNDS.get(name)
        fraction = f"{more / bound:.2f} of what is allowed" if bound else ""
        reason = getattr(lives[name].trainer.hot, "reason", "") if place.cuda else ""
        figures[f"{title}, {name} more than dense"] = Found(
            f"{more:+.1f} %", more, fraction, reason
        )
    return figures


def measure_peer(place: Place) -> Figures:
    """One cell beside open_lth's loader alone, which its training cannot be faster than."""
    if place.open_lth is None:
        raise NotHere("no checkout of open_lth: --open-lth DIR")
    if not place.real:
        raise NotHere("no CIFAR-10: --data DIR")
    live = Live(place, "dense", "resnet20", cifar(place), place.recipe)
    loop = functools.partial(peer_loader, data=place.data, checkout=place.open_lth, workers=16)
    seconds = max(place.size.seconds, 0.1)
    pairs = []
    with started(loop) as peer:
        for number in range(place.size.rounds + 1):
            pair = live.rate(seconds), peer(3 * seconds)
            if number:
                pairs.append(pair)
    found = statistics.median(own / other for own, other in pairs)
    rate = statistics.median(other for _, other in pairs)
    return {
        "ResNet-20, one cell / open_lth's loader of 16 workers": Found(
            f"{found:.1f} times", found, f"{found / 10:.2f} of the aim", f"it: {rate:,.0f} images/s"
        )
    }


def measure_accuracy(place: Place) -> Figures:
    """Dense ResNet-20 at the paper's length."""
    if not place.real:
        raise NotHere("no CIFAR-10: --data DIR")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = place.plan(folder, 1, f"{{ epochs = {place.size.epochs} }}")
        changes: dict[str, Any] = {"device": str(place.device), "ways": Ways()}
        # A slow device would take hours; what is left undone is said.
        deadline = time.time() + 240
        left = tasks_of(plan, Store(folder / "records", "suite"), deadline=deadline, **changes)
        for event in run_cells(lambda _: left.pop() if left else None, Fixed(1)):
            if isinstance(event, Stopped):
                raise NotHere(f"{event.done} steps done after 240 s")
            if isinstance(event, Finished):
                if event.record.top1 is None:
                    raise RuntimeError(event.record.reason)
                top1 = event.record.top1
                seconds = f"{event.record.times.train_seconds:.0f} s of training"
                what = "dense ResNet-20 of 300 epochs, test accuracy"
                return {what: Found(f"{top1:.2f} %", top1, f"{top1 - 92:+.2f} points", seconds)}
    raise RuntimeError("the cell gave no record")


def names_of(title: str) -> Iterator[tuple[str, str]]:
    """Figures of methods, and their aims."""
    for name in (*STATIC, *DYNAMIC, *NOISY):
        aim = f"{BOUNDS[name]:g} % at most" if name in BOUNDS else "said"
        yield f"{title}, {name} more than dense", aim


HALF = "half of the floor in sum"

MEASURES: Sequence[tuple[Callable[[Place], Figures], dict[str, str]]] = (
    (measure_bandwidth, {"memory bandwidth, by a copy": ""}),
    (
        measure_one_cell,
        {
            "ResNet-20, one cell": "",
            "ResNet-20, captured / its own eager loop": "2.5 times",
        },
    ),
    (
        measure_compiled,
        {f"{title}, torch.compile on / off": "" for title in ("ResNet-20", "WRN-28-2")},
    ),
    (measure_peer, {"ResNet-20, one cell / open_lth's loader of 16 workers": "10 times"}),
    (
        measure_side_by_side,
        {
            "ResNet-20, 1 cell, in sum": "",
            **{f"ResNet-20, {count} cells, in sum": "" for count in (2, 4, 8)},
            "ResNet-20, 16 cells, in sum": HALF,
            "ResNet-20, as many cells as fit, in sum": HALF,
        },
    ),
    (
        functools.partial(
            measure_network, what="WRN-28-2, one cell", model="wrn_28_2", floor="wrn_28_2", side=0
        ),
        {"WRN-28-2, one cell": ""},
    ),
    *(
        (
            functools.partial(
                measure_network,
                what=f"ResNet-50 at {side}x{side}, one cell",
                model="timm:resnet50",
                floor=f"resnet50 at {side}",
                side=side,
            ),
            {f"ResNet-50 at {side}x{side}, one cell": ""},
        )
        for side in (32, 224)
    ),
    (measure_launches, {"launches of a step that static masks add": "2 at most"}),
    (measure_waits, {"methods whose steps wait for the device": "0"}),
    (
        measure_ranking,
        {
            "global mask update of 23M weights": "5 ms at most",
            "k-th largest of 23M": "",
            "k-th largest of 23M, torch.topk": "",
            "k-th largest of 23M, torch.sort": "",
            "k-th largest of 23M, torch.kthvalue": "",
        },
    ),
    (
        measure_outside,
        {
            "ResNet-20 of 300 epochs, outside of steps": "3 % at most",
            "a warm process begins a cell": "50 ms at most",
        },
    ),
    *(
        (
            functools.partial(measure_methods, model=model, title=title, steps=steps),
            dict(names_of(title)),
        )
        for model, title, steps in (("resnet20", "ResNet-20", 4000), ("wrn_28_2", "WRN-28-2", 2000))
    ),
    (measure_accuracy, {"dense ResNet-20 of 300 epochs, test accuracy": "92.0 %"}),
)
"""What is measured, in this order: functions, and the aims of the figures that they give."""


def measured(
    place: Place, measures: Sequence[tuple[Callable[[Place], Figures], dict[str, str]]] = MEASURES
) -> Iterator[tuple[str, str, Found | str]]:
    """Every figure: its name, its aim, and what was found or why there is nothing.

    An error costs the figures of one function, and is told.
    """
    for measure, aims in measures:
        started_at = time.perf_counter()
        missing, found = "", {}
        try:
            found = measure(place)
        except NotHere as reason:
            missing = f"not run: {reason}"
        except Exception as error:
            missing = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        print(f"{next(iter(aims))}: {time.perf_counter() - started_at:.0f} s", flush=True)
        for name in [*aims, *(name for name in found if name not in aims)]:
            yield (
                name,
                aims.get(name, ""),
                found.get(name, missing or "not run: not on this device"),
            )
