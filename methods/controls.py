"""The controls that tell what a method's choice of weights is worth. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Layers = Literal["uniform", "er", "erk"]
"""A rule that gives each layer its count before anything is trained, see `allocation`."""


@dataclass(frozen=True, slots=True)
class Control:
    """One control of a sparse method.

    Attributes:
        name: what stands behind the method's label, such as `rigl: random masks`.
        method: that makes it.
        options: of that method.
        from_source: whether it starts from the masks that the method has left.
    """

    name: str
    method: str
    options: tuple[tuple[str, str | bool], ...]
    from_source: bool


RANDOM, MAGNITUDE, REINITIALISED = "random masks", "magnitude masks", "re-initialised"

LAYERS_BY_SCOPE = frozenset(
    {
        *("one_shot", "gradual", "ac_dc", "dpf", "top_kast"),
        *("random", "magnitude_at_init", "snip", "grasp", "synflow"),
        *("set", "rigl", "mest", "granet"),
    }
)
"""Methods whose finished layers have the counts of their option `scope`, unless it is `global`.

Whatever else has a `scope` begins with it, and may move weights between layers (`dsr`).
"""

OMITTED: dict[str, tuple[frozenset[str], str]] = {
    "random": (
        frozenset({RANDOM, REINITIALISED}),
        "its masks are random and know nothing of the weights: of masks, only magnitude masks",
    ),
    "magnitude_at_init": (frozenset({MAGNITUDE}), "its masks are the magnitude masks themselves"),
}
"""Controls that would be another draw of the method itself, or the very same masks."""


def mask_controls(method: str, scope: str | None) -> Iterator[Control]:
    """What a method that prunes to a density is compared with, besides dense networks.

    Random masks and the largest initial weights with the method's count in each layer (Frankle et
    al., 2021, arXiv:2009.08576), and its masks on weights that are drawn anew (Frankle & Carbin,
    2019, arXiv:1803.03635). All are ordinary trainings.

    Where the counts of the layers are known beforehand, a control does not ask which method it is
    for: methods of one rule share it, since its cell is the same.

    Args:
        method: its name.
        scope: the method's option of that name; None where it has none.
    """
    known = scope if method in LAYERS_BY_SCOPE and scope in ("uniform", "er", "erk") else None
    layers: tuple[tuple[str, str | bool], ...]
    layers = (("scope", known),) if known else (("layers_of_source", True),)
    omitted, _ = OMITTED.get(method, (frozenset(), ""))
    for control in (
        Control(RANDOM, "random", layers, known is None),
        Control(MAGNITUDE, "magnitude_at_init", layers, known is None),
        Control(REINITIALISED, "ticket_control", (), from_source=True),
    ):
        if control.name not in omitted:
            yield control
