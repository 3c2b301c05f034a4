"""The Triton kernels of the grouped networks and the projection: interpreted without a CUDA device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spinlock_fast.kernels._common.precision import cuda_matmul
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.grouped_mlp import grouped_mlp, op, reference
from spinlock_fast.kernels.latent_projection import project
from spinlock_fast.kernels.latent_projection import reference as projection_reference

triton = pytest.importorskip("triton", reason="the package triton is not installed here")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if ON_GPU else []),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # numpy in the interpreter, for hashes
]
WIDTHS = st.lists(st.integers(1, 70), min_size=1, max_size=3)
# Three TF32 products per float32 product keep 22 bits.
CLOSE = 5e-6


@pytest.fixture(autouse=True)
def _nan_filled(monkeypatch):
    """Fills new tensors with NaN, so that tests fail if an element is not written."""

    def nan_filled(plain):
        def fresh(*args, **kwargs):
            tensor = plain(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return fresh

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, nan_filled(getattr(torch, name)))


def normal(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def mlp_inputs(sizes, rows, hidden=6, out=5, seed=0):
    G, n = len(sizes), sum(sizes)
    return normal((rows, n), (n, hidden), (G, hidden), (G, hidden, out), (G, out), seed=seed)


def project_inputs(outputs, rows, width=6, seed=0):
    G, n = len(outputs), sum(outputs)
    return normal((G, rows, width), (G, width), (G, width), (n, width), (n,), (n,), (n,), seed=seed)


def reference_project(x, gain, shift, weight, bias, part_weight, part_bias, outputs, parts):
    """`projection_reference.project` in the type of x."""
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)
    linear = projection_reference.scaled_output_linear(normed, gain, shift, weight, bias, outputs)
    return projection_reference.ragged_layer_norm(linear, part_weight, part_bias, parts, 1e-5)


_ONE_COLUMN = torch.finfo(torch.float32).eps * 1e-5**-0.5


def with_gradients(function, inputs, upstream, device, dtype):
    leaves = [t.to(device, dtype).requires_grad_() for t in inputs]
    with cuda_matmul(tf32=False):
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, upstream.to(device, dtype))
    return [t.detach().cpu().double() for t in (out, *grads)]


def assert_agrees(function, expected, inputs):
    shape = expected(*inputs).shape
    upstream = normal(shape, seed=1)[0]
    ours = with_gradients(function, inputs, upstream, DEVICE, torch.float32)
    exact = with_gradients(expected, inputs, upstream, "cpu", torch.float64)
    eager = with_gradients(expected, inputs, upstream, "cpu", torch.float32)
    for place, (a, b, t) in enumerate(zip(ours, eager, exact, strict=True)):
        # A row of few columns may have a tiny deviation, so that rounding is as large as the gradient. The gradient of
        # a part of one column is 0 up to rounding times 1 / sqrt(eps) of the normalisation.
        assert (a - t).norm() <= CLOSE * t.norm() + 4.0 * (b - t).norm() + _ONE_COLUMN, place


@settings(max_examples=6)
@given(WIDTHS, st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**31))
def test_networks_of_any_shape(sizes, rows, hidden, out, seed):
    assert_agrees(
        lambda *a: grouped_mlp(*a, Ragged.of(sizes), backend="triton"),
        lambda *a: reference.grouped_mlp(*a, sizes),
        mlp_inputs(sizes, rows, hidden, out, seed),
    )


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_networks_of_large_tiles(monkeypatch, precision):
    from spinlock_fast.kernels.grouped_mlp import triton_forward

    if ON_GPU:
        pytest.skip("the tolerance is that of float32")
    monkeypatch.setattr(triton_forward, "MIN_PROGRAMS", 1)
    monkeypatch.setattr(op, "dot_precision", lambda: precision)
    test_networks_of_any_shape.hypothesis.inner_test([70, 3], 65, 66, 67, 0)


def test_gradients_have_the_strides_of_transposed_weights():
    inputs = mlp_inputs([9], 40, 20, 7)
    first, second = inputs[1].t().contiguous(), inputs[3][0].t().contiguous()
    views = [inputs[0], first, inputs[2], second, inputs[4]]

    def transposed(function):
        return lambda x, w1, b1, w2, b2: function(x, w1.t(), b1, w2.t()[None], b2)

    groups = Ragged.of([9])
    assert_agrees(
        transposed(lambda *a: grouped_mlp(*a, groups, backend="triton")),
        transposed(lambda *a: reference.grouped_mlp(*a, [9])),
        views,
    )
    weight = first.to(DEVICE).requires_grad_()
    rest = [t.to(DEVICE) for t in (inputs[2], inputs[3], inputs[4])]
    out = grouped_mlp(inputs[0].to(DEVICE), weight.t(), *rest, groups, backend="triton")
    assert torch.autograd.grad(out.sum(), weight)[0].is_contiguous()


def test_strided_rows():
    sizes = [3, 5]
    inputs = [t.to(DEVICE) for t in mlp_inputs(sizes, 20)]
    expected = grouped_mlp(*inputs, Ragged.of(sizes), backend="triton")
    for view in (inputs[0].repeat_interleave(2, 0)[::2], inputs[0].t().contiguous().t()):
        assert torch.equal(grouped_mlp(view, *inputs[1:], Ragged.of(sizes), backend="triton"), expected)


@settings(max_examples=6)
@given(
    st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 70),
    st.integers(2, 70),
    st.integers(0, 2**31),
)
def test_projections_of_any_shape(parts, rows, width, seed):
    outputs, flat = [sum(sizes) for sizes in parts], [n for sizes in parts for n in sizes]
    assert_agrees(
        lambda *a: project(*a, Ragged.of(outputs), Ragged.of(flat), backend="triton"),
        lambda *a: reference_project(*a, outputs, flat),
        project_inputs(outputs, rows, width, seed),
    )


@pytest.mark.parametrize(("parts", "width"), [([[60, 20], [3]], 130), ([[5, 4], [3]], 256), ([[140, 70], [100]], 40)])
def test_projections_of_more_than_a_tile(parts, width):
    test_projections_of_any_shape.hypothesis.inner_test(parts, 40, width, 0)


@pytest.mark.parametrize(("outputs", "parts", "width"), [([4, 4], [3, 2, 3], 6), ([4], [4], 1100), ([270], [270], 6)])
def test_unsupported_shapes_run_step_by_step(outputs, parts, width):
    assert_agrees(
        lambda x, *a: project(x.clone(), *a, Ragged.of(outputs), Ragged.of(parts), backend="triton"),
        lambda *a: reference_project(*a, outputs, parts),
        project_inputs(outputs, 20, width),
    )


def hidden_of(inputs, sizes, dropout):
    """Hidden values [G, B, H], by an identity as second layer."""
    x, w1, b1 = inputs[:3]
    hidden = b1.shape[1]
    eye = torch.eye(hidden, device=x.device).repeat(len(sizes), 1, 1)
    return grouped_mlp(x, w1, b1, eye, torch.zeros_like(b1), Ragged.of(sizes), dropout, backend="triton")  # [G, B, H]


def test_dropout_uses_torch_generator():
    sizes, p = [4, 7], 0.3
    inputs = [t.to(DEVICE) for t in mlp_inputs(sizes, 70, hidden=40)]
    inputs[1], inputs[2] = torch.zeros_like(inputs[1]), torch.ones_like(inputs[2])
    torch.manual_seed(3)
    first, second = hidden_of(inputs, sizes, p), hidden_of(inputs, sizes, p)
    torch.manual_seed(3)
    assert torch.equal(hidden_of(inputs, sizes, p), first)
    kept = first != 0.0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1.0 / (1.0 - p)), rtol=1e-3, atol=0.0)
    # Masks of groups, rows, columns and calls are independent.
    for other in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(1, 2), second != 0.0, torch.ones_like(kept)):
        share, expected = (kept & other).float().mean(), (1.0 - p) * other.float().mean()
        assert (share - expected).abs() < 5.0 * (p * (1.0 - p) / kept.numel()) ** 0.5
    assert not hidden_of(inputs, sizes, 1.0).any()


def test_gradients_of_networks_with_dropout():
    """The hidden values determine the mask; the gradients of the same seed must use it."""
    sizes, p = [4, 7], 0.4
    inputs = mlp_inputs(sizes, 33, hidden=20, out=20)
    torch.manual_seed(3)
    hidden = hidden_of([t.to(DEVICE) for t in inputs], sizes, p).cpu()
    keep = (hidden != 0.0) / (1.0 - p)

    def dropped(*a):
        torch.manual_seed(3)
        return grouped_mlp(*a, Ragged.of(sizes), p, backend="triton")

    assert_agrees(dropped, lambda *a: reference.grouped_mlp(*a, sizes, keep.to(a[0].dtype)), inputs)


def test_gradients_of_a_projection_with_dropout():
    outputs, parts, p = [9, 4], [4, 5, 4], 0.3
    inputs = [t.to(DEVICE) for t in project_inputs(outputs, 12)]

    def value(*leaves):
        torch.manual_seed(3)
        with cuda_matmul(tf32=False):
            return project(*leaves, Ragged.of(outputs), Ragged.of(parts), dropout=p, backend="triton")

    whole = project(*inputs, Ragged.of(outputs), Ragged.of(parts), backend="triton")
    assert not torch.allclose(value(*inputs), whole)
    upstream = normal(whole.shape, seed=1)[0].to(DEVICE)
    leaves = [t.requires_grad_() for t in inputs]
    grads = torch.autograd.grad(value(*leaves), leaves, upstream)
    with torch.no_grad():
        for place, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
            step = 1e-3 * normal(leaf.shape, seed=place)[0].to(DEVICE)
            ahead, behind = ([*leaves[:place], leaf + sign * step, *leaves[place + 1 :]] for sign in (1.0, -1.0))
            found = ((value(*ahead) - value(*behind)).double() * upstream).sum() / 2.0
            expected = (grad * step).double().sum()
            assert (found - expected).abs() <= 0.02 * (grad.norm() * step.norm()), place
