"""Triton kernel of the partial decoders in code space, forward: one launch.

A program handles a tile of the codes of one codebook and a tile of the features: it counts the rows of its codes and
sums their features, decodes its codes, and adds up its part of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches, rows_of
from spinlock_fast.kernels._common.launch_helpers import check_int32_offsets, codebook_offsets, next_power_of_two
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.code_decoders.reference import Decoders


@dataclass(frozen=True)
class DecoderConfig:
    """Tile sizes by shape."""

    block_n: int  # rows per step of the sums
    block_k: int
    block_d: int
    block_f: int
    block_h: int  # hidden units of tf32x3 products: more spill
    rows_n: int  # rows per program of the gradient of quantized
    rows_h: int  # hidden units per step of it
    fwd_warps: int = 4
    bwd_warps: int = 8  # 4 spill in the gradient of quantized
    num_stages: int = 1

    @classmethod
    def of(cls, layout: CodebookLayout, hidden: int) -> DecoderConfig:
        return cls(
            block_n=64,
            block_k=min(32, next_power_of_two(layout.max_codes, 16)),
            block_d=min(32, next_power_of_two(layout.max_dims, 16)),
            block_f=32,
            block_h=min(32, next_power_of_two(hidden, 16)),
            rows_n=64,
            rows_h=min(128, next_power_of_two(hidden, 16)),
        )

    @property
    def forward(self) -> dict[str, Any]:
        return {"BLOCK_N": self.block_n, **self._tiles, "num_warps": self.fwd_warps, "num_stages": self.num_stages}

    @property
    def backward(self) -> dict[str, Any]:
        return {
            "ROWS_N": self.rows_n,
            "ROWS_H": self.rows_h,
            **self._tiles,
            "num_warps": self.bwd_warps,
            "num_stages": self.num_stages,
        }

    @property
    def _tiles(self) -> dict[str, int]:
        return {"BLOCK_K": self.block_k, "BLOCK_D": self.block_d, "BLOCK_F": self.block_f, "BLOCK_H": self.block_h}


@triton.jit(do_not_specialize=["B", "G", "F", "x_stride", "factor"])
def code_decoders_fwd_kernel(
    x_ptr,  # [B, F], row stride x_stride
    codes_ptr,  # [B, G] int64
    codebook_ptr,  # [sum K D]
    w1_ptr,  # [sum D, H]
    b1_ptr,  # [G, H]
    w2_ptr,  # [G, H, F]
    b2_ptr,  # [G, F]
    offsets_ptr,  # [5, G] int32, see `codebook_offsets`
    hidden_ptr,  # [sum K, H]
    decoded_ptr,  # [sum K, F]
    residual_ptr,  # [sum K, F] n_k (P_k - m_k)
    loss_ptr,  # [G, row_tiles of K, row_tiles of F]
    B,
    G,
    F,
    H,
    x_stride,
    factor,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Loss of BLOCK_K codes and BLOCK_F features of one codebook: sum_k n_k (|P_k - m_k|^2 - |m_k|^2) + sum_b |x_b|^2.

    P_k = relu(e_k W1 + b1) W2 + b2, with n_k rows of mean m_k at code k; x about a centre.
    """
    g = tl.program_id(2)
    K = tl.load(offsets_ptr + g)
    D = tl.load(offsets_ptr + G + g)
    first_code = tl.load(offsets_ptr + 2 * G + g)
    first_column = tl.load(offsets_ptr + 3 * G + g)
    first_entry = tl.load(offsets_ptr + 4 * G + g)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    place = (g * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    part = 0.0
    if tl.program_id(1) * BLOCK_K < K:
        # Centred on the mean of the first rows: sums and loss cancel less.
        r = tl.arange(0, BLOCK_N)
        in_x = (r < B)[:, None] & (f < F)[None, :]
        x = tl.load(x_ptr + ((r * x_stride)[:, None] + f[None, :]), mask=in_x, other=0.0)  # [BLOCK_N, BLOCK_F]
        centre = tl.sum(x, axis=0) / tl.minimum(B, BLOCK_N)  # [BLOCK_F]

        # Reductions along a tile are done after the loop, or as matrix products with ones.
        ones = tl.full([BLOCK_N, 16], 1.0, dtype=tl.float32)
        counts = tl.zeros([BLOCK_K, 16], dtype=tl.float32)
        sums = tl.zeros([BLOCK_K, BLOCK_F], dtype=tl.float32)
        squares = tl.zeros([BLOCK_N, BLOCK_F], dtype=tl.float32)
        bad = tl.zeros([BLOCK_N], dtype=tl.int32)
        for first in range(0, B, BLOCK_N):
            inside = r < B - first
            row = tl.cast(first, tl.int64)
            in_x = inside[:, None] & (f < F)[None, :]
            code = tl.load(codes_ptr + row * G + g + r * G, mask=inside, other=-2147483648).to(tl.int32)
            x = tl.load(x_ptr + row * x_stride + ((r * x_stride)[:, None] + f[None, :]), mask=in_x, other=0.0)
            x = tl.where(in_x, x - centre[None, :], 0.0)
            hot = ((code[None, :] == k[:, None]) & (k < K)[:, None]).to(tl.float32)  # [BLOCK_K, BLOCK_N]
            # As uint32 a negative code exceeds K; the smallest int32 marks rows beyond B.
            bad = bad | ((code.to(tl.uint32) >= K) & (code != -2147483648)).to(tl.int32)
            counts = tl.dot(hot, ones, counts, input_precision="tf32")  # exact
            sums = tl.dot(hot, x, sums, input_precision="tf32x3")
            squares += x * x

        rows = tl.max(counts, axis=1)  # [BLOCK_K]

        decoded = tl.zeros([BLOCK_K, BLOCK_F], dtype=tl.float32)
        for first in range(0, H, BLOCK_H):
            h = first + tl.arange(0, BLOCK_H)
            hidden = tl.zeros([BLOCK_K, BLOCK_H], dtype=tl.float32)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                in_codes = (k < K)[:, None] & (d < D)[None, :]
                e = tl.load(codebook_ptr + first_entry + k[:, None] * D + d[None, :], mask=in_codes, other=0.0)
                e = tl.where(tl.abs(e) < float("inf"), e, 0.0)  # no row has a code that is not finite
                in_w1 = (d < D)[:, None] & (h < H)[None, :]
                w1 = tl.load(w1_ptr + (first_column + d)[:, None] * H + h[None, :], mask=in_w1, other=0.0)
                hidden = tl.dot(e, w1, hidden, input_precision="tf32x3")
            hidden += tl.load(b1_ptr + g * H + h, mask=h < H, other=0.0)[None, :]
            hidden = tl.where(hidden < 0.0, 0.0, hidden)  # keeps NaN
            if tl.program_id(0) == 0:
                in_hidden = (k < K)[:, None] & (h < H)[None, :]
                tl.store(hidden_ptr + (first_code + k)[:, None] * H + h[None, :], hidden, mask=in_hidden)
            in_w2 = (h < H)[:, None] & (f < F)[None, :]
            w2 = tl.load(w2_ptr + g.to(tl.int64) * H * F + (h[:, None] * F + f[None, :]), mask=in_w2, other=0.0)
            decoded = tl.dot(hidden, w2, decoded, input_precision="tf32x3")

        b2 = tl.load(b2_ptr + g * F + f, mask=f < F, other=0.0)
        means = sums / tl.maximum(rows, 1.0)[:, None]
        residual = decoded + (b2 - centre)[None, :] - means  # [BLOCK_K, BLOCK_F]
        in_decoded = (k < K)[:, None] & (f < F)[None, :]
        out = (first_code + k)[:, None] * F + f[None, :]
        tl.store(decoded_ptr + out, decoded + b2[None, :], mask=in_decoded)
        tl.store(residual_ptr + out, rows[:, None] * residual, mask=in_decoded)
        inner = tl.where(in_decoded, rows[:, None] * (residual * residual - means * means), 0.0)
        part = tl.sum(tl.sum(inner, axis=1), axis=0)
        if tl.program_id(1) == 0:
            part += tl.sum(tl.sum(squares, axis=0), axis=0)
            part = tl.where(tl.max(bad, axis=0) > 0, float("nan"), part)
    tl.store(loss_ptr + place, part * factor)


@launches
def forward(
    x: Tensor, codes: Tensor, codebook: Tensor, decoders: Decoders, layout: CodebookLayout
) -> tuple[Tensor, ...]:
    """The loss, and what `triton_backward.backward` reads."""
    x, codes, codebook = rows_of(x), codes.contiguous(), codebook.contiguous()
    w1, b1, w2, b2 = (parameter.contiguous() for parameter in decoders)
    (B, F), (G, H) = x.shape, b1.shape
    config = DecoderConfig.of(layout, H)
    check_int32_offsets("hidden and decoded values of all codes", layout.total_codes * max(H, F))
    check_int32_offsets("the weights of a decoder", max(H * F, w1.numel()))
    f_tiles, k_tiles = triton.cdiv(F, config.block_f), triton.cdiv(layout.max_codes, config.block_k)
    options: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    hidden = torch.empty(layout.total_codes, H, **options)
    decoded, residual = (torch.empty(layout.total_codes, F, **options) for _ in range(2))
    loss_parts = torch.empty(G, k_tiles, f_tiles, **options)
    code_decoders_fwd_kernel[(f_tiles, k_tiles, G)](
        x, codes, codebook, w1, b1, w2, b2, codebook_offsets(layout, x.device), hidden, decoded, residual, loss_parts,
        B, G, F, H, x.stride(0), mean_factor(G, B, F), **config.forward,
    )  # fmt: skip
    return loss_parts.sum(), x, codes, codebook, hidden, decoded, residual


def mean_factor(groups: int, rows: int, features: int) -> float:
    """1 / (G B F); 1 for an empty batch."""
    return 1.0 / max(groups * rows * features, 1)
