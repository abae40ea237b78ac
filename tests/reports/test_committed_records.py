"""What the documents show is what the committed records give, and the records keep their claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import store
from bench.store import Store
from methods import METHODS
from reports.aggregate import Row, aggregate
from reports.by_sparsity import by_sparsity
from reports.suite_table import report

ROOT = Path(__file__).parent.parent.parent
RECORDS = ROOT / "reports" / "records"
MNIST = Store(RECORDS, "mnist-lenet")
ROWS = {
    (row.label, row.spec.sparsity): row for row in aggregate(MNIST.manifest(), MNIST.records()).rows
}


def mean(label: str, sparsity: float) -> float:
    row = ROWS[label, sparsity]
    assert len(row.ok) == 3
    assert row.top1 is not None
    return row.top1


def test_the_readme_shows_the_short_table_of_the_committed_records() -> None:
    assert by_sparsity(RECORDS, "mnist-lenet").strip() in (ROOT / "README.md").read_text()


def test_the_full_table_lies_beside_the_records() -> None:
    assert report(RECORDS).strip() in (RECORDS / "README.md").read_text()


@pytest.mark.parametrize("suite", store.suites(RECORDS))
def test_committed_records_are_made_by_the_commit_that_they_name(suite) -> None:
    folder = Store(RECORDS, suite)
    records = list(folder.records())
    asked = {cell.spec.key for cell in folder.manifest().cells}
    # Suites of the papers grow record by record, seed 0 first.
    found = {record.spec.key for record in records}
    assert found == asked if suite == "mnist-lenet" else found <= asked
    for record in records:
        assert not record.environment.dirty
        assert len(record.environment.commit) == 40
        parts = record.execution.before if record.execution else ()
        assert all(len(origin.commit) == 40 for origin in parts)


def test_dense_and_the_best_methods_reach_on_mnist_what_a_plain_implementation_does() -> None:
    assert mean("dense", 0.0) >= 97.8
    for label in ("dpf", "rigl", "gradual"):
        assert mean("dense", 0.0) - mean(label, 0.9) <= 0.7


def wanted(row: Row) -> bool:
    """Whether the row must hold: a method that is given its density, and no layer is empty."""
    controls = METHODS[row.spec.method].controls
    return controls == "density" and row.label != "random_uniform" and not row.dead


@pytest.mark.parametrize("label", [label for (label, s), row in ROWS.items() if s == 0.9])
def test_at_90_percent_every_density_method_is_within_1_5_points_of_dense(label) -> None:
    row = ROWS[label, 0.9]
    if wanted(row):
        assert mean("dense", 0.0) - mean(label, 0.9) <= 1.5


PAPERS = (
    "one_shot gradual lottery_ticket ticket_control random magnitude_at_init snip grasp synflow "
    "set rigl sparse_momentum dsr deepr soft_deepr l0 variational_dropout dpf granet ac_dc "
    "top_kast str mest"
)


def test_every_method_of_the_papers_that_prunes_weights_has_its_row() -> None:
    assert set(PAPERS.split()) <= {row.spec.method for row in ROWS.values()}


def test_at_98_percent_methods_that_train_their_masks_beat_snip_and_snip_beats_chance() -> None:
    for label in ("gradual", "dpf", "rigl", "set"):
        assert mean(label, 0.98) > mean("snip", 0.98)
    assert mean("snip", 0.98) > mean("random_uniform", 0.98)


def test_committed_sparsity_is_exact() -> None:
    kept = {0.9: 26_620, 0.95: 13_310, 0.98: 5_324}
    for (_, sparsity), row in ROWS.items():
        if row.smaller:
            continue
        for record in row.finished:
            counts = record.counts
            asked = sparsity
            if asked is None:
                asked = 0.0 if not record.spec.options else dict(record.spec.options)["target"]
            if counts is None:  # a loss that was not finite
                assert record.status == "diverged"
                continue
            assert counts.prunable_nonzero == kept.get(asked, 266_200)
            assert counts.prunable == 266_200
