"""Which package may import which: the arrows of the architecture, checked on the source."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("bench", "methods", "models", "reports", "tests")

NUMBERS = {"msgspec", "numpy", "scipy", "tabulate"}
ALLOWED: dict[str, set[str]] = {
    "reports": NUMBERS
    | {"reports", "bench.errors", "bench.record", "bench.spec", "bench.store", "bench.suite"},
    "methods": {"methods", "numpy", "torch"},
    "models": {"models", "timm", "torch", "torchvision"},
    "bench": NUMBERS
    | {"bench", "filelock", "methods", "models", "rich", "safetensors", "torch", "typer"},
}
"""What the files of a package may import besides the standard library."""

EXTRA: dict[str, set[str]] = {
    "bench/reporting.py": {"reports"},
    "bench/datasets.py": {"sklearn", "torchvision"},
    "bench/doctor.py": {"packaging"},
    "bench/folders.py": {"PIL"},
    "bench/ray_executor.py": {"ray"},
    "bench/streaming.py": {"PIL", "timm"},
    "bench/timm_training.py": {"timm"},
    "reports/figures.py": {"matplotlib"},
    "reports/page/build.py": {"jinja2", "markupsafe"},
}
"""What single files may import besides."""


def order() -> list[set[str]]:
    """The modules of `bench` as its README draws them: each may import only from groups before."""
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    drawn = text.partition("each module imports only those to its left")[2].split("```")[1]
    return [{name.strip() for name in group.split(",")} for group in drawn.split("<-")]


ORDER = order()

WITHOUT_TORCH = (
    "datasets",
    "errors",
    "leases",
    "listing",
    "live",
    "processes",
    "recipes",
    "record",
    "seeds",
    "signals",
    "spec",
    "store",
    "suite",
    "sweep",
)


def imports(source: str, package: str = "") -> Iterator[str]:
    """Every module that a source names in an import, inside functions too.

    `from bench import data` names `bench.data` where that is a module, else `bench`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                path = ROOT / base.replace(".", "/") / alias.name
                is_module = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
                yield f"{base}.{alias.name}" if is_module else base


def offences(path: str, source: str) -> list[str]:
    """What a file imports and may not.

    Args:
        path: of the file in the repository, such as `methods/rigl.py`.
        source: its text.
    """
    package = path.split("/")[0]
    allowed = ALLOWED[package] | EXTRA.get(path, set())
    listed = ", ".join(sorted(allowed))
    return [
        f"{path} imports {name}; {package} may import only {listed} and the standard library"
        for name in imports(source, package)
        if not _allowed(name, allowed)
    ]


def backward(path: str, source: str) -> list[str]:
    """What a module of `bench` imports from those that come after it."""
    own = Path(path).stem
    (place,) = (place for place, group in enumerate(ORDER) if own in group)
    later = {f"bench.{name}" for group in ORDER[place:] for name in group}
    return [
        f"{path} imports {name}, which bench/README.md does not draw before it"
        for name in imports(source, "bench")
        if name in later
    ]


def _allowed(name: str, allowed: set[str]) -> bool:
    parts = name.split(".")
    prefixes = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return bool(prefixes & allowed) or parts[0] in sys.stdlib_module_names


def sources(*packages: str) -> dict[str, str]:
    """Path in the repository -> text."""
    files = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_its_arrows_allow(package):
    found = [text for path, source in sources(package).items() for text in offences(path, source)]
    assert not found, "\n".join(found)


def test_the_readme_draws_every_module_of_bench_once():
    assert sorted(name for group in ORDER for name in group) == sorted(
        Path(path).stem for path in sources("bench") if not path.endswith("__init__.py")
    )


@pytest.mark.parametrize("package", ["bench", "methods", "reports"])
def test_the_readme_of_a_folder_says_what_each_of_its_modules_is(package):
    text = (ROOT / package / "README.md").read_text(encoding="utf-8")
    modules = [
        path.name for path in (ROOT / package).glob("*.py") if path.stem.strip("_") == path.stem
    ]
    assert not [name for name in modules if f"`{name}`" not in text]


def test_modules_of_bench_import_only_those_before_them():
    files = {path: text for path, text in sources("bench").items() if "__init__" not in path}
    found = [text for path, source in files.items() for text in backward(path, source)]
    assert not found, "\n".join(found)


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): {
            name for name in imports(source, path.split("/")[0]) if name.split(".")[0] in PACKAGES
        }
        for path, source in sources("bench", "methods", "models", "reports").items()
    }
    for package in ALLOWED:  # `methods` names its contract for type checkers only
        graph[package] = set()
    graphlib.TopologicalSorter(graph).prepare()


def test_only_the_entry_point_imports_the_command_line():
    importers = [
        path
        for path, source in sources("bench", "methods", "models", "reports").items()
        if "bench.cli" in imports(source, path.split("/")[0])
    ]
    assert importers == ["bench/__main__.py"]


@pytest.mark.parametrize(
    ("path", "source", "named"),
    [
        ("methods/rigl.py", "from bench import data", "bench.data"),
        ("methods/rigl.py", "import models.lenet as lenet", "models.lenet"),
        ("methods/rigl.py", "def f():\n    from bench.data import Data", "bench.data"),
        ("methods/rigl.py", "from ..bench import seeds", "bench.seeds"),
        ("methods/rigl.py", "import sklearn", "sklearn"),
        ("models/lenet.py", "from methods.api import Run", "methods.api"),
        ("reports/suite_table.py", "import torch.nn", "torch.nn"),
        ("reports/suite_table.py", "from bench import runner", "bench.runner"),
        ("reports/suite_table.py", "from methods import METHODS", "methods"),
        ("bench/trainer.py", "from reports.suite_table import report", "reports.suite_table"),
        ("bench/trainer.py", "import torchvision", "torchvision"),
    ],
)
def test_the_check_finds_a_forbidden_import(path, source, named):
    (found,) = offences(path, source)
    assert found.startswith(f"{path} imports {named}; {path.split('/')[0]} may import only ")


def test_the_check_says_what_is_allowed():
    assert offences("methods/rigl.py", "from bench import data") == [
        "methods/rigl.py imports bench.data; methods may import only methods, numpy, torch and the "
        "standard library"
    ]


def test_the_check_lets_allowed_imports_pass():
    source = "import math\nfrom torch import nn\nfrom methods.api import Run\nfrom . import masking"
    assert offences("methods/rigl.py", source) == []
    assert offences("reports/suite_table.py", "from bench import store\nimport tabulate") == []


def test_the_check_finds_an_import_against_the_order():
    assert backward("bench/spec.py", "from bench.record import Record") == [
        "bench/spec.py imports bench.record, which bench/README.md does not draw before it"
    ]
    assert backward("bench/record.py", "from bench.spec import CellSpec") == []


def run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own in which torch, torchvision and timm cannot be imported."""
    blocked = "import sys; sys.modules |= dict.fromkeys(['torch', 'torchvision', 'timm'])\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_value_objects_and_reports_can_be_imported_without_torch():
    modules = [f"bench.{name}" for name in WITHOUT_TORCH] + ["methods", "models"]
    modules += [
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in sources("reports")
    ]
    result = run_without_torch(f"import {', '.join(modules)}")
    assert result.returncode == 0, result.stderr


def test_lists_and_help_work_without_torch():
    commands = [["--help"], ["run", "--help"], ["report", "--help"]]
    commands += [
        ["list", what, *more]
        for what in ("methods", "models", "datasets", "recipes", "suites")
        for more in ([], ["--json"])
    ]
    result = run_without_torch(
        f"""
from bench.cli import main
for arguments in {commands!r}:
    sys.argv = ["sparsebench", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
"""
    )
    assert result.returncode == 0, result.stderr
    assert "rigl" in result.stdout


def test_the_block_on_torch_itself_works():
    assert "ModuleNotFoundError" in run_without_torch("import bench.data").stderr
