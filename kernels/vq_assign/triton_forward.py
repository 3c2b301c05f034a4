"""Triton kernels of `reference.assign`: one launch for small codebooks; larger ones are streamed.

code = argmin_k |e_k|^2 - 2 z.e_k. One program holds a block of rows and all codes of one codebook: distances with
products accurate to float32 (three TF32 products each), nearest code, then the code, the squared error, and the counts
and sums of its rows. Callers add these partial sums in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches, rows_of
from spinlock_fast.kernels._common.launch_helpers import codebook_offsets, compute_capability, next_power_of_two
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import triton_streaming
from spinlock_fast.kernels.vq_assign.reference import MAX_TILE_CODES, PART_ROWS, Result, row_parts


@dataclass(frozen=True)
class AssignConfig:
    """Tile sizes and launch options, chosen by shape and device."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int = 4
    num_stages: int = 1  # the loops over D are short, and more stages cost registers

    @classmethod
    def of(cls, layout: CodebookLayout, capability: int) -> AssignConfig:
        """For a device of compute capability `capability` (80, 90, 100)."""
        # Tiles of 32 codes spill registers on sm_100.
        return cls(PART_ROWS, next_power_of_two(layout.max_codes, 64 if capability >= 100 else 16), block_d=16)

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        tile = {"BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "BLOCK_D": self.block_d}
        return {**tile, "num_warps": self.num_warps, "num_stages": self.num_stages}


@triton.jit(do_not_specialize=["N", "G", "total_codes", "total_dims", "total_entries", "z_stride", "tiles"])
def vq_assign_fwd_kernel(
    z_ptr,  # [N, sum D], row stride z_stride
    codebook_ptr,  # [sum K D] float32
    mask_ptr,  # [N] bool; read where HAS_MASK
    offsets_ptr,  # [5, G] int32, see `codebook_offsets`
    codes_ptr,  # [N, G] int64
    quantized_ptr,  # [N, sum D] float32
    error_ptr,  # [parts, G] float32
    counts_ptr,  # [parts, sum K] float32
    sums_ptr,  # [parts, sum K D] float32
    N,
    G,
    total_codes,
    total_dims,
    total_entries,
    z_stride,
    tiles,
    HAS_MASK: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """code = argmin_k |e_k|^2 - 2 z.e_k, q = e_code; partial sums of |z - q|^2, of rows and of z by code."""
    part = tl.program_id(0)
    g = tl.program_id(1)
    K = tl.load(offsets_ptr + g)
    D = tl.load(offsets_ptr + G + g)
    first_code = tl.load(offsets_ptr + 2 * G + g)
    first_column = tl.load(offsets_ptr + 3 * G + g)
    first_entry = tl.load(offsets_ptr + 4 * G + g)
    codebook_ptr += first_entry
    k = tl.arange(0, BLOCK_K)
    counts_out = counts_ptr + part.to(tl.int64) * total_codes + first_code
    sums_out = sums_ptr + part.to(tl.int64) * total_entries + first_entry

    error = tl.zeros([BLOCK_N], dtype=tl.float32)
    for tile in range(tiles):
        # 64-bit offsets of the tile and 32-bit offsets within it need half the registers.
        start = (part * tiles + tile).to(tl.int64) * BLOCK_N
        r = tl.arange(0, BLOCK_N)
        in_rows = r < N - start
        z_tile = z_ptr + start * z_stride + first_column

        products = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        squares = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
        nonfinite = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.int1)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            in_tile = in_rows[:, None] & (d < D)[None, :]
            z = tl.load(z_tile + ((r * z_stride)[:, None] + d[None, :]), mask=in_tile, other=0.0).to(tl.float32)
            # z: [BLOCK_N, BLOCK_D]
            in_codes = (k < K)[:, None] & (d < D)[None, :]
            e = tl.load(codebook_ptr + (k[:, None] * D + d[None, :]), mask=in_codes, other=0.0)  # [BLOCK_K, BLOCK_D]
            nonfinite = nonfinite | (tl.abs(z) >= float("inf")) | (z != z)
            if CENTRED:
                centre = tl.sum(tl.where(tl.abs(e) < float("inf"), e, 0.0), axis=0) / K  # [BLOCK_D]
                centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)
                e = tl.where(in_codes, e - centre[None, :], 0.0)
                z -= centre[None, :]
            squares += e * e
            products = tl.dot(z, tl.trans(e), products, input_precision="tf32x3")
        distance = tl.sum(squares, axis=1)[None, :] - 2.0 * products  # [BLOCK_N, BLOCK_K] |z - e|^2 - |z|^2
        # NaN compares unequal to itself: a code that is not finite is never selected.
        distance = tl.where((k < K)[None, :] & (distance == distance), distance, float("inf"))
        best, code = tl.min(distance, axis=1, return_indices=True)  # the lowest index on ties
        valid = in_rows & (tl.max(nonfinite.to(tl.int32), axis=1) == 0) & (best < float("inf"))
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + start + r, mask=in_rows, other=0) != 0)
        code = tl.where(valid, code, -1)
        tl.store(codes_ptr + start * G + g + r * G, code.to(tl.int64), mask=in_rows)

        one_hot = (code[:, None] == k[None, :]).to(tl.float32)  # [BLOCK_N, BLOCK_K]
        chosen = tl.where(valid, code, 0) * D  # [BLOCK_N]
        out_tile = quantized_ptr + start * total_dims + first_column
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            in_tile = in_rows[:, None] & (d < D)[None, :]
            with_code = in_tile & valid[:, None]
            z = tl.load(z_tile + ((r * z_stride)[:, None] + d[None, :]), mask=with_code, other=0.0).to(tl.float32)
            q = tl.load(codebook_ptr + (chosen[:, None] + d[None, :]), mask=with_code, other=0.0)  # [BLOCK_N, BLOCK_D]
            out = tl.where(valid[:, None], q, float("nan"))
            tl.store(out_tile + ((r * total_dims)[:, None] + d[None, :]), out, mask=in_tile)
            error += tl.sum((z - q) * (z - q), axis=1)
            if WITH_SUMS:
                sums = tl.dot(tl.trans(one_hot), z, input_precision="tf32x3")  # [BLOCK_K, BLOCK_D]
                entries = sums_out + (k[:, None] * D + d[None, :])
                in_codes = (k < K)[:, None] & (d < D)[None, :]
                if tile > 0:  # no other program writes this partial sum, and each thread re-reads its own entries
                    sums += tl.load(entries, mask=in_codes, other=0.0)
                tl.store(entries, sums, mask=in_codes)
        if WITH_SUMS:
            counts = tl.sum(one_hot, axis=0)  # [BLOCK_K]
            if tile > 0:
                counts += tl.load(counts_out + k, mask=k < K, other=0.0)
            tl.store(counts_out + k, counts, mask=k < K)

    tl.store(error_ptr + part.to(tl.int64) * G + g, tl.sum(error, axis=0))


@launches
def assign(
    z: Tensor, codebook: Tensor, layout: CodebookLayout, mask: Tensor | None, centred: bool, with_sums: bool
) -> Result:
    """`reference.assign`; errors, counts and sums of small codebooks are `row_parts` partial sums."""
    if layout.max_codes > MAX_TILE_CODES:
        return triton_streaming.assign(z, codebook, layout, mask, centred, with_sums)
    config = AssignConfig.of(layout, compute_capability(z.device))
    N, G = z.shape[0], layout.groups
    z, codebook = rows_of(z), codebook.contiguous()
    parts = row_parts(N, G)
    tiles = triton.cdiv(triton.cdiv(N, config.block_n), parts)
    codes = torch.empty(N, G, dtype=torch.int64, device=z.device)
    quantized = torch.empty(N, layout.total_dims, dtype=torch.float32, device=z.device)
    error = torch.empty(parts, G, dtype=torch.float32, device=z.device)
    counts = torch.empty(parts, layout.total_codes if with_sums else 0, dtype=torch.float32, device=z.device)
    sums = torch.empty(parts, layout.total_entries if with_sums else 0, dtype=torch.float32, device=z.device)
    if N == 0:
        return quantized, codes, error.zero_(), counts.zero_(), sums.zero_()
    vq_assign_fwd_kernel[(parts, G)](
        z, codebook, mask if mask is not None else z, codebook_offsets(layout, z.device), codes, quantized, error,
        counts, sums, N, G, layout.total_codes, layout.total_dims, layout.total_entries, z.stride(0), tiles,
        HAS_MASK=mask is not None, WITH_SUMS=with_sums, CENTRED=centred, **config.options,
    )  # fmt: skip
    return quantized, codes, error, counts, sums
