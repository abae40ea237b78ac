"""Gives tox an environment `bench-<suite>` for every suite in `bench/suites`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tox.config.loader.memory import MemoryLoader
from tox.config.types import Command
from tox.plugin import impl

if TYPE_CHECKING:
    from tox.config.sets import ConfigSet
    from tox.session.state import State

SUITES = sorted(path.stem for path in (Path(__file__).parent / "bench" / "suites").glob("*.toml"))


@impl
def tox_extend_envs() -> Iterable[str]:
    """Names of the environments."""
    return [f"bench-{suite}" for suite in SUITES]


@impl
def tox_add_core_config(core_conf: ConfigSet, state: State) -> None:
    """Their settings; all else is as in `[testenv]` of tox.ini."""
    for suite in SUITES:
        loader = MemoryLoader(
            description=f"train what is missing of the suite {suite}; -- adds options of `run`",
            commands=[Command(["sparsebench", "run", suite, *(state.conf.pos_args(None) or ())])],
        )
        state.conf.memory_seed_loaders[f"bench-{suite}"].append(loader)
