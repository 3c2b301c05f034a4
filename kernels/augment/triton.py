"""Triton kernel of the augmented rows: gathered, mixed and with noise in one launch.

Random numbers are those of Philox with ten rounds (Salmon et al. 2011), of a seed that lies on the device, drawn by
torch's generator: a captured graph draws another one at every replay.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches, rows_of

TILES: dict[str, Any] = {"BLOCK_B": 8, "BLOCK_F": 128, "num_warps": 4, "num_stages": 1}


@triton.jit(do_not_specialize=["N", "B", "F", "x_row", "mixup_scale", "noise_std"])
def augment_kernel(
    x_ptr,  # [N, F], row stride x_row
    order_ptr,  # [B] int64
    fade_ptr,  # [1] float32, or not read
    seed_ptr,  # [] int64
    target_ptr,  # [B, F]
    seen_ptr,  # [B, F], or not written
    N,
    B,
    F,
    x_row,
    mixup_scale,
    noise_std,
    MIXED: tl.constexpr,
    FADED: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    here = (b < B)[:, None] & (f < F)[None, :]
    seed = tl.load(seed_ptr)
    row = tl.load(order_ptr + b, mask=b < B, other=0)
    there = here & ((row >= 0) & (row < N))[:, None]
    x = tl.load(x_ptr + (row * x_row)[:, None] + f[None, :], mask=there, other=float("nan"))
    if MIXED:
        other = tl.load(order_ptr + tl.where(b + 1 < B, b + 1, 0), mask=b < B, other=0)
        share = mixup_scale
        if FADED:
            share = mixup_scale * tl.load(fade_ptr)
        u = share * (2.0 * tl.rand(seed ^ 0x2545F491, b) - 1.0)
        there = here & ((other >= 0) & (other < N))[:, None]
        y = tl.load(x_ptr + (other * x_row)[:, None] + f[None, :], mask=there, other=float("nan"))
        x += u[:, None] * (y - x)
    places = b.to(tl.int64)[:, None] * F + f[None, :]
    tl.store(target_ptr + places, x, mask=here)
    if NOISY:
        tl.store(seen_ptr + places, x + noise_std * tl.randn(seed, b[:, None] * F + f[None, :]), mask=here)


@launches
def augmented_rows(x: Tensor, rows: Tensor, mixing: float, noise: float, fade: Tensor | None) -> tuple[Tensor, Tensor]:
    """`op.augmented_rows` of float32 rows; with equal seeds the same bits."""
    x = rows_of(x)
    rows = rows.contiguous()
    B, F = rows.shape[0], x.shape[1]
    target = torch.empty(B, F, dtype=x.dtype, device=x.device)
    seen = torch.empty_like(target) if noise else target
    seed = torch.empty((), dtype=torch.int64, device=x.device).random_()
    if B:
        grid = (triton.cdiv(B, TILES["BLOCK_B"]), triton.cdiv(F, TILES["BLOCK_F"]))
        augment_kernel[grid](
            x, rows, fade.to(torch.float32) if fade is not None else x, seed, target, seen,
            x.shape[0], B, F, x.stride(0), mixing, noise,
            MIXED=mixing != 0.0, FADED=fade is not None, NOISY=noise != 0.0, **TILES,
        )  # fmt: skip
    return target, seen
