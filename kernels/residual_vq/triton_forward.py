"""Triton kernels of `reference.assign`: all stages in one launch, the residual of a tile of rows in registers.

code_q = argmin_k |e_k|^2 - 2 y_q.e_k, r_{q+1} = r_q - e_q. Codes are streamed in tiles while each row keeps its nearest
code so far; no buffer grows with N x K or N x Q x D. Sums are formed from the rows sorted by code, whose residuals are
recomputed from their codes.
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
from spinlock_fast.kernels._common.triton_centred_codes import centred_codes
from spinlock_fast.kernels._common.triton_code_sums import SEGMENT_ROWS, Segments
from spinlock_fast.kernels.residual_vq import triton_stagewise
from spinlock_fast.kernels.residual_vq.reference import Result, Stages
from spinlock_fast.kernels.residual_vq.triton_backward import MAX_DIMS, lengths, row_block


@dataclass(frozen=True)
class ResidualConfig:
    """Tile sizes and launch options, chosen by dimensions and device."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int

    @classmethod
    def of(cls, dims: int, capability: int) -> ResidualConfig:
        """For a device of compute capability `capability` (80, 90, 100): as many rows as fit without spills."""
        block_d = next_power_of_two(dims, 32)
        block_n = 16 if block_d > 64 else 64 if capability >= 90 else 32
        return cls(block_n=block_n, block_k=64, block_d=block_d, num_warps=8)


@triton.jit(do_not_specialize=["N", "x_stride"])
def residual_vq_fwd_kernel(
    x_ptr,  # [N, D], row stride x_stride
    codebook_ptr,  # [sum K, D]
    offsets_ptr,  # [5, Q] int32
    centres_ptr,  # [Q * D]
    centred_ptr,  # [Q, K_pad, D_pad]
    norms_ptr,  # [Q, K_pad], Inf where padded or not finite
    mask_ptr,  # [N] bool; read where HAS_MASK
    codes_ptr,  # [N, Q] int64
    lengths_ptr,  # [N, Q] norms of the residuals; written where COSINE
    zero_ptr,  # [N] int32 first stage whose residual is 0 (and stays 0), or Q
    error_ptr,  # [row tiles, Q]
    N,
    Q,
    D,
    K_pad,
    D_pad,
    x_stride,
    COSINE: tl.constexpr,
    ROTATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """code_q = argmin_k |e_k|^2 - 2 y_q.e_k and r_{q+1} = r_q - e_q of all stages; y = r, or r / |r| where COSINE."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_rows = n < N - start
    valid = in_rows
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + start + n, mask=in_rows, other=0) != 0)
    in_tile = valid[:, None] & (d < D)[None, :]
    residual = tl.load(x_ptr + (start + n)[:, None] * x_stride + d[None, :], mask=in_tile, other=0.0)
    # residual, y, e: [BLOCK_N, BLOCK_D]
    zero = tl.full([BLOCK_N], 0, dtype=tl.int32) + Q
    for q in range(Q):
        K = tl.load(offsets_ptr + q)
        first_code = tl.load(offsets_ptr + 2 * Q + q).to(tl.int64)
        if COSINE:
            length = lengths(residual)
            tl.store(lengths_ptr + (start + n) * Q + q, length, mask=in_rows)
            y = residual / length[:, None]
            centred = y
        else:
            y = residual
            centred = y - tl.load(centres_ptr + q * D + d, mask=d < D, other=0.0)[None, :]
        best = tl.full([BLOCK_N], float("inf"), dtype=tl.float32)
        code = tl.full([BLOCK_N], -1, dtype=tl.int32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            at = tl.cast(q, tl.int64) * K_pad + k
            e = tl.load(centred_ptr + at[:, None] * D_pad + d[None, :], mask=(d < D_pad)[None, :], other=0.0)
            # e: [BLOCK_K, BLOCK_D]
            norms = tl.load(norms_ptr + at)
            products = tl.dot(centred, tl.trans(e), input_precision="tf32x3")  # [BLOCK_N, BLOCK_K]
            distance = -2.0 * products
            if not COSINE:
                distance += norms[None, :]
            # NaN compares unequal to itself: a code that is not finite is never selected.
            distance = tl.where((norms < float("inf"))[None, :] & (distance == distance), distance, float("inf"))
            nearest, index = tl.min(distance, axis=1, return_indices=True)  # the lowest index on ties
            nearer = nearest < best
            best = tl.where(nearer, nearest, best)
            code = tl.where(nearer, first + index, code)
        nonfinite = tl.max((tl.abs(residual) < float("inf")).to(tl.int32) ^ 1, axis=1)
        has_code = valid & (code >= 0) & (nonfinite == 0)
        code = tl.where(has_code, code, -1)
        tl.store(codes_ptr + (start + n) * Q + q, code.to(tl.int64), mask=in_rows)
        chosen = first_code + tl.where(has_code, code, 0).to(tl.int64)
        e = tl.load(codebook_ptr + chosen[:, None] * D + d[None, :], mask=in_tile & has_code[:, None], other=0.0)
        e = tl.where(in_tile & (has_code == 0)[:, None], float("nan"), e)
        difference = tl.where(in_tile, y - e, 0.0)
        error = tl.sum(tl.sum(difference * difference, axis=1), axis=0)
        tl.store(error_ptr + tl.program_id(0).to(tl.int64) * Q + q, error)
        if ROTATION:  # R 0 = 0: the output of a zero residual is 0
            zero = tl.where(tl.sum((residual != 0.0).to(tl.int32), axis=1) == 0, tl.minimum(zero, q), zero)
            e = tl.where((zero <= q)[:, None], 0.0, e)
        residual = tl.where(in_tile, residual - e, 0.0)
    tl.store(zero_ptr + start + n, zero, mask=in_rows)


@triton.jit(do_not_specialize=["N"])
def residual_gather_kernel(
    codebook_ptr,  # [sum K, D]
    offsets_ptr,  # [5, Q] int32
    mask_ptr,  # [N] bool; read where HAS_MASK
    codes_ptr,  # [N, Q] int64
    zero_ptr,  # [N] int32
    quantized_ptr,  # [N, D]
    counts32_ptr,  # [sum K] int32, increased where COUNT
    N,
    Q,
    D,
    HAS_MASK: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """quantized = sum_q e_q, and rows of each code. A kernel of its own, since the search needs the registers."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_rows = n < N - start
    valid = in_rows
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + start + n, mask=in_rows, other=0) != 0)
    zero = tl.load(zero_ptr + start + n, mask=in_rows, other=0)
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for q in range(Q):
        code = tl.load(codes_ptr + (start + n) * Q + q, mask=valid, other=0)
        chosen = tl.load(offsets_ptr + 2 * Q + q).to(tl.int64) + tl.where(code < 0, 0, code)
        if COUNT:  # integers: the same counts in any order
            tl.atomic_add(counts32_ptr + chosen, 1, mask=valid & (code >= 0), sem="relaxed")
        in_tile = (valid & (q < zero))[:, None] & (d < D)[None, :]
        e = tl.load(codebook_ptr + chosen[:, None] * D + d[None, :], mask=in_tile, other=0.0)
        total += tl.where((code < 0)[:, None] & in_tile, float("nan"), e)
    tl.store(quantized_ptr + (start + n)[:, None] * D + d[None, :], total, mask=in_rows[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["N", "x_stride"])
def residual_sum_kernel(
    x_ptr,  # [N, D], row stride x_stride
    codebook_ptr,  # [sum K, D]
    codes_ptr,  # [N, Q] int64
    lengths_ptr,  # [N, Q]; read where COSINE
    zero_ptr,  # [N] int32
    sorted_rows_ptr,  # [Q, N] int32 rows by ascending code
    item_code_ptr,  # [items] int32 code of a segment, -1 for none
    item_first_ptr,  # [items] int32 first sorted position of the segment
    item_last_ptr,  # [items] int32 one past its last position
    codebook_of_code_ptr,  # [sum K] int64
    offsets_ptr,  # [5, Q] int32
    out_ptr,  # [items, D]
    N,
    Q,
    D,
    x_stride,
    COSINE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of y_q over the rows of a segment, where y_q = x - e_0 - ... - e_{q-1}, normalised where COSINE."""
    item = tl.program_id(0).to(tl.int64)
    code = tl.load(item_code_ptr + item)
    if code >= 0:
        q = tl.load(codebook_of_code_ptr + code)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        first = tl.load(item_first_ptr + item)
        last = tl.load(item_last_ptr + item)
        total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        for position in range(first, last, BLOCK_R):
            at = position + tl.arange(0, BLOCK_R)
            in_segment = at < last
            in_tile = in_segment[:, None] & (d < D)[None, :]
            row = tl.load(sorted_rows_ptr + q * N + at, mask=in_segment, other=0).to(tl.int64)
            # value: [BLOCK_R, BLOCK_D]
            value = tl.load(x_ptr + (row * x_stride)[:, None] + d[None, :], mask=in_tile, other=0.0)
            zero = tl.load(zero_ptr + row, mask=in_segment, other=0)
            for s in range(q):
                earlier_code = tl.load(codes_ptr + row * Q + s, mask=in_segment, other=0)
                earlier_code += tl.load(offsets_ptr + 2 * Q + s).to(tl.int64)
                nonzero = in_tile & (s < zero)[:, None]
                value -= tl.load(codebook_ptr + earlier_code[:, None] * D + d[None, :], mask=nonzero, other=0.0)
            if COSINE:
                value = value / tl.load(lengths_ptr + row * Q + q, mask=in_segment, other=1.0)[:, None]
            total += tl.where(in_tile, value, 0.0)
        tl.store(out_ptr + item * D + d, tl.sum(total, axis=0), mask=d < D)


@launches
def assign(x: Tensor, codebook: Tensor, stages: Stages, with_sums: bool) -> Result:
    """`reference.assign`."""
    num_codes, mask, cosine, gradient = stages
    (N, D), Q = x.shape, len(num_codes)
    if D > MAX_DIMS:
        return triton_stagewise.assign(x, codebook, stages, with_sums)
    layout = CodebookLayout.of(num_codes, [D] * Q)
    x, codebook = rows_of(x), codebook.contiguous()
    codes = torch.empty(N, Q, dtype=torch.int64, device=x.device)
    quantized = x.new_empty(N, D)
    total = len(codebook) if with_sums else 0
    if N == 0:
        return quantized, codes, x.new_zeros(Q), x.new_zeros(total), x.new_zeros(total, D)
    config = ResidualConfig.of(D, compute_capability(x.device))
    offsets = codebook_offsets(layout, x.device)
    centred, norms, centres, counts = centred_codes(codebook, layout, not cosine, config.block_k)
    residual_lengths = x.new_empty(N, Q if cosine else 0)
    zero = torch.empty(N, dtype=torch.int32, device=x.device)
    tiles = triton.cdiv(N, config.block_n)
    errors = x.new_empty(tiles, Q)
    residual_vq_fwd_kernel[(tiles,)](
        x, codebook, offsets, centres, centred, norms, x if mask is None else mask, codes, residual_lengths, zero,
        errors, N, Q, D, centred.shape[1], centred.shape[2], x.stride(0), COSINE=cosine,
        ROTATION=gradient == "rotation", HAS_MASK=mask is not None, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_D=config.block_d, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
    block_n = row_block(config.block_d)
    residual_gather_kernel[(triton.cdiv(N, block_n),)](
        codebook, offsets, x if mask is None else mask, codes, zero, quantized, counts, N, Q, D,
        HAS_MASK=mask is not None, COUNT=with_sums, BLOCK_N=block_n, BLOCK_D=config.block_d, num_warps=4,
    )  # fmt: skip
    errors = errors.sum(0)
    if not with_sums:
        return quantized, codes, errors, x.new_empty(0), x.new_empty(0, D)
    segments = Segments.of(codes, counts, layout)
    parts = segments.new_sums()
    residual_sum_kernel[(segments.num_items, triton.cdiv(D, segments.block_d))](
        x, codebook, codes, residual_lengths, zero, *segments.tables, layout.indices(x.device).codebook_of_code,
        offsets, parts, N, Q, D, x.stride(0), COSINE=cosine, BLOCK_R=SEGMENT_ROWS, BLOCK_D=segments.block_d,
        num_warps=4,
    )  # fmt: skip
    batch_counts, sums = segments.add(parts)
    return quantized, codes, errors, batch_counts, sums.view(-1, D)
