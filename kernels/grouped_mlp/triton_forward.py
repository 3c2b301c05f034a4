"""Triton kernels of the grouped networks, forward: products on packed weights, without padded or copied groups.

Products are TF32 if torch's are, otherwise accurate to float32. No dropout mask is stored: it is a hash, see
`_common.dropout`, and a zero activation marks a dropped unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.dropout import BatchSlice, draw_seed, drop_threshold, keep_scale
from spinlock_fast.kernels._common.guard import launches, rows_of
from spinlock_fast.kernels._common.launch_helpers import check_int32_offsets
from spinlock_fast.kernels._common.ragged import Ragged, part_offsets
from spinlock_fast.kernels._common.triton_dropout import dropout_mask

MIN_PROGRAMS = 128  # programs that fill a GPU; tiles are small if larger ones give fewer


@dataclass(frozen=True)
class ProductConfig:
    """Tile sizes of matrix products by shape."""

    block_m: int
    block_n: int
    block_k: int
    precision: str
    num_warps: int = 4
    num_stages: int = 2  # the loops are long enough for prefetching

    @classmethod
    def of(cls, groups: int, rows: int, columns: int, precision: str) -> ProductConfig:
        if precision != "tf32":  # larger tiles spill registers
            return cls(32, 32, 32, precision)
        many = groups * triton.cdiv(rows, 64) * triton.cdiv(columns, 64) >= MIN_PROGRAMS
        return cls(64, 64, 32, precision) if many else cls(32, 32, 64, precision)

    @classmethod
    def for_second_layer(cls, precision: str) -> ProductConfig:
        """Second layers; measured."""
        return cls(32, 64, 32, precision, num_stages=4) if precision == "tf32" else cls(32, 32, 32, precision)

    @classmethod
    def for_weights(cls, precision: str) -> ProductConfig:
        """Products that sum over rows; measured."""
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


@triton.jit
def tile_product(
    a_ptr, a_m, a_k, b_ptr, b_k, b_n, m, n, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows m and columns n of a @ b, with a [M, K] and b [K, N], both with strides: [BLOCK_M, BLOCK_N]."""
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
def column_sums(a_ptr, n, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of the columns n of a [K, N]: [BLOCK_N]."""
    sums = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    k = tl.arange(0, BLOCK_K)
    for first in range(0, K, BLOCK_K):
        inside = (k < K - first)[:, None] & (n < N)[None, :]
        sums += tl.load(a_ptr + (k * N)[:, None] + n[None, :], mask=inside, other=0.0)
        a_ptr += BLOCK_K * N
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["B", "G", "threshold", "scale", "first_row", "batch_rows"])
def grouped_mlp_fwd_first_kernel(
    x_ptr,  # [B, sum n], row stride x_stride
    w_ptr,  # [sum n, H]
    bias_ptr,  # [G, H]
    seed_ptr,  # [] int64, or not read
    offsets_ptr,  # see `part_offsets`
    out_ptr,  # [G, B, H]
    B,
    G,
    H,
    x_stride,
    w_row,
    w_column,
    threshold,
    scale,
    first_row,  # number of row 0 in the batch of batch_rows rows that the mask is for
    batch_rows,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden_g = dropout(relu(x_g W1_g + b1_g)), a tile [BLOCK_M, BLOCK_N] per program."""
    g = tl.program_id(2)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(B - start, BLOCK_M).to(tl.int32)
    size = tl.load(offsets_ptr + g)
    first = tl.load(offsets_ptr + G + g)
    x_ptr += start * x_stride + first
    w_ptr += first.to(tl.int64) * w_row
    out = tile_product(
        x_ptr, x_stride, 1, w_ptr, w_row, w_column, m, n, rows, H, size, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )
    out += tl.load(bias_ptr + g * H + n, mask=n < H, other=0.0)[None, :]
    out = tl.where(out < 0.0, 0.0, out)  # keeps NaN
    if DROPOUT:
        keep = dropout_mask(seed_ptr, g.to(tl.int64) * batch_rows + first_row + start + m, n, threshold)
        out = tl.where(keep, out * scale, 0.0)
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
    BIAS: tl.constexpr,  # adds the bias; otherwise multiplies by scale, and by 0 where hidden is 0
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_g = a_g W_g + b_g, or scale a_g W_g where hidden_g != 0; a tile [BLOCK_M, BLOCK_N] per program."""
    g = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(B - start, BLOCK_M).to(tl.int32)
    a_ptr += (g * B + start) * K
    w_ptr += g * w_group
    out = tile_product(a_ptr, K, 1, w_ptr, w_row, w_column, m, n, rows, N, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    entries = (g * B + start) * N + ((m * N)[:, None] + n[None, :])
    inside = (m < rows)[:, None] & (n < N)[None, :]
    if BIAS:
        out += tl.load(bias_ptr + g * N + n, mask=n < N, other=0.0)[None, :]
    else:  # no gradient passes through a hidden value of 0
        out = tl.where(tl.load(hidden_ptr + entries, mask=inside, other=0.0) == 0.0, 0.0, out * scale)
    tl.store(out_ptr + entries, out, mask=inside)


def grouped_product(
    a: Tensor,
    weight: Tensor,
    precision: str,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """a [G, B, K] @ weight [G, K, N] by `grouped_product_kernel`, with a bias or with hidden values."""
    (G, B, K), N = a.shape, weight.shape[2]
    out = torch.empty(G, B, N, dtype=a.dtype, device=a.device)
    config = ProductConfig.for_second_layer(precision)
    if B:
        grouped_product_kernel[(triton.cdiv(B, config.block_m), triton.cdiv(N, config.block_n), G)](
            a, weight, bias if bias is not None else a, hidden if hidden is not None else a, out, B, K, N,
            *weight.stride(), scale, BIAS=bias is not None, **config.tiles,
        )  # fmt: skip
    return out


def dense(weight: Tensor) -> Tensor:
    """The weight itself if `torch.empty_like` keeps its strides, transposed or not; otherwise a contiguous copy."""
    return weight if torch.empty_like(weight).stride() == weight.stride() else weight.contiguous()


@launches
def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    inputs: Ragged,
    dropout: float,
    batch: BatchSlice | None,
    precision: str,
) -> tuple[Tensor, ...]:
    """The output [G, B, E] and the hidden values [G, B, H]; all float32."""
    (G, H, _), B = w2.shape, x.shape[0]
    first_row, batch_rows = batch or (0, B)
    x = rows_of(x)
    w1, b1 = dense(w1), b1.contiguous()
    check_int32_offsets("the weights of a network", max(w1.numel(), w2[0].numel()))
    seed = draw_seed(x.device) if dropout > 0.0 else x
    hidden = torch.empty(G, B, H, dtype=x.dtype, device=x.device)
    config = ProductConfig.of(G, B, H, precision)
    if B:
        grouped_mlp_fwd_first_kernel[(triton.cdiv(B, config.block_m), triton.cdiv(H, config.block_n), G)](
            x, w1, b1, seed, part_offsets(inputs.sizes, (), x.device), hidden, B, G, H, x.stride(0), *w1.stride(),
            drop_threshold(dropout), keep_scale(dropout), first_row, batch_rows, DROPOUT=dropout > 0.0, **config.tiles,
        )  # fmt: skip
    return grouped_product(hidden, w2, precision, bias=b2.contiguous()), hidden
