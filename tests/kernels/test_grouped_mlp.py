import copy
import pickle

import helpers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.grouped_mlp import grouped_mlp, reference
from spinlock_fast.kernels.latent_projection import ragged_layer_norm, scaled_output_linear
from spinlock_fast.kernels.latent_projection import reference as projection_reference

SIZES = [4, 1, 7, 3]
WIDTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def leaves(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


def mlp_inputs(sizes, rows, hidden=6, out=5, **options):
    G, n = len(sizes), sum(sizes)
    return leaves((rows, n), (n, hidden), (G, hidden), (G, hidden, out), (G, out), **options)


def linear_inputs(sizes, rows, width=6, **options):
    G, n = len(sizes), sum(sizes)
    return leaves((G, rows, width), (G, width), (G, width), (n, width), (n,), **options)


def norm_inputs(sizes, rows, **options):
    n = sum(sizes)
    return leaves((rows, n), (n,), (n,), **options)


def check(function, expected_function, inputs):
    out, expected = function(*inputs), expected_function(*inputs)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@given(WIDTHS, st.integers(0, 7), st.integers(0, 2**31))
def test_values_and_gradients_equal_the_reference(sizes, rows, seed):
    groups = Ragged.of(sizes)
    check(
        lambda *a: grouped_mlp(*a, groups),
        lambda *a: reference.grouped_mlp(*a, sizes),
        mlp_inputs(sizes, rows, seed=seed),
    )
    check(
        lambda *a: scaled_output_linear(*a, groups),
        lambda *a: projection_reference.scaled_output_linear(*a, sizes),
        linear_inputs(sizes, rows, seed=seed),
    )
    check(
        lambda *a: ragged_layer_norm(*a, groups, 1e-5),
        lambda *a: projection_reference.ragged_layer_norm(*a, sizes, 1e-5),
        norm_inputs(sizes, rows, seed=seed),
    )


@pytest.mark.parametrize(
    ("function", "inputs"),
    [(grouped_mlp, mlp_inputs), (scaled_output_linear, linear_inputs), (ragged_layer_norm, norm_inputs)],
)
def test_gradcheck(function, inputs):
    groups = Ragged.of(SIZES)
    torch.autograd.gradcheck(lambda *a: function(*a, groups), inputs(SIZES, 3))


def poisoned(original):
    """`original` with NaN in what it leaves undefined."""
    return lambda *args, **kwargs: original(*args, **kwargs).fill_(torch.nan)


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_no_rows_are_zero(monkeypatch, transposed, needs_x):
    inputs = [t.detach() for t in mlp_inputs(SIZES, 0, dtype=torch.float32)]
    if transposed:
        inputs[1] = inputs[1].t().contiguous().t()
    for t in inputs[not needs_x :]:
        t.requires_grad_()
    out = grouped_mlp(*inputs, Ragged.of(SIZES))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    found = torch.autograd.grad(out, inputs[not needs_x :], torch.zeros_like(out))
    for gradient, t in zip(found, inputs[not needs_x :], strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(t))


def test_dropout_equals_a_mask_of_the_reference():
    """The second layer is the identity, so the output determines the mask; gradients must use the same mask."""
    p, rows, hidden = 0.3, 50, 6
    inputs = mlp_inputs(SIZES, rows, hidden=hidden, out=hidden)
    x, w1, b1, _, b2 = inputs
    eye = torch.eye(hidden, dtype=torch.float64).repeat(len(SIZES), 1, 1).requires_grad_()
    inputs = [x, w1, b1, eye, b2]
    out = grouped_mlp(*inputs, Ragged.of(SIZES), p)
    whole = reference.grouped_mlp(*inputs, SIZES)
    active = (whole - b2[:, None]).detach() > 0
    keep = torch.where(((out - b2[:, None]).detach().abs() > 1e-12) | ~active, 1.0 / (1.0 - p), 0.0)
    expected = reference.grouped_mlp(*inputs, SIZES, keep)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_rate_and_independence(dtype):
    torch.manual_seed(0)
    G, rows, H, p = 2, 400, 256, 0.1
    ones = torch.ones(rows, G, dtype=dtype)
    eye = torch.eye(H, dtype=dtype).repeat(G, 1, 1)
    zeros = torch.zeros(G, H, dtype=dtype)
    groups = Ragged.of([1, 1])

    def dropped():
        return grouped_mlp(ones, torch.ones(G, H, dtype=dtype), zeros, eye, zeros, groups, p) == 0.0

    first, second = dropped(), dropped()
    n = first.numel()
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(first.double().mean().item() - p) < 5 * deviation
    for a, b in (
        (first, second),
        (first[:, 1:], first[:, :-1]),
        (first[..., 1:], first[..., :-1]),
        (first[0], first[1]),
    ):
        both = (a & b).double().mean().item()
        assert abs(both - p * p) < 6 * (p * p / a.numel()) ** 0.5
    per_row, per_unit = first.double().mean(2), first.double().mean(1)
    assert (per_row - p).abs().max() < 6 * (p * (1 - p) / H) ** 0.5
    assert (per_unit - p).abs().max() < 6 * (p * (1 - p) / rows) ** 0.5


def test_dropout_uses_torch_generator():
    inputs = mlp_inputs(SIZES, 30, dtype=torch.float32)
    groups = Ragged.of(SIZES)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = grouped_mlp(*inputs, groups, 0.5)
    assert not torch.equal(grouped_mlp(*inputs, groups, 0.5), first)
    torch.set_rng_state(state)
    assert torch.equal(grouped_mlp(*inputs, groups, 0.5), first)


def test_dropout_of_everything():
    inputs = mlp_inputs(SIZES, 5)
    out = grouped_mlp(*inputs, Ragged.of(SIZES), 1.0)
    torch.testing.assert_close(out, inputs[4][:, None].expand_as(out))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))


def test_ragged_padding_and_packing():
    groups = Ragged.of([2, 3])
    rows = torch.arange(1.0, 6.0)[:, None]
    assert groups.pad_rows(rows)[..., 0].tolist() == [[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]]
    assert torch.equal(groups.pack_rows(groups.pad_rows(rows)), rows)
    columns = torch.randn(4, 5)
    padded = groups.pad_columns(columns)
    assert padded.shape == (2, 4, 3)
    assert not padded[0, :, 2].any()
    assert torch.equal(groups.pack_columns(padded), columns)
    assert (groups.groups, groups.total, groups.widest) == (2, 5, 3)


def test_ragged_copies_are_equal():
    groups = Ragged.of([2, 3])
    groups.indices(torch.device("cpu"))
    assert copy.deepcopy(groups) is groups
    assert pickle.loads(pickle.dumps(groups)) == groups


def test_no_host_synchronisation():
    groups = Ragged.of(SIZES)
    inputs = linear_inputs(SIZES, 5, dtype=torch.float32)
    mlp = mlp_inputs(SIZES, 5, dtype=torch.float32)
    norm = norm_inputs(SIZES, 5, dtype=torch.float32)

    def run():
        parts = grouped_mlp(*mlp, groups, 0.5), scaled_output_linear(*inputs, groups), ragged_layer_norm(*norm, groups)
        sum(part.sum() for part in parts).backward()

    with helpers.without_native_kernels():
        run()  # creates the index tensors
    with helpers.no_host_sync():
        run()
