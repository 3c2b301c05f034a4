"""The loss of `GroupedVectorQuantizer`: commitment, and the error of learned codes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.export import exporting
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.table_cache import TableCache
from spinlock_fast.kernels.vq_assign import Assignment

# Keyed by the batch size, among others; captured graphs keep their entry alive.
_factor_tables: TableCache[Tensor] = TableCache(256)


def _factor_per_dim(layout: CodebookLayout, factor: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[G] factor / D_g of each codebook."""
    key = (layout, factor, dtype, device)
    return _factor_tables.get(key, device, lambda: factor / layout.indices(device).dims.to(dtype))


def commitment_factors(errors: Tensor, rows: int, layout: CodebookLayout, commitment_weight: float) -> Tensor:
    """[G] gradient of the commitment loss of `rows` rows with respect to the squared `errors` of the codebooks."""
    return _factor_per_dim(layout, commitment_weight / max(rows, 1), errors.dtype, errors.device)


def quantization_loss(
    assignment: Assignment,
    rows: Tensor | int,
    layout: CodebookLayout,
    commitment_weight: float,
    learned_codes: Tensor | None,
) -> Tensor:
    """Sum over codebooks of commitment_weight * mean((z - sg(e))^2), and mean((sg(z) - e)^2) of learned codes.

    Args:
        assignment: of the rows.
        rows: their number, at least 1 if it is a tensor.
        layout: sizes of the codebooks.
        commitment_weight: weight of the first term.
        learned_codes: [sum K D] codes that are trained by gradient; None if they are moving averages.
    """
    errors = assignment.error_parts
    if not isinstance(rows, Tensor):
        rows = max(rows, 1) if isinstance(rows, int) else torch.sym_max(rows, 1)  # for torch.compile of 2.11
    # Factors are cached per number of rows; an exported graph must work for any number.
    divide_last = isinstance(rows, Tensor) or exporting()
    count: Any = 1 if divide_last else rows
    factors = partial(_factor_per_dim, layout, dtype=errors.dtype, device=errors.device)
    loss = (errors * factors(commitment_weight / count)).sum()
    if learned_codes is not None:
        loss = loss + _codebook_error(assignment, learned_codes, factors(1.0 / count), layout)
    return loss / rows if divide_last else loss


def _codebook_error(assignment: Assignment, codes: Tensor, factors: Tensor, layout: CodebookLayout) -> Tensor:
    """Sum over rows and codebooks of factors [G] * ||sg(z) - e||^2.

    Its gradient 2 (n e - s) * factor is that of n e^2 - 2 e s, with n rows of sum s per code.
    """
    index = layout.indices(assignment.codes.device)
    counts, sums = assignment.counts, assignment.sums
    if not sums.numel():
        return (assignment.squared_error * factors).sum()
    codes = codes.to(sums.dtype)
    entries = counts[index.code_of_entry] * codes.square() - 2.0 * codes * sums
    surrogate = (entries * factors[index.codebook_of_code[index.code_of_entry]]).sum()
    return (assignment.squared_error.detach() * factors).sum() + (surrogate - surrogate.detach())
