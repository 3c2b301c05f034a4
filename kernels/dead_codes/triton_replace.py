"""Triton kernels of the replacement of dead codes by random rows, without host synchronisation.

Code k of a codebook is dead if its moving count n_k is below a threshold. In a pseudo-random order of the codes, the
i-th dead code becomes row pi(i) of the batch, where pi is a pseudo-random permutation. Both permutations are Feistel
networks of four rounds on the smallest power of four that is at least their size n, applied until the result is below
n (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._common.launch_helpers import next_power_of_two


@triton.jit
def mix(x):
    """A hash of uint32 numbers (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def permute(i, key, half_bits):
    """A permutation of the numbers below 4^half_bits."""
    mask = (tl.full([1], 1, dtype=tl.uint32) << half_bits) - 1
    left, right = i >> half_bits, i & mask
    for turn in tl.static_range(4):
        left, right = right, left ^ (mix(right + mix(key + turn)) & mask)
    return (left << half_bits) | right


@triton.jit
def permute_below(i, limit, key, half_bits):
    """A permutation of the numbers below `limit`, for uint32 i below it; 4^half_bits >= limit."""
    inside = i < limit
    j = permute(i, key, half_bits)
    outside = inside & (j >= limit)
    while tl.max(outside.to(tl.int32), axis=0) > 0:
        j = tl.where(outside, permute(j, key, half_bits), j)
        outside = inside & (j >= limit)
    return j


@triton.jit(do_not_specialize=["K", "N", "code_bits", "row_bits"])
def choose_rows_kernel(
    cluster_size_ptr,  # [slots, K]
    seed_ptr,  # [1] int64
    index_ptr,  # [slots, K] int64 row of a dead code, -1 for other codes
    threshold,
    K,
    N,
    code_bits,  # 4^code_bits >= K
    row_bits,  # 4^row_bits >= N
    BLOCK_K: tl.constexpr,
):
    """index = pi(i) for the i-th dead code, n_k < threshold, in random order; one program for each codebook."""
    slot = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr)
    key = mix(seed.to(tl.uint32) ^ mix((seed >> 32).to(tl.uint32) + slot.to(tl.uint32)))
    before = tl.zeros([1], dtype=tl.int32)
    for first in range(0, K, BLOCK_K):
        position = first + tl.arange(0, BLOCK_K)
        in_codes = position < K
        k = permute_below(position.to(tl.uint32), K, mix(key + 1), code_bits).to(tl.int64)
        size = tl.load(cluster_size_ptr + slot * K + k, mask=in_codes, other=float("inf"))
        dead = (size < threshold).to(tl.int32)
        rank = before + tl.cumsum(dead, axis=0) - dead
        row = permute_below(rank.to(tl.uint32), N, key, row_bits).to(tl.int64)
        tl.store(index_ptr + slot * K + k, tl.where((dead != 0) & (rank < N), row, -1), mask=in_codes)
        before += tl.sum(dead, axis=0)


@triton.jit(do_not_specialize=["K"])
def replace_codes_kernel(
    rows_ptr,  # [G, K, D] new codes
    index_ptr,  # [G, K] int64; below 0: the code is kept
    codebook_ptr,  # [G, K, D], changed
    code_sum_ptr,  # [G, K, D], changed
    cluster_size_ptr,  # [G, K], changed
    size,
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """e_k = row, n_k = size, s_k = size row, where the row is finite."""
    g = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    replaced = tl.load(index_ptr + g * K + k, mask=k < K, other=-1) >= 0
    if tl.max(replaced.to(tl.int32), axis=0) > 0:
        entry = (g * K + k)[:, None] * D
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)[None, :]
            row = tl.load(rows_ptr + entry + d, mask=replaced[:, None] & (d < D), other=0.0)  # [BLOCK_K, BLOCK_D]
            replaced = replaced & (tl.min((tl.abs(row) < float("inf")).to(tl.int32), axis=1) > 0)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)[None, :]
            in_tile = replaced[:, None] & (d < D)
            row = tl.load(rows_ptr + entry + d, mask=in_tile, other=0.0).to(tl.float32)
            tl.store(codebook_ptr + entry + d, row, mask=in_tile)
            tl.store(code_sum_ptr + entry + d, row * size, mask=in_tile)
        tl.store(cluster_size_ptr + g * K + k, tl.zeros([BLOCK_K], dtype=tl.float32) + size, mask=replaced)


@launches
def choose_rows(cluster_size: Tensor, threshold: float, num_rows: int) -> Tensor:
    """[slots, K] int64 a random row of each dead code, different ones in a codebook; -1 for other codes.

    Args:
        cluster_size: [slots, K] contiguous float32 moving counts.
        threshold: codes with a smaller count are dead.
        num_rows: N, at least 1. With more dead codes than rows, random ones get a row.
    """
    slots, K = cluster_size.shape
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=cluster_size.device)
    index = torch.empty(slots, K, dtype=torch.int64, device=cluster_size.device)
    code_bits, row_bits = (max(1, ((limit - 1).bit_length() + 1) // 2) for limit in (K, num_rows))
    choose_rows_kernel[(slots,)](
        cluster_size, seed, index, float(threshold), K, num_rows, code_bits, row_bits,
        BLOCK_K=min(1024, next_power_of_two(K, 32)), num_warps=4,
    )  # fmt: skip
    return index


@launches
def replace_codes(
    rows: Tensor, index: Tensor, codes: Tensor, code_sum: Tensor, cluster_size: Tensor, size: float
) -> None:
    """Replaces the codes with an index of 0 or more by finite rows [G, K, D]; their moving counts become `size`."""
    G, K, D = codes.shape
    replace_codes_kernel[(triton.cdiv(K, 16), G)](
        rows.contiguous(), index.contiguous(), codes, code_sum, cluster_size, float(size), K, D, BLOCK_K=16,
        BLOCK_D=min(64, next_power_of_two(D, 16)), num_warps=4,
    )  # fmt: skip
