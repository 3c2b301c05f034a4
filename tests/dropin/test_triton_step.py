"""Eager training steps on the path of a GPU, in Triton's interpreter: launches, and equality with the path of a CPU."""

import copy
import os

import pytest
import torch

from benchmarks.common.op_counts import count_launches
from spinlock_fast import ResidualVQ, VectorQuantize

pytest.importorskip("triton", reason="the package triton is not installed here")
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") != "1" or "SPINLOCK_FAST_BACKEND" in os.environ,
        reason="compares the interpreter with the native path",
    ),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # NaN in the interpreter
]
HEADS = {"heads": 2, "codebook_dim": 4}
LAYERS = {
    "one codebook": (VectorQuantize, {}),
    "cosine": (VectorQuantize, {"use_cosine_sim": True}),
    "heads": (VectorQuantize, HEADS),
    "codebook per head": (VectorQuantize, {**HEADS, "separate_codebook_per_head": True}),
    "frozen": (VectorQuantize, {"freeze_codebook": True}),
    "resets": (VectorQuantize, {"threshold_ema_dead_code": 2}),
    "resets per head": (VectorQuantize, {**HEADS, "separate_codebook_per_head": True, "threshold_ema_dead_code": 2}),
    "stages": (ResidualVQ, {"num_quantizers": 2}),
    "stages, resets": (ResidualVQ, {"num_quantizers": 2, "threshold_ema_dead_code": 2}),
}
# Kernels that the layer launches on a GPU in a forward and backward pass with the update.
LAUNCHES = {
    "one codebook": 8,
    "cosine": 7,
    "heads": 8,
    "codebook per head": 8,
    "frozen": 6,
    "resets": 12,
    "stages": 18,
    "stages, resets": 29,
}
SLOW = ("heads", "frozen", "resets per head")


def kinds(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


def make(kind, **more):
    cls, options = LAYERS[kind]
    torch.manual_seed(0)
    return cls(dim=8, codebook_size=9, **options, **more)


def codebooks_of(layer):
    return [quantizer._codebook for quantizer in getattr(layer, "layers", [layer])]


def step(layer, x):
    """Forward and backward pass without operations besides those of the layer."""
    leaf = x.detach().requires_grad_()
    quantized, codes, loss = layer(leaf)
    grad = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).expand_as(quantized)
    torch.autograd.backward([quantized, loss], [grad, torch.ones_like(loss)])
    return quantized.detach(), codes, loss.detach(), leaf.grad


@pytest.mark.parametrize("kind", kinds(LAUNCHES))
def test_number_of_launches(kind, monkeypatch):
    monkeypatch.setenv("SPINLOCK_FAST_BACKEND", "triton")
    layer, leaf = make(kind), torch.randn(2, 10, 8).requires_grad_()
    grad, one = torch.zeros(2, 10, 8), torch.ones(2 if isinstance(layer, ResidualVQ) else ())

    def run():
        quantized, _, loss = layer(leaf)
        torch.autograd.grad([quantized, loss], leaf, [grad, one])

    run()
    counted = count_launches(run)
    assert any(name.startswith("triton::") for name in counted)
    assert counted.total() <= LAUNCHES[kind], counted


@pytest.mark.parametrize("kind", kinds(kind for kind in LAYERS if "resets" not in kind))
def test_equals_the_native_path(kind, monkeypatch):
    layer = make(kind)
    other = copy.deepcopy(layer)
    generator = torch.Generator().manual_seed(0)
    for i in range(2):
        x = torch.randn(2, 10, 8, generator=generator)
        torch.manual_seed(i)
        expected = step(other, x)
        with monkeypatch.context() as patched:
            patched.setenv("SPINLOCK_FAST_BACKEND", "triton")
            torch.manual_seed(i)
            found = step(layer, x)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)
    for one, two in zip(codebooks_of(layer), codebooks_of(other), strict=True):
        assert torch.equal(one.usage, two.usage)


@pytest.mark.parametrize("kind", ["resets", "resets per head", "stages, resets"])
def test_dead_codes_become_rows_of_the_batch(kind, monkeypatch):
    """Different finite rows, or their residuals, replace codes that few rows use; the others are averaged."""
    layer = make(kind)
    codebooks, initial = codebooks_of(layer), [codebook.embed.clone() for codebook in codebooks_of(layer)]
    averaging = copy.deepcopy(layer)
    for codebook in codebooks_of(averaging):
        codebook.has_dead_code_replacement = False
    x = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(3))
    x[0, :3] = torch.nan
    monkeypatch.setenv("SPINLOCK_FAST_BACKEND", "triton")
    codes = layer(x)[1]
    averaging(x)
    residual = x
    for q, (codebook, averaged) in enumerate(zip(codebooks, codebooks_of(averaging), strict=True)):
        replaced = (codebook.embed != averaged.embed).any(-1)
        assert (averaged.cluster_size[replaced] < 2).all()
        assert replaced.sum() >= 2 * len(replaced)
        assert (codebook.cluster_size[replaced] == 2).all()
        assert torch.equal(codebook.embed_avg[replaced], 2.0 * codebook.embed[replaced])
        assert torch.equal(codebook.cluster_size[~replaced], averaged.cluster_size[~replaced])
        heads = residual.reshape(20, len(replaced), -1).transpose(0, 1).nan_to_num(1e6)
        for rows, code, changed in zip(heads, codebook.embed, replaced, strict=True):
            distance = (code[changed][:, None] - rows).norm(dim=-1)
            assert distance.amin(1).max() < 1e-5
            assert len(distance.argmin(1).unique()) == changed.sum()
        if "stages" in kind:
            residual = residual - initial[q][0][codes[..., q].clamp(min=0)]


@pytest.mark.parametrize(
    ("more", "shape"),
    [({"accept_image_fmap": True}, (2, 8, 3, 4)), ({"channel_last": False}, (2, 8, 5)), ({"codebook_dim": 3}, (7, 8))],
    ids=["image", "channels first", "projected tokens"],
)
def test_layouts_and_missing_rows(more, shape, monkeypatch):
    layer = make("one codebook", **more)
    other = copy.deepcopy(layer)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = other(x)
    monkeypatch.setenv("SPINLOCK_FAST_BACKEND", "triton")
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)
    assert layer(x[:0])[0].shape == (0, *shape[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_keep_their_type(dtype, monkeypatch):
    layer, x = make("heads"), torch.randn(2, 10, 8).to(dtype)
    other = copy.deepcopy(layer)
    expected = step(other, x)  # by the operator
    monkeypatch.setenv("SPINLOCK_FAST_BACKEND", "triton")
    found = step(layer, x)
    assert [one.dtype for one in found] == [two.dtype for two in expected]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)
