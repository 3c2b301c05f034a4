"""The grouped networks by the native CPU kernels: products of each group without padding, bias, ReLU and dropout fused.

No mask is stored: a zero activation marks a dropped unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.dropout import BatchSlice, draw_seed
from spinlock_fast.kernels._common.native import address, library, operand
from spinlock_fast.kernels._common.ragged import Ragged


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    inputs: Ragged,
    dropout: float,
    batch: BatchSlice | None,
) -> tuple[Tensor, ...]:
    """The output [G, B, E] and the hidden values [G, B, H]."""
    (G, H, E), B = w2.shape, x.shape[0]
    first_row, batch_rows = batch or (0, B)
    seed = draw_seed(x.device) if dropout > 0.0 else None
    hidden, out = x.new_empty(G, B, H), x.new_empty(G, B, E)
    b1, b2 = b1.contiguous(), b2.contiguous()
    library.mlp_forward(
        operand(x), operand(w1), address(b1), operand(w2[0]), w2.stride(0), address(b2), list(inputs.sizes), B, H, E,
        dropout, address(seed), first_row, batch_rows, address(hidden), address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out, hidden


def backward(
    grad: Tensor,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    inputs: Ragged,
    dropout: float,
    needs_x: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w2, b2, where `tensors` are these and `saved` is the rest of what `forward` returned."""
    x, w1, _, w2, _ = tensors
    (hidden,) = saved
    (G, H, E), B = w2.shape, x.shape[0]
    grad = grad.contiguous()
    # The gradient of the hidden values is stored only for that of x.
    grad_hidden = torch.empty_like(hidden) if needs_x else None
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
    grad_b1 = x.new_empty(G, H)
    # With the strides of w1 where the kernel supports it: a transposed w1 has zeros that can be skipped. Without rows,
    # grad_x has no address, and the kernel takes it for one that is not needed.
    transposed = needs_x and B > 0 and w1.stride(0) == 1
    grad_w1 = torch.empty_like(w1) if transposed else x.new_empty(w1.shape)
    grad_w2, grad_b2 = x.new_empty(w2.shape), x.new_empty(G, E)
    library.mlp_backward(
        address(grad), operand(x), operand(w1), operand(w2[0]), w2.stride(0), address(hidden), list(inputs.sizes),
        B, H, E, dropout, address(grad_hidden), address(grad_x), operand(grad_w1), address(grad_b1), address(grad_w2),
        address(grad_b2), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_w1, grad_b1, grad_w2, grad_b2
