"""Where a network's first weights come from: chance, timm's pretrained ones, or a file."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.checkpoint import tensor_hash
from bench.datasets import DatasetInfo
from bench.errors import DataError, SuiteError, UnknownName
from bench.networks import make_model, probe
from bench.spec import Options, Scalar
from models import TIMM_PREFIX, pretrained_weights

RANDOM, PRETRAINED = "random", "pretrained"
SUFFIX = ".safetensors"


def located(init: str, folder: Path, where: str) -> str:
    """The suite's `init` with a file as an absolute path.

    Args:
        init: `random`, `pretrained`, or a .safetensors file.
        folder: that a relative path starts from.
        where: place in the input, for errors.

    Raises:
        SuiteError: it is none of these, or there is no such file.
    """
    if init in (RANDOM, PRETRAINED):
        return init
    if not init.endswith(SUFFIX):
        raise UnknownName(where, "init", init, [RANDOM, PRETRAINED, f"a {SUFFIX} file"])
    path = (folder / init).absolute()
    if not path.is_file():
        raise SuiteError(f"{where}: {path}: no such file.")
    return str(path)


def content(init: str, model: str, info: DatasetInfo, options: Options) -> str:
    """What enters a cell's key: `random`, or `pretrained` or `file` with the tensors' hash.

    Args:
        init: from `located`.
        model: name of the model; the weights must fit it.
        info: of the data set.
        options: the model's.

    Raises:
        SuiteError: there are no such weights, or they are another network's.
    """
    if init == RANDOM:
        return init
    if init == PRETRAINED:
        return f"pretrained-{_pretrained_hash(model)}"
    tensors, found = _read(init)
    _check_fit(init, tensors, model, probe(model, info, options).state_dict())
    return f"file-{found}"


def first_network(
    init: str,
    expected: str,
    model: str,
    info: DatasetInfo,
    options: Mapping[str, Scalar],
    seed: int,
    initialisation: str,
) -> nn.Module:
    """A network with its first weights.

    Pretrained weights that do not fit the data (a classifier of other classes, a first layer of
    other channels) are made to fit as timm does it: the classifier is drawn by the seed.

    Args:
        init: from `located`.
        expected: what `content` gave when the suite was resolved.
        model: its name.
        info: of the data set.
        options: the model's.
        seed: of what is random.
        initialisation: of random weights, see `models.initialise`.

    Raises:
        DataError: the weights have changed since.
        SuiteError: there are none.
    """
    found = content(init, model, info, tuple(options.items()))
    if found != expected:
        raise DataError(
            f"the initial weights changed since the suite was resolved (content {found}, expected "
            f"{expected}). Run the suite again."
        )
    if init == PRETRAINED:
        return make_model(model, info, {**options, "pretrained": True}, seed)
    network = make_model(model, info, options, seed, initialisation)
    if init != RANDOM:
        network.load_state_dict(_read(init)[0])
    return network


@functools.lru_cache(maxsize=2)
def _pretrained_hash(model: str) -> str:
    if not model.startswith(TIMM_PREFIX):
        raise SuiteError(f"model {model}: init = 'pretrained' is for {TIMM_PREFIX}NAME only.")
    try:
        weights = pretrained_weights(model)
    except Exception as error:  # no network, no such weights: each library below has its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SuiteError(f"model {model}: cannot get its pretrained weights ({reason}).") from error
    return tensor_hash(weights)


def _read(path: str) -> tuple[dict[str, Tensor], str]:
    return _read_version(path, Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read_version(path: str, changed: int) -> tuple[dict[str, Tensor], str]:
    """Tensors of a file as it was changed last, and their hash; nothing is unpickled."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SuiteError(f"init: {path}: damaged, or no safetensors file ({error}).") from error
    if bad := [n for n, t in tensors.items() if not torch.isfinite(t).all()]:
        raise SuiteError(f"init: {path}: not finite: {', '.join(bad[:5])}.")
    return tensors, tensor_hash(tensors)


def _check_fit(
    path: str, found: Mapping[str, Tensor], model: str, expected: Mapping[str, Tensor]
) -> None:
    problems = [f"has no {name}" for name in expected.keys() - found.keys()]
    problems += [f"has {name}, which the model has not" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {_shape(found[name])}, the model's is {_shape(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    problems += [
        f"{name} is of {found[name].dtype}, the model's of {expected[name].dtype}"
        for name in expected.keys() & found.keys()
        if found[name].is_floating_point() != expected[name].is_floating_point()
        or found[name].is_complex()
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        text = "; ".join(sorted(problems)[:5])
        raise SuiteError(f"init: {path} does not fit model {model}: {text}{more}.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
