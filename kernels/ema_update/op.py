"""Moving-average update in place and usage statistics: argument checks, operator, implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.guard import FLOAT, REAL, check
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.operator import operator
from spinlock_fast.kernels.ema_update import cpu, reference


@torch.no_grad()
def ema_update(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    layout: CodebookLayout,
    decay: float,
    smoothing: Literal["none", "laplace"] = "none",
    epsilon: float = 1e-5,
    *,
    usage: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Moving-average update of all codebooks, see `reference.ema_update`; changes them in place.

    Args:
        codebook: [sum K D] code vectors.
        cluster_size: [sum K] moving counts.
        code_sum: [sum K D] moving sums.
        counts: [sum K] rows of this batch, or partial sums [P, sum K].
        sums: [sum K D] latent sums of this batch, or partial sums [P, sum K D].
        layout: sizes of the group.
        decay: of the moving averages.
        smoothing: of the moving counts, "none" or "laplace".
        epsilon: of Laplace smoothing.
        usage: [sum K] int64 accumulated counts, increased by `counts`.
        backend: "auto", "triton" or "reference", see `resolve_backend`.
    """
    E, K = layout.total_entries, layout.total_codes
    parts = () if isinstance(counts, Tensor) and counts.ndim == 1 else ("P",)
    check(
        "ema_update",
        ("codebook", codebook, (E,), FLOAT),
        ("cluster_size", cluster_size, (K,), FLOAT),
        ("code_sum", code_sum, (E,), FLOAT),
        ("counts", counts, (*parts, K), REAL),
        ("sums", sums, (*parts, E), FLOAT),
        ("usage", usage, (K,), REAL),
    )
    if smoothing not in ("none", "laplace"):
        raise ValueError(f"ema_update: smoothing must be none or laplace, got {smoothing!r}")
    if not counts.is_floating_point() or counts.dtype != codebook.dtype == torch.float32:
        counts, sums = counts.float(), sums.float()  # the kernels read float32 only
    state = codebook, cluster_size, code_sum
    # The Triton kernels update float32 codes only; "auto" leaves other types to the reference.
    narrow = all(tensor.dtype == torch.float32 for tensor in (*state, counts, sums))
    backend = "reference" if backend == "auto" and not narrow else resolve_backend(backend, *state, counts, sums)
    counts = counts if counts.ndim == 2 else counts[None]
    sums = sums if sums.ndim == 2 else sums[None]
    sizes = layout.num_codes, layout.dims
    _ema_update(*state, usage, counts, sums, *sizes, decay, smoothing == "laplace", epsilon, backend)


def _fake(*_: Any) -> None:
    return None


@operator("ema_update", fake=_fake, mutates=("codebook", "cluster_size", "code_sum", "usage"))
def _ema_update(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    usage: Tensor | None,
    counts: Tensor,
    sums: Tensor,
    num_codes: Sequence[int],
    dims: Sequence[int],
    decay: float,
    laplace: bool,
    epsilon: float,
    backend: str,
) -> None:
    layout = CodebookLayout.cached(tuple(num_codes), tuple(dims))
    if backend == "triton":
        from spinlock_fast.kernels.ema_update import triton_update

        # The kernels update contiguous memory in place: strided tensors are copied there and back.
        dense = codebook.contiguous(), cluster_size.contiguous(), code_sum.contiguous()
        dense_usage = None if usage is None else usage.contiguous()
        triton_update.ema_update(*dense, dense_usage, counts, sums, layout, decay, laplace, epsilon)
        for target, value in zip((codebook, cluster_size, code_sum, usage), (*dense, dense_usage), strict=True):
            if target is not None and value is not None and value is not target:
                target.copy_(value)
        return
    smoothing: Literal["none", "laplace"] = "laplace" if laplace else "none"
    counts, sums = (parts[0] if parts.shape[0] == 1 else parts.sum(0) for parts in (counts, sums))
    if cpu.supports(codebook, cluster_size, code_sum, counts, sums, usage):
        state = codebook, cluster_size, code_sum, counts, sums, usage
        cpu.average_codes(*state, num_codes, dims, decay, smoothing, epsilon)
        return
    codes, n, s = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (codebook, cluster_size, code_sum))
    updated = reference.ema_update(codes, n, s, counts, sums, layout, decay, smoothing, epsilon)
    for target, value in zip((codebook, cluster_size, code_sum), updated, strict=True):
        target.copy_(value)
    if usage is not None:
        usage += counts.to(usage.dtype)


def code_usage(counts: Tensor, layout: CodebookLayout, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Utilization and perplexity [G] of the codebooks, from the counts [sum K] of their codes.

    Utilization is the share of codes with a count above 0. Perplexity is exp of the entropy of the counts, between 1
    and K_g; 0 where all counts are 0.
    """
    check("code_usage", ("counts", counts, (layout.total_codes,), REAL))
    counts = counts.float() if counts.dtype.itemsize < 4 else counts
    if resolve_backend(backend, counts) == "triton":
        from spinlock_fast.kernels.ema_update import triton_update

        return triton_update.code_usage(counts, layout)
    return reference.code_usage(counts, layout)
