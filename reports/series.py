"""Every kind of figure, as plain data: for matplotlib here, and for the page.

Each function takes the results of one suite and gives a chart for each setting, or for each method
of it; none where the records do not hold what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.errors import RecordError, UnknownName
from bench.store import Store
from reports.aggregate import Results, aggregate
from reports.chart import Chart, Level, Series
from reports.mask_curves import layer_density, mask_convergence, mask_flips, mask_overlap
from reports.ticket_curves import tickets_accuracy, tickets_early_stopping
from reports.tradeoffs import (
    accuracy_by_macs,
    accuracy_by_parameters,
    accuracy_by_sparsity,
    accuracy_by_training_macs,
)

__all__ = [
    "KINDS",
    "Chart",
    "Kind",
    "Level",
    "Series",
    "accuracy_by_macs",
    "accuracy_by_parameters",
    "accuracy_by_sparsity",
    "accuracy_by_training_macs",
    "charts",
    "layer_density",
    "mask_convergence",
    "mask_flips",
    "mask_overlap",
    "tickets_accuracy",
    "tickets_early_stopping",
]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of figure.

    Attributes:
        make: its charts.
        needs: what a record must hold for it.
        full: it reads what `bench.store.BULK` names, so `records(brief=True)` does not do.
    """

    make: Callable[[Results], tuple[Chart, ...]]
    needs: str
    full: bool = False


PRUNED = "the accuracy of a pruned network"
UPDATES = "mask updates (no method trains its masks, or they are from before these were kept)"

KINDS: dict[str, Kind] = {
    "sparsity": Kind(accuracy_by_sparsity, PRUNED),
    "parameters": Kind(accuracy_by_parameters, PRUNED),
    "macs": Kind(accuracy_by_macs, PRUNED),
    "training-macs": Kind(
        accuracy_by_training_macs, "training MACs (they are from before these were counted)"
    ),
    "tickets-accuracy": Kind(tickets_accuracy, "rounds of a lottery ticket"),
    "tickets-early-stopping": Kind(
        tickets_early_stopping,
        "rounds of a lottery ticket with a validation loss (the recipe holds no image out)",
    ),
    "mask-convergence": Kind(mask_convergence, UPDATES, full=True),
    "mask-overlap": Kind(mask_overlap, UPDATES, full=True),
    "mask-flips": Kind(mask_flips, UPDATES, full=True),
    "layer-density": Kind(layer_density, "layers of a pruned network", full=True),
}


def charts(source: Store, kinds: Sequence[str] = ()) -> tuple[list[Chart], list[str]]:
    """Charts of a stored suite.

    Args:
        source: folder of its records.
        kinds: names in `KINDS`; none: all that its records can show.

    Returns:
        The charts, and a line for each kind that the records cannot show; no chart at all where
        none was named and they can show none.

    Raises:
        UnknownName: there is no such kind.
        RecordError: a kind that was named cannot be shown; a record is damaged.
    """
    for name in kinds:
        if name not in KINDS:
            raise UnknownName("--kind", "kind of figure", name, KINDS)
    wanted = {name: KINDS[name] for name in kinds or KINDS}
    brief = not any(kind.full for kind in wanted.values())
    results = aggregate(source.manifest(), source.records(brief=brief))
    made = {name: kind.make(results) for name, kind in wanted.items()}
    lacking = [
        f"{source.folder}: no figure {name!r}: the records do not hold {wanted[name].needs}."
        for name, found in made.items()
        if not found
    ]
    if lacking and kinds:
        raise RecordError(lacking[0])
    return [chart for found in made.values() for chart in found], lacking
