"""Triton kernels of the moving-average update and of usage statistics.

n <- decay n + (1 - decay) counts; s <- decay s + (1 - decay) sums; e_k = s_k / n_k, see `reference.ema_update`.

`ema_totals_kernel` sums the counts of a codebook, `ema_update_kernel` updates blocks of its codes. A codebook of at
most `MAX_FUSED` codes needs one program of the second kernel only, which computes the totals itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._common.launch_helpers import codebook_offsets, next_power_of_two
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.ema_update.reference import IDLE_SHARE

MAX_FUSED = 64


@triton.jit
def add_parts(parts_ptr, offsets, mask, parts, stride, total):
    """`total` plus the entries at `offsets` of all partial sums, added in order."""
    for part in range(parts):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * stride + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def sum_counts(cluster_size_ptr, counts_ptr, K, parts, total_codes, BLOCK_K: tl.constexpr):
    """Sums over the K codes of a codebook: of the moving counts, and of the counts of this batch."""
    old = tl.zeros([BLOCK_K], dtype=tl.float32)
    new = tl.zeros([BLOCK_K], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        old += tl.load(cluster_size_ptr + k, mask=k < K, other=0.0)
        new = add_parts(counts_ptr, k, k < K, parts, total_codes, new)
    return tl.sum(old, axis=0), tl.sum(new, axis=0)


@triton.jit(do_not_specialize=["G", "parts", "total_codes"])
def ema_totals_kernel(
    cluster_size_ptr,  # [sum K]
    counts_ptr,  # [parts, sum K]
    offsets_ptr,  # [5, G] int32
    totals_ptr,  # [2, G] sums of both
    G,
    parts,
    total_codes,
    BLOCK_K: tl.constexpr,
):
    """totals_g = sum_k n_k of the moving counts, and of the counts of this batch."""
    g = tl.program_id(0)
    K = tl.load(offsets_ptr + g)
    first_code = tl.load(offsets_ptr + 2 * G + g)
    old, new = sum_counts(cluster_size_ptr + first_code, counts_ptr + first_code, K, parts, total_codes, BLOCK_K)
    tl.store(totals_ptr + g, old)
    tl.store(totals_ptr + G + g, new)


@triton.jit(do_not_specialize=["G", "parts", "total_codes", "total_entries"])
def ema_update_kernel(
    codebook_ptr,  # [sum K D], changed
    cluster_size_ptr,  # [sum K], changed
    code_sum_ptr,  # [sum K D], changed
    usage_ptr,  # [sum K], changed where WITH_USAGE: accumulated counts
    counts_ptr,  # [parts, sum K]
    sums_ptr,  # [parts, sum K D]
    offsets_ptr,  # [5, G] int32
    totals_ptr,  # [2, G]; read unless FUSED
    decay,
    one_minus_decay,  # computed in float64
    epsilon,
    idle_share,
    G,
    parts,
    total_codes,
    total_entries,
    FUSED: tl.constexpr,
    LAPLACE: tl.constexpr,
    WITH_USAGE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """n <- decay n + (1 - decay) counts; s <- decay s + (1 - decay) sums; e = s / n, in place."""
    g = tl.program_id(1)
    K = tl.load(offsets_ptr + g)
    D = tl.load(offsets_ptr + G + g)
    first_code = tl.load(offsets_ptr + 2 * G + g)
    first_entry = tl.load(offsets_ptr + 4 * G + g).to(tl.int64)
    if FUSED:
        old, new = sum_counts(cluster_size_ptr + first_code, counts_ptr + first_code, K, parts, total_codes, BLOCK_K)
    else:
        old = tl.load(totals_ptr + g)
        new = tl.load(totals_ptr + G + g)
    if new > 0.0:  # a codebook without rows is kept
        total = decay * old + one_minus_decay * new
        k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        in_codes = k < K
        code = first_code + k
        counts = add_parts(counts_ptr, code, in_codes, parts, total_codes, tl.zeros([BLOCK_K], dtype=tl.float32))
        n = decay * tl.load(cluster_size_ptr + code, mask=in_codes, other=0.0) + one_minus_decay * counts  # [BLOCK_K]
        if LAPLACE:
            n = (n + epsilon) / (total + K * epsilon) * total
            updated = in_codes
        else:
            updated = in_codes & (n > idle_share * total / K)
        divisor = tl.where(updated, n, 1.0)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            entry = first_entry + k.to(tl.int64)[:, None] * D + d[None, :]  # [BLOCK_K, BLOCK_D]
            in_tile = in_codes[:, None] & (d < D)[None, :]
            batch_sum = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
            batch_sum = add_parts(sums_ptr, entry, in_tile, parts, total_entries, batch_sum)
            s = decay * tl.load(code_sum_ptr + entry, mask=in_tile, other=0.0) + one_minus_decay * batch_sum
            tl.store(code_sum_ptr + entry, s, mask=in_tile)
            tl.store(codebook_ptr + entry, s / divisor[:, None], mask=in_tile & updated[:, None])
        # All threads read the counts of the whole codebook before any thread writes them.
        tl.debug_barrier()
        tl.store(cluster_size_ptr + code, n, mask=in_codes)
        if WITH_USAGE:
            used = tl.load(usage_ptr + code, mask=in_codes, other=0)
            tl.store(usage_ptr + code, used + counts.to(used.dtype), mask=in_codes)


@triton.jit(do_not_specialize=["G"])
def code_usage_kernel(
    counts_ptr,  # [sum K], of any number type
    offsets_ptr,  # [5, G] int32
    utilization_ptr,  # [G]
    perplexity_ptr,  # [G]
    G,
    BLOCK_K: tl.constexpr,
):
    """Share of codes with n_k > 0, and exp(-sum p log p) with p_k = n_k / sum(n)."""
    g = tl.program_id(0)
    K = tl.load(offsets_ptr + g)
    counts_ptr += tl.load(offsets_ptr + 2 * G + g)
    total = tl.zeros([BLOCK_K], dtype=tl.float64)
    used = tl.zeros([BLOCK_K], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_K], dtype=tl.float64)  # sum of n log n
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        n = tl.load(counts_ptr + k, mask=k < K, other=0)
        used += (n > 0).to(tl.float32)
        n = n.to(tl.float64)
        total += n
        weighted += tl.where(n > 0.0, n * tl.log(tl.maximum(n, 1e-300)), 0.0)
    N = tl.sum(total, axis=0)
    # -sum p log p = log N - (sum n log n) / N.
    entropy = tl.log(tl.maximum(N, 1e-300)) - tl.sum(weighted, axis=0) / tl.maximum(N, 1e-300)
    tl.store(utilization_ptr + g, tl.sum(used, axis=0) / K)
    tl.store(perplexity_ptr + g, tl.where(N > 0.0, tl.exp(entropy), 0.0).to(tl.float32))


@launches
def ema_update(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    usage: Tensor | None,
    counts: Tensor,
    sums: Tensor,
    layout: CodebookLayout,
    decay: float,
    laplace: bool,
    epsilon: float,
) -> None:
    """`reference.ema_update` in place, and usage += counts. One launch, or two for large codebooks."""
    offsets = codebook_offsets(layout, codebook.device)
    counts, sums = counts.contiguous(), sums.contiguous()
    fused = layout.max_codes <= MAX_FUSED
    block_k = next_power_of_two(layout.max_codes, 32) if fused else 16
    totals = offsets
    if not fused:
        totals = torch.empty(2, layout.groups, dtype=torch.float32, device=codebook.device)
        ema_totals_kernel[(layout.groups,)](
            cluster_size, counts, offsets, totals, layout.groups, counts.shape[0], layout.total_codes, BLOCK_K=1024,
            num_warps=4,
        )  # fmt: skip
    ema_update_kernel[(1 if fused else triton.cdiv(layout.max_codes, block_k), layout.groups)](
        codebook,
        cluster_size,
        code_sum,
        usage if usage is not None else counts,
        counts,
        sums,
        offsets,
        totals,
        decay,
        1.0 - decay,
        epsilon,
        IDLE_SHARE,
        layout.groups,
        counts.shape[0],
        layout.total_codes,
        layout.total_entries,
        FUSED=fused,
        LAPLACE=laplace,
        WITH_USAGE=usage is not None,
        BLOCK_K=block_k,
        BLOCK_D=32 if block_k == 32 else 16,  # larger tiles spill registers
        num_warps=4,
    )


@launches
def code_usage(counts: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """`reference.code_usage` in one launch."""
    utilization = torch.empty(layout.groups, dtype=torch.float32, device=counts.device)
    perplexity = torch.empty_like(utilization)
    code_usage_kernel[(layout.groups,)](
        counts.contiguous(), codebook_offsets(layout, counts.device), utilization, perplexity, layout.groups,
        BLOCK_K=min(1024, next_power_of_two(layout.max_codes, 32)), num_warps=4,
    )  # fmt: skip
    return utilization, perplexity
