"""A CUDA graph without a GPU: what a step tells the device to do is kept, and done again.

Like the graph, a tape knows operations, the memory that they read and write, and the numbers that
they were given; not the Python that gave them. So a step that decides something on the host, or
works on tensors that are later replaced, goes wrong on the tape as it would on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bench.capture import Captured, memory


def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Stands in for `bench.capture.recorded`: records the step, which then has not been done.

    Args:
        work: bound to the step.
        device: the CPU.
    """
    assert device.type == "cpu"
    step: Any = work.__self__  # type: ignore[attr-defined]
    kept = [(tensor, tensor.detach().clone()) for tensor in written(step)]
    noise = torch.get_rng_state()
    tape = _Tape()
    try:
        with tape:
            work()
    finally:
        torch.set_rng_state(noise)
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
    return tape.replay


def written(step: Captured) -> list[Tensor]:
    """Every tensor that a step may write."""
    state = step.state
    slots = [tensor for slot in state.slots.values() for tensor in slot.values()]
    tensors = [*state.model.parameters(), *state.model.buffers(), *state.masks.values(), step.loss]
    return tensors + slots + memory(state.optimizer)


class _Tape(TorchDispatchMode):
    """Keeps operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        known = {memory_of(tensor) for tensor in _tensors((args, kwargs))}
        # What is a view, or was written in place, lies in memory that is known already.
        new = [tensor for tensor in _tensors(found) if memory_of(tensor) not in known]
        self.operations.append((func, args, dict(kwargs or {}), [t.detach() for t in new]))
        return found

    def replay(self) -> None:
        """Does everything again, with results where they lay."""
        with torch.no_grad():
            for func, args, kwargs, results in self.operations:
                known = {memory_of(tensor) for tensor in _tensors((args, kwargs))}
                found = func(*args, **kwargs)
                new = [tensor for tensor in _tensors(found) if memory_of(tensor) not in known]
                for result, tensor in zip(results, new, strict=True):
                    result.copy_(tensor)


def memory_of(tensor: Tensor) -> int:
    """Where its memory begins."""
    return tensor.untyped_storage().data_ptr()


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))
