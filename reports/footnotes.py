"""What stands below a table: its conditions, its marks, and every cell that went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from bench.record import Environment, Record
from bench.spec import CellSpec, Options
from reports.aggregate import (
    Results,
    Row,
    asked_text,
    budget_text,
    judged,
    model_text,
    name_text,
    options_text,
)

CONDITIONS: dict[str, Callable[[CellSpec], str]] = {
    # Contents are hashed into the key, so two rows may differ in them under one name.
    "data set": lambda spec: f"{spec.dataset} ({spec.data_hash})",
    "recipe": lambda spec: f"{spec.recipe} ({spec.recipe_hash})",
    "budget": budget_text,
    "prunable": lambda spec: spec.prunable,
    "initial weights": lambda spec: spec.init,
}
"""What the rows of a table should share: said once below it, or a column where they differ."""

ENVIRONMENT: dict[str, Callable[[Environment], str]] = {
    "devices": lambda where: where.device,
    "threads": lambda where: str(where.threads),
    "torch": lambda where: where.torch,
    "python": lambda where: where.python,
    "sparsebench": lambda where: where.sparsebench,
    "commits": lambda where: where.commit + (" + local changes" if where.dirty else ""),
}

MARKS = {
    "diverged": "`*`: this many seeds diverged; they are not in the mean.",
    "invalid": "`invalid`: this many seeds broke a rule of measurement; they are not in the mean.",
}


def footnotes(
    results: Results, attempts: Sequence[Record], *, accuracy_only: bool = False
) -> Iterator[str]:
    """What the numbers mean, what they were measured with, and what is wrong with them.

    Args:
        results: of a suite.
        attempts: its failed tries.
        accuracy_only: the table has no times and counts.
    """
    rows = results.rows
    seeds = sorted({spec.seed for row in rows for spec in row.specs})
    yield f"n: seeds with a record; asked for: {', '.join(map(str, seeds)) or 'none'}."
    yield "accuracy: last step on the test set, mean ± standard deviation over seeds."
    if not accuracy_only:
        yield "other columns: mean over the same seeds (over all finished ones where none is ok)."
    yield from shared_conditions(rows)
    yield from environments(rows)
    yield from executions(rows, seconds=not accuracy_only)
    yield from chosen(rows)
    if sources := dict.fromkeys(
        f"{row.label}: {row.source}" for row in rows if row.source and not row.controls_source
    ):
        yield f"starts from the masks of another row: {'; '.join(sources)}."
    if any(row.controls_source for row in rows):
        yield (
            "`NAME: random masks` and `NAME: magnitude masks` (of the largest initial weights) "
            "keep as many weights in each layer as NAME; `NAME: re-initialised` has its masks, and "
            "other initial weights. The multiple of those that start from NAME holds its cost too."
        )
    if against := dict.fromkeys(row.label for row in rows if row.smaller):
        yield f"narrower dense networks, their ratios against the full width: {', '.join(against)}."
    yield from idle(rows)
    if filters := dict.fromkeys(row.label for row in rows if row.of_filters):
        yield (
            f"sparsity asked of filters, not of weights: {', '.join(filters)}; the inputs that a "
            "removed filter no longer feeds still count as left."
        )
    if not accuracy_only:
        yield from counts(rows)
    yield from penalties(rows)
    statuses = {status for row in rows for status in row.statuses}
    yield from (text for status, text in MARKS.items() if status in statuses)
    if "missing" in statuses or any(row.nonzero is None for row in rows):
        yield "`-`: not run, or stopped before it was measured; n shows finished/asked."
    if dead := [f"{name_text(row)}: {', '.join(row.dead)}" for row in rows if row.dead]:
        yield f"dead: emptied layers ({'; '.join(dead)})."
    yield from (f"skipped: {text}" for text in sorted(set(skipped(rows))))
    yield from reasons(rows)
    if attempts:
        tries = plural(len(attempts), "failed attempt")
        yield f"{tries} in `attempts/`; a cell that only failed counts as not run."
        yield from failures(rows, attempts)
    if results.stale:
        verb = "is" if results.stale == 1 else "are"
        records = plural(results.stale, "record")
        yield f"{records} of earlier versions of this suite {verb} not shown."


def counts(rows: Sequence[Row]) -> Iterator[str]:
    """What columns of counts mean that not every reader knows."""
    if any(row.of_filters and row.compact_parameters is not None for row in rows):
        yield "once cut: all weights of the network without its dead channels, zeros included."
    if any(row.effective_sparsity is not None for row in rows):
        yield "effective sparsity: weights on no path from the image to an output count as zeros."
    if any(row.train_macs is not None for row in rows):
        yield (
            "training MACs: multiply-adds of one seed's whole training, forward and backward, if "
            "every zero were skipped; the source's are not in them."
        )


def idle(rows: Iterable[Row]) -> Iterator[str]:
    """One line for the rows of which much of what is kept does nothing."""
    if found := [f"{name_text(row)}: {row.idle:,.0f}" for row in rows if row.mostly_idle]:
        why = "as they decayed or were never trained (where they are over a tenth of the kept)"
        yield f"kept, but all but zero, {why}: {'; '.join(found)} weights."


def penalties(rows: Sequence[Row]) -> Iterator[str]:
    """What is asked of methods whose penalty decides the sparsity."""
    asked = {asked_text(row.spec) for row in rows}
    if any(text.endswith("top-k") for text in asked):
        yield (
            "`by top-k`: a penalty trains; a last ranking by its own importance lands there. What "
            "it brings back may be all but zero: then several sparsities are one network."
        )
    if "penalty" in asked:
        yield "`penalty`: no sparsity can be asked for; the strength of the penalty decides it."


def chosen(rows: Sequence[Row]) -> Iterator[str]:
    """One line for the options that suites have set."""
    if texts := [f"{label}: {text}" for label, text in labelled_options(rows)]:
        yield f"options beside the defaults: {'; '.join(texts)}."


def labelled_options(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Label and options of each row that has some; those of a grid's label are said already.

    What all of a grid share stands under its name alone.
    """
    grids: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        text = options_text(unsaid_options(row.label, row.spec))
        grids.setdefault(row.label.partition("[")[0], {}).setdefault(row.label, set()).add(text)
    pairs = set()
    for name, labels in grids.items():
        texts = set().union(*labels.values())
        shared = len(texts) == 1
        pairs |= {(name if shared else one, t) for one, own in labels.items() for t in own}
    yield from sorted((label, text) for label, text in pairs if text)


def unsaid_options(label: str, spec: CellSpec) -> Options:
    """Options of a cell that its label, such as `rigl[drop_fraction=0.2]`, does not name."""
    said = label.partition("[")[2].rstrip("]").split(", ")
    return tuple(option for option in spec.options if options_text((option,)) not in said)


def shared_conditions(rows: Sequence[Row]) -> Iterator[str]:
    """One line for what was asked of all rows alike."""
    if not rows:
        return
    shared = {n: text(rows[0].spec) for n, text in CONDITIONS.items() if not varies(rows, text)}
    if shared.get("initial weights") == "random":  # what everybody expects
        del shared["initial weights"]
    if shared:
        yield "; ".join(f"{name}: {text}" for name, text in shared.items()) + "."


def environments(rows: Iterable[Row]) -> Iterator[str]:
    """One line for where the records come from."""
    places = [record.environment for row in rows for record in row.finished]
    if places:
        values = {name: sorted(set(map(text, places))) for name, text in ENVIRONMENT.items()}
        yield "; ".join(f"{name}: {', '.join(found)}" for name, found in values.items()) + "."


def executions(rows: Sequence[Row], *, seconds: bool = True) -> Iterator[str]:
    """One line for each way in which steps were not computed one after the other, alone.

    Args:
        rows: of a table.
        seconds: the table has some, so that what concerns them is said too.
    """
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for record in row.finished:
            for text in execution_texts(record):
                found.setdefault(text, {})[row.label] = None
    labels = {row.label for row in rows if row.finished}
    for text, those in found.items():
        if text.startswith("seconds") and not seconds:
            continue
        yield f"{text}: {'all' if those.keys() == labels else ', '.join(those)}."


def execution_texts(record: Record) -> Iterator[str]:
    """What was special about how a cell was computed; nothing where none was."""
    how = record.execution
    if how is None:
        yield "seconds of records that do not say whether other cells ran beside"
        return
    if how.timing == "shared":
        yield (
            "seconds beside other cells on the same device, which tell of its load as much as of "
            "the method"
        )
    if how.devices > 1:
        yield f"each cell trained on {how.devices} devices together, whose seconds these are"
    if how.stack > 1:
        yield f"computed {how.stack} cells at a time as one network, whose sums round differently"
    if how.graph:
        yield "steps replayed as a CUDA graph"
    if how.compiled:
        yield "passes made by torch.compile, whose sums round differently"
    for origin in how.before:
        yield f"trained in part by commit {origin}, before it was resumed"


def reasons(rows: Iterable[Row]) -> Iterator[str]:
    """One line for each finished cell whose accuracy does not count."""
    for row in rows:
        for record in row.finished:
            if (status := judged(record)) != "ok":
                # A reason may quote an exception of several lines; a footnote has one.
                reason = " ".join(record.reason.split()) or "no finite accuracy"
                yield f"{name_text(row)}, seed {record.spec.seed}: {status}: {reason}"


def skipped(rows: Iterable[Row]) -> Iterator[str]:
    """Rows, and single seeds of others, that cannot be run, with the reason."""
    for row in rows:
        if row.skipped:
            yield f"{row.label}, {model_text(row.spec)}: {row.skipped}"
        else:
            for spec, reason in zip(row.specs, row.skips, strict=False):
                if reason:
                    yield f"{name_text(row)}, seed {spec.seed}: {reason}"


def failures(rows: Iterable[Row], attempts: Iterable[Record]) -> Iterator[str]:
    """One line for each cell that only failed, with the reason of its last try."""
    last = {record.spec.key: record for record in attempts}
    for row in rows:
        for spec, key, record in zip(row.specs, row.keys, row.records, strict=True):
            if record is None and key in last:
                reason = " ".join(last[key].reason.split())
                yield f"{name_text(row)}, seed {spec.seed}: {last[key].status}: {reason}"


def varies(rows: Iterable[Row], text: Callable[[CellSpec], str]) -> bool:
    """Whether rows differ in a condition."""
    return len({text(row.spec) for row in rows}) > 1


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
