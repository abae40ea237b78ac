"""The methods: one paper, one file. The table below names them without importing torch."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from methods.api import Controls, SparsityMethod

GROUP = "sparsebench.methods"
"""Entry points by which other packages offer methods: name -> module:Class."""


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method as `list` shows it.

    Attributes:
        target: module and class in it; the table's modules are in this package.
        paper: who and when.
        controls: what a cell's sparsity means; the class says the same, and a test compares them.
        summary: one line.
    """

    target: str
    paper: str
    controls: Controls
    summary: str


STAND_INS: dict[str, MethodInfo] = {
    "small_dense": MethodInfo(
        "dense:Dense", "", "density", "a dense network as small as the sparse one: the control"
    ),
}
"""Names that a suite resolves to cells of another method."""

METHODS: dict[str, MethodInfo] = {
    "dense": MethodInfo("dense:Dense", "", "none", "no sparsity: the baseline"),
    "one_shot": MethodInfo(
        "one_shot:OneShotMagnitude",
        "Han 2015",
        "density",
        "train, prune the smallest magnitudes once, fine-tune",
    ),
    "gradual": MethodInfo(
        "gradual:GradualMagnitude",
        "Zhu & Gupta 2017",
        "density",
        "prune the smallest magnitudes along a cubic ramp while training",
    ),
    "lottery_ticket": MethodInfo(
        "lottery:LotteryTicket",
        "Frankle & Carbin 2019",
        "density",
        "train, prune, rewind, and again, in rounds",
    ),
    "ticket_control": MethodInfo(
        "lottery:TicketControl",
        "Frankle & Carbin 2019",
        "density",
        "a ticket's masks on other weights, or shuffled: its controls",
    ),
    "random": MethodInfo(
        "random_pruning:RandomPruning", "", "density", "random masks at initialisation: the control"
    ),
    "magnitude_at_init": MethodInfo(
        "magnitude_at_init:MagnitudeAtInit",
        "Frankle & Carbin 2019",
        "density",
        "keep the largest initial weights: the control",
    ),
    "snip": MethodInfo(
        "snip:SNIP", "Lee 2019", "density", "prune at initialisation by connection sensitivity"
    ),
    "grasp": MethodInfo(
        "grasp:GraSP",
        "Wang 2020",
        "density",
        "prune at initialisation, keeping the gradient's flow",
    ),
    "synflow": MethodInfo(
        "synflow:SynFlow",
        "Tanaka 2020",
        "density",
        "prune at initialisation in rounds, without data",
    ),
    "set": MethodInfo(
        "sparse_evolution:SET",
        "Mocanu 2018",
        "density",
        "drop the smallest weights, grow at random, while training",
    ),
    "rigl": MethodInfo(
        "rigl:RigL",
        "Evci 2020",
        "density",
        "drop the smallest weights, grow where the gradient is largest",
    ),
    "sparse_momentum": MethodInfo(
        "sparse_momentum:SparseMomentum",
        "Dettmers & Zettlemoyer 2019",
        "density",
        "drop the smallest weights, grow where the momentum is largest, across layers",
    ),
    "dsr": MethodInfo(
        "dsr:DSR",
        "Mostafa & Wang 2019",
        "density",
        "drop below an adaptive threshold, grow at random where much is left",
    ),
    "deepr": MethodInfo(
        "deepr:DeepR",
        "Bellec 2018",
        "density",
        "replace each connection that changes sign by a random one, every step",
    ),
    "soft_deepr": MethodInfo(
        "soft_deepr:SoftDeepR",
        "Bellec 2018",
        "penalty",
        "dormant connections walk at random until they open again",
    ),
    "l0": MethodInfo(
        "l0:L0",
        "Louizos 2018",
        "penalty",
        "hard-concrete gates with a price on those expected to be open",
    ),
    "variational_dropout": MethodInfo(
        "variational:VariationalDropout",
        "Molchanov 2017",
        "penalty",
        "learn each weight's noise, drop the noisiest",
    ),
    "dpf": MethodInfo(
        "dpf:DPF",
        "Lin 2020",
        "density",
        "mask the forward pass, update all the weights, re-rank every 16 steps",
    ),
    "dpf_filters": MethodInfo(
        "dpf_filters:DPFFilters",
        "Lin 2020",
        "filters",
        "the same for whole filters, ranked across layers",
    ),
    "sfp": MethodInfo(
        "sfp:SFP",
        "He 2018",
        "filters",
        "zero each layer's smallest filters every epoch, let them train on",
    ),
    "granet": MethodInfo(
        "granet:GraNet",
        "Liu 2021",
        "density",
        "prune along a cubic ramp, rewire by the gradient on the way",
    ),
    "ac_dc": MethodInfo("ac_dc:ACDC", "Peste 2021", "density", "alternate sparse and dense phases"),
    "top_kast": MethodInfo(
        "top_kast:TopKAST",
        "Jayakumar 2020",
        "density",
        "forward through the largest weights, update a larger set",
    ),
    "str": MethodInfo(
        "soft_threshold:STR", "Kusupati 2020", "penalty", "learn a soft threshold for each layer"
    ),
    "mest": MethodInfo(
        "mest:MEST",
        "Yuan 2021",
        "density",
        "drop by weight and gradient, grow at random, ever less",
    ),
}


def names() -> list[str]:
    """Every method that a suite can name: the table's, and those of installed packages."""
    return [*METHODS, *_entry_points(tuple(sys.path))]


def find_info(name: str) -> MethodInfo | None:
    """What is known of a method; None where no method has that name.

    The table's names go first and load nothing. Those of installed packages load the class.

    Raises:
        ValueError: an installed package offers the name, and what it offers cannot be used.
    """
    if name in METHODS:
        return METHODS[name]
    if name not in _entry_points(tuple(sys.path)):
        return None
    kind = get_method(name)
    doc = kind.__doc__ or ""
    # A dataclass without a docstring gets its constructor's signature for one.
    summary = "" if doc.startswith(f"{kind.__name__}(") else doc.strip().partition("\n")[0]
    return MethodInfo(f"{kind.__module__}:{kind.__name__}", kind.paper, kind.controls, summary)


def get_method(name: str) -> type[SparsityMethod]:
    """The class of a method: of the table, or an entry point `sparsebench.methods`.

    Raises:
        KeyError: no method has that name.
        ValueError: an installed package offers the name, and what it offers cannot be used.
    """
    if name in METHODS:
        module, _, attribute = METHODS[name].target.partition(":")
        found: type[SparsityMethod]
        found = getattr(importlib.import_module(f"methods.{module}"), attribute)
        return found
    first, *others = _entry_points(tuple(sys.path))[name]
    place = f"method {name!r} of {_package(first)}"
    if others:
        raise ValueError(f"{place} is offered by {_package(others[0])} too: uninstall one of them")
    try:
        loaded = first.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{place} cannot be loaded from {first.value} ({reason})") from error
    from methods.api import Controls, SparsityMethod

    if not (isinstance(loaded, type) and issubclass(loaded, SparsityMethod)):
        raise ValueError(f"{place}: {first.value} is no subclass of methods.api.SparsityMethod")
    if loaded.controls not in get_args(Controls):
        allowed = ", ".join(get_args(Controls))
        raise ValueError(f"{place}: controls = {loaded.controls!r}; allowed: {allowed}")
    return loaded


def conflicts() -> list[str]:
    """In words, the entry points that are not used because the table has their name."""
    points = importlib.metadata.entry_points(group=GROUP)
    return [
        f"method {point.name!r} of {_package(point)} is not used: the table has one of that name"
        for point in points
        if point.name in METHODS | STAND_INS
    ]


@functools.lru_cache(maxsize=4)
def _entry_points(path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Methods of installed packages, by name; nothing of them is loaded.

    Args:
        path: `sys.path`, on which packages are looked for.
    """
    found: dict[str, list[EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        if point.name not in METHODS | STAND_INS:
            found.setdefault(point.name, []).append(point)
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an installed package"
