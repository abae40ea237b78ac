"""How masks settle, and how many weights each layer keeps: a chart for each method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.record import MaskUpdate, Record
from reports.aggregate import Results, Row
from reports.by_sparsity import sparsity_text
from reports.chart import Chart, Series, curve, file_name, seeds_text
from reports.settings import left_out, lines, settings

TRAINING = "Training done (% of the steps)"

Points = dict[float, float]
"""x -> y, of one record."""


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one chart.

    Attributes:
        about: which method and setting they are of.
        rows: by their names in the legend.
        left_out: notes on what is not drawn.
    """

    about: str
    rows: dict[str, Row]
    left_out: list[str]

    @property
    def notes(self) -> tuple[str, ...]:
        """Seeds and bars, and what is not drawn."""
        return (seeds_text(len(own(row)) for row in self.rows.values()), *self.left_out)


def mask_convergence(results: Results) -> tuple[Chart, ...]:
    """Share of weights whose mask changes later on (Lin et al., 2020, figure 4). Full records."""
    label = "Weights whose mask still changes (% of the prunable)"
    return over_training(results, "Mask convergence", label, settling, settles)


def mask_overlap(results: Results) -> tuple[Chart, ...]:
    """Overlap of each mask with the one before (Lin et al., 2020, figure 7). Full records."""
    label = "Overlap (IoU) of the masks before and after an update"
    return over_training(
        results, "Mask overlap", label, each_update(lambda update: update.iou), updates
    )


def mask_flips(results: Results) -> tuple[Chart, ...]:
    """Share of weights whose mask each update changes. Full records."""
    label = "Weights whose mask an update changes (% of the prunable)"
    flips = each_update(lambda update: 100 * update.flipped)
    return over_training(results, "Mask flips", label, flips, updates)


def layer_density(results: Results) -> tuple[Chart, ...]:
    """Weights left in each prunable layer (Lin et al., 2020, figure 14). Full records."""
    found = per_method(results, lambda record: any(layer.prunable for layer in record.layers))
    charts = []
    for group in found:
        records = [record for row in group.rows.values() for record in own(row)]
        names = list(dict.fromkeys(layer for record in records for layer in densities(record)))
        place = {name: float(number) for number, name in enumerate(names)}
        series = tuple(
            averaged(
                label,
                [{place[n]: y for n, y in densities(record).items()} for record in own(row)],
            )
            for label, row in group.rows.items()
        )
        charts.append(
            Chart(
                f"Density of each layer: {group.about}",
                "Prunable layer, from the image to the output",
                "Weights left (% of the layer)",
                series,
                x_names=tuple(name.removesuffix(".weight") for name in names),
                notes=group.notes,
                name=file_name("layer-density", group.about),
            )
        )
    return tuple(charts)


def over_training(
    results: Results,
    what: str,
    y_label: str,
    value: Callable[[Record], Points],
    known: Callable[[Record], bool],
) -> tuple[Chart, ...]:
    """A chart of each method whose records have this value.

    Args:
        results: of a suite.
        what: is shown.
        y_label: with its unit.
        value: of one record, at each per cent of the training where it has one.
        known: whether a record has any.
    """
    return tuple(
        Chart(
            f"{what}: {group.about}",
            TRAINING,
            y_label,
            tuple(averaged(label, list(map(value, own(row)))) for label, row in group.rows.items()),
            notes=group.notes,
            name=file_name(what.lower().replace(" ", "-"), group.about),
        )
        for group in per_method(results, known)
    )


def settling(record: Record) -> Points:
    """Weights whose mask changes after each fiftieth of the training; before the first, all."""
    assert record.counts is not None
    changes, prunable = record.last_changes, record.counts.prunable
    parts = len(changes)
    return {100 * done / parts: 100 * sum(changes[done:]) / prunable for done in range(parts + 1)}


def settles(record: Record) -> bool:
    """Whether it was kept when masks changed last."""
    return bool(record.last_changes) and record.counts is not None


def updates(record: Record) -> bool:
    """Whether updates of the masks were kept."""
    return bool(record.mask_updates)


def each_update(value: Callable[[MaskUpdate], float]) -> Callable[[Record], Points]:
    """A value of each update that a record keeps."""
    return lambda record: {
        100 * update.step / record.steps: value(update) for update in record.mask_updates
    }


def densities(record: Record) -> dict[str, float]:
    """Weights left in per cent of each prunable layer, by its name."""
    return {
        layer.name: 100 * layer.nonzero / layer.weights for layer in record.layers if layer.prunable
    }


def own(row: Row) -> list[Record]:
    """Records whose layers and updates are the row's.

    A round of a lottery ticket and a narrower network stand for another sparsity than their cell's.
    """
    return [record for record in row.ok if record.spec.sparsity == row.spec.sparsity]


def per_method(results: Results, known: Callable[[Record], bool]) -> list[Group]:
    """The rows that each chart shows.

    As in the paper a chart holds one method, with a curve for each sparsity; where a setting has
    one sparsity only, it holds all methods.

    Args:
        results: of a suite.
        known: whether a record has what is shown.
    """
    groups = []
    for about, rows in settings(results.rows).items():
        shown = {label: having(found, known) for label, found in lines(rows).items()}
        kept = {label: found for label, found in shown.items() if found}
        if len({sparsity_text(row) for found in kept.values() for row in found}) == 1:
            named = {label: found[0] for label, found in kept.items()}
            groups.append(Group(about, named, left_out(rows)))
            continue
        for label, found in kept.items():
            named = {asked(row): row for row in found}
            groups.append(Group(f"{label}, {about}", named, left_out(lines(rows)[label])))
    return groups


def having(rows: Sequence[Row], known: Callable[[Record], bool]) -> list[Row]:
    """Rows whose records all have what is shown."""
    return [row for row in rows if own(row) and all(map(known, own(row)))]


def asked(row: Row) -> str:
    """The row's name among those of one method."""
    text = sparsity_text(row)
    return text if row.spec.sparsity is None and text == "penalty" else f"{text} % sparsity"


def averaged(label: str, found: Sequence[Points]) -> Series:
    """The mean over records, at the places that all of them have."""
    places = set.intersection(*map(set, found))
    return curve(label, [(x, [points[x] for points in found]) for x in places])
