"""k-means initialisation of codebooks from the first batch, as one custom operator.

Its control flow depends on data, which torch.compile cannot trace. Seeding, empty clusters and the order of random
draws follow vector-quantize-pytorch, so that `quantize.kmeans` (k-means++, packed codebooks) does not apply here.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from spinlock_fast.kernels.residual_vq import residual_vq
from spinlock_fast.kernels.residual_vq.reference import unit
from spinlock_fast.quantize.module_state import FirstBatch
from spinlock_fast.quantize.process_group import Processes

log = logging.getLogger(__name__)


def laplace_smoothing(cluster_size: Tensor, eps: float) -> Tensor:
    """Counts [..., K] plus `eps`, rescaled to the same sum (van den Oord et al. 2017, appendix A.1)."""
    total = cluster_size.sum(-1, keepdim=True)
    return (cluster_size + eps) / (total + cluster_size.shape[-1] * eps) * total


torch.library.define(
    "spinlock_fast::kmeans_init",
    "(Tensor rows, Tensor? mask, Tensor(a!) embed, Tensor(b!) embed_avg, Tensor(c!) cluster_size, Tensor(d!) initted,"
    " str key, int iterations, bool cosine, float eps, bool sync, bool keep_empty) -> ()",
)


@torch.library.impl("spinlock_fast::kmeans_init", "default")
def _kmeans_init(
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
    """Fits codebooks in place, unless `initted` is True. Changes nothing if some codebook has no valid row.

    Args:
        rows: [H, N, D] latents; rows that are not finite are ignored.
        mask: [N] bool.
        embed: [H, K, D] codes, overwritten.
        embed_avg: [H, K, D] moving sums, overwritten.
        cluster_size: [H, K] moving counts, overwritten.
        initted: bool scalar, set to True.
        key: of the `FirstBatch`, the same flag on the host; updated as well.
        iterations: Lloyd iterations.
        cosine: normalises rows and codes to unit length.
        eps: epsilon of the Laplace smoothing.
        sync: fits the rows of all processes of the `FirstBatch`.
        keep_empty: an empty cluster keeps its code (correction "kmeans_scale").
    """
    first = FirstBatch.of(key)
    if bool(initted):
        first.awaited = False
        return
    processes, K = first.processes if sync else None, embed.shape[1]
    valid = torch.isfinite(rows).all(-1) if mask is None else torch.isfinite(rows).all(-1) & mask  # [H, N]
    samples = [(unit(head) if cosine else head)[keep] for head, keep in zip(rows, valid, strict=True)]
    seeds = [_initial_codes(head, K, processes) for head in samples]
    if any(len(head) == 0 for head in seeds):
        return
    for h, (sample, seed) in enumerate(zip(samples, seeds, strict=True)):
        centroids, counts = _lloyd(sample, seed, iterations, cosine, processes)
        sums = centroids * counts[:, None]
        codes = sums / laplace_smoothing(counts, eps)[:, None]
        codes = unit(codes) if cosine else codes
        if keep_empty:
            codes = torch.where((counts > 0)[:, None], codes, centroids)
        cluster_size[h], embed_avg[h], embed[h] = counts, sums, codes
    initted.fill_(True)
    first.awaited = False


torch.library.register_fake("spinlock_fast::kmeans_init", lambda *arguments: None)


def _lloyd(
    rows: Tensor, centroids: Tensor, iterations: int, cosine: bool, processes: Processes | None
) -> tuple[Tensor, Tensor]:
    """Centroids [K, D] and their row counts [K] in the last iteration. An empty cluster keeps its centroid."""
    counts = centroids.new_zeros(len(centroids))
    for _ in range(iterations):
        assignment = residual_vq(rows, [centroids], cosine=cosine)
        packed = torch.cat([assignment.counts[:, None], assignment.sums], 1)
        if processes is not None:
            processes.sum_(packed)
        counts, sums = packed[:, 0], packed[:, 1:]
        means = sums / counts.clamp(min=1.0)[:, None]
        centroids = torch.where((counts > 0)[:, None], unit(means) if cosine else means, centroids)
    return centroids, counts


def _initial_codes(rows: Tensor, K: int, processes: Processes | None) -> Tensor:
    """[K, D] distinct random rows, repeated if there are fewer than K; [0, D] if there are none."""
    N, device = len(rows), rows.device
    sample = rows if processes is None else processes.sample(rows, K)
    if 0 < len(sample) < K:
        log.warning("k-means fits %d codes to %d rows: some codes will be equal", K, len(sample))
    if processes is not None:
        return sample.repeat(-(-K // max(len(sample), 1)), 1)[:K]
    if N == 0:
        return rows
    return rows[torch.randperm(N, device=device)[:K] if N >= K else torch.randint(0, N, (K,), device=device)]
