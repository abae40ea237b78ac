"""A hundred `kill -9`, wherever it hurts, whoever trains: no bit, no file and no hour is lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.bench.cells import train, write_suite
from tests.faults.campaign import SITES, Campaign, Kill, plan

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="not run: no /proc here"
)

OPTIONS = {
    "this process": ("--workers", "1"),
    "workers": ("--workers", "2", "--retries", "1000"),
    "ray": ("--executor", "ray", "--workers", "2", "--retries", "1000"),
}
PLANS = {
    "this process": plan(0, drivers=28, workers=0, each=6),
    "workers": plan(1, drivers=8, workers=14, each=2, first=6),
    "ray": plan(2, drivers=4, workers=6, each=2, first=8),
}

EIGHT = [
    Kill("finish", "checkpoint"),
    Kill("record", "unlink"),
    Kill("update", "end", before=2),
    Kill("finish", "half"),
    Kill("update", "middle", before=100),
    Kill("checkpoint", "link", before=1),
    Kill("record", "half"),
    Kill("checkpoint", "half", before=2),
]
"""The last comes first."""


def trained(folder: Path, seeds: str, epochs: int) -> Path:
    """A suite; records of a run that nothing disturbs lie beside it."""
    path = write_suite(
        folder,
        "[methods.rigl]\n[methods.dpf]\n[methods.set]",
        seeds=seeds,
        models='[{ name = "lenet_300_100", width = 0.3 }]',
        budget=f"{{ epochs = {epochs}, max_multiple = 1.2 }}",
    )
    assert {record.status for record in train(path, folder / "undisturbed")} == {"ok"}
    return path


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cells of a second or so each."""
    return trained(tmp_path_factory.mktemp("suite"), "[0, 1]", 60)


def wage(kills: list[Kill], suite: Path, folder: Path, options: tuple[str, ...]) -> Campaign:
    """Carries out all kills; the tally is theirs."""
    campaign = Campaign(suite, suite.parent / "undisturbed", folder, options)
    campaign.wage(kills)
    print(f"{dict(campaign.landed)} in {campaign.rounds} rounds; {campaign.trained} trained")
    landed: Counter[str] = Counter()
    for (phase, _), count in campaign.landed.items():
        landed[phase] += count
    assert landed == Counter(kill.phase for kill in kills)
    return campaign


def test_the_kills_are_a_hundred_and_in_every_phase():
    tally = Counter(kill.phase for kills in PLANS.values() for kill in kills)
    assert tally == {"training": 60, "checkpoint": 10, "record": 10, "update": 10, "finish": 10}
    sites = {(kill.phase, kill.where) for kills in PLANS.values() for kill in kills}
    assert sites >= {(phase, where) for phase, wheres in SITES.items() for where in wheres}


def test_eight_kills_of_a_run_lose_nothing(tmp_path):
    wage(EIGHT, trained(tmp_path, "[0]", 20), tmp_path, OPTIONS["this process"])


@pytest.mark.faults
@pytest.mark.parametrize("executor", ["this process", "workers"])
def test_kills_lose_nothing(executor, suite, tmp_path):
    wage(PLANS[executor], suite, tmp_path, OPTIONS[executor])


@pytest.mark.faults
def test_kills_of_ray_workers_and_drivers_lose_nothing(cluster, suite, tmp_path):
    wage(PLANS["ray"], suite, tmp_path, (*OPTIONS["ray"], "--address", cluster))
