"""Records made again: the command, what differs, and the comparison of a new training."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from bench import suite as suites
from bench.errors import UsageError
from bench.record import Execution, Origin, Record, encode
from bench.reproduce import Sources, describe, run_again
from bench.resolve import resolve
from bench.store import Store, read
from tests.bench.cells import train, write_recipe, write_suite
from tests.reports.records import record as record_of


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a suite and its records."""
    folder = tmp_path_factory.mktemp("made")
    path = write_suite(folder, "[methods.rigl]", models='[{name = "lenet_300_100", width = 0.1}]')
    train(path, folder / "records")
    return folder


@pytest.fixture
def home(made, monkeypatch) -> Path:
    monkeypatch.chdir(made)
    return made


def only(home: Path) -> Path:
    (found,) = (home / "records" / "tiny").glob("rigl-*.json")
    return found


def here(**changes: object) -> Sources:
    common = {"suite": None, "recipe": None, "data": Path("data"), "device": None}
    return Sources(**(common | changes))  # type: ignore[arg-type]


def edited(path: Path, folder: Path, **changes: object) -> Path:
    """A copy of a record with other fields, elsewhere."""
    target = folder / "tiny" / path.name
    target.parent.mkdir(parents=True)
    target.write_bytes(encode(dataclasses.replace(read(path), **changes)))  # type: ignore[arg-type]
    return target


def words(path: Path, **changes: object) -> list[str]:
    return shlex.split(describe(path, here(**changes)).command)


def after(option: str, command: list[str]) -> str:
    return command[command.index(option) + 1]


def test_a_record_of_this_machine_differs_in_nothing(home, monkeypatch):
    found = describe(only(home), here())
    # Others may edit the harness meanwhile; it has tests of its own.
    assert [one for one in found.differences if "commit" not in one.what] == []
    assert found.unknown == () or found.unknown == ("commit",)


def test_the_command_names_suite_cell_device_and_threads(home):
    command = words(only(home))
    start = command.index("sparsebench")
    assert command[start : start + 3] == ["sparsebench", "run", "tiny.toml"]
    assert after("--only", command) == only(home).stem
    assert after("--device", command) == "cpu"
    assert after("--threads", command) == "1"


@pytest.fixture(scope="module")
def namesake(tmp_path_factory) -> Path:
    """A folder with a suite of its own under the name of one of the harness, and its record."""
    folder = tmp_path_factory.mktemp("namesake")
    models = '[{name = "lenet_300_100", width = 0.1}]'
    train(write_suite(folder, name="quickstart", models=models), folder / "records")
    return folder


def test_a_file_here_with_the_name_of_a_known_suite_is_meant_by_its_own_records(
    namesake, tmp_path, monkeypatch
):
    monkeypatch.chdir(namesake)
    (path,) = (namesake / "records" / "quickstart").glob("dense-*.json")
    command = words(path)
    assert command[command.index("run") + 1] == "quickstart.toml"
    assert run_again(path, here(), tmp_path) == ()


def test_a_known_suite_is_meant_by_its_records_whatever_file_lies_here(
    namesake, tmp_path, monkeypatch
):
    monkeypatch.chdir(namesake)
    asked = resolve(suites.load("quickstart"), Path("data")).manifest.cells[0].spec
    made = dataclasses.replace(record_of(asked), suite="quickstart")
    path = Store(tmp_path, "quickstart").put(made)
    command = words(path)
    assert command[command.index("run") + 1] == "quickstart"


def test_the_command_makes_the_record_again(home, call, monkeypatch):
    command = words(only(home))
    call_in = [*command[command.index("sparsebench") + 1 :], "--workers", "1"]
    monkeypatch.chdir(home)
    path = home / "reproduced"
    call_in[call_in.index("--records") + 1] = str(path)
    call_in[1] = str(home / "tiny.toml")
    call(*call_in)
    again = read(path / "tiny" / only(home).name)
    assert again.weights_hash == read(only(home)).weights_hash


def test_ways_of_computing_are_in_the_command(home, tmp_path):
    execution = Execution(stack=4, compiled=True, graph=False, determinism="fast")
    environment = dataclasses.replace(read(only(home)).environment, kind="cuda")
    path = edited(only(home), tmp_path, execution=execution, environment=environment)
    command = words(path, device="cpu")
    assert after("--stack", command) == "4"
    assert "--compile" in command
    assert "--no-graph" in command
    assert after("--determinism", command) == "fast"


def test_a_cell_of_several_devices_needs_as_many_processes(home, tmp_path):
    path = edited(only(home), tmp_path, execution=Execution(devices=2))
    command = words(path)
    start = command.index("torchrun")
    assert command[start : start + 6] == ["torchrun", "--nproc-per-node", "2", "-m", "bench", "run"]
    with pytest.raises(UsageError, match="2 devices trained it together"):
        run_again(path, here(), tmp_path / "again")


def test_what_differs_is_listed(home, tmp_path):
    environment = dataclasses.replace(
        read(only(home)).environment, torch="1.0", numpy="", settings=(("OMP_NUM_THREADS", "77"),)
    )
    path = edited(only(home), tmp_path, environment=environment)
    found = describe(path, here())
    by_name = {one.what: one for one in found.differences}
    assert by_name["torch"].recorded == "1.0"
    assert "numpy" in found.unknown


def test_a_record_of_several_parts_says_who_trained_the_others(home, tmp_path):
    execution = Execution(before=(Origin("abc1234", "a cluster"),))
    found = describe(edited(only(home), tmp_path, execution=execution), here())
    (part,) = (one for one in found.differences if one.what == "trained in part by")
    assert (part.recorded, part.here) == ("abc1234 (a cluster)", "all by one, in one place")


def test_settings_of_the_environment_are_compared_and_set(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    environment = dataclasses.replace(
        read(only(home)).environment, settings=(("OMP_NUM_THREADS", "7 7"),)
    )
    found = describe(edited(only(home), tmp_path, environment=environment), here())
    assert shlex.split(found.command)[:2] == ["env", "OMP_NUM_THREADS=7 7"]
    by_name = {one.what: (one.recorded, one.here) for one in found.differences}
    assert by_name["MKL_CBWR"] == ("not set", "AVX2")


def test_a_record_cannot_put_other_variables_or_words_into_the_command(home, tmp_path):
    environment = dataclasses.replace(
        read(only(home)).environment,
        settings=(("LD_PRELOAD", "/tmp/x.so"), ("MKL_X; rm", "1"), ("MKL_A", "\x1b]0;x\x07")),
    )
    path = edited(only(home), tmp_path, environment=environment)
    assert words(path)[0] == "sparsebench"


def test_another_recipe_under_the_same_name_is_told(home, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, "batch = 32\nlr = 0.1")
    path = write_suite(tmp_path, "[methods.dense]", recipe=recipe)
    train(path, tmp_path / "records")
    (record,) = (tmp_path / "records" / "tiny").glob("dense-*.json")
    write_recipe(tmp_path, "batch = 32\nlr = 0.2")
    monkeypatch.chdir(tmp_path)
    assert "recipe" in {one.what for one in describe(record, here()).differences}


def test_a_new_training_equals_the_record(home, tmp_path):
    assert run_again(only(home), here(), tmp_path) == ()


def test_a_new_training_without_the_suite_takes_the_record_for_the_question(
    home, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run_again(only(home), here(), tmp_path / "again") == ()


def test_other_weights_are_told(home, tmp_path):
    path = edited(only(home), tmp_path / "edited", weights_hash="0" * 32, top1=1.0)
    found = {one.what for one in run_again(path, here(), tmp_path / "again")}
    assert found == {"weights_hash", "top1"}


def test_other_counts_are_told_one_by_one(home, tmp_path):
    record: Record = read(only(home))
    assert record.counts is not None
    counts = dataclasses.replace(record.counts, nonzero=1)
    path = edited(only(home), tmp_path / "edited", counts=counts)
    (found,) = run_again(path, here(), tmp_path / "again")
    assert (found.what, found.recorded) == ("counts.nonzero", "1")


def test_a_suite_that_no_longer_asks_the_question_says_in_what_it_differs(call, home, tmp_path):
    path = only(home)
    suite = write_suite(
        tmp_path,
        "[methods.rigl]",
        models='[{name = "lenet_300_100", width = 0.1}]',
        budget="{ epochs = 3, max_multiple = 1.2 }",
    )
    outcome = call("reproduce", path.stem, "--records", home / "records", "--suite", suite, "--run")
    assert outcome.status == 2
    assert "budget is" in outcome.err
    assert "no longer asks" in outcome.err


def test_the_command_line_ends_with_0_where_equal_and_1_where_not(
    call, home, tmp_path, monkeypatch
):
    path = only(home)
    monkeypatch.setenv("SPARSEBENCH_DATA", str(tmp_path / "data"))
    suite = ["--suite", home / "tiny.toml"]
    same = call("reproduce", path.stem, "--records", home / "records", *suite, "--run")
    assert (same.status, "equal to the last bit" in same.out) == (0, True)
    edited(path, tmp_path / "edited", top1=1.0)
    other = call(
        "reproduce", path.stem, "--records", tmp_path / "edited", *suite, "--run", "--json"
    )
    assert other.status == 1
    assert [one["what"] for one in json.loads(other.out)["measured"]] == ["top1"]
