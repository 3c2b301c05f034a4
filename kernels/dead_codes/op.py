"""Dead-code reset in place: argument checks. The reference runs on every device, as resets are rare."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spinlock_fast.kernels._common.guard import FLOAT, check
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.dead_codes import reference


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
    """Replaces dead codes in place, see `reference.reset_dead_codes`.

    Returns:
        [G] number of replaced codes of each codebook.
    """
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
    *updated, replaced = reference.reset_dead_codes(
        codebook, cluster_size, code_sum, layout, threshold, strategy, max_fraction, latents, noise, generator
    )
    for target, value in zip((codebook, cluster_size, code_sum), updated, strict=True):
        target.copy_(value)
    return replaced
