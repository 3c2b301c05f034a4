"""k-means on the first batch, as one operator: what it does depends on data, which a compiler cannot follow."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from spinlock_fast.kernels.residual_vq import residual_vq
from spinlock_fast.kernels.residual_vq.reference import unit
from spinlock_fast.quantize.module_state import FirstBatch
from spinlock_fast.quantize.process_group import Processes

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
    first: FirstBatch,
    iterations: int,
    cosine: bool,
    eps: float,
    sync: bool,
    keep_empty: bool,
) -> None:
    """Fits codes in place, unless `initted` says that it was done. Without a row that counts, nothing changes.

    Args:
        rows: [H, N, D] latents; those that are not finite do not count.
        mask: [N] bool.
        embed: [H, K, D], changed.
        embed_avg: [H, K, D], changed: moving sums.
        cluster_size: [H, K], changed: moving counts.
        initted: bool scalar, set.
        first: told as well.
        iterations: of Lloyd's algorithm.
        cosine: unit latents, unit codes.
        eps: of the Laplace smoothing.
        sync: the rows of all processes of `first` are fitted.
        keep_empty: correction "kmeans_scale".
    """
    torch.ops.spinlock_fast.dropin_start(
        rows, mask, embed, embed_avg, cluster_size, initted, first.key, iterations, cosine, eps, sync, keep_empty
    )


torch.library.define(
    "spinlock_fast::dropin_start",
    "(Tensor rows, Tensor? mask, Tensor(a!) embed, Tensor(b!) embed_avg, Tensor(c!) cluster_size, Tensor(d!) initted,"
    " str key, int iterations, bool cosine, float eps, bool sync, bool keep_empty) -> ()",
)


@torch.library.impl("spinlock_fast::dropin_start", "default")
def _start(
    rows: Tensor,
    mask: Tensor | None,
    embed: Tensor,
    embed_avg: Tensor,
    cluster_size: Tensor,
    initted: Tensor,
    key: str,
    iterations: int,
    cosine: bool,
    eps: float,
    sync: bool,
    keep_empty: bool,
) -> None:
    first = FirstBatch.of(key)
    if bool(initted):
        first.awaited = False
        return
    processes, K = first.processes if sync else None, embed.shape[1]
    usable = torch.isfinite(rows).all(-1) if mask is None else torch.isfinite(rows).all(-1) & mask  # [H, N]
    chosen = [(unit(part) if cosine else part)[use] for part, use in zip(rows, usable, strict=True)]
    seeds = [_seeds(part, K, processes) for part in chosen]
    if any(len(part) == 0 for part in seeds):
        return
    for h, (part, codes) in enumerate(zip(chosen, seeds, strict=True)):
        codes, counts = _lloyd(part, codes, iterations, cosine, processes)
        sums = codes * counts[:, None]
        moved = sums / laplace(counts, eps)[:, None]
        moved = unit(moved) if cosine else moved
        if keep_empty:
            moved = torch.where((counts > 0)[:, None], moved, codes)
        cluster_size[h], embed_avg[h], embed[h] = counts, sums, moved
    initted.fill_(True)
    first.awaited = False


def _fake_start(*arguments: object) -> None:
    return None


torch.library.register_fake("spinlock_fast::dropin_start", _fake_start)


def _lloyd(
    rows: Tensor, codes: Tensor, iterations: int, cosine: bool, processes: Processes | None
) -> tuple[Tensor, Tensor]:
    """Codes [K, D], and the rows of each [K] in the last pass. An empty cluster keeps its code."""
    counts = codes.new_zeros(len(codes))
    for _ in range(iterations):
        found = residual_vq(rows, [codes], cosine=cosine)
        packed = torch.cat([found.counts[:, None], found.sums], 1)
        if processes is not None:
            processes.sum_(packed)
        counts, sums = packed[:, 0], packed[:, 1:]
        means = sums / counts.clamp(min=1.0)[:, None]
        codes = torch.where((counts > 0)[:, None], unit(means) if cosine else means, codes)
    return codes, counts


def _seeds(rows: Tensor, K: int, processes: Processes | None) -> Tensor:
    """[K, D] distinct random rows; some serve twice where there are fewer than codes. [0, D] where there is none."""
    N, device = len(rows), rows.device
    given = rows if processes is None else processes.sample(rows, K)
    if 0 < len(given) < K:
        log.warning("k-means fits %d codes to %d rows: some codes will be equal", K, len(given))
    if processes is not None:
        return given.repeat(-(-K // max(len(given), 1)), 1)[:K]
    if N == 0:
        return rows
    return rows[torch.randperm(N, device=device)[:K] if N >= K else torch.randint(0, N, (K,), device=device)]
