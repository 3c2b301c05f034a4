"""Triton kernels of the topographic correlations, forward: distances of all codebooks are summed in registers.

`topo_points_fwd_kernel` gathers centred features, latents and codes into columns padded to whole tiles, and the squared
norms of their rows; `topo_distances_fwd_kernel` sums distances over codebooks; `topo_moments_fwd_kernel` computes their
moments per tile in float64; `topo_stats_fwd_kernel` computes both correlations and the loss. No buffer is larger than a
few S x S matrices, and results are bitwise reproducible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches, rows_of
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.table_cache import TableCache

COLUMNS = 16  # columns of a tile; points are padded to whole tiles, so loads are aligned and need no mask
BLOCK_S = 64  # rows of a tile; points are padded to whole tiles
BLOCK_PAIRS = 32  # rows and columns of a tile of pairs, for moments and pair weights
DISTANCES_TILES: dict[str, Any] = {"BLOCK_S": BLOCK_S, "BLOCK_D": COLUMNS, "num_warps": 4, "num_stages": 1}
POINTS_TILES: dict[str, Any] = {"BLOCK_S": BLOCK_S, "BLOCK_D": COLUMNS, "num_warps": 4}
SPLITS = 8  # parts of the codebooks whose distances are summed in parallel; constant, for reproducible sums


class Points(NamedTuple):
    """1 + 2 G sets of points: the features, the latents of every codebook, the codes of every codebook."""

    points: Tensor  # [rows padded, columns padded] minus the centre, 0 where padded or not finite
    norms: Tensor  # [1 + 2 G, rows padded] squared norms; NaN where a point is not finite
    centre: Tensor  # [columns padded]


@dataclass(frozen=True)
class PointSets:
    """Position of each set of points in the padded columns."""

    table: Tensor  # [5, 1 + 2 G] int32: D, first source column or entry, first padded column, padded columns, K
    splits: Tensor  # [parts + 1] int32 first set of each part
    parts: tuple[int, int, int]  # number of parts of features, latents, codes
    columns: int

    @property
    def count(self) -> int:
        return self.table.shape[1]


_sets: TableCache[PointSets] = TableCache(256)


def point_sets(features: int, layout: CodebookLayout, device: torch.device) -> PointSets:
    """The sets of points of a layout on `device`; cached."""

    def make() -> PointSets:
        G = layout.groups
        dims = [features, *layout.dims, *layout.dims]
        padded = [-(-d // COLUMNS) * COLUMNS for d in dims]
        entries = [k * d for k, d in zip(layout.num_codes, layout.dims, strict=True)]
        source = [0, *_starts(list(layout.dims)), *_starts(entries)]
        rows = [dims, source, _starts(padded), padded, [0, *layout.num_codes, *layout.num_codes]]
        cuts = _cuts(padded[1 : 1 + G], SPLITS)
        splits = [0, *(1 + cut for cut in cuts), *(1 + G + cut for cut in cuts), 1 + 2 * G]
        return PointSets(
            torch.tensor(rows, dtype=torch.int32, device="cpu").to(device),
            torch.tensor(splits, dtype=torch.int32, device="cpu").to(device),
            (1, len(cuts), len(cuts)),
            sum(padded),
        )

    return _sets.get((features, layout.num_codes, layout.dims, device), device, make)


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _cuts(sizes: list[int], parts: int) -> list[int]:
    """First indices of at most `parts` consecutive runs of similar cost."""
    cost = [COLUMNS + size for size in sizes]  # a square root per pair, besides the products
    share, cuts, run = sum(cost) / parts, [0], 0.0
    for i, size in enumerate(cost):
        if run and run + size / 2 > share:
            cuts.append(i)
            run = 0.0
        run += size
    return cuts


@triton.jit(do_not_specialize=["S", "G", "x_stride", "z_stride"])
def topo_points_fwd_kernel(
    x_ptr,  # [S, F], row stride x_stride
    z_ptr,  # [S, sum D], row stride z_stride
    codebook_ptr,  # [sum K D]
    codes_ptr,  # [S, G] int64
    sets_ptr,  # [5, 1 + 2 G] int32, see PointSets
    points_ptr,  # [rows padded, columns]
    norms_ptr,  # [1 + 2 G, rows padded]
    centre_ptr,  # [columns]
    S,
    G,
    x_stride,
    z_stride,
    columns,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gathers BLOCK_S rows of one set of points, minus the mean of its first BLOCK_S rows, and their squared norms."""
    s = tl.program_id(1)
    sets = 2 * G + 1
    D = tl.load(sets_ptr + s)
    source = tl.load(sets_ptr + sets + s)
    first_column = tl.load(sets_ptr + 2 * sets + s)
    width = tl.load(sets_ptr + 3 * sets + s)
    head = tl.arange(0, BLOCK_S)  # [BLOCK_S] the first rows: any centre among the points will do
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + head  # [BLOCK_S]
    head_source, row_source = head * z_stride + source, row * z_stride + source
    head_valid, row_valid = head >= 0, row >= 0
    base = z_ptr
    if s == 0:
        base = x_ptr
        head_source, row_source = head * x_stride, row * x_stride
    if s > G:
        base = codebook_ptr
        head_code = tl.load(codes_ptr + head * G + (s - G - 1), mask=head < S, other=0).to(tl.int32)
        code = tl.load(codes_ptr + row * G + (s - G - 1), mask=row < S, other=0)
        K = tl.load(sets_ptr + 4 * sets + s)
        head_valid, row_valid = (head_code >= 0) & (head_code < K), (code >= 0) & (code < K)
        head_source = source + tl.where(head_valid, head_code, 0) * D
        row_source = source + tl.where(row_valid, code, 0) * D

    squares = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (head < S)[:, None] & (d < D)[None, :]
        p = tl.load(base + (head_source[:, None] + d[None, :]), mask=inside, other=0.0)  # [BLOCK_S, BLOCK_D]
        p = tl.where(head_valid[:, None] & (tl.abs(p) < float("inf")), p, 0.0)
        centre = tl.sum(p, axis=0) / tl.minimum(S, BLOCK_S)  # [BLOCK_D]
        inside = (row < S)[:, None] & (d < D)[None, :]
        p = tl.load(base + (row_source[:, None] + d[None, :]), mask=inside, other=0.0)  # [BLOCK_S, BLOCK_D]
        p = tl.where(inside, p - centre[None, :], 0.0)
        finite = tl.abs(p) < float("inf")
        squares += tl.where(finite, p * p, float("nan"))
        out = row[:, None] * columns + (first_column + d)[None, :]
        tl.store(points_ptr + out, tl.where(finite, p, 0.0))
        if tl.program_id(0) == 0:
            tl.store(centre_ptr + first_column + d, centre)
    norms = tl.where(row_valid, tl.sum(squares, axis=1), float("nan"))
    tl.store(norms_ptr + s.to(tl.int64) * tl.num_programs(0) * BLOCK_S + row, norms)


@triton.jit
def load_tile(points_ptr, row, first_column, c, width, columns):
    """Rows `row` and columns c of a set of points, [rows, columns]; 0 beyond the set."""
    at = row.to(tl.int64)[:, None] * columns + (tl.multiple_of(first_column, 16) + c)[None, :]
    return tl.load(points_ptr + at, mask=(c < width)[None, :], other=0.0)


@triton.jit
def add_products(points_ptr, products, ri, rj, first_column, width, columns, BLOCK_D: tl.constexpr):
    """products + p_i p_j^T over the columns of a set of points, [rows i, rows j]."""
    for start in range(0, width, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)
        a = load_tile(points_ptr, ri, first_column, c, width, columns)  # [rows i, BLOCK_D]
        b = load_tile(points_ptr, rj, first_column, c, width, columns)  # [rows j, BLOCK_D]
        products = tl.dot(a, tl.trans(b), products, input_precision="tf32x3")
    return products


@triton.jit(do_not_specialize=["S", "sets"])
def topo_distances_fwd_kernel(
    points_ptr,  # [rows padded, columns]
    norms_ptr,  # [sets, rows padded]
    sets_ptr,  # [5, sets] int32, see PointSets
    splits_ptr,  # [parts + 1] int32
    distances_ptr,  # [parts, S, S] sums over the sets of a part; tiles on and above the diagonal
    S,
    sets,
    columns,
    rounding,
    x_rounding,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum_s |p_i - p_j| over the sets s of a part; |p_i - p_j|^2 = |p_i|^2 + |p_j|^2 - 2 p_i p_j, 0 within rounding."""
    i, j, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i <= j:
        ri = i * BLOCK_S + tl.arange(0, BLOCK_S)
        rj = j * BLOCK_S + tl.arange(0, BLOCK_S)
        total = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
        tolerance = rounding
        if part == 0:
            tolerance = x_rounding
        for s in range(tl.load(splits_ptr + part), tl.load(splits_ptr + part + 1)):
            first_column = tl.load(sets_ptr + 2 * sets + s)
            width = tl.load(sets_ptr + 3 * sets + s)
            norms = norms_ptr + tl.cast(s, tl.int64) * tl.num_programs(0) * BLOCK_S
            both = tl.load(norms + ri)[:, None] + tl.load(norms + rj)[None, :]  # [BLOCK_S, BLOCK_S]
            products = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
            products = add_products(points_ptr, products, ri, rj, first_column, width, columns, BLOCK_D)
            square = both - 2.0 * products
            total += tl.sqrt(tl.where(square <= tolerance * both, 0.0, square))
        total = tl.where(ri[:, None] == rj[None, :], 0.0, total)
        out = distances_ptr + part.to(tl.int64) * S * S
        inside = (ri < S)[:, None] & (rj < S)[None, :]
        tl.store(out + ri.to(tl.int64)[:, None] * S + rj[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["S", "G", "parts"])
def topo_moments_fwd_kernel(
    distances_ptr,  # [1 + 2 parts, S, S]; the first of latents and of codes become means over codebooks
    moments_ptr,  # [tiles, 8] float64
    S,
    G,
    parts,  # number of parts of latents, and of codes
    BLOCK_S: tl.constexpr,
):
    """Per tile of pairs i < j: sums of d_x, d_z, d_e, of their squares, of d_x d_z and of d_z d_e."""
    i, j = tl.program_id(0), tl.program_id(1)
    ri = i * BLOCK_S + tl.arange(0, BLOCK_S)
    rj = j * BLOCK_S + tl.arange(0, BLOCK_S)
    here = (ri < S)[:, None] & (rj < tl.where(i <= j, S, 0))[None, :]
    at = ri.to(tl.int64)[:, None] * S + rj[None, :]
    matrix = S.to(tl.int64) * S
    z_ptr = distances_ptr + matrix
    e_ptr = z_ptr + parts * matrix
    z = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
    e = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
    for part in range(parts):
        z += tl.load(z_ptr + part * matrix + at, mask=here, other=0.0)
        e += tl.load(e_ptr + part * matrix + at, mask=here, other=0.0)
    z = z / G
    e = e / G
    tl.store(z_ptr + at, z, mask=here)
    tl.store(e_ptr + at, e, mask=here)
    pair = here & (ri[:, None] < rj[None, :])
    x = tl.where(pair, tl.load(distances_ptr + at, mask=here, other=0.0), 0.0).to(tl.float64)
    z = tl.where(pair, z, 0.0).to(tl.float64)
    e = tl.where(pair, e, 0.0).to(tl.float64)
    out = moments_ptr + (i.to(tl.int64) * tl.num_programs(1) + j) * 8
    tl.store(out, tl.sum(x))
    tl.store(out + 1, tl.sum(z))
    tl.store(out + 2, tl.sum(e))
    tl.store(out + 3, tl.sum(x * x))
    tl.store(out + 4, tl.sum(z * z))
    tl.store(out + 5, tl.sum(e * e))
    tl.store(out + 6, tl.sum(x * z))
    tl.store(out + 7, tl.sum(z * e))


@triton.jit
def mean_and_deviation(total, squares, pairs):
    """Mean, standard deviation, and whether it exceeds rounding errors; else the deviation is 1."""
    mean = total / pairs
    variance = squares / pairs - mean * mean
    rounding = 16.0 * 1.1920928955078125e-07 * mean
    counts = variance > tl.maximum(rounding * rounding, 1.1754943508222875e-38)
    return mean, tl.sqrt(tl.where(counts, variance, 1.0)), counts


@triton.jit(do_not_specialize=["S", "tiles"])
def topo_stats_fwd_kernel(
    moments_ptr,  # [tiles, 8] float64
    correlations_ptr,  # [2] float32
    loss_ptr,  # [] float32
    stats_ptr,  # [16] float32: 3 means, 3 deviations, whether each correlation is defined
    S,
    tiles,
    pre_weight,
    BLOCK_T: tl.constexpr,
):
    """r = (E[ab] - E[a] E[b]) / (sigma_a sigma_b) of both pairs, and 1 - w pre - (1 - w) post."""
    k = tl.arange(0, 8)
    total = tl.zeros([BLOCK_T, 8], dtype=tl.float64)
    for first in range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        total += tl.load(moments_ptr + t.to(tl.int64)[:, None] * 8 + k[None, :], mask=(t < tiles)[:, None], other=0.0)
    moments = tl.sum(total, axis=0)  # [8]
    pairs = tl.maximum(S.to(tl.float64) * (S - 1) / 2, 1.0)
    x, x_dev, x_counts = mean_and_deviation(entry_of(moments, k, 0), entry_of(moments, k, 3), pairs)
    z, z_dev, z_counts = mean_and_deviation(entry_of(moments, k, 1), entry_of(moments, k, 4), pairs)
    e, e_dev, e_counts = mean_and_deviation(entry_of(moments, k, 2), entry_of(moments, k, 5), pairs)
    pre_counts = x_counts & z_counts
    post_counts = z_counts & e_counts
    pre = tl.where(pre_counts, (entry_of(moments, k, 6) / pairs - x * z) / (x_dev * z_dev), 0.0)
    post = tl.where(post_counts, (entry_of(moments, k, 7) / pairs - z * e) / (z_dev * e_dev), 0.0)
    tl.store(correlations_ptr, pre.to(tl.float32))
    tl.store(correlations_ptr + 1, post.to(tl.float32))
    tl.store(loss_ptr, (1.0 - pre_weight * pre - (1.0 - pre_weight) * post).to(tl.float32))
    tl.store(stats_ptr, x.to(tl.float32))
    tl.store(stats_ptr + 1, z.to(tl.float32))
    tl.store(stats_ptr + 2, e.to(tl.float32))
    tl.store(stats_ptr + 3, x_dev.to(tl.float32))
    tl.store(stats_ptr + 4, z_dev.to(tl.float32))
    tl.store(stats_ptr + 5, e_dev.to(tl.float32))
    tl.store(stats_ptr + 6, pre_counts.to(tl.float32))
    tl.store(stats_ptr + 7, post_counts.to(tl.float32))


@triton.jit
def entry_of(values, index, at: tl.constexpr):
    """values[at] of a vector."""
    return tl.sum(tl.where(index == at, values, 0.0), axis=0)


def gather_points(x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout) -> Points:
    """The points of all sets, with norms and centre."""
    S = x.shape[0]
    sets = point_sets(x.shape[1], layout, x.device)
    tiles = triton.cdiv(S, BLOCK_S)
    options: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    points = torch.empty(tiles * BLOCK_S, sets.columns, **options)
    norms = torch.empty(sets.count, tiles * BLOCK_S, **options)
    centre = torch.empty(sets.columns, **options)
    topo_points_fwd_kernel[(tiles, sets.count)](
        x, latents, codebook, codes, sets.table, points, norms, centre,
        S, layout.groups, x.stride(0), latents.stride(0), sets.columns, **POINTS_TILES,
    )  # fmt: skip
    return Points(points, norms, centre)


def summed_distances(points: Points, sets: PointSets, rows: int, rounding: float, x_rounding: float) -> Tensor:
    """[parts, S, S] sums of distances over the sets of each part; tiles on and above the diagonal."""
    tiles = triton.cdiv(rows, BLOCK_S)
    out = torch.empty(sum(sets.parts), rows, rows, dtype=torch.float32, device=points.points.device)
    topo_distances_fwd_kernel[(tiles, tiles, sum(sets.parts))](
        points.points, points.norms, sets.table, sets.splits, out, rows, sets.count, sets.columns, rounding, x_rounding,
        **DISTANCES_TILES,
    )  # fmt: skip
    return out


def correlations(distances: Tensor, sets: PointSets, groups: int, pre_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both correlations [2], the loss [] and the statistics [16] that the gradient needs.

    Changes `distances`: the sums of latents and of codes become means over codebooks.
    """
    S = distances.shape[1]
    tiles = triton.cdiv(S, BLOCK_PAIRS)
    options: dict[str, Any] = {"dtype": torch.float32, "device": distances.device}
    moments = torch.empty(tiles * tiles, 8, dtype=torch.float64, device=distances.device)
    both, loss, stats = torch.empty(2, **options), torch.empty((), **options), torch.empty(16, **options)
    topo_moments_fwd_kernel[(tiles, tiles)](
        distances, moments, S, groups, sets.parts[1], BLOCK_S=BLOCK_PAIRS, num_warps=4
    )
    topo_stats_fwd_kernel[(1,)](moments, both, loss, stats, S, tiles * tiles, pre_weight, BLOCK_T=128, num_warps=4)
    return both, loss, stats


def rounding_error(width: int) -> float:
    """`reference.rounding` of points of `width` columns, plus the 2 bits that three TF32 products lose."""
    return (16.0 + math.sqrt(width)) * torch.finfo(torch.float32).eps


@launches
def forward(
    x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout, pre_weight: float
) -> tuple[Tensor, ...]:
    """Both correlations [2], the loss [], and what `triton_backward.backward` reads."""
    x, latents = rows_of(x), rows_of(latents)
    codes, codebook = codes.contiguous(), codebook.contiguous()
    S, F = x.shape
    sets = point_sets(F, layout, x.device)
    points = gather_points(x, latents, codes, codebook, layout)
    distances = summed_distances(points, sets, S, rounding_error(layout.max_dims), rounding_error(F))
    both, loss, stats = correlations(distances, sets, layout.groups, pre_weight)
    return both, loss, both, stats, distances, *points
