"""How many cells a process takes, with memory that the test makes up."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from bench.packing import MOST, SETTLED, SLACK, Fixed, Packed, packing


@dataclass
class Memory:
    """Of a device."""

    taken: int = 0
    size: int = 1000

    @property
    def packed(self) -> Packed:
        return Packed(lambda: self.taken, lambda: self.size - self.taken)


def test_a_fixed_number_of_places_is_filled_at_once():
    places = Fixed(3)
    assert [places.admits(running, 0) for running in range(5)] == [True] * 3 + [False] * 2


def test_a_cell_begins_only_when_what_the_last_one_takes_is_known():
    memory = Memory()
    places = memory.packed
    assert places.admits(0, SETTLED)
    memory.taken = 50
    assert not places.admits(1, SETTLED - 1)
    memory.taken = 200
    assert places.admits(1, SETTLED)
    assert places.largest == 200


def test_cells_begin_until_there_is_no_room_for_one_more_and_some():
    memory = Memory()
    places = memory.packed
    running = 0
    while places.admits(running, SETTLED):
        running += 1
        memory.taken += 100
    # With 8 running, 200 are free, which is more than 150; with 9 there are 100.
    assert running == 9
    assert memory.size - memory.taken <= SLACK * places.largest
    memory.taken -= 100  # one has ended, and gave its memory back
    assert places.admits(running - 1, SETTLED)


def test_the_largest_cell_decides():
    memory = Memory()
    places = memory.packed
    for running, takes in enumerate((100, 300, 50, 150)):
        assert places.admits(running, SETTLED)
        memory.taken += takes
    assert places.largest == 300
    assert not places.admits(4, SETTLED)  # 400 are free; another of 300 would want 450


def test_one_cell_always_runs_however_much_it_takes():
    memory = Memory()
    places = memory.packed
    assert places.admits(0, SETTLED)
    memory.taken = 999
    assert not places.admits(1, SETTLED)
    assert places.admits(0, SETTLED)


def test_memory_that_others_give_back_meanwhile_hides_no_cell():
    memory = Memory(size=10_000)
    places = memory.packed
    places.admits(0, SETTLED)
    memory.taken = 400
    assert places.admits(1, SETTLED)
    memory.taken = 100  # the first has ended while the second began
    places.admits(1, SETTLED)
    assert places.largest == 400


def test_there_is_an_end_to_small_cells():
    memory = Memory(size=10**9)
    places = memory.packed
    assert all(places.admits(running, SETTLED) for running in range(MOST))
    assert not places.admits(MOST, SETTLED)


@pytest.mark.parametrize("count", [1, 7])
def test_a_number_of_places_is_taken_at_its_word(count):
    assert packing(count, torch.device("cpu")) == Fixed(count)


def test_as_many_as_fit_is_by_what_a_gpu_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    places = packing(0, torch.device("cuda"))
    assert isinstance(places, Packed)
    assert (places.taken(), places.free()) == (300, 700)
