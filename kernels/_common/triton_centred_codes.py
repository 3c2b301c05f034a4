"""Triton kernels that subtract the mean code of each codebook and pad the codes for streaming.

Distances between centred vectors lose less to rounding: e' = e - mean_k e_k, and |e'|^2 for the search.
"""

from __future__ import annotations

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
    centred_ptr,  # [G, K_pad, D_pad]: e - centre, zero where padded
    norms_ptr,  # [G, K_pad]: |e - centre|^2, Inf where padded or not finite
    G,
    K_pad,
    D_pad,
    CENTRED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """e' = e - centre and |e'|^2, padded with zeros and Inf."""
    g = tl.program_id(1)
    K = tl.load(offsets_ptr + g)
    D = tl.load(offsets_ptr + G + g)
    first_column = tl.load(offsets_ptr + 3 * G + g)
    codebook_ptr += tl.load(offsets_ptr + 4 * G + g).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    code = g.to(tl.int64) * K_pad + k
    norms = tl.zeros([BLOCK_K], dtype=tl.float32)
    for first in range(0, D_pad, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        in_codes = (k < K)[:, None] & (d < D)[None, :]
        e = tl.load(codebook_ptr + k.to(tl.int64)[:, None] * D + d[None, :], mask=in_codes, other=0.0)
        if CENTRED:
            centre = tl.load(centres_ptr + first_column + d, mask=d < D, other=0.0)
            e = tl.where(in_codes, e - centre[None, :], 0.0)
        norms += tl.sum(e * e, axis=1)
        tl.store(centred_ptr + code[:, None] * D_pad + d[None, :], e)
    tl.store(norms_ptr + code, tl.where((k < K) & (norms == norms), norms, float("inf")))


def centred_codes(
    codebook: Tensor, layout: CodebookLayout, centred: bool, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes minus the mean code [G, K_pad, D_pad], their squared norms [G, K_pad], and the mean codes [sum D]."""
    G, device = layout.groups, codebook.device
    offsets = codebook_offsets(layout, device)
    K_pad = triton.cdiv(layout.max_codes, block_k) * block_k
    D_pad = triton.cdiv(layout.max_dims, _PAD_D) * _PAD_D
    centres = torch.empty(layout.total_dims, dtype=torch.float32, device=device)
    codes = torch.empty(G, K_pad, D_pad, dtype=torch.float32, device=device)
    norms = torch.empty(G, K_pad, dtype=torch.float32, device=device)
    if centred:
        code_centres_kernel[(triton.cdiv(layout.max_dims, 32), G)](
            codebook, offsets, centres, G, BLOCK_K=32, BLOCK_D=32, num_warps=4
        )
    centre_codes_kernel[(K_pad // 32, G)](
        codebook, offsets, centres, codes, norms, G, K_pad, D_pad, CENTRED=centred, BLOCK_K=32, BLOCK_D=32, num_warps=4
    )
    return codes, norms, centres
