import dataclasses

import helpers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.code_decoders import (
    Decoders,
    code_statistics,
    decode_codes,
    partial_loss,
    pytorch,
    reference,
)
from spinlock_fast.kernels.vq_assign import quantize, vq_assign

LAYOUT = CodebookLayout.of([15, 1, 8], [4, 3, 7])
GROUPS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=4)
HIDDEN = 6


def batch(layout, rows, seed, dtype=torch.float64, features=5, offset=0.0):
    """x, latents, codebook, decoders, and the codes of the latents."""
    z, codebook = helpers.random_group(layout, rows, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    G = layout.groups
    decoders = Decoders(
        normal(layout.total_dims, HIDDEN), normal(G, HIDDEN), normal(G, HIDDEN, features), normal(G, features)
    )
    return offset + normal(rows, features), z, codebook, decoders, vq_assign(z, codebook, layout)


def to_double(decoders):
    return Decoders(*(parameter.double() for parameter in decoders))


def compare(x, z, codebook, decoders, found, layout, rotation_trick=False):
    """Loss and gradients (latents, w1, b1, w2, b2) of the reference and of the operator."""
    results = []
    for in_code_space in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (z, *decoders)]
        quantized = quantize(leaves[0], found.quantized, layout, rotation_trick)
        mine = Decoders(*leaves[1:])
        if in_code_space:
            loss = partial_loss(x, quantized, found.codes, codebook, mine, layout)
        else:
            loss = reference.partial_loss(x, quantized, mine, layout)
        (3.0 * loss).backward()
        results.append((loss.detach(), [leaf.grad for leaf in leaves]))
    return results


@given(GROUPS, st.integers(1, 30), st.integers(0, 2**31), st.booleans())
def test_loss_and_gradients_equal_the_reference(sizes, rows, seed, rotation_trick):
    layout = CodebookLayout.of(*zip(*sizes, strict=True))
    (expected, expected_grads), (loss, grads) = compare(*batch(layout, rows, seed), layout, rotation_trick)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    for name, ours, theirs in zip(("z", *Decoders._fields), grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_reference_equals_the_formula():
    x, _, _, decoders, found = batch(LAYOUT, 9, seed=0)
    total = 0.0
    for g, e in enumerate(helpers.split_columns(found.quantized, LAYOUT)):
        w1 = decoders.w1[LAYOUT.column_slice(g)]
        for row in range(9):
            hidden = torch.clamp(e[row] @ w1 + decoders.b1[g], min=0.0)
            total += (hidden @ decoders.w2[g] + decoders.b2[g] - x[row]).square().sum().item()
    assert reference.partial_loss(x, found.quantized, decoders, LAYOUT).item() == pytest.approx(total / (3 * 9 * 5))


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("seed", range(3))
def test_float32_error_is_that_of_the_reference(seed, offset):
    """Sums over codes cancel; the error against float64 must not exceed that of the reference."""
    x, z, codebook, decoders, found = batch(LAYOUT, 300, seed, torch.float32, features=20, offset=offset)
    # Decoders that reconstruct the offset, as trained ones do; a large loss would hide the cancellation.
    decoders = decoders._replace(b2=decoders.b2 + offset)
    wide = dataclasses.replace(found, quantized=found.quantized.double())
    exact = compare(x.double(), z.double(), codebook.double(), to_double(decoders), wide, LAYOUT)
    (eager, eager_grads), (ours, our_grads) = compare(x, z, codebook, decoders, found, LAYOUT)
    truth, truth_grads = exact[0]
    eps = torch.finfo(torch.float32).eps
    assert (ours - truth).abs() <= 2.0 * (eager - truth).abs() + 8.0 * eps * truth
    for name, a, b, t in zip(("z", *Decoders._fields), our_grads, eager_grads, truth_grads, strict=True):
        assert (a - t).norm() <= 2.0 * (b - t).norm() + 4.0 * eps * t.norm(), name


def test_small_losses_are_precise():
    """Every row is near the reconstruction of its code: the loss is small, the sums over codes are not."""
    layout = CodebookLayout.of([6], [3])
    _, _, codebook, decoders, found = batch(layout, 200, 0, torch.float32)
    x = reference.reconstructions(found.quantized, decoders, layout)[0] + 1e-2 * torch.randn(200, 5)
    expected = reference.partial_loss(x.double(), found.quantized.double(), to_double(decoders), layout)
    loss = partial_loss(x, found.quantized, found.codes, codebook, decoders, layout)
    spread = (x - x.mean(0)).square().mean()
    assert (loss - expected).abs() <= 16.0 * torch.finfo(torch.float32).eps * spread


def test_rows_without_a_code_give_nan():
    x, _, codebook, decoders, found = batch(LAYOUT, 20, seed=0)
    found.codes[3, 1] = -1
    quantized = found.quantized.clone()
    quantized[3, LAYOUT.column_slice(1)] = torch.nan
    assert reference.partial_loss(x, quantized, decoders, LAYOUT).isnan()
    assert partial_loss(x, quantized, found.codes, codebook, decoders, LAYOUT).isnan()


def test_unused_codes_may_be_non_finite():
    x, z, codebook, decoders, found = batch(LAYOUT, 20, seed=0)
    codes = found.codes.clone()
    codes[:, 2] = codes[:, 2].clamp(max=6)
    non_finite = codebook.clone()
    non_finite[LAYOUT.entry_slice(2)][-7:] = torch.nan
    quantized = torch.cat([b[codes[:, g]] for g, b in enumerate(helpers.split_codebooks(codebook, LAYOUT))], 1)
    found = dataclasses.replace(found, codes=codes, quantized=quantized)
    (expected, expected_grads), (loss, grads) = compare(x, z, non_finite, decoders, found, LAYOUT)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_decode_codes_equals_the_reconstructions():
    _, _, codebook, decoders, found = batch(LAYOUT, 20, seed=0)
    decoded = decode_codes(codebook, decoders, LAYOUT)
    assert decoded.shape == (3, 15, 5)
    expected = reference.reconstructions(found.quantized, decoders, LAYOUT)
    for g in range(3):
        torch.testing.assert_close(decoded[g, found.codes[:, g]], expected[g])


@pytest.mark.parametrize("at_once", [1, 7 * 45, 1 << 24])
def test_code_statistics(monkeypatch, at_once):
    x, _, _, _, found = batch(LAYOUT, 30, seed=1)
    codes = found.codes.clone()
    codes[4:8, 1] = -1
    monkeypatch.setattr(pytorch, "_ONE_HOT_ENTRIES", at_once)
    counts, sums = code_statistics(x, codes, LAYOUT)
    for g, K in enumerate(LAYOUT.num_codes):
        for k in range(K):
            rows = codes[:, g] == k
            assert counts[g, k].item() == rows.sum()
            torch.testing.assert_close(sums[g, k], x[rows].sum(0))
    assert not counts[1, 1:].any()


def test_no_host_synchronisation():
    data = batch(LAYOUT, 20, seed=0, dtype=torch.float32)
    with helpers.without_native_kernels():
        compare(*data, LAYOUT)  # creates the index tensors
    x, z, codebook, decoders, found = data
    leaves = [tensor.requires_grad_() for tensor in decoders]
    z.requires_grad_()
    with helpers.no_host_sync():
        quantized = quantize(z, found.quantized, LAYOUT)
        partial_loss(x, quantized, found.codes, codebook, Decoders(*leaves), LAYOUT).backward()
