"""The mathematics of the codebook update in plain PyTorch. No function waits for the device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spinlock_fast.kernels.layout import CodebookLayout

# A code moves while its moving count is above this share of its codebook's mean count.
IDLE_SHARE = 1e-5


def sum_by_book(values: Tensor, layout: CodebookLayout) -> Tensor:
    """[sum K] -> [G]."""
    index = layout.indices(values.device)
    return values.new_zeros(layout.groups).index_add_(0, index.code_book, values)


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
    With smoothing "none", e_k stays where n_k <= 1e-5 sum(n) / K: an idle code does not move.
    With "laplace", n_k <- (n_k + epsilon) / (sum(n) + K epsilon) sum(n) first (van den Oord et al.
    2017, appendix A.1). A codebook to which no row was assigned is returned unchanged.

    Args:
        codebook: [sum K D].
        cluster_size: [sum K] moving counts n.
        code_sum: [sum K D] moving sums s.
        counts: [sum K] rows of this batch.
        sums: [sum K D] latent sums of this batch.
    """
    index = layout.indices(codebook.device)
    active = (sum_by_book(counts, layout) > 0)[index.code_book]  # [sum K]
    n = torch.where(active, decay * cluster_size + (1.0 - decay) * counts, cluster_size)
    active_entry = active[index.entry_code]
    s = torch.where(active_entry, decay * code_sum + (1.0 - decay) * sums, code_sum)
    total = sum_by_book(n, layout)[index.code_book]
    K = index.num_codes[index.code_book].to(n.dtype)
    if smoothing == "laplace":
        n = torch.where(active, (n + epsilon) / (total + K * epsilon) * total, n)
        moves = active
    else:
        moves = active & (n > IDLE_SHARE * total / K)
    n_entry = torch.where(moves, n, 1.0)[index.entry_code]
    new = torch.where(moves[index.entry_code], s / n_entry, codebook)
    return new, n, s


def utilization(counts: Tensor, layout: CodebookLayout) -> Tensor:
    """[G] share of codes with a count above zero."""
    return sum_by_book((counts > 0).to(torch.float32), layout) / layout.indices(counts.device).num_codes


def perplexity(counts: Tensor, layout: CodebookLayout) -> Tensor:
    """[G] exp of the entropy of the counts, between 1 and K_g; 0 where nothing was counted."""
    index = layout.indices(counts.device)
    counts = counts.to(torch.float64)
    total = sum_by_book(counts, layout)
    share = counts / total.clamp(min=torch.finfo(total.dtype).tiny)[index.code_book]
    entropy = sum_by_book(-torch.xlogy(share, share), layout)
    return torch.where(total > 0, entropy.exp(), 0.0).to(torch.float32)


def reset_dead_codes(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    layout: CodebookLayout,
    threshold: float,
    strategy: Literal["perturb", "sample"],
    max_fraction: float,
    latents: Tensor | None,
    noise: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replaces codes that are hardly used.

    Dead are codes with n_k < threshold * mean(n) of their codebook; the least used first, at most
    floor(max_fraction * K_g). The i-th dead code becomes

    - "perturb": the code of i-th highest usage (starting over after the last that is not dead) plus
      Gaussian noise of `noise` times the spread (standard deviation per dimension) of the codebook's codes;
    - "sample": a random finite row of `latents`.

    Then n_k = mean(n) and s_k = n_k e_k.

    Args:
        latents: [N, sum D], needed by "sample".

    Returns:
        new codebook, cluster_size, code_sum, and the number of replaced codes per codebook [G].
    """
    index = layout.indices(codebook.device)
    G, K = layout.groups, layout.max_codes
    codes = layout.pad_codebook(codebook)  # [G, K_max, D_max]
    n = cluster_size.new_zeros(G * K).index_copy_(0, index.packed_codes, cluster_size).view(G, K)
    sizes = index.num_codes.to(n.dtype)[:, None]
    mean = n.sum(1, keepdim=True) / sizes
    usage = n.masked_fill(~index.code_mask, torch.inf)
    order = usage.argsort(dim=1, stable=True)  # least used first, padding last
    rank = order.argsort(dim=1)
    dead = index.code_mask & (n < threshold * mean) & (rank < torch.floor(max_fraction * sizes))
    if strategy == "perturb":
        last = index.num_codes.to(torch.int64)[:, None] - 1
        live = (index.code_mask & (n >= threshold * mean)).sum(1, keepdim=True).clamp(min=1)
        source = order.gather(1, (last - rank % live).clamp(min=0))  # i-th least used <- i-th most used, in turn
        centre = codes.sum(1, keepdim=True) / sizes[:, :, None]
        inside = index.code_mask[:, :, None]
        spread = (((codes - centre).square() * inside).sum(1, keepdim=True) / sizes[:, :, None]).sqrt()
        random = torch.randn(codes.shape, dtype=codes.dtype, device=codes.device, generator=generator)
        fresh = codes.gather(1, source[:, :, None].expand_as(codes)) + noise * spread * random
    else:
        if latents is None:
            raise ValueError('strategy "sample" needs latents')
        fresh, available = _sample_rows(latents, layout, generator)
        dead = dead & available
    n_new = torch.where(dead, mean, n)
    codes_new = torch.where(dead[:, :, None], fresh, codes)
    packed_dead = dead.flatten()[index.packed_codes]
    new = torch.where(packed_dead[index.entry_code], layout.pack_codebook(codes_new), codebook)
    new_n = n_new.flatten()[index.packed_codes]
    new_s = torch.where(packed_dead[index.entry_code], new * new_n[index.entry_code], code_sum)
    return new, new_n, new_s, dead.sum(1)


def _sample_rows(latents: Tensor, layout: CodebookLayout, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """[G, K_max, D_max] random finite rows of each codebook's latents, and [G, 1] whether there are any."""
    if latents.shape[0] == 0:
        nothing = latents.new_zeros(layout.groups, layout.max_codes, layout.max_dims)
        return nothing, torch.zeros(layout.groups, 1, dtype=torch.bool, device=latents.device)
    padded = layout.pad_columns(latents)  # [G, N, D_max]
    finite = torch.isfinite(padded).all(-1)
    score = torch.rand(finite.shape, dtype=torch.float32, device=latents.device, generator=generator).masked_fill(
        ~finite, -1.0
    )
    top = score.topk(min(layout.max_codes, latents.shape[0]), dim=1).indices  # distinct rows
    repeats = -(-layout.max_codes // max(top.shape[1], 1))
    top = top.repeat(1, repeats)[:, : layout.max_codes]
    # Where fewer rows are finite than codes are wanted, the best row serves again.
    top = torch.where(finite.gather(1, top), top, top[:, :1])
    rows = padded.gather(1, top[:, :, None].expand(-1, -1, layout.max_dims))
    return rows, finite.any(1, keepdim=True)
