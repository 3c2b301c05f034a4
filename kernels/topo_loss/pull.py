"""Triton kernels of the topographic correlations, backward: every row is pulled towards or away from the others.

`topo_weights_bwd_kernel` turns the gradients of the correlations into a weight for each pair of rows;
`topo_pull_bwd_kernel` forms the distances of latents anew and adds up weight times direction;
`topo_pull_codes_bwd_kernel` does the same for codes, where rows of one code pull as one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.launch_sizes import next_power_of_two
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.streams import run_on_side_streams
from spinlock_fast.kernels.topo_loss.triton import BLOCK_PAIRS, COLUMNS, Points, PointSets, load_tile, products_of

# By the width of a codebook: as narrow as it is, for most of a wide tile would be zeros. A width between two powers of
# two is a head and a tail.
_PULL: list[dict[str, Any]] = [
    {"ABOVE": above, "HEAD": head, "TAIL": tail, "WIDE": wide, **tiles, "num_stages": 1}
    for above, head, tail, wide, tiles in (
        (0, 16, 0, False, {"BLOCK_I": 64, "BLOCK_J": 64, "num_warps": 4}),
        (16, 32, 0, False, {"BLOCK_I": 16, "BLOCK_J": 64, "num_warps": 4}),
        (32, 64, 0, False, {"BLOCK_I": 16, "BLOCK_J": 64, "num_warps": 4}),
        (64, 64, 32, False, {"BLOCK_I": 16, "BLOCK_J": 64, "num_warps": 8}),
        (96, 128, 0, False, {"BLOCK_I": 16, "BLOCK_J": 64, "num_warps": 8}),
        (128, 128, 32, False, {"BLOCK_I": 16, "BLOCK_J": 64, "num_warps": 8}),
        (160, 128, 0, True, {"BLOCK_I": 16, "BLOCK_J": 32, "num_warps": 8}),
    )
]


@triton.jit(do_not_specialize=["S", "G"])
def topo_weights_bwd_kernel(
    grad_pre_ptr,  # scalar
    grad_post_ptr,  # scalar
    correlations_ptr,  # [2]
    stats_ptr,  # [16]
    distances_ptr,  # [1 + 2 parts, S, S], of latents and codes the first
    of_z_ptr,  # [rows padded, rows padded], symmetric, 0 where padded
    of_e_ptr,
    S,
    G,
    parts,
    padded,
    pre_factor,  # of the gradients
    post_factor,
    BLOCK_S: tl.constexpr,
):
    i, j = tl.program_id(0), tl.program_id(1)
    if i <= j:
        ri = i * BLOCK_S + tl.arange(0, BLOCK_S)
        rj = j * BLOCK_S + tl.arange(0, BLOCK_S)
        here = (ri < S)[:, None] & (rj < S)[None, :]
        at = ri.to(tl.int64)[:, None] * S + rj[None, :]
        matrix = S.to(tl.int64) * S
        pre, post = tl.load(correlations_ptr), tl.load(correlations_ptr + 1)
        x_mean, z_mean, e_mean = tl.load(stats_ptr), tl.load(stats_ptr + 1), tl.load(stats_ptr + 2)
        x_dev, z_dev, e_dev = tl.load(stats_ptr + 3), tl.load(stats_ptr + 4), tl.load(stats_ptr + 5)
        # dr/db = (a - r b) / sigma_b for standardized a, b, over S (S - 1) / 2 pairs and G codebooks.
        share = 2.0 / (tl.maximum(S.to(tl.float32) * (S - 1), 1.0) * G)
        to_pre = tl.where(tl.load(stats_ptr + 6) > 0.0, share * pre_factor * tl.load(grad_pre_ptr), 0.0)
        to_post = tl.where(tl.load(stats_ptr + 7) > 0.0, share * post_factor * tl.load(grad_post_ptr), 0.0)
        x = (tl.load(distances_ptr + at, mask=here, other=0.0) - x_mean) / x_dev
        z = (tl.load(distances_ptr + matrix + at, mask=here, other=0.0) - z_mean) / z_dev
        e = (tl.load(distances_ptr + (1 + parts) * matrix + at, mask=here, other=0.0) - e_mean) / e_dev
        # A codebook without a code for some row makes e NaN; then nothing flows through it.
        of_post = tl.where(to_post == 0.0, 0.0, to_post * (e - post * z))
        of_z = tl.where(here, (to_pre * (x - pre * z) + of_post) / z_dev, 0.0)
        of_e = tl.where(to_post == 0.0, 0.0, tl.where(here, to_post * (z - post * e) / e_dev, 0.0))
        out = ri.to(tl.int64)[:, None] * padded + rj[None, :]
        tl.store(of_z_ptr + out, of_z)
        tl.store(of_e_ptr + out, of_e)
        if i < j:
            out = rj.to(tl.int64)[:, None] * padded + ri[None, :]
            tl.store(of_z_ptr + out, tl.trans(of_z))
            tl.store(of_e_ptr + out, tl.trans(of_e))


@triton.jit(do_not_specialize=["S", "G", "total_dims"])
def topo_pull_bwd_kernel(
    points_ptr,  # [rows padded, columns]
    norms_ptr,  # [1 + 2 G, rows padded]
    table_ptr,  # [5, 1 + 2 G] int32
    weight_ptr,  # [rows padded, rows padded], symmetric, 0 where padded
    grad_ptr,  # [S, sum D]
    S,
    G,
    columns,
    padded,
    total_dims,
    rounding,
    ABOVE: tl.constexpr,  # columns of the sets that this launch serves: more than this,
    HEAD: tl.constexpr,  # and at most HEAD + TAIL, as many as a program makes of the gradient,
    TAIL: tl.constexpr,  # 0 for none
    WIDE: tl.constexpr,  # unless WIDE: then several programs share a set, and each forms the distances
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """grad_i = sum over j of weight_ij (p_i - p_j) / d_ij for one codebook's latents."""
    s = 1 + tl.program_id(1)
    sets = 2 * G + 1
    D = tl.load(table_ptr + s)
    first_column = tl.load(table_ptr + sets + s)
    here = tl.load(table_ptr + 2 * sets + s)
    width = tl.load(table_ptr + 3 * sets + s)
    mine = tl.program_id(2) * (HEAD + TAIL)
    limit = HEAD + TAIL
    if WIDE:
        limit = width
    if (width > ABOVE) & (width <= limit) & (mine < width):
        ri = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
        norms_ptr += s.to(tl.int64) * padded
        c = mine + tl.arange(0, HEAD)
        a = load_tile(points_ptr, ri, here, c, width, columns)  # [BLOCK_I, HEAD]
        pulled = tl.zeros([BLOCK_I, HEAD], dtype=tl.float32)
        if TAIL > 0:
            c_tail = mine + HEAD + tl.arange(0, TAIL)
            a_tail = load_tile(points_ptr, ri, here, c_tail, width, columns)
            pulled_tail = tl.zeros([BLOCK_I, TAIL], dtype=tl.float32)
        own = tl.load(norms_ptr + ri)
        row = tl.zeros([BLOCK_I], dtype=tl.float32)
        for start in range(0, padded, BLOCK_J):
            rj = start + tl.arange(0, BLOCK_J)
            b = load_tile(points_ptr, rj, here, c, width, columns)  # [BLOCK_J, HEAD]
            weight = tl.load(weight_ptr + (ri.to(tl.int64)[:, None] * padded + rj[None, :]))
            both = own[:, None] + tl.load(norms_ptr + rj)[None, :]
            products = tl.dot(a, tl.trans(b), input_precision="tf32x3")
            if TAIL > 0:
                b_tail = load_tile(points_ptr, rj, here, c_tail, width, columns)
                products = tl.dot(a_tail, tl.trans(b_tail), products, input_precision="tf32x3")
            if WIDE:
                products = products_of(points_ptr, products, ri, rj, here, mine, columns, 32)
                after = mine + HEAD + TAIL
                products = products_of(points_ptr, products, ri, rj, here + after, width - after, columns, 32)
            square = both - 2.0 * products
            near = (square <= rounding * both) | (ri[:, None] == rj[None, :]) | (square != square)
            pull = tl.where(near, 0.0, weight * tl.rsqrt(tl.where(near, 1.0, square)))
            row += tl.sum(pull, axis=1)
            pulled = tl.dot(pull, b, pulled, input_precision="tf32x3")
            if TAIL > 0:
                pulled_tail = tl.dot(pull, b_tail, pulled_tail, input_precision="tf32x3")
        out = grad_ptr + (ri.to(tl.int64)[:, None] * total_dims + first_column)
        rows = (ri < S)[:, None]
        tl.store(out + c[None, :], a * row[:, None] - pulled, mask=rows & (c < D)[None, :])
        if TAIL > 0:
            tl.store(out + c_tail[None, :], a_tail * row[:, None] - pulled_tail, mask=rows & (c_tail < D)[None, :])


@triton.jit(do_not_specialize=["S", "G", "total_dims"])
def topo_pull_codes_bwd_kernel(
    codebook_ptr,  # [sum K D]
    codes_ptr,  # [S, G] int64
    points_ptr,  # [rows padded, columns]
    norms_ptr,  # [1 + 2 G, rows padded]
    centre_ptr,  # [columns]
    table_ptr,  # [5, 1 + 2 G] int32
    weight_ptr,  # [rows padded, rows padded], symmetric, 0 where padded
    grad_ptr,  # [S, sum D]
    S,
    G,
    columns,
    padded,
    total_dims,
    rounding,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The pull of the codes of all rows: rows of one code pull as one, so that K codes do what S rows would."""
    g = tl.program_id(1)
    sets = 2 * G + 1
    first_column = tl.load(table_ptr + sets + 1 + g)
    s = 1 + G + g
    D = tl.load(table_ptr + s)
    first_entry = tl.load(table_ptr + sets + s)
    first_point = tl.load(table_ptr + 2 * sets + s)
    width = tl.load(table_ptr + 3 * sets + s)
    K = tl.load(table_ptr + 4 * sets + s)
    ri = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    own_code = tl.load(codes_ptr + ri.to(tl.int64) * G + g, mask=ri < S, other=-1).to(tl.int32)
    own = tl.load(norms_ptr + s.to(tl.int64) * padded + ri)
    for first_code in range(0, K, BLOCK_K):
        k = first_code + tl.arange(0, BLOCK_K)
        weights = tl.zeros([BLOCK_S, BLOCK_K], dtype=tl.float32)  # of row i to all rows of code k
        for start in range(0, padded, BLOCK_J):
            rj = start + tl.arange(0, BLOCK_J)
            code = tl.load(codes_ptr + rj.to(tl.int64) * G + g, mask=rj < S, other=-1).to(tl.int32)
            weight = tl.load(weight_ptr + (ri.to(tl.int64)[:, None] * padded + rj[None, :]))
            hot = (code[:, None] == k[None, :]).to(tl.float32)
            weights = tl.dot(weight, hot, weights, input_precision="tf32x3")
        products = tl.zeros([BLOCK_S, BLOCK_K], dtype=tl.float32)
        other = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
        for first in range(0, width, BLOCK_D):
            a = load_tile(points_ptr, ri, first_point, first + tl.arange(0, BLOCK_D), width, columns)
            e = _load_codes(codebook_ptr, centre_ptr, k, K, first, D, first_entry, first_point, BLOCK_D)
            other += e * e
            products = tl.dot(a, tl.trans(e), products, input_precision="tf32x3")
        both = own[:, None] + tl.sum(other, axis=1)[None, :]
        square = both - 2.0 * products
        near = (square <= rounding * both) | (own_code[:, None] == k[None, :]) | (square != square)
        near = near | (k >= K)[None, :] | (own_code < 0)[:, None]
        pull = tl.where(near, 0.0, weights * tl.rsqrt(tl.where(near, 1.0, square)))
        row = tl.sum(pull, axis=1)
        for first in range(0, width, BLOCK_D):
            a = load_tile(points_ptr, ri, first_point, first + tl.arange(0, BLOCK_D), width, columns)
            e = _load_codes(codebook_ptr, centre_ptr, k, K, first, D, first_entry, first_point, BLOCK_D)
            pulled = a * row[:, None] - tl.dot(pull, e, input_precision="tf32x3")
            d = first + tl.arange(0, BLOCK_D)
            out = grad_ptr + (ri.to(tl.int64)[:, None] * total_dims + (first_column + d)[None, :])
            inside = (ri < S)[:, None] & (d < D)[None, :]
            if first_code > 0:
                pulled += tl.load(out, mask=inside, other=0.0)
            tl.store(out, pulled, mask=inside)


@triton.jit
def _load_codes(codebook_ptr, centre_ptr, k, K, first, D, first_entry, first_point, BLOCK_D: tl.constexpr):
    """Code vectors about the centre [codes, BLOCK_D]; zero outside, and for what is not finite."""
    d = first + tl.arange(0, BLOCK_D)
    here = (k < K)[:, None] & (d < D)[None, :]
    e = tl.load(codebook_ptr + ((first_entry + k * D)[:, None] + d[None, :]), mask=here, other=0.0)
    e = e - tl.load(centre_ptr + first_point + d)[None, :]
    return tl.where(here & (tl.abs(e) < float("inf")), e, 0.0)


def gradient(
    grad_pre: Tensor,
    grad_post: Tensor,
    correlations: Tensor,
    stats: Tensor,
    distances: Tensor,
    found: Points,
    sets: PointSets,
    codes: Tensor,
    codebook: Tensor,
    layout: CodebookLayout,
    rounding: float,
    factors: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Gradient of the latents [S, sum D], from those of the correlations times `factors`."""
    S, G = codes.shape
    padded = found.points.shape[0]
    options: dict[str, Any] = {"dtype": torch.float32, "device": codes.device}
    of_z, of_e = torch.empty(padded, padded, **options), torch.empty(padded, padded, **options)
    tiles = padded // BLOCK_PAIRS
    topo_weights_bwd_kernel[(tiles, tiles)](
        grad_pre, grad_post, correlations, stats, distances, of_z, of_e, S, G, sets.parts[1], padded, *factors,
        BLOCK_S=BLOCK_PAIRS, num_warps=4,
    )  # fmt: skip

    through_latents = torch.empty(S, layout.total_dims, **options)

    def of_latents(config: dict[str, Any]) -> Tensor:
        chunks = triton.cdiv(layout.max_dims, _columns(config)) if config["WIDE"] else 1
        topo_pull_bwd_kernel[(padded // config["BLOCK_I"], G, chunks)](
            found.points, found.norms, sets.table, of_z, through_latents, S, G, sets.columns, padded,
            layout.total_dims, rounding, **config,
        )  # fmt: skip
        return through_latents

    def of_codes() -> Tensor:
        grad = torch.empty(S, layout.total_dims, **options)
        config = _pull_codes(layout.max_codes)
        topo_pull_codes_bwd_kernel[(padded // config["BLOCK_S"], G)](
            codebook, codes, found.points, found.norms, found.centre, sets.table, of_e, grad,
            S, G, sets.columns, padded, layout.total_dims, rounding, **config,
        )  # fmt: skip
        return grad

    used = [config for config in _PULL if any(_serves(config, d) for d in layout.dims)]
    works: list[Callable[[], Tensor]] = [*(partial(of_latents, config) for config in used), of_codes]
    *_, through_codes = run_on_side_streams(
        works,
        [codes, codebook, of_z, of_e, found.points, found.norms, found.centre, through_latents],
    )
    return through_latents.add_(through_codes)


def _serves(config: dict[str, Any], columns: int) -> bool:
    return bool(columns > config["ABOVE"] and (config["WIDE"] or columns <= _columns(config)))


def _columns(config: dict[str, Any]) -> int:
    """What a program makes of a gradient."""
    return int(config["HEAD"] + config["TAIL"])


def _pull_codes(codes: int) -> dict[str, Any]:
    """Tiles for codebooks of so many codes at most."""
    block_k = min(64, next_power_of_two(codes, 16))
    block_j = 64 if block_k < 64 else 32  # both of 64 spill
    tiles = {"BLOCK_S": 32, "BLOCK_J": block_j, "BLOCK_K": block_k, "BLOCK_D": COLUMNS}
    return {**tiles, "num_warps": 4, "num_stages": 1}
