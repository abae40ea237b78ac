"""A step as one CUDA graph: the host gives one order where it gave hundreds.

On a GPU, small networks wait for the host: ResNet-20 at batch 128 takes about 176 orders a step.
Everything a step does is recorded once, then replayed. What comes between steps runs as ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from bench.step import Step

WARM_UP = 3
"""Steps before the recording: optimizers make their memory in the first, cuDNN chooses kernels."""


def why_not(step: Step) -> str:
    """Why a step cannot be recorded; empty where it can."""
    if step.device.type != "cuda":
        return f"the device is {step.device.type}"
    optimizer = step.state.optimizer
    if not (type(optimizer) in (SGD, Adam, AdamW) or getattr(optimizer, "capturable", False)):
        return f"{type(optimizer).__name__} keeps numbers on the host"
    return ""


class Captured(Step):
    """Computes the first steps as `Step` does, then replays one of them.

    Hooks between steps may make new tensors, such as a method's slots in `start_phase`: then it is
    recorded anew. A recording computes nothing, so no step is lost or done twice.

    Attributes:
        reason: why steps are not replayed; empty where they are.
    """

    reason = ""
    _replay: Callable[[], None] | None = None
    _warm = 0
    _known: tuple[object, ...] = ()

    def compute(self) -> None:
        """One step, replayed if it can be."""
        if self._warm == 0:
            self.reason = self.reason or why_not(self)
        if self._replay is None and not self.reason and self._warm >= WARM_UP:
            self._record()
        if self._replay is None:
            self._warm += 1
            super().compute()
        else:
            self._replay()
            self.replayed = True

    def begin(self) -> None:
        """Forgets the recording: what a method does in a step may differ from phase to phase."""
        super().begin()
        self._replay, self._warm = None, 0

    def changed(self) -> None:
        """Forgets the recording, if it is of tensors that are no longer used."""
        super().changed()
        if self._replay is not None and self._burnt_in() != self._known:
            self._replay, self._warm = None, 0

    def _record(self) -> None:
        try:
            self._replay = recorded(super().compute, self.device)
        except RuntimeError as error:
            self.reason = f"recording failed: {str(error).splitlines()[0]}"
            for parameter in self.state.model.parameters():
                parameter.grad = None
        else:
            self._known = self._burnt_in()

    def _burnt_in(self) -> tuple[object, ...]:
        """What a recording holds fast: where its tensors lie, and the optimizer's numbers."""
        state = self.state
        tensors: list[Tensor] = [*state.model.parameters(), *state.model.buffers()]
        tensors += [*state.weights.values(), *state.masks.values(), state.lr, state.progress]
        tensors += [value for slot in state.slots.values() for value in slot.values()]
        tensors += memory(state.optimizer)
        places = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]
        groups = state.optimizer.param_groups
        numbers = [
            (name, value)
            for group in groups
            for name, value in group.items()
            if isinstance(value, int | float | tuple)
        ]
        return *places, *numbers


def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Records what work tells the device to do, without doing it; returns what does it.

    Raises:
        RuntimeError: it does what cannot be recorded, such as waiting for the device.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream(device)
    generator = torch.cuda.default_generators[stream.device_index]
    noise = generator.clone_state()
    try:
        # Other cells of the process may use the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"), no_waits():
            work()
    except RuntimeError:
        # A state that a broken recording has hold of gives no more numbers outside of it.
        generator.graphsafe_set_state(noise)
        raise
    return graph.replay


@contextmanager
def no_waits() -> Iterator[None]:
    """An error where something would wait for the device.

    Before CUDA itself breaks the recording off: until 2.11, torch cannot record again after that.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def memory(optimizer: Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's memory, in the order of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = [optimizer.state.get(p, {}) for p in parameters]
    return [v for entry in entries for v in entry.values() if isinstance(v, Tensor)]
