"""Published numbers: as their sources have them, and under names that exist here."""

from __future__ import annotations

import csv
import dataclasses
import re
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from bench import recipes
from bench.errors import SuiteError, UnknownName
from methods import METHODS, get_method
from models import MODELS, TIMM_PREFIX
from reports import papers, specs
from reports.papers import FIGURES, PublishedCell

SOURCES = Path(__file__).parents[3] / "shared" / "reference"
needs_sources = pytest.mark.skipif(not SOURCES.exists(), reason="the sources are not at hand")

DENSE_OF_TABLE_2 = {"ResNet-20": "92.48", "ResNet-32": "93.83", "ResNet-56": "94.51"}
"""The papers' tables 1, 2 and 4 share them; the file of figures has them with table 4."""


def source(name: str) -> list[dict[str, str]]:
    with (SOURCES / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells(table: str, paper: str = "dpf2020") -> list[PublishedCell]:
    return list(papers.load(paper).tables[table].cells)


@needs_sources
def test_every_figure_of_dpf_on_cifar10_is_the_sources_digit_by_digit():
    expected = {
        (
            row["table"],
            row["model"],
            "dpf_filters"
            if row["structure"] == "filters" and row["method"] == "dpf"
            else row["method"],
            row["target_ratio"],
            row["top1_mean"],
            row["top1_std"],
            row["note"],
        )
        for row in source("published_top1.csv")
    }
    ours = {
        (table, c.model, c.method, c.sparsity, c.top1, c.deviation, c.failed)
        for table in ("table2", "table4", "table5")
        for c in cells(table)
    }
    extra = ours - expected
    assert expected <= ours
    assert {(row[1], row[4]) for row in extra} == set(DENSE_OF_TABLE_2.items())
    assert {(row[0], row[2]) for row in extra} == {("table2", "dense")}


@needs_sources
def test_every_figure_of_dpf_on_imagenet_is_the_sources_digit_by_digit():
    names = {
        "model": "model",
        "method": "method",
        "target_ratio": "sparsity",
        "dense_top1": "dense_top1",
        "top1": "top1",
        "dense_top5": "dense_top5",
        "top5": "top5",
        "reached_ratio": "reached",
        "remaining_params_millions": "parameters",
    }
    ours = [{column: getattr(c, name) for column, name in names.items()} for c in cells("table3")]
    expected = [
        {column: row[column] for column in names} for row in source("published_imagenet.csv")
    ]
    assert ours == expected


MNIST_SUMMARY = {
    # sparsity: DSR, sparse momentum, SET, DeepR; dense: 0.9869
    "99%": (0.9754, 0.9753, 0.958, 0.94),
    "98%": (0.9814, 0.982, 0.9774096, 0.9821),
    "95%": (0.9832, 0.9853, 0.9814458, 0.9806),
    "90%": (0.9844, 0.9867, 0.9839157, 0.9819),
}
"""Of results/MNIST_sparse_summary.csv in TimDettmers/sparse_learning, which has 96 and 97 % too."""


def test_the_summary_of_sparse_momentums_repository_is_its_files():
    table = papers.load("dettmers2019").tables["summary"]
    methods = ("dsr_mnist", "sparse_momentum", "set_mnist", "deepr_mnist")
    expected = {("dense", "0%"): 0.9869} | {
        (method, target): figure
        for target, figures in MNIST_SUMMARY.items()
        for method, figure in zip(methods, figures, strict=True)
    }
    assert len(table.cells) == len(expected)
    for cell in table.cells:
        assert float(cell.top1) == round(100 * expected[cell.method, cell.sparsity], 2)


@needs_sources
@pytest.mark.parametrize("paper", [name for name in papers.names() if name != "dpf2020"])
def test_figures_of_other_papers_stand_in_the_notes_on_methods(paper):
    text = (SOURCES / "methods.md").read_text(encoding="utf-8")
    figures = [
        getattr(cell, field)
        for name, table in papers.load(paper).tables.items()
        if (paper, name) != ("dettmers2019", "summary")
        for cell in table.cells
        for field in (*FIGURES, "architecture")
    ]
    for figure in filter(None, figures):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", text), figure


def test_dense_figures_of_table_2_are_those_of_table_4():
    fourth = {c.model: (c.top1, c.deviation) for c in cells("table4") if c.method == "dense"}
    second = {c.model: (c.top1, c.deviation) for c in cells("table2") if c.method == "dense"}
    assert second == {model: fourth[model] for model in DENSE_OF_TABLE_2}


def test_table_1_is_table_4_without_the_easiest_ratios_of_wide_networks():
    def rows(name: str) -> list[tuple[str, str]]:
        return [(line[0].model, line[0].target) for line in specs.load(name).lines]

    left_out = [row for row in rows("dpf-table4") if row not in rows("dpf-table1")]
    assert left_out == [
        *(("WideResNet-28-2", target) for target in ("50%", "60%", "70%", "80%")),
        *(("WideResNet-28-4", target) for target in ("70%", "80%", "90%")),
        *(("WideResNet-28-8", target) for target in ("70%", "80%")),
    ]
    assert set(rows("dpf-table1")) < set(rows("dpf-table4"))


@pytest.mark.parametrize("paper", papers.names())
def test_every_published_figure_stands_in_a_table(paper):
    shown: dict[str, set[tuple[object, ...]]] = {}
    for name in specs.names():
        spec = specs.load(name)
        if spec.paper is papers.load(paper):
            table = next(n for n, t in spec.paper.tables.items() if t is spec.table)
            found = [q.published for line in spec.lines for q in line if q.published]
            found += [q.published for q in spec.baselines if q.published]
            shown.setdefault(table, set()).update((c.model, c.method, c.target) for c in found)
    for table in papers.load(paper).tables:
        assert shown[table] == {(c.model, c.method, c.target) for c in cells(table, paper)}


@pytest.mark.parametrize("paper", papers.names())
def test_names_of_papers_are_mapped_to_methods_models_and_options_that_exist(paper):
    found = papers.load(paper)
    for model in found.models.values():
        assert model.name in MODELS or model.name.startswith(TIMM_PREFIX)
        assert not model.methods.keys() - found.methods.keys()
    for key, method in found.methods.items():
        if not method.method:
            continue
        assert method.method in METHODS
        known = {field.name for field in dataclasses.fields(get_method(method.method))}
        sets = [method.options, *(m.methods.get(key, {}) for m in found.models.values())]
        assert all(options.keys() <= known for options in sets)


@pytest.mark.parametrize("paper", papers.names())
def test_a_papers_budget_is_that_of_its_recipe(paper):
    for model in papers.load(paper).models.values():
        if model.recipe:
            recipe = recipes.load(model.recipe, "test", Path())
            assert (recipe.epochs, recipe.steps) == (model.epochs, model.steps)


def test_a_target_counts_zeros_even_where_the_paper_counts_what_is_left():
    sparse = PublishedCell("m", "x", sparsity="97.5%")
    assert sparse.target == Decimal("0.975")
    assert PublishedCell("m", "x", density="2.5%").target == sparse.target
    assert PublishedCell("m", "x").target is None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "ResNet-21"}, "x.toml: tables.table4.cells[0]: no such model: 'ResNet-21'"),
        ({"method": "snap"}, "no such method: 'snap'. Did you mean 'snip'?"),
        ({"differs": "weather", "same_protocol": False}, "no such difference: 'weather'"),
        ({"same_protocol": False}, "give either same_protocol = true or differs"),
        ({"differs": "finetuning"}, "give either same_protocol = true or differs"),
        ({"top1": "ninety"}, "tables.table4.cells[0].top1: 'ninety' is no number"),
        ({"sparsity": "most"}, "'most' is no number"),
    ],
)
def test_a_published_cell_that_cannot_be_right_is_named(change, error):
    paper = papers.load("dpf2020")
    table = paper.tables["table4"]
    cell = msgspec.structs.replace(table.cells[0], **change)
    tables = {"table4": msgspec.structs.replace(table, cells=(cell,))}
    with pytest.raises(SuiteError) as found:
        papers.checked(msgspec.structs.replace(paper, tables=tables), "x.toml")
    assert error in str(found.value)


def test_a_paper_that_is_not_at_hand_is_refused():
    with pytest.raises(UnknownName, match=r"no such paper: 'dpf2021'. Did you mean 'dpf2020'"):
        papers.load("dpf2021")
