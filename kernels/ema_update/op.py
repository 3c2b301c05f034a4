"""What callers use: the update in place, and usage figures."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spinlock_fast.kernels.ema_update import reference
from spinlock_fast.kernels.layout import CodebookLayout

utilization = reference.utilization
perplexity = reference.perplexity


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
) -> None:
    """`reference.ema_update`, written into codebook, cluster_size and code_sum."""
    new = reference.ema_update(codebook, cluster_size, code_sum, counts, sums, layout, decay, smoothing, epsilon)
    for target, value in zip((codebook, cluster_size, code_sum), new, strict=True):
        target.copy_(value)


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
    *new, replaced = reference.reset_dead_codes(
        codebook, cluster_size, code_sum, layout, threshold, strategy, max_fraction, latents, noise, generator
    )
    for target, value in zip((codebook, cluster_size, code_sum), new, strict=True):
        target.copy_(value)
    return replaced
