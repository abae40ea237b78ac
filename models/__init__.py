"""The networks: a table without torch, and `create_model`. See README.md in this folder."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from models import from_timm, others

if TYPE_CHECKING:
    from torch import Tensor, nn

TIMM_PREFIX = "timm:"
"""`timm:NAME` is the model NAME of the timm library, with random weights unless told."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as `list` shows it.

    Attributes:
        target: `module:function`, the table's inside this package; the function takes the input
            shape, the number of classes, and the model's options by keyword only.
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
    "alexnet_s": ModelInfo(
        "alexnet:alexnet_s", "AlexNet-s, 1024 hidden units (Lee et al., 2019, arXiv:1810.02340)"
    ),
    "alexnet_b": ModelInfo(
        "alexnet:alexnet_b", "AlexNet-b, 2048 hidden units (Lee et al., 2019, arXiv:1810.02340)"
    ),
    "densenet_40_12": ModelInfo(
        "densenet_cifar:densenet_40_12",
        "DenseNet of 40 layers, growth 12 (Huang et al., 2017, arXiv:1608.06993)",
    ),
    "densenet_bc_100_12": ModelInfo(
        "densenet_cifar:densenet_bc_100_12",
        "DenseNet-BC of 100 layers, growth 12 (Huang et al., 2017, arXiv:1608.06993)",
    ),
}


def names() -> list[str]:
    """Every model but timm's: the table's, and those of installed packages; nothing is loaded."""
    return [*MODELS, *_others()]


def find_info(name: str) -> ModelInfo | None:
    """What is known of a model; None where no model has that name, and for timm's.

    The table's names go first and load nothing. Those of installed packages load the function.

    Raises:
        ValueError: an installed package offers the name, and what it offers cannot be used.
    """
    if name in MODELS:
        return MODELS[name]
    if name not in _others():
        return None
    return ModelInfo(others.find(name)[0].value, others.summary(others.load(name)))


def conflicts() -> list[str]:
    """In words, the entry points that are not used because the table has their name."""
    return [
        f"model {name!r} of {others.package(point)} is not used: the table has one of that name"
        for name in MODELS
        for point in others.find(name)
    ]


def is_known(name: str) -> bool:
    """Whether `create_model` knows the name; imports timm for a `timm:` name only."""
    if name.startswith(TIMM_PREFIX):
        return from_timm.is_known(name.removeprefix(TIMM_PREFIX))
    return name in MODELS or name in _others()


def names_like(name: str) -> list[str]:
    """Names to offer in place of an unknown one: all of ours and of others, or timm's closest."""
    if name.startswith(TIMM_PREFIX):
        close = from_timm.names_like(name.removeprefix(TIMM_PREFIX))
        return [TIMM_PREFIX + match for match in close]
    return sorted(names())


def model_options(name: str) -> dict[str, object]:
    """Names and default values of a model's options.

    Empty for a `timm:` name: any keyword of timm's model is passed on, none is listed.

    Raises:
        ValueError: there is no such model, or an installed package's cannot be used.
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
        name: a name in MODELS or of an installed package, or `timm:NAME`.
        input_shape: (channels, height, width) of one image.
        classes: size of the output; None takes the model's own (10 for ours and others').
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
        return from_timm.create(_timm_name(name), input_shape, classes, options)
    allowed = model_options(name)
    for option, value in options.items():
        if option not in allowed:
            listed = ", ".join(allowed) or "none"
            raise ValueError(f"{name}: no such option: {option} = {value!r}; allowed: {listed}")
    classes = 10 if classes is None else classes
    if name in MODELS:
        return _builder(name)(input_shape, classes, **options)
    return others.create(name, input_shape, classes, options)


def pretrained_weights(name: str) -> dict[str, Tensor]:
    """The published weights of a `timm:` model as they are, before anything is made to fit.

    `create_model` makes them fit the data under timm's option `pretrained`. Downloads what is not
    in timm's cache; errors are those of timm and of what it downloads with.

    Raises:
        ValueError: there is no such model of timm.
    """
    return from_timm.pretrained_weights(_timm_name(name))


def _others() -> dict[str, object]:
    """Models of installed packages that the table leaves a name."""
    return {name: points for name, points in others.every().items() if name not in MODELS}


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in MODELS:
        module, function = MODELS[name].target.split(":")
        builder = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return cast("Callable[..., nn.Module]", builder)
    if name in _others():
        return others.load(name)
    raise _unknown(name)


def _timm_name(name: str) -> str:
    """What stands behind the prefix."""
    if not (name.startswith(TIMM_PREFIX) and is_known(name)):
        raise _unknown(name)
    return name.removeprefix(TIMM_PREFIX)


def _unknown(name: str) -> ValueError:
    return ValueError(f"no such model: {name!r}; known: {', '.join(names_like(name)) or 'none'}")
