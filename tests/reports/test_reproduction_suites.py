"""The suites that reproduce the papers ask what the papers' tables ask."""

from __future__ import annotations

import math

import pytest

from bench import suite
from bench.suite import Suite
from reports import reproduction, specs
from reports.papers import PublishedCell
from reports.specs import Question, TableSpec


def answers(asked: Suite, one: suite.Question, question: Question) -> bool:
    """Whether a suite's question, all its conditions included, is a table's."""
    trained = question.trained
    assert trained is not None
    prunable = question.filters.prunable or "all"
    return (
        (one.method, one.model, one.prunable) == (question.method, question.name, prunable)
        and one.options == dict(question.options)
        and one.model_options == dict(question.model_options)
        and (one.sparsity is None) == (question.sparsity is None)
        and math.isclose(one.sparsity or 0, question.sparsity or 0, abs_tol=1e-9)
        and (asked.recipe, one.budget) == (trained.recipe, trained.budget)
    )


def answered(name: str) -> dict[PublishedCell, TableSpec]:
    """The published figures of the same protocol that a suite runs."""
    asked = suite.load(name)
    return {
        question.published: spec
        for spec in reproduction.tables()
        if spec.dataset == asked.dataset
        for line in spec.lines
        for question in line
        if question.published and question.published.same_protocol and question.method
        if any(answers(asked, one, question) for one in asked.questions if one.seed == 0)
    }


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        # dense; DPF, SNIP, sparse momentum and DSR at four ratios; incremental at two.
        ("cifar10-resnet20", 1 + 4 * 4 + 2),
        # The paper prints two figures of its dense network.
        ("cifar10-resnet32", 2 + 4 * 2 + 2),
        ("cifar10-resnet56", 1 + 4 * 2 + 2),
        ("cifar10-resnet20-filters", 1 + 2 * 4),
        ("cifar10-wrn28-2", 1 + 4 * 3),
        ("cifar10-vgg16d", 1 + 3),
        ("mnist-lth", 2),
        ("mnist-sparse-momentum", 4),
        ("mnist-sparse-momentum-lenet5", 3),
        ("mnist-snip", 2),
        ("mnist-variational-dropout", 1),
    ],
)
def test_a_suite_runs_so_many_published_figures_by_the_same_protocol(name, figures):
    assert len(answered(name)) == figures


@pytest.mark.parametrize("name", [name for name in suite.names() if name.startswith("cifar10-")])
def test_suites_of_cifar10_ask_for_three_seeds_unless_they_only_prove_the_way(name):
    seeds = {question.seed for question in suite.load(name).questions}
    assert seeds == ({0} if name.endswith("smoke") else {0, 1, 2})


def test_every_table_of_the_score_names_its_paper():
    assert all(spec.paper and spec.table for spec in reproduction.tables())
    assert {spec.name for spec in reproduction.tables()} <= set(specs.names())
