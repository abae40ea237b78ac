"""Values that a hostile or careless hand would put in a file, and trees with some of them in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

TEXTS = (
    *(
        "",
        " ",
        ".",
        "..",
        "../../outside",
        "/tmp/outside",
        "a/b",
        "a\\b",
        "a\nb",
        "a\x1b[2Jb",
        "a|b",
    ),
    *("x" * 300, "é" * 120, "\x00", "con", "-rf", "nan", "rigl", "dense", "$(id)", "a.py:Class"),
)
NUMBERS = (
    *(0, 1, 2, 3, -1, 64, 10**6, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(0.5, 0.9, 1.0, -0.5, 1e-300, 1e300),
)

ODD = (
    st.sampled_from(TEXTS)
    | st.sampled_from(NUMBERS)
    | st.booleans()
    | st.integers(-10, 10**12)
    | st.integers(-2000, 2000).map(lambda number: number / 1000)
    | st.text(max_size=8)
    | st.lists(st.sampled_from(TEXTS[:8]) | st.integers(-2, 5), max_size=3)
    | st.dictionaries(st.sampled_from(TEXTS[4:12]), st.integers(-2, 5), max_size=2)
)
"""None of them is None, which TOML has not; `NOTHING` stands for it where a format has."""

MISSING, NOTHING = object(), None


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of dicts and lists."""
    inner: Any = ()
    if isinstance(tree, dict):
        inner = tree.items()
    elif isinstance(tree, list):
        inner = list(enumerate(tree))[:3]  # the others are alike
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with another value at a place; `MISSING` takes the place away."""
    found = copy.deepcopy(tree)
    inside = found
    for key in path[:-1]:
        inside = inside[key]
    if value is MISSING:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return found


@st.composite
def mutated(
    draw: st.DrawFn,
    tree: Any,
    values: st.SearchStrategy[Any],
    hot: frozenset[str] = frozenset(),
    most: int = 3,
) -> Any:
    """A tree with up to `most` places changed; every other of them under a key of `hot`."""
    for _ in range(draw(st.integers(0, most))):
        every = list(places(tree))
        warm = [path for path in every if path[-1] in hot]
        if warm and draw(st.booleans()):
            tree = changed(tree, draw(st.sampled_from(warm)), draw(st.sampled_from(TEXTS) | values))
        elif every:
            tree = changed(tree, draw(st.sampled_from(every)), draw(values))
    return tree


@st.composite
def scratched(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a few of them changed, or cut off."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        found[draw(st.integers(0, len(found) - 1))] = draw(st.integers(0, 255))
    return bytes(found[: draw(st.integers(0, len(found)) | st.just(len(found)))])
