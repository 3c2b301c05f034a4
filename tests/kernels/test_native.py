"""Native CPU kernels against float64, for every instruction set of this processor and several numbers of threads."""

import multiprocessing
import subprocess
import sys

import helpers
import numpy as np
import pytest
import torch
from helpers import threads

from spinlock_fast import _native
from spinlock_fast.kernels._common import native
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.code_decoders import Decoders, partial_loss
from spinlock_fast.kernels.grouped_mlp import grouped_mlp
from spinlock_fast.kernels.latent_projection import normalize_, ragged_layer_norm, scaled_output_linear
from spinlock_fast.kernels.topo_loss import topographic_correlations
from spinlock_fast.kernels.vq_assign import quantize, vq_assign

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=_native.instruction_sets())
def level(request):
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(_native.instruction_sets()[0])


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(function, inputs):
    """Outputs, and gradients of all inputs."""
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [normal(*o.shape, seed=99 + i).to(o.dtype) for i, o in enumerate(out)]
    loss = sum((o * u).sum() for o, u in zip(out, upstream, strict=True))
    grads = torch.autograd.grad(loss, leaves)
    return [o.detach() for o in out], list(grads)


def assert_as_accurate_as_torch(function, inputs):
    """The error of every output and gradient against float64 is at most twice that of PyTorch in float32."""
    native = run(function, inputs)
    with helpers.without_native_kernels():
        eager = run(function, inputs)
        exact = run(function, [i.double() for i in inputs])
    assert any(not torch.equal(a, b) for a, b in zip(native[0] + native[1], eager[0] + eager[1], strict=True)) or all(
        a.numel() < 100 for a in native[0]
    ), "the native kernels did not run"
    for ours, theirs, truth in zip(native[0] + native[1], eager[0] + eager[1], exact[0] + exact[1], strict=True):
        bound = 2.0 * (theirs - truth).norm() + 4.0 * EPS * truth.norm()
        assert (ours - truth).norm() <= bound


def mlp_inputs(sizes, rows, hidden, out):
    n, G = sum(sizes), len(sizes)
    return [
        normal(rows, n, seed=0),
        normal(n, hidden, seed=1) / max(sizes) ** 0.5,
        normal(G, hidden, seed=2),
        normal(G, hidden, out, seed=3) / hidden**0.5,
        normal(G, out, seed=4),
    ]


@pytest.mark.parametrize(
    ("sizes", "rows", "hidden", "out"),
    [
        ([1], 1, 1, 1),
        ([4, 16, 15, 1], 50, 48, 36),
        ([3, 12, 24], 13, 33, 17),
        ([7], 700, 20, 9),  # more rows than one block of the weight gradient
        ([600], 30, 1030, 40),  # more inputs than one block of the forward pass
        ([5], 20, 16, 700),
        ([2, 3], 0, 4, 5),
    ],
)
def test_two_layers(level, sizes, rows, hidden, out):
    assert_as_accurate_as_torch(lambda *a: grouped_mlp(*a, Ragged.of(sizes)), mlp_inputs(sizes, rows, hidden, out))


@pytest.mark.parametrize("shift", [-100.0, -1.0, 0.0, 100.0])  # no, few, half, all hidden values above 0
@pytest.mark.parametrize(
    ("sizes", "rows", "hidden", "out"),
    [([4, 9], 300, 100, 64), ([20], 40, 512, 256), ([6], 600, 70, 320), ([5, 3], 30, 33, 17), ([600], 30, 1030, 64)],
)
def test_two_layers_skip_zeros(level, sizes, rows, hidden, out, shift):
    x, *parameters = mlp_inputs(sizes, rows, hidden, out)
    parameters[1] += shift

    def parameters_alone(*a):
        return grouped_mlp(x.to(a[0].dtype), *a, Ragged.of(sizes))

    assert_as_accurate_as_torch(parameters_alone, parameters)
    assert_as_accurate_as_torch(lambda *a: grouped_mlp(*a, Ragged.of(sizes)), [x, *parameters])


def test_a_row_does_not_depend_on_other_rows(level):
    x, w1, b1, w2, b2 = mlp_inputs([8], 64, 512, 256)
    w1 = w1.abs()
    among_active = torch.cat([x[:1], 100.0 + x[1:]])  # all hidden values above 0: too few zeros to skip
    batches = (x[:1], x, among_active)
    alone, mixed, active = (grouped_mlp(rows, w1, b1, w2, b2, Ragged.of([8]))[0, 0] for rows in batches)
    assert torch.equal(alone, mixed)
    assert torch.equal(alone, active)


def test_layers_of_any_stride(level):
    x, w1, b1, w2, b2 = mlp_inputs([9], 20, 24, 11)
    transposed = [
        x.t().contiguous().t(),
        w1.t().contiguous().t(),
        b1,
        w2.transpose(1, 2).contiguous().transpose(1, 2),
        b2,
    ]
    actual = run(lambda *a: grouped_mlp(*a, Ragged.of([9])), transposed)
    expected = run(lambda *a: grouped_mlp(*a, Ragged.of([9])), [x, w1, b1, w2, b2])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("sizes", "rows", "width"), [([1], 1, 1), ([16, 3, 48, 5], 70, 40), ([33, 17], 600, 20)])
def test_output_layers(level, sizes, rows, width):
    n, G = sum(sizes), len(sizes)
    inputs = [
        normal(G, rows, width, seed=0),
        1.0 + 0.1 * normal(G, width, seed=1),
        normal(G, width, seed=2),
        normal(n, width, seed=3) / width**0.5,
        normal(n, seed=4),
    ]
    assert_as_accurate_as_torch(lambda *a: scaled_output_linear(*a, Ragged.of(sizes)), inputs)


@pytest.mark.parametrize(("sizes", "rows"), [([2], 1), ([4, 17, 2, 48], 130), ([5, 3], 0)])
def test_normalisation(level, sizes, rows):
    n = sum(sizes)
    inputs = [normal(rows, n, seed=0), 1.0 + 0.1 * normal(n, seed=1), normal(n, seed=2)]
    assert_as_accurate_as_torch(lambda *a: ragged_layer_norm(*a, Ragged.of(sizes)), inputs)
    assert_as_accurate_as_torch(lambda x: normalize_(x.clone()), [3.0 + normal(2, rows, 40, seed=3)])


@pytest.mark.parametrize(
    ("num_codes", "dims", "rows", "features"),
    [([1], [1], 1, 1), ([15, 7, 6, 1], [4, 16, 5, 3], 90, 33), ([600], [4], 700, 20), ([8], [3], 600, 530)],
)
def test_partial_loss(level, num_codes, dims, rows, features):
    layout = CodebookLayout.of(num_codes, dims)
    z, codebook = helpers.random_group(layout, rows, seed=0)
    actual = vq_assign(z, codebook, layout)
    x, H, G = normal(rows, features, seed=1), 40, layout.groups
    decoders = [
        normal(layout.total_dims, H, seed=2),
        normal(G, H, seed=3),
        normal(G, H, features, seed=4) / H**0.5,
        normal(G, features, seed=5),
    ]

    def loss(latents, *parameters):
        dtype = latents.dtype
        quantized = quantize(latents, actual.quantized.to(dtype), layout)
        return partial_loss(x.to(dtype), quantized, actual.codes, codebook.to(dtype), Decoders(*parameters), layout)

    assert_as_accurate_as_torch(loss, [z, *decoders])


@pytest.mark.parametrize(
    ("num_codes", "dims", "rows"),
    [([15, 7, 40], [4, 16, 48], 150), ([5], [3], 31), ([600], [9], 620), ([3, 1], [2, 5], 3)],
)
def test_topographic_correlations(level, num_codes, dims, rows):
    layout = CodebookLayout.of(num_codes, dims)
    z, codebook = helpers.random_group(layout, rows, seed=0)
    codes = vq_assign(z, codebook, layout).codes
    x = normal(rows, 20, seed=1)

    def correlations(latents):
        return topographic_correlations(x.to(latents.dtype), latents, codes, codebook.to(latents.dtype), layout)

    assert_as_accurate_as_torch(correlations, [z])


def test_result_does_not_depend_on_the_number_of_threads(level):
    layout = CodebookLayout.of([15, 7, 6], [4, 16, 5])
    z, codebook = helpers.random_group(layout, 300, seed=0)
    actual = vq_assign(z, codebook, layout)
    x = normal(300, 33, seed=1)
    decoders = [normal(25, 40, seed=2), normal(3, 40, seed=3), normal(3, 40, 33, seed=4), normal(3, 33, seed=5)]

    def everything(latents, *rest):
        mlp, parameters = rest[:5], Decoders(*rest[5:])
        torch.manual_seed(0)
        out = grouped_mlp(*mlp, Ragged.of([4, 16, 15]), 0.2)
        quantized = quantize(latents, actual.quantized, layout)
        normed = ragged_layer_norm(
            latents, decoders[1].new_ones(25), torch.zeros(25), Ragged.of(layout.dims), 1e-5, 0.1
        )
        return (
            out,
            normed,
            normalize_(out.clone().view(-1, 9)),
            partial_loss(x, quantized, actual.codes, codebook, parameters, layout),
            *topographic_correlations(x, latents, actual.codes, codebook, layout),
        )

    results = []
    for count in (1, 2, 5):
        with threads(count):
            values, grads = run(everything, [z, *mlp_inputs([4, 16, 15], 300, 48, 9), *decoders])
        results.append(values + grads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_own_threads_match_openmp():
    inputs = mlp_inputs([4, 16, 15], 100, 48, 36)
    with threads(2):
        expected = grouped_mlp(*inputs, Ragged.of([4, 16, 15]))
        _native.use_openmp(0)
        try:
            for _ in range(20):
                assert torch.equal(grouped_mlp(*inputs, Ragged.of([4, 16, 15])), expected)
        finally:
            native._share_threads_of_torch()


def dropout_mask(seed, rows, columns, rate):
    """Entries that dropout keeps, from the formula of its hash."""

    def mixed(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    out = np.empty((rows, columns), dtype=bool)
    for row in range(rows):
        key = mixed(seed ^ mixed(row))
        h = (np.arange(columns, dtype=np.uint64) * 0x9E3779B9 + (key & 0xFFFFFFFF)) % 2**32
        h = ((h ^ (h >> np.uint64(16))) * 0x7FEB352D) % 2**32
        h = ((h ^ (h >> np.uint64(15))) * ((key >> 32) | 1)) % 2**32
        out[row] = (h ^ (h >> np.uint64(16))) >= round(rate * 2**32)
    return torch.from_numpy(out)


def test_dropout_matches_the_formula(level):
    """The hidden values are 1 and the second layer is the identity, so the output is the scaled mask."""
    G, B, H, rate = 3, 20, 70, 0.3
    torch.manual_seed(5)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    torch.manual_seed(5)
    eye = torch.eye(H).repeat(G, 1, 1)
    out = grouped_mlp(
        torch.zeros(B, G), torch.zeros(G, H), torch.ones(G, H), eye, torch.zeros(G, H), Ragged.of([1] * G), rate
    )
    expected = dropout_mask(seed, G * B, H, rate).view(G, B, H) / (1.0 - rate)
    torch.testing.assert_close(out, expected.float())


def test_dropout_before_normalisation_matches_the_formula(level):
    x = normal(9, 25, seed=0).requires_grad_()
    segments = Ragged.of([4, 16, 5])
    weight, bias = torch.ones(25), torch.zeros(25)
    torch.manual_seed(5)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    torch.manual_seed(5)
    out = ragged_layer_norm(x, weight, bias, segments, 1e-5, 0.4)
    dropped = x * dropout_mask(seed, 9, 25, 0.4) / 0.6
    expected = ragged_layer_norm(dropped, weight, bias, segments)
    torch.testing.assert_close(out, expected)
    upstream = normal(9, 25, seed=1)
    for ours, theirs in zip(
        torch.autograd.grad(out, x, upstream), torch.autograd.grad(expected, x, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_dropout_masks_are_uncorrelated(rate):
    """Drop rates of rows and columns, and correlations of neighbours, over many seeds."""
    masks = torch.stack(
        [~dropout_mask(seed * 7919, 64, 256, rate) for seed in range(40)]
    ).double()  # [seeds, rows, columns]
    deviation = (rate * (1.0 - rate)) ** 0.5
    for dim in ((0, 1), (0, 2), (1, 2)):
        share = masks.mean(dim)
        count = masks.numel() / share.numel()
        assert (share - rate).abs().max() < 5.5 * deviation / count**0.5
    centred = (masks - rate) / deviation
    for a, b in (
        (centred[:, :, 1:], centred[:, :, :-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[1:], centred[:-1]),
        (centred[:, 1:, 1:], centred[:, :-1, :-1]),
    ):
        assert (a * b).mean().abs() < 5.5 / a.numel() ** 0.5


def test_nan_propagates(level):
    inputs = mlp_inputs([4, 3], 30, 20, 10)
    inputs[0][3, 1] = torch.nan
    out = grouped_mlp(*inputs, Ragged.of([4, 3]))
    assert out[0, 3].isnan().all()
    assert out[0, 4:].isfinite().all()
    assert out[1].isfinite().all()


def test_an_unknown_instruction_set_is_rejected():
    with pytest.raises(ValueError, match="abacus"):
        _native.use_instruction_set("abacus")


def test_a_forked_process_starts_its_own_threads():
    inputs = mlp_inputs([4, 16, 15], 100, 48, 36)
    with threads(2):
        expected = grouped_mlp(*inputs, Ragged.of([4, 16, 15]))
        with multiprocessing.get_context("fork").Pool(1) as pool:
            actual = pool.apply(_forked, ([i.numpy() for i in inputs],))
    assert np.array_equal(actual, expected.numpy())


def _forked(arrays):
    torch.set_num_threads(2)
    return grouped_mlp(*(torch.from_numpy(a) for a in arrays), Ragged.of([4, 16, 15])).numpy()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the address space from /proc")
def test_failed_allocation_in_a_thread_raises_memory_error():
    """A workspace of 17 MB that cannot be allocated, on two threads: MemoryError, and the process continues."""
    code = """
import resource
import numpy as np
from spinlock_fast import _native as library

K, D, N = 2**19, 8, 1024
rows, codebook = np.zeros((N, 2 * D), "f4"), np.zeros(2 * K * D, "f4")
codes, quantized, error = np.full((N, 2), -9), np.zeros((N, 2 * D), "f4"), np.zeros(2, "f4")
at = [a.ctypes.data for a in (rows, codebook, codes, quantized, error)]

def assign(num_codes):
    library.assign(at[0], 2 * D, N, at[1], 0, False, [num_codes] * 2, [D, D], *at[2:], 0, 0, 2)

library.use_openmp(0)
assign(2)  # starts the threads
assert (codes == 0).all()
pages = int(open("/proc/self/statm").read().split()[0])
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**22, most))
failed = 0
for _ in range(300):  # enough for failures in both threads
    try:
        assign(K)
    except MemoryError:
        failed += 1
print(failed, "MemoryErrors")
codes[:] = -9
assign(2)
assert (codes == 0).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "300 MemoryErrors\n"), done.stderr
