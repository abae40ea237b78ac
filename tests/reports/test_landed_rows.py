"""Rows that are not one cell each: rounds, narrower networks, skipped rows, controls."""

from __future__ import annotations

import dataclasses

import pytest

from bench.record import PhaseResult, Record, Times
from bench.spec import CellSpec
from bench.store import Against, Cell, Manifest
from reports.aggregate import Row, aggregate, asked_spec, asked_text
from reports.suite_table import suite_table
from tests.reports.records import (
    DENSE_MACS,
    PARAMETERS,
    PRUNABLE,
    SUITE,
    counts,
    manifest,
    record,
    spec,
)
from tests.reports.test_suite_table import body

TICKETS = [
    spec("lottery_ticket", 0.9, seed, options=(("also", "0.5"), ("rewind", 0.1))) for seed in (0, 1)
]


def rows_at(of: CellSpec, *sparsities: float, label: str = "ticket") -> list[Cell]:
    """Rows that one cell of rounds answers."""
    return [Cell(label, of, 300, 3.0, 0, sparsity=sparsity) for sparsity in sparsities]


def ticket(of: CellSpec, half: float, tenth: float, **more: object) -> Record:
    """A dense training, a round to 50 % and one to 90 %; 100 steps and 4 seconds each."""
    phases = (
        PhaseResult("start", 0, 1.0, 0),
        PhaseResult("round-0", 100, 1.0, 100, "ok", "", 99.0, counts=counts(0.0)),
        PhaseResult("round-1", 100, 0.5, 200, "ok", "", half, counts=counts(0.5)),
        PhaseResult("round-2", 100, 0.1, 300, "ok", "", tenth, counts=counts(0.9)),
    )
    fields = {
        "phases": phases,
        "steps": 300,
        "multiple": 3.0,
        "times": Times(12.0, 1.0, 0.5, "2025-01-01T00:00:00Z", (0.0, 4.0, 8.0, 12.0)),
    }
    return dataclasses.replace(record(of, tenth), **fields | more)  # type: ignore[arg-type]


def suite(*cells: Cell) -> Manifest:
    return Manifest(SUITE, "Demonstration", cells)


def rows_of(asked: Manifest, *records: Record) -> dict[str, Row]:
    """Rows by their label and the sparsity that they ask for."""
    rows = aggregate(asked, records).rows
    return {f"{row.label} {asked_text(row.spec)}": row for row in rows}


def test_each_row_reads_the_round_that_landed_on_its_sparsity() -> None:
    asked = suite(*(cell for one in TICKETS for cell in rows_at(one, 0.5, 0.9)))
    found = rows_of(asked, ticket(TICKETS[0], 98.0, 95.0), ticket(TICKETS[1], 97.0, 93.0))
    half, tenth = found["ticket 50"], found["ticket 90"]
    assert (half.asked, half.top1, tenth.top1) == (2, 97.5, 94.0)
    assert half.reached_sparsity == pytest.approx(0.5)
    assert tenth.reached_sparsity == pytest.approx(0.9)
    # What came after its round costs a row nothing.
    assert (half.multiple, half.train_seconds) == (pytest.approx(2.0), 8.0)
    assert (tenth.multiple, tenth.train_seconds) == (pytest.approx(3.0), 12.0)
    assert aggregate(asked, [ticket(TICKETS[0], 98.0, 95.0)]).stale == 0


def test_the_suites_sparsities_are_no_option_of_a_row() -> None:
    (cell,) = rows_at(TICKETS[0], 0.5)
    assert asked_spec(cell).options == (("rewind", 0.1),)
    table = suite_table(suite(*rows_at(TICKETS[0], 0.5, 0.9)), [ticket(TICKETS[0], 98.0, 95.0)])
    assert "also" not in table
    assert "- options beside the defaults: ticket: rewind=0.1.\n" in table
    assert [(row["sparsity asked %"], row["top-1 %"]) for row in body(table)] == [
        ("50", "98.00"),
        ("90", "95.00"),
    ]


def test_a_row_pays_for_the_training_up_to_its_round() -> None:
    asked = suite(*rows_at(TICKETS[0], 0.5, 0.9))
    made = ticket(TICKETS[0], 98.0, 95.0)
    assert rows_of(asked, made)["ticket 50"].train_macs is None  # a record from before
    costs = (0.0, 1000.0, 400.0, 200.0)
    phases = [
        dataclasses.replace(phase, train_macs=cost)
        for phase, cost in zip(made.phases, costs, strict=True)
    ]
    found = rows_of(asked, dataclasses.replace(made, phases=tuple(phases), train_macs=1600.0))
    assert [found[name].train_macs for name in ("ticket 50", "ticket 90")] == [1400.0, 1600.0]


def test_a_round_that_went_wrong_is_wrong_in_its_row_alone() -> None:
    good = ticket(TICKETS[0], 98.0, 95.0)
    guess = dataclasses.replace(good.phases[2], status="diverged", reason="it guesses")
    wrong = dataclasses.replace(good, phases=(*good.phases[:2], guess, good.phases[3]))
    table = suite_table(suite(*rows_at(TICKETS[0], 0.5, 0.9)), [wrong])
    assert [row["top-1 %"] for row in body(table)] == ["* 1 of 1", "95.00"]
    assert "- ticket, lenet, 50 %, seed 0: diverged: it guesses\n" in table
    assert "seed 0: diverged: it guesses" not in table.replace("50 %, seed 0", "")


def test_a_cell_that_stopped_before_it_landed_says_why_and_shows_no_figure() -> None:
    good = ticket(TICKETS[0], 98.0, 95.0)
    stopped = dataclasses.replace(
        good, status="diverged", reason="the loss is nan", top1=None, counts=None, steps=250
    )
    stopped = dataclasses.replace(stopped, phases=good.phases[:3], multiple=2.5)
    asked = suite(*rows_at(TICKETS[0], 0.5, 0.9))
    table = suite_table(asked, [stopped])
    half, tenth = body(table)
    assert (half["top-1 %"], half["budget multiple"]) == ("98.00", "2.00")
    assert (tenth["top-1 %"], tenth["reached sparsity %"]) == ("* 1 of 1", "-")
    assert "- ticket, lenet, 90 %, seed 0: diverged: the loss is nan\n" in table
    assert "- ticket, lenet, 50 %, seed 0: diverged" not in table


def test_a_ticket_that_was_not_run_is_missing_in_every_row() -> None:
    found = rows_of(suite(*rows_at(TICKETS[0], 0.5, 0.9)))
    assert [row.statuses for row in found.values()] == [("missing",), ("missing",)]


SMALL = spec("dense", 0.0, model_options=(("width", 0.3),))
AGAINST = Against(PARAMETERS, PRUNABLE, DENSE_MACS, 90)


def small_row(**more: object) -> Cell:
    fields: dict[str, object] = {"sparsity": 0.9, "against": AGAINST}
    return Cell("small_dense", SMALL, 100, 1.0, 0, **fields | more)  # type: ignore[arg-type]


def small_record() -> Record:
    """A network of 120 parameters, 90 of them prunable, and 24,000 MACs: nothing of it is zero."""
    own = counts(
        0.0,
        parameters=120,
        nonzero=120,
        prunable=90,
        target_nonzero=None,
        prunable_nonzero=90,
        dense_macs=24_000,
        macs=24_000,
    )
    return record(SMALL, 96.0, counts=own)


def test_a_narrower_dense_network_counts_against_the_full_width() -> None:
    found = rows_of(suite(small_row()), small_record())["small_dense 90"]
    assert found.top1 == 96.0
    assert found.reached_sparsity == pytest.approx(1 - 90 / 800)
    assert found.total_sparsity == pytest.approx(1 - 120 / 1000)
    assert found.macs_fraction == pytest.approx(24_000 / 200_000)
    assert (found.nonzero, found.macs) == (120, 24_000)


def test_the_same_network_as_a_row_of_its_own_counts_against_itself() -> None:
    own = Cell("narrow", SMALL, 100, 1.0, 0)
    found = rows_of(suite(small_row(), own), small_record())
    assert found["narrow 0"].reached_sparsity == 0.0
    assert found["small_dense 90"].reached_sparsity == pytest.approx(1 - 90 / 800)


def test_a_table_says_which_rows_are_narrower_networks() -> None:
    sparse = Cell("rigl", spec(), 100, 1.0, 0)
    table = suite_table(suite(sparse, small_row()), [record(spec()), small_record()])
    note = "- narrower dense networks, their ratios against the full width: small_dense.\n"
    assert note in table
    rows = body(table)
    assert [row["sparsity asked %"] for row in rows] == ["90", "90"]
    assert rows[1]["model"] == "lenet (width=0.3)"
    assert rows[1]["reached sparsity %"] == "88.75"
    assert rows[1]["parameters left"] == "120 (12.00 %)"
    assert note not in suite_table(suite(sparse), [record(spec())])


def test_a_narrower_network_that_diverged_has_no_counts() -> None:
    bad = dataclasses.replace(small_record(), status="diverged", counts=None, top1=None)
    found = rows_of(suite(small_row()), bad)["small_dense 90"]
    assert (found.statuses, found.reached_sparsity) == (("diverged",), None)


REASON = "timm:x has no option `width`, so there is no smaller one of it"


def test_a_skipped_row_shows_its_reason_even_where_its_cell_has_a_record() -> None:
    # Its cell is that of the dense network, which another row asks for.
    dense = spec("dense", 0.0, model="timm:x")
    skipped = Cell("small_dense", dense, 100, 1.0, 0, sparsity=0.9, skipped=REASON)
    asked = suite(Cell("dense", dense, 100, 1.0, 0), skipped)
    full = record(dense, 99.0)
    found = rows_of(asked, full)
    assert found["dense 0"].top1 == 99.0
    assert (found["small_dense 90"].statuses, found["small_dense 90"].top1) == (("skipped",), None)
    table = suite_table(asked, [full])
    assert f"- skipped: small_dense, timm:x: {REASON}\n" in table
    numbers = body(table)[1]
    assert (numbers["n"], numbers["top-1 %"], numbers["MACs left"]) == ("0/1", "-", "-")
    assert "- `-`: not run" in table


def controls(*sources: CellSpec) -> list[CellSpec]:
    return [spec("ticket_control", 0.9, one.seed, source=one.key) for one in sources]


def test_seeds_of_a_control_are_one_row_though_their_sources_differ() -> None:
    asked = suite(
        *(cell for one in TICKETS for cell in rows_at(one, 0.9)),
        *(Cell("reinit", one, 100, 4.0, 0) for one in controls(*TICKETS)),
    )
    done = [
        record(one, top1, multiple=4.0)
        for one, top1 in zip(controls(*TICKETS), (90, 92), strict=True)
    ]
    found = rows_of(asked, *done)["reinit 90"]
    assert (found.asked, found.top1, found.multiple, found.source) == (2, 91.0, 4.0, "ticket")


def test_a_table_says_whose_masks_a_row_starts_from() -> None:
    rigl = spec("rigl", 0.9)
    (like,) = controls(rigl)
    asked = suite(
        *rows_at(TICKETS[0], 0.5, 0.9),
        Cell("rigl", rigl, 100, 1.0, 0),
        *(Cell("reinit", one, 100, 4.0, 0) for one in controls(TICKETS[0])),
        Cell("like_rigl", dataclasses.replace(like, method="random"), 100, 2.0, 0),
    )
    table = suite_table(asked, [])
    line = "- starts from the masks of another row: reinit: ticket; like_rigl: rigl.\n"
    assert line in table
    assert "starts from" not in suite_table(manifest(rigl), [])


def test_a_control_that_failed_says_so() -> None:
    (control,) = controls(TICKETS[0])
    asked = suite(*rows_at(TICKETS[0], 0.9), Cell("reinit", control, 100, 4.0, 0))
    tries = [record(control, None, status="failed", reason="the source x is diverged: why")]
    table = suite_table(asked, [], tries)
    assert "- reinit, lenet, 90 %, seed 0: failed: the source x is diverged: why\n" in table


def test_a_failed_ticket_says_so_in_each_of_its_rows() -> None:
    tries = [record(TICKETS[0], None, status="failed", reason="out of memory")]
    table = suite_table(suite(*rows_at(TICKETS[0], 0.5, 0.9)), [], tries)
    for sparsity in (50, 90):
        assert f"- ticket, lenet, {sparsity} %, seed 0: failed: out of memory\n" in table


def test_a_penalty_that_ranks_at_the_end_shows_where_it_lands() -> None:
    ranked = spec("l0", None, options=(("target", 0.95),))
    free = spec("l0", None)
    table = suite_table(suite(Cell("a", ranked, 9, 1, 0), Cell("b", free, 9, 1, 0)), [])
    assert [row["sparsity asked %"] for row in body(table)] == ["95 by top-k", "penalty"]
    assert "- `by top-k`: a penalty trains; a last ranking by its own importance" in table
    assert "- `penalty`: no sparsity can be asked for" in table
    assert "top-k" not in suite_table(suite(Cell("b", free, 9, 1, 0)), [])
