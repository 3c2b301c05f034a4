"""The grouped networks in batched PyTorch operations on padded groups: any device and type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.dropout import BatchSlice, keep_scale
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
    """The output [G, B, E], the hidden values [G, B, H], and padded x and w1."""
    x, w1 = inputs.pad_columns(x), inputs.pad_rows(w1)
    hidden = torch.baddbmm(b1[:, None], x, w1).relu_()
    if dropout > 0.0 and batch is None:
        hidden = torch.native_dropout(hidden, dropout, True)[0]
    elif dropout > 0.0 and batch is not None:
        G, B, H = hidden.shape
        mask = torch.native_dropout(hidden.new_ones(G, batch.total, H), dropout, True)[0]
        hidden = hidden * mask[:, batch.first : batch.first + B]
    return torch.baddbmm(b2[:, None], hidden, w2), hidden, x, w1


def backward(
    grad: Tensor,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    inputs: Ragged,
    dropout: float,
    needs_x: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w2, b2, where `tensors` are these and `saved` is the rest of what `forward` returned."""
    w2 = tensors[3]
    hidden, x, w1 = saved
    # No gradient passes through a hidden value of 0, whether ReLU or dropout set it.
    scale = keep_scale(dropout)
    grad_hidden = torch.baddbmm(grad.new_zeros(()), grad, w2.transpose(1, 2), beta=0.0, alpha=scale)
    grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, hidden, 0.0)
    return (
        inputs.pack_columns(grad_hidden @ w1.transpose(1, 2)) if needs_x else None,
        inputs.pack_rows(x.transpose(1, 2) @ grad_hidden),
        grad_hidden.sum(1),
        hidden.transpose(1, 2) @ grad,
        grad.sum(1),
    )
