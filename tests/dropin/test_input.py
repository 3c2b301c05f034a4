"""Invalid inputs of quantizers, and batches without rows."""

import pytest
import torch

import spinlock_fast as vq
from spinlock_fast import GroupedVectorQuantizer
from spinlock_fast.compat import VectorQuantizer

LAYERS = {
    "one": lambda: vq.VectorQuantize(8, 16),
    "head": lambda: vq.VectorQuantize(8, 16, heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "projection": lambda: vq.VectorQuantize(8, 16, codebook_dim=4),
    "stages": lambda: vq.ResidualVQ(dim=8, codebook_size=16, num_quantizers=2),
    "groups": lambda: vq.GroupedResidualVQ(dim=8, groups=2, codebook_size=16, num_quantizers=2),
    "packed": lambda: GroupedVectorQuantizer([9, 4], [5, 3], codebook_init="uniform"),
    "original": lambda: VectorQuantizer(16, 8),
}
WRONG = {
    "channels": torch.zeros(6, 9),
    "twice the channels": torch.zeros(6, 16),
    "sparse": torch.zeros(6, 8).to_sparse(),
    "list": [[0.0] * 8],
    "scalar": torch.zeros(()),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", LAYERS)
def test_invalid_input_raises_one_line(kind, wrong, training):
    with pytest.raises((TypeError, ValueError), match=r"must (be|have)") as raised:
        LAYERS[kind]().train(training)(WRONG[wrong])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", ["first", "image"])
def test_channel_dimension_is_checked(layout):
    options = {"first": {"channel_last": False}, "image": {"accept_image_fmap": True}}[layout]
    x = torch.zeros(2, 9, 8) if layout == "first" else torch.zeros(2, 9, 4, 8)
    with pytest.raises(ValueError, match="8 channels in dimension 1"):
        vq.VectorQuantize(8, 16, **options)(x)


def test_transposed_mask_raises():
    quantizer = LAYERS["packed"]()
    with pytest.raises(ValueError, match=r"mask must be \[3, 4\], got \[4, 3\]"):
        quantizer(torch.zeros(3, 4, 8), torch.ones(4, 3, dtype=torch.bool))


@pytest.mark.parametrize("use_ema", [True, False])
def test_original_losses_without_rows_are_zero(use_ema):
    quantizer = VectorQuantizer(16, 8, use_ema=use_ema)
    x = torch.zeros(0, 8, requires_grad=True)
    _, _, losses = quantizer(x)
    assert [loss.item() for loss in losses.values()] == [0.0] * 3
    losses["loss"].backward()
    assert torch.isfinite(quantizer.embedding.weight).all()
