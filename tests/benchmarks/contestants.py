"""The training loops of `against_peers`: ours, facebookresearch/open_lth's, and floors.

Each runs in a process of its own, so modules are imported where they are used: open_lth has
packages of the same names as ours. Nothing of it is copied; what newer versions of torch and numpy
refuse is replaced at run time, and its data sets are fed from our files.
"""

from __future__ import annotations

import importlib
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.benchmarks.turns import Tick, counted_steps

LENET_RECIPE = """
title = "as open_lth trains LeNet-300-100"
batch = 60
optimizer = "adam"
lr = 0.0012
"""

RESNET_RECIPE = """
title = "as open_lth trains ResNet-20"
batch = 128
optimizer = "sgd"
momentum = 0.9
weight_decay = 1e-4
lr = 0.1
crop = 4
flip = true
"""


@dataclass(frozen=True)
class Case:
    """A network on a data set, in our words and in open_lth's."""

    dataset: str
    model: str
    recipe: str
    batch: int
    peer_model: str
    peer_training: tuple[tuple[str, Any], ...]


LENET = Case(
    *("mnist", "lenet_300_100", LENET_RECIPE, 60, "mnist_lenet_300_100"),
    (("optimizer_name", "adam"), ("lr", 1.2e-3)),
)
RESNET20 = Case(
    *("cifar10", "resnet20", RESNET_RECIPE, 128, "cifar_resnet_20"),
    (("optimizer_name", "sgd"), ("lr", 0.1), ("momentum", 0.9), ("weight_decay", 1e-4)),
)


def write_suite(case: Case, folder: Path, steps: int, seeds: int = 1, precision: str = "") -> Path:
    """A suite of dense cells of a case, with its recipe beside it."""
    recipe = case.recipe + (f'precision = "{precision}"\n' if precision else "")
    (folder / "peer-recipe.toml").write_text(recipe, encoding="utf-8")
    suite = folder / "peer-suite.toml"
    suite.write_text(
        f'title = "dense"\ndataset = "{case.dataset}"\nrecipe = "peer-recipe.toml"\n'
        f'models = ["{case.model}"]\nsparsities = [0.0]\nseeds = {list(range(seeds))}\n'
        f"budget = {{ steps = {steps} }}\n[methods.dense]\n",
        encoding="utf-8",
    )
    return suite


def ours(tick: Tick, case: Case, data: Path, precision: str = "", stack: int = 1) -> None:
    """Dense cells as `sparsebench run` trains them, checkpoints and all.

    Args:
        tick: called after each step of a cell.
        case: what is trained.
        data: folder of the .npz files.
        precision: of the recipe; empty: its default.
        stack: cells computed as one network, as by `run --stack`.
    """
    from bench import suite
    from bench.packing import Fixed
    from bench.process_settings import keep_memory
    from bench.resolve import resolve
    from bench.task import Finished, Task, Ways
    from bench.together import run_cells

    keep_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = resolve(suite.load(str(write_suite(case, folder, 10**7, stack, precision))), data)
        left = [
            Task(
                cell=cell,
                suite=plan.manifest.suite,
                recipe=plan.recipe,
                data=data,
                checkpoint=folder / f"{cell.spec.slug}.safetensors",
                weights=folder / "weights" / f"{cell.spec.slug}.safetensors",
                masks=folder / "masks",
                device="cpu",
                checkpoint_seconds=60.0,
                deadline=math.inf,
                ways=Ways(stack=stack),
            )
            for cell in plan.manifest.cells
        ]
        with _counted_cells(tick, case.batch):
            for event in run_cells(lambda _: left.pop() if left else None, Fixed(stack)):
                if isinstance(event, Finished):
                    raise RuntimeError(f"a cell ended: {event.record.reason}")


@contextmanager
def _counted_cells(tick: Tick, batch: int) -> Iterator[None]:
    """Has every step of any cell counted; a hook of the optimizer would have it go the long way."""
    from bench.step import Step

    finish = Step.finish

    def counted(step: Step, loss: Any) -> None:
        finish(step, loss)
        tick(batch)

    Step.finish = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Step.finish = finish  # type: ignore[method-assign]


def bare(tick: Tick, case: Case, data: Path) -> None:
    """A loop as one would write it by hand: tensors in memory, one index a batch, fused.

    It has the memory setting of a run, which is no part of a loop.
    """
    import torch
    from torch.nn import functional

    from bench.process_settings import keep_memory
    from models import create_model

    keep_memory()
    images, labels = _training_set(case, data)
    model = create_model(case.model, _shape(case), 10).to(memory_format=torch.channels_last)
    optimizer: torch.optim.Optimizer
    if case == LENET:
        optimizer = torch.optim.Adam(model.parameters(), lr=1.2e-3, fused=True)
        margin = 0
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True
        )
        margin = 4
    windows = _windows(images, margin)
    del images  # the padded copy takes a gigabyte
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(order) - case.batch + 1, case.batch):
            index = order[start : start + case.batch]
            if margin:
                rows, columns = torch.randint(2 * margin + 1, (2, case.batch), generator=generator)
                x = windows[index, rows, columns]
                mirrored = torch.rand(case.batch, generator=generator) < 0.5
                x = torch.where(mirrored[:, None, None, None], x.flip(2), x).permute(0, 3, 1, 2)
            else:
                x = windows.index_select(0, index).permute(0, 3, 1, 2)
            loss = functional.cross_entropy(model(x), labels.index_select(0, index))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tick(case.batch)


def passes(tick: Tick, case: Case, data: Path) -> None:
    """Forward and backward alone, of one batch again and again; memory as in `bare`."""
    import torch
    from torch.nn import functional

    from bench.process_settings import keep_memory
    from models import create_model

    keep_memory()
    images, labels = _training_set(case, data)
    model = create_model(case.model, _shape(case), 10).to(memory_format=torch.channels_last)
    x, y = images[: case.batch].clone().permute(0, 3, 1, 2), labels[: case.batch]
    del images
    while True:
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
        tick(case.batch)


def open_lth(tick: Tick, case: Case, data: Path, checkout: Path) -> None:
    """open_lth's training loop, without its callbacks (evaluation, logs, checkpoints)."""
    peer = _import_open_lth(checkout, data)
    loader, model = _peer_loader(peer, case), _peer_model(peer, case)
    hparams = peer.hparams.TrainingHparams(
        training_steps="100000ep", data_order_seed=0, **dict(case.peer_training)
    )
    with tempfile.TemporaryDirectory() as folder, counted_steps(tick, case.batch):
        peer.train.train(hparams, model, loader, folder)


def open_lth_data(tick: Tick, case: Case, data: Path, checkout: Path) -> None:
    """open_lth's loader alone."""
    peer = _import_open_lth(checkout, data)
    loader = _peer_loader(peer, case)
    while True:
        loader.shuffle(0)
        for images, _ in loader:
            tick(len(images))


def our_data(tick: Tick, case: Case, data: Path) -> None:
    """Our batches alone, as a cell's training stream gives them."""
    import torch

    from bench import datasets, recipes
    from bench.data import BatchStream
    from bench.streaming import to_device

    with tempfile.TemporaryDirectory() as folder:
        write_suite(case, Path(folder), 1)
        recipe = recipes.load("peer-recipe.toml", "", Path(folder))
    arrays = datasets.load(case.dataset, data)
    stream = BatchStream(to_device(arrays, recipe, torch.device("cpu"), 1), recipe, 0, "order")
    position = 0
    while True:
        stream.batch(position)
        position += 1
        tick(case.batch)


def pil_data(tick: Tick, case: Case, data: Path) -> None:
    """torchvision's transforms on each image as a PIL picture, in this process."""
    import numpy as np
    import torch
    from PIL import Image
    from torchvision import transforms

    with np.load(data / f"{case.dataset}.npz") as file:
        pixels, labels = file["x_train"], torch.from_numpy(file["y_train"].astype(np.int64))
    channels, size, _ = _shape(case)
    augment = [transforms.RandomCrop(size, 4), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose(
        [
            *(augment if case.dataset == "cifar10" else []),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * channels, [0.25] * channels),
        ]
    )
    while True:
        order = torch.randperm(len(labels))
        for start in range(0, len(order) - case.batch + 1, case.batch):
            index = order[start : start + case.batch].tolist()
            torch.stack([transform(Image.fromarray(pixels[i])) for i in index])
            labels[index]
            tick(case.batch)


def _shape(case: Case) -> tuple[int, int, int]:
    return (1, 28, 28) if case.dataset == "mnist" else (3, 32, 32)


def _training_set(case: Case, data: Path) -> tuple[Any, Any]:
    """float32 (N, H, W, C), normalised, and int64 (N,)."""
    import numpy as np
    import torch

    with np.load(data / f"{case.dataset}.npz") as file:
        pixels, labels = file["x_train"], file["y_train"].astype(np.int64)
    images = torch.from_numpy(pixels.reshape(len(pixels), *_shape(case)[1:], -1)).float()
    return images.sub_(images.mean()).div_(images.std()), torch.from_numpy(labels)


def _windows(images: Any, margin: int) -> Any:
    """(N, rows, columns, H, W, C): every crop of the padded images, as a view."""
    from torch.nn import functional

    if not margin:
        return images
    padded = functional.pad(images, (0, 0, margin, margin, margin, margin))
    count, height, width, channels = images.shape
    image, row, column, channel = padded.stride()
    return padded.as_strided(
        (count, 2 * margin + 1, 2 * margin + 1, height, width, channels),
        (image, row, column, row, column, channel),
    )


def _import_open_lth(checkout: Path, data: Path) -> SimpleNamespace:
    """Its modules, with what newer versions refuse put right in this process."""
    import numpy as np
    import torch

    sys.path.insert(0, str(checkout.resolve()))  # before ours, which has packages of equal names
    vars(np).setdefault("product", np.prod)  # gone since numpy 2
    # Its base class puts ABC before Module, which torch's class has the other way round by now.
    distributed = torch.nn.parallel.DistributedDataParallel
    vars(torch.nn.parallel)["DistributedDataParallel"] = torch.nn.DataParallel
    try:
        names = ("datasets.registry", "models.registry", "training.train", "foundations.hparams")
        registry, models, train, hparams = map(importlib.import_module, names)
    finally:
        vars(torch.nn.parallel)["DistributedDataParallel"] = distributed
    local = importlib.import_module("platforms.local")
    vars(importlib.import_module("platforms.platform"))["_PLATFORM"] = local.Platform(num_workers=0)

    def fed(name: str, tensors: bool) -> Any:
        """Stands for torchvision's class: no download, no checksum, the same arrays."""

        def load(train: bool, root: str, download: bool) -> SimpleNamespace:
            split = "train" if train else "test"
            with np.load(data / f"{name}.npz") as file:
                x, y = file[f"x_{split}"], file[f"y_{split}"].astype(np.int64)
            if tensors:
                return SimpleNamespace(data=torch.from_numpy(x), targets=torch.from_numpy(y))
            return SimpleNamespace(data=x, targets=y.tolist())

        return load

    mnist = registry.mnist
    mnist.torchvision = SimpleNamespace(
        datasets=SimpleNamespace(MNIST=fed("mnist", True)),
        transforms=mnist.torchvision.transforms,
    )
    registry.cifar10.CIFAR10 = fed("cifar10", False)
    return SimpleNamespace(datasets=registry, models=models, train=train, hparams=hparams)


def _peer_loader(peer: SimpleNamespace, case: Case) -> Any:
    hparams = peer.hparams.DatasetHparams(dataset_name=case.dataset, batch_size=case.batch)
    return peer.datasets.get(hparams, train=True)


def _peer_model(peer: SimpleNamespace, case: Case) -> Any:
    return peer.models.get(
        peer.hparams.ModelHparams(
            model_name=case.peer_model, model_init="kaiming_normal", batchnorm_init="uniform"
        )
    )
