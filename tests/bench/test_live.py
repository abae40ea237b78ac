"""What the bar says besides steps."""

from __future__ import annotations

from types import SimpleNamespace

from bench import live
from bench.store import Cell
from tests.bench.cells import spec


def test_the_speed_is_that_of_images_of_all_cells():
    column = live._ImagesColumn(batch=64)
    assert column.render(SimpleNamespace(speed=None)).plain == "left"
    assert column.render(SimpleNamespace(speed=20.5)).plain == "1,312 images/s, left"


def test_a_cell_runs_from_its_first_word_until_it_ends_or_is_saved():
    cells = [Cell("m", spec(seed=seed), 50, 1.0, 0) for seed in range(3)]
    first, second, _ = (cell.spec.key for cell in cells)
    view = live.View(cells, batch=64)
    assert view._summary() == "0/3 cells, 0 running"
    view.progress(first, 1)
    view.progress(second, 1)
    assert view._summary() == "0/3 cells, 2 running"
    view.stop(second, 20)
    assert view._summary() == "0/3 cells, 1 running"


def test_what_was_said_once_is_not_said_again(capsys):
    view = live.View([])
    for text in ("one", "two", "one"):
        view.say(text)
    assert capsys.readouterr().err == "one\ntwo\n"
