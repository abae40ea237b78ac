"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

Suite = Annotated[str, typer.Argument(help="A built-in suite (see `list suites`) or a TOML file.")]
Records = Annotated[Path, typer.Option("--records", help="Folder of the records.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Statistics = Annotated[
    Literal["full"] | None,
    typer.Option("--statistics", help="full: tests over the seeds, with p-values."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar="SPARSEBENCH_DATA",
        help="Folder of the data sets, <name>.npz each. [default: ~/.cache/sparsebench]",
    ),
]
Cell = Annotated[str, typer.Argument(help="A key, its beginning, or a record's file name.")]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1; auto takes a GPU where there is one.")
]
Recipe = Annotated[
    Path | None, typer.Option("--recipe", help="File of the cell's recipe, where it is your own.")
]
Only = Annotated[
    str | None,
    typer.Option("--only", help="Only cells whose label or file name matches, such as 'rigl*'."),
]


def data_folder(data: Path | None) -> Path:
    """Where the data sets are, if `--data` does not say."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return data or cache / "sparsebench"
