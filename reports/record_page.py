"""One record as markdown: what was asked, what was measured, where, and layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

from tabulate import tabulate

from bench.record import Counts, PhaseResult, Record
from reports.aggregate import budget_text
from reports.footnotes import execution_texts


def record_page(record: Record) -> str:
    """Everything in a record but its curve, for people."""
    lines = [line for group in facts(record).values() for line in group]
    parts = [
        f"## {record.spec.slug}",
        tabulate(lines, headers=("field", "value"), tablefmt="github", disable_numparse=True),
    ]
    if any(phase.status for phase in record.phases):
        parts.append(_rounds(record))
    if record.layers:
        parts.append(_layers(record))
    if record.traceback:
        parts.append(record.traceback)
    return "\n\n".join(parts)


def facts(record: Record) -> dict[str, list[tuple[str, str]]]:
    """Fields and their texts: what was asked, what was measured, and where."""
    return {
        "asked": [*_asked(record)],
        "measured": [*_measured(record)],
        "where": [*_where(record)],
    }


def _asked(record: Record) -> Iterator[tuple[str, str]]:
    spec = record.spec
    yield "suite, label", f"{record.suite}, {record.label}"
    yield "method", _with_options(spec.method, spec.options)
    yield "model", _with_options(spec.model, spec.model_options)
    yield "data set", f"{spec.dataset} ({spec.data_hash})"
    yield "recipe", f"{spec.recipe} ({spec.recipe_hash})"
    yield "budget", budget_text(spec)
    yield "sparsity asked", "set by a penalty" if spec.sparsity is None else f"{spec.sparsity:g}"
    yield "prunable", spec.prunable
    if spec.source is not None:
        yield "source", f"the masks of cell {spec.source}"
    yield "seed", str(spec.seed)


def _measured(record: Record) -> Iterator[tuple[str, str]]:
    yield "status", f"{record.status}{': ' if record.reason else ''}{record.reason}"
    if record.top1 is not None:
        yield "top-1, last step, test set", f"{record.top1:.2f} %"
    if record.top5 is not None:
        yield "top-5", f"{record.top5:.2f} %"
    if record.counts is not None:
        yield from _counted(record.counts)
    if record.expected is not None:
        l0, macs = record.expected.l0, record.expected.macs
        yield "expected under the gates", f"L0 norm {l0:,.1f}, MACs {macs:,.0f}"
    if record.mask_updates:
        yield "last mask updates", _dynamics(record)
    yield "steps", f"{record.steps:,}, and {record.extra_batches:,} extra batches"
    yield "budget multiple", f"{record.multiple:.4f}"
    yield "phases", ", ".join(map(_phase, record.phases))
    times = record.times
    yield "train seconds", f"{times.train_seconds:.1f}, mask updates {times.update_seconds:.2f}"
    yield "evaluation seconds", f"{times.eval_seconds:.2f}"


def _phase(phase: PhaseResult) -> str:
    density = "" if phase.density is None else f", mask density {phase.density:.4g}"
    return f"{phase.name} ({phase.steps:,} steps{density})"


def _dynamics(record: Record) -> str:
    last = record.mask_updates[-1]
    return (
        f"at step {last.step:,}: {100 * last.flipped:.3g} % flipped, IoU {last.iou:.4f}, "
        f"delta {last.delta:.4g}"
    )


def _rounds(record: Record) -> str:
    """Phases that are results of their own: the rounds of a lottery ticket."""
    rows = [
        (
            phase.name,
            f"{phase.counts.prunable_nonzero:,}" if phase.counts else "",
            "" if phase.top1 is None else f"{phase.top1:.2f}",
            "" if phase.least is None else f"{phase.least.step:,}",
            "" if phase.least is None else f"{phase.least.validation_loss:.4g}",
            "" if phase.least is None or phase.least.top1 is None else f"{phase.least.top1:.2f}",
            " ".join([phase.status or "", phase.reason]).strip(),
        )
        for phase in record.phases
        if phase.status
    ]
    headers = (
        "phase",
        "prunable non-zeros",
        "top-1 % at its end",
        "step of least validation loss",
        "that loss",
        "top-1 % there",
        "status",
    )
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _counted(counts: Counts) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{counts.nonzero:,} of {counts.parameters:,} are not zero"
    target = "" if counts.target_nonzero is None else f", asked for {counts.target_nonzero:,}"
    yield (
        "prunable weights",
        f"{counts.prunable_nonzero:,} of {counts.prunable:,} are not zero{target}",
    )
    yield "reached sparsity", f"{counts.reached_sparsity:.6f}"
    if counts.idle:
        yield "grown, but never trained", f"{counts.idle:,} weights"
    if counts.live is not None:
        yield "on a live path", f"{counts.live:,} prunable weights"
        yield "effective sparsity", f"{counts.effective_sparsity:.6f}"
    yield "MACs A", f"{counts.macs:,} of {counts.dense_macs:,}"
    if counts.live_macs is not None:
        yield "MACs A on live paths", f"{counts.live_macs:,}"
    if counts.elementwise is not None:
        sparse, dense = (macs + counts.elementwise for macs in (counts.macs, counts.dense_macs))
        yield "MACs B", f"{sparse:,} of {dense:,}"
    if counts.compact is not None:
        smaller = counts.compact
        yield (
            "without dead channels",
            f"{smaller.parameters:,} parameters, {smaller.dense_macs:,} MACs A",
        )
    if counts.filters is not None:
        total, asked, left = counts.filters
        yield "filters", f"{left:,} of {total:,} are left, asked for {asked:,}"
    if counts.dead:
        yield "dead: emptied layers", ", ".join(counts.dead)


def _where(record: Record) -> Iterator[tuple[str, str]]:
    place = record.environment
    yield "device", f"{place.device}, {place.threads} CPU threads, {place.platform}"
    yield "versions", f"Python {place.python}, torch {place.torch}, sparsebench {place.sparsebench}"
    yield "commit", f"{place.commit}{' with local changes' if place.dirty else ''}"
    yield "peak memory", f"{place.peak_memory_bytes / 2**20:,.0f} MiB"
    if record.execution is not None:
        yield "computed", "; ".join(execution_texts(record)) or "alone, step by step"
    yield "started", record.times.started
    yield "weights hash", record.weights_hash


def _with_options(name: str, options: tuple[tuple[str, object], ...]) -> str:
    return ", ".join([name, *(f"{option} = {value}" for option, value in options)])


def _layers(record: Record) -> str:
    rows = [
        (
            layer.name,
            "x".join(map(str, layer.shape)),
            f"{layer.nonzero:,}",
            f"{layer.weights:,}",
            f"{layer.nonzero / layer.weights:.4f}" if layer.weights else "",
            f"{layer.macs:,}",
            f"{layer.dense_macs:,}",
            f"{layer.elementwise:,}",
            "" if layer.live is None else f"{layer.live:,}",
            "" if layer.live_units is None else " x ".join(map(str, layer.live_units)),
        )
        for layer in record.layers
    ]
    headers = (
        *("layer", "shape", "non-zeros", "weights", "density", "MACs", "dense MACs"),
        *("B adds", "live", "live outputs x inputs"),
    )
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
