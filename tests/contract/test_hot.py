"""No step of a method waits for the device, and no change of its masks leaves memory behind."""

from __future__ import annotations

from itertools import islice

import torch

from bench.step import Step
from bench.trainer import Trainer
from tests.contract.checks import builder
from tests.contract.test_methods import every_case_in_every_setting, every_sparse_case, method_of
from tests.hot import NoWaiting
from tests.tiny import train

KEEPS_MEMORY = {
    "dpf": "pruned weights are updated too, momentum and all (Eq. 2)",
    "sparse_momentum": "pruned weights are chosen by their momentum",
    "top_kast": "the masks are A, and the larger set B trains; outside B memory is cleared",
}
"""Method -> why its optimizer remembers weights that the masks prune. (So do those that prune
filters: `sfp` and `dpf_filters` train them on.)"""


@every_case_in_every_setting
def test_no_step_waits_for_the_device(name, options, setting, monkeypatch):
    plain = Step.compute
    computed = []

    def rehearsed(step: Step) -> None:
        computed.append(step)
        if len(computed) == 1:  # in the first, the optimizer makes its memory
            return plain(step)
        with NoWaiting():
            return plain(step)

    monkeypatch.setattr(Step, "compute", rehearsed)
    steps = islice(builder(method_of(name, options), setting)().run(), 4)
    assert len(list(steps)) == len(computed) == 4


def remembered(trainer: Trainer) -> dict[str, int]:
    """Of each weight, how many pruned entries the optimizer has memory of."""
    state = trainer.state
    return {
        f"{name} {key}": int(torch.count_nonzero(value[state.masks[name] == 0]))
        for name, weight in state.weights.items()
        for key, value in state.optimizer.state.get(weight, {}).items()
        if isinstance(value, torch.Tensor) and value.shape == weight.shape
    }


def watched_memory(trainer: Trainer) -> list[dict[str, int]]:
    """Trains to the end; what `remembered` says after each hook that changed a mask."""
    found: list[dict[str, int]] = []

    def watch(hook):
        def watched(argument):
            before = [mask.clone() for mask in trainer.state.masks.values()]
            hook(argument)
            after = trainer.state.masks.values()
            if not all(map(torch.equal, before, after)):
                found.append(remembered(trainer))

        return watched

    for hook in ("start_phase", "update", "project"):  # methods are frozen
        object.__setattr__(trainer.method, hook, watch(getattr(trainer.method, hook)))
    train(trainer)
    return found


@every_sparse_case
def test_the_optimizer_forgets_what_a_change_of_masks_prunes(name, options):
    found = watched_memory(builder(method_of(name, options), "mlp-adam")())
    left = [memory for memory in found if any(memory.values())]
    if name in KEEPS_MEMORY:
        assert left, "then it need not be named as one that reads them"
    else:
        assert not left
