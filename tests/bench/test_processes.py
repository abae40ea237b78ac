"""How workers are made; that they work is tested with the executors and in `tests/faults`."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from bench import processes
from tests.bench.cells import sparsebench, write_suite


@pytest.mark.parametrize(
    ("workers", "device", "cores", "gpu", "expected"),
    [
        (1, "cpu", 4, False, False),
        (2, "cpu", 1, False, True),
        (0, "cpu", 4, True, True),
        (0, "auto", 4, False, True),
        (0, "auto", 4, True, False),
        (0, "auto", 1, False, False),
        (0, "cuda", 4, True, False),
        (2, "cuda:1", 4, True, True),
    ],
)
def test_whether_a_run_will_have_workers(workers, device, cores, gpu, expected, monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: cores)
    monkeypatch.setattr(processes.Path, "exists", lambda path: gpu)
    assert processes.likely(workers, device) is expected


def test_where_no_process_can_be_forked_it_starts_anew(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert processes.context().get_start_method() == "spawn"
    processes.begin_early()  # does nothing


SCRIPT = """
import os, sys
from bench import processes

def work(pipe):
    threads = len(os.listdir("/proc/self/task"))
    pipe.send(("torch._dynamo" in sys.modules, threads, os.getppid()))

if __name__ == "__main__":
    processes.begin_early()
    assert "torch" not in sys.modules
    context = processes.context()
    here, there = context.Pipe()
    children = [context.Process(target=work, args=(there,)) for _ in range(2)]
    for child in children:
        child.start()
    found = [here.recv() for _ in children]
    for child in children:
        child.join()
        assert child.exitcode == 0
    print(*(x for one in found for x in one), os.getpid())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="not Linux")
def test_workers_are_forked_off_one_server_that_has_torch_and_no_threads(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    loaded, threads, server, loaded2, threads2, server2, own = found.stdout.split()
    assert loaded == loaded2 == "True"
    assert threads == threads2 == "1"
    assert server == server2 != own


def test_a_run_with_workers_ends_without_complaints_of_the_system(tmp_path):
    suite = write_suite(tmp_path, "[methods.dense]\n[methods.one_shot]")
    command = sparsebench("run", suite, "--workers", "2", cwd=tmp_path)
    said, complaints = command.communicate(timeout=120)
    assert command.returncode == 0, said + complaints
    assert "[2/2]" in complaints
    assert "leaked" not in complaints
    assert "Warning" not in complaints
