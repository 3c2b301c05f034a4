"""Triton kernel of the projection, forward: one launch. Products and dropout as in `grouped_mlp`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.dropout import BatchSlice, draw_seed, drop_threshold, keep_scale
from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._common.launch_helpers import next_power_of_two
from spinlock_fast.kernels._common.ragged import Ragged, part_offsets
from spinlock_fast.kernels._common.triton_dropout import dropout_mask

# Largest tiles without spills: columns of a part or of x, and the product of both.
_MAX_COLUMNS = 256
_MAX_WEIGHTS = 64 * 256


@dataclass(frozen=True)
class ProjectConfig:
    """Tile sizes by shape: columns of x, largest part, largest group of outputs."""

    block_e: int  # all columns of x
    block_o: int  # a whole part
    group_o: int  # outputs of a group per step
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
            "BLOCK_M": 16,  # larger tiles spill registers
            "BLOCK_E": max(16, min(64, self.block_e, 64 * 64 // self.block_o)),
            "BLOCK_S": min(32 * num_warps, self.block_e),
        }
        return self._launch(num_warps, BLOCK_O=self.block_o, **tiles)

    @property
    def rows(self) -> dict[str, Any]:
        weights = 32 * 256  # more are slower or spill registers
        block_k = max(16, min(self.block_o, weights // self.block_e))
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
def _row_statistics(x_ptr, x_stride, m, rows, E, eps, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Mean and reciprocal deviation of rows of E columns, in steps of BLOCK_E: [BLOCK_M] each."""
    c = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for first in range(0, E, BLOCK_E):
        e = first + c
        inside = (m < rows)[:, None] & (e < E)[None, :]
        total += tl.load(x_ptr + (m * x_stride)[:, None] + e[None, :], mask=inside, other=0.0)
    mean = tl.sum(total, axis=1) / E
    total = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for first in range(0, E, BLOCK_E):
        e = first + c
        inside = (m < rows)[:, None] & (e < E)[None, :]
        x = tl.load(x_ptr + (m * x_stride)[:, None] + e[None, :], mask=inside, other=0.0)
        x = tl.where(inside, x - mean[:, None], 0.0)
        total += x * x
    return mean, 1.0 / tl.sqrt_rn(tl.sum(total, axis=1) / E + eps)


@triton.jit(do_not_specialize=["B", "G", "S", "total", "threshold", "scale", "first_row", "eps", "part_eps"])
def project_fwd_kernel(
    x_ptr,  # [G, B, E]
    gain_ptr,  # [G, E]
    shift_ptr,  # [G, E]
    w_ptr,  # [sum n, E]
    bias_ptr,  # [sum n]
    part_weight_ptr,  # [sum n]
    part_bias_ptr,  # [sum n]
    seed_ptr,  # [] int64, or not read
    offsets_ptr,  # see `part_offsets`
    statistics_ptr,  # [2, G, B] mean and reciprocal deviation of x
    normed_ptr,  # [B, sum n] parts, normalised
    deviation_ptr,  # [S, B] reciprocal deviations of the parts
    out_ptr,  # [B, sum n]
    B,
    G,
    S,
    E,
    total,
    threshold,
    scale,
    first_row,  # number of row 0 in the batch that the mask is for
    eps,
    part_eps,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,  # a whole part
    BLOCK_S: tl.constexpr,  # columns of x per step of the statistics
    BLOCK_E: tl.constexpr,  # columns of x per step of the product
    PRECISION: tl.constexpr,
):
    """z_s = norm(dropout((norm(x_g) * gain_g + shift_g) W_s^T + b_s)) for BLOCK_M rows of one part, see `reference`."""
    s = tl.program_id(1)
    g = tl.load(offsets_ptr + 3 * G + 1 + 2 * S + s)
    size = tl.load(offsets_ptr + 3 * G + 1 + s)
    first_column = tl.load(offsets_ptr + 3 * G + 1 + S + s)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.minimum(B - start, BLOCK_M).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    o = tl.arange(0, BLOCK_O)
    group_row = g.to(tl.int64) * B + start
    x_ptr += group_row * E
    mean, rstd = _row_statistics(x_ptr, E, m, rows, E, eps, BLOCK_M, BLOCK_S)
    if tl.load(offsets_ptr + 2 * G + g) == s:
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
        y = (x - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]  # [BLOCK_M, BLOCK_E]
        in_w = (o < size)[:, None] & (e < E)[None, :]
        w = tl.load(w_ptr + (o * E)[:, None] + e[None, :], mask=in_w, other=0.0)  # [BLOCK_O, BLOCK_E]
        out = tl.dot(y, tl.trans(w), out, input_precision=PRECISION)
    column = first_column + o
    out += tl.load(bias_ptr + column, mask=o < size, other=0.0)[None, :]
    if DROPOUT:
        out = tl.where(dropout_mask(seed_ptr, first_row + start + m, column, threshold), out * scale, 0.0)

    centred = tl.where((o < size)[None, :], out - (tl.sum(out, axis=1) / size)[:, None], 0.0)
    deviation = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / size + part_eps)
    normed = centred * deviation[:, None]
    weight = tl.load(part_weight_ptr + column, mask=o < size, other=0.0)
    bias = tl.load(part_bias_ptr + column, mask=o < size, other=0.0)
    entries = start * total + ((m * total)[:, None] + column[None, :])
    inside = (m < rows)[:, None] & (o < size)[None, :]
    tl.store(normed_ptr + entries, normed, mask=inside)
    tl.store(out_ptr + entries, normed * weight[None, :] + bias[None, :], mask=inside)
    tl.store(deviation_ptr + tl.cast(s, tl.int64) * B + start + m, deviation, mask=m < rows)


@launches
def forward(
    x: Tensor,
    parameters: Sequence[Tensor],
    outputs: Ragged,
    parts: Ragged,
    eps: float,
    part_eps: float,
    dropout: float,
    batch: BatchSlice | None,
    precision: str,
) -> tuple[Tensor, ...]:
    """The output [B, sum n], and what `triton_backward.backward` reads.

    `parameters` are gain, shift, weight, bias, part_weight and part_bias; all float32, of sizes that `supports` allows.
    """
    x, gain, shift, weight, bias, part_weight, part_bias = (t.contiguous() for t in (x, *parameters))
    G, B, E = x.shape
    S, total = parts.groups, parts.total
    options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    statistics, deviation = torch.empty(2, G, B, **options), torch.empty(S, B, **options)
    normed, out = torch.empty(B, total, **options), torch.empty(B, total, **options)
    seed = draw_seed(x.device) if dropout > 0.0 else x
    config = ProjectConfig.of(E, outputs, parts, precision)
    if B:
        project_fwd_kernel[(triton.cdiv(B, config.forward["BLOCK_M"]), S)](
            x, gain, shift, weight, bias, part_weight, part_bias, seed,
            part_offsets(outputs.sizes, parts.sizes, x.device), statistics, normed, deviation, out,
            B, G, S, E, total, drop_threshold(dropout), keep_scale(dropout), batch.first if batch else 0, eps, part_eps,
            DROPOUT=dropout > 0.0, **config.forward,
        )  # fmt: skip
    return out, seed, statistics, normed, deviation


def supports(x: Tensor, outputs: Ragged, parts: Ragged) -> bool:
    """Whether groups consist of whole parts, and rows and parts fit a program."""
    ends = set(accumulate(parts.sizes))
    whole = parts.total == outputs.total and ends.issuperset(accumulate(outputs.sizes)) and min(outputs.sizes) > 0
    part, columns = next_power_of_two(parts.widest, 16), next_power_of_two(x.shape[-1], 16)
    return whole and (max(part, columns) <= _MAX_COLUMNS or (part <= 64 and part * columns <= _MAX_WEIGHTS))
