"""What figures show: which records enter which curve, with figures worked out by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from bench.errors import RecordError, UnknownName
from bench.record import LayerCount, Least, MaskUpdate, Record
from bench.spec import CellSpec
from bench.store import Cell, Manifest
from reports import series
from reports.aggregate import Results, aggregate
from reports.chart import Chart, deviation, extremes, seeds_text, short
from tests.reports.records import DENSE_MACS, SUITE, counts, fill, manifest, record, spec
from tests.reports.test_landed_rows import TICKETS, rows_at, small_record, small_row, suite, ticket

SPARSITIES = [step / 20 for step in range(1, 19)]

DENSE = [spec("dense", 0.0, seed) for seed in range(2)]


def results(asked: Iterable[CellSpec], *records: Record) -> Results:
    return aggregate(manifest(*asked), records)


def only(charts: tuple[Chart, ...]) -> Chart:
    (chart,) = charts
    return chart


def seeds_of(method: str, sparsity: float, *top1: float, **more: object) -> list[Record]:
    """A record for each accuracy, with seeds 0, 1, ..."""
    cells = [spec(method, sparsity, seed) for seed in range(len(top1))]
    return [record(of, value, **more) for of, value in zip(cells, top1, strict=True)]


def specs(records: Iterable[Record]) -> list[CellSpec]:
    return [one.spec for one in records]


RUN = [
    *seeds_of("dense", 0.0, 98.0, 99.0),
    *seeds_of("rigl", 0.9, 94.0, 96.0),
    *seeds_of("rigl", 0.5, 97.0, 97.0),
    *seeds_of("snip", 0.9, 90.0),
]
RESULTS = results(specs(RUN), *RUN)


def test_a_method_is_a_curve_of_means_with_deviations_and_the_dense_network_a_level() -> None:
    chart = only(series.accuracy_by_sparsity(RESULTS))
    rigl = chart.series[0]
    assert (rigl.label, rigl.x, rigl.y) == ("rigl", pytest.approx((50.0, 90.0)), (97.0, 95.0))
    # 94 and 96 lie 1 from their mean: squares 1 + 1, over n - 1 = 1
    assert rigl.low == pytest.approx((97.0, 95 - 2**0.5))
    assert rigl.high == pytest.approx((97.0, 95 + 2**0.5))
    (dense,) = chart.levels
    assert (dense.label, dense.y) == ("dense", 98.5)
    assert (dense.low, dense.high) == pytest.approx((98.5 - 0.5**0.5, 98.5 + 0.5**0.5))
    assert chart.title == "Accuracy against sparsity: lenet on digits"
    assert not chart.log_x


def test_one_seed_has_no_bar_and_is_told() -> None:
    chart = only(series.accuracy_by_sparsity(RESULTS))
    assert (chart.series[1].low, chart.series[1].high) == ((None,), (None,))
    assert chart.notes == (
        "n = 1 to 2 seeds; bars and bands: standard deviation over seeds; none for one seed.",
    )


@pytest.mark.parametrize(
    ("make", "x"),
    [
        # 200 parameters are not prunable; of 800 that are, a half or a tenth is left.
        (series.accuracy_by_parameters, (280.0, 600.0)),
        (series.accuracy_by_macs, (DENSE_MACS / 10, DENSE_MACS / 2)),
    ],
)
def test_costs_that_are_left_lie_on_a_logarithmic_axis(
    make: Callable[[Results], tuple[Chart, ...]], x: tuple[float, float]
) -> None:
    chart = only(make(RESULTS))
    assert (chart.series[0].x, chart.series[0].y) == (pytest.approx(x), (95.0, 97.0))
    assert chart.log_x


def test_records_from_before_training_macs_are_named_and_alone_give_no_chart() -> None:
    assert series.accuracy_by_training_macs(RESULTS) == ()
    counted = [dataclasses.replace(one, train_macs=5e9) for one in RUN[2:4]]
    chart = only(series.accuracy_by_training_macs(results(specs(RUN), *counted, *RUN[4:])))
    (rigl,) = chart.series
    assert (rigl.x, rigl.y) == ((5e9,), (95.0,))
    assert (
        "no training MACs in the records of: rigl, lenet, 50 %; snip, lenet, 90 %." in chart.notes
    )


def test_what_diverged_or_was_not_run_is_left_out_and_named() -> None:
    bad = seeds_of("rigl", 0.9, 94.0, 10.0)
    bad[1] = dataclasses.replace(bad[1], status="diverged", top1=None)
    lost = seeds_of("snip", 0.9, 10.0)[0]
    lost = dataclasses.replace(lost, status="diverged")
    chart = only(series.accuracy_by_sparsity(results([*specs(bad), lost.spec, *DENSE], *bad, lost)))
    assert [one.label for one in chart.series] == ["rigl"]
    assert chart.series[0].y == (94.0,)
    assert chart.notes[1:] == (
        "diverged, so not drawn: rigl, lenet, 90 % (1 of 2 seeds); "
        "snip, lenet, 90 % (1 of 1 seeds).",
        "not run, so not drawn: dense, lenet, 0 % (2 of 2 seeds).",
    )


def test_a_cell_that_diverged_interrupts_its_curve_and_no_other() -> None:
    fine = [*seeds_of("rigl", 0.5, 97.0), *seeds_of("rigl", 0.9, 95.0), *seeds_of("snip", 0.5, 9.0)]
    lost = [
        dataclasses.replace(seeds_of("rigl", sparsity, 10.0)[0], status="diverged")
        for sparsity in (0.1, 0.7, 0.95)
    ]
    chart = only(series.accuracy_by_sparsity(results(specs([*fine, *lost]), *fine, *lost)))
    rigl, snip = chart.series
    assert rigl.x == pytest.approx((50.0, 70.0, 90.0))  # before and after it nothing is joined
    assert (rigl.y, rigl.low) == ((97.0, None, 95.0), (None, None, None))
    assert (snip.x, snip.y) == (pytest.approx((50.0,)), (9.0,))


def test_seeds_that_no_row_has_are_told_once() -> None:
    rigl, snip = seeds_of("rigl", 0.9, 94.0, 95.0), seeds_of("snip", 0.9, 93.0, 92.0)
    chart = only(series.accuracy_by_sparsity(results(specs(rigl + snip), rigl[0], snip[1])))
    assert chart.notes[1:] == ("not run, so not drawn: 1 of 2 seeds of every row.",)


def test_models_and_data_sets_have_charts_of_their_own() -> None:
    cells = [spec(), spec(model="resnet20"), spec(dataset="mnist", data_hash="cccc")]
    charts = series.accuracy_by_macs(results(cells, *map(record, cells)))
    assert [chart.title.partition(": ")[2] for chart in charts] == [
        "lenet on digits",
        "resnet20 on digits",
        "lenet on mnist",
    ]
    assert len({chart.name for chart in charts}) == 3


def test_recipes_that_differ_are_told_apart() -> None:
    cells = [spec(), spec(recipe="other", recipe_hash="cccc")]
    charts = series.accuracy_by_macs(results(cells, *map(record, cells)))
    assert [chart.title.partition(": ")[2] for chart in charts] == [
        "lenet on digits, plain (aaaa)",
        "lenet on digits, other (cccc)",
    ]


def test_a_penaltys_targets_are_one_curve_at_what_they_reached() -> None:
    cells = [spec("l0", None, options=(("target", target),)) for target in (0.5, 0.9)]
    asked = Manifest(
        SUITE,
        "",
        tuple(Cell(f"l0[target={t}]", c, 9, 1, 0) for t, c in zip((0.5, 0.9), cells, strict=True)),
    )
    found = [record(cells[0], 97.0, counts=counts(0.5)), record(cells[1], 95.0, counts=counts(0.9))]
    chart = only(series.accuracy_by_sparsity(aggregate(asked, found)))
    assert [one.label for one in chart.series] == ["l0 by top-k"]
    assert chart.series[0].x == pytest.approx((50.0, 90.0))


def test_a_narrower_network_stands_in_the_chart_of_the_full_width() -> None:
    sparse = Cell("rigl", spec(), 100, 1.0, 0)
    found = aggregate(suite(sparse, small_row()), [record(spec()), small_record()])
    chart = only(series.accuracy_by_macs(found))
    assert chart.title.endswith(": lenet on digits")
    assert [(one.label, one.x) for one in chart.series] == [
        ("rigl", (20_000.0,)),
        ("small_dense", (24_000.0,)),
    ]


def test_a_narrower_network_stands_with_the_width_that_its_ratios_count_against() -> None:
    double = spec(model_options=(("width", 2),))
    cells = [Cell("rigl", of, 100, 1.0, 0) for of in (double, spec())]
    found = [record(double, counts=counts(0.9, parameters=4000)), record(spec()), small_record()]
    charts = series.accuracy_by_macs(aggregate(suite(*cells, small_row()), found))
    assert {chart.title.partition(": ")[2]: len(chart.series) for chart in charts} == {
        "lenet (width=2) on digits": 1,
        "lenet on digits": 2,
    }


def with_least(made: Record, *at: tuple[int, float]) -> Record:
    """A ticket whose rounds had the least validation loss at these steps and accuracies."""
    trainings = [
        dataclasses.replace(phase, least=Least(step, 0.1, top1))
        for phase, (step, top1) in zip(made.phases[1:], at, strict=True)
    ]
    return dataclasses.replace(made, phases=(made.phases[0], *trainings))


TICKET_SUITE = suite(*(cell for one in TICKETS for cell in rows_at(one, 0.5, 0.9)))
EARLY = (
    with_least(ticket(TICKETS[0], 98.0, 95.0), (80, 98.5), (60, 97.5), (40, 94.0)),
    with_least(ticket(TICKETS[1], 97.0, 93.0), (90, 98.7), (70, 96.5), (50, 92.0)),
)


def test_rounds_are_points_at_the_weights_they_had_left_with_bars_from_least_to_greatest() -> None:
    chart = only(series.tickets_accuracy(aggregate(TICKET_SUITE, EARLY)))
    end, early = chart.series
    assert (end.label, early.label) == ("ticket, at the end", "ticket, at early stopping")
    assert end.x == pytest.approx((10.0, 50.0, 100.0))
    assert end.y == (94.0, 97.5, 99.0)
    assert (end.low, end.high) == ((93.0, 97.0, 99.0), (95.0, 98.0, 99.0))
    assert early.y == pytest.approx((93.0, 97.0, 98.6))
    assert (chart.log_x, chart.falling_x) == (True, True)
    # Two cells, though each answers two rows.
    assert chart.notes == ("n = 2 seeds; bars and bands: least to greatest over seeds.",)


def test_early_stopping_is_the_iteration_of_least_validation_loss() -> None:
    chart = only(series.tickets_early_stopping(aggregate(TICKET_SUITE, EARLY)))
    (line,) = chart.series
    assert (line.label, line.y) == ("ticket", (45.0, 65.0, 85.0))
    assert (line.low, line.high) == ((40, 60, 80), (50, 70, 90))


def test_without_images_held_out_there_is_accuracy_at_the_end_only() -> None:
    found = aggregate(TICKET_SUITE, [ticket(TICKETS[0], 98.0, 95.0)])
    assert [one.label for one in only(series.tickets_accuracy(found)).series] == [
        "ticket, at the end"
    ]
    assert series.tickets_early_stopping(found) == ()


def test_a_round_that_diverged_is_left_out_and_named() -> None:
    good = ticket(TICKETS[0], 98.0, 95.0)
    guess = dataclasses.replace(good.phases[2], status="diverged", reason="it guesses")
    wrong = dataclasses.replace(good, phases=(*good.phases[:2], guess, good.phases[3]))
    chart = only(series.tickets_accuracy(aggregate(suite(*rows_at(TICKETS[0], 0.5, 0.9)), [wrong])))
    assert chart.series[0].x == pytest.approx((10.0, 100.0))
    assert chart.notes[1] == "not drawn: ticket, round-1, seed 0: diverged."


def test_suites_without_tickets_have_no_chart_of_them() -> None:
    assert series.tickets_accuracy(RESULTS) == ()


def settled(of: CellSpec, *changes: int, iou: float = 0.5) -> Record:
    """A record of 100 steps whose masks changed last so often in each part of the training."""
    updates = (MaskUpdate(0, 0.5, 0.5, 0.5, 0.1), MaskUpdate(50, 0.1, 0.2, iou, 0.1))
    return record(of, steps=100, last_changes=changes, mask_updates=updates)


PAIR = [spec(seed=seed) for seed in range(2)]


def test_masks_converge_as_fewer_weights_change_later_on() -> None:
    # Of 800 weights, 400 change last in the first half and 80 in the second; the others never.
    found = results(PAIR, settled(PAIR[0], 400, 80), settled(PAIR[1], 400, 40))
    (line,) = only(series.mask_convergence(found)).series
    assert line.x == (0.0, 50.0, 100.0)
    assert line.y == pytest.approx((57.5, 7.5, 0.0))
    # 60 % and 55 % at the start
    assert (line.low[0], line.high[0]) == pytest.approx((57.5 - 12.5**0.5, 57.5 + 12.5**0.5))


def test_overlaps_and_flips_stand_at_the_time_of_their_updates() -> None:
    found = results(PAIR, settled(PAIR[0], 1), settled(PAIR[1], 1, iou=0.7))
    (overlap,) = only(series.mask_overlap(found)).series
    assert (overlap.x, overlap.y) == ((0.0, 50.0), pytest.approx((0.5, 0.6)))
    (flips,) = only(series.mask_flips(found)).series
    assert (flips.x, flips.y) == ((0.0, 50.0), pytest.approx((50.0, 20.0)))


def test_points_that_not_every_seed_has_are_left_out() -> None:
    more = settled(PAIR[1], 1)
    more = dataclasses.replace(more, mask_updates=more.mask_updates[1:])
    (line,) = only(series.mask_overlap(results(PAIR, settled(PAIR[0], 1), more))).series
    assert line.x == (50.0,)


def test_methods_share_a_chart_at_one_sparsity_and_have_their_own_at_several() -> None:
    one = [spec("rigl"), spec("set")]
    chart = only(series.mask_convergence(results(one, *(settled(of, 80) for of in one))))
    assert [line.label for line in chart.series] == ["rigl", "set"]
    several = [*one, spec("rigl", 0.5)]
    charts = series.mask_convergence(results(several, *(settled(of, 80) for of in several)))
    assert {chart.title: [line.label for line in chart.series] for chart in charts} == {
        "Mask convergence: rigl, lenet on digits": ["90 % sparsity", "50 % sparsity"],
        "Mask convergence: set, lenet on digits": ["90 % sparsity"],
    }


def test_a_curve_over_training_says_which_of_its_own_cells_diverged() -> None:
    lost = record(spec("rigl", 0.5), None, status="diverged")
    chart = only(series.mask_convergence(results([spec(), lost.spec], settled(spec(), 80), lost)))
    assert chart.notes[1] == "diverged, so not drawn: rigl, lenet, 50 % (1 of 1 seeds)."


def layer(name: str, weights: int, left: int, *, prunable: bool = True) -> LayerCount:
    return LayerCount(f"{name}.weight", (weights,), weights, left, weights, left, prunable)


def test_layers_stand_in_their_order_with_the_share_that_they_keep() -> None:
    first = record(PAIR[0], layers=(layer("a", 100, 10), layer("norm", 8, 8, prunable=False)))
    second = record(PAIR[1], layers=(layer("a", 100, 30), layer("norm", 8, 8, prunable=False)))
    first, second = (
        dataclasses.replace(one, layers=(*one.layers, layer("b", 50, 5))) for one in (first, second)
    )
    chart = only(series.layer_density(results(PAIR, first, second)))
    assert chart.x_names == ("a", "b")
    (line,) = chart.series
    assert (line.x, line.y) == ((0.0, 1.0), pytest.approx((20.0, 10.0)))


def test_layers_of_another_sparsity_than_the_rows_are_not_taken() -> None:
    made = dataclasses.replace(ticket(TICKETS[0], 98.0, 95.0), layers=(layer("a", 100, 10),))
    narrow = dataclasses.replace(small_record(), layers=(layer("a", 10, 10),))
    asked = suite(*rows_at(TICKETS[0], 0.5, 0.9), small_row())
    chart = only(series.layer_density(aggregate(asked, [made, narrow])))
    assert [(one.label, one.y) for one in chart.series] == [("ticket", (10.0,))]


def test_brief_records_hold_no_layers_and_give_no_chart() -> None:
    for kind in series.KINDS.values():
        if kind.full:
            assert kind.make(RESULTS) == ()


def test_each_kind_that_reads_brief_records_gives_the_same_of_full_ones(tmp_path: Path) -> None:
    made = dataclasses.replace(EARLY[0], layers=(layer("a", 100, 10),), train_macs=9.0)
    costs = [dataclasses.replace(phase, train_macs=3.0) for phase in made.phases]
    store = fill(tmp_path, TICKET_SUITE, dataclasses.replace(made, phases=tuple(costs)))
    full = aggregate(store.manifest(), store.records())
    brief = aggregate(store.manifest(), store.records(brief=True))
    for kind in series.KINDS.values():
        if not kind.full:
            assert kind.make(brief) == kind.make(full) != ()


def test_a_kind_that_was_named_must_be_there_and_others_are_told(tmp_path: Path) -> None:
    store = fill(tmp_path, manifest(*specs(RUN)), *RUN)
    charts, lacking = series.charts(store)
    assert [chart.name for chart in charts] == [
        "accuracy-by-sparsity-lenet-on-digits",
        "accuracy-by-parameters-lenet-on-digits",
        "accuracy-by-macs-lenet-on-digits",
    ]
    assert len(lacking) == len(series.KINDS) - 3
    with pytest.raises(RecordError, match="no figure 'training-macs': the records do not hold"):
        series.charts(store, ["macs", "training-macs"])
    with pytest.raises(UnknownName, match="--kind: no such kind of figure: 'mac'"):
        series.charts(store, ["mac"])


def test_a_suite_that_was_not_run_gives_no_empty_figure(tmp_path: Path) -> None:
    charts, lacking = series.charts(fill(tmp_path, manifest(spec())))
    assert (charts, len(lacking)) == ([], len(series.KINDS))
    assert "the accuracy of a pruned network" in lacking[0]


def test_bars_need_two_values() -> None:
    assert (deviation([3.0]), extremes([3.0])) == (None, None)
    assert (deviation([1.0, 3.0]), extremes([1.0, 3.0])) == (
        pytest.approx((2 - 2**0.5, 2 + 2**0.5)),
        (1.0, 3.0),
    )


def test_the_number_of_seeds_is_said() -> None:
    assert seeds_text([1, 1, 0]) == "n = 1 seed, without bars."
    assert seeds_text([3, 3]) == "n = 3 seeds; bars and bands: standard deviation over seeds."


def test_one_bad_cell_does_not_flatten_the_others_and_is_named() -> None:
    run = [one for s in (0.5, 0.6, 0.7, 0.8) for one in seeds_of("rigl", s, 97.0)]
    run += seeds_of("rigl", 0.9, 30.0)
    chart = only(series.accuracy_by_macs(results(specs(run), *run)))
    # All quartiles are 97, yet ten points are shown.
    assert chart.floor == 87
    assert chart.notes[-1] == "below the axis: rigl (30.00 at 20 k)."


def test_half_of_each_curve_and_the_baseline_stand_above_the_axis() -> None:
    run = [one for s in SPARSITIES for one in seeds_of("rigl", s, 97.0)]
    bad = [*seeds_of("snip", 0.9, 30.0), *seeds_of("snip", 0.8, 50.5)]
    chart = only(series.accuracy_by_macs(results(specs([*run, *bad]), *run, *bad)))
    assert chart.floor == 39  # between 30 and 50.5 lies 40.25
    run += seeds_of("dense", 0.0, 35.5)
    chart = only(series.accuracy_by_macs(results(specs([*run, *bad]), *run, *bad)))
    assert chart.floor == 34


def test_accuracies_that_lie_together_have_no_floor() -> None:
    assert only(series.accuracy_by_macs(RESULTS)).floor is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (100, "100"), (1000, "1 k"), (20_000, "20 k"), (5e15, "5 P"), (2e21, "2000 E")],
)
def test_large_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
