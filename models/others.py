"""Models of installed packages: entry points `sparsebench.models`, name -> module:function."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from torch import nn

GROUP = "sparsebench.models"


def every() -> dict[str, list[EntryPoint]]:
    """What installed packages offer, by name; nothing of it is loaded."""
    return _entry_points(tuple(sys.path))


def find(name: str) -> list[EntryPoint]:
    """Who offers a name; nobody, as a rule one package, by mistake several."""
    return every().get(name, [])


def package(point: EntryPoint) -> str:
    """Name of the package that has an entry point."""
    return point.dist.name if point.dist else "an installed package"


def load(name: str) -> Callable[..., nn.Module]:
    """The function that builds a model.

    Args:
        name: that a package offers.

    Raises:
        ValueError: two packages offer the name, it cannot be loaded, or it is no such function.
    """
    first, *others = find(name)
    place = f"model {name!r} of {package(first)}"
    if others:
        raise ValueError(f"{place} is offered by {package(others[0])} too: uninstall one of them")
    try:
        loaded = first.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{place} cannot be loaded from {first.value} ({reason})") from error
    if not _is_builder(loaded):
        form = "f(input_shape, classes, *, option=default)"
        raise ValueError(f"{place}: {first.value} is no function {form}")
    return cast("Callable[..., nn.Module]", loaded)


def create(
    name: str, input_shape: tuple[int, int, int], classes: int, options: Mapping[str, object]
) -> nn.Module:
    """A model of a package.

    Args:
        name: that a package offers.
        input_shape: (channels, height, width) of one image.
        classes: size of the output.
        options: those that the function has.

    Raises:
        ValueError: whatever went wrong in the function, or it returned something else.
    """
    from torch import nn

    try:
        model = load(name)(input_shape, classes, **options)
    except Exception as error:
        raise cannot(name, input_shape, {"classes": classes, **options}, error) from error
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ValueError(f"model {name!r} of {package(find(name)[0])}: {kind} is no nn.Module")
    return model


def summary(builder: Callable[..., nn.Module]) -> str:
    """First line of its documentation."""
    # A partial has the documentation of `partial`.
    function = builder.func if isinstance(builder, functools.partial) else builder
    return (function.__doc__ or "").strip().partition("\n")[0]


def cannot(
    name: str, input_shape: tuple[int, int, int], given: Mapping[str, object], error: Exception
) -> ValueError:
    """What foreign code says when it cannot build a model, with the sizes it was asked for."""
    shape = "x".join(map(str, input_shape))
    found = ", ".join(f"{key} = {value!r}" for key, value in given.items())
    reason = str(error) or type(error).__name__
    return ValueError(f"{name} cannot be built for images of {shape} with {found}: {reason}")


def _is_builder(loaded: object) -> bool:
    """Whether a shape and a number of classes are all it needs."""
    if not callable(loaded):
        return False
    try:
        inspect.signature(loaded).bind((1, 1, 1), 1)
    except (TypeError, ValueError):
        return False
    return True


@functools.lru_cache(maxsize=4)
def _entry_points(path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """All of the group, by name; `path` is `sys.path`, on which packages are looked for."""
    found: dict[str, list[EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found
