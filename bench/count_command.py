"""The command that counts a model: parameters and multiply-adds, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bench.arguments import AsJson
from bench.errors import SuiteError, UnknownName, UsageError
from bench.output import print_json, print_table

if TYPE_CHECKING:
    from torch import nn

    from bench.record import LayerCount

app = typer.Typer(rich_markup_mode=None)


@app.command()
def count(
    model: Annotated[str, typer.Argument(help="A model (see `list models`) or timm:NAME.")],
    input_shape: Annotated[
        str, typer.Option("--input", help="Channels x height x width, such as 3x32x32.")
    ],
    classes: Annotated[
        int | None,
        typer.Option(min=1, help="Classes. [default: the model's own for timm, else 10]"),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the model, such as shortcut=B; repeatable.")
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Count as if so many of the prunable weights were zero, such as 0.9."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(help="How the layers share what is left: erk, er or uniform. [default: erk]"),
    ] = None,
    prunable: Annotated[
        str, typer.Option(help="Preset of prunable weights, as `prunable` in a suite.")
    ] = "all",
    as_json: AsJson = False,
) -> None:
    """Count a model's parameters and multiply-adds, layer by layer, dense and at a sparsity.

    MACs A are multiply-adds of weights and attention; B adds two operations for each output of a
    normalisation and one for each of a ReLU or its kind.
    """
    from dataclasses import asdict

    from bench.counting import count_totals, with_kept
    from bench.prunable import PRESETS
    from methods.allocation import allocate
    from models import is_known, names_like

    shape = _shape(input_shape)
    scope = _allocation(sparsity, scope)
    if not is_known(model):
        raise UnknownName("", "model", model, names_like(model))
    if prunable not in PRESETS:
        raise UnknownName("--prunable", "preset", prunable, PRESETS)
    options = dict(_option(text) for text in option or [])
    try:
        # Without values no weight is drawn and nothing is computed; not every model can do that.
        network, layers = _counted(model, shape, classes, options, prunable, sparsity, "meta")
    except Exception:
        try:
            network, layers = _counted(model, shape, classes, options, prunable, sparsity, "cpu")
        except Exception as error:  # the model may be anyone's
            reason = str(error) or type(error).__name__
            raise SuiteError(f"model {model} with images of {input_shape}: {reason}.") from error
    if scope and sparsity is not None:
        shapes = {line.name: line.shape for line in layers if line.prunable}
        layers = with_kept(layers, allocate(shapes, 1 - sparsity, scope))
    else:
        layers = with_kept(layers, {line.name: line.weights for line in layers if line.weights})
    totals = count_totals(network, layers)
    zeros = sum(line.weights - line.nonzero for line in layers if line.prunable)
    weights = sum(line.weights for line in layers if line.prunable)
    found = {
        "model": model,
        "input": list(shape),
        "preset": prunable,
        "sparsity": sparsity,
        "scope": scope,
        **asdict(totals),
        "nonzero": totals.parameters - zeros,
        "prunable": weights,
        "prunable_nonzero": weights - zeros,
        "reached_sparsity": zeros / weights,
        "sparsity_of_all": zeros / totals.parameters,
        "mac_fraction": totals.macs / totals.dense_macs,
        "dense_macs_b": totals.dense_macs + totals.elementwise,
        "macs_b": totals.macs + totals.elementwise,
    }
    if as_json:
        print_json(found | {"layers": layers})
        return
    print_table([_count_row(layer, sparsity is not None) for layer in layers])
    print()
    print_table([{"total": name, "": text} for name, text in _count_totals(found)])


def _counted(
    model: str,
    shape: tuple[int, int, int],
    classes: int | None,
    options: dict[str, Any],
    preset: str,
    sparsity: float | None,
    device: str,
) -> tuple[nn.Module, tuple[LayerCount, ...]]:
    """A network and its lines."""
    import torch

    from bench.counting import count_layers
    from bench.prunable import prunable_names
    from methods.dense import Dense
    from models import create_model

    with torch.device(device):
        network = create_model(model, shape, classes, **options)
    names = prunable_names(network, Dense(), preset, sparsity)
    layers = count_layers(network, shape, names)
    if device == "meta" and any(line.weights and not line.dense_macs for line in layers):
        # An older torch lets an image shrink to nothing there; on the CPU it says what is wrong.
        raise ValueError("a layer computes nothing")
    return network, layers


def _allocation(
    sparsity: float | None, scope: str | None
) -> Literal["er", "erk", "uniform"] | None:
    """The rule that gives each layer its share; None where nothing is pruned."""
    if sparsity is None:
        if scope is not None:
            raise UsageError(f"--scope {scope}: give --sparsity too, such as 0.9.")
        return None
    if not 0 <= sparsity < 1:
        raise UsageError(f"--sparsity {sparsity:g}: must be at least 0 and below 1.")
    if scope == "global":
        raise UsageError(
            "--scope global: ranks the weights of all layers together, which only a trained "
            "network has. Allowed: er, erk, uniform."
        )
    if scope in (None, "er", "erk", "uniform"):
        return scope or "erk"  # type: ignore[return-value]
    raise UnknownName("--scope", "scope", str(scope), ("er", "erk", "uniform"))


def _count_row(layer: LayerCount, sparse: bool) -> dict[str, str]:
    row = {
        "layer": layer.name,
        "shape": "x".join(map(str, layer.shape)),
        "weights": f"{layer.weights:,}",
    }
    if sparse:
        density = f"{layer.nonzero / layer.weights:.4f}" if layer.weights else ""
        row |= {"left": f"{layer.nonzero:,}", "density": density}
    row["MACs A"] = f"{layer.dense_macs:,}"
    if sparse:
        row["sparse MACs A"] = f"{layer.macs:,}"
    return row | {"B adds": f"{layer.elementwise:,}"}


def _count_totals(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is printed of the totals, with words for names."""
    for name in ("parameters", "weights", "conv_weights", "shortcut_weights", "norm", "bias"):
        yield name.replace("_", " "), f"{found[name]:,}"
    yield f"prunable ({found['preset']})", f"{found['prunable']:,}"
    yield "MACs A", f"{found['dense_macs']:,}"
    yield "MACs B", f"{found['dense_macs_b']:,}"
    if found["sparsity"] is None:
        return
    yield "prunable left", f"{found['prunable_nonzero']:,}"
    yield "sparsity of the prunable", f"{found['reached_sparsity']:.6f}"
    yield "parameters left", f"{found['nonzero']:,}"
    yield "sparsity of all parameters", f"{found['sparsity_of_all']:.6f}"
    yield "sparse MACs A", f"{found['macs']:,}"
    yield "sparse MACs B", f"{found['macs_b']:,}"
    yield "fraction of MACs A", f"{found['mac_fraction']:.4f}"


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise SuiteError(f"--input {text}: give channels x height x width, such as 3x32x32.")
    channels, height, width = map(int, parts)
    return channels, height, width


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise SuiteError(f"--option {text}: give name=value, such as shortcut=B.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
