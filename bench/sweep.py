"""What killed processes left of cells that are done, taken away by a later run. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from bench.leases import STALE_SECONDS, Leases
from bench.spec import CellSpec
from bench.store import Store

USELESS = ".*", "*/.*", "masks/*/.*", "checkpoints/*.safetensors*", "locks/*"
"""Files in a suite's folder that nobody needs once their cell has its record. What starts with a
dot was being written."""

KEY = re.compile(r"-([0-9a-f]{12})(?![0-9a-f])")


def leftovers(store: Store, spec: CellSpec) -> list[Path]:
    """Files that nobody needs once the cell has its record, but for its lease."""
    slug = spec.slug
    weights, checkpoint = store.weights(spec).parent, store.checkpoint(spec)
    being_written = (
        *(path.glob(f".*{slug}*") for path in (store.folder, store.folder / "attempts", weights)),
        store.masks(spec).glob(".*"),
    )
    return [*checkpoint.parent.glob(f"*{checkpoint.name}*"), *chain(*being_written)]


def sweep(store: Store, specs: Iterable[CellSpec]) -> None:
    """Removes what is left of cells that are done, unless another runner is just about to.

    To be called once the list of cells was written.

    Raises:
        OSError: it cannot be removed.
    """
    done = {spec.key: spec for spec in specs if store.has(spec)}
    found = chain(*(store.folder.glob(pattern) for pattern in USELESS))
    keys = {key for path in found for key in KEY.findall(str(path.relative_to(store.folder)))}
    with Leases() as leases:
        for spec in (done[key] for key in sorted(keys & done.keys())):
            lease = leases.acquire(store.lock(spec))
            if lease is not None:
                for path in leftovers(store, spec):
                    path.unlink(missing_ok=True)
                leases.release(lease)
    # Lists of cells have no lease; by the disk's own clock nobody can be writing an old one.
    now = (store.folder / "suite.json").stat().st_mtime
    for path in store.folder.glob(".suite.json.*"):
        if now - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)
