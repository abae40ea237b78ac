"""Specs of tables: what they mean, and what is said of those that are wrong."""

from __future__ import annotations

import sys

import pytest

from bench.cli import main
from bench.errors import SuiteError
from bench.reporting import known_names
from reports import known, specs
from reports.specs import Filters
from tests.reports.records import fill, manifest, record, spec

OWN = """
title = "Ours"
dataset = "digits"
columns = ["dense", { label = "RigL, ERK", method = "rigl", options = { scope = "erk" } }]
rows = [{ model = { name = "lenet", label = "LeNet", options = { width = 2 } }, targets = ["90%"] }]
"""

PAPER = """
title = "A paper's"
dataset = "cifar10"
paper = "dpf2020"
table = "table4"
columns = ["dense", "dpf"]
rows = [{ model = "ResNet-20", targets = ["70%", "95%"] }]
"""


def load(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    return specs.load(path)


@pytest.mark.parametrize("name", specs.names())
def test_every_spec_that_comes_with_the_harness_loads(name):
    spec = specs.load(name)
    assert spec.lines
    assert len(spec.lines) == len(spec.baselines)
    assert spec.paper is not None


def test_a_spec_without_a_paper_names_our_models_and_methods(tmp_path):
    found = load(tmp_path, OWN)
    (line,) = found.lines
    assert (found.name, found.heading, found.columns) == (
        "own",
        "target ratio",
        ("dense", "RigL, ERK"),
    )
    assert [(q.method, q.options, q.sparsity) for q in line] == [
        ("dense", (), 0.0),
        ("rigl", (("scope", "erk"),), 0.9),
    ]
    assert (line[1].model, line[1].name, line[1].model_options) == (
        "LeNet",
        "lenet",
        (("width", 2),),
    )
    assert line[1].published is None


def test_names_of_a_paper_mean_ours_and_carry_its_figures(tmp_path):
    found = load(tmp_path, PAPER)
    dense, dpf = found.lines[1]
    assert (dpf.name, dpf.method, dpf.sparsity) == ("resnet20", "dpf", 0.95)
    assert (dpf.published.top1, dense.published.top1) == ("88.01", "92.48")
    assert dpf.trained.budget.epochs == 300


def test_options_of_a_method_may_depend_on_the_papers_network():
    ramps = {line[0].name: dict(line[1].options)["ramp"] for line in specs.load("dpf-table5").lines}
    assert ramps["resnet20"] == 0.75
    assert ramps["wrn_28_8"] == 0.6


def test_a_density_is_the_rest_of_a_sparsity_exactly():
    lines = specs.load("sparse-momentum-mnist").lines
    assert [line[1].sparsity for line in lines[:4]] == [0.92, 0.95, 0.98, 0.99]
    assert lines[0][1].published.error == "1.45"


def test_a_rows_filters_go_before_the_tables(tmp_path):
    rows = 'rows = [{ model = "ResNet-20", filters = { recipe = "mine" } }]'
    text = PAPER.replace(PAPER[PAPER.index("rows") :], rows)
    found = load(tmp_path, text + '\n[filters]\nrecipe = "other"\nprunable = "dpf"\n')
    assert found.lines[0][0].filters == Filters(recipe="mine", prunable="dpf")
    assert Filters(epochs=10.0, init="random").with_own(Filters(epochs=0.0, init="")) == Filters(
        epochs=0.0, init=""
    )


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (
            '"dpf"]',
            '"dfp"]',
            "own.toml: columns[1]: no such column: 'dfp'. Did you mean",
        ),
        ("ResNet-20", "ResNet-21", "own.toml: rows[0]: no such model: 'ResNet-21'"),
        ("title =", "titel =", "own.toml: no such field: 'titel'. Did you mean 'title'? Known: "),
        (
            'table = "table4"',
            'table = "table9"',
            "own.toml: table: no such table of dpf2020: 'table9'",
        ),
        ('"dpf2020"', '"dpf"', "own.toml: paper: no such paper: 'dpf'"),
        ('["70%"', '["much"', "own.toml: rows[0].targets: 'much' is no number"),
        ('["70%"', '["170%"', "own.toml: rows[0].targets: '170%' lies outside 0% to 100%"),
        ('["dense", "dpf"]', "[]", "own.toml: layout 'methods' takes rows and columns"),
        ('["dense", "dpf"]', "3", "own.toml: Expected `array`, got `int`"),
        ("title =", 'layout = "wide"\ntitle =', "Allowed: 'methods', 'fields', 'rounds'"),
        (
            "title =",
            'figure = "speed"\ntitle =',
            "own.toml: figure: no such figure: 'speed'.",
        ),
        ("title =", "= title", "not a TOML file"),
        ("title =", "digits = -3\ntitle =", "own.toml: digits = -3: give 0 to 10."),
        ("title =", "digits = 50\ntitle =", "own.toml: digits = 50: give 0 to 10."),
        ('"dpf"]', '"dpf", "dpf"]', "own.toml: columns[2]: the same as another"),
        ('["70%"', '["95.0%"', "own.toml: rows[0].targets[1]: the same as another"),
        ("title =", 'layout = "fields"\ntitle =', "takes rows, columns and methods"),
        (
            "title =",
            'layout = "fields"\nmethods = ["dpf"]\ntitle =',
            "own.toml: columns: no such column: 'dpf'. Known: accuracy",
        ),
        ("\nrows", "\nfilters = { epoch = 3 }\nrows", "unknown field `epoch`"),
    ],
)
def test_a_wrong_spec_is_refused_with_what_is_allowed(tmp_path, old, new, error):
    with pytest.raises(SuiteError) as found:
        load(tmp_path, PAPER.replace(old, new, 1))
    assert error in str(found.value)


def test_a_spec_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SuiteError, match=r"no such table: 'dpf-table6'. Did you mean 'dpf-table"):
        specs.load("dpf-table6")
    with pytest.raises(SuiteError, match="cannot read the file: No such file"):
        specs.load(tmp_path / "none.toml")


def report(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sparsebench", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_the_command_prints_a_table_of_ones_own(tmp_path, monkeypatch, capsys):
    of = spec("rigl", options=(("scope", "erk"),), model_options=(("width", 2),))
    fill(tmp_path / "records", manifest(of), record(of, 97.5))
    own = tmp_path / "own.toml"
    own.write_text(OWN, encoding="utf-8")
    assert not report(monkeypatch, "--table", own, "--records", tmp_path / "records")
    out = capsys.readouterr().out
    assert "## Ours" in out
    assert "97.50" in out


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('"rigl"', '"rgil"', "own.toml: columns: no such method: 'rgil'. Did you mean 'rigl'?"),
        ('"lenet"', '"lenett"', "own.toml: rows: no such model: 'lenett'. Did you mean 'lenet"),
        ('"digits"', '"digit"', "own.toml: dataset: no such data set: 'digit'. Did you mean"),
    ],
)
def test_a_name_that_neither_the_harness_nor_a_record_has_ends_the_command(
    tmp_path, monkeypatch, capsys, old, new, error
):
    own = tmp_path / "own.toml"
    own.write_text(OWN.replace(old, new), encoding="utf-8")
    fill(tmp_path / "records", manifest(spec()), record(spec()))
    assert report(monkeypatch, "--table", own, "--records", tmp_path / "records") == 2
    assert error in capsys.readouterr().err


def test_names_that_a_record_has_or_that_timm_gives_out_are_known(tmp_path, monkeypatch, capsys):
    own = tmp_path / "own.toml"
    of = spec("of_a_package")
    fill(tmp_path / "records", manifest(of), record(of, 97.25))
    rows = 'rows = [{ model = "lenet", targets = ["90%"] }, { model = "timm:resnet18" }]'
    text = f'title = "Own"\ndataset = "digits"\ncolumns = ["of_a_package"]\n{rows}\n'
    own.write_text(text, encoding="utf-8")
    assert not report(monkeypatch, "--table", own, "--records", tmp_path / "records")
    assert "97.25" in capsys.readouterr().out


def test_a_filter_that_nothing_passes_and_an_option_that_nothing_has_are_told(
    tmp_path, monkeypatch, capsys
):
    own = tmp_path / "own.toml"
    of = spec("rigl", options=(("scope", "erk"),), model_options=(("width", 2),))
    fill(tmp_path / "records", manifest(of), record(of))
    filters = '[filters]\nrecipe = "nope"\nepochs = 10\nsuite = "dmeo"\n'
    own.write_text(OWN.replace("scope", "scop") + filters, encoding="utf-8")
    assert not report(monkeypatch, "--table", own, "--records", tmp_path / "records")
    assert capsys.readouterr().err.splitlines() == [
        "own.toml: no record passes the filter recipe = nope; there are: plain.",
        "own.toml: no record passes the filter suite = dmeo; there are: demo.",
        "own.toml: no record of rigl has an option scop; options there: scope.",
    ]


@pytest.mark.parametrize("name", specs.names())
def test_specs_that_come_with_the_harness_name_what_there_is(name, tmp_path):
    known.check(specs.load(name), known.Known(*known_names()), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--table", "own.toml"), "no such column: 'dfp'"),
        (("--table", "dpf-table1", "--format", "word"), "no such format: 'word'"),
        (("--published",), "need --table"),
    ],
)
def test_bad_input_ends_the_command_with_status_2_and_one_line(
    tmp_path, monkeypatch, capsys, arguments, error
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text(PAPER.replace('"dpf"]', '"dfp"]'), encoding="utf-8")
    of = spec()
    fill(tmp_path / "records", manifest(of), record(of))
    assert report(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert error in said.err
    assert said.err.count("\n") == 1
    assert not said.out
