"""Triton kernels of the grouped networks on packed weights: no group is padded or copied.

Products are in TF32 where torch's products are, else accurate to float32. Dropout keeps no mask: it is a hash of a
seed, row and column; the seed lies on the device, drawn by torch's generator, so that a captured graph draws another
one at every replay. Of the hidden layer zeros tell it. What follows the networks is in `projection`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches, rows_of
from spinlock_fast.kernels._common.higher_order import needs_graph
from spinlock_fast.kernels._common.launch_sizes import check_int32_offsets
from spinlock_fast.kernels._common.precision import cuda_matmul
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels._common.streams import defer
from spinlock_fast.kernels._common.table_cache import TableCache
from spinlock_fast.kernels.grouped_mlp.reference import mlp_gradients

_PROGRAMS = 128  # what fills a device: below it, tiles are small

_tables: TableCache[Tensor] = TableCache(256)


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

    @classmethod
    def of_second(cls, precision: str) -> ProductConfig:
        """Of second layers: measured, not derived."""
        return cls(32, 64, 32, precision, num_stages=4) if precision == "tf32" else cls(32, 32, 32, precision)

    @classmethod
    def of_weights(cls, precision: str) -> ProductConfig:
        """Where sums run over rows: measured, not derived."""
        return cls(32, 32, 64 if precision == "tf32" else 32, precision)

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


def tf32_or_exact() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def offset_table(outer: tuple[int, ...], inner: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 on `device`: size, start and first part of each of `outer`; size, start and group of each of `inner`."""

    def make() -> Tensor:
        host: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}  # whatever the caller's defaults are
        groups, parts = torch.tensor(outer, **host), torch.tensor(inner, **host)
        starts, part_starts = groups.cumsum(0) - groups, parts.cumsum(0) - parts
        first = torch.searchsorted(part_starts, torch.cat([starts, groups.sum()[None]]))
        group_of_part = torch.searchsorted(first[1:], torch.arange(len(inner), **host), right=True)
        table = torch.cat([groups, starts, first, parts, part_starts, group_of_part])
        return table.to(torch.int32).to(device)

    return _tables.get((outer, inner, device), device, make)


def draw_seed(device: torch.device) -> Tensor:
    """A seed for dropout from torch's generator of the device."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


def drop_below(dropout: float) -> int:
    return min(round(dropout * 2**31), 2**31 - 1)


def keep_scale(dropout: float) -> float:
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
def keep(seed_ptr, row, column, threshold):
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
def grouped_mlp_fwd_first_kernel(
    x_ptr,  # [B, sum n]
    w_ptr,  # [sum n, H]
    bias_ptr,  # [G, H]
    seed_ptr,  # [] int64, or not read
    table_ptr,  # see offset_table
    out_ptr,  # [G, B, H]
    B,
    G,
    H,
    x_row,
    w_row,
    w_column,
    threshold,
    scale,
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
    size = tl.load(table_ptr + g)
    first = tl.load(table_ptr + G + g)
    x_ptr += start * x_row + first
    w_ptr += first.to(tl.int64) * w_row
    out = _product(x_ptr, x_row, 1, w_ptr, w_row, w_column, m, n, rows, H, size, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    out += tl.load(bias_ptr + g * H + n, mask=n < H, other=0.0)[None, :]
    out = tl.where(out < 0.0, 0.0, out)  # NaN stays
    if DROPOUT:
        kept = keep(seed_ptr, g.to(tl.int64) * B + start + m, n, threshold)
        out = tl.where(kept, out * scale, 0.0)
    out_ptr += (g.to(tl.int64) * B + start) * H
    tl.store(out_ptr + (m * H)[:, None] + n[None, :], out, mask=(m < rows)[:, None] & (n < H)[None, :])


@triton.jit(do_not_specialize=["scale"])
def grouped_product_kernel(
    a_ptr,  # [G, B, K]
    w_ptr,  # [G, K, N], strided
    bias_ptr,  # [G, N], or not read
    hidden_ptr,  # [G, B, N], or not read
    out_ptr,  # [G, B, N]
    B,
    K,
    N,
    w_group,
    w_row,
    w_column,
    scale,
    BIAS: tl.constexpr,  # added; else the product times scale where hidden values are not 0, and 0 where they are
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One product for every group."""
    g = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(B - start, BLOCK_M).to(tl.int32)
    a_ptr += (g * B + start) * K
    w_ptr += g * w_group
    out = _product(a_ptr, K, 1, w_ptr, w_row, w_column, m, n, rows, N, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    places = (g * B + start) * N + ((m * N)[:, None] + n[None, :])
    here = (m < rows)[:, None] & (n < N)[None, :]
    if BIAS:
        out += tl.load(bias_ptr + g * N + n, mask=n < N, other=0.0)[None, :]
    else:  # a hidden value of 0 was cut off or dropped; either way nothing goes back through it
        out = tl.where(tl.load(hidden_ptr + places, mask=here, other=0.0) == 0.0, 0.0, out * scale)
    tl.store(out_ptr + places, out, mask=here)


def _grouped_product(
    a: Tensor,
    weight: Tensor,
    precision: str,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """a [G, B, K] times weight [G, K, N], plus bias or behind hidden values; see the kernel."""
    (G, B, K), N = a.shape, weight.shape[2]
    out = torch.empty(G, B, N, dtype=a.dtype, device=a.device)
    config = ProductConfig.of_second(precision)
    if B:
        grouped_product_kernel[(triton.cdiv(B, config.block_m), triton.cdiv(N, config.block_n), G)](
            a, weight, bias if bias is not None else a, hidden if hidden is not None else a, out, B, K, N,
            *weight.stride(), scale, BIAS=bias is not None, **config.tiles,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["B", "G"])
def grouped_mlp_bwd_first_kernel(
    x_ptr,  # [B, sum n]
    w1_ptr,  # [sum n, H]
    of_hidden_ptr,  # [G, B, H]
    table_ptr,  # see offset_table
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
    """`op.grouped_mlp`; all tensors float32. The gradient of the second weights is torch's product."""

    @staticmethod
    @launches
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, inputs: Ragged, dropout: float
    ) -> Tensor:
        given = x, w1, b1, w2, b2
        (G, H, _), B = w2.shape, x.shape[0]
        x = rows_of(x)
        w1, b1 = _dense(w1), b1.contiguous()
        check_int32_offsets("the weights of a network", max(w1.numel(), w2[0].numel()))
        seed = draw_seed(x.device) if dropout > 0.0 else x
        hidden = torch.empty(G, B, H, dtype=x.dtype, device=x.device)
        precision = tf32_or_exact()
        config = ProductConfig.of(G, B, H, precision)
        if B:
            grouped_mlp_fwd_first_kernel[(triton.cdiv(B, config.block_m), triton.cdiv(H, config.block_n), G)](
                x, w1, b1, seed, offset_table(inputs.sizes, (), x.device), hidden, B, G, H, x.stride(0), *w1.stride(),
                drop_below(dropout), keep_scale(dropout), DROPOUT=dropout > 0.0, **config.tiles,
            )  # fmt: skip
        ctx.inputs, ctx.scale, ctx.precision = inputs, keep_scale(dropout), precision
        ctx.save_for_backward(*given, hidden)
        return _grouped_product(hidden, w2, precision, bias=b2.contiguous())

    @staticmethod
    @launches
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, hidden = ctx.saved_tensors
        if needs_graph(grads):
            needed = ctx.needs_input_grad[:5]
            return *mlp_gradients(given, hidden, ctx.scale, ctx.inputs.sizes, grads, needed), None, None
        x, w1, w2 = rows_of(given[0]), _dense(given[1]), given[3]
        grad = grads[0].contiguous()

        def of_second() -> tuple[Tensor, ...]:
            # With the strides of the weights a gradient is taken over by its parameter as it is, transposed or not.
            if w2.stride(-1) == 1:
                return hidden.transpose(1, 2) @ grad, grad.sum(1)
            return (grad.transpose(1, 2) @ hidden).transpose(1, 2), grad.sum(1)

        # Before cuBLAS, which warns in a thread of autograd where nothing has been launched yet.
        of_hidden = _grouped_product(grad, w2.transpose(1, 2), ctx.precision, hidden=hidden, scale=ctx.scale)
        with cuda_matmul(tf32=ctx.precision == "tf32"):
            of_w2, of_b2 = defer(of_second, [grad, hidden])
        of_x, of_w1, of_b1 = _of_first(x, w1, of_hidden, ctx.inputs, ctx.precision, ctx.needs_input_grad[0])
        return of_x, of_w1, of_b1, of_w2, of_b2, None, None


def _of_first(
    x: Tensor, w1: Tensor, of_hidden: Tensor, inputs: Ragged, precision: str, with_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the inputs, if they are wanted, of the first weights and of their biases."""
    G, B, H = of_hidden.shape
    options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    of_w1, of_b1 = torch.empty_like(w1), torch.empty(G, H, **options)
    of_x = torch.empty(B, inputs.total, **options) if with_x else None
    config = ProductConfig.of_weights(precision)
    m, n = config.block_m, config.block_n
    jobs = (triton.cdiv(inputs.widest, m) + 1) * triton.cdiv(H, n)
    if of_x is not None:
        jobs += triton.cdiv(B, m) * triton.cdiv(inputs.widest, n)
    grouped_mlp_bwd_first_kernel[(jobs, G)](
        x, w1, of_hidden, offset_table(inputs.sizes, (), x.device), of_x if of_x is not None else x, of_w1, of_b1,
        B, G, H, x.stride(0), *w1.stride(), inputs.total, inputs.widest, OF_X=of_x is not None, **config.tiles,
    )  # fmt: skip
    return of_x, of_w1, of_b1
