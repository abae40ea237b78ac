"""Runs on a CUDA device: `tox run -e gpu`. What makes sense there is rehearsed on the CPU."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench import checkpoint
from bench.capture import Captured
from bench.clock import Stopwatch, wait_for
from bench.latency import cuda_seconds, in_turns, to_semi_structured, two_of_four
from bench.step import Step, set_precision
from bench.trainer import Trainer
from methods import METHODS
from methods.allocation import keep_count
from methods.api import SparsityMethod
from methods.ranking import kth_largest, radix_select, topk_mask
from tests.bench.devices import (
    ADAM,
    DENSITY,
    RECIPE,
    STATIC,
    assert_equal,
    never_waiting,
    on_devices,
    outcome,
    settled,
    tiny_run,
)

EXTRA_LAUNCHES = 2
"""Orders to the device that static masks may cost a step."""


@on_devices
@pytest.mark.parametrize("name", METHODS)
def test_the_count_is_exact_wherever_it_runs(name, device):
    trainer = tiny_run(name, device)
    names = list(trainer.state.weights)
    finish(trainer)
    weights = [trainer.state.model.get_parameter(weight) for weight in names]
    assert all(weight.device.type == device for weight in weights)
    if trainer.method.controls == "filters":
        filters = sum(len(weight) for weight in weights)
        left = sum(int(weight.flatten(1).any(1).sum()) for weight in weights)
        assert left == keep_count(filters, DENSITY)
    elif trainer.method.controls == "density":
        total = sum(weight.numel() for weight in weights)
        left = sum(int(weight.count_nonzero()) for weight in weights)
        assert left == keep_count(total, DENSITY)


@on_devices
@pytest.mark.parametrize("recipe", [RECIPE, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_device(name, recipe, device):
    steps = 6 if name == "lottery_ticket" else 12
    for trainer in steps_due(tiny_run(name, device, recipe=recipe, steps=steps)):
        with never_waiting(device):
            trainer.hot.compute()


@on_devices
def test_what_waits_in_a_step_is_found(device, monkeypatch):
    monkeypatch.setattr(SparsityMethod, "project", lambda _, state: float(state.lr))
    (trainer, *_) = itertools.islice(steps_due(tiny_run("dense", device)), 1)
    with pytest.raises((RuntimeError, AssertionError)), never_waiting(device):
        trainer.hot.compute()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [RECIPE, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", METHODS)
def test_a_graph_trains_as_eager_steps_do_bit_for_bit(name, recipe):
    steps = 8 if name == "lottery_ticket" else 24
    with settled("cuda"):
        eager = finish(tiny_run(name, "cuda", recipe=recipe, steps=steps))
        trainer = tiny_run(name, "cuda", recipe=recipe, steps=steps, step=Captured)
        assert_equal(finish(trainer), eager)
    assert trainer.hot.replayed, trainer.hot.reason


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_a_graph_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    steps = 8 if name == "lottery_ticket" else 24
    with settled("cuda"):
        whole = finish(tiny_run(name, "cuda", steps=steps))
        first = tiny_run(name, "cuda", steps=steps, step=Captured)
        for done in first.run():
            if done == first.total_steps // 2:
                checkpoint.write(first, tmp_path / "run", "key")
                break
        again = tiny_run(name, "cuda", steps=steps, step=Captured)
        checkpoint.read(again, tmp_path / "run", "key")
        assert again.cursor.total == again.total_steps // 2
        assert_equal(finish(again), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "l0", "deepr"])
def test_a_step_that_cannot_be_recorded_goes_on_uncaptured(name, monkeypatch):
    with settled("cuda"):
        eager = finish(tiny_run(name, "cuda"))
        plain = Captured.finish
        monkeypatch.setattr(  # the host asks for a number
            Captured, "finish", lambda step, loss: (plain(step, loss), float(step.loss))[0]
        )
        trainer = tiny_run(name, "cuda", step=Captured)
        assert_equal(finish(trainer), eager)
        assert not trainer.hot.replayed
        assert trainer.hot.reason.startswith("recording failed")
        # Nothing is left behind that would keep the next from being recorded.
        monkeypatch.undo()
        torch.cuda.empty_cache()
        after = tiny_run(name, "cuda", step=Captured)
        assert_equal(finish(after), eager)
        assert after.hot.replayed, after.hot.reason


@on_devices
@pytest.mark.parametrize("name", STATIC)
def test_static_masks_cost_two_launches_a_step_at_most(name, device):
    found, dense = (launches(method, device) for method in (name, "dense"))
    assert 0 < found - dense <= EXTRA_LAUNCHES


@pytest.mark.gpu
def test_a_graph_is_one_launch():
    with settled("cuda"):
        steps = steps_due(tiny_run("one_shot", "cuda", steps=40, step=Captured))
        trainer = next(itertools.islice(steps, 30, None))
        assert trainer.hot.replayed
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            trainer.hot.compute()
            torch.cuda.synchronize()
    orders = {e.key: e.count for e in found.key_averages() if "Launch" in e.key}
    assert sum(orders.values()) == 1, orders


@on_devices
@pytest.mark.parametrize("size", [1, 2049, 100_000])
def test_the_kth_largest_is_that_of_a_sort(size, device):
    generator = torch.Generator().manual_seed(size)
    rows = {
        "normal": torch.randn(size, generator=generator),
        "ties": torch.randint(-3, 4, (size,), generator=generator).float(),
        "all equal": torch.full((size,), -0.25),
        "infinite": torch.randn(size, generator=generator).where(
            torch.rand(size, generator=generator) < 0.5, torch.tensor(-torch.inf)
        ),
        "tiny": torch.randn(size, generator=generator) * 1e-30,
        "double": torch.randn(size, generator=generator, dtype=torch.float64),
    }
    for name, row in rows.items():
        descending = row.sort(descending=True).values
        for k in {1, size // 3 + 1, size}:
            there = row.to(device)
            assert kth_largest(there, k) == descending[k - 1], (name, k)
            assert radix_select(there, k) == descending[k - 1], (name, k)


@on_devices
def test_a_ranking_waits_for_nobody(device):
    scores = torch.rand(10_000).to(device)
    keep = torch.tensor(777, device=device)
    radix_select(scores, keep)
    with never_waiting(device):
        radix_select(scores, keep)
    if device == "cuda":
        with never_waiting(device):
            found = topk_mask(scores, keep)
        assert found.sum() == 777


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [50, 10**6])
def test_a_mask_on_the_gpu_is_that_of_the_cpu(kinds):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, kinds, (10_000,), generator=generator).float()
    for keep in (0, 1, 777, 9_999, 10_000):
        on_gpu = topk_mask(scores.cuda(), keep).cpu()
        assert torch.equal(on_gpu, topk_mask(scores, keep))
        assert torch.equal(on_gpu, topk_mask(scores.cuda(), torch.tensor(keep).cuda()).cpu())


@on_devices
def test_batches_are_those_of_the_cpu(device):
    found, expected = (tiny_run("dense", place).stream.batch(17) for place in (device, "cpu"))
    torch.testing.assert_close(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])


@on_devices
def test_a_bf16_recipe_trains_with_weights_in_fp32(device):
    half = dataclasses.replace(RECIPE, precision="bf16")
    with settled(device):
        runs = [tiny_run("rigl", device, recipe=recipe, step=Captured) for recipe in (RECIPE, half)]
        wide, rounded = (finish(trainer)["losses"] for trainer in runs)
    assert all(p.dtype == torch.float32 for p in runs[1].state.model.parameters())
    assert not torch.equal(wide, rounded)
    torch.testing.assert_close(wide[:4], rounded[:4], rtol=0.05, atol=0.05)
    assert runs[1].hot.replayed == (device == "cuda"), runs[1].hot.reason


@pytest.mark.gpu
def test_only_a_tf32_recipe_rounds_products():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("not run: tf32 needs compute capability 8.0")
    images, weight = torch.randn(8, 64, 8, 8).cuda(), torch.randn(64, 64, 3, 3).cuda()
    exact = torch.nn.functional.conv2d(images.double(), weight.double())
    errors = {}
    kept = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        for name in ("fp32", "tf32"):
            set_precision(dataclasses.replace(RECIPE, precision=name))
            for kind, found, right in (
                ("convolution", torch.nn.functional.conv2d(images, weight), exact),
                ("product", weight[0, 0] @ weight[0, 1], None),
            ):
                if right is None:
                    right = weight[0, 0].double() @ weight[0, 1].double()
                errors[name, kind] = float((found - right).abs().max() / right.abs().max())
    finally:
        torch.backends.cudnn.allow_tf32 = kept[0]
        torch.set_float32_matmul_precision(kept[1])
    assert errors["fp32", "convolution"] < 1e-5 < errors["tf32", "convolution"]
    assert errors["fp32", "product"] < 1e-5


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # what the compiler would have us know
@pytest.mark.parametrize("captured", [False, True])
def test_a_compiled_step_computes_the_same_but_for_rounding(captured):
    kind = Captured if captured else Step
    with settled("cuda"):
        plain = finish(tiny_run("rigl", "cuda"))["losses"]
        trainer = tiny_run("rigl", "cuda", step=kind)
        trainer.hot.compiled = True
        compiled = finish(trainer)["losses"]
    torch.testing.assert_close(plain[:8], compiled[:8], rtol=1e-3, atol=1e-3)
    assert trainer.hot.replayed == captured


@on_devices
def test_a_stopwatch_times_what_the_device_does(device):
    watch = Stopwatch(torch.device(device))
    work = torch.randn(1000, 1000, device=device)
    assert watch.take() == 0
    for _ in range(2):
        with watch.running():
            for _ in range(3):
                work = work @ work / 32
    wait_for(torch.device(device))
    assert watch.take() > 0
    assert watch.take() == 0


@on_devices
def test_times_of_a_run_are_those_of_its_parts(device):
    trainer = finish_run(tiny_run("rigl", device, steps=40))
    cursor = trainer.cursor
    assert 0.0 < cursor.update_seconds < cursor.train_seconds


@pytest.mark.gpu
def test_two_of_four_layers_compute_what_the_pruned_layer_does_and_can_be_timed():
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


def finish_run(trainer: Trainer) -> Trainer:
    for _ in trainer.run():
        pass
    return trainer


def finish(trainer: Trainer) -> dict[str, Tensor]:
    """What a run comes to."""
    return outcome(finish_run(trainer))


def steps_due(trainer: Trainer) -> Iterator[Trainer]:
    """The run at every step but the first, in which optimizers make their memory.

    Whoever takes one computes it, or leaves.
    """
    for moment in trainer.moments():
        if moment is None:
            if trainer.cursor.total:
                yield trainer
            else:
                trainer.compute()


def launches(name: str, device: str) -> int:
    """Orders that a step gives to the device, late in a run."""
    trainer = next(itertools.islice(steps_computed(tiny_run(name, device)), 20, None))
    if device == "cpu":
        with _Operations() as found:
            trainer.hot.compute()
        return found.count
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        trainer.hot.compute()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def steps_computed(trainer: Trainer) -> Iterator[Trainer]:
    """The run at every step but the first; it is computed when the next is asked for."""
    for due in steps_due(trainer):
        yield due
        due.compute()


class _Operations(TorchDispatchMode):
    """Counts what would be launched: operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        self.count += not func.is_view and func is not torch.ops.aten.detach.default
        return found
