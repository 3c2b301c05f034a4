"""Triton kernel of the partial decoders in code space, backward: one launch.

It computes what depends on rows (the gradient of every row's code) and what depends on codes (the gradients of the
decoders).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._common.launch_helpers import codebook_offsets
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.code_decoders.reference import Decoders
from spinlock_fast.kernels.code_decoders.triton_forward import DecoderConfig, mean_factor


@triton.jit
def _rows_gradient(
    x_ptr,
    codes_ptr,
    w1_ptr,
    w2_ptr,
    hidden_ptr,
    decoded_ptr,
    grad_quantized_ptr,
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
    """Gradient of the quantized rows of a tile: ((P_k - x_b) W2^T * relu'_k) W1^T."""
    start = tl.cast(tile, tl.int64) * BLOCK_N
    r = tl.arange(0, BLOCK_N)
    inside = r < B - start
    code = tl.load(codes_ptr + start * G + g + r * G, mask=inside, other=0).to(tl.int32)
    code = first_code + tl.minimum(tl.maximum(code, 0), K - 1)  # [BLOCK_N]
    x_ptr += start * x_stride
    grad_quantized_ptr += start * total_dims + first_column
    w2_ptr += g.to(tl.int64) * H * F
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        grad_hidden = tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32)
        for column in range(0, F, BLOCK_F):
            f = column + tl.arange(0, BLOCK_F)
            in_x = inside[:, None] & (f < F)[None, :]
            decoded = tl.load(decoded_ptr + (code[:, None] * F + f[None, :]), mask=in_x, other=0.0)
            x = tl.load(x_ptr + ((r * x_stride)[:, None] + f[None, :]), mask=in_x, other=0.0)
            w2 = tl.load(w2_ptr + (h[:, None] * F + f[None, :]), mask=(h < H)[:, None] & (f < F)[None, :], other=0.0)
            grad_hidden = tl.dot(decoded - x, tl.trans(w2), grad_hidden, input_precision="tf32")
        in_hidden = inside[:, None] & (h < H)[None, :]
        active = tl.load(hidden_ptr + (code[:, None] * H + h[None, :]), mask=in_hidden, other=0.0) != 0.0
        grad_hidden = tl.where(active, grad_hidden * scale, 0.0)
        for column in range(0, D, BLOCK_D):
            d = column + tl.arange(0, BLOCK_D)
            in_w1 = (d < D)[:, None] & (h < H)[None, :]
            w1 = tl.load(w1_ptr + ((first_column + d)[:, None] * H + h[None, :]), mask=in_w1, other=0.0)
            grad = tl.dot(grad_hidden, tl.trans(w1), input_precision="tf32")  # [BLOCK_N, BLOCK_D]
            in_grad = inside[:, None] & (d < D)[None, :]
            entries = grad_quantized_ptr + ((r * total_dims)[:, None] + d[None, :])
            if first > 0:  # every thread reads the entries it wrote
                grad += tl.load(entries, mask=in_grad, other=0.0)
            tl.store(entries, grad, mask=in_grad)


@triton.jit
def _second_layer_gradient(
    hidden_ptr, residual_ptr, grad_w2_ptr, grad_b2_ptr, scale, h_tile, f_tile, g, K, F, H, BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of the second layer: dW2 = hidden^T dP, db2 = sum_k dP_k."""
    h = h_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    f = f_tile * BLOCK_F + tl.arange(0, BLOCK_F)
    weights = tl.zeros([BLOCK_H, BLOCK_F], dtype=tl.float32)
    bias = tl.zeros([BLOCK_F], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        in_decoded = (k < K)[:, None] & (f < F)[None, :]
        grad_decoded = scale * tl.load(residual_ptr + k[:, None] * F + f[None, :], mask=in_decoded, other=0.0)
        in_hidden = (k < K)[:, None] & (h < H)[None, :]
        hidden = tl.load(hidden_ptr + k[:, None] * H + h[None, :], mask=in_hidden, other=0.0)
        weights = tl.dot(tl.trans(hidden), grad_decoded, weights, input_precision="tf32")
        bias += tl.sum(grad_decoded, axis=0)
    in_w2 = (h < H)[:, None] & (f < F)[None, :]
    tl.store(grad_w2_ptr + g.to(tl.int64) * H * F + (h[:, None] * F + f[None, :]), weights, mask=in_w2)
    if h_tile == 0:
        tl.store(grad_b2_ptr + g * F + f, bias, mask=f < F)


@triton.jit
def _first_layer_gradient(
    codebook_ptr, w2_ptr, hidden_ptr, residual_ptr, grad_w1_ptr, grad_b1_ptr, scale, h_tile, g, K, D, F, H,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_H units of the first layer: dh = dP W2^T * relu', dW1 = e^T dh, db1 = sum_k dh_k."""
    h = h_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    w2_ptr += g.to(tl.int64) * H * F
    for column in range(0, D, BLOCK_D):
        d = column + tl.arange(0, BLOCK_D)
        weights = tl.zeros([BLOCK_D, BLOCK_H], dtype=tl.float32)
        bias = tl.zeros([BLOCK_H], dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            grad_hidden = tl.zeros([BLOCK_K, BLOCK_H], dtype=tl.float32)
            for start in range(0, F, BLOCK_F):
                f = start + tl.arange(0, BLOCK_F)
                in_decoded = (k < K)[:, None] & (f < F)[None, :]
                grad_decoded = tl.load(residual_ptr + k[:, None] * F + f[None, :], mask=in_decoded, other=0.0)
                in_w2 = (h < H)[:, None] & (f < F)[None, :]
                w2 = tl.load(w2_ptr + (h[:, None] * F + f[None, :]), mask=in_w2, other=0.0)
                grad_hidden = tl.dot(grad_decoded, tl.trans(w2), grad_hidden, input_precision="tf32")
            in_hidden = (k < K)[:, None] & (h < H)[None, :]
            active = tl.load(hidden_ptr + k[:, None] * H + h[None, :], mask=in_hidden, other=0.0) != 0.0
            grad_hidden = tl.where(active, scale * grad_hidden, 0.0)
            in_codes = (k < K)[:, None] & (d < D)[None, :]
            e = tl.load(codebook_ptr + k[:, None] * D + d[None, :], mask=in_codes, other=0.0)
            e = tl.where(tl.abs(e) < float("inf"), e, 0.0)
            weights = tl.dot(tl.trans(e), grad_hidden, weights, input_precision="tf32")
            bias += tl.sum(grad_hidden, axis=0)
        in_w1 = (d < D)[:, None] & (h < H)[None, :]
        tl.store(grad_w1_ptr + d[:, None] * H + h[None, :], weights, mask=in_w1)
        if column == 0:
            tl.store(grad_b1_ptr + g * H + h, bias, mask=h < H)


@triton.jit(do_not_specialize=["row_tiles", "B", "G", "F", "x_stride", "total_dims", "factor"])
def code_decoders_bwd_kernel(
    grad_ptr,  # [] of the loss
    x_ptr,  # [B, F], row stride x_stride
    codes_ptr,  # [B, G] int64
    codebook_ptr,  # [sum K D]
    w1_ptr,  # [sum D, H]
    w2_ptr,  # [G, H, F]
    hidden_ptr,  # [sum K, H]
    decoded_ptr,  # [sum K, F]
    residual_ptr,  # [sum K, F]
    offsets_ptr,  # [5, G] int32
    grad_quantized_ptr,  # [B, sum D]
    grad_w1_ptr,  # [sum D, H]
    grad_b1_ptr,  # [G, H]
    grad_w2_ptr,  # [G, H, F]
    grad_b2_ptr,  # [G, F]
    row_tiles,  # 0 if the gradient of quantized is not needed
    B,
    G,
    F,
    H,
    x_stride,
    total_dims,
    factor,
    ROWS_N: tl.constexpr,
    ROWS_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """All gradients of one codebook, where dP_k = 2 n_k (P_k - m_k) / (G B F).

    Jobs along the first grid axis: tiles of rows (quantized), tiles of the second layer, tiles of the first layer.
    """
    g = tl.program_id(1)
    K = tl.load(offsets_ptr + g)
    D = tl.load(offsets_ptr + G + g)
    first_code = tl.load(offsets_ptr + 2 * G + g)
    first_column = tl.load(offsets_ptr + 3 * G + g)
    first_entry = tl.load(offsets_ptr + 4 * G + g)
    scale = tl.load(grad_ptr) * factor
    job = tl.program_id(0)
    f_tiles = tl.cdiv(F, BLOCK_F)
    second_tiles = f_tiles * tl.cdiv(H, ROWS_H)
    if job < row_tiles:  # the longest jobs first
        _rows_gradient(
            x_ptr, codes_ptr, w1_ptr, w2_ptr, hidden_ptr, decoded_ptr, grad_quantized_ptr, scale, job, g, K, D,
            first_code, first_column, B, G, F, H, x_stride, total_dims, ROWS_N, BLOCK_D, BLOCK_F, ROWS_H,
        )  # fmt: skip
    else:
        hidden_ptr += first_code * H
        residual_ptr += first_code * F
        job -= row_tiles
        if job < second_tiles:
            _second_layer_gradient(
                hidden_ptr, residual_ptr, grad_w2_ptr, grad_b2_ptr, scale, job // f_tiles, job % f_tiles, g, K, F, H,
                BLOCK_K, ROWS_H, BLOCK_F,
            )  # fmt: skip
        else:
            _first_layer_gradient(
                codebook_ptr + first_entry, w2_ptr, hidden_ptr, residual_ptr, grad_w1_ptr + first_column * H,
                grad_b1_ptr, scale, job - second_tiles, g, K, D, F, H, BLOCK_K, BLOCK_D, BLOCK_F, BLOCK_H,
            )  # fmt: skip


@launches
def backward(
    grad: Tensor, saved: Sequence[Tensor], decoders: Decoders, layout: CodebookLayout, needs_quantized: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of quantized, w1, b1, w2, b2."""
    x, codes, codebook, hidden, decoded, residual = saved
    w1, w2 = decoders.w1.contiguous(), decoders.w2.contiguous()
    (B, F), (G, H, _) = x.shape, w2.shape
    config = DecoderConfig.of(layout, H)
    options: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    grad_quantized = torch.empty(B, layout.total_dims, **options) if needs_quantized else None
    grad_w1, grad_w2 = torch.empty(w1.shape, **options), torch.empty(w2.shape, **options)
    grad_b1, grad_b2 = torch.empty(G, H, **options), torch.empty(G, F, **options)
    row_tiles = triton.cdiv(B, config.rows_n) if grad_quantized is not None else 0
    second_tiles = triton.cdiv(F, config.block_f) * triton.cdiv(H, config.rows_h)
    code_decoders_bwd_kernel[(row_tiles + second_tiles + triton.cdiv(H, config.block_h), G)](
        grad, x, codes, codebook, w1, w2, hidden, decoded, residual, codebook_offsets(layout, x.device),
        grad_quantized if grad_quantized is not None else grad_w1, grad_w1, grad_b1, grad_w2, grad_b2,
        row_tiles, B, G, F, H, x.stride(0), layout.total_dims, 2.0 * mean_factor(G, B, F), **config.backward,
    )  # fmt: skip
    return grad_quantized, grad_w1, grad_b1, grad_w2, grad_b2
