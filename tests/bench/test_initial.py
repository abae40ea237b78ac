"""First weights from a file or from timm: what the key knows, what is refused, what is trained."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from bench.checkpoint import tensor_hash
from bench.datasets import DATASETS
from bench.errors import DataError, SuiteError, UnknownName
from bench.initial import content, first_network, located
from bench.networks import make_model
from bench.runner import _Attempt
from bench.store import Store
from tests.bench.cells import plan_of, tasks_of, train, train_one, write_suite

DIGITS = DATASETS["digits"]
LENET = "lenet_300_100"


@pytest.fixture
def weights(tmp_path):
    """A file with a LeNet's tensors, none of which a fresh one has."""
    tensors = make_model(LENET, DIGITS, {}, seed=7).state_dict()
    path = tmp_path / "own.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def published(monkeypatch):
    """What timm downloads, without a network: a ResNet-18 of 1,000 classes, drawn here."""
    torch.manual_seed(11)
    state = timm.create_model("resnet18", num_classes=1000).state_dict()
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *args, **more: dict(state)
    )
    from bench.initial import _pretrained_hash

    _pretrained_hash.cache_clear()
    yield state
    _pretrained_hash.cache_clear()


def begun(path, seed=0):
    """The trainer of a suite's cell, before its first step."""
    plan = plan_of(path)
    (task,) = tasks_of(plan, Store(path.parent / "records", plan.manifest.suite))
    attempt = _Attempt(task)
    attempt.build()
    return attempt


def test_a_cell_starts_from_the_weights_of_the_file(tmp_path, weights):
    path = write_suite(tmp_path, init='"own.safetensors"')
    attempt = begun(path)
    given = load_file(weights)
    state = attempt.trainer.state.model.state_dict()
    assert all(torch.equal(state[name], given[name]) for name in given)
    # A control that draws anew still draws at random.
    drawn = attempt.fresh_model(1).state_dict()
    assert not torch.equal(drawn["fc1.weight"], given["fc1.weight"])


def test_the_finished_network_of_one_cell_is_the_start_of_another(tmp_path):
    first = write_suite(tmp_path, name="first")
    before = train_one(first, tmp_path / "records")
    (file,) = (tmp_path / "records" / "first" / "weights").glob("*.safetensors")
    second = write_suite(tmp_path, name="second", init=f'"{file}"', budget="{ steps = 2 }")
    after = train_one(second, tmp_path / "records")
    assert after.status == "ok"
    assert after.top1 > before.top1 - 3  # two steps from random weights are worth some 10 %
    assert after.spec.init == f"file-{before.weights_hash}"


def test_the_key_knows_the_content_of_the_file_and_not_its_name(tmp_path, weights):
    copy = tmp_path / "elsewhere" / "copy.safetensors"
    copy.parent.mkdir()
    copy.write_bytes(weights.read_bytes())
    changed = load_file(weights)
    changed["fc1.bias"][0] += 1
    save_file(changed, tmp_path / "changed.safetensors")
    texts = ["random", "own.safetensors", "elsewhere/copy.safetensors", "changed.safetensors"]
    keys = [
        plan_of(write_suite(tmp_path, init=f'"{text}"')).manifest.cells[0].spec.key
        for text in texts
    ]
    assert keys[1] == keys[2]
    assert len(set(keys)) == 3
    assert keys[0] == plan_of(write_suite(tmp_path)).manifest.cells[0].spec.key


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("fc2.bias"), "has no fc2.bias"),
        (lambda t: t.update(more=torch.ones(1)), "has more, which the model has not"),
        (
            lambda t: t.update({"fc1.weight": torch.ones(300, 784)}),
            "fc1.weight is 300x784, the model's is 300x64",
        ),
        (lambda t: t["fc1.weight"].fill_(torch.nan), "not finite: fc1.weight"),
        (
            lambda t: t.update({"fc1.weight": t["fc1.weight"].bool()}),
            "fc1.weight is of torch.bool, the model's of torch.float32",
        ),
        (
            lambda t: t.update({"fc2.bias": t["fc2.bias"].cfloat()}),
            "fc2.bias is of torch.complex64",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_training(tmp_path, weights, change, text):
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, tmp_path / "wrong.safetensors")
    path = write_suite(tmp_path, init='"wrong.safetensors"')
    with pytest.raises(SuiteError, match=text):
        plan_of(path)


def test_what_is_no_file_of_weights_is_refused_in_one_line(tmp_path, call):
    (tmp_path / "text.safetensors").write_text("weights")
    for init, text in {
        "text.safetensors": "damaged, or no safetensors file",
        "missing.safetensors": "no such file",
        "pretraned": "Did you mean 'pretrained'?",
        "pretrained": f"model {LENET}: init = 'pretrained' is for timm:NAME only",
    }.items():
        outcome = call("plan", write_suite(tmp_path, init=f'"{init}"'))
        assert outcome.status == 2
        assert text in outcome.err
        assert outcome.err.count("\n") == 1


def test_a_file_that_changed_after_the_plan_fails_the_cell(tmp_path, weights):
    path = write_suite(tmp_path, init='"own.safetensors"')
    plan = plan_of(path)
    tensors = load_file(weights)
    tensors["fc1.bias"] += 1
    save_file(tensors, weights)
    store = Store(tmp_path / "records", "tiny")
    (task,) = tasks_of(plan, store)
    with pytest.raises(DataError, match="the initial weights changed"):
        _Attempt(task).build()


def test_a_relative_file_lies_beside_the_suite(tmp_path, weights, monkeypatch):
    monkeypatch.chdir("/")
    assert located("own.safetensors", tmp_path, "") == str(weights)
    with pytest.raises(UnknownName):
        located("own.bin", tmp_path, "")


def test_a_narrower_network_has_no_given_weights(tmp_path, weights):
    path = write_suite(tmp_path, "[methods.small_dense]", init='"own.safetensors"')
    (cell,) = plan_of(path).manifest.cells
    assert "starts from given weights" in cell.skipped


def test_the_record_of_a_dense_cell_has_its_own_label_beside_a_skipped_narrower_one(
    call, tmp_path, weights
):
    methods = "[methods.dense]\n[methods.small_dense]"
    path = write_suite(tmp_path, methods, init='"own.safetensors"', budget="{ steps = 2 }")
    assert call("run", path, "--workers", "1").status == 0
    (record,) = Store(tmp_path / "records", "tiny").records()
    assert record.label == "dense"


def test_pretrained_weights_are_made_to_fit_and_the_classifier_is_drawn(published):
    init = content("pretrained", "timm:resnet18", DIGITS, ())
    assert init == f"pretrained-{tensor_hash(published)}"
    first, same, other = (
        first_network(
            "pretrained", init, "timm:resnet18", DIGITS, {}, seed, "he_fan_out"
        ).state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(first["layer3.0.conv1.weight"], published["layer3.0.conv1.weight"])
    # timm sums the first layer over its colours for grey images.
    grey = published["conv1.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(first["conv1.weight"], grey)
    assert first["fc.weight"].shape == (10, 512)
    assert torch.equal(first["fc.weight"], same["fc.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_a_cell_trains_from_pretrained_weights(tmp_path, published):
    path = write_suite(
        tmp_path,
        "[methods.dense]\n[methods.snip]",
        models='["timm:resnet18"]',
        init='"pretrained"',
        budget="{ steps = 1 }",
    )
    records = train(path, tmp_path / "records")
    # One step on ten classes is not worth much, but it was counted and tested.
    assert all(record.counts and record.top1 is not None for record in records)
    assert {record.spec.init for record in records} == {f"pretrained-{tensor_hash(published)}"}


def test_without_a_network_the_reason_is_told(tmp_path, call, monkeypatch):
    def fail(*args, **more):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    path = write_suite(tmp_path, models='["timm:resnet18"]', init='"pretrained"')
    outcome = call("plan", path)
    assert outcome.status == 2
    assert "cannot get its pretrained weights (no route to host)" in outcome.err


def test_timms_own_way_to_load_weights_is_closed(tmp_path):
    path = write_suite(tmp_path, models='[{ name = "timm:resnet18", pretrained = true }]')
    with pytest.raises(SuiteError, match="pretrained: set init = 'pretrained'"):
        plan_of(path)
