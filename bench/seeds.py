"""One seed of a cell, many streams: weights, data order, method, noise. No torch."""

from __future__ import annotations

import hashlib


def derive(seed: int, *stream: str | int) -> int:
    """A 63-bit seed for one stream of a cell.

    Streams do not depend on each other: a method that draws more random numbers sees the same
    batches as one that draws none.

    Args:
        seed: the cell's seed.
        stream: names and counters, such as `"order", epoch`.
    """
    text = ":".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=8).digest()) >> 1
