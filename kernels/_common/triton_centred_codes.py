"""Triton kernels that subtract the mean code of each codebook and pad the codes for streaming.

Distances between centred vectors lose less to rounding: e' = e - mean_k e_k, and |e'|^2 for the search. The same launch
prepares what a training step needs before codes and counts change.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.launch_helpers import codebook_offsets
from spinlock_fast.kernels._common.layout import CodebookLayout

_PAD_D = 32  # padded dimensions are a multiple, which aligns the rows


@triton.jit(do_not_specialize=["G"])
def code_centres_kernel(codebook_ptr, offsets_ptr, centres_ptr, G, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """centres [sum D]: mean of the finite entries of all codes of each codebook."""
    g = tl.program_id(1)
    K = tl.load(offsets_ptr + g)
    D = tl.load(offsets_ptr + G + g)
    first_column = tl.load(offsets_ptr + 3 * G + g)
    codebook_ptr += tl.load(offsets_ptr + 4 * G + g).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        in_codes = (k < K)[:, None] & (d < D)[None, :]
        # e: [BLOCK_K, BLOCK_D]
        e = tl.load(codebook_ptr + k.to(tl.int64)[:, None] * D + d[None, :], mask=in_codes, other=0.0)
        total += tl.where(tl.abs(e) < float("inf"), e, 0.0)
    centre = tl.sum(total, axis=0) / K
    tl.store(centres_ptr + first_column + d, tl.where(tl.abs(centre) < float("inf"), centre, 0.0), mask=d < D)


@triton.jit(do_not_specialize=["G"])
def centre_codes_kernel(
    codebook_ptr,  # [sum K D]
    offsets_ptr,
    centres_ptr,  # [sum D]
    cluster_size_ptr,  # [sum K]; read where COPY_SIZES
    centred_ptr,  # [G, K_pad, D_pad]: e - centre, zero where padded
    norms_ptr,  # [G, K_pad]: |e - centre|^2, Inf where padded or not finite
    counts32_ptr,  # [sum K] int32, set to 0
    codebook_copy_ptr,  # [sum K D]; written where COPY_CODES
    size_copy_ptr,  # [sum K]; written where COPY_SIZES
    G,
    K_pad,
    D_pad,
    CENTRED: tl.constexpr,
    COPY_CODES: tl.constexpr,
    COPY_SIZES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """e' = e - centre and |e'|^2, padded with zeros and Inf; copies of what a step changes, and zero counts."""
    g = tl.program_id(1)
    K = tl.load(offsets_ptr + g)
    D = tl.load(offsets_ptr + G + g)
    first_column = tl.load(offsets_ptr + 3 * G + g)
    first_code = tl.load(offsets_ptr + 2 * G + g)
    first_entry = tl.load(offsets_ptr + 4 * G + g).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(counts32_ptr + first_code + k, tl.zeros([BLOCK_K], dtype=tl.int32), mask=k < K)
    if COPY_SIZES:
        size = tl.load(cluster_size_ptr + first_code + k, mask=k < K, other=0.0)
        tl.store(size_copy_ptr + first_code + k, size, mask=k < K)
    code = g.to(tl.int64) * K_pad + k
    norms = tl.zeros([BLOCK_K], dtype=tl.float32)
    for first in range(0, D_pad, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        in_codes = (k < K)[:, None] & (d < D)[None, :]
        entry = first_entry + k.to(tl.int64)[:, None] * D + d[None, :]
        e = tl.load(codebook_ptr + entry, mask=in_codes, other=0.0)
        if COPY_CODES:
            tl.store(codebook_copy_ptr + entry, e, mask=in_codes)
        if CENTRED:
            centre = tl.load(centres_ptr + first_column + d, mask=d < D, other=0.0)
            e = tl.where(in_codes, e - centre[None, :], 0.0)
        norms += tl.sum(e * e, axis=1)
        tl.store(centred_ptr + code[:, None] * D_pad + d[None, :], e)
    tl.store(norms_ptr + code, tl.where((k < K) & (norms == norms), norms, float("inf")))


class CentredCodes(NamedTuple):
    """Codes as the search reads them."""

    codes: Tensor  # [G, K_pad, D_pad] codes minus the mean code of their codebook
    norms: Tensor  # [G, K_pad] their squared norms, Inf where padded or not finite
    centres: Tensor  # [sum D] mean codes
    counts: Tensor  # [sum K] int32 zeros


def centred_codes(
    codebook: Tensor,
    layout: CodebookLayout,
    centred: bool,
    block_k: int,
    *,
    cluster_size: Tensor | None = None,
    codebook_copy: Tensor | None = None,
    size_copy: Tensor | None = None,
) -> CentredCodes:
    """Codes minus the mean code of their codebook, padded to a multiple of `block_k`; without `centred`, padded codes.

    Args:
        codebook: [sum K D].
        layout: sizes of the codebooks.
        centred: subtract the mean code.
        block_k: codes of a tile of the search.
        cluster_size: [sum K] moving counts, copied to `size_copy`.
        codebook_copy: [sum K D], set to the codes.
        size_copy: [sum K].
    """
    G, device = layout.groups, codebook.device
    offsets = codebook_offsets(layout, device)
    K_pad = triton.cdiv(layout.max_codes, block_k) * block_k
    D_pad = triton.cdiv(layout.max_dims, _PAD_D) * _PAD_D
    centres = torch.empty(layout.total_dims, dtype=torch.float32, device=device)
    codes = torch.empty(G, K_pad, D_pad, dtype=torch.float32, device=device)
    norms = torch.empty(G, K_pad, dtype=torch.float32, device=device)
    counts = torch.empty(layout.total_codes, dtype=torch.int32, device=device)
    if centred:
        code_centres_kernel[(triton.cdiv(layout.max_dims, 32), G)](
            codebook, offsets, centres, G, BLOCK_K=32, BLOCK_D=32, num_warps=4
        )
    centre_codes_kernel[(K_pad // 32, G)](
        codebook, offsets, centres, norms if cluster_size is None else cluster_size, codes, norms, counts,
        codes if codebook_copy is None else codebook_copy, norms if size_copy is None else size_copy, G, K_pad, D_pad,
        CENTRED=centred, COPY_CODES=codebook_copy is not None, COPY_SIZES=size_copy is not None, BLOCK_K=32, BLOCK_D=32,
        num_warps=4,
    )  # fmt: skip
    return CentredCodes(codes, norms, centres, counts)
