"""k-means++ and Lloyd's algorithm on every codebook of a group at once."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import vq_assign
from spinlock_fast.quantize.module_state import FirstBatch
from spinlock_fast.quantize.process_group import Processes

# Seeding by k-means++ takes one pass over the rows per code; above this, codes start from distinct rows.
_PLUS_PLUS_LIMIT = 1024
# Several processes start from so many rows of theirs, or as many as there are codes.
_SEED_ROWS = 8192


@torch.no_grad()
def kmeans(
    z: Tensor,
    layout: CodebookLayout,
    iterations: int = 10,
    generator: torch.Generator | None = None,
    processes: Processes | None = None,
) -> tuple[Tensor, Tensor]:
    """Codebooks that fit the rows.

    Seeds by k-means++ (Arthur and Vassilvitskii 2007; distinct random rows above 1,024 codes), then
    runs Lloyd's iterations. A code that loses all its rows keeps its place.

    Args:
        z: [N, sum D] latents; rows that are not finite are left out.
        layout: sizes of the group.
        iterations: Lloyd iterations.
        generator: source of randomness on the device of z.
        processes: all of these call this function with rows of theirs, and get the same codes, those of all rows.
            Codes start from a sample of the rows, at most 8,192 (or as many as there are codes).

    Returns:
        codebook [sum K D] and the rows of each code [sum K], float32 or wider.

    Raises:
        ValueError: no row is finite, in any process.
    """
    z = z[torch.isfinite(z).all(1)].to(torch.promote_types(z.dtype, torch.float32))
    first = processes is None or processes.rank() == 0
    sample = z if processes is None else processes.sample(z, max(_SEED_ROWS, layout.max_codes))
    if sample.shape[0] == 0:
        raise ValueError("k-means needs at least one finite row")
    seeds = _plus_plus if layout.max_codes <= _PLUS_PLUS_LIMIT else _distinct_rows
    codebook = z.new_zeros(layout.total_entries)
    if first:  # one process draws for all
        codebook = layout.pack_codebook(seeds(layout.pad_columns(sample), layout.max_codes, generator))
    if processes is not None:
        processes.sum_(codebook)
    index = layout.indices(z.device)

    def assign() -> tuple[Tensor, Tensor]:
        found = vq_assign(z, codebook, layout)
        if processes is None:
            return found.counts, found.sums
        counts, sums = processes.sum_(torch.cat([found.counts, found.sums])).split([layout.total_codes, len(codebook)])
        return counts, sums

    for _ in range(iterations):
        counts, sums = assign()
        used = (counts > 0)[index.code_of_entry]
        codebook = torch.where(used, sums / counts.clamp(min=1.0)[index.code_of_entry], codebook)
    return codebook, assign()[0]


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
    first: FirstBatch,
    sync: bool = True,
) -> None:
    """Fits codes in place to the usable rows by k-means, unless `initialized` says that it was done.

    Args:
        z: [N, sum D] latents.
        usable: [N] bool; without any, in any process, nothing changes.
        codebook: [sum K D], changed.
        cluster_size: [sum K], changed: rows of each code.
        code_sum: [sum K D], changed: code vectors times rows.
        initialized: bool scalar, set.
        first: told as well.
        sync: the processes of `first` fit the rows of all of them.
    """
    torch.ops.spinlock_fast.initialize_codes(
        z, usable, codebook, cluster_size, code_sum, initialized, layout.num_codes, layout.dims, first.key, sync
    )


torch.library.define(
    "spinlock_fast::initialize_codes",
    "(Tensor z, Tensor usable, Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) code_sum,"
    " Tensor(d!) initialized, int[] num_codes, int[] dims, str key, bool sync) -> ()",
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
    key: str,
    sync: bool,
) -> None:
    layout, first = CodebookLayout.of(num_codes, dims), FirstBatch.of(key)
    processes = first.processes if sync and first.processes.size() > 1 else None
    if not bool(initialized):
        rows = z[usable]
        anywhere = torch.tensor(len(rows), device=z.device)
        if int(anywhere if processes is None else processes.sum_(anywhere)) == 0:
            return
        fitted, counts = kmeans(rows, layout, processes=processes)
        codebook.copy_(fitted)
        cluster_size.copy_(counts)
        code_sum.copy_(fitted * counts[layout.indices(z.device).code_of_entry])
        initialized.fill_(True)
    first.awaited = False


def _fake_initialize_codes(*arguments: object) -> None:
    return None


torch.library.register_fake("spinlock_fast::initialize_codes", _fake_initialize_codes)
