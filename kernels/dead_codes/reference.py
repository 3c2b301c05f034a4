"""The dead-code reset in plain PyTorch, without host synchronisation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout


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
    """Replaces dead codes.

    A code is dead if n_k < threshold * mean(n) of its codebook. The least used are replaced first, at most
    floor(max_fraction * K_g). The i-th dead code becomes

    - "perturb": the live code of i-th highest usage (cyclically) plus Gaussian noise with `noise` times the standard
      deviation per dimension of the codebook's codes;
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
        source = order.gather(1, (last - rank % live).clamp(min=0))  # i-th least used <- i-th most used, cyclically
        centre = codes.sum(1, keepdim=True) / sizes[:, :, None]
        inside = index.code_mask[:, :, None]
        spread = (((codes - centre).square() * inside).sum(1, keepdim=True) / sizes[:, :, None]).sqrt()
        random = torch.randn(codes.shape, dtype=codes.dtype, device=codes.device, generator=generator)
        replacement = codes.gather(1, source[:, :, None].expand_as(codes)) + noise * spread * random
    else:
        if latents is None:
            raise ValueError('strategy "sample" needs latents')
        replacement, available = _sample_rows(latents, layout, generator)
        dead = dead & available
    n_new = torch.where(dead, mean, n)
    codes_new = torch.where(dead[:, :, None], replacement, codes)
    packed_dead = dead.flatten()[index.packed_codes]
    new = torch.where(packed_dead[index.code_of_entry], layout.pack_codebook(codes_new), codebook)
    new_n = n_new.flatten()[index.packed_codes]
    new_s = torch.where(packed_dead[index.code_of_entry], new * new_n[index.code_of_entry], code_sum)
    return new, new_n, new_s, dead.sum(1)


def _sample_rows(latents: Tensor, layout: CodebookLayout, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """[G, K_max, D_max] random finite rows of each codebook's latents, and [G, 1] whether a finite row exists."""
    if latents.shape[0] == 0:
        zeros = latents.new_zeros(layout.groups, layout.max_codes, layout.max_dims)
        return zeros, torch.zeros(layout.groups, 1, dtype=torch.bool, device=latents.device)
    padded = layout.pad_columns(latents)  # [G, N, D_max]
    finite = torch.isfinite(padded).all(-1)
    score = torch.rand(finite.shape, dtype=torch.float32, device=latents.device, generator=generator).masked_fill(
        ~finite, -1.0
    )
    top = score.topk(min(layout.max_codes, latents.shape[0]), dim=1).indices  # distinct rows
    repeats = -(-layout.max_codes // max(top.shape[1], 1))
    top = top.repeat(1, repeats)[:, : layout.max_codes]
    # With fewer finite rows than codes, the first row is repeated.
    top = torch.where(finite.gather(1, top), top, top[:, :1])
    rows = padded.gather(1, top[:, :, None].expand(-1, -1, layout.max_dims))
    return rows, finite.any(1, keepdim=True)
