"""Triton kernel of the update of equally large codebooks by moving averages, in place, in one launch.

n <- decay n + (1 - decay) counts; s <- decay s + (1 - decay) sums; e_k = s_k / n'_k with the Laplace-smoothed counts
n'_k = (n_k + epsilon) / (N + K epsilon) N, N = sum_k n_k, which are not stored. The formula is that of
`ema_update.averages.average_codes`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._common.launch_helpers import next_power_of_two
from spinlock_fast.kernels._common.triton_code_sums import Segments, add_segments

MIN_LENGTH = tl.constexpr(1e-6)  # lengths of vectors are clamped to at least this, as in `residual_vq.reference`


@triton.jit
def add_errors(error_ptr, errors, BLOCK: tl.constexpr):
    """Sum of all squared errors, in a fixed order."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, errors, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(error_ptr + i, mask=i < errors, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["errors"])
def loss_kernel(error_ptr, loss_ptr, errors, loss_scale, BLOCK: tl.constexpr):
    """loss = loss_scale times the sum of the squared errors."""
    tl.store(loss_ptr, add_errors(error_ptr, errors, BLOCK) * loss_scale)


@triton.jit(do_not_specialize=["K", "length", "errors"])
def average_codes_kernel(
    codebook_ptr,  # [G, K, D], changed where SET_CODES
    cluster_size_ptr,  # [G, K], changed
    code_sum_ptr,  # [G, K, D], changed
    usage_ptr,  # [G, K] int64, changed
    size_copy_ptr,  # [G, K] copy of the moving counts
    batch_counts_ptr,  # [G, K], int32 or float32
    sums_ptr,  # [G, K, D]; [items, D] sums of segments where SEGMENTS
    first_item_ptr,  # [G, K] int32; read where SEGMENTS
    error_ptr,  # [errors]; read where WITH_LOSS
    loss_ptr,  # scalar; written where WITH_LOSS
    K,
    D,
    length,  # rows of a segment
    errors,
    loss_scale,
    decay,
    one_minus_decay,  # computed in float64
    epsilon,
    SEGMENTS: tl.constexpr,
    SET_CODES: tl.constexpr,
    UNIT: tl.constexpr,
    WITH_LOSS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """n <- decay n + (1 - decay) counts; s <- decay s + (1 - decay) sums; e = s / n', e / |e| where UNIT; the loss."""
    g = tl.program_id(1).to(tl.int64)
    cluster_size_ptr += g * K
    size_copy_ptr += g * K
    batch_counts_ptr += g * K
    if WITH_LOSS:  # noqa: SIM102 evaluated by the compiler, unlike the next condition
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(loss_ptr, add_errors(error_ptr, errors, 1024) * loss_scale)
    # Other programs change the moving counts of their codes, so the total is that of the copy.
    total = tl.zeros([1024], dtype=tl.float32)
    for first in range(0, K, 1024):
        j = first + tl.arange(0, 1024)
        old = tl.load(size_copy_ptr + j, mask=j < K, other=0.0)
        total += decay * old + one_minus_decay * tl.load(batch_counts_ptr + j, mask=j < K, other=0).to(tl.float32)
    total_size = tl.sum(total, axis=0)

    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_codes = k < K
    batch_counts = tl.load(batch_counts_ptr + k, mask=in_codes, other=0)  # [BLOCK_K]
    n = decay * tl.load(size_copy_ptr + k, mask=in_codes, other=0.0) + one_minus_decay * batch_counts.to(tl.float32)
    tl.store(cluster_size_ptr + k, n, mask=in_codes)
    used = tl.load(usage_ptr + g * K + k, mask=in_codes, other=0)
    tl.store(usage_ptr + g * K + k, used + batch_counts.to(tl.int64), mask=in_codes)
    smoothed = (n + epsilon) / (total_size + K * epsilon) * total_size
    divisor = tl.where(in_codes, smoothed, 1.0)
    if SEGMENTS:
        first_item = tl.load(first_item_ptr + g * K + k, mask=in_codes, other=0)
        items = (batch_counts + length - 1) // length
    squares = tl.zeros([BLOCK_K], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        in_tile = in_codes[:, None] & (d < D)[None, :]
        entry = (g * K + k)[:, None] * D + d[None, :]  # [BLOCK_K, BLOCK_D]
        if SEGMENTS:
            batch_sum = add_segments(sums_ptr, first_item, items, d, in_tile, D, BLOCK_K, BLOCK_D)
        else:
            batch_sum = tl.load(sums_ptr + entry, mask=in_tile, other=0.0)
        s = decay * tl.load(code_sum_ptr + entry, mask=in_tile, other=0.0) + one_minus_decay * batch_sum
        tl.store(code_sum_ptr + entry, s, mask=in_tile)
        if SET_CODES:
            e = s / divisor[:, None]
            if UNIT:
                squares += tl.sum(tl.where(in_tile, e * e, 0.0), axis=1)
            else:
                tl.store(codebook_ptr + entry, e, mask=in_tile)
    if SET_CODES and UNIT:
        norm = tl.maximum(tl.sqrt(squares), MIN_LENGTH)
        tl.debug_barrier()  # the sums that other threads of the program wrote
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            in_tile = in_codes[:, None] & (d < D)[None, :]
            entry = (g * K + k)[:, None] * D + d[None, :]
            s = tl.load(code_sum_ptr + entry, mask=in_tile, other=0.0)
            tl.store(codebook_ptr + entry, s / divisor[:, None] / norm[:, None], mask=in_tile)


class Loss(NamedTuple):
    """The loss of a step: `scale` times the sum of `errors`."""

    errors: Tensor  # squared errors of tiles of rows, any shape
    value: Tensor  # scalar, written
    scale: float


@launches
def average(
    codes: Tensor | None,
    cluster_size: Tensor,
    code_sum: Tensor,
    usage: Tensor,
    size_copy: Tensor,
    batch: tuple[Tensor, Tensor] | tuple[Segments, Tensor],
    decay: float,
    epsilon: float,
    *,
    unit: bool,
    loss: Loss | None = None,
) -> None:
    """`ema_update.averages.average_codes` for contiguous tensors on a GPU, and the loss.

    Args:
        codes: [G, K, D], or None: update the averages only.
        cluster_size: [G, K].
        code_sum: [G, K, D].
        usage: [G, K] int64.
        size_copy: [G, K] copy of `cluster_size`.
        batch: counts [G, K] and sums [G, K, D] of the batch, or its segments and their sums [items, D].
        decay: of the moving averages.
        epsilon: of the Laplace smoothing.
        unit: normalises codes to unit length.
        loss: computed in the same launch.
    """
    G, K, D = code_sum.shape
    first, sums = batch
    segments = first if isinstance(first, Segments) else None
    counts: Any = first if segments is None else segments.counts
    block_d = min(32, next_power_of_two(D, 16))
    average_codes_kernel[(triton.cdiv(K, 16), G)](
        code_sum if codes is None else codes, cluster_size, code_sum, usage, size_copy, counts, sums,
        usage if segments is None else segments.first_item, sums if loss is None else loss.errors,
        sums if loss is None else loss.value, K, D, 1 if segments is None else segments.length,
        0 if loss is None else loss.errors.numel(), 0.0 if loss is None else loss.scale, decay, 1.0 - decay, epsilon,
        SEGMENTS=segments is not None, SET_CODES=codes is not None, UNIT=unit, WITH_LOSS=loss is not None, BLOCK_K=16,
        BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def total_loss(loss: Loss) -> Tensor:
    """The loss alone, in one launch."""
    loss_kernel[(1,)](loss.errors, loss.value, loss.errors.numel(), loss.scale, BLOCK=1024, num_warps=4)
    return loss.value


def new_scalar(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=device)
