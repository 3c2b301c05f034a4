import dataclasses

import helpers
import pytest
import torch
from helpers import distances, mean_distances, pearson
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.topo_loss import pytorch, reference, topographic_correlations
from spinlock_fast.kernels.topo_loss.reference import pair_correlation, pairwise_distances
from spinlock_fast.kernels.vq_assign import vq_assign

LAYOUT = CodebookLayout.of([5, 3, 8], [3, 2, 4])
GROUPS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=5)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31))
def test_distances_of_any_shape(S, D, seed):
    points = torch.randn(2, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([distances(part) for part in points])
    torch.testing.assert_close(pairwise_distances(points), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 5.0, 100.0])
def test_float32_distances_are_accurate(offset):
    points = offset + torch.randn(1, 64, 24)
    exact = distances(points[0].double())
    # The error of the square is a few eps of |a|^2 + |b|^2 of the centred points.
    error = (pairwise_distances(points)[0].double() - exact).abs()
    assert error.max() <= 16 * torch.finfo(torch.float32).eps * exact.max()


def test_distance_gradient():
    points = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(pairwise_distances, points)


@pytest.mark.parametrize("D", [1, 4, 172, 2000])
def test_equal_points_have_distance_and_gradient_zero(D):
    points = (3.0 + torch.randn(1, 1, D)).repeat(1, 6, 1)
    points[0, 5] += 1.0
    points.requires_grad_()
    found = pairwise_distances(points)
    assert not found[0, :5, :5].any()
    found[0, :5, :5].sum().backward()
    assert not points.grad.any()


@pytest.mark.parametrize("S", [1, 2, 3, 40])
def test_pair_correlation_equals_numpy(S):
    a, b = (distances(torch.randn(S, 3, dtype=torch.float64)) for _ in range(2))
    found = pair_correlation(a, b).item()
    if S > 2:
        assert found == pytest.approx(pearson(a, b), abs=1e-12)
    else:
        assert found == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.2345, 1e3])
@pytest.mark.parametrize("S", [3, 10, 100])
def test_correlation_with_a_constant_is_zero(dtype, value, S):
    constant = torch.full((S, S), value, dtype=dtype)
    other = distances(torch.randn(S, 3, dtype=dtype))
    for a, b in ((constant, other), (other, constant), (constant, constant)):
        assert pair_correlation(a, b).item() == pytest.approx(0.0, abs=1e-3)


def test_correlation_ignores_the_diagonal():
    a, b = (distances(torch.randn(6, 3, dtype=torch.float64)) for _ in range(2))
    expected = pair_correlation(a, b)
    torch.testing.assert_close(pair_correlation(a + torch.diag(torch.rand(6)), b), expected)


def test_reference_equals_numpy():
    x = torch.randn(25, 7, dtype=torch.float64)
    z, e = (torch.randn(25, 9, dtype=torch.float64) for _ in range(2))
    pre, post = reference.topographic_correlations(x, z, e, LAYOUT)
    d_z = mean_distances(z, LAYOUT)
    assert pre.item() == pytest.approx(pearson(distances(x), d_z), abs=1e-9)
    assert post.item() == pytest.approx(pearson(d_z, mean_distances(e, LAYOUT)), abs=1e-9)


def test_code_distances_use_a_straight_through_gradient():
    """dd_e/dz_i = (e_i - e_j) / d_e,ij, by central differences of each argument."""
    x = torch.randn(8, 4, dtype=torch.float64)
    z = torch.randn(8, 9, dtype=torch.float64)
    e = torch.randn(8, 9, dtype=torch.float64)

    def post(latents, codes):
        return reference.topographic_correlations(x, latents, codes, LAYOUT)[1]

    latents = z.clone().requires_grad_()
    post(latents, e).backward()
    expected = torch.zeros_like(z)
    step = 1e-6
    for i in range(8):
        for j in range(9):
            nudge = torch.zeros_like(z)
            nudge[i, j] = step
            both = post(z + nudge, e) - post(z - nudge, e) + post(z, e + nudge) - post(z, e - nudge)
            expected[i, j] = both / (2 * step)
    torch.testing.assert_close(latents.grad, expected, rtol=1e-5, atol=1e-8)


def test_features_get_no_gradient():
    x = torch.randn(8, 4, requires_grad=True)
    z = torch.randn(8, 9, requires_grad=True)
    sum(reference.topographic_correlations(x, z, z.detach().clone(), LAYOUT)).backward()
    assert x.grad is None


def batch(layout, rows, seed, dtype=torch.float64, features=7):
    """x, latents, codebook and the codes of the latents."""
    z, codebook = helpers.random_group(layout, rows, seed=seed, dtype=dtype)
    x = torch.randn(rows, features, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))
    return x, z, codebook, vq_assign(z, codebook, layout)


def compare(x, z, codebook, found, layout, weights=(0.3, 0.7)):
    """Correlations and gradient of the reference and of the operator."""
    results = []
    for correlations in (
        lambda a: reference.topographic_correlations(x, a, found.quantized, layout),
        lambda a: topographic_correlations(x, a, found.codes, codebook, layout),
    ):
        latents = z.clone().requires_grad_()
        values = correlations(latents)
        sum(w * v for w, v in zip(weights, values, strict=True)).backward()
        results.append((torch.stack(values).detach(), latents.grad))
    return results


@given(GROUPS, st.integers(1, 30), st.integers(0, 2**31), st.sampled_from([(1.0, 0.0), (0.0, 1.0), (-0.3, 0.7)]))
def test_values_and_gradient_equal_the_reference(sizes, rows, seed, weights):
    layout = CodebookLayout.of(*zip(*sizes, strict=True))
    (expected, expected_grad), (values, grad) = compare(*batch(layout, rows, seed), layout, weights)
    torch.testing.assert_close(values, expected, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12 * max(1.0, float(expected_grad.abs().max())))


@pytest.mark.parametrize("at_once", [1, 3 * 40**2, 1 << 24])
def test_result_does_not_depend_on_the_block_size(monkeypatch, at_once):
    data = batch(LAYOUT, 40, seed=3)
    monkeypatch.setitem(pytorch._PAIRS_AT_ONCE, "cpu", at_once)
    (expected, expected_grad), (values, grad) = compare(*data, LAYOUT)
    torch.testing.assert_close(values, expected, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_float32_error_is_that_of_the_reference(seed):
    layout = CodebookLayout.of([15, 7, 32], [4, 8, 48])
    x, z, codebook, found = batch(layout, 150, seed, torch.float32)
    exact = compare(
        x.double(),
        z.double(),
        codebook.double(),
        dataclasses.replace(found, quantized=found.quantized.double()),
        layout,
    )
    (eager, eager_grad), (ours, our_grad) = compare(x, z, codebook, found, layout)
    truth, truth_grad = exact[0]
    eps = torch.finfo(torch.float32).eps
    assert (ours - truth).abs().max() <= 2.0 * (eager - truth).abs().max() + 4.0 * eps
    scale = truth_grad.abs().max()
    assert (our_grad - truth_grad).norm() <= 2.0 * (eager_grad - truth_grad).norm() + eps * scale


@pytest.mark.parametrize("rows", [1, 2, 12])
@pytest.mark.parametrize("same", ["x", "z", "all", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_give_finite_results(rows, same, dtype):
    x, z, codebook, _ = batch(LAYOUT, rows, seed=0, dtype=dtype)
    for name, values in (("x", x), ("z", z)):
        if same in (name, "all"):
            values[:] = values[:1].clone()
        elif same == "pairs":
            values[: rows // 2] = values[:1].clone()
    data = x, z, codebook, vq_assign(z, codebook, LAYOUT)
    (_, expected), (values, grad) = compare(*data, LAYOUT)
    assert values.isfinite().all()
    assert grad.isfinite().all()
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)


def test_equal_codes_have_distance_zero():
    x, z, codebook, _ = batch(LAYOUT, 30, seed=0)
    layout_codes = codebook[LAYOUT.entry_slice(2)].view(8, 4)
    layout_codes[3] = layout_codes[6]
    codes = torch.randint(0, 3, (30, 3))
    codes[:15, 2], codes[15:, 2] = 3, 6
    found = dataclasses.replace(vq_assign(z, codebook, LAYOUT), codes=codes)
    parts = [book[codes[:, g]] for g, book in enumerate(helpers.split_codebooks(codebook, LAYOUT))]
    found = dataclasses.replace(found, quantized=torch.cat(parts, 1))
    (expected, expected_grad), (values, grad) = compare(x, z, codebook, found, LAYOUT)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_row_without_a_code_gives_zero_post_correlation():
    x, z, codebook, found = batch(LAYOUT, 20, seed=0)
    found.codes[4, 1] = -1
    pre, post = topographic_correlations(x, z, found.codes, codebook, LAYOUT)
    assert post.item() == 0.0
    assert pre.item() != 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_latent_gives_zero_correlations(dtype):
    x, z, codebook, found = batch(LAYOUT, 20, seed=0, dtype=dtype)
    z[4, 1] = torch.nan
    assert topographic_correlations(x, z, found.codes, codebook, LAYOUT) == (0.0, 0.0)


def test_unused_codes_may_be_non_finite():
    x, z, codebook, found = batch(LAYOUT, 20, seed=0)
    expected = topographic_correlations(x, z, found.codes, codebook, LAYOUT)
    non_finite = torch.cat([codebook, torch.tensor([torch.nan, torch.inf, 1.0, 0.0], dtype=torch.float64)])
    layout = CodebookLayout.of([5, 3, 9], [3, 2, 4])
    torch.testing.assert_close(topographic_correlations(x, z, found.codes, non_finite, layout), expected)


def test_no_host_synchronisation():
    x, z, codebook, found = batch(LAYOUT, 20, seed=0, dtype=torch.float32)
    z.requires_grad_()
    with helpers.without_native_kernels():
        topographic_correlations(x, z, found.codes, codebook, LAYOUT)  # creates the index tensors
    with helpers.no_host_sync():
        sum(topographic_correlations(x, z, found.codes, codebook, LAYOUT)).backward()
