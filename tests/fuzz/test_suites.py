"""Suites by anybody: resolved, or refused in one line."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from typing import Any

import pytest
from hypothesis import strategies as st

from bench import datasets, suite
from bench.errors import DataError
from bench.resolve import resolve
from methods import METHODS, get_method
from tests.fuzz.harm import Tally, fuzz, only_inside
from tests.fuzz.mutations import MISSING, ODD, mutated

SIZES = [200, pytest.param(10_000, marks=pytest.mark.faults)]

MODEL = {"name": "lenet_300_100", "width": 0.05}


def base(**fields: Any) -> dict[str, Any]:
    return {
        "title": "T",
        "dataset": "digits",
        "recipe": "digits",
        "models": [dict(MODEL)],
        "sparsities": [0.5, 0.9],
        "seeds": [0, 1],
        "budget": {"epochs": 1, "max_multiple": 3.0},
        "prunable": "all",
        "init": "random",
        "methods": {"dense": {}},
    } | fields


VALUES = (
    ODD | st.just(MISSING) | st.sampled_from([float("nan"), float("inf"), "synthetic", "mnist"])
)


@st.composite
def methods(draw: st.DrawFn) -> dict[str, Any]:
    """One or two rows with options of their own, most of them possible."""
    rows: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=2)):
        row: dict[str, Any] = {}
        for field in dataclasses.fields(get_method(name)):
            if draw(st.integers(0, 5)) == 0:
                usual = field.default if isinstance(field.default, bool | int | float | str) else 1
                row[field.name] = draw(st.just(usual) | ODD)
        if draw(st.integers(0, 5)) == 0:
            row["source"] = draw(st.sampled_from(["dense", "rigl", "../x"]))
        rows[name] = row
    return rows


def _keep_small(models: Any) -> None:
    """A network of a hundred times the width is no mistake of anybody's, but takes all memory."""
    for model in models if isinstance(models, list) else ():
        width = model.get("width") if isinstance(model, dict) else None
        if isinstance(width, int | float) and 4 < width < 10**8:
            model["width"] = 4


def toml(value: Any) -> str:
    """A value as TOML writes it in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value)
    return repr(value)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """TOML, most of it well-formed."""
    tree = base(methods=draw(methods()))
    if draw(st.booleans()):
        tree["controls"] = draw(st.booleans())
    tree = draw(mutated(tree, VALUES))
    _keep_small(tree.get("models"))
    text = "\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in tree.items())
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(text)))
        text = text[:cut] + draw(st.sampled_from(["", "[" * 2000, "\x00", "= =", "é"])) + text[cut:]
    return text


@pytest.mark.parametrize("examples", SIZES)
def test_a_suite_by_anybody_is_resolved_or_refused_and_writes_nothing(
    examples, tmp_path, monkeypatch
):
    def no_network(name: str, info: object, path: object) -> None:
        raise DataError(f"{path}: no such file.")

    monkeypatch.setattr(datasets, "_download", no_network)
    folder = tmp_path / "inside"
    folder.mkdir()
    file = folder / "fuzzed.toml"

    def check(text: str, tally: Tally) -> None:
        file.write_text(text, encoding="utf-8")
        try:
            tomllib.loads(text)
            tally.parsed += 1
        except (tomllib.TOMLDecodeError, RecursionError):
            pass
        with only_inside(folder):
            tally.attempt(lambda: resolve(suite.load(str(file)), folder))

    tally = fuzz(texts(), examples, check)
    assert tally.inputs >= examples
    assert tally.parsed >= tally.inputs / 2
    assert tally.accepted >= tally.inputs / 50
    assert tally.refused
