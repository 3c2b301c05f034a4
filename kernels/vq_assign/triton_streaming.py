"""Triton kernels of `reference.assign` for codebooks of more than MAX_TILE_CODES codes.

Codes are streamed in tiles while each row keeps its nearest code so far. With few rows, several programs search
disjoint shares of a codebook and a second kernel compares their results. No buffer grows with N x K. Counts and sums
are formed from the rows sorted by code, in a fixed order, so the result does not depend on timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches, rows_of
from spinlock_fast.kernels._common.launch_helpers import codebook_offsets, compute_capability
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.triton_centred_codes import CentredCodes, centred_codes
from spinlock_fast.kernels._common.triton_code_sums import Segments
from spinlock_fast.kernels.vq_assign.reference import Result

# Programs that fill a large GPU. The number of shares depends on this constant alone, never on the device.
_PROGRAMS = 1024


@dataclass(frozen=True)
class SearchConfig:
    """Tile sizes and launch options, chosen by device."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, capability: int) -> SearchConfig:
        """For a device of compute capability `capability` (80, 90, 100)."""
        if capability >= 90:
            return cls(block_n=128, block_k=128, block_d=32, num_warps=8, num_stages=1)
        return cls(block_n=128, block_k=128, block_d=16, num_warps=8, num_stages=2)

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        tile = {"BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "BLOCK_D": self.block_d}
        return {**tile, "num_warps": self.num_warps, "num_stages": self.num_stages}


@triton.jit(do_not_specialize=["N", "G", "z_stride", "share"])
def vq_search_fwd_kernel(
    z_ptr,  # [N, sum D], row stride z_stride
    centred_ptr,  # [G, K_pad, D_pad] float32
    offsets_ptr,  # [5, G] int32
    centres_ptr,  # [sum D]
    norms_ptr,  # [G, K_pad]
    best_ptr,  # [splits, G, N] float32
    code_ptr,  # [splits, G, N] int32, -1 where the row or every code is not finite
    N,
    G,
    K_pad,
    D_pad,
    z_stride,
    share,  # codes of a codebook that one program searches, a multiple of BLOCK_K
    COSINE: tl.constexpr,  # the largest dot product in place of the smallest distance
    CENTRED: tl.constexpr,
    ALIGNED: tl.constexpr,  # every D_g and z_stride are multiples of 32
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """code = argmin_k |e_k|^2 - 2 z.e_k, or -2 z.e_k where COSINE, over the share of the codes, and its minimum."""
    g = tl.program_id(1)
    split = tl.program_id(2)
    K = tl.load(offsets_ptr + g)
    D = tl.load(offsets_ptr + G + g)
    first_column = tl.load(offsets_ptr + 3 * G + g)
    if ALIGNED:
        first_column = tl.multiple_of(first_column, 32)
        z_stride = tl.multiple_of(z_stride, 32)
    centres_ptr += first_column
    norms_ptr += g.to(tl.int64) * K_pad
    centred_ptr += g.to(tl.int64) * K_pad * D_pad
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    r = tl.arange(0, BLOCK_N)
    in_rows = r < N - start
    z_tile = z_ptr + start * z_stride + first_column
    e_offsets = tl.arange(0, BLOCK_K)[:, None] * D_pad + tl.arange(0, BLOCK_D)[None, :]

    best = tl.full([BLOCK_N], float("inf"), dtype=tl.float32)
    code = tl.full([BLOCK_N], -1, dtype=tl.int32)
    for first_code in range(split * share, tl.minimum(K, (split + 1) * share), BLOCK_K):
        products = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        e_tile = centred_ptr + tl.cast(first_code, tl.int64) * D_pad
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            in_tile = in_rows[:, None] if ALIGNED else in_rows[:, None] & (d < D)[None, :]
            z = tl.load(z_tile + ((r * z_stride)[:, None] + d[None, :]), mask=in_tile, other=0.0).to(tl.float32)
            # z: [BLOCK_N, BLOCK_D]
            if CENTRED:
                z -= tl.load(centres_ptr + d, mask=d < D, other=0.0)[None, :]
            e = tl.load(e_tile + first + e_offsets)  # [BLOCK_K, BLOCK_D]
            products = tl.dot(z, tl.trans(e), products, input_precision="tf32x3")  # [BLOCK_N, BLOCK_K]
        norms = tl.load(norms_ptr + first_code + tl.arange(0, BLOCK_K))  # [BLOCK_K]
        distance = -2.0 * products if COSINE else norms[None, :] - 2.0 * products
        # NaN compares unequal to itself: a code that is not finite is never selected.
        distance = tl.where((norms < float("inf"))[None, :] & (distance == distance), distance, float("inf"))
        nearest, index = tl.min(distance, axis=1, return_indices=True)  # the lowest index on ties
        nearer = nearest < best
        best = tl.where(nearer, nearest, best)
        code = tl.where(nearer, first_code + index, code)
    out = (split * G + g).to(tl.int64) * N + start + r
    tl.store(best_ptr + out, best, mask=in_rows)
    tl.store(code_ptr + out, code, mask=in_rows)


@triton.jit(do_not_specialize=["N", "G", "total_dims", "z_stride", "splits"])
def vq_finish_fwd_kernel(
    z_ptr,  # [N, sum D], row stride z_stride
    codebook_ptr,  # [sum K D] float32
    mask_ptr,  # [N] bool; read where HAS_MASK
    offsets_ptr,  # [5, G] int32
    best_ptr,  # [splits, G, N] float32
    code_ptr,  # [splits, G, N] int32
    codes_ptr,  # [N, G] int64
    quantized_ptr,  # [N, sum D] float32
    error_ptr,  # [row tiles, G] float32
    counts32_ptr,  # [sum K] int32, increased where COUNT
    N,
    G,
    total_dims,
    z_stride,
    splits,
    HAS_MASK: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """code = argmin over the shares, q = e_code, error = sum |z - q|^2 over the rows of a tile."""
    g = tl.program_id(1)
    D = tl.load(offsets_ptr + G + g)
    first_column = tl.load(offsets_ptr + 3 * G + g)
    codebook_ptr += tl.load(offsets_ptr + 4 * G + g).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    r = tl.arange(0, BLOCK_N)
    in_rows = r < N - start
    at = g.to(tl.int64) * N + start + r
    best = tl.load(best_ptr + at, mask=in_rows, other=float("inf"))
    code = tl.load(code_ptr + at, mask=in_rows, other=-1)
    for split in range(1, splits):
        other = at + tl.cast(split, tl.int64) * G * N
        nearest = tl.load(best_ptr + other, mask=in_rows, other=float("inf"))
        index = tl.load(code_ptr + other, mask=in_rows, other=-1)
        nearer = nearest < best  # earlier shares contain the lower indices, so ties keep the lowest
        best = tl.where(nearer, nearest, best)
        code = tl.where(nearer, index, code)
    z_tile = z_ptr + start * z_stride + first_column
    nonfinite = tl.zeros([BLOCK_N], dtype=tl.int32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        in_tile = in_rows[:, None] & (d < D)[None, :]
        z = tl.load(z_tile + ((r * z_stride)[:, None] + d[None, :]), mask=in_tile, other=0.0).to(tl.float32)
        nonfinite = tl.maximum(nonfinite, tl.max((tl.abs(z) < float("inf")).to(tl.int32) ^ 1, axis=1))
    valid = in_rows & (code >= 0) & (nonfinite == 0)
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + start + r, mask=in_rows, other=0) != 0)
    code = tl.where(valid, code, -1)
    tl.store(codes_ptr + start * G + g + r * G, code.to(tl.int64), mask=in_rows)
    if COUNT:  # integers: the same counts in any order
        tl.atomic_add(counts32_ptr + tl.load(offsets_ptr + 2 * G + g) + code, 1, mask=valid, sem="relaxed")
    chosen = tl.where(valid, code, 0).to(tl.int64) * D
    out_tile = quantized_ptr + start * total_dims + first_column
    error = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        in_tile = in_rows[:, None] & (d < D)[None, :]
        with_code = in_tile & valid[:, None]
        z = tl.load(z_tile + ((r * z_stride)[:, None] + d[None, :]), mask=with_code, other=0.0).to(tl.float32)
        q = tl.load(codebook_ptr + (chosen[:, None] + d[None, :]), mask=with_code, other=0.0)
        # z, q: [BLOCK_N, BLOCK_D]
        out = tl.where(valid[:, None], q, float("nan"))
        tl.store(out_tile + ((r * total_dims)[:, None] + d[None, :]), out, mask=in_tile)
        error += tl.sum((z - q) * (z - q), axis=1)
    tl.store(error_ptr + tl.program_id(0).to(tl.int64) * G + g, tl.sum(error, axis=0))


@launches
def assign(
    z: Tensor, codebook: Tensor, layout: CodebookLayout, mask: Tensor | None, centred: bool, with_sums: bool
) -> Result:
    """`reference.assign` for codebooks of any size."""
    N, G = z.shape[0], layout.groups
    z, codebook = rows_of(z), codebook.contiguous()
    codes = torch.empty(N, G, dtype=torch.int64, device=z.device)
    quantized = torch.empty(N, layout.total_dims, dtype=torch.float32, device=z.device)
    if N == 0:
        widths = G, layout.total_codes if with_sums else 0, layout.total_entries if with_sums else 0
        error, counts, sums = (z.new_zeros(1, width, dtype=torch.float32) for width in widths)
        return quantized, codes, error, counts, sums
    prepared = centred_codes(codebook, layout, centred, SearchConfig.of(compute_capability(z.device)).block_k)
    best, code = search(z, prepared, layout, centred=centred)
    block_n = 32
    tiles = triton.cdiv(N, block_n)
    error = torch.empty(tiles, G, dtype=torch.float32, device=z.device)
    vq_finish_fwd_kernel[(tiles, G)](
        z, codebook, mask if mask is not None else z, codebook_offsets(layout, z.device), best, code, codes, quantized,
        error, prepared.counts, N, G, layout.total_dims, z.stride(0), best.shape[0], HAS_MASK=mask is not None,
        COUNT=with_sums, BLOCK_N=block_n, BLOCK_D=32, num_warps=4,
    )  # fmt: skip
    if with_sums:
        segments = Segments.of(codes, prepared.counts, layout)
        counts, sums = segments.add(segments.sum_rows(z))
    else:
        counts, sums = codebook.new_empty(0), codebook.new_empty(0)
    return quantized, codes, error.sum(0, keepdim=True), counts[None], sums[None]


def search(
    z: Tensor, prepared: CentredCodes, layout: CodebookLayout, *, centred: bool, cosine: bool = False
) -> tuple[Tensor, Tensor]:
    """Distances (without |z|^2) and indices [splits, G, N] of the nearest code in each share of the codes.

    With `cosine`, of the code with the largest dot product; z need not be of unit length.
    """
    N, G = z.shape[0], layout.groups
    offsets = codebook_offsets(layout, z.device)
    config = SearchConfig.of(compute_capability(z.device))
    tiles = triton.cdiv(N, config.block_n)
    code_tiles = triton.cdiv(layout.max_codes, config.block_k)
    codes, norms, centres, _ = prepared
    K_pad, D_pad = codes.shape[1:]
    splits = max(1, min(code_tiles, 16, _PROGRAMS // (tiles * G)))
    share = triton.cdiv(code_tiles, splits) * config.block_k
    splits = triton.cdiv(layout.max_codes, share)
    best = torch.empty(splits, G, N, dtype=torch.float32, device=z.device)
    code = torch.empty(splits, G, N, dtype=torch.int32, device=z.device)
    vq_search_fwd_kernel[(tiles, G, splits)](
        z, codes, offsets, centres, norms, best, code, N, G, K_pad, D_pad, z.stride(0), share, COSINE=cosine,
        CENTRED=centred, ALIGNED=all(d % 32 == 0 for d in layout.dims) and z.stride(0) % 32 == 0, **config.options,
    )  # fmt: skip
    return best, code
