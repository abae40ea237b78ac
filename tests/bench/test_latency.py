"""Latency: who takes turns with whom, medians and ratios. No test looks at a clock."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import latency as timed
from bench.environment import environment
from bench.exported import load
from bench.latency import (
    LEAST_ROUNDS,
    MOST_ROUNDS,
    WARM_UP,
    Latency,
    Timing,
    in_turns,
    table,
    timing,
    to_semi_structured,
    two_of_four,
)
from bench.store import Store
from tests.bench.cells import ROOT, train, write_suite

METHODS = '[methods.sfp]\n[methods.leak]\nmethod = "sfp"\nbn_leak = true'


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Records of two cells whose filters are pruned."""
    folder = tmp_path_factory.mktemp("timed")
    suite = write_suite(
        folder,
        METHODS,
        dataset='"synthetic"',
        models='[{ name = "resnet20", width = 0.25 }]',
        sparsities="[0.5]",
        budget="{ steps = 20 }",
    )
    train(suite, folder / "records")
    return folder / "records"


@pytest.fixture(autouse=True)
def other_tests_keep_their_allocator(monkeypatch):
    monkeypatch.setattr(timed, "keep_memory", lambda: None)


def key_of(records: Path, label: str) -> str:
    (found,) = (r for r in Store(records, "tiny").records() if r.label == label)
    return found.spec.key


def test_networks_take_turns_after_a_warm_up():
    called: list[str] = []
    runs = {name: (lambda name=name: called.append(name)) for name in "ABC"}
    clock = itertools.count()

    def timer(run):
        run()
        return float(next(clock))

    times = in_turns(runs, timer, 4)
    assert called == ["A", "B", "C"] * (WARM_UP + 4)
    first = 3 * WARM_UP
    assert times == {
        name: [first + place + 3 * turn for turn in range(4)] for place, name in enumerate("ABC")
    }


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    # Two networks take turns, in 10 seconds: 100 rounds of twice 0.05.
    [(0.05, 100), (60.0, LEAST_ROUNDS), (0.0, MOST_ROUNDS), (1e-6, MOST_ROUNDS)],
)
def test_there_are_as_many_rounds_as_time_allows(seconds, rounds):
    times = in_turns({"A": lambda: None, "B": lambda: None}, lambda _: seconds, None)
    assert [len(found) for found in times.values()] == [rounds, rounds]


def test_the_first_rounds_do_not_decide_how_many_there_are():
    # Kernels are chosen in the first call, which takes far longer than any other.
    slow = iter([100.0] * (WARM_UP - 1))
    times = in_turns({"A": lambda: None}, lambda _: next(slow, 0.1), None)
    assert len(times["A"]) == 100


def test_times_are_medians_and_quartiles_in_milliseconds():
    found = timing("masked", 64, {"dense": [1.0] * 9, "masked": [n / 1000 for n in range(1, 10)]})
    assert (found.network, found.batch, found.against) == ("masked", 64, "dense")
    assert (found.lower, found.median, found.upper) == pytest.approx((3, 5, 7))


def test_ratios_are_of_the_same_round():
    # The machine slows down to a tenth on the way; the ratio is a half all along.
    dense = [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    compact = [time / 2 for time in dense]
    found = timing("compact", 1, {"dense": dense, "compact": compact})
    assert (found.ratio, found.interval) == (0.5, (0.5, 0.5))
    # 6 rounds out of 10 at 2, though the median of all times is the same.
    other = [2, 4, 6, 8, 10, 12, 0.7, 0.8, 0.9, 1]
    found = timing("compact", 1, {"dense": dense, "compact": other})
    assert (found.ratio, found.interval) == (2.0, (0.1, 2.0))


def test_the_interval_holds_the_median_by_order_alone():
    # Of 10 rounds, 2 or more lie on either side of the median with 1 - 2 (1 + 10) / 2^10 = 97.9 %;
    # 3 or more with 89 % only.
    dense, ratios = [1.0] * 10, [float(n) for n in range(1, 11)]
    found = timing("masked", 1, {"dense": dense, "masked": ratios})
    assert found.ratio == 5.5
    assert found.interval == (2.0, 9.0)


def test_a_network_in_half_precision_is_compared_with_a_dense_one_in_half_precision():
    times = {"dense": [4.0] * 6, "dense, float16": [2.0] * 6, "2:4, float16": [1.0] * 6}
    found = timing("2:4, float16", 1, times)
    assert (found.ratio, found.against) == (0.5, "dense, float16")
    assert timing("dense, float16", 1, times).ratio == 0.5


def test_two_of_every_four_inputs_stay():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 4.0, 4.5, -5.0, 0.0], [0, 0, 0, 0, 9, -8, -7, 6]])
    expected = [[0, -3, 2, 0, 0, 4.5, -5, 0], [0, 0, 0, 0, 9, -8, 0, 0]]
    assert two_of_four(weight).tolist() == expected
    assert weight[0, 0] == 1  # the given one stays as it is


def test_a_layer_that_torch_has_no_kernel_for_stays_as_it_is():
    odd, on_cpu = nn.Linear(6, 8), nn.Linear(64, 64).half()
    before = on_cpu.weight.clone()
    assert to_semi_structured(odd) == "6 inputs are no multiple of 4"
    assert to_semi_structured(on_cpu) != ""
    assert torch.equal(on_cpu.weight, before)


def test_a_table_says_where_it_was_measured():
    line = Timing("dense", 64, 2.0, 1.5, 2.5, 1.0, (1.0, 1.0), "dense")
    where = environment(torch.device("cpu"))
    text = table(Latency("cell", (3, 16, 16), where, {64: 12}, (line,), ("no 2:4 network: why",)))
    row = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert row == ["dense", "64", "2.000", "1.500 to 2.500", "1.000", "1.000 to 1.000"]
    for fact in (where.device, where.torch, "12 at batch 64", "3x16x16", "no 2:4 network: why"):
        assert fact in text


def test_a_cell_is_timed_dense_masked_and_compact(call, records):
    key = key_of(records, "sfp")
    arguments = ("--records", records, "--rounds", "6", "--device", "cpu", "--batch", "2")
    done = call("latency", key, *arguments, "--batch", "1", "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    order = [(one["batch"], one["network"]) for one in found["timings"]]
    assert order == [(b, name) for b in (2, 1) for name in ("dense", "masked", "compact")]
    assert found["rounds"] == {"2": 6, "1": 6}
    assert all(one["median"] > 0 and one["ratio"] > 0 for one in found["timings"])
    assert found["environment"]["threads"] == 1
    assert found["notes"] == ["no 2:4 network: it needs a GPU."]
    printed = call("latency", key, *arguments)
    assert [line.split("|")[1].strip() for line in printed.out.splitlines()[2:5]] == [
        "dense",
        "masked",
        "compact",
    ]


def test_the_networks_are_what_their_names_say(call, records, monkeypatch, tmp_path):
    key = key_of(records, "sfp")
    for options in ((), ("--compact",)):
        call("export", key, "--records", records, "--out", f"out{len(options)}", *options)
    inputs, outputs = [], []

    def watched(run):
        outputs.append(run())
        return 1.0

    def called(network, batch, info, device):
        inputs.append(network)
        return real(network, batch, info, device)

    real = timed._call
    monkeypatch.setattr(timed, "_call", called)
    monkeypatch.setattr(timed, "seconds", watched)
    call("latency", key, "--records", records, "--rounds", "6", "--batch", "3", "--device", "cpu")
    dense, masked, compact = inputs
    assert all(bool(w.flatten(1).any(1).all()) for w in dense.parameters() if w.ndim > 1)
    assert same(masked, load("out0"))
    assert same(compact, load("out1"))
    assert not any(module.training for module in (dense, masked, compact))
    assert all(output.shape == (3, 4) and output.is_inference() for output in outputs)
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[1], rtol=0.1)


def same(one: nn.Module, two: nn.Module) -> bool:
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_a_two_of_four_network_takes_part_where_there_are_kernels(call, records, monkeypatch):
    def pruned(layer):
        layer.weight.data = two_of_four(layer.weight)
        return ""

    arguments = ("--records", records, "--rounds", "6", "--device", "cpu", "--batch", "1")
    monkeypatch.setattr(timed, "_no_semi_structured", lambda _: "")
    none = call("latency", key_of(records, "sfp"), *arguments)
    assert "- no 2:4 network: torch takes none of the 1 linear layers (" in none.out

    monkeypatch.setattr(timed, "to_semi_structured", pruned)
    done = call("latency", key_of(records, "sfp"), *arguments, "--json")
    found = json.loads(done.out)
    assert [(one["network"], one["against"]) for one in found["timings"]] == [
        ("dense", "dense"),
        ("masked", "dense"),
        ("compact", "dense"),
        ("dense, float16", "dense"),
        ("2:4, float16", "dense, float16"),
    ]
    assert found["notes"][0].startswith("2:4: 1 of 1 linear layers of a fresh network, pruned")

    def broken(layer):
        layer.weight = nn.Parameter(layer.weight[:, :-1].clone(), requires_grad=False)
        return ""

    monkeypatch.setattr(timed, "to_semi_structured", broken)
    broke = call("latency", key_of(records, "sfp"), *arguments)
    assert broke.status == 0
    assert "- no 2:4 network: it does not run (" in broke.out


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_large_tensor_gets_the_pages_that_the_last_one_left():
    code = """
import resource, torch
from bench.process_settings import keep_memory
torch.set_num_threads(1)
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 24)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(pages() for _ in range(3)))
keep_memory()
# The first pages that are kept may not lie as the next tensor needs them.
print(min(pages() for _ in range(8)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    fresh, kept = map(int, done.stdout.split())
    assert kept * 10 < max(fresh, 100)


def test_what_cannot_be_cut_is_timed_without_and_says_why(call, records):
    arguments = ("--records", records, "--rounds", "6", "--device", "cpu", "--batch", "1")
    done = call("latency", key_of(records, "leak"), *arguments)
    assert done.status == 0
    names = [line.split("|")[1].strip() for line in done.out.splitlines() if line[:1] == "|"]
    assert names[2:] == ["dense", "masked"]
    assert "- no compact network: " in done.out
    assert "bn_leak" in done.out


@pytest.mark.parametrize("arguments", [("--batch", "0"), ("--rounds", "5"), ("--threads", "0")])
def test_nonsense_is_refused(call, records, arguments):
    assert call("latency", "sfp", "--records", records, *arguments).status == 2
