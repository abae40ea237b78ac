"""Whole filters: their norms, their masks, and the normalisation behind them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from methods.allocation import allocate, keep_count
from methods.api import Scores, Shape, TrainState
from methods.masking import topk_mask


def convolutions(model: nn.Module) -> tuple[str, ...]:
    """Weights of all convolutions, output first: a classifier's filters would be its classes."""
    modules = model.named_modules()
    kept = ((name, m) for name, m in modules if isinstance(m, _ConvNd) and not m.transposed)
    return tuple(f"{name}.weight" if name else "weight" for name, m in kept)


def filter_norms(weight: Tensor) -> Tensor:
    """L2 norm of each filter (out,), for a weight (out, in, ...)."""
    norms: Tensor = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)
    return norms


def rows(mask: Tensor) -> Tensor:
    """The mask of the filters (out,), a view of the weight's mask (out, in, ...)."""
    for _ in range(mask.ndim - 1):
        mask = mask.select(-1, 0)
    return mask


def write_filter_masks(
    state: TrainState, scores: Scores, density: float, scope: Literal["global", "uniform"]
) -> None:
    """Writes masks that keep exactly `keep_count(filters, density)` filters of highest score.

    Args:
        state: its masks are written in place.
        scores: (out,) for each weight.
        density: of all the filters together, in (0, 1].
        scope: ranks all layers together, or gives each the same density.
    """
    sizes = {name: len(score) for name, score in scores.items()}
    if scope == "global":
        kept = topk_mask(torch.cat(list(scores.values())), keep_count(sum(sizes.values()), density))
        parts = list(torch.split(kept, list(sizes.values())))
    else:
        counts = allocate({name: (size,) for name, size in sizes.items()}, density, "uniform")
        parts = [topk_mask(scores[name], keep) for name, keep in counts.items()]
    for name, part in zip(scores, parts, strict=True):
        mask = state.masks[name]
        mask.copy_(part.view(-1, *[1] * (mask.ndim - 1)).expand_as(mask))


def companions(model: nn.Module, names: Mapping[str, object], shape: Shape) -> dict[str, list[str]]:
    """Parameters that go with a convolution's filters: its bias, and its BatchNorm's two.

    A filter of zeros behind which the normalisation stays still sends out a constant. Which
    normalisation stands behind a convolution is seen by sending an image through.

    Args:
        model: plain.
        names: weights of convolutions.
        shape: (channels, height, width) of an image.

    Returns:
        For each name, the parameters with one entry a filter, by their names.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    outputs: dict[int, tuple[str, Tensor]] = {}
    handles = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            outputs[id(output)] = (name, output)  # kept alive, so that no other takes its id

        return hook

    def match(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            owner = outputs.get(id(inputs[0]))
            if owner is not None and module.weight is not None:
                found[owner[0]] += [f"{name}.weight", f"{name}.bias"]

        return hook

    for name, module in model.named_modules():
        if f"{name}.weight" in found:
            if module.bias is not None:
                found[f"{name}.weight"].append(f"{name}.bias")
            handles.append(module.register_forward_hook(remember(f"{name}.weight")))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(match(name)))
    with evaluation(model):
        model(two_images(model, shape)[:1])
    for handle in handles:
        handle.remove()
    return found


def uncalled(model: nn.Module, names: Collection[str], shape: Shape) -> list[str]:
    """Those of the modules whose forward pass an image does not go through.

    Their parent may read the weight and compute with it itself, as some attentions do.

    Args:
        model: any.
        names: of modules.
        shape: (channels, height, width) of an image.
    """
    called: set[str] = set()
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
        for name in names
    ]
    with evaluation(model):
        model(two_images(model, shape)[:1])
    for hook in hooks:
        hook.remove()
    return [name for name in names if name not in called]


def zero_companions(state: TrainState, found: Mapping[str, list[str]]) -> None:
    """Zeroes the parameters that go with pruned filters, in a plain model."""
    for name, others in found.items():
        kept = rows(state.masks[name])
        for other in others:
            state.model.get_parameter(other).mul_(kept)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradient; the mode comes back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(training)


def two_images(model: nn.Module, shape: Shape) -> Tensor:
    """Two images that differ; no random stream is touched."""
    device = next(model.parameters()).device
    size = torch.Size(shape).numel()
    wave = torch.sin(torch.arange(2 * size, device=device, dtype=torch.float32))
    return wave.view(2, *shape)
