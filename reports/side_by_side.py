"""A comparison as a markdown table with its footnotes, or as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from reports.aggregate import Row, name_text
from reports.compare import Compared, Pair, accuracies_by_seed
from reports.footnotes import (
    CONDITIONS,
    ENVIRONMENT,
    MARKS,
    executions,
    labelled_options,
    plural,
    reasons,
)
from reports.markdown import section
from reports.statistics import Comparison
from reports.suite_table import accuracy, macs, number, parameters, seeds

FIGURES: Mapping[str, Callable[[Row], str]] = {
    "parameters left": parameters,
    "MACs left": macs,
    "training MACs": lambda row: number(row.train_macs, ".3g"),
    "budget multiple": lambda row: number(row.multiple, ".2f"),
}
"""One column each: the text that A and B share, or both."""

ALWAYS = ("method", "sparsity asked %")
"""Fields of a question that are shown though all lines share them."""

NUMBERS = (
    "sparsity asked %",
    "n A",
    "n B",
    "A top-1 %",
    "B top-1 %",
    "B - A",
    "p",
    "Holm",
    *FIGURES,
)

Columns = dict[str, Callable[[Pair], str]]


def side_by_side(found: Compared) -> str:
    """A table with a line for each question that both sides answer."""
    shown = _columns(found.pairs)
    models = {pair.question["model"] for pair in found.pairs}
    about = f", {models.pop()}" if len(models) == 1 else ""
    title = f"A: {found.a.name}, B: {found.b.name} ({found.suite}{about})"
    lines = [[text(pair) for text in shown.values()] for pair in found.pairs]
    return section(title, list(shown), lines, shown.keys() - set(NUMBERS), _notes(found))


def as_data(found: Compared) -> dict[str, Any]:
    """A comparison for programs; accuracies and differences in percent."""
    return {
        "suite": found.suite,
        "a": found.a.name,
        "b": found.b.name,
        "lines": [
            {
                "question": pair.question,
                "a": _figures(pair.a),
                "b": _figures(pair.b),
                "difference": pair.difference,
                "chance": _chance(pair.chance),
                "holm": _chance(pair.corrected),
            }
            for pair in found.pairs
        ],
        "only_a": [name_text(row) for row in found.only_a],
        "only_b": [name_text(row) for row in found.only_b],
        "notes": list(_notes(found)),
    }


def _figures(row: Row) -> dict[str, Any]:
    return {
        "method": row.spec.method,
        "keys": row.keys,
        "statuses": row.statuses,
        "accuracies": accuracies_by_seed(row),
        "top1": row.top1,
        "deviation": row.deviation,
        "parameters_left": row.nonzero,
        "macs_left": row.macs,
        "train_macs": row.train_macs,
        "multiple": row.multiple,
    }


def _chance(test: Comparison | None) -> dict[str, Any] | None:
    return (
        None
        if test is None
        else {"p": test.p, "n": test.n, "kind": test.kind, "reason": test.reason}
    )


def _columns(pairs: Sequence[Pair]) -> Columns:
    """Header and text of each column; a field that all lines share has none."""
    names = pairs[0].question if pairs else ALWAYS
    columns: Columns = {
        name: _of_question(name)
        for name in names
        if name in ALWAYS or len({pair.question[name] for pair in pairs}) > 1
    }
    columns |= {
        "n A": lambda pair: seeds(pair.a),
        "n B": lambda pair: seeds(pair.b),
        "A top-1 %": lambda pair: accuracy(pair.a),
        "B top-1 %": lambda pair: accuracy(pair.b),
        "B - A": lambda pair: number(pair.difference, "+.2f"),
    }
    if any(pair.chance for pair in pairs):
        columns["p"] = lambda pair: _p(pair.chance)
        columns["Holm"] = lambda pair: _p(pair.corrected)
    figures = {name: _of_both(text) for name, text in FIGURES.items()}
    return columns | {name: text for name, text in figures.items() if set(map(text, pairs)) - {"-"}}


def _of_question(name: str) -> Callable[[Pair], str]:
    return lambda pair: pair.question[name]


def _of_both(text: Callable[[Row], str]) -> Callable[[Pair], str]:
    """Text of the line, or A's and B's where they differ."""

    def both(pair: Pair) -> str:
        return " / ".join(dict.fromkeys((text(pair.a), text(pair.b))))

    return both


def _p(test: Comparison | None) -> str:
    if test is None:
        return "-"
    return test.reason if test.p is None else f"{test.p:.3f}"


def _notes(found: Compared) -> Iterator[str]:
    """What is compared, in what the sides differ, and what only one of them has."""
    a, b = [pair.a for pair in found.pairs], [pair.b for pair in found.pairs]
    yield "`x / y`: A's figure and B's, where they differ."
    yield "n: seeds with a record; accuracy: last step on the test set, mean ± standard deviation."
    yield from _conditions(a, b)
    if apart := [name_text(pair.a) for pair in found.pairs if _of_other_seeds(pair)]:
        yield f"the means of A and B are over different seeds: {'; '.join(apart)}."
    if kinds := {pair.chance.kind for pair in found.pairs if pair.chance} - {""}:
        yield (
            f"p: {' or '.join(sorted(kinds))} over the seeds that both have, two-sided, the noise "
            "of `paired t` pooled over this table; Holm: corrected for its number of lines."
        )
    statuses = {status for row in (*a, *b) for status in row.statuses}
    yield from (text for status, text in MARKS.items() if status in statuses)
    for name, rows in (("A", a), ("B", b)):
        yield from (f"{name}: {text}" for text in reasons(rows))
    for name, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            texts = "; ".join(map(name_text, only))
            yield f"only {name} answers {plural(len(only), 'question')}: {texts}."


def _of_other_seeds(pair: Pair) -> bool:
    a, b = accuracies_by_seed(pair.a).keys(), accuracies_by_seed(pair.b).keys()
    return bool(a and b) and a != b


def _conditions(a: Sequence[Row], b: Sequence[Row]) -> Iterator[str]:
    """One line for what the sides share, then one for each condition in which they differ."""
    values = {name: (text(a), text(b)) for name, text in _TOLD.items()}
    alike = [f"{name}: {', '.join(one)}" for name, (one, other) in values.items() if one == other]
    if shared := [text for text in alike if not text.endswith(": ")]:
        yield f"{'; '.join(shared)}."
    for name, (one, other) in values.items():
        if one != other:
            yield f"not alike, {name}: A {', '.join(one) or '-'}; B {', '.join(other) or '-'}."


def _methods(rows: Sequence[Row]) -> list[str]:
    """The method behind each label that does not begin with its name."""
    pairs = {(row.label.partition("[")[0], row.spec.method) for row in rows}
    return sorted(f"{label}: {method}" for label, method in pairs if label != method)


def _versions(rows: Sequence[Row]) -> list[str]:
    specs = {row.spec for row in rows if row.spec.method_version > 1}
    return sorted({f"{spec.method} {spec.method_version}" for spec in specs})


def _of_specs(text: Callable[[Any], str]) -> Callable[[Sequence[Row]], list[str]]:
    return lambda rows: sorted({text(row.spec) for row in rows})


def _of_places(text: Callable[[Any], str]) -> Callable[[Sequence[Row]], list[str]]:
    return lambda rows: sorted({text(r.environment) for row in rows for r in row.finished})


_TOLD: Mapping[str, Callable[[Sequence[Row]], Iterable[str]]] = {
    **{name: _of_specs(text) for name, text in CONDITIONS.items()},
    "methods": _methods,
    "options": lambda rows: [": ".join(pair) for pair in labelled_options(rows)],
    "methods past version 1": _versions,
    **{name: _of_places(text) for name, text in ENVIRONMENT.items()},
    "computed": lambda rows: [text.rstrip(".") for text in executions(rows)],
}
"""Name of a condition -> its values in the rows of one side."""
