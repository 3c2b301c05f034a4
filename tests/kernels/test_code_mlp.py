"""The network of code vectors, and the cosines of codes: native kernels against float64, for all instruction sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spinlock_fast import _native
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.code_cosines import mean_squared_cosine
from spinlock_fast.kernels.code_cosines import reference as cosine_reference
from spinlock_fast.kernels.code_mlp import cpu, reference

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=_native.instruction_sets(), autouse=True)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    _native.use_instruction_set(request.param)
    yield
    _native.use_instruction_set(_native.instruction_sets()[0])


def case(layout: CodebookLayout, B: int, H: int, E: int) -> tuple[Tensor, ...]:
    """codes, codebook, w1, b1, w2, b2, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    codes = torch.stack([torch.randint(K, (B,), generator=generator) for K in layout.num_codes], 1)
    w1 = normal(H, layout.total_dims).t() / layout.total_dims**0.5
    return codes, normal(layout.total_entries), w1, normal(H), normal(E, H).t() / H**0.5, normal(E), normal(B, E)


def code_vectors(codes: Tensor, codebook: Tensor, layout: CodebookLayout) -> Tensor:
    parts = []
    for g, (K, D) in enumerate(zip(layout.num_codes, layout.dims, strict=True)):
        parts.append(codebook[layout.entry_slice(g)].view(K, D)[codes[:, g]])
    return torch.cat(parts, 1)


def outputs_and_gradients(dtype: torch.dtype, quantized: Tensor, *arguments: Tensor) -> list[Tensor]:
    *parameters, grad = (t.to(dtype) for t in arguments)
    leaves = [t.detach().clone().requires_grad_() for t in (quantized.to(dtype), *parameters)]
    out = reference.forward(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("B", "H", "E"), [(1, 1, 1), (33, 150, 20), (130, 256, 70)])
def test_output_and_gradients_are_as_accurate_as_those_of_torch(B: int, H: int, E: int, threads: int) -> None:
    layout = CodebookLayout.of([7, 1, 30], [3, 17, 40])
    codes, codebook, w1, b1, w2, b2, grad = case(layout, B, H, E)
    quantized = code_vectors(codes, codebook, layout)
    arguments = quantized, w1, b1, w2, b2, grad
    exact, plain = (outputs_and_gradients(dtype, *arguments) for dtype in (torch.float64, torch.float32))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    out, hidden = cpu.forward(codes, codebook, w1, b1, w2, b2, layout, 0.0)
    results = [out, *cpu.backward(grad, codes, codebook, w1, w2, hidden, layout, 0.0)]
    torch.set_num_threads(before)
    for got, true, other in zip(results, exact, plain, strict=True):
        scale = max(1.0, float(true.abs().max()))  # of the terms of a sum, which may cancel
        assert got.shape == true.shape
        assert float((got - true).abs().max()) <= 2.0 * float((other - true).abs().max()) + 8 * EPS * scale


def test_dropout_is_that_of_the_grouped_networks() -> None:
    from spinlock_fast.kernels._common.ragged import Ragged
    from spinlock_fast.kernels.grouped_mlp import cpu as grouped_mlp

    layout = CodebookLayout.of([5, 9], [4, 6])
    codes, codebook, w1, b1, w2, b2, _ = case(layout, 40, 100, 8)
    torch.manual_seed(0)
    _, hidden = cpu.forward(codes, codebook, w1, b1, w2, b2, layout, 0.3)
    torch.manual_seed(0)
    quantized, inputs = code_vectors(codes, codebook, layout), Ragged.of([10])
    _, expected = grouped_mlp.forward(quantized, w1, b1[None], w2[None], b2[None], inputs, 0.3, None)
    torch.testing.assert_close(hidden, expected[0], rtol=0.0, atol=1e-5)
    assert torch.equal(hidden == 0.0, expected[0] == 0.0)


def test_row_without_a_code_is_nan_and_a_code_out_of_range_is_refused() -> None:
    layout = CodebookLayout.of([5, 9], [4, 6])
    codes, codebook, *parameters, _ = case(layout, 6, 20, 8)
    codes[2, 1] = -1
    out, _ = cpu.forward(codes, codebook, *parameters, layout, 0.0)
    assert out.isnan().all(1).tolist() == [False, False, True, False, False, False]
    codes[3, 0] = 5
    with pytest.raises(IndexError, match="code 5 of row 3 is outside codebook 0"):
        cpu.forward(codes, codebook, *parameters, layout, 0.0)


@pytest.mark.parametrize("change", [None, "zero", "nan"])
def test_mean_squared_cosine(change: Any) -> None:
    layout = CodebookLayout.of([7, 1, 40, 2], [3, 5, 600, 1])
    codebook = torch.randn(layout.total_entries, generator=torch.Generator().manual_seed(1))
    if change is not None:
        codebook[:3] = 0.0 if change == "zero" else torch.nan
    exact = cosine_reference.mean_squared_cosine(codebook.double(), layout)
    got = mean_squared_cosine(codebook, layout)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=16 * EPS, atol=0.0, equal_nan=True)
    differentiable = codebook.requires_grad_()
    assert mean_squared_cosine(differentiable, layout).requires_grad
