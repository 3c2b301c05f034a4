"""The Triton kernels of the topographic correlations: interpreted without a CUDA device."""

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.topo_loss import reference
from spinlock_fast.kernels.topo_loss.op import _Topographic
from spinlock_fast.kernels.vq_assign import vq_assign

pytest.importorskip("triton", reason="the package triton is not installed here")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numpy in the interpreter, for NaN
]
LAYOUT = CodebookLayout.of([15, 7, 28, 13], [4, 16, 48, 5])
GROUPS = st.lists(st.tuples(st.integers(1, 9), st.integers(2, 70)), min_size=1, max_size=3)


def triton_correlations(*arguments):
    return _Topographic.apply(*arguments, "triton", None)


def pytorch_correlations(*arguments):
    return _Topographic.apply(*arguments, "pytorch", None)


def values_and_gradient(function, x, z, codes, codebook, layout, weights=(0.3, 0.7)):
    """The correlations and the gradient of their weighted sum, in float64."""
    leaf = z.clone().requires_grad_()
    pre, post = function(x, leaf, codes, codebook, layout)
    (weights[0] * pre + weights[1] * post).backward()
    return torch.stack([pre, post]).double().cpu(), leaf.grad.double().cpu()


def exact(x, z, codes, codebook, layout):
    quantized = vq_assign(z.double(), codebook.double(), layout).quantized
    return values_and_gradient(
        lambda a, b, *_: reference.topographic_correlations(a, b, quantized, layout),
        x.double(),
        z.double(),
        codes,
        codebook,
        layout,
    )


def check(layout, S, seed, features=7):
    z, codebook = helpers.random_group(layout, S, seed=seed)
    x = torch.randn(S, features, generator=torch.Generator().manual_seed(seed + 1))
    codes = vq_assign(z.double(), codebook.double(), layout).codes
    truth, truth_grad = exact(x, z, codes, codebook, layout)
    found, grad = values_and_gradient(triton_correlations, *(t.to(DEVICE) for t in (x, z, codes, codebook)), layout)
    eager, eager_grad = values_and_gradient(pytorch_correlations, x, z, codes, codebook, layout)
    size = max(float(truth_grad.norm()), 1e-12)
    # Three TF32 products lose up to 2 bits against float32; close pairs dominate the rest of both errors.
    assert (found - truth).abs().max() <= 4 * (eager - truth).abs().max() + 2e-6
    assert (grad - truth_grad).norm() <= 4 * (eager_grad - truth_grad).norm() + 4e-6 * size


@settings(max_examples=6)
@given(GROUPS, st.integers(3, 40), st.integers(0, 2**31))
def test_any_shape(sizes, S, seed):
    check(CodebookLayout.of(*zip(*sizes, strict=True)), S, seed)


@pytest.mark.parametrize("S", [1, 2, 3, 64, 65, 130])
def test_row_counts_around_the_tile_size(S):
    check(LAYOUT, S, seed=S, features=33)


def test_equal_rows_and_codes_give_finite_gradients():
    z, codebook = helpers.random_group(LAYOUT, 40, seed=0)
    z[20:] = z[:20]
    x = torch.randn(20, 5).repeat(2, 1)
    codes = vq_assign(z, codebook, LAYOUT).codes
    arguments = [t.to(DEVICE) for t in (x, z, codes, codebook)]
    found, grad = values_and_gradient(triton_correlations, *arguments, LAYOUT)
    assert found.isfinite().all()
    assert grad.isfinite().all()
    torch.testing.assert_close(grad[20:], grad[:20], rtol=1e-4, atol=1e-7)


def test_row_without_a_code_gives_zero_post_correlation():
    z, codebook = helpers.random_group(LAYOUT, 30, seed=0)
    x = torch.randn(30, 5)
    codes = vq_assign(z, codebook, LAYOUT).codes
    whole = values_and_gradient(
        triton_correlations, *(t.to(DEVICE) for t in (x, z, codes, codebook)), LAYOUT, (1.0, 0.0)
    )
    codes[3, 1] = -1
    found, grad = values_and_gradient(triton_correlations, *(t.to(DEVICE) for t in (x, z, codes, codebook)), LAYOUT)
    assert found[1] == 0.0
    torch.testing.assert_close(found[0], whole[0][0])
    torch.testing.assert_close(grad, 0.3 * whole[1])


def test_results_are_bitwise_reproducible():
    z, codebook = helpers.random_group(LAYOUT, 100, seed=0)
    x, codes = torch.randn(100, 5), vq_assign(z, codebook, LAYOUT).codes
    arguments = [t.to(DEVICE) for t in (x, z, codes, codebook)]
    first, again = (values_and_gradient(triton_correlations, *arguments, LAYOUT) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_loss_equals_that_of_the_correlations():
    z, codebook = helpers.random_group(LAYOUT, 70, seed=0)
    x, codes = torch.randn(70, 5), vq_assign(z, codebook, LAYOUT).codes
    arguments = [t.to(DEVICE) for t in (x, z, codes, codebook)]
    (pre, post), expected = values_and_gradient(triton_correlations, *arguments, LAYOUT, (-0.3 * 2.5, -0.7 * 2.5))
    leaf = arguments[1].clone().requires_grad_()
    loss = _Topographic.apply(arguments[0], leaf, *arguments[2:], LAYOUT, "triton", 0.3)
    (2.5 * loss).backward()
    assert loss.item() == pytest.approx(1.0 - 0.3 * pre.item() - 0.7 * post.item(), abs=1e-6)
    torch.testing.assert_close(leaf.grad.double().cpu(), expected, rtol=1e-5, atol=1e-8)
