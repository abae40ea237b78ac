"""The files that a new method starts from."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

from bench.errors import UsageError
from methods import STAND_INS, names

METHOD = Template('''"""TITLE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.api import Run, Scores
from methods.masking import PruneAtInit


@dataclass(frozen=True)
class $kind(PruneAtInit):
    """TITLE (AUTHORS, YEAR, arXiv:0000.00000), Algorithm and equations.

    What it does, in three lines.

    Differs from the paper: every difference.

    Attributes:
        scope: ranks all layers together (paper), or each by its own count.
    """

    # An option and its range: `batches: int = option(1, "[1, inf)")`, from methods.api.
    paper: ClassVar[str] = ""

    def scores(self, run: Run) -> Scores:
        """What decides: the highest are kept."""
        return {name: weight.detach().abs() for name, weight in run.state.weights.items()}
''')

TEST_IN_CLONE = Template('''"""AUTHORS YEAR: TITLE."""

from __future__ import annotations

from methods.$name import $kind
from tests.tiny import FakeRun, hand_state


def test_the_largest_magnitudes_are_kept():
    state = hand_state({"a": [0.5, -0.3, 0.1], "b": [-0.4, 0.2]})
    $kind().prune(FakeRun(state), density=0.4)
    # 2 of 5 weights: 0.5 and -0.4.
    assert state.masks["a"].tolist() == [1, 0, 0]
    assert state.masks["b"].tolist() == [1, 0]
''')

TEST_ELSEWHERE = Template('''"""AUTHORS YEAR: TITLE."""

from __future__ import annotations

from $name import $kind

from bench.conformance import check_method


def test_it_keeps_the_rules_of_the_interface():
    report = check_method($kind())
    assert report.ok, report.text
''')

NEXT_IN_CLONE = Template("""Wrote $file
Wrote $test

Add this line to METHODS in methods/__init__.py:

    "$name": MethodInfo("$name:$kind", "", "density", "what it does, in a line"),

Then: sparsebench conform $name
      python -m tests.contract.test_methods
      python -m bench.matrix $name""")

NEXT_ELSEWHERE = Template('''Wrote $file
Wrote $test

Try it: sparsebench conform $shown

For a name that suites know, install it as a package with this in its pyproject.toml:

    [project.entry-points."sparsebench.methods"]
    $name = "$name:$kind"''')


def write_method(name: str, folder: Path) -> str:
    """Writes a method that runs as it is, and its test; both in their places in a clone.

    Args:
        name: of the method and of its module.
        folder: root of a clone, or any other folder.

    Returns:
        What was written, and what is to be done next.

    Raises:
        UsageError: the name cannot be used, or a file is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(
            f"{name!r} is no name for a method; give small letters, digits and '_', beginning with "
            "a letter, such as my_method."
        )
    in_clone = (folder / "methods" / "api.py").is_file() and (folder / "tests" / "papers").is_dir()
    file = folder / ("methods" if in_clone else "") / f"{name}.py"
    test = folder / ("tests/papers" if in_clone else "") / f"test_{name}.py"
    for path in (file, test):
        if path.exists():
            raise UsageError(f"{path} is there already; nothing was written.")
    if name in names() or name in STAND_INS:
        raise UsageError(f"there is a method {name!r} already; choose another name.")
    if not in_clone and importlib.util.find_spec(name) is not None:
        raise UsageError(f"there is a module {name!r} already; choose another name.")
    shown = str(file) if file.is_absolute() else f"./{file}"
    values = {
        "name": name,
        "kind": "".join(part[:1].upper() + part[1:] for part in name.split("_")),
        "file": file,
        "test": test,
        "shown": shown,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(METHOD.substitute(values), encoding="utf-8")
        template = TEST_IN_CLONE if in_clone else TEST_ELSEWHERE
        test.write_text(template.substitute(values), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--to {folder}: cannot write there ({error}).") from error
    return (NEXT_IN_CLONE if in_clone else NEXT_ELSEWHERE).substitute(values)
