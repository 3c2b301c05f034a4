"""Triton kernels of the grouped layers on packed weights: no group is padded or copied.

Products are in TF32 where torch's products are, else accurate to float32. Dropout keeps no mask: it is a hash of a
seed, row and column; the seed lies on the device, drawn by torch's generator, so that a captured graph draws another
one at every replay. Of the hidden layer zeros tell it.

Two-layer networks take two launches forward and two backward; normalisation, projection, dropout and normalisation of
the segments (`Project`) take one forward and two backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._triton.specimen import FEATURES, ROWS, SEED, Specimen
from spinlock_fast.kernels._triton.tables import power_of_two
from spinlock_fast.kernels.grouped_mlp.ragged import Ragged

# Columns of a part, and their product with the columns of an embedding, that a program can hold without spills.
_PART_AT_MOST = 64
_WEIGHTS_AT_MOST = 64 * 256
_PROGRAMS = 128  # what fills a device: below it, tiles are small

_tables: dict[tuple[tuple[int, ...], tuple[int, ...], torch.device], Tensor] = {}


@dataclass(frozen=True)
class ProductConfig:
    """Tile sizes of products, chosen by shape."""

    block_m: int
    block_n: int
    block_k: int
    precision: str
    num_warps: int = 4
    num_stages: int = 2  # the loops are long enough for loads ahead

    @classmethod
    def of(cls, groups: int, rows: int, columns: int, precision: str) -> ProductConfig:
        if precision != "tf32":  # larger tiles spill
            return cls(32, 32, 32, precision)
        many = groups * triton.cdiv(rows, 64) * triton.cdiv(columns, 64) >= _PROGRAMS
        return cls(64, 64, 32, precision) if many else cls(32, 32, 64, precision)

    @property
    def tiles(self) -> dict[str, Any]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "PRECISION": self.precision,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class ProjectConfig:
    """Tile sizes of a projection, chosen by shape: E columns of x, parts and groups of so many outputs at most."""

    block_e: int  # all columns
    block_o: int  # a whole part
    group_o: int  # outputs of a group at once
    precision: str

    @classmethod
    def of(cls, columns: int, outputs: Ragged, parts: Ragged, precision: str) -> ProjectConfig:
        part, group = power_of_two(parts.widest, 16), min(64, power_of_two(outputs.widest, 16))
        return cls(power_of_two(columns, 16), part, group, precision)

    @property
    def forward(self) -> dict[str, Any]:
        block_m = 32 if self.precision == "tf32" else 16  # larger tiles spill
        return self._launch(4, BLOCK_M=block_m, BLOCK_O=self.block_o, BLOCK_E=min(64, self.block_e))

    @property
    def rows(self) -> dict[str, Any]:
        num_warps, block_k = 8, self.block_o
        if self.precision != "tf32":  # the weights are held more than once: more of them spill
            num_warps, block_k = 8 if self.block_e <= 256 else 16, max(16, min(block_k, 32 * 256 // self.block_e))
        return self._launch(num_warps, BLOCK_M=16, BLOCK_O=self.block_o, BLOCK_K=block_k, BLOCK_E=self.block_e)

    @property
    def weights(self) -> dict[str, Any]:
        return self._launch(8, BLOCK_B=64, BLOCK_O=self.group_o, BLOCK_E=min(32, self.block_e))

    def _launch(self, num_warps: int, **tiles: int) -> dict[str, Any]:
        return {**tiles, "PRECISION": self.precision, "num_warps": num_warps, "num_stages": 1}


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _table(outer: tuple[int, ...], inner: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 on `device`: size, start and first part of each of `outer`; size, start and group of each of `inner`."""
    key = (outer, inner, device)
    found = _tables.get(key)
    if found is None:
        with torch.inference_mode(False):
            groups, parts = torch.tensor(outer), torch.tensor(inner, dtype=torch.int64)
            starts, part_starts = groups.cumsum(0) - groups, parts.cumsum(0) - parts
            first = torch.searchsorted(part_starts, torch.cat([starts, groups.sum()[None]]))
            group_of_part = torch.searchsorted(first[1:], torch.arange(len(inner)), right=True)
            table = torch.cat([groups, starts, first, parts, part_starts, group_of_part])
            found = _tables[key] = table.to(torch.int32).to(device)
    return found


def draw_seed(device: torch.device) -> Tensor:
    """A seed for dropout from torch's generator of the device."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


def _threshold(dropout: float) -> int:
    return min(round(dropout * 2**31), 2**31 - 1)


def _scale(dropout: float) -> float:
    return 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0


def _dense(weight: Tensor) -> Tensor:
    """The weight itself where fresh memory can have its strides, transposed or not."""
    return weight if torch.empty_like(weight).stride() == weight.stride() else weight.contiguous()


@triton.jit
def _mixed(x):
    """A hash of 32 bits (Ellis' lowbias32)."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _keep(seed_ptr, row, column, threshold):
    """[rows, columns] whether dropout keeps an entry."""
    seed = tl.load(seed_ptr)
    key = row.to(tl.uint32) ^ seed.to(tl.uint32)
    key = _mixed(_mixed(key) ^ (seed >> 32).to(tl.uint32))
    bits = _mixed(key[:, None] + (column.to(tl.uint32) * 0x9E3779B1)[None, :])
    return (bits >> 1).to(tl.int32) >= threshold


@triton.jit
def _product(
    a_ptr, a_m, a_k, b_ptr, b_k, b_n, m, n, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows m and columns n of a [M, K] times b [K, N]."""
    out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    k = tl.arange(0, BLOCK_K)
    for first in range(0, K, BLOCK_K):
        in_k = k < K - first
        a = tl.load(a_ptr + (m * a_m)[:, None] + (k * a_k)[None, :], mask=(m < M)[:, None] & in_k[None, :], other=0.0)
        b = tl.load(b_ptr + (k * b_k)[:, None] + (n * b_n)[None, :], mask=in_k[:, None] & (n < N)[None, :], other=0.0)
        out = tl.dot(a, b, out, input_precision=PRECISION)
        a_ptr += BLOCK_K * a_k
        b_ptr += BLOCK_K * b_k
    return out


@triton.jit
def _column_sums(a_ptr, n, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of the columns n of a [K, N]."""
    sums = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    k = tl.arange(0, BLOCK_K)
    for first in range(0, K, BLOCK_K):
        here = (k < K - first)[:, None] & (n < N)[None, :]
        sums += tl.load(a_ptr + (k * N)[:, None] + n[None, :], mask=here, other=0.0)
        a_ptr += BLOCK_K * N
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["B", "G", "threshold", "scale"])
def grouped_layer_fwd_kernel(
    x_ptr,  # RAGGED: [B, sum n]; else [G, B, K]
    w_ptr,  # RAGGED: [sum n, N]; else [G, K, N]
    bias_ptr,  # [G, N]
    seed_ptr,  # [] int64, or not read
    table_ptr,  # see _table
    out_ptr,  # [G, B, N]
    B,
    G,
    K,
    N,
    x_row,
    w_group,
    w_row,
    w_column,
    threshold,
    scale,
    RAGGED: tl.constexpr,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    g = tl.program_id(2)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(B - start, BLOCK_M).to(tl.int32)
    x_ptr += start * x_row
    depth = K
    if RAGGED:
        depth = tl.load(table_ptr + g)
        first = tl.load(table_ptr + G + g)
        x_ptr += first
        w_ptr += first.to(tl.int64) * w_row
    else:
        x_ptr += g.to(tl.int64) * B * x_row
        w_ptr += g.to(tl.int64) * w_group
    out = _product(x_ptr, x_row, 1, w_ptr, w_row, w_column, m, n, rows, N, depth, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    out += tl.load(bias_ptr + g * N + n, mask=n < N, other=0.0)[None, :]
    if RELU:
        out = tl.where(out < 0.0, 0.0, out)  # NaN stays
    if DROPOUT:
        kept = _keep(seed_ptr, g.to(tl.int64) * B + start + m, n, threshold)
        out = tl.where(kept, out * scale, 0.0)
    out_ptr += (g.to(tl.int64) * B + start) * N
    tl.store(out_ptr + (m * N)[:, None] + n[None, :], out, mask=(m < rows)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["B", "scale"])
def grouped_mlp_bwd_second_kernel(
    grad_ptr,  # [G, B, E]
    hidden_ptr,  # [G, B, H]
    w2_ptr,  # [G, H, E]
    of_hidden_ptr,  # [G, B, H]
    of_w2_ptr,  # [G, H, E], strides of w2
    of_b2_ptr,  # [G, E]
    B,
    H,
    E,
    w_group,
    w_row,
    w_column,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    job = tl.program_id(0)
    grad_ptr += g * B * E
    hidden_ptr += g * B * H
    w2_ptr += g * w_group
    e_tiles = tl.cdiv(E, BLOCK_N)
    weight_jobs = tl.cdiv(H, BLOCK_M) * e_tiles
    if job < weight_jobs:  # the longer jobs
        h = job // e_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        e = job % e_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        weights = _product(hidden_ptr, 1, H, grad_ptr, E, 1, h, e, H, E, B, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        inside = (h < H)[:, None] & (e < E)[None, :]
        tl.store(of_w2_ptr + g * w_group + (h * w_row)[:, None] + (e * w_column)[None, :], weights, mask=inside)
    elif job < weight_jobs + e_tiles:
        e = (job - weight_jobs) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(of_b2_ptr + g * E + e, _column_sums(grad_ptr, e, E, B, BLOCK_N, BLOCK_K), mask=e < E)
    else:
        job -= weight_jobs + e_tiles
        h_tiles = tl.cdiv(H, BLOCK_N)
        start = (job // h_tiles).to(tl.int64) * BLOCK_M
        m = tl.arange(0, BLOCK_M)
        n = job % h_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = tl.minimum(B - start, BLOCK_M).to(tl.int32)
        out = _product(
            grad_ptr + start * E, E, 1, w2_ptr, w_column, w_row, m, n, rows, H, E, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        here = (m < rows)[:, None] & (n < H)[None, :]
        entries = start * H + ((m * H)[:, None] + n[None, :])
        hidden = tl.load(hidden_ptr + entries, mask=here, other=0.0)
        # A hidden value of 0 was cut off or dropped; either way nothing goes back through it.
        tl.store(of_hidden_ptr + g * B * H + entries, tl.where(hidden == 0.0, 0.0, out * scale), mask=here)


@triton.jit(do_not_specialize=["B", "G"])
def grouped_mlp_bwd_first_kernel(
    x_ptr,  # [B, sum n]
    w1_ptr,  # [sum n, H]
    of_hidden_ptr,  # [G, B, H]
    table_ptr,  # see _table
    of_x_ptr,  # [B, sum n] contiguous
    of_w1_ptr,  # [sum n, H], strides of w1
    of_b1_ptr,  # [G, H]
    B,
    G,
    H,
    x_row,
    w_row,
    w_column,
    total,
    widest,
    OF_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    g = tl.program_id(1)
    job = tl.program_id(0)
    size = tl.load(table_ptr + g)
    first = tl.load(table_ptr + G + g)
    of_hidden_ptr += g.to(tl.int64) * B * H
    h_tiles = tl.cdiv(H, BLOCK_N)
    weight_jobs = tl.cdiv(widest, BLOCK_M) * h_tiles
    if job < weight_jobs:
        if job // h_tiles * BLOCK_M < size:
            i = job // h_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
            h = job % h_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
            weights = _product(
                x_ptr + first, 1, x_row, of_hidden_ptr, H, 1, i, h, size, H, B, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )
            inside = (i < size)[:, None] & (h < H)[None, :]
            of_w1_ptr += first.to(tl.int64) * w_row
            tl.store(of_w1_ptr + (i * w_row)[:, None] + (h * w_column)[None, :], weights, mask=inside)
    elif job < weight_jobs + h_tiles:
        h = (job - weight_jobs) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(of_b1_ptr + g * H + h, _column_sums(of_hidden_ptr, h, H, B, BLOCK_N, BLOCK_K), mask=h < H)
    elif OF_X:
        job -= weight_jobs + h_tiles
        tiles = tl.cdiv(widest, BLOCK_N)
        if job % tiles * BLOCK_N < size:
            start = (job // tiles).to(tl.int64) * BLOCK_M
            m = tl.arange(0, BLOCK_M)
            n = job % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
            rows = tl.minimum(B - start, BLOCK_M).to(tl.int32)
            out = _product(
                of_hidden_ptr + start * H, H, 1, w1_ptr + first.to(tl.int64) * w_row, w_column, w_row, m, n, rows,
                size, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            of_x_ptr += start * total + first
            tl.store(of_x_ptr + (m * total)[:, None] + n[None, :], out, mask=(m < rows)[:, None] & (n < size)[None, :])


class GroupedMLP(torch.autograd.Function):
    """`op.grouped_mlp`; all tensors float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, inputs: Ragged, dropout: float
    ) -> Tensor:
        (G, H, E), B = w2.shape, x.shape[0]
        x = x if x.stride(-1) == 1 else x.contiguous()
        w1, w2, b1, b2 = _dense(w1), _dense(w2), b1.contiguous(), b2.contiguous()
        seed = draw_seed(x.device) if dropout > 0.0 else x
        table = _table(inputs.sizes, (), x.device)
        hidden = torch.empty(G, B, H, dtype=x.dtype, device=x.device)
        out = torch.empty(G, B, E, dtype=x.dtype, device=x.device)
        precision = _precision()
        for source, weight, bias, target, ragged in ((x, w1, b1, hidden, True), (hidden, w2, b2, out, False)):
            width = target.shape[2]
            config = ProductConfig.of(G, B, width, precision)
            grid = (triton.cdiv(B, config.block_m), triton.cdiv(width, config.block_n), G)
            if B:
                grouped_layer_fwd_kernel[grid](
                    source, weight, bias, seed, table, target, B, G, H, width, source.stride(-2),
                    0 if ragged else weight.stride(0), weight.stride(-2), weight.stride(-1), _threshold(dropout),
                    _scale(dropout), RAGGED=ragged, RELU=ragged, DROPOUT=ragged and dropout > 0.0,
                    **config.tiles,
                )  # fmt: skip
        ctx.inputs, ctx.scale, ctx.precision = inputs, _scale(dropout), precision
        ctx.save_for_backward(x, w1, hidden, w2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, hidden, w2 = ctx.saved_tensors
        inputs: Ragged = ctx.inputs
        (G, H, E), B = w2.shape, x.shape[0]
        grad = grads[0].contiguous()
        options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        of_hidden = torch.empty(G, B, H, **options)
        # With the strides of the weights a gradient is taken over by its parameter as it is, transposed or not.
        of_w1, of_w2 = torch.empty_like(w1), torch.empty_like(w2)
        of_b1, of_b2 = torch.empty(G, H, **options), torch.empty(G, E, **options)
        of_x = torch.empty(B, inputs.total, **options) if ctx.needs_input_grad[0] else None
        config = ProductConfig.of(G, B, H, ctx.precision)
        m, n = config.block_m, config.block_n
        jobs = (triton.cdiv(H, m) + 1) * triton.cdiv(E, n) + triton.cdiv(B, m) * triton.cdiv(H, n)
        grouped_mlp_bwd_second_kernel[(jobs, G)](
            grad, hidden, w2, of_hidden, of_w2, of_b2, B, H, E, *w2.stride(), ctx.scale, **config.tiles,
        )  # fmt: skip
        jobs = (triton.cdiv(inputs.widest, m) + 1) * triton.cdiv(H, n)
        if of_x is not None:
            jobs += triton.cdiv(B, m) * triton.cdiv(inputs.widest, n)
        grouped_mlp_bwd_first_kernel[(jobs, G)](
            x, w1, of_hidden, _table(inputs.sizes, (), x.device), of_x if of_x is not None else x, of_w1, of_b1,
            B, G, H, x.stride(0), *w1.stride(), inputs.total, inputs.widest, OF_X=of_x is not None, **config.tiles,
        )  # fmt: skip
        return of_x, of_w1, of_b1, of_w2, of_b2, None, None


@triton.jit
def _row_statistics(x_ptr, x_row, m, rows, E, eps, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Mean, and reciprocal of the deviation, of rows of E columns."""
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
    table_ptr,  # see _table
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
    BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr,
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
    mean, rstd = _row_statistics(x_ptr, E, m, rows, E, eps, BLOCK_M, BLOCK_E)
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
        out = tl.where(_keep(seed_ptr, start + m, column, threshold), out * scale, 0.0)

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
        for first in range(0, BLOCK_O, BLOCK_K):
            o = first + tl.arange(0, BLOCK_K)
            here, entries, grad, part = _part(  # loaded once where BLOCK_K is BLOCK_O
                grad_ptr, part_weight_ptr, normed_ptr, start, m, rows, o, size, first_column, total
            )
            of_linear = (grad - mean[:, None] - part * along[:, None]) * deviation[:, None]
            of_linear = tl.where(here, of_linear, 0.0)
            if DROPOUT:
                kept = _keep(seed_ptr, start + m, first_column + o, threshold)
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
    of_gain_ptr,
    of_shift_ptr,
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
    if tile * BLOCK_E < E:
        e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
        gain = tl.load(gain_ptr + g * E + e, mask=e < E, other=0.0)
        shift = tl.load(shift_ptr + g * E + e, mask=e < E, other=0.0)
        of_gain = tl.zeros([BLOCK_E], dtype=tl.float32)
        of_shift = tl.zeros([BLOCK_E], dtype=tl.float32)
        for first in range(0, size, BLOCK_O):
            o = first + tl.arange(0, BLOCK_O)
            column = first_column + o
            along = tl.zeros([BLOCK_O, BLOCK_E], dtype=tl.float32)  # of_linear^T normed
            sums = tl.zeros([BLOCK_O], dtype=tl.float32)
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
            in_w = (o < size)[:, None] & (e < E)[None, :]
            places = first_column.to(tl.int64) * E + ((o * E)[:, None] + e[None, :])
            w = tl.load(w_ptr + places, mask=in_w, other=0.0)
            tl.store(of_w_ptr + places, along * gain[None, :] + sums[:, None] * shift[None, :], mask=in_w)
            of_gain += tl.sum(along * w, axis=0)
            of_shift += tl.sum(sums[:, None] * w, axis=0)
            if tile == 0:
                tl.store(of_bias_ptr + column, sums, mask=o < size)
        tl.store(of_gain_ptr + g * E + e, of_gain, mask=e < E)
        tl.store(of_shift_ptr + g * E + e, of_shift, mask=e < E)
    else:
        for first in range(0, size, BLOCK_O):
            o = first + tl.arange(0, BLOCK_O)
            column = first_column + o
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
        x, gain, shift, weight = x.contiguous(), gain.contiguous(), shift.contiguous(), weight.contiguous()
        G, B, E = x.shape
        S, total = parts.groups, parts.total
        options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        statistics, deviation = torch.empty(2, G, B, **options), torch.empty(S, B, **options)
        normed, out = torch.empty(B, total, **options), torch.empty(B, total, **options)
        seed = draw_seed(x.device) if dropout > 0.0 else x
        config = ProjectConfig.of(E, outputs, parts, _precision())
        if B:
            project_fwd_kernel[(triton.cdiv(B, config.forward["BLOCK_M"]), S)](
                x, gain, shift, weight, bias, part_weight, part_bias, seed,
                _table(outputs.sizes, parts.sizes, x.device), statistics, normed, deviation, out,
                B, G, S, E, total, _threshold(dropout), _scale(dropout), eps, part_eps,
                DROPOUT=dropout > 0.0, **config.forward,
            )  # fmt: skip
        ctx.outputs, ctx.parts, ctx.dropout, ctx.config = outputs, parts, dropout, config
        ctx.save_for_backward(x, gain, shift, weight, part_weight, seed, statistics, normed, deviation)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, weight, part_weight, seed, statistics, normed, deviation = ctx.saved_tensors
        outputs: Ragged = ctx.outputs
        parts: Ragged = ctx.parts
        config: ProjectConfig = ctx.config
        G, B, E = x.shape
        grad = grads[0].contiguous()
        table = _table(outputs.sizes, parts.sizes, x.device)
        of_x, of_gain, of_shift, of_weight = (torch.empty_like(t) for t in (x, gain, shift, weight))
        of_bias, of_part_weight, of_part_bias = (torch.empty_like(part_weight) for _ in range(3))
        of_linear = torch.empty_like(normed)
        if B:
            project_bwd_rows_kernel[(triton.cdiv(B, config.rows["BLOCK_M"]), G)](
                grad, x, gain, weight, part_weight, seed, table, statistics, normed, deviation, of_linear, of_x,
                B, G, parts.groups, E, parts.total, _threshold(ctx.dropout), _scale(ctx.dropout),
                DROPOUT=ctx.dropout > 0.0, **config.rows,
            )  # fmt: skip
        project_bwd_weights_kernel[(triton.cdiv(E, config.weights["BLOCK_E"]) + 1, G)](
            grad, x, gain, shift, weight, table, statistics, normed, of_linear, of_gain, of_shift, of_weight, of_bias,
            of_part_weight, of_part_bias, B, G, E, parts.total, **config.weights,
        )  # fmt: skip
        return of_x, of_gain, of_shift, of_weight, of_bias, of_part_weight, of_part_bias, *[None] * 5


def fits(x: Tensor, outputs: Ragged, parts: Ragged) -> bool:
    """Whether `Project` serves: groups made of whole parts, and rows and parts that a program can hold."""
    ends = set(accumulate(parts.sizes))
    whole = parts.total == outputs.total and ends.issuperset(accumulate(outputs.sizes)) and min(outputs.sizes) > 0
    widest = power_of_two(parts.widest, 16)
    return whole and widest <= _PART_AT_MOST and widest * power_of_two(x.shape[-1], 16) <= _WEIGHTS_AT_MOST


def specimens(capability: int) -> list[Specimen]:
    """Launches for the report: a training step of the 100K run; of those with the same tiles, the longer."""
    categories = (FEATURES, 512, 256)
    decoder = ((SEED.total_dims,), 256, sum(FEATURES))
    return [
        *_networks_forward(*categories, "tf32"),
        *_networks_backward(*categories, "tf32", of_x=False),
        *_networks_backward(*decoder, "tf32", of_x=True),
        *_networks_backward(*decoder, "tf32x3", of_x=True),
        *_projection(256, "tf32"),
        *_projection(256, "tf32x3"),
    ]


def _networks_forward(sizes: tuple[int, ...], H: int, E: int, precision: str) -> list[Specimen]:
    G, B, total = len(sizes), ROWS, sum(sizes)
    found = []
    for ragged, shape, num_inputs, K, N in (
        (True, f"{B} rows, {G} of {total} to {H}, {precision}", B * total, total, H),
        (False, f"{B} rows, {G} of {H} to {E}, {precision}", G * B * H, G * H, E),
    ):
        flags = {"RAGGED": ragged, "RELU": ragged, "DROPOUT": ragged}
        found.append(
            Specimen.launched(
                grouped_layer_fwd_kernel, shape, {**flags, **ProductConfig.of(G, B, N, precision).tiles},
                num_bytes=4 * (num_inputs + K * N + G * N + G * B * N),
                float_ops=(2 if ragged else 1) * G * B * N,
                dot_ops=2 * B * K * N,
                passes=_passes(precision),
            )
        )  # fmt: skip
    return found


def _networks_backward(sizes: tuple[int, ...], H: int, E: int, precision: str, of_x: bool) -> list[Specimen]:
    G, B, total = len(sizes), ROWS, sum(sizes)
    shape = f"{B} rows, {G} of {total} to {H} to {E}, {precision}"
    tiles = ProductConfig.of(G, B, H, precision).tiles
    return [
        Specimen.launched(
            grouped_mlp_bwd_second_kernel, shape, tiles,
            num_bytes=4 * G * (B * E + 2 * B * H + 2 * H * E + E),
            float_ops=G * B * (E + H),
            dot_ops=4 * G * B * H * E,
            passes=_passes(precision),
        ),
        Specimen.launched(
            grouped_mlp_bwd_first_kernel, shape, {"OF_X": of_x, **tiles},
            num_bytes=4 * ((B + H) * total * (1 + of_x) + G * H * (B + 1)),
            float_ops=G * B * H,
            dot_ops=2 * B * total * H * (1 + of_x),
            passes=_passes(precision),
        ),
    ]  # fmt: skip


def _projection(E: int, precision: str) -> list[Specimen]:
    B, G, S, total = ROWS, len(FEATURES), SEED.groups, SEED.total_dims
    levels = S // G
    outputs = Ragged.of([sum(SEED.dims[g * levels : (g + 1) * levels]) for g in range(G)])
    config = ProjectConfig.of(E, outputs, Ragged.of(SEED.dims), precision)
    shape = f"{B} rows, {G} of {E} to {total}, {precision}"
    x, out, weight, statistics = G * B * E, B * total, total * E, 2 * G * B
    dots = {"dot_ops": 2 * out * E, "passes": _passes(precision)}
    return [
        Specimen.launched(
            project_fwd_kernel, shape, {"DROPOUT": True, **config.forward},
            num_bytes=4 * (x + 2 * G * E + weight + 3 * total + statistics + 2 * out + S * B),
            float_ops=8 * x + 9 * out, **dots,
        ),
        Specimen.launched(
            project_bwd_rows_kernel, shape, {"DROPOUT": True, **config.rows},
            num_bytes=4 * (2 * x + G * E + weight + total + statistics + 3 * out + S * B),
            float_ops=10 * x + 9 * out, **dots,
        ),
        Specimen.launched(
            project_bwd_weights_kernel, shape, config.weights,
            num_bytes=4 * (x + 4 * G * E + 2 * weight + 3 * total + statistics + 3 * out),
            float_ops=2 * x + 4 * out + 7 * weight, **dots,
        ),
    ]  # fmt: skip


def _passes(precision: str) -> int:
    return 1 if precision == "tf32" else 3
