"""Statistics of a batch that determine a code update, packed so that one collective operation sums them."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import Assignment


def statistics_size(layout: CodebookLayout) -> int:
    """Elements of the packed statistics: rows per code [sum K], their sums [sum K D], and the number of rows."""
    return layout.total_codes + layout.total_entries + 1


def pack_statistics(assignment: Assignment, rows: Tensor | int) -> Tensor:
    """The statistics of an assignment with sums; additive over batches."""
    counts, sums = assignment.counts, assignment.sums
    row_count = torch.as_tensor(rows, dtype=counts.dtype, device=counts.device)
    return torch.cat([counts, sums, row_count[None]])


def unpack_statistics(packed: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [sum K], sums [sum K D], and the number of rows, an int64 scalar."""
    counts, sums, rows = packed.split([layout.total_codes, layout.total_entries, 1])
    return counts, sums, rows[0].to(torch.int64)
