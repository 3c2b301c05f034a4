"""Triton kernels of the projections: normalisation, heads, dropout and normalisation of their parts.

One launch forward, two backward; products and dropout as in `triton`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._common.higher_order import gradients, needs_graph
from spinlock_fast.kernels._common.launch_sizes import next_power_of_two
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels._common.streams import defer
from spinlock_fast.kernels.grouped_mlp import reference
from spinlock_fast.kernels.grouped_mlp.triton import (
    draw_seed,
    drop_below,
    keep,
    keep_scale,
    offset_table,
    tf32_or_exact,
)

# Columns of a part and of an embedding that a program can hold without spills: both, or few of one.
_COLUMNS_AT_MOST = 256
_WEIGHTS_AT_MOST = 64 * 256


@dataclass(frozen=True)
class ProjectConfig:
    """Tile sizes of a projection, chosen by shape: E columns of x, parts and groups of so many outputs at most."""

    block_e: int  # all columns
    block_o: int  # a whole part
    group_o: int  # outputs of a group at once
    precision: str

    @classmethod
    def of(cls, columns: int, outputs: Ragged, parts: Ragged, precision: str) -> ProjectConfig:
        part, group = next_power_of_two(parts.widest, 16), min(64, next_power_of_two(outputs.widest, 16))
        return cls(next_power_of_two(columns, 16), part, group, precision)

    @property
    def forward(self) -> dict[str, Any]:
        num_warps = 4 if self.block_o <= 64 else 8
        if self.precision == "tf32":
            tiles = {"BLOCK_M": 32, "BLOCK_E": min(32, self.block_e), "BLOCK_S": min(128, self.block_e)}
            return {**self._launch(num_warps, BLOCK_O=self.block_o, **tiles), "num_stages": 2}
        tiles = {
            "BLOCK_M": 16,  # larger tiles spill
            "BLOCK_E": max(16, min(64, self.block_e, 64 * 64 // self.block_o)),
            "BLOCK_S": min(32 * num_warps, self.block_e),
        }
        return self._launch(num_warps, BLOCK_O=self.block_o, **tiles)

    @property
    def rows(self) -> dict[str, Any]:
        at_once = 32 * 256  # weights: more of them are slower, or spill
        block_k = max(16, min(self.block_o, at_once // self.block_e))
        num_warps = 16
        if self.block_o <= 64 and self.block_e <= 256:
            num_warps = 4 if self.precision == "tf32" else 8
        return self._launch(num_warps, BLOCK_M=16, BLOCK_O=self.block_o, BLOCK_K=block_k, BLOCK_E=self.block_e)

    @property
    def weights(self) -> dict[str, Any]:
        return self._launch(8, BLOCK_B=64, BLOCK_O=self.group_o, BLOCK_E=min(32, self.block_e))

    def _launch(self, num_warps: int, **tiles: int) -> dict[str, Any]:
        return {**tiles, "PRECISION": self.precision, "num_warps": num_warps, "num_stages": 1}


@triton.jit
def _row_statistics(x_ptr, x_row, m, rows, E, eps, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Mean, and reciprocal of the deviation, of rows of E columns, BLOCK_E at once."""
    c = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for first in range(0, E, BLOCK_E):
        e = first + c
        here = (m < rows)[:, None] & (e < E)[None, :]
        total += tl.load(x_ptr + (m * x_row)[:, None] + e[None, :], mask=here, other=0.0)
    mean = tl.sum(total, axis=1) / E
    total = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for first in range(0, E, BLOCK_E):
        e = first + c
        here = (m < rows)[:, None] & (e < E)[None, :]
        x = tl.load(x_ptr + (m * x_row)[:, None] + e[None, :], mask=here, other=0.0)
        x = tl.where(here, x - mean[:, None], 0.0)
        total += x * x
    return mean, 1.0 / tl.sqrt_rn(tl.sum(total, axis=1) / E + eps)


@triton.jit(do_not_specialize=["B", "G", "S", "total", "threshold", "scale", "eps", "part_eps"])
def project_fwd_kernel(
    x_ptr,  # [G, B, E]
    gain_ptr,  # [G, E]
    shift_ptr,  # [G, E]
    w_ptr,  # [sum n, E]
    bias_ptr,  # [sum n]
    part_weight_ptr,  # [sum n]
    part_bias_ptr,  # [sum n]
    seed_ptr,  # [] int64, or not read
    table_ptr,  # see offset_table
    statistics_ptr,  # [2, G, B] mean and reciprocal deviation of x
    normed_ptr,  # [B, sum n] of the parts
    deviation_ptr,  # [S, B] reciprocal, of the parts
    out_ptr,  # [B, sum n]
    B,
    G,
    S,
    E,
    total,
    threshold,
    scale,
    eps,
    part_eps,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,  # a whole part
    BLOCK_S: tl.constexpr,  # of the columns of x, what the statistics take at once,
    BLOCK_E: tl.constexpr,  # and what is multiplied at once
    PRECISION: tl.constexpr,
):
    s = tl.program_id(1)
    g = tl.load(table_ptr + 3 * G + 1 + 2 * S + s)
    size = tl.load(table_ptr + 3 * G + 1 + s)
    first_column = tl.load(table_ptr + 3 * G + 1 + S + s)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.minimum(B - start, BLOCK_M).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    o = tl.arange(0, BLOCK_O)
    group_row = g.to(tl.int64) * B + start
    x_ptr += group_row * E
    mean, rstd = _row_statistics(x_ptr, E, m, rows, E, eps, BLOCK_M, BLOCK_S)
    if tl.load(table_ptr + 2 * G + g) == s:
        tl.store(statistics_ptr + group_row + m, mean, mask=m < rows)
        tl.store(statistics_ptr + tl.cast(G, tl.int64) * B + group_row + m, rstd, mask=m < rows)

    out = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    w_ptr += first_column.to(tl.int64) * E
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        in_x = (m < rows)[:, None] & (e < E)[None, :]
        x = tl.load(x_ptr + (m * E)[:, None] + e[None, :], mask=in_x, other=0.0)
        gain = tl.load(gain_ptr + g * E + e, mask=e < E, other=0.0)
        shift = tl.load(shift_ptr + g * E + e, mask=e < E, other=0.0)
        y = (x - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
        in_w = (o < size)[:, None] & (e < E)[None, :]
        w = tl.load(w_ptr + (o * E)[:, None] + e[None, :], mask=in_w, other=0.0)
        out = tl.dot(y, tl.trans(w), out, input_precision=PRECISION)
    column = first_column + o
    out += tl.load(bias_ptr + column, mask=o < size, other=0.0)[None, :]
    if DROPOUT:
        out = tl.where(keep(seed_ptr, start + m, column, threshold), out * scale, 0.0)

    centred = tl.where((o < size)[None, :], out - (tl.sum(out, axis=1) / size)[:, None], 0.0)
    deviation = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / size + part_eps)
    normed = centred * deviation[:, None]
    weight = tl.load(part_weight_ptr + column, mask=o < size, other=0.0)
    bias = tl.load(part_bias_ptr + column, mask=o < size, other=0.0)
    entries = start * total + ((m * total)[:, None] + column[None, :])
    here = (m < rows)[:, None] & (o < size)[None, :]
    tl.store(normed_ptr + entries, normed, mask=here)
    tl.store(out_ptr + entries, normed * weight[None, :] + bias[None, :], mask=here)
    tl.store(deviation_ptr + tl.cast(s, tl.int64) * B + start + m, deviation, mask=m < rows)


@triton.jit
def _part(grad_ptr, part_weight_ptr, normed_ptr, start, m, rows, o, size, first_column, total):
    """Columns o of a part: where they are inside, their places, gradients before its weights, and its values."""
    column = first_column + o
    entries = start * total + ((m * total)[:, None] + column[None, :])
    here = (m < rows)[:, None] & (o < size)[None, :]
    part_weight = tl.load(part_weight_ptr + column, mask=o < size, other=0.0)
    grad = tl.load(grad_ptr + entries, mask=here, other=0.0) * part_weight[None, :]
    return here, entries, grad, tl.load(normed_ptr + entries, mask=here, other=0.0)


@triton.jit(do_not_specialize=["B", "G", "S", "total", "threshold", "scale"])
def project_bwd_rows_kernel(
    grad_ptr,  # [B, sum n]
    x_ptr,  # [G, B, E]
    gain_ptr,  # [G, E]
    w_ptr,  # [sum n, E]
    part_weight_ptr,  # [sum n]
    seed_ptr,
    table_ptr,
    statistics_ptr,  # [2, G, B]
    normed_ptr,  # [B, sum n]
    deviation_ptr,  # [S, B]
    of_linear_ptr,  # [B, sum n] gradient of the projection
    of_x_ptr,  # [G, B, E]
    B,
    G,
    S,
    E,
    total,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,  # a whole part
    BLOCK_K: tl.constexpr,  # of it, what is multiplied at once
    BLOCK_E: tl.constexpr,  # all columns of x
    PRECISION: tl.constexpr,
):
    g = tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.minimum(B - start, BLOCK_M).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    of_y = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for s in range(tl.load(table_ptr + 2 * G + g), tl.load(table_ptr + 2 * G + g + 1)):
        size = tl.load(table_ptr + 3 * G + 1 + s)
        first_column = tl.load(table_ptr + 3 * G + 1 + S + s)
        deviation = tl.load(deviation_ptr + tl.cast(s, tl.int64) * B + start + m, mask=m < rows, other=0.0)
        all_o = tl.arange(0, BLOCK_O)
        _, _, grads, parts = _part(
            grad_ptr, part_weight_ptr, normed_ptr, start, m, rows, all_o, size, first_column, total
        )
        mean = tl.sum(grads, axis=1) / size
        along = tl.sum(grads * parts, axis=1) / size
        for first in range(0, size, BLOCK_K):
            o = first + tl.arange(0, BLOCK_K)
            here, entries, grad, part = _part(
                grad_ptr, part_weight_ptr, normed_ptr, start, m, rows, o, size, first_column, total
            )
            of_linear = (grad - mean[:, None] - part * along[:, None]) * deviation[:, None]
            of_linear = tl.where(here, of_linear, 0.0)
            if DROPOUT:
                kept = keep(seed_ptr, start + m, first_column + o, threshold)
                of_linear = tl.where(kept, of_linear * scale, 0.0)
            tl.store(of_linear_ptr + entries, of_linear, mask=here)
            in_w = (o < size)[:, None] & (e < E)[None, :]
            w = tl.load(w_ptr + first_column.to(tl.int64) * E + ((o * E)[:, None] + e[None, :]), mask=in_w, other=0.0)
            of_y = tl.dot(of_linear, w, of_y, input_precision=PRECISION)

    group_row = g.to(tl.int64) * B + start
    mean = tl.load(statistics_ptr + group_row + m, mask=m < rows, other=0.0)
    rstd = tl.load(statistics_ptr + tl.cast(G, tl.int64) * B + group_row + m, mask=m < rows, other=0.0)
    in_x = (m < rows)[:, None] & (e < E)[None, :]
    places = group_row * E + ((m * E)[:, None] + e[None, :])
    x = tl.load(x_ptr + places, mask=in_x, other=0.0)
    normed = tl.where(in_x, (x - mean[:, None]) * rstd[:, None], 0.0)
    of_normed = of_y * tl.load(gain_ptr + g * E + e, mask=e < E, other=0.0)[None, :]
    means = tl.sum(of_normed, axis=1) / E
    slopes = tl.sum(of_normed * normed, axis=1) / E
    of_x = (of_normed - means[:, None] - normed * slopes[:, None]) * rstd[:, None]
    tl.store(of_x_ptr + places, of_x, mask=in_x)


@triton.jit(do_not_specialize=["B", "G", "total"])
def project_bwd_weights_kernel(
    grad_ptr,  # [B, sum n]
    x_ptr,  # [G, B, E]
    gain_ptr,  # [G, E]
    shift_ptr,  # [G, E]
    w_ptr,  # [sum n, E]
    table_ptr,
    statistics_ptr,  # [2, G, B]
    normed_ptr,  # [B, sum n]
    of_linear_ptr,  # [B, sum n]
    of_scale_ptr,  # [tiles of outputs, 2, G, E] of gain and shift, by a part of the outputs
    of_w_ptr,
    of_bias_ptr,
    of_part_weight_ptr,
    of_part_bias_ptr,
    B,
    G,
    E,
    total,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    g = tl.program_id(1)
    size = tl.load(table_ptr + g)
    first_column = tl.load(table_ptr + G + g)
    tile = tl.program_id(0)
    r = tl.arange(0, BLOCK_B)
    o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = first_column + o
    if tile * BLOCK_E < E:
        e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
        along = tl.zeros([BLOCK_O, BLOCK_E], dtype=tl.float32)  # of_linear^T normed
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
                of_linear = tl.load(of_linear_ptr + entries, mask=in_grad, other=0.0)  # [BLOCK_B, BLOCK_O]
                along = tl.dot(tl.trans(of_linear), normed, along, input_precision=PRECISION)
                sums += tl.sum(of_linear, axis=0)
        gain = tl.load(gain_ptr + g * E + e, mask=e < E, other=0.0)
        shift = tl.load(shift_ptr + g * E + e, mask=e < E, other=0.0)
        in_w = (o < size)[:, None] & (e < E)[None, :]
        places = first_column.to(tl.int64) * E + ((o * E)[:, None] + e[None, :])
        w = tl.load(w_ptr + places, mask=in_w, other=0.0)
        tl.store(of_w_ptr + places, along * gain[None, :] + sums[:, None] * shift[None, :], mask=in_w)
        if tile == 0:
            tl.store(of_bias_ptr + column, sums, mask=o < size)
        out = tl.program_id(2) * 2 * G * E + g * E + e
        tl.store(of_scale_ptr + out, tl.sum(along * w, axis=0), mask=e < E)
        tl.store(of_scale_ptr + G * E + out, tl.sum(sums[:, None] * w, axis=0), mask=e < E)
    elif tl.program_id(2) * BLOCK_O < size:
        weights = tl.zeros([BLOCK_O], dtype=tl.float32)
        biases = tl.zeros([BLOCK_O], dtype=tl.float32)
        for start in range(0, B, BLOCK_B):
            in_grad = (r < B - start)[:, None] & (o < size)[None, :]
            entries = tl.cast(start, tl.int64) * total + ((r * total)[:, None] + column[None, :])
            grad = tl.load(grad_ptr + entries, mask=in_grad, other=0.0)
            biases += tl.sum(grad, axis=0)
            weights += tl.sum(grad * tl.load(normed_ptr + entries, mask=in_grad, other=0.0), axis=0)
        tl.store(of_part_weight_ptr + column, weights, mask=o < size)
        tl.store(of_part_bias_ptr + column, biases, mask=o < size)


class Project(torch.autograd.Function):
    """`op.project`; all tensors float32, the groups of columns made of whole parts."""

    @staticmethod
    @launches
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        part_weight: Tensor,
        part_bias: Tensor,
        outputs: Ragged,
        parts: Ragged,
        eps: float,
        part_eps: float,
        dropout: float,
    ) -> Tensor:
        given = x, gain, shift, weight, bias, part_weight, part_bias
        x, gain, shift, weight, bias, part_weight, part_bias = (tensor.contiguous() for tensor in given)
        G, B, E = x.shape
        S, total = parts.groups, parts.total
        options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        statistics, deviation = torch.empty(2, G, B, **options), torch.empty(S, B, **options)
        normed, out = torch.empty(B, total, **options), torch.empty(B, total, **options)
        seed = draw_seed(x.device) if dropout > 0.0 else x
        config = ProjectConfig.of(E, outputs, parts, tf32_or_exact())
        if B:
            project_fwd_kernel[(triton.cdiv(B, config.forward["BLOCK_M"]), S)](
                x, gain, shift, weight, bias, part_weight, part_bias, seed,
                offset_table(outputs.sizes, parts.sizes, x.device), statistics, normed, deviation, out,
                B, G, S, E, total, drop_below(dropout), keep_scale(dropout), eps, part_eps,
                DROPOUT=dropout > 0.0, **config.forward,
            )  # fmt: skip
        ctx.outputs, ctx.parts, ctx.dropout, ctx.config = outputs, parts, dropout, config
        ctx.eps = eps, part_eps
        ctx.save_for_backward(*given, seed, statistics, normed, deviation)
        return out

    @staticmethod
    @launches
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not needs_graph(grads):
            return _project_gradients(ctx, *grads)
        if ctx.dropout > 0.0:  # the formula does not know what was dropped
            once: tuple[Tensor | None, ...] = once_differentiable(_project_gradients)(ctx, *grads)
            return once
        eps, part_eps = ctx.eps
        options = {"outputs": ctx.outputs.sizes, "parts": ctx.parts.sizes, "eps": eps, "part_eps": part_eps}
        formula = partial(reference.project, **options)
        return *gradients(formula, ctx.saved_tensors[:7], grads, ctx.needs_input_grad[:7]), *[None] * 5


def _project_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *given, seed, statistics, normed, deviation = ctx.saved_tensors
    x, gain, shift, weight, _, part_weight, _ = (tensor.contiguous() for tensor in given)
    outputs: Ragged = ctx.outputs
    parts: Ragged = ctx.parts
    config: ProjectConfig = ctx.config
    G, B, E = x.shape
    grad = grads[0].contiguous()
    table = offset_table(outputs.sizes, parts.sizes, x.device)
    of_x = torch.empty_like(x)
    tiles = triton.cdiv(outputs.widest, config.weights["BLOCK_O"])
    of_linear = torch.empty_like(normed)
    if B:
        project_bwd_rows_kernel[(triton.cdiv(B, config.rows["BLOCK_M"]), G)](
            grad, x, gain, weight, part_weight, seed, table, statistics, normed, deviation, of_linear, of_x,
            B, G, parts.groups, E, parts.total, drop_below(ctx.dropout), keep_scale(ctx.dropout),
            DROPOUT=ctx.dropout > 0.0, **config.rows,
        )  # fmt: skip

    def of_parameters() -> tuple[Tensor, ...]:
        of_weight = torch.empty_like(weight)
        of_scale = x.new_empty(tiles, 2, G, E)
        of_bias, of_part_weight, of_part_bias = (torch.empty_like(part_weight) for _ in range(3))
        project_bwd_weights_kernel[(triton.cdiv(E, config.weights["BLOCK_E"]) + 1, G, tiles)](
            grad, x, gain, shift, weight, table, statistics, normed, of_linear, of_scale, of_weight, of_bias,
            of_part_weight, of_part_bias, B, G, E, parts.total, **config.weights,
        )  # fmt: skip
        of_gain, of_shift = of_scale.sum(0) if tiles > 1 else of_scale[0]
        return of_gain, of_shift, of_weight, of_bias, of_part_weight, of_part_bias

    return of_x, *defer(of_parameters, [grad, x, statistics, normed, of_linear]), *[None] * 5


def fits(x: Tensor, outputs: Ragged, parts: Ragged) -> bool:
    """Whether `Project` serves: groups made of whole parts, and rows and parts that a program can hold."""
    ends = set(accumulate(parts.sizes))
    whole = parts.total == outputs.total and ends.issuperset(accumulate(outputs.sizes)) and min(outputs.sizes) > 0
    part, columns = next_power_of_two(parts.widest, 16), next_power_of_two(x.shape[-1], 16)
    return whole and (max(part, columns) <= _COLUMNS_AT_MOST or (part <= 64 and part * columns <= _WEIGHTS_AT_MOST))
