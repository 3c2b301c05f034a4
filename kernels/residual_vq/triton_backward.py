"""Triton kernel of `reference.backward`: all stages in one launch, residuals recomputed from the codes.

grad_x = sum over stages of J_q^T grad + 2 grad_errors_q (y_q - e_q), with J_q zero, the identity (straight-through) or
the rotation |e| / |y| (1 - 2 r r^T + 2 e^ y^^T), where r = (y^ + e^) / |y^ + e^| and ^ marks unit length. Where COSINE,
y = residual / |residual|, whose Jacobian (1 - y y^T) / |residual| follows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches, rows_of
from spinlock_fast.kernels._common.launch_helpers import codebook_offsets, next_power_of_two
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.triton_rotation import rotation_transpose
from spinlock_fast.kernels.residual_vq.reference import GRADIENTS, MIN_LENGTH, Stages

# A program holds whole rows; wider rows are computed stage by stage.
MAX_DIMS = 128
_MIN_LENGTH = tl.constexpr(MIN_LENGTH)


@triton.jit
def lengths(x):
    """[BLOCK_N] Euclidean norms of the rows, at least MIN_LENGTH."""
    return tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), _MIN_LENGTH)


@triton.jit(do_not_specialize=["N", "x_stride"])
def residual_vq_bwd_kernel(
    grad_ptr,  # [N, D]
    grad_errors_ptr,  # [Q]
    x_ptr,  # [N, D], row stride x_stride
    codebook_ptr,  # [sum K, D]
    offsets_ptr,  # [5, Q] int32
    mask_ptr,  # [N] bool; read where HAS_MASK
    codes_ptr,  # [N, Q] int64
    grad_x_ptr,  # [N, D]
    N,
    Q,
    D,
    x_stride,
    COSINE: tl.constexpr,
    GRADIENT: tl.constexpr,  # of the output, see reference.GRADIENTS
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_x = sum_q J_q^T grad + 2 grad_errors_q (y_q - e_q)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_rows = n < N - start
    valid = in_rows
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + start + n, mask=in_rows, other=0) != 0)
    in_tile = valid[:, None] & (d < D)[None, :]
    at = (start + n)[:, None] * D + d[None, :]
    residual = tl.load(x_ptr + (start + n)[:, None] * x_stride + d[None, :], mask=in_tile, other=0.0)
    # residual, grad, y, e: [BLOCK_N, BLOCK_D]
    grad = tl.load(grad_ptr + at, mask=in_tile, other=0.0)
    grad_x = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for q in range(Q):
        code = tl.load(codes_ptr + (start + n) * Q + q, mask=valid, other=0)
        first_code = tl.load(offsets_ptr + 2 * Q + q).to(tl.int64)
        chosen = first_code + tl.where(code < 0, 0, code)
        e = tl.load(codebook_ptr + chosen[:, None] * D + d[None, :], mask=in_tile, other=0.0)
        e = tl.where((code < 0)[:, None] & in_tile, float("nan"), e)
        if COSINE:
            length = lengths(residual)
            y = residual / length[:, None]
        else:
            y = residual
        if GRADIENT == 2:
            inverse_y = 1.0 / lengths(y)
            inverse_e = 1.0 / lengths(e)
            bisector = y * inverse_y[:, None] + e * inverse_e[:, None]
            bisector = bisector / lengths(bisector)[:, None]
            along_bisector = 2.0 * tl.sum(grad * bisector, axis=1)
            along_e = 2.0 * tl.sum(grad * e, axis=1) * inverse_e * inverse_y
            grad_y = rotation_transpose(grad, inverse_y / inverse_e, bisector, along_bisector, y, along_e)
        elif GRADIENT == 1:
            grad_y = grad
        else:
            grad_y = tl.zeros_like(grad)
        grad_y += 2.0 * tl.load(grad_errors_ptr + q) * (y - e)
        if COSINE:
            along = tl.where(length > _MIN_LENGTH, tl.sum(grad_y * y, axis=1), 0.0)
            grad_y = (grad_y - along[:, None] * y) / length[:, None]
        grad_x += tl.where(in_tile, grad_y, 0.0)
        if GRADIENT == 2:
            e = tl.where((tl.sum((residual != 0.0).to(tl.int32), axis=1) == 0)[:, None], 0.0, e)
        residual = tl.where(in_tile, residual - e, 0.0)
    tl.store(grad_x_ptr + at, grad_x, mask=in_rows[:, None] & (d < D)[None, :])


def row_block(block_d: int) -> int:
    """Rows per program of the kernels that do not search."""
    return 16 if block_d <= 32 else 8


@launches
def backward(grad: Tensor, grad_errors: Tensor, x: Tensor, codebook: Tensor, codes: Tensor, stages: Stages) -> Tensor:
    """`reference.backward`, for at most `MAX_DIMS` dimensions."""
    num_codes, mask, cosine, gradient = stages
    (N, D), Q = x.shape, len(num_codes)
    x = rows_of(x)
    grad_x = x.new_empty(N, D)
    if N == 0:
        return grad_x
    layout = CodebookLayout.of(num_codes, [D] * Q)
    block_d = next_power_of_two(D, 32)
    block_n = row_block(block_d)
    residual_vq_bwd_kernel[(triton.cdiv(N, block_n),)](
        grad.contiguous(), grad_errors.contiguous(), x, codebook.contiguous(), codebook_offsets(layout, x.device),
        x if mask is None else mask, codes.contiguous(), grad_x, N, Q, D, x.stride(0), COSINE=cosine,
        GRADIENT=GRADIENTS[gradient], HAS_MASK=mask is not None, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return grad_x
