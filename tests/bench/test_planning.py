"""Plans that cannot be run are refused before training, with the phase and what is allowed."""

from __future__ import annotations

import pytest

from bench.planning import check_plan
from methods.api import Cadence, Phase


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([], "no step"),
        ([Phase("a", 0)], "no step"),
        ([Phase("a", 5), Phase("a", 5)], "different names"),
        ([Phase("a", 10), Phase("b", -5)], "phase 'b': steps = -5"),
        ([Phase("a", 5), Phase("b", 2.5)], "phase 'b': steps = 2.5"),  # type: ignore[arg-type]
        ([Phase("a", 5, lr_window=(0.5, 1.5))], "lr_window"),
        ([Phase("a", 5, density=0.0)], r"density = 0.0; allowed: \(0, 1\]"),
        ([Phase("a", 5, updates=Cadence(0))], "updates every 0 steps"),
        ([Phase("a", 5, rewind_to="start")], "rewind_to = 'start'; saved before it: nothing"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        check_plan(plan)


def test_a_plan_with_snapshots_and_empty_phases_is_fine():
    check_plan([Phase("start", 0, save_as="start"), Phase("round", 5, rewind_to="start")])
