"""Triton kernels of residual quantization against the reference: interpreted on a CPU, compiled on a GPU."""

import os

import pytest
import torch
from torch import nn

from spinlock_fast.kernels.residual_vq import residual_vq

pytest.importorskip("triton", reason="the package triton is not installed here")
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "1", reason="kernels are compiled here: the GPU tests run them"
)
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
# One tile of rows, several tiles of rows and codes, wide rows, rows too wide for one tile.
SIZES = {
    "small": (37, 5, [7, 3]),
    "tiles": (70, 64, [33, 70]),
    "wide": (20, 100, [40]),
    "stagewise": (20, 150, [12, 5]),
}


def inputs(size, cosine, device):
    N, D, sizes = SIZES[size]
    generator = torch.Generator().manual_seed(N + D)
    x = torch.randn(N, D, generator=generator)
    codebooks = [torch.randn(K, D, generator=generator) for K in sizes]
    if cosine:
        codebooks = [nn.functional.normalize(codebook, dim=1) for codebook in codebooks]
    x[5, 0] = torch.nan
    return (
        x.to(device),
        [codebook.to(device) for codebook in codebooks],
        (torch.rand(N, generator=generator) > 0.3).to(device),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradient", ["none", "straight_through", "rotation"])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_matches_float64(size, cosine, gradient, device):
    x, codebooks, mask = inputs(size, cosine, device)
    if gradient == "rotation" and not cosine:
        x[3] = 0.0  # R 0 = 0
    mask = mask if gradient != "none" else None
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    options = {"cosine": cosine, "gradient": gradient}
    actual = residual_vq(leaf, codebooks, mask, backend="triton", **options)
    exact = residual_vq(wide, [codebook.double() for codebook in codebooks], mask, backend="reference", **options)
    assert torch.equal(actual.codes, exact.codes)
    for name in ("quantized", "errors", "counts", "sums"):
        value, expected = getattr(actual, name).double(), getattr(exact, name)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)
    weight = torch.linspace(-1, 1, x.shape[1], device=device)
    for result in (actual, exact):
        ((result.quantized * weight).nan_to_num().sum() + result.errors.sum()).backward()
    finite_rows = [i for i in range(len(x)) if i not in (3, 5)]
    torch.testing.assert_close(leaf.grad[finite_rows].double(), wide.grad[finite_rows], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", ["small", "stagewise"])
def test_masks_may_be_strided(size, device):
    x, codebooks, mask = inputs(size, False, device)
    strided = torch.stack([mask, ~mask], 1)[:, 0]
    assert not strided.is_contiguous()
    leaves, actual = [x.clone().requires_grad_() for _ in "ab"], []
    for leaf, chosen in zip(leaves, (strided, mask), strict=True):
        actual.append(residual_vq(leaf, codebooks, chosen, gradient="straight_through", backend="triton"))
        (actual[-1].quantized.nan_to_num().sum() + actual[-1].errors.sum()).backward()
    assert torch.equal(actual[0].codes, actual[1].codes)
    torch.testing.assert_close(actual[0].errors, actual[1].errors, equal_nan=True)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_without_rows_and_without_sums(device):
    x, codebooks, _ = inputs("small", False, device)
    empty = residual_vq(x[:0], codebooks, backend="triton")
    assert empty.codes.shape == (0, 2)
    assert empty.sums.shape == (10, 5)
    assert residual_vq(x, codebooks, backend="triton", with_sums=False).sums.numel() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_lowest_index(device):
    """Integers have exact distances; NumPy, which computes products in the interpreter, rounds columns differently."""
    x, codebooks, _ = inputs("small", False, device)
    finite_rows = [i for i in range(len(x)) if i != 5]
    codes = (4.0 * codebooks[0][:1]).round().repeat(70, 1)
    assert (residual_vq((4.0 * x).round(), [codes], backend="triton").codes[finite_rows] == 0).all()
