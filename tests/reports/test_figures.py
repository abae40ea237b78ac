"""Drawn figures: the same bytes each time, text as text, told apart without colours."""

from __future__ import annotations

import dataclasses
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from bench.cli import main
from bench.store import Store
from reports.chart import Chart, Level, Series
from reports.figures import PANEL, draw, panels, write
from tests.reports.records import fill, manifest, record, spec


def line(label: str, *y: float, bar: float | None = 0.5) -> Series:
    """A curve over x = 1, 2, ..."""
    low = tuple(None if bar is None else one - bar for one in y)
    high = tuple(None if bar is None else one + bar for one in y)
    return Series(label, tuple(float(x) for x in range(1, len(y) + 1)), y, low, high)


CHART = Chart(
    "Accuracy against MACs: lenet on digits",
    "MACs left",
    "Test accuracy (%)",
    (line("rigl", 95.0, 97.0), line("snip", 90.0, 96.0, bar=None)),
    levels=(Level("dense", 98.0, 97.5, 98.5),),
    notes=("n = 1 to 2 seeds.", "diverged, so not drawn: set."),
)
MANY = dataclasses.replace(CHART, series=tuple(line(f"m{n}", 90.0 + n, 91.0) for n in range(11)))


def texts(figure: Figure, folder: Path) -> list[str]:
    """What stands in the SVG as text."""
    svg = write(figure, folder, "figure")[0]
    found = ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")
    return [" ".join("".join(text.itertext()).split()) for text in found]


def test_text_of_the_figure_is_text_in_the_svg(tmp_path: Path) -> None:
    found = texts(draw(CHART), tmp_path)
    for text in (CHART.title, CHART.x_label, CHART.y_label, "rigl", "snip", "dense"):
        assert text in found
    assert set(CHART.notes) <= set(found)


def test_signs_of_formulas_in_a_name_are_no_formula(tmp_path: Path) -> None:
    chart = dataclasses.replace(CHART, series=(line("one & <two> $x$", 95.0),))
    assert "one & <two> $x$" in texts(draw(chart), tmp_path)


def test_an_interrupted_curve_is_not_joined_and_keeps_its_bars() -> None:
    whole = line("rigl", 95.0, 96.0, 97.0)
    first, _, last = whole.y
    broken = dataclasses.replace(whole, y=(first, None, last), low=(94.0, None, 96.0))
    axes = draw(dataclasses.replace(CHART, series=(broken,))).axes[0]
    (found,) = [one for one in axes.containers if isinstance(one, ErrorbarContainer)]
    heights = found.lines[0].get_ydata()
    assert [heights[0], heights[2]] == [95.0, 97.0]
    assert np.isnan(heights[1])
    ends = [segment.tolist() for segment in found.lines[2][0].get_segments() if len(segment)]
    assert ends == [[[1.0, 94.0], [1.0, 95.5]], [[3.0, 96.0], [3.0, 97.5]]]


def test_the_same_chart_gives_the_same_bytes_whatever_the_users_settings(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write(draw(MANY), tmp_path / "one", "figure")]
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "lines.linewidth": 9}):
        second = [path.read_bytes() for path in write(draw(MANY), tmp_path / "two", "figure")]
        assert matplotlib.rcParams["font.size"] == 20
    assert first == second
    assert b"<dc:date>" not in first[0]
    assert first[1].startswith(b"\x89PNG")


def test_files_are_named_after_the_chart(tmp_path: Path) -> None:
    assert write(draw(CHART), tmp_path, "macs") == [tmp_path / "macs.svg", tmp_path / "macs.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["macs.png", "macs.svg"]


def test_curves_of_a_panel_are_told_apart_without_their_colours() -> None:
    chart = dataclasses.replace(CHART, series=MANY.series[:PANEL], levels=())
    (axes,) = draw(chart).axes
    curves = [bars.lines[0] for bars in axes.containers if isinstance(bars, ErrorbarContainer)]
    looks = {(curve.get_marker(), curve.get_linestyle()) for curve in curves}
    assert len(looks) == len({marker for marker, _ in looks}) == PANEL


def test_many_curves_are_spread_evenly_over_panels_of_the_same_axes() -> None:
    assert [len(part) for part in panels(MANY.series)] == [6, 5]
    figure = draw(MANY)
    assert len(figure.axes) == 2
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    for axes in figure.axes:  # each with the baseline
        legend = axes.get_legend()
        assert legend is not None
        assert "dense" in [text.get_text() for text in legend.get_texts()]


def test_bars_reach_from_low_to_high_and_one_seed_has_none() -> None:
    (axes,) = draw(CHART).axes
    rigl, snip = (bars for bars in axes.containers if isinstance(bars, ErrorbarContainer))
    ends = [segment[:, 1].tolist() for segment in rigl.lines[2][0].get_segments()]
    assert ends == [[94.5, 95.5], [96.5, 97.5]]
    assert not any(len(segment) for segment in snip.lines[2][0].get_segments())


def test_a_curve_of_many_points_has_a_band() -> None:
    chart = dataclasses.replace(CHART, series=(line("dpf", *map(float, range(200))),), levels=())
    (axes,) = draw(chart).axes
    assert not axes.containers
    assert len(axes.collections) == 1


def test_axes_are_logarithmic_and_fall_where_the_chart_says_so() -> None:
    (axes,) = draw(CHART).axes
    assert (axes.get_xscale(), axes.xaxis_inverted()) == ("linear", False)
    for axes in draw(dataclasses.replace(MANY, log_x=True, falling_x=True)).axes:
        assert (axes.get_xscale(), axes.xaxis_inverted()) == ("log", True)


def test_the_axis_begins_at_the_floor_where_there_is_one() -> None:
    for axes in draw(dataclasses.replace(MANY, floor=93.5)).axes:
        low, high = axes.get_ylim()
        assert low == 93.5
        assert 100.5 < high < 101  # above the end of the highest bar


def test_names_of_layers_stand_at_the_axis() -> None:
    first = Series("rigl", (0.0, 1.0), (10.0, 20.0), (None, None), (None, None))
    (axes,) = draw(dataclasses.replace(CHART, series=(first,), x_names=("fc1", "fc2"))).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["fc1", "fc2"]


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command: exit status, output and errors."""

    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparsebench", "figures", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return called


def test_the_command_draws_what_the_records_hold_and_says_what_they_do_not(
    figures: Call, tmp_path: Path
) -> None:
    fill(tmp_path / "records", manifest(spec()), record(spec()))
    out = tmp_path / "out"
    code, stdout, stderr = figures("--records", tmp_path / "records", "--out", out)
    assert code == 0
    assert f"{out}/demo/accuracy-by-macs-lenet-on-digits.svg" in stdout.splitlines()
    assert sorted(map(str, (out / "demo").iterdir())) == sorted(stdout.splitlines())
    assert "no figure 'mask-overlap': the records do not hold mask updates" in stderr


def test_a_suite_without_any_chart_does_not_keep_the_others_from_theirs(
    figures: Call, tmp_path: Path
) -> None:
    records, out = tmp_path / "records", tmp_path / "out"
    fill(records, manifest(spec()), record(spec()))
    Store(records, "unrun").put_manifest(dataclasses.replace(manifest(spec()), suite="unrun"))
    options = ("--records", records, "--out", out)
    code, stdout, stderr = figures(*options)
    assert code == 0
    assert f"{out}/demo/accuracy-by-macs-lenet-on-digits.svg" in stdout.splitlines()
    assert f"{records / 'unrun'}: no figure 'macs'" in stderr
    code, stdout, stderr = figures("unrun", *options)
    assert (code, stdout) == (2, "")
    assert "the records do not hold the accuracy of a pruned network" in stderr


def test_the_command_draws_one_kind_of_one_suite(figures: Call, tmp_path: Path) -> None:
    fill(tmp_path, manifest(spec()), record(spec()))
    code, stdout, _ = figures("demo", "--records", tmp_path, "--kind", "macs", "--out", tmp_path)
    assert (code, len(stdout.splitlines())) == (0, 2)


def test_the_command_writes_nothing_where_a_kind_is_missing(figures: Call, tmp_path: Path) -> None:
    fill(tmp_path / "records", manifest(spec()), record(spec()))
    out = tmp_path / "out"
    options = ("--records", tmp_path / "records", "--out", out, "--kind", "training-macs")
    code, _, stderr = figures("demo", *options)
    assert code == 2
    assert "the records do not hold training MACs" in stderr
    assert not out.exists()
