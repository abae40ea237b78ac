"""Exports: what lies in the folder, that it is read without us, and that it is the same network."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bench import export as exporting
from bench import finished, recipes
from bench.errors import CannotCompact, DataError, RecordError, UsageError
from bench.export import export, largest_difference, to_toml
from bench.exported import load
from bench.finished import data_info
from bench.recipes import Recipe
from bench.record import Record, encode
from bench.sources import read_masks
from bench.store import Store, read
from tests.bench.cells import train, write_recipe, write_suite

METHODS = """
[methods.rigl]
[methods.sfp]
[methods.leak]
method = "sfp"
bn_leak = true
"""
FILES = ["masks.safetensors", "network.json", "recipe.toml", "record.json", "weights.safetensors"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Records of three cells, on images with color."""
    folder = tmp_path_factory.mktemp("trained")
    model = '[{ name = "resnet20", width = 0.5 }]'
    common = {"models": model, "sparsities": "[0.5]", "prunable": '"dpf"'}
    suite = write_suite(
        folder, METHODS, dataset='"synthetic"', budget="{ epochs = 4, max_multiple = 2 }", **common
    )
    found = train(suite, folder / "records")
    assert [record.status for record in found] == ["ok"] * 3
    return folder / "records"


@pytest.fixture
def records(trained, tmp_path) -> Path:
    """The same records, for one test to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "records"))


def path_of(records: Path, label: str) -> Path:
    (found,) = (r for r in Store(records, "tiny").records() if r.label == label)
    return Store(records, "tiny").path(found.spec)


def weights_of(path: Path) -> Path:
    return path.parent / "weights" / f"{path.stem}.safetensors"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(network: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return network(torch.randn(16, 3, 16, 16, generator=generator))


def rewrite(path: Path, record: Record) -> None:
    path.write_bytes(encode(record))


@pytest.mark.parametrize("label", ["rigl", "sfp", "leak"])
def test_the_network_comes_back_bit_for_bit(trained, tmp_path, label):
    path = path_of(trained, label)
    written = export(path, tmp_path / "out")
    assert (written.folder, written.notes) == (tmp_path / "out", ())
    assert names_in(written.folder) == FILES
    network = load(written.folder)
    assert not network.training
    tensors, record = load_file(weights_of(path)), read(path)
    assert network.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in network.state_dict().items())
    prunable = [layer.name for layer in record.layers if layer.prunable]
    left = sum(int(network.get_parameter(name).count_nonzero()) for name in prunable)
    assert record.counts is not None
    assert left == record.counts.prunable_nonzero < record.counts.prunable
    assert (written.folder / "record.json").read_bytes() == path.read_bytes()


def test_masks_are_read_with_numpy_alone(trained, tmp_path):
    path = path_of(trained, "rigl")
    file = export(path, tmp_path / "out").folder / "masks.safetensors"
    weights = load_file(weights_of(path))
    with safe_open(file, framework="np") as stored:
        shapes = json.loads(stored.metadata()["shapes"])
        assert shapes.keys() == {layer.name for layer in read(path).layers if layer.prunable}
        for name, shape in shapes.items():
            bits = np.unpackbits(stored.get_tensor(name), count=int(np.prod(shape)))
            assert np.array_equal(bits.reshape(shape), weights[name].numpy() != 0)
    ones = {name: torch.ones(shape) for name, shape in shapes.items()}
    masks = read_masks(file, ones)
    assert all(torch.equal(masks[name], (weights[name] != 0).float()) for name in shapes)
    assert file.stat().st_size < sum(one.numel() for one in ones.values()) / 8 + 5000


def test_an_export_says_what_a_reader_needs_to_build_and_to_feed_the_network(trained, tmp_path):
    folder = export(path_of(trained, "sfp"), tmp_path / "out").folder
    said = json.loads((folder / "network.json").read_text())
    assert (said["model"], said["options"]) == ("resnet20", {"width": 0.5})
    assert (said["input_shape"], said["classes"]) == ([3, 16, 16], 4)
    assert said["normalise"] is True
    assert len(said["mean"]) == len(said["std"]) == 3
    assert recipes.load("recipe.toml", "", folder) == recipes.load("digits", "")


def test_reading_an_export_draws_no_random_numbers(trained, tmp_path):
    folder = export(path_of(trained, "rigl"), tmp_path / "out").folder
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_the_same_once_spelled_out(name, tmp_path):
    recipe = recipes.load(name, "")
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert recipes.load("recipe.toml", "", tmp_path) == recipe


def test_text_of_every_kind_survives_in_a_recipe(tmp_path):
    recipe = Recipe('a "title" \\ with\tä\n', 8, 1e-05, drops=(0.25, 0.5), epochs=3.5)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
    assert recipes.load("recipe.toml", "", tmp_path) == recipe


def test_a_recipe_is_written_only_where_its_content_is_the_recorded(call, tmp_path):
    text = "batch = 64\nlr = 0.1\nmomentum = 0.9"
    suite = write_suite(tmp_path, recipe=write_recipe(tmp_path, text))
    train(suite, tmp_path / "records")
    left_out = call("export", "dense", "--out", "a")
    assert left_out.status == 0
    assert "no recipe.toml: the content of own.toml" in left_out.err
    assert names_in(tmp_path / "a") == [name for name in FILES if name != "recipe.toml"]
    assert json.loads((tmp_path / "a" / "network.json").read_text())["normalise"] is None
    tested = call("evaluate", "a")
    assert tested.status == 2
    assert "Export the cell again with --recipe FILE." in tested.err

    given = call("export", "dense", "--out", "b", "--recipe", "own.toml")
    assert (given.status, given.err) == (0, "")
    assert recipes.load("recipe.toml", "", tmp_path / "b").lr == 0.1
    assert call("evaluate", "b").status == 0

    write_recipe(tmp_path, text.replace("0.1", "0.2"))
    other = call("export", "dense", "--out", "c", "--recipe", "own.toml")
    assert other.status == 2
    assert "--recipe own.toml: another recipe than the cell's" in other.err
    assert not (tmp_path / "c").exists()


def test_a_built_in_recipe_that_changed_since_is_left_out(records, tmp_path, monkeypatch):
    changed = dataclasses.replace(recipes.load("digits", ""), lr=0.3)
    monkeypatch.setattr(finished.recipes, "load", lambda *_: changed)
    written = export(path_of(records, "rigl"), tmp_path / "out")
    assert "recipe.toml" not in names_in(written.folder)
    assert any("is not known here" in note for note in written.notes)


def test_an_export_is_as_accurate_as_its_record_to_the_image(call, records):
    key = read(path_of(records, "rigl")).spec.key
    exported = call("export", key, "--out", "out")
    assert (exported.status, exported.out, exported.err) == (0, "out\n", "")
    top1 = read(path_of(records, "rigl")).top1
    right = round(256 * top1 / 100)
    line = f"{top1:.2f} %, {right:,} of 256 images\n"
    tested = call("evaluate", "out", "--device", "cpu")
    assert (tested.status, tested.out) == (0, f"now:      {line}recorded: {line}")


def test_another_accuracy_than_the_recorded_one_ends_with_status_1(call, records):
    path = path_of(records, "rigl")
    record = read(path)
    export(path, Path("out"))
    rewrite(Path("out", "record.json"), dataclasses.replace(record, top1=record.top1 - 100 / 256))
    tested = call("evaluate", "out", "--device", "cpu")
    assert tested.status == 1
    now, recorded = (int(line.split()[3]) for line in tested.out.splitlines())
    assert recorded == now - 1
    # Where it was trained on another device, a few images may differ.
    elsewhere = dataclasses.replace(record.environment, device="another")
    rewrite(
        Path("out", "record.json"),
        dataclasses.replace(record, top1=record.top1 - 100 / 256, environment=elsewhere),
    )
    tested = call("evaluate", "out", "--device", "cpu")
    assert tested.status == 0
    assert "another device" in tested.out


def test_other_data_than_the_cell_s_are_refused(call, records):
    export(path_of(records, "rigl"), Path("out"))
    edit(Path("out", "network.json"), data_hash="0" * 12)
    tested = call("evaluate", "out")
    assert tested.status == 2
    assert "other data than the cell's" in tested.err


def test_a_compact_export_is_smaller_and_computes_the_same(call, records):
    path = path_of(records, "sfp")
    export(path, Path("masked"))
    done = call("export", read(path).spec.key, "--compact", "--out", "small")
    assert done.status == 0, done.err
    assert "on 64 random images and 64 test images, outputs differ by at most" in done.err
    assert names_in(Path("small")) == [name for name in FILES if name != "masks.safetensors"]
    masked, small = load("masked"), load("small")
    assert not small.training
    assert largest_difference(masked, small, torch.randn(8, 3, 16, 16)) <= 1e-5

    rows = [line.split("|")[1:-1] for line in done.out.splitlines()[2:4]]
    sizes = {name.strip(): [int(n.replace(",", "")) for n in rest] for name, *rest in rows}
    counts = read(path).counts
    assert sizes["with its zeros"] == [counts.parameters, counts.dense_macs]
    assert sizes["compact"][0] == sum(value.numel() for value in small.parameters())
    whole, cut = sizes["with its zeros"], sizes["compact"]
    assert all(few < many / 2 for few, many in zip(cut, whole, strict=True))
    if counts.compact is not None:
        assert sizes["compact"] == [counts.compact.parameters, counts.compact.dense_macs]

    tested = call("evaluate", "small")
    assert tested.status == 0
    assert "A compact network" in tested.out


def test_a_network_without_dead_channels_is_said_to_be_as_it_was(trained, tmp_path):
    path = path_of(trained, "rigl")
    written = export(path, tmp_path / "out", compacted=True)
    assert "no channel is dead: nothing was cut out" in written.notes
    masked = load(export(path, tmp_path / "masked").folder)
    torch.testing.assert_close(logits(load(written.folder)), logits(masked))


def test_a_network_whose_normalisation_leaks_is_not_cut(call, records):
    key = read(path_of(records, "leak")).spec.key
    refused = call("export", key, "--compact", "--out", "out")
    assert refused.status == 2
    assert "bn_leak" in refused.err
    assert "still sends a constant" in refused.err
    assert not Path("out").exists()


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_smaller_network_with_other_outputs_is_not_written(trained, tmp_path, monkeypatch, wrong):
    real = finished.compact

    def spoilt(model, shape):
        found = real(model, shape)
        with torch.no_grad():
            next(p for n, p in found.model.named_parameters() if n.endswith("bias")).add_(wrong)
        return found

    monkeypatch.setattr(finished, "compact", spoilt)
    with pytest.raises(CannotCompact, match="on random images, outputs of the smaller network"):
        export(path_of(trained, "sfp"), tmp_path / "out", compacted=True)
    assert names_in(tmp_path) == []


def test_a_difference_is_relative_to_the_largest_output():
    class Plus(nn.Module):
        def forward(self, images):
            return images + torch.tensor([0.1, -0.4])

    images = torch.tensor([[1.0, 2.0], [-8.0, 0.5]])
    assert largest_difference(nn.Identity(), Plus(), images) == pytest.approx(0.4 / 8)
    assert largest_difference(nn.Identity(), nn.Identity(), 0 * images) == 0


def test_nothing_is_overwritten_unasked(trained, tmp_path):
    one, other = path_of(trained, "rigl"), path_of(trained, "sfp")
    folder = export(one, tmp_path / "out").folder
    with pytest.raises(UsageError, match="is there already; --force replaces it"):
        export(other, folder)
    assert (folder / "record.json").read_bytes() == one.read_bytes()
    export(other, folder, compacted=True, force=True)
    assert (folder / "record.json").read_bytes() == other.read_bytes()
    assert "masks.safetensors" not in names_in(folder)
    assert names_in(tmp_path) == ["out"]


def test_the_folder_that_one_is_in_can_be_replaced(trained, tmp_path, monkeypatch):
    one, other = path_of(trained, "rigl"), path_of(trained, "sfp")
    folder = export(one, tmp_path / "out").folder
    monkeypatch.chdir(folder)
    export(other, Path(), force=True)
    assert (folder / "record.json").read_bytes() == other.read_bytes()
    assert names_in(tmp_path) == ["out"]


def test_force_replaces_nothing_but_an_export(trained, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("dear to me")
    with pytest.raises(UsageError, match="no export lies there"):
        export(path_of(trained, "rigl"), tmp_path / "home", force=True)
    assert names_in(tmp_path / "home") == ["thesis.txt"]


def test_an_export_that_breaks_off_leaves_nothing(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(exporting, "write_masks", full)
    with pytest.raises(UsageError, match="cannot write there"):
        export(path_of(trained, "rigl"), tmp_path / "out")
    assert names_in(tmp_path) == []


def test_a_replacement_that_breaks_off_leaves_the_old_export(trained, tmp_path, monkeypatch):
    path, out = path_of(trained, "rigl"), tmp_path / "out"
    export(path, out)
    real = Path.replace

    def broken(self, target):
        if self.name.endswith(".tmp") and Path(target) == out:
            raise OSError("Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(UsageError, match="cannot write there"):
        export(path_of(trained, "sfp"), out, force=True)
    assert (out / "record.json").read_bytes() == path.read_bytes()
    assert names_in(tmp_path) == ["out"]


def test_a_model_that_changed_since_is_refused(trained, tmp_path, monkeypatch):
    real = finished.make_model
    wider = {"width": 1.0}
    monkeypatch.setattr(finished, "make_model", lambda n, i, _, s: real(n, i, wider, s))
    with pytest.raises(RecordError, match="not a network of resnet20 here"):
        export(path_of(trained, "rigl"), tmp_path / "out")


def test_the_folder_has_the_cell_s_name_unless_another_is_given(call, records):
    record = read(path_of(records, "rigl"))
    assert call("export", record.spec.key).out == f"{record.spec.slug}\n"
    assert names_in(Path(record.spec.slug)) == FILES


def test_a_network_that_is_not_here_can_be_had_again(call, records):
    path = path_of(records, "rigl")
    weights_of(path).unlink()
    refused = call("export", read(path).spec.key)
    assert refused.status == 2
    assert "run the suite again: sparsebench run tiny" in refused.err
    assert len(refused.err.splitlines()) == 1


def test_other_weights_than_the_recorded_are_refused(records, tmp_path):
    path = path_of(records, "rigl")
    tensors = load_file(weights_of(path))
    name = next(name for name in tensors if name.endswith("bias"))
    save_file(tensors | {name: tensors[name] + 1e-6}, weights_of(path))
    with pytest.raises(RecordError, match="not the network of"):
        export(path, tmp_path / "out")


def test_a_cell_that_left_no_network_is_refused_with_its_reason(records, tmp_path):
    path = path_of(records, "rigl")
    record = dataclasses.replace(
        read(path), status="diverged", reason="loss nan at step 3", weights_hash="", top1=None
    )
    rewrite(path, record)
    with pytest.raises(RecordError, match=r"diverged and left no network \(loss nan at step 3\)"):
        export(path, tmp_path / "out")


def test_the_size_of_a_folder_s_images_is_in_the_recipe(trained):
    record = read(path_of(trained, "rigl"))
    spec = dataclasses.replace(record.spec, dataset="imagefolder:photos")
    with pytest.raises(UsageError, match="the size of its images stands in its recipe digits"):
        data_info(dataclasses.replace(record, spec=spec), None, Path())


def test_a_diverged_network_is_written_with_a_word(records, tmp_path):
    path = path_of(records, "rigl")
    rewrite(path, dataclasses.replace(read(path), status="diverged", reason="near chance"))
    assert export(path, tmp_path / "out").notes == ("the cell is diverged: near chance",)


def test_a_damaged_export_is_refused(trained, tmp_path):
    folder = export(path_of(trained, "rigl"), tmp_path / "out").folder
    weights = folder / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="damaged"):
        load(folder)
    weights.write_bytes(content[:100])
    with pytest.raises(DataError, match="damaged"):
        load(folder)
    weights.write_bytes(content)
    edit(folder / "network.json", options={"width": 1.0})
    with pytest.raises(DataError, match="not a network of resnet20"):
        load(folder)
    edit(folder / "network.json", format="sparsebench-export-9")
    with pytest.raises(DataError, match="but this version reads"):
        load(folder)
    (folder / "network.json").write_text("[]")
    with pytest.raises(DataError, match="damaged"):
        load(folder)
    with pytest.raises(DataError, match="cannot read the export"):
        load(tmp_path / "nowhere")


def test_a_compact_export_of_another_network_is_refused(trained, tmp_path):
    folder = export(path_of(trained, "sfp"), tmp_path / "out", compacted=True).folder
    kept = json.loads((folder / "network.json").read_text())["kept"]
    kept[next(iter(kept))]["outputs"] = [10_000]
    edit(folder / "network.json", kept=kept)
    with pytest.raises(DataError, match="not a network of resnet20"):
        load(folder)
    edit(folder / "network.json", kept={})
    with pytest.raises(DataError, match="not a network of resnet20"):
        load(folder)


def test_nothing_in_an_export_is_pickled(trained, tmp_path):
    folder = export(path_of(trained, "sfp"), tmp_path / "out", compacted=True).folder
    for path in folder.iterdir():
        if path.suffix == ".json":
            msgspec.json.decode(path.read_bytes())
        elif path.suffix == ".safetensors":
            load_file(path)
        else:
            assert path.suffix == ".toml"


def test_the_record_of_another_cell_is_noticed(call, records):
    assert call("export", read(path_of(records, "rigl")).spec.key, "--out", "one").status == 0
    assert call("export", read(path_of(records, "sfp")).spec.key, "--out", "other").status == 0
    Path("one/record.json").write_bytes(Path("other/record.json").read_bytes())
    outcome = call("evaluate", "one")
    assert outcome.status == 2
    assert "but the network is of" in outcome.err
