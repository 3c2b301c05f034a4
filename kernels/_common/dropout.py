"""Dropout without a stored mask: an entry is kept or dropped by a hash of a seed, its row and its column."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seed(device: torch.device) -> Tensor:
    """[] int64 on `device`, drawn by its torch generator: a captured graph draws another seed at every replay."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


def keep_scale(dropout: float) -> float:
    """Factor of kept entries, 1 / (1 - p); 0 if all are dropped."""
    return 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0


def drop_threshold(dropout: float) -> int:
    """Hashes of 31 bits below this threshold drop their entry."""
    return min(round(dropout * 2**31), 2**31 - 1)
