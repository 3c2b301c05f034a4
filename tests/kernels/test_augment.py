"""Mixup and noise: the reference, and the kernel (interpreted without a CUDA device)."""

import pytest
import torch

from spinlock_fast.kernels.augment import augmented_rows, reference

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if HAS_GPU else []
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


@pytest.fixture(autouse=True)
def _seeded(request, monkeypatch):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        pytest.importorskip("triton", reason="the package triton is not installed here")
        if not HAS_GPU and "shape" not in request.fixturenames:
            from spinlock_fast.kernels.augment import triton_forward

            monkeypatch.setitem(triton_forward.TILES, "BLOCK_B", 128)  # the interpreter takes as long for 8 rows
    torch.manual_seed(0)


def random_batch(N=50, F=37, B=301):
    x = torch.randn(N, F, device=DEVICE)
    return x, torch.randint(N, (B,), device=DEVICE)


def mixup_coefficients(x, rows, target):
    """u of every row, and the largest distance of a row from its line."""
    here, there = x[rows], x[rows.roll(-1)]
    line = there - here
    square = line.square().sum(1)
    u = torch.where(square > 0, ((target - here) * line).sum(1) / square.clamp(min=1e-30), 0.0)
    return u, (target - here - u[:, None] * line).abs().max()


@BACKENDS
@pytest.mark.parametrize("shape", [(50, 37, 301), (5, 1, 1), (3, 300, 9), (700, 129, 64)])
def test_targets_lie_on_the_line_to_the_next_row(backend, shape):
    x, rows = random_batch(*shape)
    target, seen = augmented_rows(x, rows, mixup_scale=0.4, backend=backend)
    assert torch.equal(target, seen)
    u, off = mixup_coefficients(x, rows, target)
    assert float(off) < 1e-5
    moves = (x[rows.roll(-1)] - x[rows]).abs().amax(1) > 0
    assert (u[moves] != 0.0).all()  # the last row is paired with the first
    assert float(u.abs().max()) <= 0.4 + 1e-5
    if shape[2] > 300:
        assert float(u.max()) > 0.35
        assert float(u.min()) < -0.35
        assert abs(float(u.mean())) < 0.06
        assert 0.2 < float(u.std()) < 0.26  # of a uniform distribution: 0.231


@BACKENDS
def test_backends_agree_with_the_reference(backend):
    """With the u and the noise of the call, which its results determine."""
    x, rows = random_batch()
    target, inputs = augmented_rows(x, rows, 0.4, 0.1, backend=backend)
    u, _ = mixup_coefficients(x, rows, target)
    expected = reference.augmented_rows(x, rows, u[:, None], inputs - target)
    torch.testing.assert_close((target, inputs), expected, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_mixup_decay_multiplies_the_scale(backend):
    x, rows = random_batch()
    target, _ = augmented_rows(
        x, rows, mixup_scale=0.8, mixup_decay=torch.full((1,), 0.25, device=DEVICE), backend=backend
    )
    u, _ = mixup_coefficients(x, rows, target)
    assert 0.17 < float(u.abs().max()) <= 0.2 + 1e-5


@BACKENDS
def test_noise_is_normal_and_only_in_the_inputs(backend):
    x, rows = random_batch(B=1200)
    target, seen = augmented_rows(x, rows, noise_std=0.3, backend=backend)
    assert torch.equal(target, x[rows])
    noise = (seen - target).double() / 0.3
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    assert float((noise.abs() < 1.0).double().mean()) == pytest.approx(0.6827, abs=0.01)
    assert float((noise.abs() > 2.0).double().mean()) == pytest.approx(0.0455, abs=0.005)
    for a, b in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):  # neighbours are uncorrelated
        assert abs(float((a * b).mean())) < 0.02


@BACKENDS
def test_noise_is_independent_of_mixup(backend):
    x, rows = random_batch(F=8, B=4000)
    target, seen = augmented_rows(x, rows, 0.4, 0.1, backend=backend)
    u, _ = mixup_coefficients(x, rows, target)
    noise = (seen - target).flatten()[: len(u)]  # would correlate with u if both used one counter
    for a in (noise, noise.abs()):
        assert abs(float(torch.corrcoef(torch.stack([a, u]))[0, 1])) < 0.07


@BACKENDS
def test_calls_differ_and_a_seed_repeats_them(backend):
    x, rows = random_batch()
    torch.manual_seed(3)
    first, second = (augmented_rows(x, rows, 0.4, 0.1, backend=backend) for _ in range(2))
    torch.manual_seed(3)
    again = augmented_rows(x, rows, 0.4, 0.1, backend=backend)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1] - first[0], second[1] - second[0])


@BACKENDS
def test_without_mixup_and_noise_rows_are_gathered(backend):
    x, rows = random_batch()
    target, seen = augmented_rows(x, rows, backend=backend)
    assert target is seen
    assert torch.equal(target, x[rows])


@BACKENDS
def test_strided_and_empty_batches(backend):
    x, rows = random_batch()
    wide = torch.stack([x, x + 1.0], -1)[..., 0]
    assert not wide.is_contiguous()
    torch.manual_seed(1)
    found = augmented_rows(wide, rows, 0.4, 0.1, backend=backend)
    torch.manual_seed(1)
    expected = augmented_rows(x, rows, 0.4, 0.1, backend=backend)
    assert torch.equal(found[1], expected[1])
    empty = augmented_rows(x, rows[:0], 0.4, 0.1, backend=backend)
    assert empty[0].shape == empty[1].shape == (0, 37)


@pytest.mark.skipif(not HAS_GPU, reason="a CPU has no graphs")
def test_graph_replays_draw_new_random_numbers():
    x, rows = random_batch()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        augmented_rows(x, rows, 0.4, 0.1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            target, seen = augmented_rows(x, rows, 0.4, 0.1)
        found = []
        for _ in range(2):
            graph.replay()
            found.append((target.clone(), (seen - target).clone()))
    torch.cuda.synchronize()
    assert not torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])
