"""Triton kernels of the topographic correlations, backward.

`topo_weights_bwd_kernel` computes the gradient of every pair distance, w_ij, from those of the correlations;
`topo_latents_bwd_kernel` computes sum_j w_ij (z_i - z_j) / d_ij and the distances of latents again;
`topo_codes_bwd_kernel` does the same for codes, with the weights of all rows of a code summed first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._common.launch_helpers import next_power_of_two
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.streams import run_on_side_streams
from spinlock_fast.kernels.topo_loss.triton_forward import (
    BLOCK_PAIRS,
    COLUMNS,
    Points,
    add_products,
    load_tile,
    point_sets,
    rounding_error,
)

# Tiles by the width of a codebook, as narrow as possible, since most of a wide tile would be zeros. A width between two
# powers of two is split into a head and a tail.
LATENTS_TILES: list[dict[str, Any]] = [
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
    distances_ptr,  # [1 + 2 parts, S, S], the first of latents and of codes are means
    grad_d_z_ptr,  # [rows padded, rows padded], symmetric, 0 where padded
    grad_d_e_ptr,
    S,
    G,
    parts,
    padded,
    pre_factor,  # multiplies grad_pre
    post_factor,  # multiplies grad_post
    BLOCK_S: tl.constexpr,
):
    """dr/db = (a - r b) / sigma_b for standardized a, b, over S (S - 1) / 2 pairs and G codebooks."""
    i, j = tl.program_id(0), tl.program_id(1)
    if i <= j:
        ri = i * BLOCK_S + tl.arange(0, BLOCK_S)
        rj = j * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = (ri < S)[:, None] & (rj < S)[None, :]
        pairs = ri.to(tl.int64)[:, None] * S + rj[None, :]  # [BLOCK_S, BLOCK_S]
        matrix = S.to(tl.int64) * S
        pre, post = tl.load(correlations_ptr), tl.load(correlations_ptr + 1)
        x_mean, z_mean, e_mean = tl.load(stats_ptr), tl.load(stats_ptr + 1), tl.load(stats_ptr + 2)
        x_dev, z_dev, e_dev = tl.load(stats_ptr + 3), tl.load(stats_ptr + 4), tl.load(stats_ptr + 5)
        factor = 2.0 / (tl.maximum(S.to(tl.float32) * (S - 1), 1.0) * G)
        to_pre = tl.where(tl.load(stats_ptr + 6) > 0.0, factor * pre_factor * tl.load(grad_pre_ptr), 0.0)
        to_post = tl.where(tl.load(stats_ptr + 7) > 0.0, factor * post_factor * tl.load(grad_post_ptr), 0.0)
        x = (tl.load(distances_ptr + pairs, mask=inside, other=0.0) - x_mean) / x_dev
        z = (tl.load(distances_ptr + matrix + pairs, mask=inside, other=0.0) - z_mean) / z_dev
        e = (tl.load(distances_ptr + (1 + parts) * matrix + pairs, mask=inside, other=0.0) - e_mean) / e_dev
        # e is NaN if a row has no code; its gradient is then 0.
        through_post = tl.where(to_post == 0.0, 0.0, to_post * (e - post * z))
        grad_d_z = tl.where(inside, (to_pre * (x - pre * z) + through_post) / z_dev, 0.0)
        grad_d_e = tl.where(to_post == 0.0, 0.0, tl.where(inside, to_post * (z - post * e) / e_dev, 0.0))
        out = ri.to(tl.int64)[:, None] * padded + rj[None, :]
        tl.store(grad_d_z_ptr + out, grad_d_z)
        tl.store(grad_d_e_ptr + out, grad_d_e)
        if i < j:
            out = rj.to(tl.int64)[:, None] * padded + ri[None, :]
            tl.store(grad_d_z_ptr + out, tl.trans(grad_d_z))
            tl.store(grad_d_e_ptr + out, tl.trans(grad_d_e))


@triton.jit(do_not_specialize=["S", "G", "total_dims"])
def topo_latents_bwd_kernel(
    points_ptr,  # [rows padded, columns]
    norms_ptr,  # [1 + 2 G, rows padded]
    sets_ptr,  # [5, 1 + 2 G] int32
    weight_ptr,  # [rows padded, rows padded], symmetric, 0 where padded
    grad_ptr,  # [S, sum D]
    S,
    G,
    columns,
    padded,
    total_dims,
    rounding,
    ABOVE: tl.constexpr,  # the launch handles sets of more than ABOVE and at most HEAD + TAIL columns;
    HEAD: tl.constexpr,  # a program computes HEAD + TAIL columns of the gradient
    TAIL: tl.constexpr,  # 0 for none
    WIDE: tl.constexpr,  # no upper limit: several programs factor a set, and each computes all distances
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """grad_i = sum_j w_ij (p_i - p_j) / d_ij for the latents of one codebook."""
    s = 1 + tl.program_id(1)
    sets = 2 * G + 1
    D = tl.load(sets_ptr + s)
    out_column = tl.load(sets_ptr + sets + s)
    first_column = tl.load(sets_ptr + 2 * sets + s)
    width = tl.load(sets_ptr + 3 * sets + s)
    column = tl.program_id(2) * (HEAD + TAIL)
    limit = HEAD + TAIL
    if WIDE:
        limit = width
    if (width > ABOVE) & (width <= limit) & (column < width):
        ri = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
        norms_ptr += s.to(tl.int64) * padded
        c = column + tl.arange(0, HEAD)
        a = load_tile(points_ptr, ri, first_column, c, width, columns)  # [BLOCK_I, HEAD]
        weighted = tl.zeros([BLOCK_I, HEAD], dtype=tl.float32)
        if TAIL > 0:
            c_tail = column + HEAD + tl.arange(0, TAIL)
            a_tail = load_tile(points_ptr, ri, first_column, c_tail, width, columns)  # [BLOCK_I, TAIL]
            weighted_tail = tl.zeros([BLOCK_I, TAIL], dtype=tl.float32)
        norm_i = tl.load(norms_ptr + ri)
        row_sum = tl.zeros([BLOCK_I], dtype=tl.float32)
        for start in range(0, padded, BLOCK_J):
            rj = start + tl.arange(0, BLOCK_J)
            b = load_tile(points_ptr, rj, first_column, c, width, columns)  # [BLOCK_J, HEAD]
            weight = tl.load(weight_ptr + (ri.to(tl.int64)[:, None] * padded + rj[None, :]))  # [BLOCK_I, BLOCK_J]
            both = norm_i[:, None] + tl.load(norms_ptr + rj)[None, :]
            products = tl.dot(a, tl.trans(b), input_precision="tf32x3")
            if TAIL > 0:
                b_tail = load_tile(points_ptr, rj, first_column, c_tail, width, columns)
                products = tl.dot(a_tail, tl.trans(b_tail), products, input_precision="tf32x3")
            if WIDE:
                products = add_products(points_ptr, products, ri, rj, first_column, column, columns, 32)
                end = column + HEAD + TAIL
                products = add_products(points_ptr, products, ri, rj, first_column + end, width - end, columns, 32)
            square = both - 2.0 * products
            near = (square <= rounding * both) | (ri[:, None] == rj[None, :]) | (square != square)
            scaled = tl.where(near, 0.0, weight * tl.rsqrt(tl.where(near, 1.0, square)))
            row_sum += tl.sum(scaled, axis=1)
            weighted = tl.dot(scaled, b, weighted, input_precision="tf32x3")
            if TAIL > 0:
                weighted_tail = tl.dot(scaled, b_tail, weighted_tail, input_precision="tf32x3")
        out = grad_ptr + (ri.to(tl.int64)[:, None] * total_dims + out_column)
        rows = (ri < S)[:, None]
        tl.store(out + c[None, :], a * row_sum[:, None] - weighted, mask=rows & (c < D)[None, :])
        if TAIL > 0:
            tl.store(
                out + c_tail[None, :], a_tail * row_sum[:, None] - weighted_tail, mask=rows & (c_tail < D)[None, :]
            )


@triton.jit(do_not_specialize=["S", "G", "total_dims"])
def topo_codes_bwd_kernel(
    codebook_ptr,  # [sum K D]
    codes_ptr,  # [S, G] int64
    points_ptr,  # [rows padded, columns]
    norms_ptr,  # [1 + 2 G, rows padded]
    centre_ptr,  # [columns]
    sets_ptr,  # [5, 1 + 2 G] int32
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
    """grad_i = sum_k W_ik (e_i - e_k) / |e_i - e_k| for the codes e_i of the rows of one codebook.

    W_ik is the sum of w_ij over the rows j of code k, so K codes replace S rows.
    """
    g = tl.program_id(1)
    sets = 2 * G + 1
    first_column = tl.load(sets_ptr + sets + 1 + g)
    s = 1 + G + g
    D = tl.load(sets_ptr + s)
    first_entry = tl.load(sets_ptr + sets + s)
    first_point = tl.load(sets_ptr + 2 * sets + s)
    width = tl.load(sets_ptr + 3 * sets + s)
    K = tl.load(sets_ptr + 4 * sets + s)
    ri = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    code_i = tl.load(codes_ptr + ri.to(tl.int64) * G + g, mask=ri < S, other=-1).to(tl.int32)
    norm_i = tl.load(norms_ptr + s.to(tl.int64) * padded + ri)
    for first_code in range(0, K, BLOCK_K):
        k = first_code + tl.arange(0, BLOCK_K)
        weights = tl.zeros([BLOCK_S, BLOCK_K], dtype=tl.float32)  # W_ik
        for start in range(0, padded, BLOCK_J):
            rj = start + tl.arange(0, BLOCK_J)
            code = tl.load(codes_ptr + rj.to(tl.int64) * G + g, mask=rj < S, other=-1).to(tl.int32)
            weight = tl.load(weight_ptr + (ri.to(tl.int64)[:, None] * padded + rj[None, :]))
            one_hot = (code[:, None] == k[None, :]).to(tl.float32)
            weights = tl.dot(weight, one_hot, weights, input_precision="tf32x3")
        products = tl.zeros([BLOCK_S, BLOCK_K], dtype=tl.float32)
        squares = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
        for first in range(0, width, BLOCK_D):
            # [BLOCK_S, BLOCK_D], [BLOCK_K, BLOCK_D]
            a = load_tile(points_ptr, ri, first_point, first + tl.arange(0, BLOCK_D), width, columns)
            e = _load_codes(codebook_ptr, centre_ptr, k, K, first, D, first_entry, first_point, BLOCK_D)
            squares += e * e
            products = tl.dot(a, tl.trans(e), products, input_precision="tf32x3")
        both = norm_i[:, None] + tl.sum(squares, axis=1)[None, :]  # [BLOCK_S, BLOCK_K]
        square = both - 2.0 * products
        near = (square <= rounding * both) | (code_i[:, None] == k[None, :]) | (square != square)
        near = near | (k >= K)[None, :] | (code_i < 0)[:, None]
        scaled = tl.where(near, 0.0, weights * tl.rsqrt(tl.where(near, 1.0, square)))
        row_sum = tl.sum(scaled, axis=1)
        for first in range(0, width, BLOCK_D):
            a = load_tile(points_ptr, ri, first_point, first + tl.arange(0, BLOCK_D), width, columns)
            e = _load_codes(codebook_ptr, centre_ptr, k, K, first, D, first_entry, first_point, BLOCK_D)
            grad = a * row_sum[:, None] - tl.dot(scaled, e, input_precision="tf32x3")
            d = first + tl.arange(0, BLOCK_D)
            out = grad_ptr + (ri.to(tl.int64)[:, None] * total_dims + (first_column + d)[None, :])
            inside = (ri < S)[:, None] & (d < D)[None, :]
            if first_code > 0:
                grad += tl.load(out, mask=inside, other=0.0)
            tl.store(out, grad, mask=inside)


@triton.jit
def _load_codes(codebook_ptr, centre_ptr, k, K, first, D, first_entry, first_point, BLOCK_D: tl.constexpr):
    """Code vectors k minus the centre, [codes, BLOCK_D]; 0 outside, and where they are not finite."""
    d = first + tl.arange(0, BLOCK_D)
    inside = (k < K)[:, None] & (d < D)[None, :]
    e = tl.load(codebook_ptr + ((first_entry + k * D)[:, None] + d[None, :]), mask=inside, other=0.0)
    e = e - tl.load(centre_ptr + first_point + d)[None, :]
    return tl.where(inside & (tl.abs(e) < float("inf")), e, 0.0)


@launches
def backward(
    grad_pre: Tensor,
    grad_post: Tensor,
    saved: Sequence[Tensor],
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    layout: CodebookLayout,
    factors: tuple[float, float],
) -> Tensor:
    """Gradient of the latents [S, sum D] from `factors` times the gradients of the correlations.

    The kernels of the latents, one launch per width of `LATENTS_TILES`, and that of the codes run on side streams.
    """
    correlations, stats, distances, *points_and_norms = saved
    points = Points(*points_and_norms)
    codes, codebook = codes.contiguous(), codebook.contiguous()
    sets = point_sets(x.shape[1], layout, x.device)
    rounding = rounding_error(layout.max_dims)
    S, G = codes.shape
    padded = points.points.shape[0]
    options: dict[str, Any] = {"dtype": torch.float32, "device": codes.device}
    grad_d_z, grad_d_e = torch.empty(padded, padded, **options), torch.empty(padded, padded, **options)
    tiles = padded // BLOCK_PAIRS
    topo_weights_bwd_kernel[(tiles, tiles)](
        grad_pre, grad_post, correlations, stats, distances, grad_d_z, grad_d_e, S, G, sets.parts[1], padded, *factors,
        BLOCK_S=BLOCK_PAIRS, num_warps=4,
    )  # fmt: skip

    through_latents = torch.empty(S, layout.total_dims, **options)

    def latents_gradient(tiles: dict[str, Any]) -> Tensor:
        chunks = triton.cdiv(layout.max_dims, columns_per_program(tiles)) if tiles["WIDE"] else 1
        topo_latents_bwd_kernel[(padded // tiles["BLOCK_I"], G, chunks)](
            points.points, points.norms, sets.table, grad_d_z, through_latents, S, G, sets.columns, padded,
            layout.total_dims, rounding, **tiles,
        )  # fmt: skip
        return through_latents

    def codes_gradient() -> Tensor:
        grad = torch.empty(S, layout.total_dims, **options)
        tiles = codes_tiles(layout.max_codes)
        topo_codes_bwd_kernel[(padded // tiles["BLOCK_S"], G)](
            codebook, codes, points.points, points.norms, points.centre, sets.table, grad_d_e, grad,
            S, G, sets.columns, padded, layout.total_dims, rounding, **tiles,
        )  # fmt: skip
        return grad

    used = [tiles for tiles in LATENTS_TILES if any(handles_width(tiles, d) for d in layout.dims)]
    works: list[Callable[[], Tensor]] = [*(partial(latents_gradient, tiles) for tiles in used), codes_gradient]
    *_, through_codes = run_on_side_streams(
        works, [codes, codebook, grad_d_z, grad_d_e, points.points, points.norms, points.centre, through_latents]
    )
    return through_latents.add_(through_codes)


def handles_width(tiles: dict[str, Any], columns: int) -> bool:
    """Whether a launch with these tiles computes the gradient of codebooks of that many columns."""
    return bool(columns > tiles["ABOVE"] and (tiles["WIDE"] or columns <= columns_per_program(tiles)))


def columns_per_program(tiles: dict[str, Any]) -> int:
    return int(tiles["HEAD"] + tiles["TAIL"])


def codes_tiles(codes: int) -> dict[str, Any]:
    """Tiles of the codes kernel for codebooks of at most `codes` codes."""
    block_k = min(64, next_power_of_two(codes, 16))
    block_j = 64 if block_k < 64 else 32  # 64 x 64 spills
    tiles = {"BLOCK_S": 32, "BLOCK_J": block_j, "BLOCK_K": block_k, "BLOCK_D": COLUMNS}
    return {**tiles, "num_warps": 4, "num_stages": 1}
