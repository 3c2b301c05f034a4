"""Triton kernels of vq_assign and ema_update: on a CUDA device if present, else under Triton's interpreter."""

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.ema_update import code_usage, ema_update
from spinlock_fast.kernels.vq_assign import vq_assign

pytest.importorskip("triton", reason="the package triton is not installed here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # NaN in the interpreter
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
RAGGED = CodebookLayout.of([15, 7, 6, 28, 1, 13], [4, 16, 24, 8, 5, 1])
STREAMED = CodebookLayout.of([6, 4, 2], [5, 40, 1])
MORE_CODES = CodebookLayout.of([18, 7, 3], [5, 40, 1])  # more than a tile of the kernels that add sums, 16 codes
SIZES = st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=4)
NAN, INF = float("nan"), float("inf")


def by_kernel(z, codebook, layout, **options):
    """`vq_assign` with backend "triton"."""
    options = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in options.items()}
    return vq_assign(z.to(DEVICE), codebook.to(DEVICE), layout, backend="triton", **options)


@pytest.fixture(params=["tile", "streamed"])
def layout(request, monkeypatch):
    """A layout for each of the two kernels. The interpreter runs a program per code, so that few codes are streamed."""
    if request.param == "tile":
        return RAGGED
    return streamed(STREAMED, monkeypatch)


@pytest.fixture(params=["tile", "streamed"])
def larger_layout(request, monkeypatch):
    return RAGGED if request.param == "tile" else streamed(MORE_CODES, monkeypatch)


def streamed(layout, monkeypatch):
    """The layout, whose first codebook is streamed and takes two launches of the update."""
    from spinlock_fast.kernels.ema_update import triton_update
    from spinlock_fast.kernels.vq_assign import reference, triton_forward

    largest = layout.max_codes - 2
    monkeypatch.setattr(triton_update, "MAX_FUSED", largest)
    for module in (reference, triton_forward):
        monkeypatch.setattr(module, "MAX_TILE_CODES", largest)
    return layout


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """`torch.empty` returns NaN or -77, which reveals elements that no kernel writes."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(NAN if tensor.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)


def assert_agrees(actual, z, codebook, layout, mask=None):
    """Codes are nearest; values, errors, counts and sums agree with these codes."""
    z, codebook = z.float(), codebook.float()
    codes = actual.codes.cpu()
    valid = torch.isfinite(z)
    expected_valid = torch.stack([v.all(1) for v in helpers.split_columns(valid, layout)], 1)
    if mask is not None:
        expected_valid &= mask[:, None]
    assert torch.equal(codes >= 0, expected_valid)
    clean = torch.where(valid, z, 0.0)
    reference = vq_assign(clean, codebook, layout, backend="reference").codes
    helpers.assert_nearest(torch.where(expected_valid, codes, reference), clean, codebook, layout)
    quantized = helpers.split_columns(actual.quantized.cpu(), layout)
    codebooks = helpers.split_codebooks(codebook, layout)
    eps = torch.finfo(torch.float32).eps
    errors, counts, sums, size = [], [], [], []
    for g, part in enumerate(helpers.split_columns(z, layout)):
        rows = expected_valid[:, g]
        assert torch.equal(quantized[g][rows], codebooks[g][codes[rows, g]])
        masked = torch.zeros_like(rows) if mask is None else ~mask.cpu()
        assert quantized[g][~rows & ~masked].isnan().all()
        assert (quantized[g][masked] == 0.0).all()
        one_hot = torch.nn.functional.one_hot(codes[rows, g], layout.num_codes[g]).double()
        counts.append(one_hot.sum(0))
        sums.append((one_hot.t() @ part[rows].double()).flatten())
        size.append((one_hot.t() @ part[rows].double().abs()).flatten())
        errors.append((part[rows].double() - codebooks[g][codes[rows, g]].double()).square().sum())
    assert torch.equal(actual.counts.cpu().double(), torch.cat(counts))
    # Three TF32 products keep 22 bits of a latent; a sum of 64 terms has 64 rounding errors of eps / 2.
    assert ((actual.sums.cpu().double() - torch.cat(sums)).abs() <= (2 + 32) * eps * torch.cat(size) + 1e-30).all()
    torch.testing.assert_close(actual.squared_error.cpu().double(), torch.stack(errors), rtol=2e-6, atol=1e-30)


@settings(max_examples=10)
@given(SIZES, st.integers(0, 150), st.booleans(), st.integers(0, 2**31))
def test_assignment_of_any_shape(sizes, rows, centred, seed):
    layout = CodebookLayout.of(*zip(*sizes, strict=True))
    z, codebook = helpers.random_group(layout, rows, seed=seed)
    assert_agrees(by_kernel(z, codebook, layout, centred=centred), z, codebook, layout)


@pytest.mark.parametrize(("K", "D"), [(1, 1), (1, 9), (2, 1), (64, 128), (65, 3), (64, 17), (257, 65)])
@pytest.mark.parametrize("rows", [1, 65])
def test_assignment_at_tile_boundaries(K, D, rows):
    layout = CodebookLayout.of([K], [D])
    z, codebook = helpers.random_group(layout, rows, seed=K)
    assert_agrees(by_kernel(z, codebook, layout), z, codebook, layout)


def test_many_rows_give_partial_sums(larger_layout, monkeypatch):
    from spinlock_fast.kernels.vq_assign import reference

    monkeypatch.setattr(reference, "_MAX_PARTS", 2 * larger_layout.groups)
    z, codebook = helpers.random_group(larger_layout, 200, seed=1)
    actual = by_kernel(z, codebook, larger_layout)
    assert_agrees(actual, z, codebook, larger_layout)
    assert actual.count_parts.shape == (2 if larger_layout is RAGGED else 1, larger_layout.total_codes)


def test_codes_with_many_rows_are_summed_in_segments(larger_layout):
    z, codebook = helpers.random_group(larger_layout, 400, seed=2)
    z[50:] = z[0]
    assert_agrees(by_kernel(z, codebook, larger_layout), z, codebook, larger_layout)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nonfinite_rows(layout, bad):
    z, codebook = helpers.random_group(layout, 12, seed=0)
    z[3, layout.column_slice(1)] = bad
    z[5, 0] = bad
    z[7] = bad
    assert_agrees(by_kernel(z, codebook, layout), z, codebook, layout)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nonfinite_codes_are_never_selected(layout, bad):
    z, codebook = helpers.random_group(layout, 40, seed=0)
    vectors = helpers.split_codebooks(codebook, layout)[1]
    vectors[2] = bad
    codes = by_kernel(z, codebook, layout).codes
    assert (codes >= 0).all()
    assert 2 not in codes[:, 1]
    vectors[:] = bad
    assert (by_kernel(z, codebook, layout).codes[:, 1] == -1).all()


def test_masked_rows_are_excluded(layout):
    z, codebook = helpers.random_group(layout, 90, seed=0)
    mask = torch.arange(90) % 3 != 0
    z[0] = NAN
    assert_agrees(by_kernel(z, codebook, layout, mask=mask), z, codebook, layout, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_in_half_precision(layout, dtype):
    z, codebook = helpers.random_group(layout, 70, seed=0)
    z = z.to(dtype)
    actual = by_kernel(z, codebook, layout)
    assert actual.quantized.dtype == actual.sums.dtype == torch.float32
    assert_agrees(actual, z, codebook, layout)


def test_latents_may_be_strided(layout):
    z, codebook = helpers.random_group(layout, 20, seed=0)
    wide = torch.full((20, layout.total_dims + 3), NAN)
    wide[:, 1 : layout.total_dims + 1] = z
    for view in (wide[:, 1 : layout.total_dims + 1], z.t().contiguous().t(), z.repeat_interleave(2, 0)[::2]):
        assert_agrees(by_kernel(view, codebook, layout), z, codebook, layout)


def test_masks_may_be_strided(layout):
    z, codebook = helpers.random_group(layout, 40, seed=0)
    mask = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.7
    strided = torch.stack([mask, ~mask], 1)[:, 0]
    assert not strided.is_contiguous()
    actual, expected = (by_kernel(z, codebook, layout, mask=m) for m in (strided, mask))
    assert torch.equal(actual.codes, expected.codes)
    assert torch.equal((actual.codes[:, 0] < 0).cpu(), ~mask)


@settings(max_examples=10)
@given(st.integers(2, 90), st.integers(1, 20), st.data())
def test_equal_codes_give_the_lowest_index(K, D, data):
    layout = CodebookLayout.of([K], [D])
    source = torch.tensor(data.draw(st.lists(st.integers(0, K - 1), min_size=K, max_size=K)))
    # Integers have exact distances; NumPy, which computes products in the interpreter, rounds columns differently.
    z, codebook = ((4.0 * part).round() for part in helpers.random_group(layout, 9, seed=K * D))
    codes = codebook.view(K, D)[source]
    first = torch.tensor([codes.tolist().index(code) for code in codes.tolist()])
    actual = by_kernel(z, codes.flatten(), layout, centred=False).codes.cpu()
    assert torch.equal(actual, first[actual])


@pytest.mark.parametrize(("offset", "spread"), [(5.0, 0.1), (100.0, 0.1), (-3e4, 10.0)])
def test_data_far_from_the_origin(layout, offset, spread):
    # Both |e|^2 - 2 z.e without centring and plain TF32 products fail here.
    z, codebook = helpers.random_group(layout, 200, seed=3)
    z, codebook = offset + spread * z, offset + spread * codebook
    codes = by_kernel(z, codebook, layout).codes.cpu()
    for g, distance in enumerate(helpers.distances64(z, codebook, layout)):
        chosen = distance.gather(1, codes[:, g : g + 1])[:, 0]
        best, second = distance.topk(min(2, distance.shape[1]), largest=False).values[:, [0, -1]].unbind(1)
        assert ((chosen == best) | (second - best < 1e-5 * second)).all()


def test_results_are_bitwise_reproducible(layout):
    z, codebook = helpers.random_group(layout, 140, seed=5)
    first, again = by_kernel(z, codebook, layout), by_kernel(z, codebook, layout)
    for name in ("codes", "quantized", "error_parts", "count_parts", "sum_parts"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_match_the_reference(layout, gradient, dtype):
    z, codebook = helpers.random_group(layout, 150, seed=6)
    z[3, layout.column_slice(1)] = 0.0
    mask = torch.arange(150) % 7 != 0
    upstream, weight = torch.randn(150, layout.total_dims), torch.rand(layout.groups)
    upstream[~mask] = 0.0
    grads = []
    for backend, device in (("triton", DEVICE), ("reference", "cpu")):
        leaf = z.to(device, dtype).requires_grad_()
        actual = vq_assign(leaf, codebook.to(device), layout, mask.to(device), gradient=gradient, backend=backend)
        value = torch.where(mask.to(device)[:, None], actual.quantized, 0.0) * upstream.to(device)
        (value.sum() + (actual.squared_error * weight.to(device)).sum()).backward()
        assert leaf.grad.dtype == dtype
        grads.append(leaf.grad.cpu().float())
    scale = grads[1].abs().max()
    close = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(grads[0], grads[1], rtol=close, atol=float(close * scale))


def random_state(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    _, codebook = helpers.random_group(layout, 0, seed=seed)
    n = torch.rand(layout.total_codes, generator=generator) * 10
    n[::5] = 0.0
    counts = torch.randint(0, 6, (layout.total_codes,), generator=generator).float()
    counts[layout.code_slice(layout.groups - 1)] = 0.0  # a codebook without rows
    s, sums = (torch.randn(layout.total_entries, generator=generator) for _ in range(2))
    sums *= (counts > 0)[layout.indices(torch.device("cpu")).code_of_entry]
    return codebook, n, s, torch.full((layout.total_codes,), 1 << 24), counts, sums


@pytest.mark.parametrize("smoothing", ["none", "laplace"])
@pytest.mark.parametrize("decay", [0.99, 0.0])
def test_ema_update_matches_the_reference(larger_layout, smoothing, decay):
    results = []
    for backend, device in (("triton", DEVICE), ("reference", "cpu")):
        *state, counts, sums = (t.to(device) for t in random_state(larger_layout, 7))
        codebook, n, s, usage = state
        for step in range(4):
            parts = torch.stack([counts, torch.zeros_like(counts)]) if step % 2 else counts
            more = torch.stack([sums, torch.zeros_like(sums)]) if step % 2 else sums
            ema_update(codebook, n, s, parts, more, larger_layout, decay, smoothing, usage=usage, backend=backend)
        results.append([t.cpu() for t in state])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


@settings(max_examples=15)
@given(SIZES, st.integers(0, 2**31))
def test_code_usage_matches_the_reference(sizes, seed):
    layout = CodebookLayout.of(*zip(*sizes, strict=True))
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(-3, 9, (layout.total_codes,), generator=generator).clamp(min=0)
    counts = counts if seed % 2 else counts.float()
    ours = code_usage(counts.to(DEVICE), layout, backend="triton")
    theirs = code_usage(counts, layout, backend="reference")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)


def test_code_usage_of_zero_counts_is_zero():
    layout = CodebookLayout.of([3, 70], [1, 1])
    for figure in code_usage(torch.zeros(73, device=DEVICE), layout, backend="triton"):
        assert not figure.any()
