"""What the documents show is what the committed records give."""

from __future__ import annotations

from pathlib import Path

from bench import store
from reports.tables import report

ROOT = Path(__file__).parent.parent.parent
RECORDS = ROOT / "reports" / "records"


def test_the_readme_shows_the_table_of_the_committed_records() -> None:
    table = report(RECORDS, ["mnist-lenet"]).strip()
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_committed_records_are_complete_and_made_by_the_commit_that_they_name() -> None:
    for suite in store.suites(RECORDS):
        folder = store.Store(RECORDS, suite)
        records = list(folder.records())
        asked = {cell.spec.key for cell in folder.manifest().cells}
        assert {record.spec.key for record in records} == asked
        for record in records:
            assert not record.environment.dirty
            assert len(record.environment.commit) == 40


def test_dense_and_the_best_methods_reach_on_mnist_what_a_plain_implementation_does() -> None:
    records = list(store.Store(RECORDS, "mnist-lenet").records())

    def mean(label: str, sparsity: float) -> float:
        found = [
            record.top1
            for record in records
            if record.label == label and record.spec.sparsity == sparsity
        ]
        assert len(found) == 3
        return sum(top1 or 0.0 for top1 in found) / 3

    dense = mean("dense", 0.0)
    assert dense >= 97.8
    for label in ("dpf", "rigl", "gradual"):
        assert dense - mean(label, 0.9) <= 0.7


def test_committed_sparsity_is_exact() -> None:
    for record in store.Store(RECORDS, "mnist-lenet").records():
        counts = record.counts
        assert counts is not None
        kept = {0.0: 266_200, 0.9: 26_620, 0.95: 13_310, 0.98: 5_324}[record.spec.sparsity or 0.0]
        assert counts.prunable_nonzero == kept
        assert counts.prunable == 266_200
