"""The suites that reproduce the papers ask what the papers' tables ask."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from bench import suite
from bench.prunable import prunable_names, shapes
from bench.resolve import make_method
from bench.spec import Scalar
from bench.suite import Suite
from methods.allocation import keep_count
from methods.api import Budget
from models import create_model, model_options
from reports import papers, reproduction, specs
from reports.fields import FIELDS
from reports.papers import PublishedCell
from reports.specs import Question

README = Path(__file__).parents[2] / "reports" / "README.md"


def differing(method: str, options: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Options as a cell of the method has them: those that are not at their default."""
    made = make_method(method, options, "")
    fields = (field.name for field in dataclasses.fields(made))
    values = {name: (getattr(made, name), getattr(type(made)(), name)) for name in fields}
    return {name: value for name, (value, default) in values.items() if value != default}


def differing_of_model(model: str, options: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Likewise of a network."""
    return {name: v for name, v in options.items() if model_options(model).get(name) != v}


def answers(asked: Suite, one: suite.Question, question: Question) -> bool:
    """Whether a cell of a suite, all its conditions included, is a table's."""
    trained = question.trained
    assert trained is not None
    prunable = question.filters.prunable or "all"
    return (
        (one.method, one.model, one.prunable) == (question.method, question.name, prunable)
        and differing(one.method, one.options) == dict(question.options)
        and differing_of_model(one.model, one.model_options) == dict(question.model_options)
        and (one.sparsity is None) == (question.sparsity is None)
        and math.isclose(one.sparsity or 0, question.sparsity or 0, abs_tol=1e-9)
        and (asked.recipe, one.budget) == (trained.recipe, trained.budget)
    )


@cache
def answered(name: str) -> frozenset[tuple[str, PublishedCell]]:
    """The published figures, by their paper, that count once a suite has been run."""
    asked = suite.load(name)
    return frozenset(
        (spec.paper.arxiv, question.published)
        for spec in reproduction.tables()
        if spec.dataset == asked.dataset and spec.paper
        for line in spec.lines
        for question in line
        if question.published and question.published.same_protocol and question.method
        if not question.published.unverified
        if any(FIELDS[name].published(question.published) for name in reproduction.SCORED)
        if any(answers(asked, one, question) for one in asked.questions if one.seed == 0)
    )


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        # dense; DPF, SNIP, sparse momentum and DSR at four ratios, of which one did not converge;
        # incremental at two.
        ("cifar10-resnet20", 1 + 4 * 4 - 1 + 2),
        # The paper prints two figures of its dense network.
        ("cifar10-resnet32", 2 + 4 * 2 + 2),
        ("cifar10-resnet56", 1 + 4 * 2 - 1 + 2),
        ("cifar10-resnet20-filters", 1 + 2 * 4),
        ("cifar10-wrn28-2", 1 + 4 * 3 - 1),
        ("cifar10-vgg16d", 1 + 3),
        ("mnist-lth", 2),
        ("cifar10-conv2", 1),
        ("cifar10-conv4", 1),
        ("cifar10-conv6", 1),
        ("mnist-sparse-momentum", 4),
        ("mnist-sparse-momentum-lenet5", 3),
        ("mnist-snip", 2),
        ("mnist-variational-dropout", 1),
        ("mnist-dsr", 0),
    ],
)
def test_a_suite_runs_so_many_published_figures_by_the_same_protocol(name, figures):
    assert len(answered(name)) == figures


def test_the_readme_counts_the_figures_of_each_suite():
    line = re.compile(r"^\| (`(?:mnist|cifar10)-.*?`) \|.*\| +(\d+) \|$", re.MULTILINE)
    told = {
        tuple(re.findall("`(.*?)`", names)): int(count)
        for names, count in line.findall(README.read_text(encoding="utf-8"))
    }
    assert len(told) > 10
    for names, count in told.items():
        assert len(frozenset().union(*map(answered, names))) == count, names
    ours = {"mnist-lenet", "cifar10-resnet20-smoke"}
    suites = {name for name in suite.names() if name.startswith(("mnist", "cifar10"))}
    assert {name for names in told for name in names} == suites - ours


@pytest.mark.parametrize("paper", papers.names())
def test_papers_name_no_option_at_its_default_for_no_cell_has_it(paper):
    known = papers.load(paper)
    for method in known.methods.values():
        if method.method:
            assert differing(method.method, method.options) == method.options
    for model in known.models.values():
        assert differing_of_model(model.name, model.options) == model.options
        for key, options in model.methods.items():
            assert differing(known.methods[key].method, options) == options


@pytest.mark.parametrize("name", [name for name in suite.names() if name.startswith("cifar10-")])
def test_suites_of_cifar10_ask_for_three_seeds_unless_they_only_prove_the_way(name):
    seeds = {question.seed for question in suite.load(name).questions}
    assert seeds == ({0} if name.endswith("smoke") else {0, 1, 2})


def test_every_table_of_the_score_names_its_paper():
    assert all(spec.paper and spec.table for spec in reproduction.tables())
    assert {spec.name for spec in reproduction.tables()} <= set(specs.names())


@pytest.mark.parametrize(
    "name", ["mnist-lth", "mnist-lth-pixels", "cifar10-conv2", "cifar10-conv4", "cifar10-conv6"]
)
def test_tickets_of_the_papers_are_what_whole_rounds_leave(name):
    """A weight or two more at the most: one less would cost a round more."""
    asked = [q for q in suite.load(name).questions if q.method == "lottery_ticket" and q.seed == 0]
    assert asked
    for one in asked:
        method = make_method(one.method, one.options, "")
        image = (1, 28, 28) if name.startswith("mnist") else (3, 32, 32)
        model = create_model(one.model, image, **one.model_options)
        weights = shapes(model, prunable_names(model, method, one.prunable))
        total = sum(math.prod(shape) for _, shape in weights)
        rounds = method.levels(Budget(1000, 100, 55_000, (), weights), 0.01)
        kept = keep_count(total, 1 - one.sparsity)
        assert any(0 <= kept - sum(left.values()) <= 2 for left in rounds)
