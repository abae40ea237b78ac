"""Real MNIST through the command line; not run without SPARSEBENCH_DATA."""

from __future__ import annotations

from tests.bench.cells import Command, stored, write_suite


def test_one_epoch_on_real_mnist_is_more_than_ninety_percent(tmp_path, real_data):
    suite = write_suite(
        tmp_path,
        "[methods.dense]\n[methods.dpf]",
        dataset='"mnist"',
        recipe='"mnist-sgd"',
        budget="{ epochs = 1 }",
    )
    arguments = ("run", suite, "--data", real_data, "--records", tmp_path / "records")
    run = Command(*arguments, "--workers", "1", output=tmp_path / "output.txt")
    assert run.wait() == 0, run.said
    records = {record.label: record for record in stored(tmp_path / "records").values()}
    assert {label: record.steps for label, record in records.items()} == {"dense": 600, "dpf": 600}
    for record in records.values():
        assert record.status == "ok"
        assert record.top1 > 90
    assert records["dpf"].counts.prunable_nonzero == 26_620  # a tenth of 266,200
