"""Fixtures of several files: a command line in this process, and packages of other people."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import methods
from bench import cli, datasets
from models import others
from tests.bench.cells import Outcome


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def called(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sparsebench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return called


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package whose module `outside_methods` has a text, and offers what is in it."""

    def install(
        source: str, name: str = "outside", group: str = methods.GROUP, **offers: str
    ) -> Path:
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "\n".join(f"{offer} = {target}" for offer, target in offers.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}\n")
        (info.parent / "outside_methods.py").write_text(source)
        if str(info.parent) not in sys.path:
            monkeypatch.setattr(sys, "path", [*sys.path, str(info.parent)])
        _forget()
        return info.parent

    yield install
    sys.modules.pop("outside_methods", None)
    _forget()


def _forget() -> None:
    """What was looked up of installed packages."""
    for module in (methods, datasets, others):
        module._entry_points.cache_clear()
