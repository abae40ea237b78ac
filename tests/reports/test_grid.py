"""Which record stands in which cell of a table, and what is said of it."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from bench.errors import RecordError, UsageError
from bench.record import Least, PhaseResult, Times
from bench.spec import BudgetSpec
from bench.store import Against, Cell, Manifest
from reports import specs
from reports.aggregate import aggregate
from reports.grid import build, filled
from reports.matching import Ambiguous
from reports.specs import Filters
from tests.reports.published import cell, everything, found
from tests.reports.records import SUITE, counts, fill, manifest, record, spec

OWN = """
title = "Own"
dataset = "digits"
columns = {columns}
rows = [{{ model = "lenet", targets = {targets} }}]
{more}
"""


@pytest.fixture
def own(tmp_path):
    def make(columns='["rigl", "snip"]', targets='["90%"]', more=""):
        path = tmp_path / "own.toml"
        text = OWN.format(columns=columns, targets=targets, more=more)
        path.write_text(text, encoding="utf-8")
        return specs.load(path)

    return make


def means(grid):
    return [[cell.mean for cell in line.cells] for line in grid.lines]


def notes(grid, published=False):
    return "\n".join(grid.published_notes if published else grid.notes)


def test_a_cell_takes_the_record_of_its_method_and_sparsity_alone(own):
    wanted = record(spec("rigl"), 91.0)
    others = [
        record(spec("rigl", 0.8), 1.0),
        record(spec("rigl", model="other"), 2.0),
        record(spec("rigl", dataset="other"), 3.0),
        record(spec("rigl", options=(("every", 10),)), 4.0),
        record(spec("rigl", model_options=(("width", 2),)), 5.0),
    ]
    assert means(build(own(), [found([*others, wanted])])) == [[91.0, None]]


def test_variants_of_a_method_are_told_by_their_options(own):
    columns = '["rigl", { method = "rigl", label = "ERK", options = { scope = "erk" } }]'
    records = [record(spec(), 91.0), record(spec(options=(("scope", "erk"),)), 92.0)]
    assert means(build(own(columns), [found(records)])) == [[91.0, 92.0]]


def test_a_penalty_that_lands_by_a_last_ranking_answers_for_the_sparsity(own):
    landed = record(spec("l0", None, options=(("target", 0.9),)), 96.0)
    free = record(spec("l0", None), 97.0)
    assert means(build(own('["l0"]'), [found([landed, free])])) == [[96.0]]


def test_the_dense_network_stands_in_every_line(own):
    records = [record(spec("dense", 0.0), 98.0), record(spec(), 91.0)]
    grid = build(own('["dense", "rigl"]', '["90%", "95%"]'), [found(records)])
    assert means(grid) == [[98.0, 91.0], [98.0, None]]


def test_a_narrower_dense_network_is_a_method_of_its_own(own):
    narrow = spec("dense", 0.0, model_options=(("width", 0.1),))
    against = Against(1000, 800, 200_000, 80)
    small = Cell("small_dense", narrow, 100, 1.0, 0, sparsity=0.9, against=against)
    full = Cell("dense", spec("dense", 0.0), 100, 1.0, 0)
    records = [record(narrow, 90.0), record(full.spec, 98.0)]
    rows = aggregate(Manifest(SUITE, "", (small, full)), records).rows
    one = dataclasses.replace(found([]), rows=rows)
    assert means(build(own('["dense", "small_dense"]'), [one])) == [[98.0, 90.0]]


def test_seeds_of_one_question_join_over_suites(own):
    first = found([record(spec(seed=s), 90.0 + s) for s in (0, 1)], suite="first")
    second = found([record(spec(seed=s), 90.0 + s) for s in (1, 2)], suite="second")
    (shown,) = build(own('["rigl"]'), [first, second]).lines[0].cells
    assert shown.samples == {0: 90.0, 1: 91.0, 2: 92.0}


def test_two_suites_with_different_results_of_one_cell_are_an_error_that_names_both(own):
    one = record(spec(), 90.0)
    first, second = found([one], suite="first"), found([record(spec(), 50.0)], suite="second")
    name = re.escape(f"{one.spec.slug}.json")
    said = rf"first/{name} \(ok, top-1 90 %\) and second/{name} \(ok, top-1 50 %\): two different"
    with pytest.raises(RecordError, match=said):
        build(own('["rigl"]'), [first, second])
    diverged = found([record(spec(), None, status="diverged")], suite="third")
    with pytest.raises(RecordError, match=r"third/.*\(diverged\)"):
        build(own('["rigl"]'), [first, diverged])
    later = dataclasses.replace(one, multiple=2.0, label="other")
    assert means(build(own('["rigl"]'), [first, found([later], suite="again")])) == [[90.0]]


def test_rows_that_differ_in_a_condition_are_ambiguous_and_the_error_says_what_tells_them(own):
    short = spec(budget=BudgetSpec(epochs=1))
    one, other = found([record(spec(), 91.0)]), found([record(short, 80.0)], suite="short")
    with pytest.raises(Ambiguous) as error:
        build(own(), [one, other])
    assert str(error.value) == (
        "own.toml: rigl, lenet, 90%: several rows of records fit (suite demo, epochs 10.0; "
        "suite short, epochs 1.0). Say which in [filters] of the spec: suite, epochs; or name one "
        "suite to report on."
    )
    for more in ("filters.epochs = 1", 'filters.suite = "short"'):
        assert means(build(own(more=more), [one, other])) == [[80.0, None]]


@pytest.mark.parametrize(
    ("more", "change"),
    [
        ({"recipe": "mine", "recipe_hash": "x"}, 'filters.recipe = "mine"'),
        ({"budget": BudgetSpec(steps=9)}, "filters.steps = 9"),
        ({"prunable": "dpf"}, 'filters.prunable = "dpf"'),
        ({"init": "file"}, 'filters.init = "file"'),
    ],
)
def test_each_filter_takes_its_condition(own, more, change):
    records = [record(spec(), 91.0), record(spec(**more), 80.0)]
    assert means(build(own(more=change), [found(records)])) == [[80.0, None]]
    with pytest.raises(UsageError, match=next(iter(Filters.__struct_fields__))):
        build(own(), [found(records)])


def test_a_question_that_was_never_run_makes_none_ambiguous(own):
    asked = found([record(spec(), 91.0)], missing=[spec(recipe="other", recipe_hash="x")])
    assert means(build(own(), [asked])) == [[91.0, None]]


def test_versions_of_a_method_are_never_mixed(own):
    with pytest.raises(Ambiguous, match=r"version of the method 1; .*version of the method 2"):
        build(own(), [found([record(spec()), record(spec(method_version=2))])])


def test_only_the_suites_of_a_folder_that_can_answer_are_read(own, tmp_path):
    records = tmp_path / "records"
    store = fill(records, manifest(spec()), record(spec(), 91.0))
    assert means(build(own(), records)) == [[91.0, None]]
    path = store.path(spec())
    path.write_text(path.read_text().replace('"sparsity":0.9', '"sparsity":0.8'))
    before = path.read_bytes()
    with pytest.raises(RecordError, match="the file was edited or renamed"):
        build(own(), records)
    assert path.read_bytes() == before
    assert not build(own('["dense"]'), records).has_records


def test_a_folder_without_records_is_an_error(own, tmp_path):
    with pytest.raises(RecordError, match="no records"):
        build(own(), tmp_path / "none")


def test_the_best_mean_is_marked_but_never_the_dense_one_nor_survivors(own):
    columns = '["dense", "rigl", "set", "snip"]'
    records = [
        record(spec("dense", 0.0), 99.0),
        *(record(spec("rigl", seed=s), 91.0 + s) for s in (0, 1)),
        *(record(spec("set", seed=s), 91.5) for s in (0, 1)),
        record(spec("snip", seed=0), 95.0),
        record(spec("snip", seed=1), None, status="diverged", reason="nan"),
    ]
    cells = build(own(columns), [found(records)]).lines[0].cells
    assert [cell.best for cell in cells] == [False, True, True, False]


def test_of_errors_the_lowest_is_best(own):
    records = [record(spec("rigl"), 91.0), record(spec("snip"), 92.0)]
    cells = build(own(more='figure = "error"'), [found(records)]).lines[0].cells
    assert [(cell.mean, cell.best) for cell in cells] == [(9.0, False), (8.0, True)]


def test_with_statistics_what_is_not_told_apart_from_the_best_is_marked_too(own):
    spread = (-0.1, 0.0, 0.1)
    tops = {"rigl": 92.0, "set": 91.95, "snip": 85.0}
    records = [
        record(spec(method, seed=seed), top1 + spread[seed])
        for method, top1 in tops.items()
        for seed in range(3)
    ]
    table = own('["rigl", "set", "snip"]')
    plain = build(table, [found(records)]).lines[0].cells
    full = build(table, [found(records)], statistics=True)
    cells = full.lines[0].cells
    assert [cell.best for cell in plain] == [True, False, False]
    assert [cell.best for cell in cells] == [True, True, False]
    assert [cell.rank for cell in cells] == [1, 1, 3]
    assert plain[0].interval is None
    assert cells[0].interval.low < 92.0 < cells[0].interval.high
    text = notes(full)
    assert "pooled over the table's cells, 0.100 (6 degrees of freedom)" in text
    assert "n = 3, 3 comparisons: 0." in text


def test_a_cell_that_sets_the_noise_of_the_others_is_named_and_no_interval_leaves_0_to_100(own):
    table = own('["set", "rigl", "snip"]')
    values = {"set": (99.0, 99.1, 98.9), "rigl": (98.0, 98.1, 97.9), "snip": (10.0, 95.0, 60.0)}

    def grid(**more):
        rows = (values | more).items()
        records = [record(spec(m, seed=s), v) for m, vs in rows for s, v in enumerate(vs)]
        return build(table, [found(records)], statistics=True)

    text = notes(grid())
    assert "cells spread 427.2 times as much as others (snip, lenet, 90%): the pooled" in text
    assert "intervals and ties say little here" in text
    assert [cell.interval.high for cell in grid().cells()][:2] == [100.0] * 2
    assert grid(snip=(0.0, 60.0, 0.0)).lines[0].cells[2].interval.low == 0.0
    assert "cells spread" not in notes(grid(snip=(97.0, 97.3, 96.7)))
    assert "cells spread and the others do not (snip, lenet, 90%)" in notes(
        grid(set=(99.0,) * 3, rigl=(98.0,) * 3)
    )


def test_several_cells_that_spread_much_do_not_hide_each_other(own):
    names = ["set", "rigl", "snip", "dpf", "grasp", "mest"]
    near = dict.fromkeys(names[:4], (97.0, 97.1, 96.9))
    far = dict.fromkeys(names[4:], (90.0, 60.0, 75.0))
    records = [
        record(spec(m, seed=s), v) for m, vs in (near | far).items() for s, v in enumerate(vs)
    ]
    text = notes(build(own(str(names).replace("'", '"')), [found(records)], statistics=True))
    assert "150.0 times as much as others (grasp, lenet, 90%; mest, lenet, 90%)" in text


def test_each_figure_takes_the_noise_of_its_own_seeds():
    tickets = [ticket(seed, (98.0 + seed, 97.0)) for seed in range(2)]
    grid = build(specs.load("lth-lenet"), [found(tickets)], statistics=True)
    _, step, there, _ = (
        cell.interval and cell.interval.high - cell.interval.low for cell in grid.lines[0].cells
    )
    # In both rounds the steps lie one apart; accuracies do in the first and agree in the second.
    # Student's t has 4.303 with the two degrees of freedom.
    assert step == pytest.approx(2 * 4.303 * math.sqrt(0.5) / math.sqrt(2), rel=1e-3)
    assert there == pytest.approx(2 * 4.303 * 0.5 / math.sqrt(2), rel=1e-3)
    assert "cells, early-stopping iteration: 0.707 (2 degrees of freedom); top-1 %" in notes(grid)


def compressed(seed, method, times, top1=98.0):
    """The record of a network with one in so many prunable weights."""
    found = counts(0.0, prunable_nonzero=round(800 / times))
    return record(spec(method, seed=seed), top1 + seed, counts=found)


def test_compressions_are_told_apart_by_their_own_noise(own):
    def grid(*second):
        records = [compressed(seed, "rigl", 50) for seed in range(3)]
        records += [compressed(seed, "snip", times) for seed, times in enumerate(second)]
        return build(own(more='figure = "compression"'), [found(records)], statistics=True)

    # Accuracies spread by 1, which would say nothing of how far 50 and 40 times lie apart.
    apart = grid(38.1, 40, 42.1)
    assert [cell.best for cell in apart.cells()] == [True, False]
    alike = grid(20, 40, 80)
    assert [cell.best for cell in alike.cells()] == [True, True]
    assert "points" not in notes(alike).partition("power of 80 %")[2]


def test_counts_on_which_all_seeds_agree_are_ranked_as_they_are(own):
    records = [
        compressed(s, m, times) for m, times in (("rigl", 50), ("snip", 40)) for s in range(3)
    ]
    grid = build(own(more='figure = "compression"'), [found(records)], statistics=True)
    assert [cell.rank for cell in grid.cells()] == [1, 2]
    assert "no cell has two seeds" not in notes(grid)


def test_no_note_says_that_no_cell_has_two_seeds_where_the_figure_is_no_accuracy(own):
    records = [
        record(spec(method, seed=seed), 98.0, top5=top5 + seed)
        for method, top5 in (("rigl", 60.0), ("snip", 90.0))
        for seed in range(3)
    ]
    grid = build(own(more='figure = "top5"'), [found(records)], statistics=True)
    assert [cell.best for cell in grid.cells()] == [False, True]
    assert "pooled over the table's cells, 1.000 (4 degrees of freedom)" in notes(grid)
    assert "no cell has two seeds" not in notes(grid)


def test_where_nothing_is_compared_no_note_tells_of_tests():
    tickets = [ticket(seed, (98.0 + seed, 97.0)) for seed in range(3)]
    text = notes(build(specs.load("lth-lenet"), [found(tickets)], statistics=True))
    assert "nothing is compared" in text
    assert "Student's t intervals" in text
    assert "tests" not in text.replace("the tests", "")


def test_one_seed_has_no_noise_and_the_notes_say_so(own):
    records = [record(spec("rigl"), 91.0), record(spec("snip"), 92.0)]
    grid = build(own(), [found(records)], statistics=True)
    assert grid.lines[0].cells[0].interval is None
    assert "no cell has two seeds" in notes(grid)


def test_six_seeds_cannot_tell_three_methods_apart_and_the_notes_say_so(own):
    records = [
        record(spec(method, seed=seed), top1 + seed / 100)
        for method, top1 in (("rigl", 90.0), ("set", 95.0), ("snip", 99.0))
        for seed in range(6)
    ]
    grid = build(own('["rigl", "set", "snip"]'), [found(records)], statistics=True)
    assert all(cell.best for cell in grid.lines[0].cells)
    assert "n = 6, 3 comparisons: n too small" in notes(grid)


def test_the_noise_of_the_dense_network_counts_once_though_it_stands_in_every_line(own):
    records = [record(spec("dense", 0.0, seed=s), 98.0 + s) for s in range(3)]
    table = own('["dense", "rigl"]', '["90%", "95%", "99%"]')
    assert "(2 degrees of freedom)" in notes(build(table, [found(records)], statistics=True))


def test_notes_state_seeds_conditions_devices_and_cost(own):
    records = [record(spec(seed=s), 91.0 + s, multiple=1.5) for s in (0, 1)]
    text = notes(build(own(), [found(records, missing=[spec(seed=2)])]))
    assert "n = 2/3; seeds asked for: 0, 1, 2." in text
    assert "recipe: plain (aaaa). budget: 10 epochs. prunable: all." in text
    assert "devices: cpu; threads: 1; torch: 2.15" in text
    assert "budget multiple: rigl 1.50." in text


def test_conditions_that_differ_between_networks_name_them():
    spec = specs.load("dpf-table1")
    text = notes(build(spec, [found(everything(spec, seeds=1))]))
    assert "recipe: dpf-resnet (aaaa) (vgg16_d, resnet20, resnet32, resnet56); dpf-wrn" in text
    assert "budget: 300 epochs (vgg16_d, resnet20, resnet32, resnet56); 200 epochs" in text


def test_a_failed_try_is_named_and_counts_as_not_run(own):
    tried = record(spec(), None, status="failed", reason="ValueError: no")
    one = dataclasses.replace(found([], missing=[spec()]), attempts=(tried,))
    assert "rigl, lenet, 90 %, seed 0: failed: ValueError: no" in notes(build(own(), [one]))


def test_records_that_stand_in_no_cell_are_counted(own):
    records = [record(spec(), 91.0), record(spec(options=(("every", 10),)), 90.0)]
    assert "1 row of these networks and methods with other options" in notes(
        build(own(), [found(records)])
    )


def test_a_run_by_the_papers_protocol_is_marked_the_same_and_a_shorter_one_says_so():
    table = specs.load("dpf-table2")
    line = table.lines[0]
    dense, dpf = line[0], line[4]
    full = cell(dpf, "cifar10", 0)
    short = cell(dense, "cifar10", 0, budget=BudgetSpec(epochs=30), recipe="other", init="file")
    grid = build(table, [found([record(full, 90.0), record(short, 80.0)])])
    cells = grid.lines[0].cells
    assert cells[4].reasons == ()
    assert cells[0].reasons == (
        "recipe other, the paper's is dpf-resnet",
        "shorter budget: 30 epochs, the paper's is 300 epochs",
        "initial weights: file, the paper's are random",
    )
    assert cells[5].reasons[0].startswith("the paper tunes optimizer and learning rate")
    text = notes(grid, published=True)
    assert f"({cells[4].letters[0]}): same protocol, as far as the paper says it" in text
    assert "differs from the paper (dense): shorter budget: 30 epochs" in text
    assert "same protocol" not in notes(grid)


def test_other_prunable_weights_are_no_protocol_of_the_papers():
    table = specs.load("deepr-mnist")
    question = table.lines[2][1]
    filters = Filters()
    lines = [tuple(dataclasses.replace(q, filters=filters) for q in line) for line in table.lines]
    table = dataclasses.replace(table, lines=tuple(lines))
    of = cell(question, "mnist", 0, prunable="lth")
    reasons = build(table, [found([record(of, 96.0)])]).lines[2].cells[1].reasons
    assert "prunable weights: lth, the paper's are all" in reasons


def test_the_difference_is_ours_less_the_published_figure():
    table = specs.load("dpf-table1")
    dpf = table.lines[4][4]
    one = found([record(cell(dpf, "cifar10", s), 88.0 + s / 100) for s in (0, 1)])
    shown = build(table, [one]).lines[4].cells[4]
    assert shown.published.text == "88.01"
    assert shown.difference == pytest.approx(88.005 - 88.01)


def test_fields_are_figures_of_a_line_and_differences_are_paired_over_seeds():
    table = specs.load("dpf-table3")
    dpf, dense = table.lines[3][0], table.baselines[3]
    records = [
        *(record(cell(dense, "imagenet", s), 76.0 + s, top5=93.0) for s in (0, 1, 2)),
        *(record(cell(dpf, "imagenet", s), 75.0 + 2 * s, top5=92.0) for s in (1, 2, 3)),
    ]
    line = build(table, [found(records)]).lines[3]
    assert line.words == ("ResNet-50", "80%", "DPF")
    base, top1, difference, *_, reached, left = line.cells
    assert (base.mean, top1.mean) == (77.0, 79.0)
    assert difference.samples == {1: 0.0, 2: 1.0}
    assert (reached.mean, left.mean) == (pytest.approx(64.0), pytest.approx(360e-6))


def test_an_architecture_is_inputs_of_linear_layers_and_filters_of_convolutions():
    from bench.record import Expected, LayerCount

    layers = [
        LayerCount("conv", (20, 1, 5, 5), 500, 100, 1, 1, prunable=True, live_units=(9, 1)),
        LayerCount("fc", (500, 800), 400_000, 99, 1, 1, prunable=True, live_units=(25, 65)),
        LayerCount("norm", (20,), 20, 20, 1, 1, prunable=False, live_units=(20, 20)),
    ]
    table = specs.load("l0-architecture")
    question = table.lines[4][0]
    records = [
        record(
            cell(question, "mnist", seed),
            99.0,
            layers=tuple(dataclasses.replace(x, live_units=(9 + seed, 65)) for x in layers),
            expected=Expected(1.0, 5000.0),
        )
        for seed in (0, 2)
    ]
    units, error, expected, _ = build(table, [found(records)]).lines[4].cells
    assert units.words == "10-65"
    assert (error.mean, expected.mean) == (1.0, 5000.0)
    brief = [dataclasses.replace(one, layers=()) for one in records]
    assert build(table, [found(brief)]).lines[4].cells[0].words == ""


def ticket(seed, top1s, sparsity=0.5):
    """A ticket of two rounds, whose network has 800 prunable weights of 1,000."""
    from bench.record import LayerCount

    layers = (
        LayerCount("fc", (8, 100), 800, 400, 1, 1, prunable=True),
        LayerCount("out", (2, 100), 200, 200, 1, 1, prunable=False),
    )
    phases = tuple(
        PhaseResult(
            f"round-{r}",
            100,
            density,
            total=100 * (r + 1),
            status="ok",
            top1=top1,
            counts=counts(1 - (density or 1.0)),
            least=Least(40 + 20 * r + seed, 0.1, top1 - 1),
        )
        for r, (density, top1) in enumerate(zip((None, 0.5), top1s, strict=True))
    )
    question = specs.load("lth-lenet").lines[0][0]
    of = dataclasses.replace(cell(question, "mnist", seed), sparsity=sparsity)
    times = Times(1.0, 0.0, 0.0, "2026-01-01T00:00:00Z", (1.0, 1.0))
    more = {"phases": phases, "layers": layers, "steps": 200, "multiple": 2.0, "times": times}
    return record(of, top1s[-1], counts=counts(0.5), **more)


def test_rounds_of_a_ticket_are_lines_by_what_is_left_of_all_weights():
    table = specs.load("lth-lenet")
    grid = build(table, [found([ticket(0, (98.0, 97.0)), ticket(1, (98.5, 97.5))])])
    first, second, *controls = grid.lines
    assert means(grid)[:2] == [[100.0, 40.5, 97.25, 98.25], [60.0, 60.5, 96.25, 97.25]]
    assert [line.words[1] for line in (first, second, *controls)] == [
        *("ticket", "ticket"),
        *("re-initialised", "shuffled"),
    ]
    assert not any(cell.best for cell in grid.cells())
    assert "budget multiple: ticket 1.00 to 2.00." in notes(grid)


def test_a_kept_weight_that_trained_to_zero_makes_no_round_of_its_own():
    one, other = ticket(0, (98.0, 97.0)), ticket(1, (98.5, 97.5))
    idle = dataclasses.replace(other.phases[1].counts, prunable_nonzero=399)
    phases = (other.phases[0], dataclasses.replace(other.phases[1], counts=idle))
    grid = build(specs.load("lth-lenet"), [found([one, dataclasses.replace(other, phases=phases)])])
    assert means(grid)[1] == [60.0, 60.5, 96.25, 97.25]


def test_tickets_of_two_suites_give_a_round_once():
    table = specs.load("lth-lenet")
    one = found([ticket(0, (98.0, 97.0))], suite="one")
    other = found([ticket(0, (98.0, 97.0), sparsity=0.51)], suite="other")
    assert means(build(table, [one, other]))[:2] == means(build(table, [one]))[:2]


def test_all_tables_that_records_fill_are_found_in_one_go(tmp_path):
    table = specs.load("dpf-table1")
    records = everything(table, seeds=1)
    store = fill(tmp_path, manifest(*(one.spec for one in records)), *records)
    names = [grid.name for grid in filled([store])]
    assert names == ["dpf-table1", "dpf-table2", "dpf-table4", "sparse-momentum-cifar10"]
