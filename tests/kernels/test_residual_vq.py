"""Residual quantization: the reference against its definition, the native kernels against the reference."""

import pytest
import torch
from torch import nn

from spinlock_fast import _native
from spinlock_fast.kernels.residual_vq import reference, residual_vq

SIZES = [(37, 5, [7, 3]), (600, 64, [33, 64, 100]), (1100, 70, [130]), (513, 600, [50, 40]), (0, 4, [3]), (50, 1, [20])]
GRADIENTS = ["none", "straight_through", "rotation"]


@pytest.fixture(params=_native.training_levels())
def level(request):
    _native.use_training_level(request.param)
    yield request.param
    _native.use_training_level(_native.training_levels()[0])


def inputs(N, D, sizes, cosine=False, masked=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(N + D)
    x = torch.randn(N, D, generator=generator, dtype=dtype)
    books = [torch.randn(K, D, generator=generator, dtype=dtype) for K in sizes]
    if cosine:
        books = [nn.functional.normalize(book, dim=1) for book in books]
    return x, books, torch.rand(N, generator=generator) > 0.3 if masked else None


def by_definition(x, books, mask, cosine, gradient):
    """Stage by stage with all distances and autograd, without regard for memory."""
    total, residual, errors, codes = torch.zeros_like(x), x, [], []
    for book in books:
        y = nn.functional.normalize(residual, dim=1, eps=1e-6) if cosine else residual
        near = y @ book.T if cosine else -torch.cdist(y, book)
        code = near.argmax(1)
        e = book[code]
        if gradient == "rotation":
            with torch.no_grad():
                u, q = y / y.norm(dim=1, keepdim=True), e / e.norm(dim=1, keepdim=True)
                r = nn.functional.normalize(u + q, dim=1)
                D = x.shape[1]
                turn = torch.eye(D, dtype=x.dtype) - 2 * r[:, :, None] * r[:, None] + 2 * q[:, :, None] * u[:, None]
                turn = turn * (e.norm(dim=1) / y.norm(dim=1))[:, None, None]
            value = (turn @ y[:, :, None])[:, :, 0]
        else:
            value = y + (e - y).detach() if gradient == "straight_through" else e
        keep = torch.ones_like(x[:, :1]) if mask is None else mask[:, None].to(x.dtype)
        total = total + value * keep
        errors.append(((y - e).square() * keep).sum())
        codes.append(code if mask is None else code.masked_fill(~mask, -1))
        residual = residual - (value * keep).detach()
    return total, torch.stack(codes, 1), torch.stack(errors)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_reference_by_definition(gradient, cosine, masked):
    x, books, mask = inputs(40, 6, [9, 5, 4], cosine, masked, torch.float64)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    total, codes, errors = by_definition(one, books, mask, cosine, gradient)
    found = residual_vq(other, books, mask, cosine=cosine, gradient=gradient)
    assert torch.equal(codes, found.codes)
    torch.testing.assert_close(found.quantized, total)
    torch.testing.assert_close(found.errors, errors)
    weight = torch.randn_like(x)
    ((total * weight).sum() + (errors * torch.tensor([0.5, 1.0, 2.0])).sum()).backward()
    ((found.quantized * weight).sum() + (found.errors * torch.tensor([0.5, 1.0, 2.0])).sum()).backward()
    torch.testing.assert_close(other.grad, one.grad)


def test_counts_and_sums():
    x, books, mask = inputs(40, 6, [9, 5], masked=True, dtype=torch.float64)
    found = residual_vq(x, books, mask)
    residual = x
    for book, counts, sums, code in zip(
        books, found.counts.split([9, 5]), found.sums.split([9, 5]), found.codes.T, strict=True
    ):
        for k in range(len(book)):
            torch.testing.assert_close(counts[k], (code == k).sum().double())
            torch.testing.assert_close(sums[k], residual[code == k].sum(0))
        residual = residual - book[code.clamp(min=0)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("shape", SIZES)
def test_native_agrees_with_float64(level, shape, cosine, masked):
    x, books, mask = inputs(*shape, cosine, masked)
    if len(x) > 3:
        x[3] = 0.0
    for gradient in GRADIENTS:
        leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        found = residual_vq(leaf, books, mask, cosine=cosine, gradient=gradient)
        exact = residual_vq(wide, [book.double() for book in books], mask, cosine=cosine, gradient=gradient)
        assert torch.equal(found.codes, exact.codes)
        for name in ("quantized", "errors", "counts", "sums"):
            torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), rtol=1e-4, atol=1e-4)
        for result in (found, exact):
            ((result.quantized * torch.linspace(-1, 1, x.shape[1])).sum() + result.errors.sum()).backward()
        if gradient != "rotation":  # a row of zeros is turned by 1e6: compared below without
            torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)
        elif len(x):
            rest = [i for i in range(len(x)) if i != 3]
            torch.testing.assert_close(leaf.grad.double()[rest], wide.grad[rest], rtol=1e-3, atol=1e-3)


def test_result_does_not_depend_on_threads():
    x, books, _ = inputs(2000, 24, [65, 33])
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(residual_vq(x, books))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name in ("quantized", "codes", "errors", "counts", "sums"):
            assert torch.equal(getattr(results[0], name), getattr(other, name)), name


def test_equal_codes_are_settled_by_the_first():
    x = torch.randn(100, 8)
    book = torch.randn(1, 8).repeat(50, 1)
    assert (residual_vq(x, [book]).codes == 0).all()


@pytest.mark.parametrize("wide", [False, True])
def test_rows_that_are_not_finite(wide):
    x, books, _ = inputs(20, 6, [9, 5], dtype=torch.float64 if wide else torch.float32)
    clean = residual_vq(x, books)
    x[4, 2] = torch.nan
    x[7, 0] = torch.inf
    found = residual_vq(x, books)
    rest = [i for i in range(20) if i not in (4, 7)]
    assert (found.codes[[4, 7]] == -1).all()
    assert torch.equal(found.codes[rest], clean.codes[rest])
    assert found.quantized[[4, 7]].isnan().all()
    assert found.errors.isnan().all()
    assert torch.isfinite(found.sums).all()
    assert found.counts.sum() == 36


def test_codes_far_from_the_origin():
    x, books, _ = inputs(200, 4, [50])
    assert torch.equal(
        residual_vq(x + 1000, [books[0] + 1000]).codes, residual_vq(x.double(), [books[0].double()]).codes
    )


def test_a_limit_leaves_stages_out():
    x, books, _ = inputs(40, 6, [9, 5, 4])
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = residual_vq(leaf, books, limit=torch.tensor(2), gradient="rotation")
    fewer = residual_vq(other, books[:2], gradient="rotation")
    assert torch.equal(found.codes[:, :2], fewer.codes)
    assert (found.codes[:, 2] == -1).all()
    assert torch.equal(found.quantized, fewer.quantized)
    assert found.counts[14:].sum() == 0
    (found.quantized.square().sum() + found.errors.sum()).backward()
    (fewer.quantized.square().sum() + fewer.errors.sum()).backward()
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("limit", [None, torch.tensor(1)])
@pytest.mark.parametrize("masked", [False, True])
def test_is_an_operator(masked, limit):
    x, books, mask = inputs(9, 3, [5, 4], masked=masked)
    sizes, packed = [5, 4], torch.cat(books)
    for gradient, with_sums in (("rotation", True), ("none", False)):
        arguments = (x.clone().requires_grad_(), packed, sizes, mask, limit, False, gradient, with_sums, "reference")
        torch.library.opcheck(torch.ops.spinlock_fast.residual_vq.default, arguments)
        codes = residual_vq(x, books, mask, limit=limit).codes
        arguments = (x, torch.ones(2), x, packed, codes, sizes, mask, limit, False, gradient, "reference")
        torch.library.opcheck(torch.ops.spinlock_fast.residual_vq_backward.default, arguments)


def test_codes_may_move_before_the_backward_pass():
    x, books, _ = inputs(40, 6, [9])
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = residual_vq(one, books, gradient="rotation").errors.sum()
    moving = books[0].clone()
    found = residual_vq(other, [moving], gradient="rotation").errors.sum()
    moving.mul_(2.0)
    expected.backward()
    found.backward()
    assert torch.equal(one.grad, other.grad)


def test_shapes_that_do_not_fit_are_refused():
    x, books, _ = inputs(9, 3, [5])
    with pytest.raises(ValueError, match=r"codebooks\[0\] must be \[K_0, 3\], got \[5, 2\]$"):
        residual_vq(x, [books[0][:, :2]])
    with pytest.raises(TypeError, match=r"mask must be \[9\] bool"):
        residual_vq(x, books, torch.ones(9))


def test_rotation_of_a_zero_row_is_zero():
    x = torch.zeros(2, 4)
    book = torch.randn(3, 4)
    assert residual_vq(x, [book], gradient="rotation").quantized.abs().sum() == 0
    assert residual_vq(x, [book]).quantized.abs().sum() > 0


def test_reference_in_blocks(monkeypatch):
    x, books, _ = inputs(50, 6, [9])
    whole = reference.nearest(x, books[0], False)
    monkeypatch.setattr(reference, "_MAX_DISTANCES", 40)
    assert torch.equal(reference.nearest(x, books[0], False), whole)
