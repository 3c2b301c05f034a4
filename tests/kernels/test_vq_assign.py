import helpers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import lookup, quantize, reference, vq_assign

RAGGED = CodebookLayout.of([15, 7, 6, 28, 1, 13], [4, 16, 24, 8, 5, 1])
SMALL = CodebookLayout.of([5, 3], [3, 2])
SIZES = st.lists(st.tuples(st.integers(1, 33), st.integers(1, 20)), min_size=1, max_size=5)
NAN, INF = float("nan"), float("inf")


def assert_consistent(actual, z, codebook, layout, valid):
    """Values, errors, counts and sums of `actual` agree with its codes, on the rows where `valid` [N, G]."""
    expected_counts, expected_sums = [], []
    codebooks = helpers.split_codebooks(codebook, layout)
    values = helpers.split_columns(actual.quantized, layout)
    for g, (part, vectors) in enumerate(zip(helpers.split_columns(z, layout), codebooks, strict=True)):
        rows, codes = valid[:, g], actual.codes[valid[:, g], g]
        one_hot = torch.nn.functional.one_hot(codes, vectors.shape[0]).double()
        expected_counts.append(one_hot.sum(0))
        expected_sums.append((one_hot.t() @ part[rows].double()).flatten())
        assert torch.equal(values[g][rows], vectors[codes])
        error = (part[rows].double() - vectors[codes].double()).square().sum()
        torch.testing.assert_close(actual.squared_error[g].double(), error, rtol=1e-5, atol=1e-6)
    assert torch.equal(actual.counts.double(), torch.cat(expected_counts))
    # The error of a sum of N float32 numbers is at most N * eps * sum |z|.
    torch.testing.assert_close(actual.sums.double(), torch.cat(expected_sums), rtol=1e-5, atol=1e-5)


@given(SIZES, st.integers(0, 40), st.integers(0, 2**31))
def test_nearest_codes_of_any_shape(sizes, rows, seed):
    layout = CodebookLayout.of(*zip(*sizes, strict=True))
    z, codebook = helpers.random_group(layout, rows, seed=seed)
    actual = vq_assign(z, codebook, layout)
    assert actual.codes.shape == (rows, layout.groups)
    assert actual.codes.dtype == torch.int64
    helpers.assert_nearest(actual.codes, z, codebook, layout)
    assert_consistent(actual, z, codebook, layout, torch.ones(rows, layout.groups, dtype=torch.bool))


@pytest.mark.parametrize(("K", "D"), [(1, 1), (1, 9), (2, 1), (31, 33), (257, 3), (64, 64)])
def test_nearest_codes_of_one_codebook(K, D):
    layout = CodebookLayout.of([K], [D])
    z, codebook = helpers.random_group(layout, 50, seed=K)
    helpers.assert_nearest(vq_assign(z, codebook, layout).codes, z, codebook, layout)


def test_float64_codes_equal_brute_force():
    z, codebook = helpers.random_group(RAGGED, 200, seed=0, dtype=torch.float64)
    best = torch.stack([d.argmin(1) for d in helpers.distances64(z, codebook, RAGGED)], 1)
    assert torch.equal(vq_assign(z, codebook, RAGGED).codes, best)


def test_codes_do_not_depend_on_the_block_size(monkeypatch):
    z, codebook = helpers.random_group(RAGGED, 50, seed=0, dtype=torch.float64)
    whole = reference.nearest_codes(z, codebook, RAGGED)
    monkeypatch.setattr(reference, "_MAX_DISTANCES", 7 * RAGGED.groups * RAGGED.max_codes)
    assert torch.equal(reference.nearest_codes(z, codebook, RAGGED), whole)
    monkeypatch.setattr(reference, "_MAX_DISTANCES", 1)
    assert torch.equal(reference.nearest_codes(z, codebook, RAGGED), whole)


@given(st.integers(2, 40), st.integers(1, 70), st.integers(1, 9), st.data())
def test_equal_codes_give_the_lowest_index(K, D, rows, data):
    layout = CodebookLayout.of([K], [D])
    source = torch.tensor(data.draw(st.lists(st.integers(0, K - 1), min_size=K, max_size=K)))
    _, codebook = helpers.random_group(layout, 0, seed=K * D)
    codes = codebook.view(K, D)[source]
    first = torch.tensor([source.tolist().index(s) for s in source.tolist()])
    actual = vq_assign(torch.randn(rows, D, generator=torch.Generator().manual_seed(D)), codes.flatten(), layout).codes
    assert torch.equal(actual, first[actual])


def test_ties_go_to_the_lowest_index():
    layout = CodebookLayout.of([4], [2])
    codebook = torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).flatten()
    assert vq_assign(torch.zeros(3, 2), codebook, layout).codes.tolist() == [[1]] * 3


@pytest.mark.parametrize("D", [4, 32, 64])
def test_data_far_from_the_origin_keeps_the_nearest_code(D):
    layout = CodebookLayout.of([24, 7], [D, D])
    z, codebook = helpers.random_group(layout, 300, seed=0)
    z, codebook = 5.0 + 0.1 * z, 5.0 + 0.1 * codebook
    helpers.assert_nearest(vq_assign(z, codebook, layout).codes, z, codebook, layout)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nonfinite_rows_have_no_code_and_are_not_counted(bad):
    z, codebook = helpers.random_group(RAGGED, 12, seed=0)
    z[3, RAGGED.column_slice(1)] = bad
    z[5, RAGGED.column_slice(0).start] = bad
    z[7] = bad
    valid = torch.ones(12, RAGGED.groups, dtype=torch.bool)
    valid[3, 1] = valid[5, 0] = False
    valid[7] = False
    actual = vq_assign(z, codebook, RAGGED)
    assert torch.equal(actual.codes >= 0, valid)
    assert (actual.codes[~valid] == -1).all()
    for g, part in enumerate(helpers.split_columns(actual.quantized, RAGGED)):
        assert torch.equal(part.isnan().all(1), ~valid[:, g])
        assert torch.equal(part.isnan().any(1), ~valid[:, g])
    clean = z.masked_fill(~z.isfinite(), 0.0)
    helpers.assert_nearest(
        torch.where(valid, actual.codes, vq_assign(clean, codebook, RAGGED).codes), clean, codebook, RAGGED
    )
    assert_consistent(actual, z, codebook, RAGGED, valid)


def test_nonfinite_codes_are_never_selected():
    z, codebook = helpers.random_group(SMALL, 30, seed=0)
    codebook[3:6] = NAN  # code 1 of codebook 0
    codebook[15:17] = INF  # code 0 of codebook 1
    codes = vq_assign(z, codebook, SMALL).codes
    assert 1 not in codes[:, 0]
    assert 0 not in codes[:, 1]
    assert (codes >= 0).all()


def test_no_code_is_assigned_if_all_codes_are_nonfinite():
    actual = vq_assign(torch.zeros(4, 5), torch.full((21,), NAN), SMALL)
    assert (actual.codes == -1).all()
    assert not actual.counts.any()


def test_masked_rows_are_excluded():
    z, codebook = helpers.random_group(RAGGED, 20, seed=0)
    mask = torch.arange(20) % 3 != 0
    z[0] = NAN
    actual, alone = vq_assign(z, codebook, RAGGED, mask), vq_assign(z[mask], codebook, RAGGED)
    assert (actual.codes[~mask] == -1).all()
    assert not actual.quantized[~mask].any()
    assert torch.equal(actual.codes[mask], alone.codes)
    for name in ("counts", "sums", "squared_error"):
        torch.testing.assert_close(getattr(actual, name), getattr(alone, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_of_half_precision_are_compared_as_float32(dtype):
    z, codebook = helpers.random_group(RAGGED, 40, seed=0)
    z = z.to(dtype)
    actual = vq_assign(z, codebook, RAGGED)
    assert actual.quantized.dtype == actual.sums.dtype == torch.promote_types(dtype, torch.float32)
    helpers.assert_nearest(actual.codes, z.float(), codebook, RAGGED)


def test_float64_latents_are_compared_in_float64():
    """The distances to both codes are equal in float32."""
    codebook = torch.tensor([0.0, 1.0])
    z = torch.tensor([[0.5 + 1e-12], [0.5 - 1e-12]], dtype=torch.float64)
    actual = vq_assign(z, codebook, CodebookLayout.of([2], [1]))
    assert actual.quantized.dtype == torch.float64
    assert actual.codes.flatten().tolist() == [1, 0]


def test_latents_may_be_strided():
    z, codebook = helpers.random_group(SMALL, 20, seed=0)
    expected = vq_assign(z, codebook, SMALL)
    for view in (z.t().contiguous().t(), torch.stack([z, z], 2)[:, :, 0], z.repeat_interleave(2, 0)[::2]):
        assert not view.is_contiguous()
        actual = vq_assign(view, codebook, SMALL)
        assert torch.equal(actual.codes, expected.codes)
        assert torch.equal(actual.sums, expected.sums)


def test_assignment_is_not_differentiable_by_default():
    z, codebook = helpers.random_group(SMALL, 4, seed=0)
    actual = vq_assign(z.requires_grad_(), codebook.requires_grad_(), SMALL)
    assert not any(
        part.requires_grad
        for part in (actual.codes, actual.quantized, actual.squared_error, actual.counts, actual.sums)
    )


@pytest.mark.parametrize(
    ("z", "codebook"),
    [(torch.zeros(4, 6), torch.zeros(21)), (torch.zeros(5), torch.zeros(21)), (torch.zeros(4, 5), torch.zeros(7, 3))],
)
def test_wrong_shapes_are_rejected(z, codebook):
    with pytest.raises(ValueError, match="must be"):
        vq_assign(z, codebook, SMALL)


def test_straight_through_returns_the_code_and_passes_the_gradient_to_the_latent():
    z, codebook = helpers.random_group(SMALL, 6, seed=0)
    z.requires_grad_()
    actual = vq_assign(z, codebook, SMALL)
    out = quantize(z, actual.quantized, SMALL)
    upstream = torch.randn(6, 5)
    out.backward(upstream)
    assert torch.equal(out, actual.quantized)
    assert torch.equal(z.grad, upstream)


def test_straight_through_returns_a_copy():
    z, codebook = helpers.random_group(SMALL, 6, seed=0)
    actual = vq_assign(z, codebook, SMALL)
    before = actual.quantized.clone()
    quantize(z.requires_grad_(), actual.quantized, SMALL).mul_(2.0)
    assert torch.equal(actual.quantized, before)


def test_rotation_returns_the_code():
    z, codebook = helpers.random_group(RAGGED, 40, seed=0)
    actual = vq_assign(z, codebook, RAGGED)
    out = quantize(z, actual.quantized, RAGGED, rotation_trick=True)
    # The error of R z is largest where z and q are nearly opposite, since it is divided by |z^ + q^|.
    torch.testing.assert_close(out, actual.quantized, rtol=1e-4, atol=1e-4)
    double = quantize(z.double(), actual.quantized, RAGGED, rotation_trick=True)
    torch.testing.assert_close(double, actual.quantized.double(), rtol=1e-12, atol=1e-12)


def rotation(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Rotation matrix in the plane of z and q that carries z to the direction of q, from cosine and sine."""
    a = z / z.norm()
    orthogonal = q - (q @ a) * a
    b = orthogonal / orthogonal.norm()
    cos, sin = (q @ a) / q.norm(), orthogonal.norm() / q.norm()
    plane = torch.outer(a, a) + torch.outer(b, b)
    return torch.eye(len(z)) - plane + cos * plane + sin * (torch.outer(b, a) - torch.outer(a, b))


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
def test_rotation_gradient_equals_that_of_the_rotation_matrix():
    layout = CodebookLayout.of([5, 3, 4], [3, 2, 6])
    z, codebook = helpers.random_group(layout, 7, seed=0, dtype=torch.float64)
    z.requires_grad_()
    q = vq_assign(z, codebook, layout).quantized
    upstream = torch.randn(7, layout.total_dims)
    quantize(z, q, layout, rotation_trick=True).backward(upstream)
    parts = (helpers.split_columns(t, layout) for t in (z.detach(), q, upstream))
    expected = [
        torch.stack([c.norm() / a.norm() * rotation(a, c).t() @ up for a, c, up in zip(*part, strict=True)])
        for part in zip(*parts, strict=True)
    ]
    torch.testing.assert_close(z.grad, torch.cat(expected, 1))


@pytest.mark.parametrize("scale", [1.0, -1.0, 3.0, -0.5])
def test_rotation_of_a_latent_parallel_to_its_code(scale):
    layout = CodebookLayout.of([1], [3])
    q = torch.tensor([[1.0, 2.0, -2.0]])
    z = (scale * q).requires_grad_()
    out = quantize(z, q, layout, rotation_trick=True)
    out.sum().backward()
    torch.testing.assert_close(out, q)
    assert z.grad.isfinite().all()


def test_lookup_returns_the_code_vectors():
    z, codebook = helpers.random_group(RAGGED, 9, seed=0)
    actual = vq_assign(z, codebook, RAGGED)
    assert torch.equal(lookup(actual.codes, codebook, RAGGED), actual.quantized)
    assert lookup(actual.codes[:0], codebook, RAGGED).shape == (0, RAGGED.total_dims)


@pytest.mark.parametrize("token", [-1, 3, 4, 2**40])
def test_lookup_outside_a_codebook_names_row_and_codebook(token):
    codes = torch.tensor([[0, 0], [4, token]])
    with helpers.raises_one_line(IndexError, str(token), "row 1", "codebook 1", "3 codes"):
        lookup(codes, torch.zeros(21), SMALL)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 2, 2)])
def test_lookup_rejects_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\[N, 2\]"):
        lookup(torch.zeros(shape, dtype=torch.int64), torch.zeros(21), SMALL)


@pytest.mark.parametrize(
    ("dtype", "K"),
    [
        (torch.uint8, 100),
        (torch.uint8, 256),
        (torch.int8, 128),
        (torch.int16, 300),
        (torch.uint16, 300),
        (torch.int32, 300),
    ],
)
def test_lookup_accepts_narrow_integer_types(dtype, K):
    layout = CodebookLayout.of([K, 3], [2, 2])
    _, codebook = helpers.random_group(layout, 0, seed=0)
    codes = torch.tensor([[K - 1, 2], [0, 0]])
    assert torch.equal(lookup(codes.to(dtype), codebook, layout), lookup(codes, codebook, layout))


def test_lookup_is_differentiable_by_the_codebook():
    codebook = torch.randn(21, dtype=torch.float64, requires_grad=True)
    codes = torch.tensor([[0, 2], [4, 2], [0, 0]])
    torch.autograd.gradcheck(lambda c: lookup(codes, c, SMALL), codebook)


@pytest.mark.parametrize(("offset", "spread"), [(5.0, 0.1), (5.0, 0.01), (100.0, 0.1), (-3e4, 10.0)])
def test_codes_far_from_the_origin_are_distinguished(offset, spread):
    layout = CodebookLayout.of([64, 7], [64, 3])
    z, codebook = helpers.random_group(layout, 500, seed=3)
    z, codebook = offset + spread * z, offset + spread * codebook
    codes = vq_assign(z, codebook, layout).codes
    for g, distance in enumerate(helpers.distances64(z, codebook, layout)):
        best, second = distance.topk(2, largest=False).values.unbind(1)
        chosen = distance.gather(1, codes[:, g : g + 1])[:, 0]
        assert ((chosen == best) | (second - best < 1e-5 * second)).all()
