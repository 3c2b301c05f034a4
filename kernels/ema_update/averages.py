"""The update of `VectorQuantize` by moving averages, fused in eager mode: in place, for codebooks of equal size."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.operator import is_plain_call
from spinlock_fast.kernels.ema_update import cpu


def average_codes(
    codes: Tensor | None,
    cluster_size: Tensor,
    code_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    usage: Tensor,
    decay: float,
    epsilon: float,
    *,
    unit: bool = False,
) -> bool:
    """n <- decay n + (1 - decay) counts; s <- decay s + (1 - decay) sums; e_k = s_k / n'_k, in place.

    n' are the Laplace-smoothed counts (n_k + epsilon) / (N + K epsilon) N with N = sum_k n_k, which are not stored.
    Also usage += counts.

    Args:
        codes: [H, K, D] code vectors; None updates the averages only.
        cluster_size: [H, K] moving counts.
        code_sum: [H, K, D] moving sums.
        counts: [H, K] rows of this batch.
        sums: [H, K, D] latent sums of this batch.
        usage: [H, K] int64 accumulated counts.
        decay: of the moving averages.
        epsilon: of the Laplace smoothing.
        unit: normalises codes to unit length.

    Returns:
        False, without a change, where no fused implementation applies: under torch.compile, in tracing and transforms,
        and for other types and memory layouts than float32, contiguous.
    """
    state = codes, cluster_size, code_sum, counts, sums
    if torch.compiler.is_compiling() or not is_plain_call((*state, usage)):
        return False
    if cpu.supports(*state, usage):
        H, K, D = code_sum.shape
        cpu.average_codes(
            *state, usage, [K] * H, [D] * H, decay, "division", epsilon, unit=unit, keep_without_rows=False
        )
        return True
    if _fits_triton(cluster_size, usage, *state):
        from spinlock_fast.kernels._common import triton_average_codes

        size_copy = cluster_size.clone()
        triton_average_codes.average(
            codes, cluster_size, code_sum, usage, size_copy, (counts, sums), decay, epsilon, unit=unit
        )
        return True
    return False


def _fits_triton(cluster_size: Tensor, usage: Tensor, *floats: Tensor | None) -> bool:
    """Whether the Triton kernel can update these tensors."""
    held = [tensor for tensor in floats if tensor is not None]
    return (
        all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in held)
        and usage.dtype == torch.int64
        and usage.is_contiguous()
        and all(tensor.device == cluster_size.device for tensor in (*held, usage))
        and resolve_backend("auto", *held) == "triton"
    )
