"""The Triton kernels of the partial decoders: interpreted without a CUDA device."""

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.code_decoders import Decoders, partial_loss
from spinlock_fast.kernels.vq_assign import vq_assign

pytest.importorskip("triton", reason="the package triton is not installed here")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if ON_GPU else []),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numpy in the interpreter, for NaN
]
SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=2)
# On a GPU the gradients are TF32 products, whose factors have a relative error of up to 2^-11.
CLOSE = 4e-3 if ON_GPU else 3e-6


@pytest.fixture(autouse=True)
def _nan_filled(monkeypatch):
    """Fills new tensors with NaN, so that tests fail if an element is not written."""
    empty = torch.empty

    def nan_filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan_filled)


def batch(layout, rows, features=5, hidden=6, offset=0.0, seed=0):
    """x, codebook, decoders, and the codes of random latents."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    z, codebook = helpers.random_group(layout, rows, seed=seed)
    G = layout.groups
    # Decoders that reconstruct the offset, as trained ones do.
    decoders = Decoders(
        normal(layout.total_dims, hidden), normal(G, hidden), normal(G, hidden, features), offset + normal(G, features)
    )
    return offset + normal(rows, features), codebook, decoders, vq_assign(z, codebook, layout, backend="reference")


def loss_and_gradients(backend, x, codebook, decoders, found, layout, dtype=torch.float32, codes=None):
    """Loss and gradients of quantized, w1, b1, w2, b2, on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"
    x, codebook, *leaves = (t.to(device, dtype) for t in (x, codebook, found.quantized, *decoders))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    codes = (found.codes if codes is None else codes).to(device)
    loss = partial_loss(x, leaves[0], codes, codebook, Decoders(*leaves[1:]), layout, backend=backend)
    grads = torch.autograd.grad(3.0 * loss, leaves)
    return loss.detach().cpu(), [grad.cpu() for grad in grads]


def assert_agrees(x, codebook, decoders, found, layout):
    exact, exact_grads = loss_and_gradients("reference", x, codebook, decoders, found, layout, torch.float64)
    loss, grads = loss_and_gradients("triton", x, codebook, decoders, found, layout)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=1e-6 * x.square().mean().item())
    for name, ours, theirs in zip(("quantized", *Decoders._fields), grads, exact_grads, strict=True):
        assert (ours - theirs).norm() <= CLOSE * theirs.norm(), name


@settings(max_examples=8)
@given(SIZES, st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_any_shape(sizes, rows, features, hidden, seed):
    layout = CodebookLayout.of(*zip(*sizes, strict=True))
    assert_agrees(*batch(layout, rows, features, hidden, seed=seed), layout)


@pytest.mark.parametrize(("K", "D", "hidden", "features"), [(70, 3, 130, 33), (3, 65, 128, 7), (32, 32, 5, 64)])
def test_more_than_a_tile(K, D, hidden, features):
    layout = CodebookLayout.of([4, K], [2, D])
    assert_agrees(*batch(layout, 65, features, hidden), layout)


def test_features_with_an_offset():
    """Sums over the rows of a code cancel against its reconstruction; the error must not grow with the offset."""
    layout = CodebookLayout.of([15, 8], [4, 7])
    x, codebook, decoders, found = batch(layout, 200, features=20, offset=1000.0)
    exact, exact_grads = loss_and_gradients("reference", x, codebook, decoders, found, layout, torch.float64)
    loss, grads = loss_and_gradients("triton", x, codebook, decoders, found, layout)
    eps = 1000.0 * torch.finfo(torch.float32).eps  # of a feature
    torch.testing.assert_close(loss.double(), exact, rtol=eps, atol=0.0)
    for name, ours, theirs in zip(("quantized", *Decoders._fields), grads, exact_grads, strict=True):
        assert (ours - theirs).norm() <= (CLOSE + eps) * theirs.norm(), name


def test_rows_without_a_code_give_nan():
    layout = CodebookLayout.of([40, 3], [4, 2])
    x, codebook, decoders, found = batch(layout, 70)
    assert not loss_and_gradients("triton", x, codebook, decoders, found, layout)[0].isnan()
    for row, g in ((0, 1), (69, 0)):
        codes = found.codes.clone()
        codes[row, g] = -1
        assert loss_and_gradients("triton", x, codebook, decoders, found, layout, codes=codes)[0].isnan()


def test_unused_codes_may_be_non_finite():
    layout = CodebookLayout.of([8, 5], [4, 3])
    x, codebook, decoders, found = batch(layout, 30)
    codes = found.codes.clamp(max=3)
    non_finite = codebook.clone()
    non_finite[layout.entry_slice(1)][-3:] = torch.tensor([torch.nan, torch.inf, 0.0])
    loss, grads = loss_and_gradients("triton", x, codebook, decoders, found, layout, codes=codes)
    again, grads_again = loss_and_gradients("triton", x, non_finite, decoders, found, layout, codes=codes)
    assert loss == again
    for a, b in zip(grads, grads_again, strict=True):
        assert torch.equal(a, b)


def test_strided_rows_without_gradient():
    layout = CodebookLayout.of([8, 5], [4, 3])
    x, codebook, decoders, found = batch(layout, 30)
    values = []
    for view in (x, x.repeat_interleave(2, 1)[:, ::2], x.repeat_interleave(2, 0)[::2]):
        leaves = Decoders(*(t.to(DEVICE).requires_grad_() for t in decoders))
        quantized, codes = found.quantized.to(DEVICE), found.codes.to(DEVICE)
        loss = partial_loss(view.to(DEVICE), quantized, codes, codebook.to(DEVICE), leaves, layout, backend="triton")
        values.append(torch.cat([loss[None], *(grad.flatten() for grad in torch.autograd.grad(loss, leaves))]))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert not values[0].isnan().any()
