"""Whether a method's plan can be run: checked before training, since plans may be anybody's."""

from __future__ import annotations

import re
from collections.abc import Sequence

from methods.api import Phase

MAX_STEPS = 1e12
"""More is a slip of the pen."""

NAME = re.compile(r"[^/\\\x00-\x1f]{1,100}")
"""Of a phase: the file of its masks is called so."""


def check_plan(plan: Sequence[Phase]) -> None:
    """Checks phases by themselves and against each other.

    Raises:
        ValueError: names the phase, what was found and what is allowed.
    """
    names = [phase.name for phase in plan]
    if len(set(names)) != len(names):
        raise ValueError(f"phases must have different names, found {names}")
    if not sum(phase.steps for phase in plan if _whole(phase.steps)) > 0:
        raise ValueError("the plan has no step to train")
    saved: set[str] = set()
    for phase in plan:
        for fine, problem in _rules(phase, saved):
            if not fine:
                raise ValueError(f"phase {phase.name!r}: {problem}")
        if phase.save_as is not None:
            saved.add(phase.save_as)


def _rules(phase: Phase, saved: set[str]) -> list[tuple[bool, str]]:
    low, high = phase.lr_window
    density, updates = phase.density, phase.updates
    rules = [
        (
            isinstance(phase.name, str) and NAME.fullmatch(phase.name) is not None,
            "its name is a file's; allowed: one line of up to 100 characters without / and \\",
        ),
        (_whole(phase.steps), f"steps = {phase.steps!r}; allowed: integers from 0 on"),
        (0 <= low <= high <= 1, f"lr_window = {phase.lr_window}; allowed: 0 <= from <= to <= 1"),
        (density is None or 0 < density <= 1, f"density = {density}; allowed: (0, 1]"),
        (
            phase.rewind_to is None or phase.rewind_to in saved,
            f"rewind_to = {phase.rewind_to!r}; saved before it: {sorted(saved) or 'nothing'}",
        ),
    ]
    look = phase.validate_every
    if look is not None:
        fine = phase.measured and _whole(look) and look > 0
        rules.append((fine, f"validate_every = {look!r}; allowed: from 1 on, in a measured phase"))
    if updates is not None:
        every = updates.every
        rules.append(
            (_whole(every) and every > 0, f"updates every {every!r} steps; allowed: from 1 on")
        )
    return rules


def _whole(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < MAX_STEPS
