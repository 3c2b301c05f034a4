"""Triton kernel of `reference.backward`.

grad_z = J^T grad_quantized + 2 grad_error (z - q), with J the identity (straight-through) or the scaled rotation
J = |q| / |z| (1 - 2 r r^T + 2 q^ z^^T), where r = (z^ + q^) / |z^ + q^| and ^ marks unit length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches, rows_of
from spinlock_fast.kernels._common.launch_helpers import codebook_offsets, next_power_of_two
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.triton_rotation import rotation_transpose
from spinlock_fast.kernels.vq_assign.reference import PART_ROWS


@triton.jit(do_not_specialize=["N", "G", "total_dims", "z_stride", "grad_stride", "rows_per_part"])
def vq_assign_bwd_kernel(
    z_ptr,  # [N, sum D], row stride z_stride
    quantized_ptr,  # [N, sum D] float32
    codes_ptr,  # [N, G] int64
    grad_quantized_ptr,  # [N, sum D], row stride grad_stride
    grad_error_ptr,  # [parts, G] float32
    offsets_ptr,  # [5, G] int32
    grad_z_ptr,  # [N, sum D], the type of z
    N,
    G,
    total_dims,
    z_stride,
    grad_stride,
    rows_per_part,  # a multiple of BLOCK_N where there are several parts
    ROTATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_z = J^T grad_quantized + 2 grad_error (z - q)."""
    g = tl.program_id(1)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    D = tl.load(offsets_ptr + G + g)
    first_column = tl.load(offsets_ptr + 3 * G + g)
    part = tl.program_id(0).to(tl.int64) * BLOCK_N // rows_per_part
    grad_error = tl.load(grad_error_ptr + part * G + g)
    in_rows = n < N
    valid = tl.load(codes_ptr + n * G + g, mask=in_rows, other=-1) >= 0  # [BLOCK_N]

    # Two passes over D: first |z| and |q|, then u.r and u.q, where u = grad_quantized.
    if ROTATE:
        zz = tl.zeros([BLOCK_N], dtype=tl.float32)
        qq = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            has_code = (in_rows & valid)[:, None] & (d < D)[None, :]
            column = first_column + d[None, :]
            z = tl.load(z_ptr + n[:, None] * z_stride + column, mask=has_code, other=0.0).to(tl.float32)
            # z, q: [BLOCK_N, BLOCK_D]
            q = tl.load(quantized_ptr + n[:, None] * total_dims + column, mask=has_code, other=0.0)
            zz += tl.sum(z * z, axis=1)
            qq += tl.sum(q * q, axis=1)
        tiny = 1.1754943508222875e-38
        z_norm = tl.maximum(tl.sqrt(zz), tiny)
        q_norm = tl.maximum(tl.sqrt(qq), tiny)
        ratio = q_norm / z_norm
        nonzero = z_norm > tiny
        rr = tl.zeros([BLOCK_N], dtype=tl.float32)
        ur = tl.zeros([BLOCK_N], dtype=tl.float32)
        uq = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            has_code = (in_rows & valid)[:, None] & (d < D)[None, :]
            column = first_column + d[None, :]
            z = tl.load(z_ptr + n[:, None] * z_stride + column, mask=has_code, other=0.0).to(tl.float32)
            # z, q: [BLOCK_N, BLOCK_D]
            q = tl.load(quantized_ptr + n[:, None] * total_dims + column, mask=has_code, other=0.0)
            u = tl.load(grad_quantized_ptr + n[:, None] * grad_stride + column, mask=has_code, other=0.0).to(tl.float32)
            r = z / z_norm[:, None] + q / q_norm[:, None]
            rr += tl.sum(r * r, axis=1)
            ur += tl.sum(u * r, axis=1)
            uq += tl.sum(u * q, axis=1)
        # r is not normalised here; where z and q are opposite it is rounding error, see reference.OPPOSITE.
        along_r = 2.0 * tl.where(rr > 1e-12, ur / tl.maximum(rr, tiny), 0.0)
        along_q = 2.0 * (uq / q_norm)

    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_tile = in_rows[:, None] & (d < D)[None, :]
        has_code = in_tile & valid[:, None]
        column = first_column + d[None, :]
        # u, z, q: [BLOCK_N, BLOCK_D]
        u = tl.load(grad_quantized_ptr + n[:, None] * grad_stride + column, mask=in_tile, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + n[:, None] * z_stride + column, mask=has_code, other=0.0).to(tl.float32)
        q = tl.load(quantized_ptr + n[:, None] * total_dims + column, mask=has_code, other=0.0)
        grad = u
        if ROTATE:
            z_unit = z / z_norm[:, None]
            r = z_unit + q / q_norm[:, None]
            rotated = rotation_transpose(u, ratio, r, along_r, z_unit, along_q)
            grad = tl.where(nonzero[:, None] & valid[:, None], rotated, u)
        grad += 2.0 * grad_error * (z - q)
        tl.store(grad_z_ptr + n[:, None] * total_dims + column, grad, mask=in_tile)


@launches
def backward(
    grad_quantized: Tensor,
    grad_error: Tensor,
    z: Tensor,
    quantized: Tensor,
    codes: Tensor,
    layout: CodebookLayout,
    rotation: bool,
) -> Tensor:
    """`reference.backward`; `grad_error` has as many parts as the error."""
    N = z.shape[0]
    z, grad_quantized = rows_of(z), rows_of(grad_quantized)
    grad_z = torch.empty(N, layout.total_dims, dtype=z.dtype, device=z.device)
    if N:
        block_d = min(64, next_power_of_two(layout.max_dims, 16))
        block_n = 1024 // block_d
        parts = grad_error.shape[0]
        tiles = triton.cdiv(triton.cdiv(N, PART_ROWS), parts)
        vq_assign_bwd_kernel[(triton.cdiv(N, block_n), layout.groups)](
            z, quantized, codes, grad_quantized, grad_error.contiguous(), codebook_offsets(layout, z.device), grad_z, N,
            layout.groups, layout.total_dims, z.stride(0), grad_quantized.stride(0),
            tiles * PART_ROWS if parts > 1 else max(N, block_n), ROTATE=rotation, BLOCK_N=block_n, BLOCK_D=block_d,
            num_warps=4,
        )  # fmt: skip
    return grad_z
