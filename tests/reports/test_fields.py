"""Figures of a ticket's rounds: those of the round that is asked for."""

from __future__ import annotations

import dataclasses

import pytest

from bench.record import Least, PhaseResult, Record, Times, landed
from reports.fields import FIELDS, kept
from tests.reports.records import counts, record, spec


@pytest.fixture
def rounds() -> Record:
    """Three rounds at sparsities 0, 0.5 and 0.75; least losses at 8,000, 5,000 and 4,000 steps."""
    told = ((None, 8000, 97.5), (0.5, 5000, 98.1), (0.25, 4000, 97.2))
    phases = tuple(
        PhaseResult(
            f"round-{r}",
            10_000,
            density,
            total=10_000 * (r + 1),
            status="ok",
            top1=99.0,
            counts=counts(1 - (density or 1.0), target_nonzero=round(800 * (density or 1.0))),
            least=Least(step, 0.1, top1),
        )
        for r, (density, step, top1) in enumerate(told)
    )
    times = Times(3.0, 0.0, 0.0, "2026-01-01T00:00:00Z", (1.0, 2.0, 3.0))
    of = spec("lottery_ticket", 0.75)
    return record(of, 99.0, phases=phases, steps=30_000, times=times, multiple=3.0)


@pytest.mark.parametrize(
    ("sparsity", "step", "accuracy", "gain", "left"),
    [(0.0, 8000, 97.5, 0.0, 800), (0.5, 5000, 98.1, 0.6, 400), (0.75, 4000, 97.2, -0.3, 200)],
)
def test_a_round_has_its_own_early_stopping(rounds, sparsity, step, accuracy, gain, left):
    one = landed(rounds, sparsity)
    found = {
        name: FIELDS[name].value(one, one) for name in ("early_step", "early_accuracy", "gain")
    }
    assert found == {
        "early_step": step,
        "early_accuracy": accuracy,
        "gain": pytest.approx(gain),
    }
    assert kept(one) == left


def test_without_looks_at_the_validation_loss_there_is_no_gain(rounds):
    blind = [dataclasses.replace(phase, least=None) for phase in rounds.phases]
    one = dataclasses.replace(rounds, phases=tuple(blind))
    assert FIELDS["gain"].value(one, one) is None
    assert FIELDS["gain"].value(record(spec("rigl")), record(spec("dense"))) is None
