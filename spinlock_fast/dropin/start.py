"""k-means on the first batch, as one operator: what it does depends on data, which a compiler cannot follow."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from spinlock_fast.kernels.residual_vq import residual_vq
from spinlock_fast.kernels.residual_vq.reference import unit

log = logging.getLogger(__name__)


def laplace(cluster_size: Tensor, eps: float) -> Tensor:
    """Counts [..., K] with `eps` added to each, scaled to their sum (van den Oord et al. 2017, appendix A.1)."""
    total = cluster_size.sum(-1, keepdim=True)
    return (cluster_size + eps) / (total + cluster_size.shape[-1] * eps) * total


def start_codes(
    rows: Tensor,
    mask: Tensor | None,
    embed: Tensor,
    embed_avg: Tensor,
    cluster_size: Tensor,
    initted: Tensor,
    *,
    iterations: int,
    cosine: bool,
    eps: float,
    sync: bool,
    keep_empty: bool,
) -> None:
    """Fits codes in place, unless `initted` says that it was done.

    Args:
        rows: [H, N, D] latents.
        mask: [N] bool.
        embed: [H, K, D], changed.
        embed_avg: [H, K, D], changed: moving sums.
        cluster_size: [H, K], changed: moving counts.
        initted: bool scalar, set.
        iterations: of Lloyd's algorithm.
        cosine: unit latents, unit codes.
        eps: of the Laplace smoothing.
        sync: the rows of all processes of `torch.distributed` are fitted.
        keep_empty: correction "kmeans_scale".
    """
    torch.ops.spinlock_fast.dropin_start(
        rows, mask, embed, embed_avg, cluster_size, initted, iterations, cosine, eps, sync, keep_empty
    )


torch.library.define(
    "spinlock_fast::dropin_start",
    "(Tensor rows, Tensor? mask, Tensor(a!) embed, Tensor(b!) embed_avg, Tensor(c!) cluster_size, Tensor(d!) initted,"
    " int iterations, bool cosine, float eps, bool sync, bool keep_empty) -> ()",
)


@torch.library.impl("spinlock_fast::dropin_start", "default")
def _start(
    rows: Tensor,
    mask: Tensor | None,
    embed: Tensor,
    embed_avg: Tensor,
    cluster_size: Tensor,
    initted: Tensor,
    iterations: int,
    cosine: bool,
    eps: float,
    sync: bool,
    keep_empty: bool,
) -> None:
    if bool(initted):
        return
    K = embed.shape[1]
    chosen = [(unit(part) if cosine else part)[slice(None) if mask is None else mask] for part in rows]
    if len(chosen[0]) < K:
        log.warning("k-means fits %d codes to %d rows: some codes will be equal", K, len(chosen[0]))
    seeds = [_seeds(part, K, sync) for part in chosen]
    for h, (part, codes) in enumerate(zip(chosen, seeds, strict=True)):
        codes, counts = _lloyd(part, codes, iterations, cosine, sync)
        sums = codes * counts[:, None]
        moved = sums / laplace(counts, eps)[:, None]
        moved = unit(moved) if cosine else moved
        if keep_empty:
            moved = torch.where((counts > 0)[:, None], moved, codes)
        cluster_size[h], embed_avg[h], embed[h] = counts, sums, moved
    initted.fill_(True)


def _fake_start(*arguments: object) -> None:
    return None


torch.library.register_fake("spinlock_fast::dropin_start", _fake_start)


def _lloyd(rows: Tensor, codes: Tensor, iterations: int, cosine: bool, sync: bool) -> tuple[Tensor, Tensor]:
    """Codes [K, D], and the rows of each [K] in the last pass. An empty cluster keeps its code."""
    counts = codes.new_zeros(len(codes))
    for _ in range(iterations):
        found = residual_vq(rows, [codes], cosine=cosine)
        packed = torch.cat([found.counts[:, None], found.sums], 1)
        if sync:
            dist.all_reduce(packed)
        counts, sums = packed[:, 0], packed[:, 1:]
        means = sums / counts.clamp(min=1.0)[:, None]
        codes = torch.where((counts > 0)[:, None], unit(means) if cosine else means, codes)
    return codes, counts


def _seeds(rows: Tensor, K: int, sync: bool) -> Tensor:
    """[K, D] distinct random rows; some serve twice where there are fewer than codes."""
    N, device = len(rows), rows.device
    if not sync:
        if N == 0:
            raise ValueError("k-means needs at least one row that is not masked")
        return rows[torch.randperm(N, device=device)[:K] if N >= K else torch.randint(0, N, (K,), device=device)]
    # Each process fills every world-th place, whatever its number of rows: the collective knows no sizes of data.
    world, rank = dist.get_world_size(), dist.get_rank()
    places = torch.arange(rank, K, world, device=device)
    packed = rows.new_zeros(K, rows.shape[1] + 1)
    if N > 0:
        packed[places, :-1] = rows[torch.randperm(N, device=device).repeat(-(-len(places) // N))[: len(places)]]
        packed[places, -1] = 1.0
    dist.all_reduce(packed)
    given = (packed[:, -1] > 0).nonzero().flatten()
    if len(given) == 0:
        raise ValueError("k-means needs at least one row that is not masked")
    return packed[given.repeat(-(-K // len(given)))[:K], :-1]
