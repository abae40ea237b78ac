"""The JavaScript libraries that the page carries, from the Python packages that ship them."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Library:
    """A library as it stands in the page.

    Attributes:
        notice: name, version, licence and address, for the foot of the page.
        script: JavaScript.
        style: CSS; empty where it brings none.
    """

    notice: str
    script: str
    style: str = ""


def tables() -> Library:
    """DataTables with jQuery, as itables bundles them."""
    html = importlib.resources.files("itables") / "html"
    return Library(
        f"DataTables and jQuery (MIT, datatables.net), as in itables {_version('itables')}",
        (html / "dt_bundle.js").read_text(encoding="utf-8"),
        (html / "dt_bundle.css").read_text(encoding="utf-8"),
    )


def plots() -> Library:
    """plotly.js, as Plotly's Python package ships it."""
    package = importlib.resources.files("plotly") / "package_data"
    return Library(
        f"plotly.js (MIT, plotly.com/javascript), as in plotly {_version('plotly')}",
        (package / "plotly.min.js").read_text(encoding="utf-8"),
    )


def _version(package: str) -> str:
    return importlib.metadata.version(package)
