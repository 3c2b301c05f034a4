"""Triton kernels of the topographic correlations: distances of all codebooks are added up in registers.

Forward: `topo_distances_fwd_kernel` gives sums of distances over codebooks, for latents, codes and features;
`topo_moments_fwd_kernel` their moments by tile, in float64; `topo_stats_fwd_kernel` the two correlations.
Backward: `topo_weights_bwd_kernel` turns the gradients of the correlations into a weight for each pair of rows,
`topo_pull_bwd_kernel` forms the distances anew and pulls every row towards or away from the others.
Nothing is larger than a few matrices of rows by rows, and nothing depends on timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._triton.tables import book_table, power_of_two
from spinlock_fast.kernels.layout import CodebookLayout

MAX_DIMS = 128
_PROGRAMS = 1024  # that fill a large GPU; a constant, so that sums do not depend on the device


# Rows by rows of a tile of distances, columns at a time; larger tiles spill.
_BLOCK_S, _BLOCK_D = 64, 16


@dataclass(frozen=True)
class PullConfig:
    """Tile sizes of the backward pass, chosen by shape: all columns of a codebook at once."""

    block_s: int
    block_d: int
    num_warps: int = 4

    @classmethod
    def of(cls, widest: int) -> PullConfig:
        block_d = power_of_two(widest, 16)
        return cls(block_s=32 if block_d <= 64 else 16, block_d=block_d)


@triton.jit
def load_points(
    points_ptr, codes_ptr, centre_ptr, r, d, S, D, stride, g, G, first_column, first_entry, OF_CODES: tl.constexpr
):
    """Rows r, columns d of a codebook's points about the centre [BLOCK_S, BLOCK_D], zero outside."""
    inside = (r < S)[:, None] & (d < D)[None, :]
    if OF_CODES:
        code = tl.load(codes_ptr + r * G + g, mask=r < S, other=0).to(tl.int32)
        p = tl.load(
            points_ptr + ((first_entry + tl.maximum(code, 0) * D)[:, None] + d[None, :]), mask=inside, other=0.0
        )
        p = tl.where((code < 0)[:, None], float("nan"), p)
    else:
        p = tl.load(points_ptr + ((r * stride + first_column)[:, None] + d[None, :]), mask=inside, other=0.0)
    centre = tl.load(centre_ptr + first_column + d, mask=d < D, other=0.0)
    return tl.where(inside, p.to(tl.float32) - centre[None, :], 0.0)


@triton.jit
def root_above(square, both, rounding):
    """Distances; 0 where rounding is all there is."""
    return tl.sqrt(tl.where(square <= rounding * both, 0.0, square))


@triton.jit(do_not_specialize=["S", "G", "stride", "books"])
def topo_distances_fwd_kernel(
    points_ptr,  # [S, sum D] with row stride `stride`, or the packed code vectors [sum K D]
    codes_ptr,  # [S, G] int64, or not read
    centre_ptr,  # [sum D]
    table_ptr,  # [5, G] int32
    distances_ptr,  # [splits, S, S] sums over the codebooks of a split
    S,
    G,
    stride,
    books,  # codebooks of a split
    rounding,
    OF_CODES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i, j, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i <= j:
        ri = i * BLOCK_S + tl.arange(0, BLOCK_S)
        rj = j * BLOCK_S + tl.arange(0, BLOCK_S)
        total = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
        for g in range(split * books, tl.minimum(G, (split + 1) * books)):
            D = tl.load(table_ptr + G + g)
            first_column = tl.load(table_ptr + 3 * G + g)
            first_entry = tl.load(table_ptr + 4 * G + g)
            products = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
            own = tl.zeros([BLOCK_S], dtype=tl.float32)
            other = tl.zeros([BLOCK_S], dtype=tl.float32)
            for first in range(0, D, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                a = load_points(
                    points_ptr, codes_ptr, centre_ptr, ri, d, S, D, stride, g, G, first_column, first_entry, OF_CODES
                )
                b = load_points(
                    points_ptr, codes_ptr, centre_ptr, rj, d, S, D, stride, g, G, first_column, first_entry, OF_CODES
                )
                own += tl.sum(a * a, axis=1)
                other += tl.sum(b * b, axis=1)
                products = tl.dot(a, tl.trans(b), products, input_precision="tf32x3")
            both = own[:, None] + other[None, :]
            total += root_above(both - 2.0 * products, both, rounding)
        total = tl.where(ri[:, None] == rj[None, :], 0.0, total)
        out = distances_ptr + split.to(tl.int64) * S * S
        here = (ri < S)[:, None] & (rj < S)[None, :]
        tl.store(out + ri[:, None] * S + rj[None, :], total, mask=here)
        if i < j:
            tl.store(out + rj[None, :] * S + ri[:, None], total, mask=here)


@triton.jit(do_not_specialize=["S", "G", "splits"])
def topo_moments_fwd_kernel(
    x_ptr,  # [1, S, S]
    z_ptr,  # [splits, S, S], changed: part 0 becomes the mean over codebooks
    e_ptr,  # [splits, S, S], changed alike
    moments_ptr,  # [tiles, 8] float64
    S,
    G,
    splits,
    BLOCK_S: tl.constexpr,
):
    i, j = tl.program_id(0), tl.program_id(1)
    ri = i * BLOCK_S + tl.arange(0, BLOCK_S)
    rj = j * BLOCK_S + tl.arange(0, BLOCK_S)
    here = (ri < S)[:, None] & (rj < S)[None, :]
    at = ri[:, None] * S + rj[None, :]
    z = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
    e = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
    for split in range(splits):
        part = tl.cast(split, tl.int64) * S * S
        z += tl.load(z_ptr + part + at, mask=here, other=0.0)
        e += tl.load(e_ptr + part + at, mask=here, other=0.0)
    z = z / G
    e = e / G
    tl.store(z_ptr + at, z, mask=here)
    tl.store(e_ptr + at, e, mask=here)
    pair = here & (ri[:, None] < rj[None, :])
    x = tl.where(pair, tl.load(x_ptr + at, mask=here, other=0.0), 0.0).to(tl.float64)
    z = tl.where(pair, z, 0.0).to(tl.float64)
    e = tl.where(pair, e, 0.0).to(tl.float64)
    out = moments_ptr + (i * tl.num_programs(1) + j) * 8
    tl.store(out, tl.sum(x))
    tl.store(out + 1, tl.sum(z))
    tl.store(out + 2, tl.sum(e))
    tl.store(out + 3, tl.sum(x * x))
    tl.store(out + 4, tl.sum(z * z))
    tl.store(out + 5, tl.sum(e * e))
    tl.store(out + 6, tl.sum(x * z))
    tl.store(out + 7, tl.sum(z * e))


@triton.jit
def spread(total, squares, pairs):
    """Mean, standard deviation (1 where it is no more than rounding), and whether it is more."""
    mean = total / pairs
    variance = squares / pairs - mean * mean
    rounding = 16.0 * 1.1920928955078125e-07 * mean
    counts = variance > tl.maximum(rounding * rounding, 1.1754943508222875e-38)
    return mean, tl.sqrt(tl.where(counts, variance, 1.0)), counts


@triton.jit(do_not_specialize=["S", "tiles"])
def topo_stats_fwd_kernel(
    moments_ptr,  # [tiles, 8] float64
    correlations_ptr,  # [2] float32
    stats_ptr,  # [16] float32: means, deviations, whether they count
    S,
    tiles,
    BLOCK_T: tl.constexpr,
):
    k = tl.arange(0, 8)
    total = tl.zeros([BLOCK_T, 8], dtype=tl.float64)
    for first in range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        total += tl.load(moments_ptr + t[:, None] * 8 + k[None, :], mask=(t < tiles)[:, None], other=0.0)
    moments = tl.sum(total, axis=0)  # [8]
    pairs = tl.maximum(S.to(tl.float64) * (S - 1) / 2, 1.0)
    x, x_dev, x_counts = spread(pick(moments, k, 0), pick(moments, k, 3), pairs)
    z, z_dev, z_counts = spread(pick(moments, k, 1), pick(moments, k, 4), pairs)
    e, e_dev, e_counts = spread(pick(moments, k, 2), pick(moments, k, 5), pairs)
    pre_counts = x_counts & z_counts
    post_counts = z_counts & e_counts
    pre = tl.where(pre_counts, (pick(moments, k, 6) / pairs - x * z) / (x_dev * z_dev), 0.0)
    post = tl.where(post_counts, (pick(moments, k, 7) / pairs - z * e) / (z_dev * e_dev), 0.0)
    tl.store(correlations_ptr, pre.to(tl.float32))
    tl.store(correlations_ptr + 1, post.to(tl.float32))
    tl.store(stats_ptr, x.to(tl.float32))
    tl.store(stats_ptr + 1, z.to(tl.float32))
    tl.store(stats_ptr + 2, e.to(tl.float32))
    tl.store(stats_ptr + 3, x_dev.to(tl.float32))
    tl.store(stats_ptr + 4, z_dev.to(tl.float32))
    tl.store(stats_ptr + 5, e_dev.to(tl.float32))
    tl.store(stats_ptr + 6, pre_counts.to(tl.float32))
    tl.store(stats_ptr + 7, post_counts.to(tl.float32))


@triton.jit
def pick(values, index, at: tl.constexpr):
    """One entry of a vector."""
    return tl.sum(tl.where(index == at, values, 0.0), axis=0)


@triton.jit(do_not_specialize=["S", "G"])
def topo_weights_bwd_kernel(
    grad_pre_ptr,  # scalar
    grad_post_ptr,  # scalar
    correlations_ptr,  # [2]
    stats_ptr,  # [16]
    x_ptr,  # [S, S]
    z_ptr,  # [S, S]
    e_ptr,  # [S, S]
    of_z_ptr,  # [S, S]
    of_e_ptr,  # [S, S]
    S,
    G,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < S.to(tl.int64) * S
    pre, post = tl.load(correlations_ptr), tl.load(correlations_ptr + 1)
    x_mean, z_mean, e_mean = tl.load(stats_ptr), tl.load(stats_ptr + 1), tl.load(stats_ptr + 2)
    x_dev, z_dev, e_dev = tl.load(stats_ptr + 3), tl.load(stats_ptr + 4), tl.load(stats_ptr + 5)
    # dr/db = (a - r b) / sigma_b for standardized a, b, over S (S - 1) / 2 pairs and G codebooks.
    share = 2.0 / (tl.maximum(S.to(tl.float32) * (S - 1), 1.0) * G)
    to_pre = tl.where(tl.load(stats_ptr + 6) > 0.0, share * tl.load(grad_pre_ptr), 0.0)
    to_post = tl.where(tl.load(stats_ptr + 7) > 0.0, share * tl.load(grad_post_ptr), 0.0)
    x = (tl.load(x_ptr + at, mask=here, other=0.0) - x_mean) / x_dev
    z = (tl.load(z_ptr + at, mask=here, other=0.0) - z_mean) / z_dev
    e = (tl.load(e_ptr + at, mask=here, other=0.0) - e_mean) / e_dev
    # A codebook without a code for some row makes e NaN; then nothing flows through it.
    of_post = tl.where(to_post == 0.0, 0.0, to_post * (e - post * z))
    tl.store(of_z_ptr + at, (to_pre * (x - pre * z) + of_post) / z_dev, mask=here)
    tl.store(of_e_ptr + at, tl.where(to_post == 0.0, 0.0, to_post * (z - post * e) / e_dev), mask=here)


@triton.jit(do_not_specialize=["S", "G", "stride", "total_dims"])
def topo_pull_bwd_kernel(
    points_ptr,  # [S, sum D] with row stride `stride`, or the packed code vectors [sum K D]
    codes_ptr,  # [S, G] int64, or not read
    centre_ptr,  # [sum D]
    table_ptr,  # [5, G] int32
    weight_ptr,  # [S, S], symmetric
    grad_ptr,  # [S, sum D]
    S,
    G,
    stride,
    total_dims,
    rounding,
    OF_CODES: tl.constexpr,  # and adds to what is in grad
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_i = sum over j of weight_ij (p_i - p_j) / d_ij."""
    g = tl.program_id(1)
    D = tl.load(table_ptr + G + g)
    first_column = tl.load(table_ptr + 3 * G + g)
    first_entry = tl.load(table_ptr + 4 * G + g)
    d = tl.arange(0, BLOCK_D)
    ri = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    a = load_points(points_ptr, codes_ptr, centre_ptr, ri, d, S, D, stride, g, G, first_column, first_entry, OF_CODES)
    own = tl.sum(a * a, axis=1)
    row = tl.zeros([BLOCK_S], dtype=tl.float32)
    pulled = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for start in range(0, S, BLOCK_S):
        rj = start + tl.arange(0, BLOCK_S)
        b = load_points(
            points_ptr, codes_ptr, centre_ptr, rj, d, S, D, stride, g, G, first_column, first_entry, OF_CODES
        )
        here = (ri < S)[:, None] & (rj < S)[None, :]
        weight = tl.load(weight_ptr + (ri[:, None] * S + rj[None, :]), mask=here, other=0.0)
        both = own[:, None] + tl.sum(b * b, axis=1)[None, :]
        square = both - 2.0 * tl.dot(a, tl.trans(b), input_precision="tf32x3")
        near = (square <= rounding * both) | (ri[:, None] == rj[None, :])
        pull = tl.where(near | (square != square), 0.0, weight * tl.rsqrt(tl.where(near, 1.0, square)))
        row += tl.sum(pull, axis=1)
        b = tl.where(b == b, b, 0.0)
        pulled = tl.dot(pull, b, pulled, input_precision="tf32x3")
    grad = tl.where(a == a, a, 0.0) * row[:, None] - pulled
    out = grad_ptr + ((ri * total_dims + first_column)[:, None] + d[None, :])
    here = (ri < S)[:, None] & (d < D)[None, :]
    if OF_CODES:
        grad += tl.load(out, mask=here, other=0.0)
    tl.store(out, grad, mask=here)


def serves(layout: CodebookLayout) -> bool:
    """Whether the points of a codebook fit a tile."""
    return layout.max_dims <= MAX_DIMS


def distances(
    points: Tensor, codes: Tensor | None, centre: Tensor, layout: CodebookLayout, rows: int, rounding: float
) -> Tensor:
    """Sums of distances over the codebooks of a split [splits, S, S]."""
    tiles = triton.cdiv(rows, _BLOCK_S)
    splits = max(1, min(layout.groups, _PROGRAMS // max(tiles * (tiles + 1) // 2, 1)))
    books = triton.cdiv(layout.groups, splits)
    splits = triton.cdiv(layout.groups, books)
    out = torch.empty(splits, rows, rows, dtype=torch.float32, device=points.device)
    topo_distances_fwd_kernel[(tiles, tiles, splits)](
        points,
        codes if codes is not None else points,
        centre,
        book_table(layout, points.device),
        out,
        rows,
        layout.groups,
        points.stride(0),
        books,
        rounding,
        OF_CODES=codes is not None,
        BLOCK_S=_BLOCK_S,
        BLOCK_D=_BLOCK_D,
        num_warps=4,
        num_stages=1,
    )
    return out


def correlations(d_x: Tensor, d_z: Tensor, d_e: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The two correlations [2] and the figures [16] that the backward pass needs; d_z[0], d_e[0] become means."""
    S = d_x.shape[1]
    block = 32
    tiles = triton.cdiv(S, block)
    moments = torch.empty(tiles * tiles, 8, dtype=torch.float64, device=d_x.device)
    found = torch.empty(2, dtype=torch.float32, device=d_x.device)
    stats = torch.empty(16, dtype=torch.float32, device=d_x.device)
    topo_moments_fwd_kernel[(tiles, tiles)](d_x, d_z, d_e, moments, S, groups, d_z.shape[0], BLOCK_S=block, num_warps=4)
    topo_stats_fwd_kernel[(1,)](moments, found, stats, S, tiles * tiles, BLOCK_T=128, num_warps=4)
    return found, stats


def pull(
    grad_pre: Tensor,
    grad_post: Tensor,
    found: Tensor,
    stats: Tensor,
    d_x: Tensor,
    d_z: Tensor,
    d_e: Tensor,
    latents: Tensor,
    codes: Tensor,
    codebook: Tensor,
    centre: Tensor,
    layout: CodebookLayout,
    rounding: float,
) -> Tensor:
    """Gradient of the latents [S, sum D]."""
    S, G = latents.shape[0], layout.groups
    of_z = torch.empty(S, S, dtype=torch.float32, device=latents.device)
    of_e = torch.empty_like(of_z)
    block = 1024
    topo_weights_bwd_kernel[(triton.cdiv(S * S, block),)](
        grad_pre, grad_post, found, stats, d_x, d_z, d_e, of_z, of_e, S, G, BLOCK=block, num_warps=4
    )
    grad = torch.empty(S, layout.total_dims, dtype=torch.float32, device=latents.device)
    config = PullConfig.of(layout.max_dims)
    table = book_table(layout, latents.device)
    for points, of_codes, weight in ((latents, False, of_z), (codebook, True, of_e)):
        topo_pull_bwd_kernel[(triton.cdiv(S, config.block_s), G)](
            points,
            codes,
            centre,
            table,
            weight,
            grad,
            S,
            G,
            points.stride(0),
            layout.total_dims,
            rounding,
            OF_CODES=of_codes,
            BLOCK_S=config.block_s,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=1,
        )
    return grad
