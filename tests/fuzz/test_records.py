"""Records and lists of cells by anybody: read and shown, or refused in one line."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st

from bench import reproduce, store
from bench.errors import SuiteError
from bench.spec import CellSpec
from bench.store import Store, read
from reports.baseline import make_baseline
from reports.by_sparsity import by_sparsity
from reports.leaderboard import leaderboard
from reports.merge import merge
from reports.page.cells import cell
from reports.record_page import record_page
from reports.suite_table import report
from tests.bench.cells import train, write_suite
from tests.fuzz.harm import Tally, fuzz, only_inside
from tests.fuzz.mutations import MISSING, ODD, mutated, scratched

SIZES = [200, pytest.param(10_000, marks=pytest.mark.faults)]
VALUES = ODD | st.just(MISSING) | st.none()
NAMES = frozenset({"method", "model", "name", "suite", "label", "seed", "sparsity", "settings"})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Files of a small suite's records by their names: rounds, filters' kin, and a dense row."""
    folder = tmp_path_factory.mktemp("made")
    path = write_suite(
        folder,
        "[methods.dense]\n[methods.rigl]\n[methods.lottery_ticket]",
        models='[{ name = "lenet_300_100", width = 0.1 }]',
        sparsities="[0.5, 0.75]",
        budget="{ steps = 12, max_multiple = 9.0 }",
    )
    train(path, folder / "records")
    files = (folder / "records" / "tiny").glob("*.json")
    return {file.name: json.loads(file.read_bytes()) for file in sorted(files)}


@st.composite
def stores(draw: st.DrawFn, made: dict[str, dict[str, Any]]) -> tuple[str, bytes]:
    """One of the files, changed; it, and the name that it goes by."""
    name = draw(st.sampled_from(sorted(made)))
    tree = draw(mutated(made[name], VALUES, NAMES))
    content = json.dumps(tree).encode()
    if draw(st.integers(0, 9)) == 0:
        content = draw(scratched(content))
    if name != "suite.json" and isinstance(tree, dict):
        with contextlib.suppress(msgspec.MsgspecError, SuiteError, OverflowError):
            # Whoever changes a record gives it the name that goes with it.
            name = f"{msgspec.convert(tree.get('spec'), type=CellSpec).slug}.json"
    return name, content


def looks(root: Path, path: Path, out: Path) -> list[Any]:
    """What people do with records of others."""
    here = reproduce.Sources(None, None, root / "data", None)
    return [
        lambda: report(root, ["tiny"]),
        lambda: by_sparsity(root, "tiny"),
        lambda: leaderboard(root),
        lambda: make_baseline(root, "tiny"),
        lambda: record_page(read(path)),
        lambda: cell(read(path)),
        lambda: store.find(root, path.stem),
        lambda: Store(root, "tiny").attempts(),
        lambda: merge([root], out),
        lambda: reproduce.describe(path, here),
    ]


@pytest.mark.parametrize("examples", SIZES)
def test_a_record_by_anybody_is_shown_or_refused_and_writes_nothing_elsewhere(
    examples, made, tmp_path
):
    root, out = tmp_path / "inside" / "records", tmp_path / "inside" / "merged"
    folder = root / "tiny"

    def check(drawn: tuple[str, bytes], tally: Tally) -> None:
        name, content = drawn
        assert "/" not in name, name
        shutil.rmtree(tmp_path / "inside", ignore_errors=True)
        folder.mkdir(parents=True)
        for other, tree in made.items():
            (folder / other).write_text(json.dumps(tree))
        (folder / name).write_bytes(content)
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(content)
            tally.parsed += 1
        with only_inside(tmp_path / "inside"):
            for look in looks(root, folder / name, out):
                tally.attempt(look)

    tally = fuzz(stores(made), examples, check)
    assert tally.inputs >= examples
    assert tally.parsed >= tally.inputs / 2
    assert tally.accepted >= tally.inputs
    assert len(tally.refused) >= tally.inputs
