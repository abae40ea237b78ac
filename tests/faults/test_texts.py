"""A method that raises anything at all, with any words: a row that failed, and the others go on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from bench.errors import SuiteError
from bench.live import View
from bench.record import (
    MOST_OF_REASON,
    MOST_OF_TRACEBACK,
    decode,
    encode,
    one_line,
    printable,
    told,
)
from bench.runner import ends_run
from bench.signals import listen, request
from bench.store import Store
from methods.rigl import RigL
from tests.bench.cells import plan_of, register, stored, write_suite
from tests.reports.records import record, spec


class Boom(BaseException):
    """What no `except Exception` catches."""


class Mute(Exception):
    """Cannot say what is wrong."""

    def __str__(self) -> str:
        raise ValueError("no words")


class MuteToo(RuntimeError):
    """The same, of a class whose text is looked into."""

    def __str__(self) -> str:
        raise Boom


RAISED: dict[str, tuple[Callable[[], BaseException], str]] = {
    "boom": (lambda: Boom("x"), "Boom: x"),
    "interrupt": (KeyboardInterrupt, "KeyboardInterrupt"),
    "close": (GeneratorExit, "GeneratorExit"),
    "mute": (Mute, "Mute, whose text raises ValueError"),
    "mute_too": (MuteToo, "MuteToo, whose text raises Boom"),
    "surrogate": (lambda: ValueError("\udc80 it is"), r"ValueError: \udc80 it is"),
    "terminal": (lambda: ValueError("\x1b[31m\a\r\n|"), r"ValueError: \x1b[31m\x07 |"),
    "long": (lambda: ValueError("z" * 1_000_000), "ValueError: zzz"),
}
"""What is raised, and how its reason begins."""

NO_EXCEPTIONS = ("boom", "interrupt", "close")
"""Those that are tried in a step and between two, which are caught in different places."""


@dataclass(frozen=True)
class Raises(RigL):
    """RigL that raises something, in a step or between two of them."""

    what: str = ""
    between: bool = False

    def _raise(self) -> None:
        raise RAISED[self.what][0]()

    def edit_gradients(self, state):
        super().edit_gradients(state)
        if not self.between:
            self._raise()

    def update(self, run):
        if self.between:
            self._raise()
        super().update(run)


@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_a_method_raises_is_a_row_that_failed(workers, place):
    if place.real and workers == 2:
        pytest.skip("not run: that commands begin alike is tried with one worker")
    info = place.folder / "site" / "raises-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: raises\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sparsebench.methods]\nraises = {__name__}:Raises\n")
    rows = [
        f'[methods.{what}_{between}]\nmethod = "raises"\nwhat = "{what}"\nbetween = {between}'
        for what in RAISED
        for between in (("true", "false") if what in NO_EXCEPTIONS else ("false",))
    ]
    table = "\n".join([*rows, "[methods.dense]"])
    suite = write_suite(place.folder, table, budget="{ epochs = 1, max_multiple = 1.2 }")
    run = place.run(suite, "--workers", str(workers))
    assert run.wait() == 1, run.said
    assert [one.label for one in stored(place.records).values()] == ["dense"]
    found = {one.label: one for one in Store(place.records, "tiny").attempts()}
    assert len(found) == len(rows)
    for label, one in found.items():
        wanted = RAISED[label.rpartition("_")[0]][1]
        assert (one.status, one.reason[: len(wanted)]) == ("failed", wanted)
        assert "in _raise" in one.traceback
        assert len(one.reason) <= MOST_OF_REASON
        assert len(one.traceback) <= MOST_OF_TRACEBACK
        assert one.traceback.replace("\n", "").isprintable()
        assert one.reason in run.said
    assert "Traceback" not in run.said
    assert run.said.replace("\n", "").isprintable()
    assert not list(place.records.glob("tiny/locks/*"))


def test_a_long_text_keeps_both_its_ends():
    assert one_line("a" + "z" * 10**6 + "b") == f"a{'z' * 246} ... {'z' * 246}b"
    assert one_line("\x1b" * 499).startswith(r"\x1b\x1b")
    assert len(one_line("\x1b" * 499)) <= MOST_OF_REASON
    words = [("z" * length + " ") * 300 for length in range(1, 40)]  # some are cut at a space
    for text in ("a\n b\t c", "z" * 501, "\x1b" * 499, "\udc80" * 9999, *words):
        assert one_line(one_line(text)) == one_line(text)
        assert one_line(text).isprintable()


def test_what_can_be_printed_stays_as_it_is():
    assert printable("naïve 网\nline") == "naïve 网\nline"
    assert told(ValueError("naïve")) == "ValueError: naïve"
    assert told(MemoryError()) == "MemoryError"


def test_a_note_rings_no_bell(capsys):
    View([]).say("a\x1b[31m\a")
    assert capsys.readouterr().err == "a\\x1b[31m\\x07\n"


def test_somebodys_second_signal_and_what_is_closed_are_no_cells_fault(monkeypatch):
    with listen():
        assert not ends_run(KeyboardInterrupt())
        request()
        assert ends_run(KeyboardInterrupt())
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    assert ends_run(KeyboardInterrupt())  # nobody listens: the interpreter raises it at Ctrl-C

    found = []

    def waits():
        try:
            yield
        except GeneratorExit as error:
            found.append(ends_run(error))
            raise

    waiting = waits()
    next(waiting)
    waiting.close()
    assert found == [True]


def test_texts_are_mended_wherever_a_record_comes_from():
    ours = record(spec(), reason="a\nb\a", traceback="one\n\ttwo\x1b\n")
    assert (ours.reason, ours.traceback) == (r"a b\x07", "one\n    two\\x1b\n")
    assert decode(encode(ours), "") == ours


@pytest.mark.parametrize("what", ["boom", "close", "mute_too"])
def test_what_a_method_raises_before_training_is_a_line_that_names_its_place(
    what, tmp_path, monkeypatch
):
    @dataclass(frozen=True)
    class Unplanned(RigL):
        def plan(self, budget, density):
            raise RAISED[what][0]()

    register(monkeypatch, "unplanned", Unplanned)
    path = write_suite(tmp_path, "[methods.unplanned]")
    with pytest.raises(SuiteError) as found:
        plan_of(path)
    assert "methods.unplanned: unplanned: " in str(found.value)
    assert RAISED[what][1] in str(found.value)
    assert "Mend the method, or leave it out of the suite." in str(found.value)
