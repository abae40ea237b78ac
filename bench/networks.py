"""Networks for a data set: freshly initialised, or to ask questions of."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import nn

from bench.datasets import DatasetInfo
from bench.errors import SuiteError, UnknownName
from bench.seeds import derive
from bench.spec import Options, Scalar
from models import create_model, is_known, names_like
from models.initialise import initialise

LOADING = frozenset(
    {
        *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
        *("checkpoint_path", "cache_dir"),
    }
)
"""Keywords by which timm reads files. A suite is refused them; so are records and exports."""


def make_model(
    name: str,
    info: DatasetInfo,
    options: Mapping[str, Scalar],
    seed: int,
    initialisation: str = "model",
) -> nn.Module:
    """A freshly initialised network; the same for every method with the same seed.

    Args:
        name: of the model.
        info: of the data set, which fixes input and classes.
        options: the model's.
        seed: of the weights.
        initialisation: see `models.initialise`.

    Raises:
        SuiteError: no such model or option, or the model cannot take the data set's images.
    """
    if loading := LOADING & options.keys():
        raise SuiteError(
            f"model {name}: {', '.join(sorted(loading))}: options that load a file; give a suite's "
            "first weights as its init."
        )
    if not is_known(name):
        raise UnknownName("", "model", name, names_like(name))
    torch.manual_seed(derive(seed, "init"))
    try:
        model = create_model(name, info.shape, info.classes, **options)
        initialise(model, initialisation)
        return model
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise SuiteError(f"model {name}: {error}.") from error


@functools.lru_cache(maxsize=8)
def probe(name: str, info: DatasetInfo, options: Options) -> nn.Module:
    """A network to ask questions of, once one image went through it."""
    model = make_model(name, info, dict(options), 0).eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, *info.shape))
    except Exception as error:  # the model may be anyone's
        size, reason = "x".join(map(str, info.shape)), str(error) or type(error).__name__
        raise SuiteError(f"model {name} cannot take images of {size} ({reason}).") from error
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (1, info.classes):
        raise SuiteError(
            f"model {name} returns {shape} for one image; expected (1, {info.classes})."
        )
    return model
