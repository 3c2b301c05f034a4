"""Triton kernels of a training step of `VectorQuantize`: search, gradient and update of G codebooks of equal size.

The formulas are those of `reference` with one stage: y = z (or z / |z| where COSINE), code = argmin_k |y - e_k|^2, the
loss is the scaled sum of |y - e|^2. A forward pass with the update takes seven launches, six where COSINE, and a
backward pass one. The nearest codes come from `vq_assign.triton_streaming`, for any number of dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._common.launch_helpers import compute_capability, next_power_of_two
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.triton_average_codes import Loss, average, new_scalar, total_loss
from spinlock_fast.kernels._common.triton_centred_codes import centred_codes
from spinlock_fast.kernels._common.triton_code_sums import SEGMENT_ROWS, Segments
from spinlock_fast.kernels._common.triton_rotation import rotation_transpose
from spinlock_fast.kernels.residual_vq.reference import GRADIENTS, MIN_LENGTH, Averages
from spinlock_fast.kernels.vq_assign.triton_streaming import SearchConfig, search

_MIN_LENGTH = tl.constexpr(MIN_LENGTH)
_ROTATION = tl.constexpr(GRADIENTS["rotation"])
_STRAIGHT_THROUGH = tl.constexpr(GRADIENTS["straight_through"])


@triton.jit(do_not_specialize=["N", "G", "K", "splits"])
def step_finish_kernel(
    z_ptr,  # [N, G * D]
    codebook_ptr,  # [G, K, D]
    best_ptr,  # [splits, G, N] float32 distance to the nearest code of each share
    code_ptr,  # [splits, G, N] int32 its index; the first share becomes the code of the row, -1 for none
    codes_ptr,  # [N, G] int64
    quantized_ptr,  # [N, G * D], the type of z
    scales_ptr,  # [N, G] 1 / |z|; written where COSINE and COUNT
    error_ptr,  # [row tiles, G] float32
    counts32_ptr,  # [G, K] int32, increased where COUNT
    N,
    G,
    K,
    D,
    splits,
    COSINE: tl.constexpr,
    ROTATION: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """code = argmin over the shares, q = e_code, error = sum |y - e|^2 over the rows of a tile, rows of each code."""
    g = tl.program_id(1)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = n < N
    at = g.to(tl.int64) * N + n
    best = tl.load(best_ptr + at, mask=in_rows, other=float("inf"))
    code = tl.load(code_ptr + at, mask=in_rows, other=-1)
    for split in range(1, splits):
        other = at + tl.cast(split, tl.int64) * G * N
        nearest = tl.load(best_ptr + other, mask=in_rows, other=float("inf"))
        index = tl.load(code_ptr + other, mask=in_rows, other=-1)
        nearer = nearest < best  # earlier shares contain the lower indices, so ties keep the lowest
        best = tl.where(nearer, nearest, best)
        code = tl.where(nearer, index, code)
    row = (n * G + g)[:, None] * D
    nonfinite = tl.zeros([BLOCK_N], dtype=tl.int32)
    squares = tl.zeros([BLOCK_N], dtype=tl.float32)
    largest = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        z = tl.load(z_ptr + row + d[None, :], mask=in_rows[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        nonfinite = tl.maximum(nonfinite, tl.max((tl.abs(z) < float("inf")).to(tl.int32) ^ 1, axis=1))
        squares += tl.sum(z * z, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(z), axis=1))
    has_code = in_rows & (code >= 0) & (nonfinite == 0)
    code = tl.where(has_code, code, -1)
    tl.store(code_ptr + at, code, mask=in_rows)
    tl.store(codes_ptr + n * G + g, code.to(tl.int64), mask=in_rows)
    if COUNT:  # integers: the same counts in any order
        tl.atomic_add(counts32_ptr + g * K + code, 1, mask=has_code, sem="relaxed")
    scale = 1.0 / tl.maximum(tl.sqrt(squares), _MIN_LENGTH) if COSINE else tl.full([BLOCK_N], 1.0, dtype=tl.float32)
    if COSINE and COUNT:
        tl.store(scales_ptr + n * G + g, scale, mask=in_rows)
    chosen = (g.to(tl.int64) * K + tl.where(has_code, code, 0))[:, None] * D
    error = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        in_tile = in_rows[:, None] & (d < D)[None, :]
        # z, e: [BLOCK_N, BLOCK_D]
        z = tl.load(z_ptr + row + d[None, :], mask=in_tile, other=0.0).to(tl.float32)
        e = tl.load(codebook_ptr + chosen + d[None, :], mask=in_tile & has_code[:, None], other=0.0)
        e = tl.where(in_tile & (has_code == 0)[:, None], float("nan"), e)
        difference = z * scale[:, None] - e
        error += tl.sum(difference * difference, axis=1)
        if ROTATION:  # R 0 = 0: the output of a zero row is 0
            e = tl.where((largest == 0.0)[:, None] & (nonfinite == 0)[:, None], 0.0, e)
        tl.store(quantized_ptr + row + d[None, :], e, mask=in_tile)
    tl.store(error_ptr + tl.program_id(0).to(tl.int64) * G + g, tl.sum(error, axis=0))


@triton.jit(do_not_specialize=["N", "G", "items"])
def step_sum_kernel(
    z_ptr,  # [N, G * D]
    scales_ptr,  # [N, G] 1 / |z|; read where COSINE
    sorted_rows_ptr,  # [G, N] int32 rows by ascending code
    item_code_ptr,  # [items] int32 code of a segment, -1 for none
    item_first_ptr,  # [items] int32 first sorted position
    item_last_ptr,  # [items] int32 one past the last
    out_ptr,  # [items, D]
    N,
    G,
    D,
    items,
    COSINE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of y over the rows of a segment, in order."""
    item = tl.program_id(0).to(tl.int64)
    if tl.load(item_code_ptr + item) >= 0:
        g = item // (items // G)  # all codebooks have equally many items
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        last = tl.load(item_last_ptr + item)
        total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        for position in range(tl.load(item_first_ptr + item), last, BLOCK_R):
            at = position + tl.arange(0, BLOCK_R)
            in_segment = at < last
            row = tl.load(sorted_rows_ptr + g * N + at, mask=in_segment, other=0).to(tl.int64) * G + g
            in_tile = in_segment[:, None] & (d < D)[None, :]
            y = tl.load(z_ptr + row[:, None] * D + d[None, :], mask=in_tile, other=0.0).to(tl.float32)
            if COSINE:
                y *= tl.load(scales_ptr + row, mask=in_segment, other=0.0)[:, None]
            total += y  # [BLOCK_R, BLOCK_D]
        tl.store(out_ptr + item * D + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit
def latent_gradient(
    u, y, e, grad_error, scale, inverse_y, inverse_e, inverse_r, along_r, along_e, GRADIENT: tl.constexpr
):
    """J^T u + grad_error (y - e) for tiles [BLOCK_N, BLOCK_D], see `reference.backward`."""
    grad = tl.zeros_like(u)
    if GRADIENT == _ROTATION:
        y_unit = y * inverse_y[:, None]
        r = (y_unit + e * inverse_e[:, None]) * inverse_r[:, None]
        grad = rotation_transpose(u, scale, r, along_r, y_unit, along_e)
    elif GRADIENT == _STRAIGHT_THROUGH:
        grad = u
    return grad + grad_error * (y - e)


@triton.jit(do_not_specialize=["N", "G", "K"])
def step_bwd_kernel(
    grad_ptr,  # [N, G * D] u, strides grad_stride, grad_step; read unless GRADIENT is none
    grad_loss_ptr,  # scalar; read where HAS_GRAD_LOSS
    z_ptr,  # [N, G * D]
    codebook_ptr,  # [G, K, D]
    code_ptr,  # [G, N] int32
    grad_z_ptr,  # [N, G * D], the type of z
    N,
    G,
    K,
    D,
    grad_stride,
    grad_step,
    error_scale,  # gradient of the loss with respect to y is error_scale (y - e)
    COSINE: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_GRAD_LOSS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_z = J^T u + grad_loss error_scale (y - e), and through y = z / |z| where COSINE: passes over D, in cache."""
    g = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = n < N
    code = tl.load(code_ptr + g * N + n, mask=in_rows, other=0)
    z_row = (n * G + g)[:, None] * D
    e_row = (g * K + tl.maximum(code, 0))[:, None] * D
    u_row = n[:, None] * grad_stride + g * D * grad_step
    missing = in_rows & (code < 0)
    grad_error = 0.0
    if HAS_GRAD_LOSS:
        grad_error = tl.load(grad_loss_ptr).to(tl.float32) * error_scale

    zeros = tl.zeros([BLOCK_N], dtype=tl.float32)
    zz, ee, rr, ur, ue, along = zeros, zeros, zeros, zeros, zeros, zeros
    if COSINE or GRADIENT == _ROTATION:
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)[None, :]
            in_tile = in_rows[:, None] & (d < D)
            # u, z, y, e: [BLOCK_N, BLOCK_D]
            z = tl.load(z_ptr + z_row + d, mask=in_tile, other=0.0).to(tl.float32)
            zz += tl.sum(z * z, axis=1)
            if GRADIENT == _ROTATION:
                e = tl.load(codebook_ptr + e_row + d, mask=in_tile, other=0.0)
                ee += tl.sum(e * e, axis=1)
    z_norm = tl.maximum(tl.sqrt(zz), _MIN_LENGTH)
    inverse_z = 1.0 / z_norm if COSINE else zeros + 1.0
    inverse_y = 1.0 / tl.maximum(tl.sqrt(zz) * inverse_z, _MIN_LENGTH)
    e_norm = tl.maximum(tl.sqrt(ee), _MIN_LENGTH)
    inverse_e = 1.0 / e_norm
    if GRADIENT == _ROTATION:
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)[None, :]
            in_tile = in_rows[:, None] & (d < D)
            u = tl.load(grad_ptr + u_row + d * grad_step, mask=in_tile, other=0.0).to(tl.float32)
            y = tl.load(z_ptr + z_row + d, mask=in_tile, other=0.0).to(tl.float32) * inverse_z[:, None]
            e = tl.load(codebook_ptr + e_row + d, mask=in_tile, other=0.0)
            r = y * inverse_y[:, None] + e * inverse_e[:, None]
            rr += tl.sum(r * r, axis=1)
            ur += tl.sum(u * r, axis=1)
            ue += tl.sum(u * e, axis=1)
    inverse_r = 1.0 / tl.maximum(tl.sqrt(rr), _MIN_LENGTH)
    scale, along_r, along_e = e_norm * inverse_y, 2.0 * ur * inverse_r, 2.0 * ue * inverse_e
    if COSINE:
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)[None, :]
            in_tile = in_rows[:, None] & (d < D)
            y = tl.load(z_ptr + z_row + d, mask=in_tile, other=0.0).to(tl.float32) * inverse_z[:, None]
            e = tl.load(codebook_ptr + e_row + d, mask=in_tile, other=0.0)
            u = y
            if GRADIENT != 0:
                u = tl.load(grad_ptr + u_row + d * grad_step, mask=in_tile, other=0.0).to(tl.float32)
            grad = latent_gradient(
                u, y, e, grad_error, scale, inverse_y, inverse_e, inverse_r, along_r, along_e, GRADIENT
            )
            along += tl.sum(tl.where(in_tile, grad * y, 0.0), axis=1)
        along = tl.where(z_norm > _MIN_LENGTH, along, 0.0)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        in_tile = in_rows[:, None] & (d < D)
        y = tl.load(z_ptr + z_row + d, mask=in_tile, other=0.0).to(tl.float32) * inverse_z[:, None]
        e = tl.load(codebook_ptr + e_row + d, mask=in_tile, other=0.0)
        u = y
        if GRADIENT != 0:
            u = tl.load(grad_ptr + u_row + d * grad_step, mask=in_tile, other=0.0).to(tl.float32)
        grad = latent_gradient(u, y, e, grad_error, scale, inverse_y, inverse_e, inverse_r, along_r, along_e, GRADIENT)
        if COSINE:
            grad = (grad - along[:, None] * y) * inverse_z[:, None]
        grad = tl.where(missing[:, None], float("nan"), grad)
        tl.store(grad_z_ptr + z_row + d, grad, mask=in_tile)


class Forward(NamedTuple):
    """Results of a forward pass and what its backward pass reads."""

    quantized: Tensor  # [N, G * D], the type of z
    codes: Tensor  # [N, G] int64
    loss: Tensor  # scalar float32
    code: Tensor  # [G, N] int32
    codebook: Tensor | None  # [G, K, D] the codes before the update


@launches
def forward(
    z: Tensor,
    codebook: Tensor,
    *,
    cosine: bool,
    gradient: str,
    weight: float,
    keep: bool,
    averages: Averages | None = None,
    decay: float = 0.0,
    epsilon: float = 0.0,
    counts: Tensor | None = None,
    sums: Tensor | None = None,
) -> Forward:
    """Nearest codes of z, the loss, and the update.

    Args:
        z: [N, G * D] contiguous, float32, float16 or bfloat16; not empty.
        codebook: [G, K, D] contiguous float32.
        cosine: normalises z and selects the code with the largest dot product.
        gradient: a key of GRADIENTS.
        weight: the loss is `weight` times the mean squared error.
        keep: copies the codes for the backward pass.
        averages: updated with the batch, and then the codes; None for no update.
        decay: of the moving averages.
        epsilon: of their Laplace smoothing.
        counts: [G, K] contiguous float32, set to the rows of each code in the batch, unless None.
        sums: [G, K, D] contiguous float32, set with `counts` to the sums of y of these rows.
    """
    (G, K, D), N, device = codebook.shape, z.shape[0], z.device
    layout = CodebookLayout.cached((K,) * G, (D,) * G)
    copy = torch.empty_like(codebook) if keep else None
    sizes = None if averages is None else averages.cluster_size
    size_copy = None if sizes is None else torch.empty_like(sizes)
    prepared = centred_codes(
        codebook, layout, not cosine, SearchConfig.of(compute_capability(device)).block_k, cluster_size=sizes,
        codebook_copy=copy, size_copy=size_copy,
    )  # fmt: skip
    best, code = search(z, prepared, layout, centred=not cosine, cosine=cosine)
    codes = torch.empty(N, G, dtype=torch.int64, device=device)
    quantized = torch.empty_like(z)
    block_d = min(64, next_power_of_two(D, 16))
    block_n = 1024 // block_d
    tiles = triton.cdiv(N, block_n)
    errors = torch.empty(tiles, G, dtype=torch.float32, device=device)
    counted = averages is not None or counts is not None
    scales = torch.empty(N, G, dtype=torch.float32, device=device) if cosine and counted else errors
    step_finish_kernel[(tiles, G)](
        z, codebook, best, code, codes, quantized, scales, errors, prepared.counts, N, G, K, D, code.shape[0],
        COSINE=cosine, ROTATION=gradient == "rotation", COUNT=counted, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    loss = Loss(errors, new_scalar(device), weight / z.numel())
    if counted:
        segments = Segments.of(code[0].t(), prepared.counts, layout)
        parts = segments.new_sums()
        step_sum_kernel[(segments.num_items, triton.cdiv(D, block_d))](
            z, scales, *segments.tables, parts, N, G, D, segments.num_items, COSINE=cosine, BLOCK_R=SEGMENT_ROWS,
            BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
        if counts is not None and sums is not None:
            segments.add(parts, out=(counts, sums))
    if averages is None or size_copy is None:
        total_loss(loss)
    else:
        average(codebook, *averages, size_copy, (segments, parts), decay, epsilon, unit=cosine, loss=loss)
    return Forward(quantized, codes, loss.value, code[0], copy)


@launches
def backward(
    grad: Tensor | None,
    grad_loss: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    code: Tensor,
    *,
    cosine: bool,
    gradient: str,
    weight: float,
) -> Tensor:
    """Gradient of z [N, G * D] from that of `quantized` [N, G * D], of any strides, and of the loss; see `forward`."""
    (G, K, D), N = codebook.shape, z.shape[0]
    grad_z = torch.empty_like(z)
    number = GRADIENTS[gradient] if grad is not None else GRADIENTS["none"]
    u = z if grad is None else grad
    block_d = min(64, next_power_of_two(D, 16))
    block_n = 1024 // block_d
    step_bwd_kernel[(triton.cdiv(N, block_n), G)](
        u, u if grad_loss is None else grad_loss, z, codebook, code, grad_z, N, G, K, D, u.stride(0), u.stride(1),
        2.0 * weight / z.numel(), COSINE=cosine, GRADIENT=number, HAS_GRAD_LOSS=grad_loss is not None, BLOCK_N=block_n,
        BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return grad_z
