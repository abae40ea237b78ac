"""A method's class: where to find it, and what can be said about it before anything trains."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.errors import SuiteError, UnknownName, UsageError
from bench.planning import check_plan
from bench.trial import RUN, asks
from methods import find_info, get_method, names
from methods.api import Controls, OptimizerSettings, Phase, Shape, SparsityMethod

HARNESS = ("bench", "models", "reports", "tests")
"""What the module of a method may not import: it would know the harness, or see data."""

BY_NAME = (
    "sys.modules",
    "sys.modules.get",
    "importlib.import_module",
    "import_module",
    "__import__",
)
"""Where a source names a module in a string."""


def load(name: str) -> type[SparsityMethod]:
    """The class behind a name of a method, `FILE.py` or `FILE.py:Class`.

    Raises:
        UsageError: there is no such method or file, or it holds none or several.
    """
    path, colon, chosen = name.rpartition(":")
    path, chosen = (path, chosen) if colon else (name, "")
    if not path.endswith(".py"):
        try:
            if find_info(name) is None:
                raise UnknownName("", "method", name, [*names(), "a .py file"])
            return get_method(name)
        except ValueError as error:
            raise SuiteError(f"{error}.") from error
    module = _imported(Path(path))
    found: dict[str, type[SparsityMethod]] = {
        value.__name__: value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, SparsityMethod)
        and value.__module__ == module.__name__
    }
    if chosen and chosen not in found:
        raise UnknownName(path, "method", chosen, found)
    if not chosen and len(found) != 1:
        example = f"; name one, such as {path}:{next(iter(found))}" if found else ""
        listed = f" ({', '.join(found)})" if found else ""
        raise UsageError(f"{path} holds {len(found)} methods{listed}{example}.")
    return found[chosen or next(iter(found))]


def _imported(file: Path) -> ModuleType:
    if not file.is_file():
        raise UsageError(f"{file}: no such file.")
    spec = importlib.util.spec_from_file_location(f"conform.{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)  # a file may come with others
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{file}: cannot be imported, it {in_words(error, str(file.resolve()))}."
        ) from error
    finally:
        sys.path.remove(folder)
    return module


def source_of(kind: object) -> str:
    """Path of the file that a class is written in; empty where there is none."""
    try:
        return inspect.getsourcefile(kind) or ""  # type: ignore[arg-type]
    except (TypeError, OSError):
        return ""


def in_words(error: BaseException, source: str) -> str:
    """What was raised, and the last line of `source` on the way there, else the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == source] or list(frames)
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError):
        place = f" ({Path(error.filename or source).name}:{error.lineno})"
        error.args = error.args[:1]
    return f"raises {type(error).__name__}: {' '.join(str(error).split())}{place}"


def class_faults(kind: object, fresh: Callable[[], SparsityMethod]) -> Iterator[str]:
    """What is wrong with the class itself.

    Args:
        kind: should be a subclass of `SparsityMethod`.
        fresh: makes an instance.
    """
    if not (isinstance(kind, type) and issubclass(kind, SparsityMethod)):
        yield f"{kind!r} is no subclass of methods.api.SparsityMethod"
        return
    parameters: Any = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        yield f"{kind.__name__} is not decorated with @dataclass(frozen=True)"
    if kind.controls not in get_args(Controls):
        yield f"controls = {kind.controls!r}; allowed: {', '.join(get_args(Controls))}"
    try:
        if fresh() != fresh() or hash(fresh()) != hash(fresh()):
            yield f"two {kind.__name__}() with the same options differ"
    except Exception as error:
        yield f"{kind.__name__}() {in_words(error, source_of(kind))}"


def plan_faults(plan: Any) -> Iterator[str]:
    """What is wrong with what `plan` returned."""
    if not isinstance(plan, tuple) or not all(isinstance(phase, Phase) for phase in plan):
        yield f"plan returns {_kind(plan)}; allowed: a tuple of Phase"
        return
    try:
        check_plan(plan)
    except (ValueError, TypeError) as error:
        yield f"plan: {error}"


def prunable_faults(method: SparsityMethod, model: nn.Module) -> Iterator[str]:
    """What is wrong with what `prunable` returns."""
    allowed: Any = method.prunable(model)
    if not isinstance(allowed, tuple | list) or not all(isinstance(n, str) for n in allowed):
        yield f"prunable returns {_kind(allowed)}; allowed: a tuple of names"
        return
    known = dict(model.named_parameters())
    if unknown := [name for name in allowed if name not in known]:
        yield f"prunable returns {unknown[0]!r}, which is no parameter of the network"


def structure_faults(
    method: SparsityMethod,
    model: nn.Module,
    chosen: Sequence[str],
    shape: Shape,
    settings: OptimizerSettings,
) -> Iterator[str]:
    """What is wrong with what `prepare` and `optimizer` return.

    Args:
        method: is asked.
        model: plain; the method changes it.
        chosen: the weights that are pruned.
        shape: of one image.
        settings: for the optimizer.
    """
    parameters = dict(model.named_parameters())
    masks = {name: torch.ones_like(parameters[name].detach()) for name in chosen}
    weights: Any = method.prepare(model, masks, shape)
    if not isinstance(weights, Mapping) or weights.keys() != masks.keys():
        yield f"prepare returns {_kind(weights)}; allowed: a dict with exactly the keys of masks"
        return
    known = set(map(id, model.parameters()))
    for name, weight in weights.items():
        if not isinstance(weight, nn.Parameter) or id(weight) not in known:
            yield f"prepare returns {_kind(weight)} for {name}; allowed: a parameter of the model"
            return
        if weight.shape != masks[name].shape:
            yield f"prepare returns a parameter for {name} that has not the shape of its mask"
            return
    pruned = set(map(id, weights.values()))
    others = {name: p for name, p in model.named_parameters() if id(p) not in pruned}
    lr = torch.tensor(0.1)
    optimizer: Any = method.optimizer(weights, others, lr, settings)
    if not isinstance(optimizer, Optimizer):
        yield f"optimizer returns {_kind(optimizer)}; allowed: a torch.optim.Optimizer"
        return
    if any(group.get("lr") is not lr for group in optimizer.param_groups):
        yield "optimizer has a learning rate of its own; every group's lr must be the tensor given"


def penalty_faults(value: Any) -> Iterator[str]:
    """What is wrong with what `penalty` returned."""
    if value is not None and not (isinstance(value, Tensor) and value.shape == ()):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        yield f"penalty returns {_kind(value)}{shape}; allowed: None or a tensor of shape ()"


def harness_faults(kind: type) -> list[str] | None:
    """Where the sources of a class and its bases show that they know the harness.

    Returns:
        None where no source is at hand.
    """
    files = {source_of(base): None for base in getattr(kind, "__mro__", ())}
    found, read = [], False
    for file in filter(None, files):
        try:
            tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        except (OSError, SyntaxError):
            continue
        read = True
        found += [f"{what} ({Path(file).name}:{line})" for line, what in _knowledge(tree)]
    return found if read else None


def _knowledge(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if ast.unparse(node.value) == "run" and node.attr not in RUN:
                yield node.lineno, f"it {asks(node.attr)}"
        elif isinstance(node, ast.Subscript | ast.Call):
            where: ast.AST = node.func if isinstance(node, ast.Call) else node.value
            what = node.args[:1] if isinstance(node, ast.Call) else [node.slice]
            texts = [repr(part.value) for part in what if isinstance(part, ast.Constant)]
            if texts and ast.unparse(where) in BY_NAME and texts[0][1:-1].split(".")[0] in HARNESS:
                yield node.lineno, f"it names {texts[0]} in {ast.unparse(where)}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module or ""]
            for name in names:
                if name.split(".")[0] in HARNESS:
                    yield node.lineno, f"it imports {name}"


def _kind(value: object) -> str:
    """A value's type, for people."""
    if isinstance(value, tuple | list) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(map(repr, value)) or 'of none'}"
    return f"a {type(value).__name__}"
