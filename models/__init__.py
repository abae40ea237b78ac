"""The networks: a table without torch, and `create_model`. See README.md in this folder."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

TIMM_PREFIX = "timm:"
"""`timm:NAME` is the model NAME of the timm library, without pretrained weights."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One line of the table.

    Attributes:
        target: `module:function` inside this package; the function takes the input shape, the
            number of classes, and the model's options by keyword only.
        summary: one line with the paper.
    """

    target: str
    summary: str


MODELS: dict[str, ModelInfo] = {
    "lenet_300_100": ModelInfo(
        "lenet:lenet_300_100", "three linear layers (LeCun et al., 1998, Proc. IEEE 86)"
    ),
    "lenet5": ModelInfo(
        "lenet:lenet5", "LeNet-5 as in Caffe, 20 and 50 filters (LeCun et al., 1998, Proc. IEEE 86)"
    ),
    "conv2": ModelInfo(
        "conv_small:conv2", "Conv-2, no normalisation (Frankle & Carbin, 2019, arXiv:1803.03635)"
    ),
    "conv4": ModelInfo(
        "conv_small:conv4", "Conv-4, no normalisation (Frankle & Carbin, 2019, arXiv:1803.03635)"
    ),
    "conv6": ModelInfo(
        "conv_small:conv6", "Conv-6, no normalisation (Frankle & Carbin, 2019, arXiv:1803.03635)"
    ),
    "resnet20": ModelInfo(
        "resnet_cifar:resnet20", "CIFAR ResNet of 20 layers (He et al., 2016, arXiv:1512.03385)"
    ),
    "resnet32": ModelInfo(
        "resnet_cifar:resnet32", "CIFAR ResNet of 32 layers (He et al., 2016, arXiv:1512.03385)"
    ),
    "resnet44": ModelInfo(
        "resnet_cifar:resnet44", "CIFAR ResNet of 44 layers (He et al., 2016, arXiv:1512.03385)"
    ),
    "resnet56": ModelInfo(
        "resnet_cifar:resnet56", "CIFAR ResNet of 56 layers (He et al., 2016, arXiv:1512.03385)"
    ),
    "resnet110": ModelInfo(
        "resnet_cifar:resnet110", "CIFAR ResNet of 110 layers (He et al., 2016, arXiv:1512.03385)"
    ),
    "vgg11": ModelInfo(
        "vgg:vgg11", "VGG-11 for CIFAR (Simonyan & Zisserman, 2015, arXiv:1409.1556)"
    ),
    "vgg13": ModelInfo(
        "vgg:vgg13", "VGG-13 for CIFAR (Simonyan & Zisserman, 2015, arXiv:1409.1556)"
    ),
    "vgg16": ModelInfo(
        "vgg:vgg16", "VGG-16 for CIFAR (Simonyan & Zisserman, 2015, arXiv:1409.1556)"
    ),
    "vgg19": ModelInfo(
        "vgg:vgg19", "VGG-19 for CIFAR (Simonyan & Zisserman, 2015, arXiv:1409.1556)"
    ),
    "vgg16_d": ModelInfo(
        "vgg:vgg16_d",
        "VGG-16 with three linear layers (Dettmers & Zettlemoyer, 2019, arXiv:1907.04840)",
    ),
    "wrn_16_2": ModelInfo(
        "wide_resnet:wrn_16_2",
        "wide ResNet WRN-16-2 (Zagoruyko & Komodakis, 2016, arXiv:1605.07146)",
    ),
    "wrn_16_8": ModelInfo(
        "wide_resnet:wrn_16_8",
        "wide ResNet WRN-16-8 (Zagoruyko & Komodakis, 2016, arXiv:1605.07146)",
    ),
    "wrn_16_10": ModelInfo(
        "wide_resnet:wrn_16_10",
        "wide ResNet WRN-16-10 (Zagoruyko & Komodakis, 2016, arXiv:1605.07146)",
    ),
    "wrn_22_2": ModelInfo(
        "wide_resnet:wrn_22_2",
        "wide ResNet WRN-22-2 (Zagoruyko & Komodakis, 2016, arXiv:1605.07146)",
    ),
    "wrn_22_8": ModelInfo(
        "wide_resnet:wrn_22_8",
        "wide ResNet WRN-22-8 (Zagoruyko & Komodakis, 2016, arXiv:1605.07146)",
    ),
    "wrn_28_2": ModelInfo(
        "wide_resnet:wrn_28_2",
        "wide ResNet WRN-28-2 (Zagoruyko & Komodakis, 2016, arXiv:1605.07146)",
    ),
    "wrn_28_4": ModelInfo(
        "wide_resnet:wrn_28_4",
        "wide ResNet WRN-28-4 (Zagoruyko & Komodakis, 2016, arXiv:1605.07146)",
    ),
    "wrn_28_8": ModelInfo(
        "wide_resnet:wrn_28_8",
        "wide ResNet WRN-28-8 (Zagoruyko & Komodakis, 2016, arXiv:1605.07146)",
    ),
    "wrn_28_10": ModelInfo(
        "wide_resnet:wrn_28_10",
        "wide ResNet WRN-28-10 (Zagoruyko & Komodakis, 2016, arXiv:1605.07146)",
    ),
}


def is_known(name: str) -> bool:
    """Whether `create_model` knows the name; imports timm for a `timm:` name only."""
    if not name.startswith(TIMM_PREFIX):
        return name in MODELS
    import timm

    bare = name.removeprefix(TIMM_PREFIX)
    # timm's own test ignores the tag of the pretrained weights in `resnet18.a1_in1k`.
    return bool(timm.is_model(bare)) and ("." not in bare or bare in timm.list_pretrained())


def names_like(name: str) -> list[str]:
    """Names to offer in place of an unknown one: all of ours, or the closest of timm's."""
    if not name.startswith(TIMM_PREFIX):
        return sorted(MODELS)
    import timm

    bare = name.removeprefix(TIMM_PREFIX)
    close = difflib.get_close_matches(bare, timm.list_models(), n=5, cutoff=0.3)
    return [TIMM_PREFIX + match for match in close]


def model_options(name: str) -> dict[str, object]:
    """Names and default values of a model's options.

    Empty for a `timm:` name: any keyword of timm's model is passed on, none is listed.

    Raises:
        ValueError: there is no such model.
    """
    if name.startswith(TIMM_PREFIX):
        return {}
    parameters = inspect.signature(_builder(name)).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


def create_model(
    name: str, input_shape: tuple[int, int, int], classes: int | None = None, **options: object
) -> nn.Module:
    """A freshly initialised model, on the CPU, in training mode.

    Args:
        name: a name in MODELS, or `timm:NAME`.
        input_shape: (channels, height, width) of one image.
        classes: size of the output; None takes the model's own (10 for ours).
        options: the model's options, see `model_options`.

    Raises:
        ValueError: no such model or option, a value that is not allowed, or images that the model
            cannot take; says what was found and what is allowed.
    """
    shape = "x".join(map(str, input_shape))
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"input_shape: found {shape}; allowed: channels, height, width above 0")
    if classes is not None and classes < 1:
        raise ValueError(f"classes: found {classes}; allowed: 1 or more, or None")
    if name.startswith(TIMM_PREFIX):
        return _create_timm(name, input_shape, classes, options)
    allowed = model_options(name)
    for option, value in options.items():
        if option not in allowed:
            listed = ", ".join(allowed) or "none"
            raise ValueError(f"{name}: no such option: {option} = {value!r}; allowed: {listed}")
    return _builder(name)(input_shape, 10 if classes is None else classes, **options)


def _builder(name: str) -> Callable[..., nn.Module]:
    if name not in MODELS:
        raise _unknown(name)
    module, function = MODELS[name].target.split(":")
    builder = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    return cast("Callable[..., nn.Module]", builder)


def _create_timm(
    name: str, input_shape: tuple[int, int, int], classes: int | None, options: dict[str, object]
) -> nn.Module:
    if not is_known(name):
        raise _unknown(name)
    import timm

    bare = name.removeprefix(TIMM_PREFIX)
    given: dict[str, Any] = {"in_chans": input_shape[0]}
    if classes is not None:
        given["num_classes"] = classes
    config = timm.get_pretrained_cfg(bare)
    # Only models with position embeddings and the like are built for one image size.
    if config is not None and config.fixed_input_size and input_shape[1:] != config.input_size[1:]:
        given["img_size"] = input_shape[1:]
    given |= options
    try:
        return timm.create_model(bare, pretrained=False, **given)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        found = ", ".join(f"{key} = {value!r}" for key, value in given.items())
        raise ValueError(f"{name} cannot be built with {found}: {error}") from error


def _unknown(name: str) -> ValueError:
    return ValueError(f"no such model: {name!r}; known: {', '.join(names_like(name)) or 'none'}")
