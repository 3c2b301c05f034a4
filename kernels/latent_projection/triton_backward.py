"""Triton kernels of the projection, backward: two launches; the one for parameter gradients is deferred."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.dropout import BatchSlice, drop_threshold, keep_scale
from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._common.ragged import Ragged, part_offsets
from spinlock_fast.kernels._common.streams import defer
from spinlock_fast.kernels._common.triton_dropout import dropout_mask
from spinlock_fast.kernels.latent_projection.triton_forward import ProjectConfig


@triton.jit
def _load_part(grad_ptr, part_weight_ptr, normed_ptr, start, m, rows, o, size, first_column, total):
    """Columns o of a part: mask, offsets, gradient times part_weight, normalised values; [rows, columns]."""
    column = first_column + o
    entries = start * total + ((m * total)[:, None] + column[None, :])
    inside = (m < rows)[:, None] & (o < size)[None, :]
    part_weight = tl.load(part_weight_ptr + column, mask=o < size, other=0.0)
    grad = tl.load(grad_ptr + entries, mask=inside, other=0.0) * part_weight[None, :]
    return inside, entries, grad, tl.load(normed_ptr + entries, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["B", "G", "S", "total", "threshold", "scale", "first_row"])
def project_bwd_rows_kernel(
    grad_ptr,  # [B, sum n]
    x_ptr,  # [G, B, E]
    gain_ptr,  # [G, E]
    w_ptr,  # [sum n, E]
    part_weight_ptr,  # [sum n]
    seed_ptr,  # [] int64, or not read
    offsets_ptr,  # see `part_offsets`
    statistics_ptr,  # [2, G, B]
    normed_ptr,  # [B, sum n]
    deviation_ptr,  # [S, B]
    grad_linear_ptr,  # [B, sum n] gradient of the linear layer's output
    grad_x_ptr,  # [G, B, E]
    B,
    G,
    S,
    E,
    total,
    threshold,
    scale,
    first_row,  # number of row 0 in the batch that the mask is for
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,  # a whole part
    BLOCK_K: tl.constexpr,  # columns of a part per step of the product
    BLOCK_E: tl.constexpr,  # all columns of x
    PRECISION: tl.constexpr,
):
    """Gradients of the linear layer's output and of x, for BLOCK_M rows of one group.

    dl_s = (h_s - mean(h_s) - z_s mean(h_s z_s)) r_s with h_s = dz_s * part_weight_s, then the same for x through y.
    """
    g = tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.minimum(B - start, BLOCK_M).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    grad_y = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for s in range(tl.load(offsets_ptr + 2 * G + g), tl.load(offsets_ptr + 2 * G + g + 1)):
        size = tl.load(offsets_ptr + 3 * G + 1 + s)
        first_column = tl.load(offsets_ptr + 3 * G + 1 + S + s)
        deviation = tl.load(deviation_ptr + tl.cast(s, tl.int64) * B + start + m, mask=m < rows, other=0.0)
        all_o = tl.arange(0, BLOCK_O)
        _, _, grads, parts = _load_part(
            grad_ptr, part_weight_ptr, normed_ptr, start, m, rows, all_o, size, first_column, total
        )  # [BLOCK_M, BLOCK_O]
        mean = tl.sum(grads, axis=1) / size
        along = tl.sum(grads * parts, axis=1) / size
        for first in range(0, size, BLOCK_K):
            o = first + tl.arange(0, BLOCK_K)
            inside, entries, grad, part = _load_part(
                grad_ptr, part_weight_ptr, normed_ptr, start, m, rows, o, size, first_column, total
            )  # [BLOCK_M, BLOCK_K]
            grad_linear = (grad - mean[:, None] - part * along[:, None]) * deviation[:, None]
            grad_linear = tl.where(inside, grad_linear, 0.0)
            if DROPOUT:
                keep = dropout_mask(seed_ptr, first_row + start + m, first_column + o, threshold)
                grad_linear = tl.where(keep, grad_linear * scale, 0.0)
            tl.store(grad_linear_ptr + entries, grad_linear, mask=inside)
            in_w = (o < size)[:, None] & (e < E)[None, :]
            w = tl.load(w_ptr + first_column.to(tl.int64) * E + ((o * E)[:, None] + e[None, :]), mask=in_w, other=0.0)
            grad_y = tl.dot(grad_linear, w, grad_y, input_precision=PRECISION)

    group_row = g.to(tl.int64) * B + start
    mean = tl.load(statistics_ptr + group_row + m, mask=m < rows, other=0.0)
    rstd = tl.load(statistics_ptr + tl.cast(G, tl.int64) * B + group_row + m, mask=m < rows, other=0.0)
    in_x = (m < rows)[:, None] & (e < E)[None, :]
    entries_x = group_row * E + ((m * E)[:, None] + e[None, :])
    x = tl.load(x_ptr + entries_x, mask=in_x, other=0.0)  # [BLOCK_M, BLOCK_E]
    normed = tl.where(in_x, (x - mean[:, None]) * rstd[:, None], 0.0)
    grad_normed = grad_y * tl.load(gain_ptr + g * E + e, mask=e < E, other=0.0)[None, :]
    means = tl.sum(grad_normed, axis=1) / E
    slopes = tl.sum(grad_normed * normed, axis=1) / E
    grad_x = (grad_normed - means[:, None] - normed * slopes[:, None]) * rstd[:, None]
    tl.store(grad_x_ptr + entries_x, grad_x, mask=in_x)


@triton.jit(do_not_specialize=["B", "G", "total"])
def project_bwd_weights_kernel(
    grad_ptr,  # [B, sum n]
    x_ptr,  # [G, B, E]
    gain_ptr,  # [G, E]
    shift_ptr,  # [G, E]
    w_ptr,  # [sum n, E]
    offsets_ptr,  # see `part_offsets`
    statistics_ptr,  # [2, G, B]
    normed_ptr,  # [B, sum n]
    grad_linear_ptr,  # [B, sum n]
    grad_scale_ptr,  # [tiles of outputs, 2, G, E] of gain and shift, partial sums
    grad_w_ptr,  # [sum n, E]
    grad_bias_ptr,  # [sum n]
    grad_part_weight_ptr,  # [sum n]
    grad_part_bias_ptr,  # [sum n]
    B,
    G,
    E,
    total,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of all parameters, for BLOCK_O outputs of one group; sums run over the rows.

    With y = norm(x): dW = (dl^T y) gain + sum(dl) shift, dgain = sum_o (dl^T y) W, dshift = sum_o sum(dl) W.
    """
    g = tl.program_id(1)
    size = tl.load(offsets_ptr + g)
    first_column = tl.load(offsets_ptr + G + g)
    tile = tl.program_id(0)
    r = tl.arange(0, BLOCK_B)
    o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = first_column + o
    if tile * BLOCK_E < E:
        e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
        along = tl.zeros([BLOCK_O, BLOCK_E], dtype=tl.float32)  # dl^T y
        sums = tl.zeros([BLOCK_O], dtype=tl.float32)
        if tl.program_id(2) * BLOCK_O < size:
            for start in range(0, B, BLOCK_B):
                inside = r < B - start
                row = tl.cast(start, tl.int64)
                group_row = g.to(tl.int64) * B + row
                mean = tl.load(statistics_ptr + group_row + r, mask=inside, other=0.0)
                rstd = tl.load(statistics_ptr + tl.cast(G, tl.int64) * B + group_row + r, mask=inside, other=0.0)
                in_x = inside[:, None] & (e < E)[None, :]
                x = tl.load(x_ptr + group_row * E + ((r * E)[:, None] + e[None, :]), mask=in_x, other=0.0)
                normed = tl.where(in_x, (x - mean[:, None]) * rstd[:, None], 0.0)
                in_grad = inside[:, None] & (o < size)[None, :]
                entries = row * total + ((r * total)[:, None] + column[None, :])
                grad_linear = tl.load(grad_linear_ptr + entries, mask=in_grad, other=0.0)  # [BLOCK_B, BLOCK_O]
                along = tl.dot(tl.trans(grad_linear), normed, along, input_precision=PRECISION)
                sums += tl.sum(grad_linear, axis=0)
        gain = tl.load(gain_ptr + g * E + e, mask=e < E, other=0.0)
        shift = tl.load(shift_ptr + g * E + e, mask=e < E, other=0.0)
        in_w = (o < size)[:, None] & (e < E)[None, :]
        entries_x = first_column.to(tl.int64) * E + ((o * E)[:, None] + e[None, :])
        w = tl.load(w_ptr + entries_x, mask=in_w, other=0.0)
        tl.store(grad_w_ptr + entries_x, along * gain[None, :] + sums[:, None] * shift[None, :], mask=in_w)
        if tile == 0:
            tl.store(grad_bias_ptr + column, sums, mask=o < size)
        out = tl.program_id(2) * 2 * G * E + g * E + e
        tl.store(grad_scale_ptr + out, tl.sum(along * w, axis=0), mask=e < E)
        tl.store(grad_scale_ptr + G * E + out, tl.sum(sums[:, None] * w, axis=0), mask=e < E)
    elif tl.program_id(2) * BLOCK_O < size:
        weights = tl.zeros([BLOCK_O], dtype=tl.float32)
        biases = tl.zeros([BLOCK_O], dtype=tl.float32)
        for start in range(0, B, BLOCK_B):
            in_grad = (r < B - start)[:, None] & (o < size)[None, :]
            entries = tl.cast(start, tl.int64) * total + ((r * total)[:, None] + column[None, :])
            grad = tl.load(grad_ptr + entries, mask=in_grad, other=0.0)
            biases += tl.sum(grad, axis=0)
            weights += tl.sum(grad * tl.load(normed_ptr + entries, mask=in_grad, other=0.0), axis=0)
        tl.store(grad_part_weight_ptr + column, weights, mask=o < size)
        tl.store(grad_part_bias_ptr + column, biases, mask=o < size)


@launches
def backward(
    grad: Tensor,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    outputs: Ragged,
    parts: Ragged,
    dropout: float,
    batch: BatchSlice | None,
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of x, gain, shift, weight, bias, part_weight, part_bias, where `tensors` are these.

    Those of the parameters are deferred, see `streams.defer`.
    """
    seed, statistics, normed, deviation = saved
    x, gain, shift, weight, _, part_weight, _ = (tensor.contiguous() for tensor in tensors)
    G, B, E = x.shape
    config = ProjectConfig.of(E, outputs, parts, precision)
    grad = grad.contiguous()
    offsets = part_offsets(outputs.sizes, parts.sizes, x.device)
    grad_x = torch.empty_like(x)
    tiles = triton.cdiv(outputs.widest, config.weights["BLOCK_O"])
    grad_linear = torch.empty_like(normed)
    if B:
        project_bwd_rows_kernel[(triton.cdiv(B, config.rows["BLOCK_M"]), G)](
            grad, x, gain, weight, part_weight, seed, offsets, statistics, normed, deviation, grad_linear, grad_x,
            B, G, parts.groups, E, parts.total, drop_threshold(dropout), keep_scale(dropout),
            batch.first if batch else 0, DROPOUT=dropout > 0.0, **config.rows,
        )  # fmt: skip

    def parameter_gradients() -> tuple[Tensor, ...]:
        grad_weight = torch.empty_like(weight)
        grad_scale = x.new_empty(tiles, 2, G, E)
        grad_bias, grad_part_weight, grad_part_bias = (torch.empty_like(part_weight) for _ in range(3))
        project_bwd_weights_kernel[(triton.cdiv(E, config.weights["BLOCK_E"]) + 1, G, tiles)](
            grad, x, gain, shift, weight, offsets, statistics, normed, grad_linear, grad_scale, grad_weight, grad_bias,
            grad_part_weight, grad_part_bias, B, G, E, parts.total, **config.weights,
        )  # fmt: skip
        grad_gain, grad_shift = grad_scale.sum(0) if tiles > 1 else grad_scale[0]
        return grad_gain, grad_shift, grad_weight, grad_bias, grad_part_weight, grad_part_bias

    return grad_x, *defer(parameter_gradients, [grad, x, statistics, normed, grad_linear])
