"""What callers use: the update in place, and usage figures. The operator of `torch.library`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spinlock_fast.kernels._common.guard import FLOAT, REAL, check
from spinlock_fast.kernels.backend import resolve_backend
from spinlock_fast.kernels.ema_update import reference
from spinlock_fast.kernels.layout import CodebookLayout


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
    """`reference.ema_update`, written into codebook, cluster_size and code_sum.

    Args:
        counts: [sum K] rows of this batch, or parts of them [P, sum K].
        sums: [sum K D] latent sums of this batch, or parts of them [P, sum K D].
        usage: [sum K] int64 counts of a window; grows by `counts`.
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
        counts, sums = counts.float(), sums.float()  # the kernels read float32 alone
    torch.ops.spinlock_fast.ema_update(
        codebook,
        cluster_size,
        code_sum,
        usage,
        counts if counts.ndim == 2 else counts[None],
        sums if sums.ndim == 2 else sums[None],
        layout.num_codes,
        layout.dims,
        decay,
        smoothing == "laplace",
        epsilon,
        _backend(backend, codebook, cluster_size, code_sum, counts, sums),
    )


def _backend(name: str, *tensors: Tensor) -> str:
    # The kernels move float32 codes alone.
    narrow = all(tensor.dtype == torch.float32 for tensor in tensors)
    return "reference" if name == "auto" and not narrow else resolve_backend(name, *tensors)


torch.library.define(
    "spinlock_fast::ema_update",
    "(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) code_sum, Tensor(d!)? usage, Tensor counts, Tensor sums,"
    " int[] num_codes, int[] dims, float decay, bool laplace, float epsilon, str backend) -> ()",
)


@torch.library.impl("spinlock_fast::ema_update", "default")
def _ema_update(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    usage: Tensor | None,
    counts: Tensor,
    sums: Tensor,
    num_codes: list[int],
    dims: list[int],
    decay: float,
    laplace: bool,
    epsilon: float,
    backend: str,
) -> None:
    layout = CodebookLayout.cached(tuple(num_codes), tuple(dims))
    if backend == "triton":
        from spinlock_fast.kernels.ema_update import triton

        # The kernels write where they read: strided tensors are copied there and back.
        state = [codebook, cluster_size, code_sum, *([] if usage is None else [usage])]
        dense = [tensor.contiguous() for tensor in state]
        used = None if usage is None else dense[3]
        share = reference.IDLE_SHARE
        triton.ema_update(dense[0], dense[1], dense[2], used, counts, sums, layout, decay, laplace, epsilon, share)
        for target, value in zip(state, dense, strict=True):
            if value is not target:
                target.copy_(value)
        return
    smoothing: Literal["none", "laplace"] = "laplace" if laplace else "none"
    counts, sums = counts.sum(0), sums.sum(0)
    codes, n, s = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (codebook, cluster_size, code_sum))
    new = reference.ema_update(codes, n, s, counts, sums, layout, decay, smoothing, epsilon)
    for target, value in zip((codebook, cluster_size, code_sum), new, strict=True):
        target.copy_(value)
    if usage is not None:
        usage += counts.to(usage.dtype)


def _fake_ema_update(*arguments: object) -> None:
    return None


torch.library.register_fake("spinlock_fast::ema_update", _fake_ema_update)


def code_usage(counts: Tensor, layout: CodebookLayout, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Utilization and perplexity [G] of counts [sum K]."""
    _check_counts("code_usage", counts, layout)
    counts = counts.float() if counts.dtype.itemsize < 4 else counts
    if resolve_backend(backend, counts) == "triton":
        from spinlock_fast.kernels.ema_update import triton

        return triton.code_usage(counts, layout)
    return reference.utilization(counts, layout), reference.perplexity(counts, layout)


def utilization(counts: Tensor, layout: CodebookLayout) -> Tensor:
    """[G] share of codes with a count above zero."""
    _check_counts("utilization", counts, layout)
    return reference.utilization(counts, layout)


def perplexity(counts: Tensor, layout: CodebookLayout) -> Tensor:
    """[G] exp of the entropy of the counts, between 1 and K_g; 0 where nothing was counted."""
    _check_counts("perplexity", counts, layout)
    return reference.perplexity(counts, layout)


def _check_counts(operator: str, counts: Tensor, layout: CodebookLayout) -> None:
    check(operator, ("counts", counts, (layout.total_codes,), REAL))


@torch.no_grad()
def reset_dead_codes(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    layout: CodebookLayout,
    threshold: float = 0.05,
    strategy: Literal["perturb", "sample"] = "perturb",
    max_fraction: float = 0.25,
    latents: Tensor | None = None,
    noise: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`reference.reset_dead_codes` in place; returns the replaced codes per codebook [G]."""
    E, K = layout.total_entries, layout.total_codes
    check(
        "reset_dead_codes",
        ("codebook", codebook, (E,), FLOAT),
        ("cluster_size", cluster_size, (K,), FLOAT),
        ("code_sum", code_sum, (E,), FLOAT),
        ("latents", latents, ("N", layout.total_dims), FLOAT),
    )
    if strategy not in ("perturb", "sample"):
        raise ValueError(f"reset_dead_codes: strategy must be perturb or sample, got {strategy!r}")
    *new, replaced = reference.reset_dead_codes(
        codebook, cluster_size, code_sum, layout, threshold, strategy, max_fraction, latents, noise, generator
    )
    for target, value in zip((codebook, cluster_size, code_sum), new, strict=True):
        target.copy_(value)
    return replaced
