"""Mixup with extrapolation and additive noise in plain PyTorch (DeVries and Taylor, 2017).

Row i of a batch is paired with the next row j (the last one with the first, or with a given row):

    target_i = x_i + u_i (x_j - x_i),    u_i ~ U(-m, m)
    input_i  = target_i + s eps_i,       eps_i ~ N(0, I)
"""

from __future__ import annotations

import torch
from torch import Tensor


def augmented_rows(
    x: Tensor,
    rows: Tensor,
    u: Tensor | None = None,
    noise: Tensor | None = None,
    next_row: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Targets and inputs [B, F] of a batch, for given random numbers.

    Args:
        x: [N, F] all rows.
        rows: [B] int64, the rows of the batch.
        u: [B, 1] mixup coefficients; None for 0.
        noise: [B, F] noise, scaled; None for 0, then both results are the same tensor.
        next_row: [1] int64, the row that the last one is paired with; None for the first of `rows`.
    """
    target = x.index_select(0, rows)
    if u is not None:
        after_last = rows[:1] if next_row is None else next_row[: len(rows)]
        partner = torch.cat([target[1:], x.index_select(0, after_last)])
        target = torch.lerp(target, partner, u)
    return target, target if noise is None else target + noise
