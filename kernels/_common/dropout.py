"""Dropout without a stored mask: an entry is kept or dropped by a hash of a seed, its row and its column."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BatchSlice(NamedTuple):
    """Rows first .. first + B of a batch of `total` rows; random numbers are drawn per row of the whole batch.

    A batch gives the same random numbers however it is cut into slices, if the generators are in the same state. The
    numbers of a slice without rows are drawn as well, so that generators stay in step.
    """

    first: int
    total: int


def draw_seed(device: torch.device) -> Tensor:
    """[] int64 on `device`, drawn by its torch generator: a captured graph draws another seed at every replay."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


def keep_scale(dropout: float) -> float:
    """Factor of kept entries, 1 / (1 - p); 0 if all are dropped."""
    return 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0


def drop_threshold(dropout: float) -> int:
    """Hashes of 31 bits below this threshold drop their entry."""
    return min(round(dropout * 2**31), 2**31 - 1)


def drop(x: Tensor, dropout: float, batch: BatchSlice | None = None) -> Tensor:
    """torch's dropout of x [..., B, n], by the rows of the mask of the whole batch."""
    if batch is None:
        return torch.nn.functional.dropout(x, dropout)
    mask = torch.nn.functional.dropout(x.new_ones(*x.shape[:-2], batch.total, x.shape[-1]), dropout)
    return x * mask.narrow(-2, batch.first, x.shape[-2])
