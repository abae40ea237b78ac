"""Ray clusters for tests."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench import ray_executor


@contextmanager
def started(cpus: int, **options: Any) -> Iterator[Any]:
    """Ray, with a cluster of so many CPUs, whatever the machine has, while this lasts."""
    library = pytest.importorskip("ray", reason="not run: no ray")
    library.init(
        address="local",
        num_cpus=cpus,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=ray_executor.OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="error",
        **options,
    )
    try:
        yield library
    finally:
        library.shutdown()
        with warnings.catch_warnings():  # it leaves open files and processes to be collected
            warnings.simplefilter("ignore")
            gc.collect()
