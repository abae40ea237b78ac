"""open_lth's loader with worker processes; apart, since its packages have the names of ours."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.benchmarks import contestants
from tests.benchmarks.turns import Tick


def peer_loader(tick: Tick, data: Path, checkout: Path, workers: int) -> None:
    """Its batches of CIFAR-10 alone, for ever.

    Args:
        tick: called after each batch.
        data: folder of cifar10.npz.
        checkout: of facebookresearch/open_lth.
        workers: processes that load.
    """
    peer = contestants._import_open_lth(checkout, data)
    local = importlib.import_module("platforms.local")
    platform = vars(importlib.import_module("platforms.platform"))
    platform["_PLATFORM"] = local.Platform(num_workers=workers)
    loader = contestants._peer_loader(peer, contestants.RESNET20)
    while True:
        loader.shuffle(0)
        for images, _ in loader:
            tick(len(images))
