"""Decodes code indices to code vectors; an index of -1 means no code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_indices(indices: Tensor) -> Tensor:
    """`indices` as int64.

    Raises:
        ValueError: they are not integers.
    """
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"indices must be integers, got {indices.dtype}")
    return indices.to(torch.int64)


def code_vectors(codebook: Tensor, indices: Tensor) -> Tensor:
    """Code vectors [..., D] of a codebook [K, D] at indices [...]; 0 where the index is -1.

    Raises:
        IndexError: any other index outside the codebook, on a CPU.
    """
    missing = indices == -1
    return F.embedding(indices.masked_fill(missing, 0), codebook).masked_fill(missing[..., None], 0.0)


def zero_missing(output: Tensor, missing: Tensor) -> Tensor:
    """output [b, ..., dim], set to 0 where all of missing [b, ..., n] is True, as `forward` does for masked rows."""
    return output.masked_fill(missing.all(-1, keepdim=True), 0.0)
