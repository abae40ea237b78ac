"""The step of a run whose batches are shared among the ranks of a group."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from bench.distributed import Group
from bench.seeds import derive
from bench.step import Step, forward, precision
from methods.parametrizations import MaskSTE

plain_batch_norm = functional.batch_norm


class SharedStep(Step):
    """Computes a rank's share of each batch; hooks and optimizer see the mean over the ranks.

    A penalty is the same on all ranks, so the mean has it once.

    Args:
        group: the ranks.
        arguments: of `Step`.
    """

    def __init__(self, *arguments: Any, group: Group, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.group = group
        self._apart = not draws_weights(self.state.model)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """() loss of this rank's share."""
        if self._passes is not None:  # neither normalisation nor noise in it
            return super().forward(images, labels)
        with self._products(), precision(self.recipe, self.device):
            smoothing = self.recipe.label_smoothing
            return forward(self._outputs, self.method, self.state, images, labels, smoothing)

    def finish(self, loss: Tensor) -> None:
        """As ever, on the mean of the ranks' gradients and losses."""
        loss = loss.detach().clone()
        groups = self.state.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            self.group.average([*gradients, loss])
        super().finish(loss)

    def _outputs(self, images: Tensor) -> Tensor:
        with whole_batch_norm(self.group, fused=True), self._noise():
            outputs: Tensor = self.state.model(images)
        return outputs

    @contextmanager
    def _noise(self) -> Iterator[None]:
        """Draws dropout and its kind from the rank's own numbers: its images are others."""
        if not self._apart:
            yield
            return
        seed, _ = self.stream.plan.seed
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive(seed, "noise", self.group.rank, self.stream.position))
            yield


def draws_weights(model: nn.Module) -> bool:
    """Whether weights may be drawn anew in each pass, as gates are: all ranks must draw the same.

    Then all that is drawn in a pass is the same on all ranks, dropout of activations too.
    """
    return any(
        type(parametrization) is not MaskSTE
        for module in model.modules()
        if is_parametrized(module)
        for chain in module.parametrizations.values()  # type: ignore[operator]
        for parametrization in chain
    )


@contextmanager
def whole_batch_norm(group: Group, *, fused: bool) -> Iterator[None]:
    """Has BatchNorm layers use the moments of the whole batch; they look it up where torch has it.

    Args:
        group: whose shares make the batch; by itself, nothing is changed.
        fused: by the kernels of torch's SyncBatchNorm, on a GPU. They cannot be differentiated
            twice.
    """
    if group.size == 1:
        yield
        return
    before = functional.batch_norm
    functional.batch_norm = functools.partial(_batch_norm, group, fused)
    try:
        yield
    finally:
        functional.batch_norm = before


def _batch_norm(
    group: Group,
    fused: bool,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As torch's `batch_norm`, of which it has the names."""
    if not training:
        return plain_batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    if fused and input.is_cuda:
        from torch.nn.modules._functions import SyncBatchNorm

        world = dist.group.WORLD
        options = running_mean, running_var, eps, momentum, world, group.size
        synchronised: Tensor = SyncBatchNorm.apply(input, weight, bias, *options)
        return synchronised
    wide = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    others = [dim for dim in range(wide.ndim) if dim != 1]
    shape = [1, -1] + [1] * (wide.ndim - 2)
    mean = group.mean(wide.mean(others))
    centred = wide - mean.view(shape)
    variance = group.mean(centred.square().mean(others))
    if running_mean is not None and running_var is not None:
        count = group.size * (wide.numel() // wide.shape[1])
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * (count / (count - 1)), momentum)
    outputs = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        outputs = outputs * weight.view(shape)
    if bias is not None:
        outputs = outputs + bias.view(shape)
    return outputs.to(input.dtype)
