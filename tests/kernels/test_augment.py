"""Augmented rows: by PyTorch's operators, and by the kernel (interpreted where there is no CUDA device)."""

import pytest
import torch

from spinlock_fast.kernels.augment import augmented_rows

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if HAS_GPU else []
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


@pytest.fixture(autouse=True)
def _seeded(request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        pytest.importorskip("triton", reason="the package triton is not installed here")
    torch.manual_seed(0)


def rows_of(N=50, F=37, B=301):
    x = torch.randn(N, F, device=DEVICE)
    return x, torch.randint(N, (B,), device=DEVICE)


def shares(x, rows, target):
    """u of every row, and how far the rows are from their lines."""
    here, there = x[rows], x[rows.roll(-1)]
    way = there - here
    square = way.square().sum(1)
    u = torch.where(square > 0, ((target - here) * way).sum(1) / square.clamp(min=1e-30), 0.0)
    return u, (target - here - u[:, None] * way).abs().max()


@BACKENDS
@pytest.mark.parametrize("shape", [(50, 37, 301), (5, 1, 1), (3, 300, 9), (700, 129, 64)])
def test_rows_lie_on_the_way_to_the_next(backend, shape):
    x, rows = rows_of(*shape)
    target, seen = augmented_rows(x, rows, mixing=0.4, backend=backend)
    assert torch.equal(target, seen)
    u, off = shares(x, rows, target)
    assert float(off) < 1e-5
    moves = (x[rows.roll(-1)] - x[rows]).abs().amax(1) > 0
    assert (u[moves] != 0.0).all()  # the last row goes towards the first
    assert float(u.abs().max()) <= 0.4 + 1e-5
    if shape[2] > 300:
        assert float(u.max()) > 0.35
        assert float(u.min()) < -0.35
        assert abs(float(u.mean())) < 0.06
        assert 0.2 < float(u.std()) < 0.26  # of a uniform distribution: 0.231


@BACKENDS
def test_the_way_may_fade(backend):
    x, rows = rows_of()
    target, _ = augmented_rows(x, rows, mixing=0.8, fade=torch.full((1,), 0.25, device=DEVICE), backend=backend)
    u, _ = shares(x, rows, target)
    assert 0.17 < float(u.abs().max()) <= 0.2 + 1e-5


@BACKENDS
def test_noise_is_normal_and_reaches_the_second_result_alone(backend):
    x, rows = rows_of(B=1200)
    target, seen = augmented_rows(x, rows, noise=0.3, backend=backend)
    assert torch.equal(target, x[rows])
    noise = (seen - target).double() / 0.3
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    assert float((noise.abs() < 1.0).double().mean()) == pytest.approx(0.6827, abs=0.01)
    assert float((noise.abs() > 2.0).double().mean()) == pytest.approx(0.0455, abs=0.005)
    for a, b in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):  # neighbours have nothing in common
        assert abs(float((a * b).mean())) < 0.02


@BACKENDS
def test_the_noise_knows_nothing_of_the_mixing(backend):
    x, rows = rows_of(F=8, B=4000)
    target, seen = augmented_rows(x, rows, 0.4, 0.1, backend=backend)
    u, _ = shares(x, rows, target)
    noise = (seen - target).flatten()[: len(u)]  # what random numbers of one row of a counter would be
    for a in (noise, noise.abs()):
        assert abs(float(torch.corrcoef(torch.stack([a, u]))[0, 1])) < 0.07


@BACKENDS
def test_every_call_draws_anew_and_a_seed_repeats_it(backend):
    x, rows = rows_of()
    torch.manual_seed(3)
    first, second = (augmented_rows(x, rows, 0.4, 0.1, backend=backend) for _ in range(2))
    torch.manual_seed(3)
    again = augmented_rows(x, rows, 0.4, 0.1, backend=backend)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1] - first[0], second[1] - second[0])


@BACKENDS
def test_without_either_rows_are_only_gathered(backend):
    x, rows = rows_of()
    target, seen = augmented_rows(x, rows, backend=backend)
    assert target is seen
    assert torch.equal(target, x[rows])


@BACKENDS
def test_strided_rows_and_no_rows(backend):
    x, rows = rows_of()
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
def test_every_replay_of_a_graph_draws_anew():
    x, rows = rows_of()
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
