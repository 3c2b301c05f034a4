"""Triton kernels of the partial decoders in code space: one launch forward, one backward.

Forward, a program holds a tile of the codes of one codebook and a tile of the features: it counts the rows of its
codes and sums their features, decodes its codes and adds up its part of the loss. Backward, one launch does both what
depends on rows (the gradient of every row's code) and what depends on codes (the gradients of the decoders).
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
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._triton.specimen import FEATURES, ROWS, SEED, Specimen
from spinlock_fast.kernels._triton.tables import book_table, check_offsets, power_of_two
from spinlock_fast.kernels.code_decoders.reference import gradients_of_loss


@dataclass(frozen=True)
class DecoderConfig:
    """Tile sizes, chosen by shape."""

    block_n: int  # rows whose features are summed at once
    block_k: int
    block_d: int
    block_f: int
    block_h: int  # hidden units where products are accurate to float32: more would spill
    pull_n: int  # rows whose gradient a program of the backward pass holds
    pull_h: int
    fwd_warps: int = 4
    bwd_warps: int = 8  # with 4, the rows' tile spills
    num_stages: int = 1

    @classmethod
    def of(cls, layout: CodebookLayout, hidden: int) -> DecoderConfig:
        return cls(
            block_n=64,
            block_k=min(32, power_of_two(layout.max_codes, 16)),
            block_d=min(32, power_of_two(layout.max_dims, 16)),
            block_f=32,
            block_h=min(32, power_of_two(hidden, 16)),
            pull_n=64,
            pull_h=min(128, power_of_two(hidden, 16)),
        )

    @property
    def forward(self) -> dict[str, Any]:
        return {"BLOCK_N": self.block_n, **self._tiles, "num_warps": self.fwd_warps, "num_stages": self.num_stages}

    @property
    def backward(self) -> dict[str, Any]:
        return {
            "PULL_N": self.pull_n,
            "PULL_H": self.pull_h,
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
    table_ptr,  # [5, G] int32, see book_table
    hidden_ptr,  # [sum K, H]
    decoded_ptr,  # [sum K, F]
    off_ptr,  # [sum K, F] rows of the code times (decoded - mean of the rows)
    loss_ptr,  # [G, tiles of K, tiles of F]
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
    g = tl.program_id(2)
    K = tl.load(table_ptr + g)
    D = tl.load(table_ptr + G + g)
    first_code = tl.load(table_ptr + 2 * G + g)
    first_column = tl.load(table_ptr + 3 * G + g)
    first_entry = tl.load(table_ptr + 4 * G + g)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    place = (g * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    part = 0.0
    if tl.program_id(1) * BLOCK_K < K:
        # Sums and loss cancel less about a centre, and any centre among the data will do.
        r = tl.arange(0, BLOCK_N)
        in_x = (r < B)[:, None] & (f < F)[None, :]
        x = tl.load(x_ptr + ((r * x_stride)[:, None] + f[None, :]), mask=in_x, other=0.0)  # [BLOCK_N, BLOCK_F]
        centre = tl.sum(x, axis=0) / tl.minimum(B, BLOCK_N)  # [BLOCK_F]

        # Sums along a tile wait until the loop is over, or are products, with ones.
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
            # Unsigned, a negative code is above K; the least int32 stands for rows beyond the last.
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
                e = tl.where(tl.abs(e) < float("inf"), e, 0.0)  # a code that is not finite belongs to no row
                in_w1 = (d < D)[:, None] & (h < H)[None, :]
                w1 = tl.load(w1_ptr + (first_column + d)[:, None] * H + h[None, :], mask=in_w1, other=0.0)
                hidden = tl.dot(e, w1, hidden, input_precision="tf32x3")
            hidden += tl.load(b1_ptr + g * H + h, mask=h < H, other=0.0)[None, :]
            hidden = tl.where(hidden < 0.0, 0.0, hidden)  # NaN stays
            if tl.program_id(0) == 0:
                in_hidden = (k < K)[:, None] & (h < H)[None, :]
                tl.store(hidden_ptr + (first_code + k)[:, None] * H + h[None, :], hidden, mask=in_hidden)
            in_w2 = (h < H)[:, None] & (f < F)[None, :]
            w2 = tl.load(w2_ptr + g.to(tl.int64) * H * F + (h[:, None] * F + f[None, :]), mask=in_w2, other=0.0)
            decoded = tl.dot(hidden, w2, decoded, input_precision="tf32x3")

        b2 = tl.load(b2_ptr + g * F + f, mask=f < F, other=0.0)
        means = sums / tl.maximum(rows, 1.0)[:, None]
        off = decoded + (b2 - centre)[None, :] - means  # [BLOCK_K, BLOCK_F]
        in_decoded = (k < K)[:, None] & (f < F)[None, :]
        out = (first_code + k)[:, None] * F + f[None, :]
        tl.store(decoded_ptr + out, decoded + b2[None, :], mask=in_decoded)
        tl.store(off_ptr + out, rows[:, None] * off, mask=in_decoded)
        inner = tl.where(in_decoded, rows[:, None] * (off * off - means * means), 0.0)
        part = tl.sum(tl.sum(inner, axis=1), axis=0)
        if tl.program_id(1) == 0:
            part += tl.sum(tl.sum(squares, axis=0), axis=0)
            part = tl.where(tl.max(bad, axis=0) > 0, float("nan"), part)
    tl.store(loss_ptr + place, part * factor)


@triton.jit
def _pull(
    x_ptr,
    codes_ptr,
    w1_ptr,
    w2_ptr,
    hidden_ptr,
    decoded_ptr,
    of_quantized_ptr,
    scale,
    tile,
    g,
    K,
    D,
    first_code,
    first_column,
    B,
    G,
    F,
    H,
    x_stride,
    total_dims,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """((P_k - x_b) W2^T * relu'_k) W1^T for the rows of a tile."""
    start = tl.cast(tile, tl.int64) * BLOCK_N
    r = tl.arange(0, BLOCK_N)
    inside = r < B - start
    code = tl.load(codes_ptr + start * G + g + r * G, mask=inside, other=0).to(tl.int32)
    code = first_code + tl.minimum(tl.maximum(code, 0), K - 1)  # [BLOCK_N]
    x_ptr += start * x_stride
    of_quantized_ptr += start * total_dims + first_column
    w2_ptr += g.to(tl.int64) * H * F
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        back = tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32)
        for column in range(0, F, BLOCK_F):
            f = column + tl.arange(0, BLOCK_F)
            in_x = inside[:, None] & (f < F)[None, :]
            decoded = tl.load(decoded_ptr + (code[:, None] * F + f[None, :]), mask=in_x, other=0.0)
            x = tl.load(x_ptr + ((r * x_stride)[:, None] + f[None, :]), mask=in_x, other=0.0)
            w2 = tl.load(w2_ptr + (h[:, None] * F + f[None, :]), mask=(h < H)[:, None] & (f < F)[None, :], other=0.0)
            back = tl.dot(decoded - x, tl.trans(w2), back, input_precision="tf32")
        in_back = inside[:, None] & (h < H)[None, :]
        active = tl.load(hidden_ptr + (code[:, None] * H + h[None, :]), mask=in_back, other=0.0) != 0.0
        back = tl.where(active, back * scale, 0.0)
        for column in range(0, D, BLOCK_D):
            d = column + tl.arange(0, BLOCK_D)
            in_w1 = (d < D)[:, None] & (h < H)[None, :]
            w1 = tl.load(w1_ptr + ((first_column + d)[:, None] * H + h[None, :]), mask=in_w1, other=0.0)
            grad = tl.dot(back, tl.trans(w1), input_precision="tf32")  # [BLOCK_N, BLOCK_D]
            in_grad = inside[:, None] & (d < D)[None, :]
            entries = of_quantized_ptr + ((r * total_dims)[:, None] + d[None, :])
            if first > 0:  # each thread its own entries
                grad += tl.load(entries, mask=in_grad, other=0.0)
            tl.store(entries, grad, mask=in_grad)


@triton.jit
def _of_second(
    hidden_ptr, off_ptr, of_w2_ptr, of_b2_ptr, scale, h_tile, f_tile, g, K, F, H, BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of the second layer: hidden^T dP."""
    h = h_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    f = f_tile * BLOCK_F + tl.arange(0, BLOCK_F)
    weights = tl.zeros([BLOCK_H, BLOCK_F], dtype=tl.float32)
    bias = tl.zeros([BLOCK_F], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        in_decoded = (k < K)[:, None] & (f < F)[None, :]
        of_decoded = scale * tl.load(off_ptr + k[:, None] * F + f[None, :], mask=in_decoded, other=0.0)
        in_hidden = (k < K)[:, None] & (h < H)[None, :]
        hidden = tl.load(hidden_ptr + k[:, None] * H + h[None, :], mask=in_hidden, other=0.0)
        weights = tl.dot(tl.trans(hidden), of_decoded, weights, input_precision="tf32")
        bias += tl.sum(of_decoded, axis=0)
    in_w2 = (h < H)[:, None] & (f < F)[None, :]
    tl.store(of_w2_ptr + g.to(tl.int64) * H * F + (h[:, None] * F + f[None, :]), weights, mask=in_w2)
    if h_tile == 0:
        tl.store(of_b2_ptr + g * F + f, bias, mask=f < F)


@triton.jit
def _of_first(
    codebook_ptr, w2_ptr, hidden_ptr, off_ptr, of_w1_ptr, of_b1_ptr, scale, h_tile, g, K, D, F, H,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradients of some units of the first layer: e^T (dP W2^T * relu')."""
    h = h_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    w2_ptr += g.to(tl.int64) * H * F
    for column in range(0, D, BLOCK_D):
        d = column + tl.arange(0, BLOCK_D)
        weights = tl.zeros([BLOCK_D, BLOCK_H], dtype=tl.float32)
        bias = tl.zeros([BLOCK_H], dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            of_hidden = tl.zeros([BLOCK_K, BLOCK_H], dtype=tl.float32)
            for start in range(0, F, BLOCK_F):
                f = start + tl.arange(0, BLOCK_F)
                in_decoded = (k < K)[:, None] & (f < F)[None, :]
                of_decoded = tl.load(off_ptr + k[:, None] * F + f[None, :], mask=in_decoded, other=0.0)
                in_w2 = (h < H)[:, None] & (f < F)[None, :]
                w2 = tl.load(w2_ptr + (h[:, None] * F + f[None, :]), mask=in_w2, other=0.0)
                of_hidden = tl.dot(of_decoded, tl.trans(w2), of_hidden, input_precision="tf32")
            in_hidden = (k < K)[:, None] & (h < H)[None, :]
            active = tl.load(hidden_ptr + k[:, None] * H + h[None, :], mask=in_hidden, other=0.0) != 0.0
            of_hidden = tl.where(active, scale * of_hidden, 0.0)
            in_codes = (k < K)[:, None] & (d < D)[None, :]
            e = tl.load(codebook_ptr + k[:, None] * D + d[None, :], mask=in_codes, other=0.0)
            e = tl.where(tl.abs(e) < float("inf"), e, 0.0)
            weights = tl.dot(tl.trans(e), of_hidden, weights, input_precision="tf32")
            bias += tl.sum(of_hidden, axis=0)
        in_w1 = (d < D)[:, None] & (h < H)[None, :]
        tl.store(of_w1_ptr + d[:, None] * H + h[None, :], weights, mask=in_w1)
        if column == 0:
            tl.store(of_b1_ptr + g * H + h, bias, mask=h < H)


@triton.jit(do_not_specialize=["tiles", "B", "G", "F", "x_stride", "total_dims", "factor"])
def code_decoders_bwd_kernel(
    grad_ptr,  # [] of the loss
    x_ptr,  # [B, F], row stride x_stride
    codes_ptr,  # [B, G] int64
    codebook_ptr,  # [sum K D]
    w1_ptr,  # [sum D, H]
    w2_ptr,  # [G, H, F]
    hidden_ptr,  # [sum K, H]
    decoded_ptr,  # [sum K, F]
    off_ptr,  # [sum K, F]
    table_ptr,  # [5, G] int32
    of_quantized_ptr,  # [B, sum D]
    of_w1_ptr,
    of_b1_ptr,
    of_w2_ptr,
    of_b2_ptr,
    tiles,  # tiles of rows, 0 where no row's gradient is asked for
    B,
    G,
    F,
    H,
    x_stride,
    total_dims,
    factor,
    PULL_N: tl.constexpr,
    PULL_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    g = tl.program_id(1)
    K = tl.load(table_ptr + g)
    D = tl.load(table_ptr + G + g)
    first_code = tl.load(table_ptr + 2 * G + g)
    first_column = tl.load(table_ptr + 3 * G + g)
    first_entry = tl.load(table_ptr + 4 * G + g)
    scale = tl.load(grad_ptr) * factor
    job = tl.program_id(0)
    f_tiles = tl.cdiv(F, BLOCK_F)
    seconds = f_tiles * tl.cdiv(H, PULL_H)
    if job < tiles:  # the longest jobs start first
        _pull(
            x_ptr, codes_ptr, w1_ptr, w2_ptr, hidden_ptr, decoded_ptr, of_quantized_ptr, scale, job, g, K, D,
            first_code, first_column, B, G, F, H, x_stride, total_dims, PULL_N, BLOCK_D, BLOCK_F, PULL_H,
        )  # fmt: skip
    else:
        hidden_ptr += first_code * H
        off_ptr += first_code * F
        job -= tiles
        if job < seconds:
            _of_second(
                hidden_ptr, off_ptr, of_w2_ptr, of_b2_ptr, scale, job // f_tiles, job % f_tiles, g, K, F, H,
                BLOCK_K, PULL_H, BLOCK_F,
            )  # fmt: skip
        else:
            _of_first(
                codebook_ptr + first_entry, w2_ptr, hidden_ptr, off_ptr, of_w1_ptr + first_column * H, of_b1_ptr,
                scale, job - seconds, g, K, D, F, H, BLOCK_K, BLOCK_D, BLOCK_F, BLOCK_H,
            )  # fmt: skip


class PartialLoss(torch.autograd.Function):
    """`op.partial_loss`; all tensors float32."""

    @staticmethod
    @launches
    def forward(
        ctx: Any,
        x: Tensor,
        quantized: Tensor,
        codes: Tensor,
        codebook: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        layout: CodebookLayout,
    ) -> Tensor:
        given = quantized, w1, b1, w2, b2
        x, codes, codebook = rows_of(x), codes.contiguous(), codebook.contiguous()
        w1, b1, w2, b2 = (parameter.contiguous() for parameter in (w1, b1, w2, b2))
        (B, F), (G, H) = x.shape, b1.shape
        config = DecoderConfig.of(layout, H)
        check_offsets("hidden and decoded values of all codes", layout.total_codes * max(H, F))
        check_offsets("the weights of a decoder", max(H * F, w1.numel()))
        factor = 1.0 / max(G * B * F, 1)
        f_tiles, k_tiles = triton.cdiv(F, config.block_f), triton.cdiv(layout.max_codes, config.block_k)
        options: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        hidden = torch.empty(layout.total_codes, H, **options)
        decoded, off = (torch.empty(layout.total_codes, F, **options) for _ in range(2))
        parts = torch.empty(G, k_tiles, f_tiles, **options)
        code_decoders_fwd_kernel[(f_tiles, k_tiles, G)](
            x, codes, codebook, w1, b1, w2, b2, book_table(layout, x.device), hidden, decoded, off, parts,
            B, G, F, H, x.stride(0), factor, **config.forward,
        )  # fmt: skip
        ctx.layout, ctx.config, ctx.factor = layout, config, factor
        ctx.save_for_backward(*given, x, codes, codebook, hidden, decoded, off)
        return parts.sum()

    @staticmethod
    @launches
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout, config = ctx.layout, ctx.config
        *given, x, codes, codebook, hidden, decoded, off = ctx.saved_tensors
        if needs_graph(grads):
            return gradients_of_loss(x, codes, given, layout, grads, ctx.needs_input_grad)
        w1, w2 = given[1].contiguous(), given[3].contiguous()
        (B, F), (G, H, _) = x.shape, w2.shape
        options: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        of_quantized = torch.empty(B, layout.total_dims, **options) if ctx.needs_input_grad[1] else None
        of_w1, of_w2 = torch.empty(w1.shape, **options), torch.empty(w2.shape, **options)
        of_b1, of_b2 = torch.empty(G, H, **options), torch.empty(G, F, **options)
        tiles = triton.cdiv(B, config.pull_n) if of_quantized is not None else 0
        seconds = triton.cdiv(F, config.block_f) * triton.cdiv(H, config.pull_h)
        code_decoders_bwd_kernel[(tiles + seconds + triton.cdiv(H, config.block_h), G)](
            grads[0], x, codes, codebook, w1, w2, hidden, decoded, off, book_table(layout, x.device),
            of_quantized if of_quantized is not None else of_w1, of_w1, of_b1, of_w2, of_b2,
            tiles, B, G, F, H, x.stride(0), layout.total_dims, 2.0 * ctx.factor,
            **config.backward,
        )  # fmt: skip
        return None, of_quantized, None, None, of_w1, of_b1, of_w2, of_b2, None


def specimens(capability: int) -> list[Specimen]:
    """Launches for the report: a training step of the 100K run."""
    B, F, H, G, D = ROWS, sum(FEATURES), 128, SEED.groups, SEED.total_dims
    codes, entries = SEED.total_codes, SEED.total_entries
    config = DecoderConfig.of(SEED, H)
    shape = f"{B} rows, {F} features, {G} codebooks"
    parameters = D * H + G * H * F
    inner = codes * (H + 2 * F)  # hidden, decoded, off
    return [
        Specimen.launched(
            code_decoders_fwd_kernel, shape, config.forward,
            num_bytes=4 * (B * F + entries + parameters + G * (H + F) + inner) + 8 * B * G,
            float_ops=3 * B * F + codes * (2 * H + 9 * F),
            dot_ops=2 * (B * codes * F + entries * H + codes * H * F),
        ),
        Specimen.launched(
            code_decoders_bwd_kernel, shape, config.backward,
            num_bytes=4 * (B * F + entries + 2 * parameters + inner + B * D + G * (H + F)) + 8 * B * G,
            float_ops=G * B * (F + H) + codes * (2 * F + 2 * H),
            dot_ops=2 * (B * G * F * H + B * D * H + 2 * codes * H * F + entries * H),
            passes=1,
        ),
    ]  # fmt: skip
