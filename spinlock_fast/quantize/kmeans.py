"""k-means++ and Lloyd's algorithm on every codebook of a group at once."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import vq_assign

# Seeding by k-means++ takes one pass over the rows per code; above this, codes start from distinct rows.
_PLUS_PLUS_LIMIT = 1024


@torch.no_grad()
def kmeans(
    z: Tensor, layout: CodebookLayout, iterations: int = 10, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Codebooks that fit the rows.

    Seeds by k-means++ (Arthur and Vassilvitskii 2007; distinct random rows above 1,024 codes), then
    runs Lloyd's iterations. A code that loses all its rows keeps its place.

    Args:
        z: [N, sum D] latents; rows that are not finite are left out.
        layout: sizes of the group.
        iterations: Lloyd iterations.
        generator: source of randomness on the device of z.

    Returns:
        codebook [sum K D] and the rows of each code [sum K], float32 or wider.

    Raises:
        ValueError: no row is finite.
    """
    z = z[torch.isfinite(z).all(1)].to(torch.promote_types(z.dtype, torch.float32))
    if z.shape[0] == 0:
        raise ValueError("k-means needs at least one finite row")
    padded = layout.pad_columns(z)  # [G, N, D_max]
    seeds = _plus_plus if layout.max_codes <= _PLUS_PLUS_LIMIT else _distinct_rows
    codebook = layout.pack_codebook(seeds(padded, layout.max_codes, generator))
    index = layout.indices(z.device)
    for _ in range(iterations):
        found = vq_assign(z, codebook, layout)
        used = (found.counts > 0)[index.entry_code]
        codebook = torch.where(used, found.sums / found.counts.clamp(min=1.0)[index.entry_code], codebook)
    return codebook, vq_assign(z, codebook, layout).counts


def _plus_plus(padded: Tensor, codes: int, generator: torch.Generator | None) -> Tensor:
    G, N, D = padded.shape
    book = torch.arange(G, device=padded.device)
    centres = padded.new_empty(G, codes, D)
    distance = padded.new_ones(G, N)
    for k in range(codes):
        # Inverse of the cumulative distribution; where every row is a centre already, uniform.
        weight = torch.where(distance.sum(1, keepdim=True) > 0, distance, 1.0).to(torch.float64)
        cumulative = weight.cumsum(1)
        draw = torch.rand(G, 1, dtype=torch.float64, device=padded.device, generator=generator)
        row = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True).clamp(max=N - 1)[:, 0]
        centres[:, k] = padded[book, row]
        new = (padded - centres[:, k : k + 1]).square().sum(-1)
        distance = new if k == 0 else torch.minimum(distance, new)
    return centres


def _distinct_rows(padded: Tensor, codes: int, generator: torch.Generator | None) -> Tensor:
    N = padded.shape[1]
    order = torch.randperm(N, device=padded.device, generator=generator)
    return padded[:, order.repeat(-(-codes // N))[:codes]]


def initialize_codes(
    z: Tensor,
    usable: Tensor,
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    initialized: Tensor,
    layout: CodebookLayout,
    sync: bool = True,
) -> None:
    """Fits codes in place to the usable rows by k-means, unless `initialized` says that it was done.

    Args:
        z: [N, sum D] latents.
        usable: [N] bool; without any, nothing changes.
        codebook: [sum K D], changed.
        cluster_size: [sum K], changed: rows of each code.
        code_sum: [sum K D], changed: code vectors times rows.
        initialized: bool scalar, set.
        sync: with `torch.distributed` initialised, every process takes the codes of rank 0.
    """
    torch.ops.spinlock_fast.initialize_codes(
        z, usable, codebook, cluster_size, code_sum, initialized, layout.num_codes, layout.dims, sync
    )


torch.library.define(
    "spinlock_fast::initialize_codes",
    "(Tensor z, Tensor usable, Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) code_sum,"
    " Tensor(d!) initialized, int[] num_codes, int[] dims, bool sync) -> ()",
)


@torch.library.impl("spinlock_fast::initialize_codes", "default")
def _initialize_codes(
    z: Tensor,
    usable: Tensor,
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    initialized: Tensor,
    num_codes: list[int],
    dims: list[int],
    sync: bool,
) -> None:
    layout = CodebookLayout.of(num_codes, dims)
    shared = sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not bool(initialized) and bool(usable.any()):
        fitted, counts = kmeans(z[usable], layout)
        codebook.copy_(fitted)
        cluster_size.copy_(counts)
        code_sum.copy_(fitted * counts[layout.indices(z.device).entry_code])
        initialized.fill_(True)
    if shared:
        for tensor in (codebook, cluster_size, code_sum, initialized):
            dist.broadcast(tensor, src=0)


def _fake_initialize_codes(*arguments: object) -> None:
    return None


torch.library.register_fake("spinlock_fast::initialize_codes", _fake_initialize_codes)
