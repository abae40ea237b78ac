"""The same promises on a CUDA device: `tox run -e gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import checkpoint
from bench.data import to_device
from bench.latency import cuda_seconds, in_turns, to_semi_structured, two_of_four
from bench.prunable import prunable_names
from bench.recipes import Recipe
from bench.resolve import load_arrays
from bench.trainer import Trainer
from methods import METHODS, get_method
from methods.allocation import keep_count
from methods.api import Budget
from methods.masking import topk_mask
from tests.tiny import tiny_model, tiny_source

pytestmark = pytest.mark.gpu

RECIPE = Recipe(title="", batch=32, lr=0.05, momentum=0.9, weight_decay=5e-4, crop=2, flip=True)


def trainer_on_gpu(name: str) -> Trainer:
    device = torch.device("cuda")
    method = get_method(name)()
    model = tiny_model("conv").to(device)
    data = to_device(load_arrays("synthetic", Path()), RECIPE, device)
    names = prunable_names(model, method, "all")
    budget = Budget(24, 16, 512, ())
    density = 0.1 if method.controls in ("density", "filters") else None
    return Trainer(
        method,
        model,
        names,
        data,
        RECIPE,
        budget,
        density,
        seed=0,
        source=tiny_source(model, names, density) if method.needs_source else None,
        fresh=lambda draw: tiny_model("conv", draw).to(device),
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_count_is_exact_on_the_gpu(name: str) -> None:
    trainer = trainer_on_gpu(name)
    names = list(trainer.state.weights)
    for _ in trainer.run():
        pass
    weights = [trainer.state.model.get_parameter(weight) for weight in names]
    assert all(weight.is_cuda for weight in weights)
    if trainer.method.controls == "filters":
        filters = sum(len(weight) for weight in weights)
        left = sum(int(weight.flatten(1).any(1).sum()) for weight in weights)
        assert left == keep_count(filters, 0.1)
    elif trainer.method.controls == "density":
        total = sum(weight.numel() for weight in weights)
        left = sum(int(weight.count_nonzero()) for weight in weights)
        assert left == keep_count(total, 0.1)


def test_a_mask_on_the_gpu_is_that_of_the_cpu() -> None:
    scores = torch.randint(0, 50, (10_000,), generator=torch.Generator().manual_seed(0)).float()
    for keep in (0, 1, 777, 9_999, 10_000):
        on_gpu = topk_mask(scores.cuda(), keep).cpu()
        assert torch.equal(on_gpu, topk_mask(scores, keep))


def test_batches_on_the_gpu_are_those_of_the_cpu() -> None:
    on_gpu = trainer_on_gpu("dense").stream.batch(17)
    data = to_device(load_arrays("synthetic", Path()), RECIPE, torch.device("cpu"))
    model = tiny_model("conv")
    method = get_method("dense")()
    names = prunable_names(model, method, "all")
    on_cpu = Trainer(
        method, model, names, data, RECIPE, Budget(24, 16, 512), 1.0, seed=0
    ).stream.batch(17)
    torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0])
    assert torch.equal(on_gpu[1].cpu(), on_cpu[1])


@pytest.mark.parametrize("name", METHODS)
def test_the_hooks_of_every_step_do_not_wait_for_the_gpu(name: str) -> None:
    trainer = trainer_on_gpu(name)
    steps = trainer.run()
    next(steps)
    state, method = trainer.state, trainer.method
    images, labels = trainer.stream.batch(0)
    torch.nn.functional.cross_entropy(state.model(images), labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            method.edit_gradients(state)
            state.optimizer.step()
            method.project(state)
        method.penalty(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_on_the_gpu_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    first = trainer_on_gpu("rigl")
    for done in first.run():
        if done == 10:
            checkpoint.write(first, tmp_path / "run", "key")
            break
    again = trainer_on_gpu("rigl")
    checkpoint.read(again, tmp_path / "run", "key")
    assert again.cursor.total == 10
    for name, mask in first.state.masks.items():
        assert torch.equal(mask, again.state.masks[name])
    for _ in again.run():
        pass
    assert again.cursor.total == 24


def test_two_of_four_layers_compute_what_the_pruned_layer_does_and_can_be_timed() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("not run: 2:4 kernels need compute capability 8.0")
    torch.manual_seed(0)
    dense = torch.nn.Linear(256, 128).cuda().half()
    sparse = torch.nn.Linear(256, 128).cuda().half()
    sparse.load_state_dict(dense.state_dict())
    assert to_semi_structured(sparse) == ""
    dense.weight.data = two_of_four(dense.weight)
    with torch.inference_mode():
        for batch in (1, 64):
            images = torch.randn(batch, 256, device="cuda", dtype=torch.float16)
            torch.testing.assert_close(sparse(images), dense(images), rtol=1e-2, atol=1e-2)
        times = in_turns({"one": lambda: sparse(images)}, cuda_seconds, 3)
    assert len(times["one"]) == 3
    assert all(time > 0 for time in times["one"])
