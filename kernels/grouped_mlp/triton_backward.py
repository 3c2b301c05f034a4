"""Triton kernels of the grouped networks, backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.dropout import keep_scale
from spinlock_fast.kernels._common.guard import launches, rows_of
from spinlock_fast.kernels._common.precision import cuda_matmul
from spinlock_fast.kernels._common.ragged import Ragged, part_offsets
from spinlock_fast.kernels._common.streams import defer
from spinlock_fast.kernels.grouped_mlp.triton_forward import (
    ProductConfig,
    column_sums,
    dense,
    grouped_product,
    tile_product,
)


@triton.jit(do_not_specialize=["B", "G"])
def grouped_mlp_bwd_first_kernel(
    x_ptr,  # [B, sum n], row stride x_stride
    w1_ptr,  # [sum n, H]
    grad_hidden_ptr,  # [G, B, H]
    offsets_ptr,  # see `part_offsets`
    grad_x_ptr,  # [B, sum n] contiguous
    grad_w1_ptr,  # [sum n, H], with the strides of w1
    grad_b1_ptr,  # [G, H]
    B,
    G,
    H,
    x_stride,
    w_row,
    w_column,
    total,
    widest,
    NEEDS_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW1_g = x_g^T dh_g, db1_g = sum_b dh_g, dx_g = dh_g W1_g^T, where dh is the gradient before ReLU.

    Jobs along the first grid axis: tiles of W1, tiles of b1, tiles of x if it is needed.
    """
    g = tl.program_id(1)
    job = tl.program_id(0)
    size = tl.load(offsets_ptr + g)
    first = tl.load(offsets_ptr + G + g)
    grad_hidden_ptr += g.to(tl.int64) * B * H
    h_tiles = tl.cdiv(H, BLOCK_N)
    weight_jobs = tl.cdiv(widest, BLOCK_M) * h_tiles
    if job < weight_jobs:
        if job // h_tiles * BLOCK_M < size:
            i = job // h_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
            h = job % h_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
            grad_w1 = tile_product(
                x_ptr + first,
                1,
                x_stride,
                grad_hidden_ptr,
                H,
                1,
                i,
                h,
                size,
                H,
                B,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                PRECISION,
            )
            inside = (i < size)[:, None] & (h < H)[None, :]
            grad_w1_ptr += first.to(tl.int64) * w_row
            tl.store(grad_w1_ptr + (i * w_row)[:, None] + (h * w_column)[None, :], grad_w1, mask=inside)
    elif job < weight_jobs + h_tiles:
        h = (job - weight_jobs) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(grad_b1_ptr + g * H + h, column_sums(grad_hidden_ptr, h, H, B, BLOCK_N, BLOCK_K), mask=h < H)
    elif NEEDS_X:
        job -= weight_jobs + h_tiles
        tiles = tl.cdiv(widest, BLOCK_N)
        if job % tiles * BLOCK_N < size:
            start = (job // tiles).to(tl.int64) * BLOCK_M
            m = tl.arange(0, BLOCK_M)
            n = job % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
            rows = tl.minimum(B - start, BLOCK_M).to(tl.int32)
            out = tile_product(
                grad_hidden_ptr + start * H, H, 1, w1_ptr + first.to(tl.int64) * w_row, w_column, w_row, m, n, rows,
                size, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            grad_x_ptr += start * total + first
            tl.store(
                grad_x_ptr + (m * total)[:, None] + n[None, :], out, mask=(m < rows)[:, None] & (n < size)[None, :]
            )


@launches
def backward(
    grad: Tensor,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    inputs: Ragged,
    dropout: float,
    needs_x: bool,
    precision: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w2, b2, where `tensors` are these and `saved` is the rest of what `forward` returned.

    The gradients of the second layer are deferred, see `streams.defer`.
    """
    x, w1, w2 = rows_of(tensors[0]), dense(tensors[1]), tensors[3]
    (hidden,) = saved
    grad = grad.contiguous()

    def second_layer_gradients() -> tuple[Tensor, ...]:
        # With the strides of the weights, transposed or not: a parameter takes such a gradient without a copy.
        if w2.stride(-1) == 1:
            return hidden.transpose(1, 2) @ grad, grad.sum(1)
        return (grad.transpose(1, 2) @ hidden).transpose(1, 2), grad.sum(1)

    # Before cuBLAS, which warns in an autograd thread that has not launched a kernel yet.
    scale = keep_scale(dropout)
    grad_hidden = grouped_product(grad, w2.transpose(1, 2), precision, hidden=hidden, scale=scale)
    with cuda_matmul(tf32=precision == "tf32"):
        grad_w2, grad_b2 = defer(second_layer_gradients, [grad, hidden])
    grad_x, grad_w1, grad_b1 = _first_layer_gradients(x, w1, grad_hidden, inputs, precision, needs_x)
    return grad_x, grad_w1, grad_b1, grad_w2, grad_b2


def _first_layer_gradients(
    x: Tensor, w1: Tensor, grad_hidden: Tensor, inputs: Ragged, precision: str, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x (None if it is not needed), w1 and b1."""
    G, B, H = grad_hidden.shape
    options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    grad_w1, grad_b1 = torch.empty_like(w1), torch.empty(G, H, **options)
    grad_x = torch.empty(B, inputs.total, **options) if needs_x else None
    config = ProductConfig.for_weights(precision)
    m, n = config.block_m, config.block_n
    jobs = (triton.cdiv(inputs.widest, m) + 1) * triton.cdiv(H, n)
    if needs_x:
        jobs += triton.cdiv(B, m) * triton.cdiv(inputs.widest, n)
    grouped_mlp_bwd_first_kernel[(jobs, G)](
        x, w1, grad_hidden, part_offsets(inputs.sizes, (), x.device), grad_x if grad_x is not None else x, grad_w1,
        grad_b1, B, G, H, x.stride(0), *w1.stride(), inputs.total, inputs.widest, NEEDS_X=needs_x, **config.tiles,
    )  # fmt: skip
    return grad_x, grad_w1, grad_b1
