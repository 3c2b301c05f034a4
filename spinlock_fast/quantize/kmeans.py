"""k-means++ and Lloyd's algorithm on all codebooks of a group at once."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import vq_assign
from spinlock_fast.quantize.module_state import FirstBatch
from spinlock_fast.quantize.process_group import Processes

# k-means++ takes one pass over the rows per code; larger codebooks are seeded with distinct random rows.
_MAX_PLUS_PLUS_CODES = 1024
# Size of the seeding sample of several processes; as many rows as codes, if that is more.
_SEED_ROWS = 8192


@torch.no_grad()
def kmeans(
    z: Tensor,
    layout: CodebookLayout,
    iterations: int = 10,
    generator: torch.Generator | None = None,
    processes: Processes | None = None,
) -> tuple[Tensor, Tensor]:
    """Fits codebooks to rows.

    Seeds by k-means++ (Arthur and Vassilvitskii 2007; distinct random rows above 1,024 codes), then runs Lloyd's
    algorithm. A code without rows keeps its value.

    Args:
        z: [N, sum D] latents; rows that are not finite are ignored.
        layout: sizes of the group.
        iterations: Lloyd iterations.
        generator: source of randomness on the device of z.
        processes: processes that all call this function with their own rows and get the same codes, fitted to all
            rows. Codes are seeded from a sample of at most 8,192 rows (or as many as there are codes).

    Returns:
        codebook [sum K D] and the number of rows of each code [sum K], float32 or wider.

    Raises:
        ValueError: no row is finite, in any process.
    """
    z = z[torch.isfinite(z).all(1)].to(torch.promote_types(z.dtype, torch.float32))
    draws = processes is None or processes.rank() == 0  # one process draws the seeds for all
    sample = z if processes is None else processes.sample(z, max(_SEED_ROWS, layout.max_codes))
    if sample.shape[0] == 0:
        raise ValueError("k-means needs at least one finite row")
    seeds = _plus_plus if layout.max_codes <= _MAX_PLUS_PLUS_CODES else _distinct_rows
    codebook = z.new_zeros(layout.total_entries)
    if draws:
        codebook = layout.pack_codebook(seeds(layout.pad_columns(sample), layout.max_codes, generator))
    if processes is not None:
        processes.sum_(codebook)
    index = layout.indices(z.device)

    def assign() -> tuple[Tensor, Tensor]:
        assignment = vq_assign(z, codebook, layout)
        if processes is None:
            return assignment.counts, assignment.sums
        packed = processes.sum_(torch.cat([assignment.counts, assignment.sums]))
        counts, sums = packed.split([layout.total_codes, len(codebook)])
        return counts, sums

    for _ in range(iterations):
        counts, sums = assign()
        used = (counts > 0)[index.entry_code]
        codebook = torch.where(used, sums / counts.clamp(min=1.0)[index.entry_code], codebook)
    return codebook, assign()[0]


def _plus_plus(padded: Tensor, codes: int, generator: torch.Generator | None) -> Tensor:
    """k-means++ seeds [G, codes, D] from rows [G, N, D]."""
    G, N, D = padded.shape
    group = torch.arange(G, device=padded.device)
    centres = padded.new_empty(G, codes, D)
    distance = padded.new_ones(G, N)
    for k in range(codes):
        # Samples by the inverse cumulative distribution; uniformly if every row is a centre already.
        weight = torch.where(distance.sum(1, keepdim=True) > 0, distance, 1.0).to(torch.float64)
        cumulative = weight.cumsum(1)
        draw = torch.rand(G, 1, dtype=torch.float64, device=padded.device, generator=generator)
        row = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True).clamp(max=N - 1)[:, 0]
        centres[:, k] = padded[group, row]
        new = (padded - centres[:, k : k + 1]).square().sum(-1)
        distance = new if k == 0 else torch.minimum(distance, new)
    return centres


def _distinct_rows(padded: Tensor, codes: int, generator: torch.Generator | None) -> Tensor:
    """[G, codes, D] distinct random rows, repeated if there are fewer than codes."""
    N = padded.shape[1]
    order = torch.randperm(N, device=padded.device, generator=generator)
    return padded[:, order.repeat(-(-codes // N))[:codes]]


def initialize_codes(
    z: Tensor,
    valid: Tensor,
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    initialized: Tensor,
    layout: CodebookLayout,
    first: FirstBatch,
    sync: bool = True,
) -> None:
    """Fits codes to the valid rows by k-means, in place, unless `initialized` is True.

    Changes nothing if there is no valid row in any process.

    Args:
        z: [N, sum D] latents.
        valid: [N] bool mask of rows.
        codebook: [sum K D], overwritten.
        cluster_size: [sum K], overwritten with the number of rows of each code.
        code_sum: [sum K D], overwritten with code vectors times these numbers.
        initialized: bool scalar, set to True.
        first: host-side flag, updated as well.
        sync: fits the rows of all processes of `first`.
    """
    torch.ops.spinlock_fast.initialize_codes(
        z, valid, codebook, cluster_size, code_sum, initialized, layout.num_codes, layout.dims, first.key, sync
    )


torch.library.define(
    "spinlock_fast::initialize_codes",
    "(Tensor z, Tensor valid, Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) code_sum,"
    " Tensor(d!) initialized, int[] num_codes, int[] dims, str key, bool sync) -> ()",
)


@torch.library.impl("spinlock_fast::initialize_codes", "default")
def _initialize_codes(
    z: Tensor,
    valid: Tensor,
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
        rows = z[valid]
        row_count = torch.tensor(len(rows), device=z.device)
        if int(row_count if processes is None else processes.sum_(row_count)) == 0:
            return
        codes, counts = kmeans(rows, layout, processes=processes)
        codebook.copy_(codes)
        cluster_size.copy_(counts)
        code_sum.copy_(codes * counts[layout.indices(z.device).entry_code])
        initialized.fill_(True)
    first.awaited = False


torch.library.register_fake("spinlock_fast::initialize_codes", lambda *arguments: None)
