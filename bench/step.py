"""One optimizer step: the part of training that runs a million times.

It reads and writes tensors that stay where they are, and never waits for the device: `bench.stack`
computes several at once, and `bench.capture` replays one as a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from bench.data import BatchStream
from bench.optimize import Advance
from bench.passes import Passes, written_out
from bench.products import in_layers, pays
from bench.recipes import Recipe
from methods.api import SparsityMethod, TrainState

KINDS = 256
"""Networks and methods that one process compiles; torch would stop at 8 and go on uncompiled."""


def forward(
    model: Callable[[Tensor], Tensor],
    method: SparsityMethod,
    state: TrainState,
    x: Tensor,
    y: Tensor,
    smoothing: float = 0.0,
) -> Tensor:
    """() loss of one batch: the data term and the method's penalty. Compiles as one graph."""
    loss = data_term(model(x), y, smoothing)
    penalty = method.penalty(state)
    return loss if penalty is None else loss + penalty


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """`forward`, compiled anew for each kind of network and method that a process meets."""
    from torch._dynamo import config as dynamo  # takes a while

    dynamo.cache_size_limit = KINDS
    return torch.compile(forward, dynamic=False)


def data_term(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """() cross-entropy in the precision of the labels' loss, which is never less than float32."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return functional.cross_entropy(wide, labels, label_smoothing=smoothing)


def precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """In what the products of a pass are computed."""
    if recipe.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def set_precision(recipe: Recipe) -> None:
    """What torch has no context for: whether float32 may be rounded to tf32 on a GPU.

    torch's own default rounds in convolutions, whatever a recipe calls float32.
    """
    rounded = recipe.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = rounded
    torch.set_float32_matmul_precision("high" if rounded else "highest")


class Step:
    """Computes the step of one run.

    Args:
        method: the method.
        state: of the run, written in place.
        stream: of training batches; `seek` says which is next.
        recipe: precision and smoothing.
        compiled: whether `torch.compile` makes the passes.

    Attributes:
        loss: () of the last step.
        replayed: whether steps were replayed as a CUDA graph.
    """

    replayed = False

    def __init__(
        self,
        method: SparsityMethod,
        state: TrainState,
        stream: BatchStream,
        recipe: Recipe,
        *,
        compiled: bool = False,
    ) -> None:
        self.method, self.state, self.stream, self.recipe = method, state, stream, recipe
        self.device = state.lr.device
        self.compiled = compiled
        self.loss = torch.zeros((), device=self.device)
        by_onednn = self.device.type == "cpu" and not compiled and pays()
        self._products = in_layers if by_onednn else nullcontext
        self._advance = Advance(state.optimizer)
        self._passes: Passes | None = None

    def compute(self) -> None:
        """Forward, backward, and what `finish` does, on the next batch."""
        images, labels = self.stream.read()
        loss = self.forward(images, labels)
        self.backward(loss)
        self.finish(loss)

    def begin(self) -> None:
        """A phase begins: anything may be different."""
        self._advance.forget()
        self._passes = self._written_out()

    def changed(self) -> None:
        """Hooks between steps ran: tensors may lie elsewhere."""
        self._advance.forget()
        if self._passes is not None and not self._passes.intact():
            self._passes = self._written_out()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """() loss, for `backward`."""
        if self._passes is not None:
            return self._passes.forward(images, labels)
        state, smoothing = self.state, self.recipe.label_smoothing
        run = _compiled() if self.compiled else forward
        with self._products(), precision(self.recipe, self.device):
            return run(state.model, self.method, state, images, labels, smoothing)

    def backward(self, loss: Tensor) -> None:
        """Leaves the gradients of the loss that `forward` gave."""
        if self._passes is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._passes.backward()

    def finish(self, loss: Tensor) -> None:
        """From gradients to the next weights: the method's hot hooks around the optimizer.

        Args:
            loss: () of this step; it is kept.
        """
        state, method = self.state, self.method
        with torch.no_grad():
            method.edit_gradients(state)
            self._advance()
            method.project(state)
            self.loss.copy_(loss)
        # The next pass then writes gradients, where it would otherwise add to zeros.
        for group in state.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _written_out(self) -> Passes | None:
        """The passes, where they are autograd's without it: no penalty, nothing compiled."""
        plain = type(self.method).penalty is SparsityMethod.penalty
        if not plain or self.compiled or self.recipe.precision == "bf16":
            return None
        images = self.stream.plan.images
        return written_out(self.state.model, images, self.recipe.label_smoothing)
