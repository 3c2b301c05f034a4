"""Slices of a batch, computed one by one, give the dropout, mixup and noise of the whole batch."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spinlock_fast.kernels._common.dropout import BatchSlice
from spinlock_fast.kernels._common.precision import cuda_matmul
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.augment import augmented_rows
from spinlock_fast.kernels.grouped_mlp import grouped_mlp
from spinlock_fast.kernels.latent_projection import project

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if HAS_GPU else []
ROWS = 40
CUTS = (0, 0, 21, 22, 22, ROWS)  # slices of no rows, 1 row and other numbers of rows
SLICES = [(slice(first, last), BatchSlice(first, ROWS)) for first, last in pairwise(CUTS)]
IMPLEMENTATIONS = [("native", "cpu"), ("triton", DEVICE), ("reference", DEVICE), ("float64", DEVICE)]


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda case: case[0])
def implementation(request):
    """Backend, dtype and device."""
    name, device = request.param
    if name == "triton":
        pytest.importorskip("triton", reason="the package triton is not installed here")
    backend = name if name in ("triton", "reference") else "auto"
    with cuda_matmul(tf32=False):
        yield backend, torch.float64 if name == "float64" else torch.float32, device


def normal(*shape, seed, dtype, device):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)


def networks(x, parameters, backend, batch, dropout=0.4):
    return grouped_mlp(x, *parameters, Ragged.of([3, 5]), dropout, backend, batch).transpose(0, 1)  # [B, G, E]


def projection(x, parameters, backend, batch, dropout=0.4):
    x = x.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # [G, B, E], may be overwritten
    sizes = Ragged.of([9, 4]), Ragged.of([4, 5, 4])
    return project(x, *parameters, *sizes, dropout=dropout, backend=backend, batch=batch)


def arguments(operation, dtype, device):
    """Rows [B, ...] and parameters."""
    shapes = {
        networks: [(ROWS, 8), (8, 20), (2, 20), (2, 20, 7), (2, 7)],
        projection: [(ROWS, 2, 6), (2, 6), (2, 6), (13, 6), (13,), (13,), (13,)],
    }[operation]
    x, *parameters = (normal(*shape, seed=i, dtype=dtype, device=device) for i, shape in enumerate(shapes))
    return x, parameters


def results(operation, x, parameters, backend, batch, upstream):
    """The output and the gradients, and the next random number of the generator."""
    torch.manual_seed(3)
    leaves = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    out = operation(leaves[0], leaves[1:], backend, batch)
    grads = torch.autograd.grad(out, leaves, upstream)
    return out, grads, float(torch.rand((), device=x.device))


@pytest.mark.parametrize("operation", [networks, projection])
def test_slices_equal_the_whole_batch(implementation, operation):
    backend, dtype, device = implementation
    x, parameters = arguments(operation, dtype, device)
    torch.manual_seed(0)
    upstream = torch.randn_like(operation(x, parameters, backend, None))
    whole, whole_grads, whole_next = results(operation, x, parameters, backend, None, upstream)
    parts = [results(operation, x[s], parameters, backend, batch, upstream[s]) for s, batch in SLICES]
    assert_equal_rows(torch.cat([out for out, _, _ in parts]), whole, backend, dtype)
    assert all(part_next == whole_next for _, _, part_next in parts)
    close = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.cat([grads[0] for _, grads, _ in parts]), whole_grads[0], **close)
    for place, expected in enumerate(whole_grads[1:], 1):
        summed = torch.stack([grads[place] for _, grads, _ in parts]).sum(0)
        torch.testing.assert_close(summed, expected, **close)


def assert_equal_rows(found: Tensor, expected: Tensor, backend: str, dtype: torch.dtype) -> None:
    """Bitwise, where the result of a row does not depend on its place and on the number of rows.

    BLAS libraries, which also compute the products of the Triton interpreter, choose their routines by both.
    """
    interpreted = backend == "triton" and not found.is_cuda
    if backend == "reference" or interpreted or dtype == torch.float64:
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dropout", [0.5, 1.0])
@pytest.mark.parametrize("operation", [networks, projection])
def test_a_slice_of_all_rows_is_the_batch(implementation, operation, dropout):
    backend, dtype, device = implementation
    x, parameters = arguments(operation, dtype, device)
    found = []
    for batch in (None, BatchSlice(0, ROWS)):
        torch.manual_seed(5)
        found.append(operation(x, parameters, backend, batch, dropout))
    assert torch.equal(*found)


@pytest.mark.parametrize(("mixup", "noise"), [(0.4, 0.1), (0.4, 0.0)])
def test_slices_of_augmented_rows_equal_the_whole_batch(implementation, mixup, noise):
    backend, dtype, device = implementation
    x = normal(50, 37, seed=0, dtype=dtype, device=device)
    rows = torch.randint(50, (ROWS,), generator=torch.Generator().manual_seed(1)).to(device)
    decay = torch.full((1,), 0.7, device=device)

    def augmented(part, batch, next_row):
        torch.manual_seed(3)
        pair = augmented_rows(x, rows[part], mixup, noise, decay, backend, batch, next_row)
        return *pair, torch.rand(1, device=device)

    whole = augmented(slice(0, ROWS), None, None)
    parts = [augmented(s, batch, rows[s.stop % ROWS][None]) for s, batch in SLICES]
    targets, inputs, numbers = zip(*parts, strict=True)
    assert torch.equal(torch.cat(targets), whole[0])
    assert torch.equal(torch.cat(inputs), whole[1])
    assert all(torch.equal(number, whole[2]) for number in numbers)


def test_rows_outside_of_the_batch_are_refused():
    x, parameters = arguments(networks, torch.float32, "cpu")
    embedding, projection_parameters = arguments(projection, torch.float32, "cpu")
    rows = torch.arange(ROWS)
    for batch in (BatchSlice(-1, 200), BatchSlice(161, 200), BatchSlice(0, ROWS - 1)):
        message = f"{ROWS} rows from row {batch.first} on are not a slice of a batch of {batch.total} rows"
        with pytest.raises(ValueError, match=message):
            networks(x, parameters, "auto", batch)
        with pytest.raises(ValueError, match=message):
            projection(embedding, projection_parameters, "auto", batch)
        with pytest.raises(ValueError, match=message):
            augmented_rows(x, rows, 0.1, batch=batch)
    with pytest.raises(ValueError, match="next_row"):
        augmented_rows(x, rows, 0.1, next_row=rows[:2])


@pytest.mark.parametrize("operation", [networks, projection])
def test_torch_func_gradients_of_slices(operation):
    x, parameters = arguments(operation, torch.float64, "cpu")

    def value(rows, batch):
        torch.manual_seed(3)
        return operation(rows, parameters, "auto", batch).square().sum()

    whole = torch.func.grad(value)(x, None)
    parts = [torch.func.grad(value)(x[s], batch) for s, batch in SLICES if s.stop > s.start]
    torch.testing.assert_close(torch.cat(parts), whole)
