"""What is asked of a Ray cluster; that one does it is tested in `tests/faults/test_ray.py`."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from bench import launch, ray_executor
from bench.errors import UsageError
from bench.ray_executor import OnRay
from bench.sources import SourceFiles
from bench.store import Store
from bench.task import Ways
from tests.bench.cells import plan_of, tasks_of, write_suite


@pytest.fixture
def cluster(monkeypatch) -> dict[str, float]:
    """Resources of a cluster that is not there."""
    found: dict[str, float] = {"CPU": 32.0, "GPU": 4.0, "memory": 1e9}
    library = types.SimpleNamespace(cluster_resources=lambda: found, is_initialized=lambda: True)
    monkeypatch.setattr(ray_executor, "_ray", lambda: library)
    return found


@pytest.mark.parametrize(
    ("executor", "device", "resources", "room"),
    [
        (OnRay(threads=1), "cpu", 0, 32),
        (OnRay(threads=3), "cpu", 0, 10),
        (OnRay(threads=64), "cpu", 0, 1),
        (OnRay(threads=1, count=5), "cpu", 0, 5),
        (OnRay(threads=1), "cuda", 1, 4),
        (OnRay(threads=1, places=3), "cuda", 1 / 3, 12),
        (OnRay(threads=8, places=3), "cuda", 1 / 3, 4),
        (OnRay(threads=1, places=3, count=2), "cuda", 1 / 3, 2),
    ],
)
def test_workers_get_their_share_of_a_gpu_and_are_as_many_as_fit(
    executor, device, resources, room, cluster
):
    asked = executor.resources(device)
    assert asked == {"num_gpus": resources}
    assert executor.room(asked) == room


def test_workers_of_a_strict_run_are_given_the_variable_of_cublas(tmp_path, monkeypatch):
    (task,) = tasks_of(plan_of(write_suite(tmp_path)), Store(tmp_path / "records", "tiny"))
    assert ray_executor.surroundings(task) == {}
    strict = ray_executor.dataclasses.replace(task, ways=Ways(strict=True))
    for value in (":4096:8", ":16:8"):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
        variables = {"env_vars": {"CUBLAS_WORKSPACE_CONFIG": value}}
        assert ray_executor.surroundings(strict) == {"runtime_env": variables}


def test_auto_takes_a_gpu_where_the_cluster_has_one(cluster):
    assert launch.usable_device("auto", "ray") == "cuda"
    assert launch.usable_device("cpu", "ray") == "cpu"
    with pytest.raises(UsageError, match="--device cuda:1: with --executor ray give auto, cpu or"):
        launch.usable_device("cuda:1", "ray")
    del cluster["GPU"]
    assert launch.usable_device("auto", "ray") == "cpu"
    with pytest.raises(UsageError, match="the cluster has no GPU"):
        launch.usable_device("cuda", "ray")


def test_an_address_without_ray_is_a_mistake():
    with pytest.raises(UsageError, match="--address here: only --executor ray takes one"):
        launch.usable_device("cpu", address="here")


@pytest.mark.parametrize(
    "options",
    [{"device": "cpu", "ways": Ways(stack=4)}, {"device": "cuda", "places": 0}],
)
def test_a_ray_worker_has_one_cell(options):
    with pytest.raises(UsageError, match="--executor ray gives each worker one cell"):
        launch.Settings(**options, executor="ray")


def test_ray_workers_get_paths_that_do_not_depend_on_where_they_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (task,) = tasks_of(plan_of(write_suite(tmp_path)), Store(Path("records"), "tiny"))
    files = SourceFiles(Path("a.json"), Path("a.safetensors"), Path("masks"))
    absolute = ray_executor._absolute(ray_executor.dataclasses.replace(task, source=files))
    for path in (absolute.data, absolute.checkpoint, absolute.weights, absolute.masks):
        assert path.is_absolute()
    assert absolute.source == SourceFiles(
        tmp_path / "a.json", tmp_path / "a.safetensors", tmp_path / "masks"
    )
    assert absolute.checkpoint == tmp_path / task.checkpoint
