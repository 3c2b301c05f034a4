"""Triton kernel of the augmented rows: gather, mixup and noise in one launch.

Random numbers are Philox with ten rounds (Salmon et al., 2011). The seed is drawn on the device by torch's generator,
so that every replay of a captured graph uses another one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.dropout import BatchSlice, draw_seed
from spinlock_fast.kernels._common.guard import launches, rows_of

TILES: dict[str, Any] = {"BLOCK_B": 8, "BLOCK_F": 128, "num_warps": 4, "num_stages": 1}


@triton.jit(do_not_specialize=["N", "B", "F", "x_stride", "first_row", "mixup_scale", "noise_std"])
def augment_fwd_kernel(
    x_ptr,  # [N, F], row stride x_stride
    rows_ptr,  # [B] int64
    next_row_ptr,  # [1] int64, the row after the last one
    mixup_decay_ptr,  # [1] float32, read if HAS_DECAY
    seed_ptr,  # [] int64
    target_ptr,  # [B, F]
    input_ptr,  # [B, F], written if HAS_NOISE
    N,
    B,
    F,
    x_stride,
    first_row,  # number of row 0 in the batch that random numbers are drawn for
    mixup_scale,
    noise_std,
    HAS_MIXUP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """target_i = x_i + u_i (x_j - x_i), input_i = target_i + noise_std eps_i; NaN for rows outside of x."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    in_batch = (b < B)[:, None] & (f < F)[None, :]
    seed = tl.load(seed_ptr)
    row = tl.load(rows_ptr + b, mask=b < B, other=0)
    in_x = in_batch & ((row >= 0) & (row < N))[:, None]
    x = tl.load(x_ptr + (row * x_stride)[:, None] + f[None, :], mask=in_x, other=float("nan"))  # [BLOCK_B, BLOCK_F]
    if HAS_MIXUP:
        next_row = tl.load(rows_ptr + b + 1, mask=b + 1 < B, other=0)
        next_row = tl.where(b + 1 < B, next_row, tl.load(next_row_ptr))
        scale = mixup_scale
        if HAS_DECAY:
            scale = mixup_scale * tl.load(mixup_decay_ptr)
        u = scale * (2.0 * tl.rand(seed ^ 0x2545F491, first_row + b) - 1.0)  # [BLOCK_B]
        in_x = in_batch & ((next_row >= 0) & (next_row < N))[:, None]
        y = tl.load(x_ptr + (next_row * x_stride)[:, None] + f[None, :], mask=in_x, other=float("nan"))
        x += u[:, None] * (y - x)
    out = b.to(tl.int64)[:, None] * F + f[None, :]
    tl.store(target_ptr + out, x, mask=in_batch)
    if HAS_NOISE:
        # With `first_row + b` as in u, ptxas uses the stack.
        noise = tl.randn(seed, first_row * F + (b[:, None] * F + f[None, :]))
        tl.store(input_ptr + out, x + noise_std * noise, mask=in_batch)


@launches
def augmented_rows(
    x: Tensor,
    rows: Tensor,
    mixup_scale: float,
    noise_std: float,
    mixup_decay: Tensor | None,
    batch: BatchSlice | None,
    next_row: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`op.augmented_rows` of float32 rows; bitwise reproducible for equal seeds."""
    x = rows_of(x)
    rows = rows.contiguous()
    B, F = rows.shape[0], x.shape[1]
    target = torch.empty(B, F, dtype=x.dtype, device=x.device)
    inputs = torch.empty_like(target) if noise_std else target
    seed = draw_seed(x.device)
    if B:
        grid = (triton.cdiv(B, TILES["BLOCK_B"]), triton.cdiv(F, TILES["BLOCK_F"]))
        augment_fwd_kernel[grid](
            x, rows, next_row if next_row is not None else rows,
            mixup_decay.to(torch.float32) if mixup_decay is not None else x, seed, target, inputs,
            x.shape[0], B, F, x.stride(0), batch.first if batch else 0, mixup_scale, noise_std,
            HAS_MIXUP=mixup_scale != 0.0, HAS_DECAY=mixup_decay is not None, HAS_NOISE=noise_std != 0.0, **TILES,
        )  # fmt: skip
    return target, inputs
