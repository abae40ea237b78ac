"""Dense training: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.api import Controls, SparsityMethod


@dataclass(frozen=True)
class Dense(SparsityMethod):
    """No sparsity: the recipe alone, on the same initial weights and data order as the others."""

    controls: ClassVar[Controls] = "none"
