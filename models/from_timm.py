"""Any model of timm, built for the images and classes of the data. Names are without `timm:`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from models.others import cannot

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_known(name: str) -> bool:
    """Whether timm has the model, and the weights that a tag names."""
    import timm

    # timm's own test ignores the tag of the pretrained weights in `resnet18.a1_in1k`.
    return bool(timm.is_model(name)) and ("." not in name or name in timm.list_pretrained())


def names_like(name: str) -> list[str]:
    """The five closest names of timm."""
    import timm

    return difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.3)


def create(
    name: str,
    input_shape: tuple[int, int, int],
    classes: int | None,
    options: Mapping[str, object],
) -> nn.Module:
    """A model of timm, from random weights unless the options say otherwise.

    Args:
        name: that timm has.
        input_shape: (channels, height, width) of one image.
        classes: size of the output; None takes the model's own.
        options: keywords of timm's model.

    Raises:
        ValueError: timm cannot build it like that.
    """
    import timm

    given: dict[str, Any] = {"in_chans": input_shape[0]}
    if classes is not None:
        given["num_classes"] = classes
    config = timm.get_pretrained_cfg(name)
    # Only models with position embeddings and the like are built for one image size.
    if config is not None and config.fixed_input_size and input_shape[1:] != config.input_size[1:]:
        given["img_size"] = input_shape[1:]
    given |= options
    try:
        return timm.create_model(name, **given)
    except Exception as error:  # a size that does not fit may end in a division by zero
        raise cannot(f"timm:{name}", input_shape, given, error) from error


def pretrained_weights(name: str) -> dict[str, Tensor]:
    """The published weights of a model; downloads what is not in timm's cache."""
    import timm

    return cast("dict[str, Tensor]", timm.create_model(name, pretrained=True).state_dict())
