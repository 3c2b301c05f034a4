"""Triton kernel of the joint search: one launch per codebook and sweep.

A program holds a tile of rows and evaluates |relu(s_b - T[k_b] + T[k]) W2 - L[k_b] + L[k] - y_b|^2 for all codes k of
the codebook, as matrix products of (rows x codes) hidden values with tiles of W2; L is 0 without linear contributions.
It writes the new codes, hidden sums and targets to other buffers than it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._common.launch_helpers import check_int32_offsets, next_power_of_two
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.joint_search.reference import Start


@dataclass(frozen=True)
class SearchConfig:
    """Tile sizes by shape."""

    block_b: int
    block_k: int
    block_h: int
    block_f: int
    num_warps: int = 8
    num_stages: int = 1

    @classmethod
    def of(cls, hidden: int, features: int) -> SearchConfig:
        return cls(16, 8, min(32, next_power_of_two(hidden, 16)), min(64, next_power_of_two(features, 16)))

    @property
    def options(self) -> dict[str, Any]:
        tiles = {"BLOCK_B": self.block_b, "BLOCK_K": self.block_k, "BLOCK_H": self.block_h, "BLOCK_F": self.block_f}
        return {**tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


@triton.jit
def joint_search_fwd_kernel(
    target_ptr,  # [B, F]
    sums_ptr,  # [B, H]
    codes_ptr,  # [G, B]
    tolerance_ptr,  # [B]
    cost_ptr,  # [B, sum K] added to the error by each code
    table_ptr,  # [sum K, H]
    w2_ptr,  # [H, F]
    linear_ptr,  # [sum K, F]
    new_sums_ptr,  # [B, H]
    new_target_ptr,  # [B, F]; written with linear contributions
    new_codes_ptr,  # [G, B]
    B,
    F,
    H,
    K,
    g,
    first_code,
    total_codes,
    HAS_COST: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Gives BLOCK_B rows the code of codebook g of the least squared error, if that is lower by `tolerance`."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    rows = b.to(tl.int64)
    inside = b < B
    own = tl.load(codes_ptr + tl.cast(g, tl.int64) * B + rows, mask=inside, other=0).to(tl.int32)
    own_error = tl.full([BLOCK_B], float("inf"), dtype=tl.float32)
    least = tl.full([BLOCK_B], float("inf"), dtype=tl.float32)
    best = own
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        errors = tl.zeros([BLOCK_B, BLOCK_K], dtype=tl.float32)
        for f0 in range(0, F, BLOCK_F):
            f = f0 + tl.arange(0, BLOCK_F)
            decoded = tl.zeros([BLOCK_B * BLOCK_K, BLOCK_F], dtype=tl.float32)
            for h0 in range(0, H, BLOCK_H):
                h = h0 + tl.arange(0, BLOCK_H)
                in_rows = inside[:, None] & (h < H)[None, :]
                base = tl.load(sums_ptr + rows[:, None] * H + h[None, :], mask=in_rows, other=0.0)
                base -= tl.load(table_ptr + (first_code + own)[:, None] * H + h[None, :], mask=in_rows, other=0.0)
                in_table = (k < K)[:, None] & (h < H)[None, :]
                table = tl.load(table_ptr + (first_code + k)[:, None] * H + h[None, :], mask=in_table, other=0.0)
                hidden = base[:, None, :] + table[None, :, :]  # [BLOCK_B, BLOCK_K, BLOCK_H]
                hidden = tl.reshape(tl.where(hidden < 0.0, 0.0, hidden), [BLOCK_B * BLOCK_K, BLOCK_H])
                in_w2 = (h < H)[:, None] & (f < F)[None, :]
                w2 = tl.load(w2_ptr + h[:, None] * F + f[None, :], mask=in_w2, other=0.0)
                decoded = tl.dot(hidden, w2, decoded, input_precision="tf32x3")
            in_target = inside[:, None] & (f < F)[None, :]
            target = tl.load(target_ptr + rows[:, None] * F + f[None, :], mask=in_target, other=0.0)
            if HAS_LINEAR:
                target += tl.load(linear_ptr + (first_code + own)[:, None] * F + f[None, :], mask=in_target, other=0.0)
            residual = tl.reshape(decoded, [BLOCK_B, BLOCK_K, BLOCK_F]) - target[:, None, :]
            if HAS_LINEAR:
                in_linear = (k < K)[:, None] & (f < F)[None, :]
                linear = tl.load(linear_ptr + (first_code + k)[:, None] * F + f[None, :], mask=in_linear, other=0.0)
                residual += linear[None, :, :]
            errors += tl.sum(residual * residual, axis=2)
        if HAS_COST:
            place = rows[:, None] * total_codes + (first_code + k)[None, :]
            errors += tl.load(cost_ptr + place, mask=inside[:, None] & (k < K)[None, :], other=0.0)
        is_own = k[None, :] == own[:, None]
        own_error = tl.minimum(own_error, tl.min(tl.where(is_own, errors, float("inf")), axis=1))
        usable = (k < K)[None, :] & (errors < float("inf"))
        errors = tl.where(usable, errors, float("inf"))
        tile_least = tl.min(errors, axis=1)
        tile_best = tl.min(tl.where(errors == tile_least[:, None], k[None, :], 2147483647), axis=1)
        best = tl.where(tile_least < least, tile_best, best)
        least = tl.minimum(least, tile_least)

    lower = least < own_error - tl.load(tolerance_ptr + rows, mask=inside, other=0.0)
    best = tl.where(lower, best, own)
    tl.store(new_codes_ptr + tl.cast(g, tl.int64) * B + rows, best.to(tl.int64), mask=inside)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        in_rows = inside[:, None] & (h < H)[None, :]
        sums = tl.load(sums_ptr + rows[:, None] * H + h[None, :], mask=in_rows, other=0.0)
        before = tl.load(table_ptr + (first_code + own)[:, None] * H + h[None, :], mask=in_rows, other=0.0)
        after = tl.load(table_ptr + (first_code + best)[:, None] * H + h[None, :], mask=in_rows, other=0.0)
        sums = tl.where(lower[:, None], sums - before + after, sums)
        tl.store(new_sums_ptr + rows[:, None] * H + h[None, :], sums, mask=in_rows)
    if HAS_LINEAR:
        for f0 in range(0, F, BLOCK_F):
            f = f0 + tl.arange(0, BLOCK_F)
            in_target = inside[:, None] & (f < F)[None, :]
            target = tl.load(target_ptr + rows[:, None] * F + f[None, :], mask=in_target, other=0.0)
            before = tl.load(linear_ptr + (first_code + own)[:, None] * F + f[None, :], mask=in_target, other=0.0)
            after = tl.load(linear_ptr + (first_code + best)[:, None] * F + f[None, :], mask=in_target, other=0.0)
            target = tl.where(lower[:, None], target + before - after, target)
            tl.store(new_target_ptr + rows[:, None] * F + f[None, :], target, mask=in_target)


@launches
def joint_search(
    begin: Start,
    tables: Tensor,
    w2: Tensor,
    layout: CodebookLayout,
    sweeps: int,
    cost: Tensor | None,
    linear: Tensor | None = None,
) -> Tensor:
    """Codes [B, G] after `sweeps` sweeps; see `reference.joint_search`."""
    codes, sums = begin.codes.t().contiguous(), begin.sums.contiguous()
    target, w2, tolerance = begin.target.contiguous(), w2.contiguous(), begin.tolerance.contiguous()
    (B, H), F = sums.shape, target.shape[1]
    config = SearchConfig.of(H, F)
    check_int32_offsets("the contributions of all codes to the first layer", tables.numel())
    check_int32_offsets("the weights of the decoder", w2.numel())
    if linear is not None:
        check_int32_offsets("the linear contributions of all codes", linear.numel())
    costs = target if cost is None else cost
    new_codes, new_sums = torch.empty_like(codes), torch.empty_like(sums)
    new_target = target if linear is None else torch.empty_like(target)
    for _ in range(sweeps):
        for g, K in enumerate(layout.num_codes):
            joint_search_fwd_kernel[(triton.cdiv(B, config.block_b),)](
                target, sums, codes, tolerance, costs, tables, w2, target if linear is None else linear, new_sums,
                new_target, new_codes, B, F, H, K, g, layout.code_slice(g).start, layout.total_codes,
                HAS_COST=cost is not None, HAS_LINEAR=linear is not None, **config.options,
            )  # fmt: skip
            sums, new_sums = new_sums, sums
            target, new_target = new_target, target
        codes, new_codes = new_codes, codes
    return codes.t().contiguous()
