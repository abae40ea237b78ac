"""One thread, no denormals; the data folder; tests marked `gpu` run where there is a GPU."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
for kind in (np.float32, np.float64):
    np.finfo(kind)  # numpy before 2.4 warns if it first looks at a type without denormals
torch.set_flush_denormal(True)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="not run: no CUDA device"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cells of tests that run at the same time do not see each other."""
    monkeypatch.setenv("SPARSEBENCH_DEVICES", str(tmp_path_factory.getbasetemp() / "devices"))


@pytest.fixture
def real_data() -> Path:
    """Folder with mnist.npz and cifar10.npz."""
    folder = os.environ.get("SPARSEBENCH_DATA")
    if not folder or not (Path(folder) / "mnist.npz").exists():
        pytest.skip("not run: SPARSEBENCH_DATA names no folder with mnist.npz")
    return Path(folder)
