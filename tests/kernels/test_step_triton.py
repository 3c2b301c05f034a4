"""Triton kernels of a training step of `VectorQuantize` against the reference in float64."""

import os

import pytest
import torch

from spinlock_fast.kernels.residual_vq import eager, reference
from spinlock_fast.kernels.residual_vq.reference import Averages, Stages

pytest.importorskip("triton", reason="the package triton is not installed here")
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "1", reason="kernels are compiled here: the GPU tests run them"
)
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN in the interpreter
# Codebooks, codes, dimensions, rows.
SIZES = {"ragged tiles": (1, 7, 20, 33), "heads, wide": (2, 3, 70, 17), "one code": (1, 1, 2, 1)}
DECAY, EPSILON, WEIGHT = 0.9, 1e-3, 0.3


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """`torch.empty` and `torch.empty_like` return NaN or -77, which reveals elements that no kernel writes."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else -77)

        monkeypatch.setattr(torch, name, poisoned)


def inputs(size, cosine, device, dtype=torch.float32):
    """Rows [N, G * D], codes [G, K, D] and their moving averages."""
    G, K, D, N = size
    generator = torch.Generator().manual_seed(N + D)
    x, codebook = torch.randn(N, G * D, generator=generator), torch.randn(G, K, D, generator=generator)
    codebook = torch.nn.functional.normalize(codebook, dim=-1) if cosine else codebook
    size = 1.0 + torch.rand(G, K, generator=generator)
    averages = Averages(size, codebook * size[..., None], torch.zeros(G, K, dtype=torch.int64))
    return x.to(device, dtype), codebook.to(device), Averages(*(tensor.to(device) for tensor in averages))


def options(cosine, gradient, heads):
    return eager.StepOptions(cosine, gradient, WEIGHT, heads, DECAY, EPSILON, "triton")


def expected_step(x, codebook, averages, cosine, gradient):
    """Outputs, codes [N, G], loss, counts and sums by the formulas in float64; updates `averages` and `codebook`."""
    (G, K, D), stages = codebook.shape, Stages([codebook.shape[1]], None, cosine, gradient)
    quantized, codes, loss, counts, sums = [], [], 0.0, [], []
    for g in range(G):
        rows = x.view(-1, G, D)[:, g]
        _, code, _, count, total = reference.assign(rows.detach(), codebook[g], stages, True)
        output, error = reference.surrogate(rows, codebook[g], code, stages)
        quantized.append(output)
        codes.append(code)
        loss = loss + error[0] * WEIGHT / x.numel()
        counts.append(count)
        sums.append(total)
        n = averages.cluster_size[g].mul_(DECAY).add_(count, alpha=1 - DECAY)
        s = averages.code_sum[g].mul_(DECAY).add_(total, alpha=1 - DECAY)
        averages.usage[g] += count.to(torch.int64)
        codebook[g] = s / ((n + EPSILON) / (n.sum() + K * EPSILON) * n.sum())[:, None]
        codebook[g] = reference.unit(codebook[g]) if cosine else codebook[g]
    return torch.stack(quantized, 1).view(x.shape), torch.cat(codes, 1), loss, torch.stack(counts), torch.stack(sums)


def wide(x, codebook, averages):
    n, s, usage = averages
    return x.detach().double().requires_grad_(), codebook.double(), Averages(n.double(), s.double(), usage.clone())


@on_devices
@pytest.mark.parametrize("gradient", ["none", "straight_through", "rotation"])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=pytest.mark.slow if size == "heads, wide" else ()) for size in SIZES]
)
def test_step_matches_float64(size, cosine, gradient, device):
    x, codebook, averages = inputs(SIZES[size], cosine, device)
    G, N = len(codebook), len(x)
    bad = [3, 5] if N > 5 else []
    if bad:
        x[3] = 0.0  # the output of a zero row is 0 under the rotation trick
        x[5, 0] = torch.nan
    rows = [i for i in range(N) if i not in bad]
    exact, exact_codebook, exact_averages = wide(x, codebook, averages)
    leaf = x.clone().requires_grad_()
    quantized, codes, loss = eager.quantize_step(leaf, codebook, options(cosine, gradient, G), averages)
    expected = expected_step(exact, exact_codebook, exact_averages, cosine, gradient)
    assert torch.equal(codes.view(N, G), expected[1])
    torch.testing.assert_close(quantized.double(), expected[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(loss.double(), expected[2], rtol=1e-4, atol=1e-6, equal_nan=True)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(codebook, exact_codebook, **close)
    torch.testing.assert_close(averages, exact_averages, **close)
    weight = torch.linspace(-1, 1, x.shape[1], device=device)
    for outputs, total in ((quantized, loss), (expected[0], expected[2])):
        term = (outputs[rows] * weight).sum() if gradient != "none" else 0.0
        (term + total).backward()
    torch.testing.assert_close(leaf.grad[rows].double(), exact.grad[rows], rtol=1e-4, atol=1e-5)
    assert leaf.grad[bad[1:]].isnan().any() == bool(bad)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows(dtype, device):
    x, codebook, averages = inputs((2, 9, 16, 50), True, device, dtype)
    exact, exact_codebook, exact_averages = wide(x, codebook, averages)
    leaf = x.clone().requires_grad_()
    quantized, codes, loss = eager.quantize_step(leaf, codebook, options(True, "rotation", 2), averages)
    expected = expected_step(exact, exact_codebook, exact_averages, True, "rotation")
    assert torch.equal(codes, expected[1])
    assert quantized.dtype == dtype
    assert loss.dtype == torch.float32
    torch.testing.assert_close(codebook.double(), exact_codebook, rtol=1e-4, atol=1e-5)
    weight = torch.linspace(-1, 1, x.shape[1], device=device)
    ((quantized.float() * weight).sum() + loss).backward()
    ((expected[0] * weight).sum() + expected[2]).backward()
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


@on_devices
def test_strided_rows_and_gradients(device):
    x, codebook, _ = inputs((1, 7, 6, 24), False, device)
    strided = x.t().contiguous().t()
    assert not strided.is_contiguous()
    found = []
    for rows, grad in (
        (x, torch.ones_like(x)),
        (strided, torch.ones((), device=device).expand_as(x)),
        (x, torch.ones_like(x).t().contiguous().t()),
    ):
        leaf = rows.detach().requires_grad_()
        quantized, codes, loss = eager.quantize_step(leaf, codebook, options(False, "rotation", 1))
        torch.autograd.backward([quantized, loss], [grad, torch.full((), 2.0, device=device)])
        found.append((quantized, codes, loss, leaf.grad))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


@on_devices
@pytest.mark.parametrize("cosine", [False, True])
def test_counts_and_sums_without_an_update(cosine, device):
    """Processes that share an update add these. Most rows have one code, in several segments."""
    x, codebook, averages = inputs((2, 9, 5, 300), cosine, device)
    x[40:] = x[0]
    before = codebook.clone()
    counts, sums = torch.empty(2, 9, device=device), torch.empty(2, 9, 5, device=device)
    _, codes, loss = eager.quantize_step(x, codebook, options(cosine, "none", 2), None, counts, sums)
    assert torch.equal(codebook, before)
    expected = expected_step(*wide(x, codebook, averages), cosine, "none")
    assert torch.equal(codes, expected[1])
    torch.testing.assert_close(loss.double(), expected[2].detach(), rtol=1e-5, atol=0)
    assert torch.equal(counts.double(), expected[3])
    torch.testing.assert_close(sums.double(), expected[4], rtol=1e-5, atol=1e-5)


@on_devices
def test_sorting_gives_the_same_bits(device, monkeypatch):
    from spinlock_fast.kernels._common import triton_code_sums

    found = []
    for limit in (triton_code_sums.MAX_SEARCHED, 0):
        monkeypatch.setattr(triton_code_sums, "MAX_SEARCHED", limit)
        x, codebook, averages = inputs((2, 3, 5, 1100), False, device)  # more rows than a program reads at once
        x[100] = torch.nan
        eager.quantize_step(x, codebook, options(False, "none", 2), averages)
        found.append((codebook, *averages))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@on_devices
def test_ties_go_to_the_lowest_index(device):
    x, codebook, _ = inputs((1, 1, 4, 40), False, device)
    repeated = (4.0 * codebook).round().repeat(1, 200, 1)
    codes = eager.quantize_step((4.0 * x).round(), repeated, options(False, "none", 1))[1]
    assert (codes == 0).all()


@on_devices
def test_second_derivative(device):
    x, codebook, _ = inputs((2, 5, 4, 6), False, device)
    leaf = x.double().float().requires_grad_()
    quantized, _, loss = eager.quantize_step(leaf, codebook, options(False, "rotation", 2))
    (grad,) = torch.autograd.grad(quantized.square().sum() + loss, leaf, create_graph=True)
    assert grad.requires_grad
    grad.square().sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().sum() > 0
