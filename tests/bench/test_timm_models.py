"""`timm:NAME` for small images: built for their size, or refused in one line."""

from __future__ import annotations

import pytest
import torch

from bench.datasets import DatasetInfo
from bench.errors import SuiteError
from bench.networks import make_model, probe

SIZES = ((1, 28, 28), (3, 32, 32), (3, 64, 64))
ONE_EACH = {"depths": (1, 1, 1, 1)}
FAMILIES = {
    # Convolutions
    "regnetx_002": {},
    "tinynet_e": {},  # EfficientNet
    "test_nfnet": {},
    "mobilenetv3_small_050": {},
    "repghostnet_050": {},
    "test_mambaout": {},
    # Attention, built for one size
    "deit_tiny_patch16_224": {"depth": 2},
    "eva02_tiny_patch14_224": {"depth": 2},
    "swin_tiny_patch4_window7_224": {**ONE_EACH, "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "swinv2_tiny_window8_256": {**ONE_EACH, "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "pit_ti_224": {},
    "efficientformerv2_s0": {},
    # Both, and neither
    "mobilevit_xxs": {},
    "fastvit_t8": {},
    "gmixer_12_224": {},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
}


def info(shape: tuple[int, int, int]) -> DatasetInfo:
    return DatasetInfo(
        shape, 10, mean=(0.5,) * shape[0], std=(0.5,) * shape[0], torchvision="", summary=""
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_timm_takes_small_images_and_is_trained_on_them(name):
    for shape in SIZES:
        model = make_model(f"timm:{name}", info(shape), FAMILIES[name], 0)
        logits = model(torch.randn(2, *shape))
        assert logits.shape == (2, 10)
        logits.logsumexp(1).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("name", "shape", "where"),
    [
        # What timm raises: a division by zero, a size it knows to be wrong, ...
        ("gcvit_xxtiny", (1, 28, 28), "cannot be built for images of 1x28x28"),
        ("xcit_nano_12_p8_224", (1, 28, 28), "cannot be built for images of 1x28x28"),
        # ... and, once an image comes: an assertion without a word, others with one, or a kernel
        # larger than what is left.
        ("halonet26t", (3, 32, 32), "cannot take images of 3x32x32 (AssertionError)"),
        ("test_vit", (1, 28, 28), "cannot take images of 1x28x28 (Input height (28) should be"),
        ("test_convnext", (1, 28, 28), "cannot take images of 1x28x28 (Calculated padded"),
        ("crossvit_tiny_240", (3, 32, 32), "cannot take images of 3x32x32 (The size of tensor"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_the_size_in_one_line(name, shape, where, call):
    size = "x".join(map(str, shape))
    with pytest.raises(SuiteError) as caught:
        probe(f"timm:{name}", info(shape), ())
    assert where in str(caught.value)
    outcome = call("count", f"timm:{name}", "--input", size, "--classes", "10")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"sparsebench: model timm:{name} with images of {size}: ")
    assert outcome.err.count("\n") == 1


def test_an_output_that_is_no_vector_of_classes_is_refused():
    with pytest.raises(SuiteError, match=r"returns \(1, 512, 1, 1\) for one image; expected"):
        probe("timm:resnet18", info((3, 32, 32)), (("global_pool", ""), ("num_classes", 0)))
