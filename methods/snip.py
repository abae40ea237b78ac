"""Single-shot network pruning by connection sensitivity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.api import Run, Scores, option
from methods.masking import PruneAtInit

OWN_DRAW = 2**31
"""Of initial weights: none that `ticket_control` makes, so that its control is another network."""


@dataclass(frozen=True)
class SNIP(PruneAtInit):
    """SNIP (Lee et al., 2019, arXiv:1810.02340), Eq. 3 to 6.

    Before the first step, keeps the weights with the largest |w dL/dw|: the loss's sensitivity to
    removing them. The images are not augmented, the regulariser does not enter, and normalisation
    uses the batch's statistics.

    Differs from the paper: biases are not pruned. (In the published code they are scored, and begin
    at 0, so that every one of them is pruned.) The paper's normalisation by the scores' sum does
    not change their order and is left out.

    Attributes:
        batches: training batches that the gradient is averaged over (paper: 1); they are metered.
        reinit: training starts from other initial weights than were scored (published code).
    """

    paper: ClassVar[str] = "arXiv:1810.02340"
    batches: int = option(1, "[1, 1000]")
    reinit: bool = False

    def scores(self, run: Run) -> Scores:
        """Connection sensitivity."""
        gradients = run.gradients(self.batches, augmented=False)
        return {name: (run.state.weights[name] * g).abs() for name, g in gradients.items()}

    def prune(self, run: Run, density: float) -> None:
        """Prunes; draws all parameters anew if asked."""
        super().prune(run, density)
        if self.reinit:
            run.state.model.load_state_dict(run.fresh_weights(OWN_DRAW))
