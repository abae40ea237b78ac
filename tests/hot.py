"""Rehearses on a CPU what a CUDA graph asks of code: it never waits, and its memory stays.

`with NoWaiting(): step.compute()` finds what `torch.cuda.set_sync_debug_mode("error")` finds on a
GPU, or most of it; `recorded(stream)` reads batches again and again as a graph would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from bench.data import BatchStream
from methods import ranking

WAITING = frozenset(
    [
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "nonzero",
        "nonzero_numpy",
        "argwhere",
        "masked_select",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "unique_dim_consecutive",
        "bincount",
        "histogram",
        "repeat_interleave",
        "_linalg_check_errors",
    ]
)
"""Operations whose results, or their shapes, the host must know; or that look at an error code."""

FROM_HOST = frozenset({"lift_fresh", "lift_fresh_copy"})
"""What `torch.tensor` and `torch.from_numpy` end in: on a GPU, a copy from the host."""

MASKED = frozenset({"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"})
"""Operations that wait where an index is a mask: the host must know how many it picks."""

TO_HOST = frozenset({"tolist", "numpy", "__array__", "cpu", "__reduce_ex__", "__dlpack__"})
"""Methods of tensors that reach for the memory itself: below, nothing is seen of them."""


class NoWaiting:
    """Refuses whatever would make the host wait for a GPU, with an AssertionError that names it.

    Methods go the way of a GPU even where the tensors lie on a CPU, where looking is for free.
    Forward, backward and optimizer are seen alike. What a CPU cannot tell: a copy between devices
    inside a library, and the waits of kernels that only a GPU has.
    """

    def __init__(self) -> None:
        elsewhere = mock.patch.object(ranking, "on_host", return_value=False)
        self._modes = elsewhere, _Operations(), _Methods()

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Operations(TorchDispatchMode):
    """Looks at what reaches a device."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        _refuse(name in WAITING, f"aten.{name}", "the host needs its result")
        _refuse(name in FROM_HOST, f"aten.{name}", "a tensor is made from numbers of the host")
        masked = name in MASKED and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        _refuse(masked, f"aten.{name}", "with a mask, the host needs to know how many it picks")
        options = dict(kwargs or {})
        found = func(*args, **options)
        if name in ("_to_copy", "copy_"):
            devices = {
                tensor.device.type for tensor in (found, *args) if isinstance(tensor, Tensor)
            }
            _refuse(len(devices) > 1, f"aten.{name}", f"copies between {sorted(devices)}")
        return found


class _Methods(TorchFunctionMode):
    """Looks at what is asked of tensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        known = name in TO_HOST and (resolve_name(func) or "").startswith("torch.Tensor.")
        _refuse(known, f"Tensor.{name}", "the host needs the memory itself")
        return func(*args, **(kwargs or {}))


def recorded(stream: BatchStream) -> Callable[[], tuple[Tensor, Tensor]]:
    """`stream.read` as a CUDA graph has it: tensors where they are, and Python's choices once."""

    def read() -> tuple[Tensor, Tensor]:
        return stream.read()

    replay: Callable[[], tuple[Tensor, Tensor]] = make_fx(read)()
    return replay


def _refuse(found: bool, what: str, why: str) -> None:
    if found:
        raise AssertionError(f"{what} would wait for a GPU: {why}")
