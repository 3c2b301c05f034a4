"""`reference` by the native CPU kernels, with dropout of the hidden values."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.dropout import draw_seed
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import address, library, operand


def forward(
    codes: Tensor,
    codebook: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    layout: CodebookLayout,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The output [B, E] for codes [B, G], NaN in rows without a code, and the hidden values [B, H].

    Args:
        codes: [B, G] int64, contiguous.
        codebook: [sum K D], contiguous.
        w1: [sum D, H]; b1: [H].
        w2: [H, E]; b2: [E].
        layout: sizes of the codebooks.
        dropout: probability that a hidden value is dropped.
    """
    B, (H, E) = len(codes), w2.shape
    seed = draw_seed(codebook.device) if dropout > 0.0 else None
    tables, hidden = codebook.new_empty(layout.total_codes, H), codebook.new_empty(B, H)
    out = codebook.new_empty(B, E)
    library.code_mlp_forward(
        address(codes), address(codebook), operand(w1), address(b1), operand(w2), address(b2), list(layout.num_codes),
        list(layout.dims), B, H, E, dropout, address(seed), address(tables), address(hidden), address(out),
        torch.get_num_threads(),
    )  # fmt: skip
    return out, hidden


def backward(
    grad: Tensor,
    codes: Tensor,
    codebook: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    layout: CodebookLayout,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the code vectors of the rows [B, sum D], w1, b1, w2 and b2; that of w1 has its rows side by side."""
    B, (H, E) = len(codes), w2.shape
    grad_hidden, sums = torch.empty_like(hidden), hidden.new_empty(layout.total_codes, H)
    grad_quantized, grad_w1 = hidden.new_empty(B, layout.total_dims), hidden.new_empty(H, layout.total_dims)
    grad_b1, grad_w2, grad_b2 = hidden.new_empty(H), hidden.new_empty(H, E), hidden.new_empty(E)
    library.code_mlp_backward(
        address(grad), address(codes), address(codebook), operand(w1), operand(w2), address(hidden),
        list(layout.num_codes), list(layout.dims), B, H, E, dropout, address(grad_hidden), address(sums),
        address(grad_quantized), address(grad_w1), address(grad_b1), address(grad_w2), address(grad_b2),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_quantized, grad_w1.t(), grad_b1, grad_w2, grad_b2
