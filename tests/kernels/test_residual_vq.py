"""Residual quantization: the reference against its definition, the native kernels against the reference."""

import pytest
import torch
from torch import nn

from spinlock_fast import _native
from spinlock_fast.kernels.residual_vq import reference, residual_vq

SIZES = [(37, 5, [7, 3]), (600, 64, [33, 64, 100]), (1100, 70, [130]), (513, 600, [50, 40]), (0, 4, [3]), (50, 1, [20])]
GRADIENTS = ["none", "straight_through", "rotation"]


@pytest.fixture(params=_native.instruction_sets())
def level(request):
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(_native.instruction_sets()[0])


def inputs(N, D, sizes, cosine=False, masked=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(N + D)
    x = torch.randn(N, D, generator=generator, dtype=dtype)
    codebooks = [torch.randn(K, D, generator=generator, dtype=dtype) for K in sizes]
    if cosine:
        codebooks = [nn.functional.normalize(codebook, dim=1) for codebook in codebooks]
    return x, codebooks, torch.rand(N, generator=generator) > 0.3 if masked else None


def by_definition(x, codebooks, mask, cosine, gradient):
    """All stages with full distance matrices and autograd."""
    total, residual, errors, codes = torch.zeros_like(x), x, [], []
    for codebook in codebooks:
        y = nn.functional.normalize(residual, dim=1, eps=1e-6) if cosine else residual
        similarity = y @ codebook.T if cosine else -torch.cdist(y, codebook)
        code = similarity.argmax(1)
        e = codebook[code]
        if gradient == "rotation":
            with torch.no_grad():
                u, q = y / y.norm(dim=1, keepdim=True), e / e.norm(dim=1, keepdim=True)
                r = nn.functional.normalize(u + q, dim=1)
                D = x.shape[1]
                rotation_matrix = (
                    torch.eye(D, dtype=x.dtype) - 2 * r[:, :, None] * r[:, None] + 2 * q[:, :, None] * u[:, None]
                )
                rotation_matrix = rotation_matrix * (e.norm(dim=1) / y.norm(dim=1))[:, None, None]
            value = (rotation_matrix @ y[:, :, None])[:, :, 0]
        else:
            value = y + (e - y).detach() if gradient == "straight_through" else e
        included = torch.ones_like(x[:, :1]) if mask is None else mask[:, None].to(x.dtype)
        total = total + value * included
        errors.append(((y - e).square() * included).sum())
        codes.append(code if mask is None else code.masked_fill(~mask, -1))
        residual = residual - (value * included).detach()
    return total, torch.stack(codes, 1), torch.stack(errors)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_reference_matches_the_definition(gradient, cosine, masked):
    x, codebooks, mask = inputs(40, 6, [9, 5, 4], cosine, masked, torch.float64)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    total, codes, errors = by_definition(one, codebooks, mask, cosine, gradient)
    actual = residual_vq(other, codebooks, mask, cosine=cosine, gradient=gradient)
    assert torch.equal(codes, actual.codes)
    torch.testing.assert_close(actual.quantized, total)
    torch.testing.assert_close(actual.errors, errors)
    weight = torch.randn_like(x)
    ((total * weight).sum() + (errors * torch.tensor([0.5, 1.0, 2.0])).sum()).backward()
    ((actual.quantized * weight).sum() + (actual.errors * torch.tensor([0.5, 1.0, 2.0])).sum()).backward()
    torch.testing.assert_close(other.grad, one.grad)


def test_counts_and_sums():
    x, codebooks, mask = inputs(40, 6, [9, 5], masked=True, dtype=torch.float64)
    actual = residual_vq(x, codebooks, mask)
    residual = x
    for codebook, counts, sums, code in zip(
        codebooks, actual.counts.split([9, 5]), actual.sums.split([9, 5]), actual.codes.T, strict=True
    ):
        for k in range(len(codebook)):
            torch.testing.assert_close(counts[k], (code == k).sum().double())
            torch.testing.assert_close(sums[k], residual[code == k].sum(0))
        residual = residual - codebook[code.clamp(min=0)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("shape", SIZES)
def test_native_agrees_with_float64(level, shape, cosine, masked):
    x, codebooks, mask = inputs(*shape, cosine, masked)
    if len(x) > 3:
        x[3] = 0.0
    for gradient in GRADIENTS:
        leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        actual = residual_vq(leaf, codebooks, mask, cosine=cosine, gradient=gradient)
        exact = residual_vq(wide, [codebook.double() for codebook in codebooks], mask, cosine=cosine, gradient=gradient)
        assert torch.equal(actual.codes, exact.codes)
        for name in ("quantized", "errors", "counts", "sums"):
            torch.testing.assert_close(getattr(actual, name).double(), getattr(exact, name), rtol=1e-4, atol=1e-4)
        for result in (actual, exact):
            ((result.quantized * torch.linspace(-1, 1, x.shape[1])).sum() + result.errors.sum()).backward()
        if gradient != "rotation":  # the gradient of a zero row is scaled by 1e6, so it is compared separately
            torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)
        elif len(x):
            rest = [i for i in range(len(x)) if i != 3]
            torch.testing.assert_close(leaf.grad.double()[rest], wide.grad[rest], rtol=1e-3, atol=1e-3)


def test_result_does_not_depend_on_the_number_of_threads():
    x, codebooks, _ = inputs(2000, 24, [65, 33])
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(residual_vq(x, codebooks))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name in ("quantized", "codes", "errors", "counts", "sums"):
            assert torch.equal(getattr(results[0], name), getattr(other, name)), name


def test_ties_go_to_the_lowest_index():
    x = torch.randn(100, 8)
    codebook = torch.randn(1, 8).repeat(50, 1)
    assert (residual_vq(x, [codebook]).codes == 0).all()


@pytest.mark.parametrize("wide", [False, True])
def test_nonfinite_rows(wide):
    x, codebooks, _ = inputs(20, 6, [9, 5], dtype=torch.float64 if wide else torch.float32)
    clean = residual_vq(x, codebooks)
    x[4, 2] = torch.nan
    x[7, 0] = torch.inf
    actual = residual_vq(x, codebooks)
    rest = [i for i in range(20) if i not in (4, 7)]
    assert (actual.codes[[4, 7]] == -1).all()
    assert torch.equal(actual.codes[rest], clean.codes[rest])
    assert actual.quantized[[4, 7]].isnan().all()
    assert actual.errors.isnan().all()
    assert torch.isfinite(actual.sums).all()
    assert actual.counts.sum() == 36


def test_codes_far_from_the_origin():
    x, codebooks, _ = inputs(200, 4, [50])
    assert torch.equal(
        residual_vq(x + 1000, [codebooks[0] + 1000]).codes, residual_vq(x.double(), [codebooks[0].double()]).codes
    )


def test_limit_skips_later_stages():
    x, codebooks, _ = inputs(40, 6, [9, 5, 4])
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual = residual_vq(leaf, codebooks, limit=torch.tensor(2), gradient="rotation")
    fewer = residual_vq(other, codebooks[:2], gradient="rotation")
    assert torch.equal(actual.codes[:, :2], fewer.codes)
    assert (actual.codes[:, 2] == -1).all()
    assert torch.equal(actual.quantized, fewer.quantized)
    assert actual.counts[14:].sum() == 0
    (actual.quantized.square().sum() + actual.errors.sum()).backward()
    (fewer.quantized.square().sum() + fewer.errors.sum()).backward()
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("limit", [None, torch.tensor(1)])
@pytest.mark.parametrize("masked", [False, True])
def test_operators_pass_opcheck(masked, limit):
    x, codebooks, mask = inputs(9, 3, [5, 4], masked=masked)
    sizes, packed = [5, 4], torch.cat(codebooks)
    for gradient, with_sums in (("rotation", True), ("none", False)):
        arguments = (x.clone().requires_grad_(), packed, sizes, mask, limit, False, gradient, with_sums, "reference")
        torch.library.opcheck(torch.ops.spinlock_fast.residual_vq.default, arguments)
        codes = residual_vq(x, codebooks, mask, limit=limit).codes
        arguments = (x, torch.ones(2), x, packed, codes, sizes, mask, limit, False, gradient, "reference")
        torch.library.opcheck(torch.ops.spinlock_fast.residual_vq_backward.default, arguments)


def test_codebooks_may_change_before_the_backward_pass():
    x, codebooks, _ = inputs(40, 6, [9])
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = residual_vq(one, codebooks, gradient="rotation").errors.sum()
    moving = codebooks[0].clone()
    actual = residual_vq(other, [moving], gradient="rotation").errors.sum()
    moving.mul_(2.0)
    expected.backward()
    actual.backward()
    assert torch.equal(one.grad, other.grad)


def test_wrong_arguments_are_rejected():
    x, codebooks, _ = inputs(9, 3, [5])
    with pytest.raises(ValueError, match=r"codebooks\[0\] must be \[K_0, 3\], got \[5, 2\]$"):
        residual_vq(x, [codebooks[0][:, :2]])
    with pytest.raises(TypeError, match=r"mask must be \[9\] bool"):
        residual_vq(x, codebooks, torch.ones(9))


def test_rotation_of_a_zero_row_is_zero():
    x = torch.zeros(2, 4)
    codebook = torch.randn(3, 4)
    assert residual_vq(x, [codebook], gradient="rotation").quantized.abs().sum() == 0
    assert residual_vq(x, [codebook]).quantized.abs().sum() > 0


def test_reference_does_not_depend_on_the_block_size(monkeypatch):
    x, codebooks, _ = inputs(50, 6, [9])
    whole = reference.nearest(x, codebooks[0], False)
    monkeypatch.setattr(reference, "_MAX_DISTANCES", 40)
    assert torch.equal(reference.nearest(x, codebooks[0], False), whole)
