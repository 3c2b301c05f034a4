"""The codebook update by moving averages in plain PyTorch, without host synchronisation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout

# Without smoothing, a code is updated while its moving count exceeds this share of the mean count of its codebook.
IDLE_SHARE = 1e-5


def sum_by_codebook(values: Tensor, layout: CodebookLayout) -> Tensor:
    """[sum K] -> [G]."""
    index = layout.indices(values.device)
    return values.new_zeros(layout.groups).index_add_(0, index.codebook_of_code, values)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """New codebook, cluster_size and code_sum.

    n <- decay n + (1 - decay) counts; s <- decay s + (1 - decay) sums; e_k = s_k / n_k.
    With smoothing "none", e_k is kept where n_k <= 1e-5 sum(n) / K. With "laplace",
    n_k <- (n_k + epsilon) / (sum(n) + K epsilon) sum(n) first (van den Oord et al. 2017, appendix A.1).
    A codebook to which no row was assigned is returned unchanged.

    Args:
        codebook: [sum K D].
        cluster_size: [sum K] moving counts n.
        code_sum: [sum K D] moving sums s.
        counts: [sum K] rows of this batch.
        sums: [sum K D] latent sums of this batch.
    """
    index = layout.indices(codebook.device)
    active = (sum_by_codebook(counts, layout) > 0)[index.codebook_of_code]  # [sum K]
    n = torch.where(active, decay * cluster_size + (1.0 - decay) * counts, cluster_size)
    active_entry = active[index.code_of_entry]
    s = torch.where(active_entry, decay * code_sum + (1.0 - decay) * sums, code_sum)
    total = sum_by_codebook(n, layout)[index.codebook_of_code]
    K = index.num_codes[index.codebook_of_code].to(n.dtype)
    if smoothing == "laplace":
        n = torch.where(active, (n + epsilon) / (total + K * epsilon) * total, n)
        updated = active
    else:
        updated = active & (n > IDLE_SHARE * total / K)
    n_entry = torch.where(updated, n, 1.0)[index.code_of_entry]
    new = torch.where(updated[index.code_of_entry], s / n_entry, codebook)
    return new, n, s


def code_usage(counts: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """Utilization [G]: share of codes with n_k > 0. Perplexity [G]: exp(-sum_k p_k log p_k), p_k = n_k / sum(n).

    Perplexity lies between 1 and K_g; it is 0 where all counts are 0.
    """
    index = layout.indices(counts.device)
    utilization = sum_by_codebook((counts > 0).to(torch.float32), layout) / index.num_codes
    counts = counts.to(torch.float64)
    total = sum_by_codebook(counts, layout)
    share = counts / total.clamp(min=torch.finfo(total.dtype).tiny)[index.codebook_of_code]
    entropy = sum_by_codebook(-torch.xlogy(share, share), layout)
    return utilization, torch.where(total > 0, entropy.exp(), 0.0).to(torch.float32)
