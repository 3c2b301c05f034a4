"""Triton kernels of the topographic correlations, forward: distances of all codebooks are added up in registers.

`topo_points_fwd_kernel` gathers features, latents and codes once, about a centre, in columns padded to whole tiles,
with the squared norm of every row; `topo_distances_fwd_kernel` adds up distances over codebooks;
`topo_moments_fwd_kernel` gives their moments by tile, in float64; `topo_stats_fwd_kernel` the two correlations.
Nothing is larger than a few matrices of rows by rows, and nothing depends on timing. The gradient is in `pull`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.table_cache import TableCache

COLUMNS = 16  # of a tile; points are padded to whole tiles, so that loads need no mask and are aligned
BLOCK_S = 64  # rows of a tile; points are padded to whole tiles as well
BLOCK_PAIRS = 32  # of rows by rows, where moments and weights are formed
DISTANCES_TILES: dict[str, Any] = {"BLOCK_S": BLOCK_S, "BLOCK_D": COLUMNS, "num_warps": 4, "num_stages": 1}
POINTS_TILES: dict[str, Any] = {"BLOCK_S": BLOCK_S, "BLOCK_D": COLUMNS, "num_warps": 4}
SPLITS = 8  # runs of codebooks whose distances are added up side by side; a constant, so that sums are the same


class Points(NamedTuple):
    """Sets of points: the features, then the latents of every codebook, then their codes."""

    points: Tensor  # [rows padded, all columns padded] about the centre, 0 where padded or not finite
    norms: Tensor  # [1 + 2 G, rows padded] squared; NaN where a point is not finite
    centre: Tensor  # [all columns padded]


@dataclass(frozen=True)
class PointSets:
    """Where each set of points lies among the padded columns."""

    table: Tensor  # [5, 1 + 2 G] int32: D, first column or entry of the source, first column here, columns here, K
    splits: Tensor  # [parts + 1] int32 first set of each part
    parts: tuple[int, int, int]  # of features, latents, codes
    columns: int

    @property
    def count(self) -> int:
        return self.table.shape[1]


_sets: TableCache[PointSets] = TableCache(256)


def point_sets(features: int, layout: CodebookLayout, device: torch.device) -> PointSets:
    """The sets of points of a layout, made once."""

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
    """First index of each of at most `parts` runs of about the same size."""
    cost = [COLUMNS + size for size in sizes]  # a root for every pair besides the product
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
    table_ptr,  # [5, 1 + 2 G] int32, see PointSets
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
    s = tl.program_id(1)
    sets = 2 * G + 1
    D = tl.load(table_ptr + s)
    source = tl.load(table_ptr + sets + s)
    here = tl.load(table_ptr + 2 * sets + s)
    width = tl.load(table_ptr + 3 * sets + s)
    first = tl.arange(0, BLOCK_S)  # the rows whose mean is the centre: any point among them all will do
    mine = tl.program_id(0).to(tl.int64) * BLOCK_S + first
    row, own = first * z_stride + source, mine * z_stride + source
    good, own_good = first >= 0, mine >= 0
    base = z_ptr
    if s == 0:
        base = x_ptr
        row, own = first * x_stride, mine * x_stride
    if s > G:
        base = codebook_ptr
        code = tl.load(codes_ptr + first * G + (s - G - 1), mask=first < S, other=0).to(tl.int32)
        own_code = tl.load(codes_ptr + mine * G + (s - G - 1), mask=mine < S, other=0)
        K = tl.load(table_ptr + 4 * sets + s)
        good, own_good = (code >= 0) & (code < K), (own_code >= 0) & (own_code < K)
        row, own = source + tl.where(good, code, 0) * D, source + tl.where(own_good, own_code, 0) * D

    norm = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (first < S)[:, None] & (d < D)[None, :]
        p = tl.load(base + (row[:, None] + d[None, :]), mask=inside, other=0.0)  # [BLOCK_S, BLOCK_D]
        p = tl.where(good[:, None] & (tl.abs(p) < float("inf")), p, 0.0)
        centre = tl.sum(p, axis=0) / tl.minimum(S, BLOCK_S)
        inside = (mine < S)[:, None] & (d < D)[None, :]
        p = tl.load(base + (own[:, None] + d[None, :]), mask=inside, other=0.0)
        p = tl.where(inside, p - centre[None, :], 0.0)
        finite = tl.abs(p) < float("inf")
        norm += tl.where(finite, p * p, float("nan"))
        out = mine[:, None] * columns + (here + d)[None, :]
        tl.store(points_ptr + out, tl.where(finite, p, 0.0))
        if tl.program_id(0) == 0:
            tl.store(centre_ptr + here + d, centre)
    norms = tl.where(own_good, tl.sum(norm, axis=1), float("nan"))
    tl.store(norms_ptr + s.to(tl.int64) * tl.num_programs(0) * BLOCK_S + mine, norms)


@triton.jit
def load_tile(points_ptr, row, here, c, width, columns):
    """Columns c of a set of points, for some rows [rows, columns]; zero beyond the set."""
    at = row.to(tl.int64)[:, None] * columns + (tl.multiple_of(here, 16) + c)[None, :]
    return tl.load(points_ptr + at, mask=(c < width)[None, :], other=0.0)


@triton.jit
def products_of(points_ptr, products, ri, rj, here, width, columns, BLOCK_D: tl.constexpr):
    """Adds the products of rows i and j of a set of points."""
    for start in range(0, width, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)
        a = load_tile(points_ptr, ri, here, c, width, columns)
        b = load_tile(points_ptr, rj, here, c, width, columns)
        products = tl.dot(a, tl.trans(b), products, input_precision="tf32x3")
    return products


@triton.jit(do_not_specialize=["S", "sets"])
def topo_distances_fwd_kernel(
    points_ptr,  # [rows padded, columns]
    norms_ptr,  # [sets, rows padded]
    table_ptr,  # [5, sets] int32
    splits_ptr,  # [parts + 1] int32
    distances_ptr,  # [parts, S, S] sums over the sets of a part; only tiles on and above the diagonal
    S,
    sets,
    columns,
    rounding,
    x_rounding,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i, j, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i <= j:
        ri = i * BLOCK_S + tl.arange(0, BLOCK_S)
        rj = j * BLOCK_S + tl.arange(0, BLOCK_S)
        total = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
        allowed = rounding
        if part == 0:
            allowed = x_rounding
        for s in range(tl.load(splits_ptr + part), tl.load(splits_ptr + part + 1)):
            here = tl.load(table_ptr + 2 * sets + s)
            width = tl.load(table_ptr + 3 * sets + s)
            norms = norms_ptr + tl.cast(s, tl.int64) * tl.num_programs(0) * BLOCK_S
            both = tl.load(norms + ri)[:, None] + tl.load(norms + rj)[None, :]
            products = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
            products = products_of(points_ptr, products, ri, rj, here, width, columns, BLOCK_D)
            square = both - 2.0 * products
            total += tl.sqrt(tl.where(square <= allowed * both, 0.0, square))
        total = tl.where(ri[:, None] == rj[None, :], 0.0, total)
        out = distances_ptr + part.to(tl.int64) * S * S
        inside = (ri < S)[:, None] & (rj < S)[None, :]
        tl.store(out + ri.to(tl.int64)[:, None] * S + rj[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["S", "G", "parts"])
def topo_moments_fwd_kernel(
    distances_ptr,  # [1 + 2 parts, S, S]; of latents and of codes the first becomes the mean over codebooks
    moments_ptr,  # [tiles, 8] float64
    S,
    G,
    parts,  # of latents, and of codes
    BLOCK_S: tl.constexpr,
):
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
    loss_ptr,  # [] float32
    stats_ptr,  # [16] float32: means, deviations, whether they count
    S,
    tiles,
    pre_weight,
    BLOCK_T: tl.constexpr,
):
    k = tl.arange(0, 8)
    total = tl.zeros([BLOCK_T, 8], dtype=tl.float64)
    for first in range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        total += tl.load(moments_ptr + t.to(tl.int64)[:, None] * 8 + k[None, :], mask=(t < tiles)[:, None], other=0.0)
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
def pick(values, index, at: tl.constexpr):
    """One entry of a vector."""
    return tl.sum(tl.where(index == at, values, 0.0), axis=0)


def gather(x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout) -> Points:
    """The points of all sets."""
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


def distances(found: Points, sets: PointSets, rows: int, rounding: float, x_rounding: float) -> Tensor:
    """[parts, S, S] sums of distances over the sets of each part, on and above the diagonal."""
    tiles = triton.cdiv(rows, BLOCK_S)
    out = torch.empty(sum(sets.parts), rows, rows, dtype=torch.float32, device=found.points.device)
    topo_distances_fwd_kernel[(tiles, tiles, sum(sets.parts))](
        found.points, found.norms, sets.table, sets.splits, out, rows, sets.count, sets.columns, rounding, x_rounding,
        **DISTANCES_TILES,
    )  # fmt: skip
    return out


def correlations(found: Tensor, sets: PointSets, groups: int, pre_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """The two correlations [2], the loss [] and the figures [16] that the gradient needs.

    Distances become means over codebooks.
    """
    S = found.shape[1]
    tiles = triton.cdiv(S, BLOCK_PAIRS)
    moments = torch.empty(tiles * tiles, 8, dtype=torch.float64, device=found.device)
    both = torch.empty(2, dtype=torch.float32, device=found.device)
    loss = torch.empty((), dtype=torch.float32, device=found.device)
    stats = torch.empty(16, dtype=torch.float32, device=found.device)
    topo_moments_fwd_kernel[(tiles, tiles)](found, moments, S, groups, sets.parts[1], BLOCK_S=BLOCK_PAIRS, num_warps=4)
    topo_stats_fwd_kernel[(1,)](moments, both, loss, stats, S, tiles * tiles, pre_weight, BLOCK_T=128, num_warps=4)
    return both, loss, stats
