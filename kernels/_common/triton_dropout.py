"""The dropout mask of Triton kernels, see `dropout`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _hash(x):
    """32-bit integer hash of the lowbias32 family (hash-prospector)."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def dropout_mask(seed_ptr, row, column, threshold):
    """[rows, columns] bool, whether dropout keeps an entry."""
    seed = tl.load(seed_ptr)
    key = row.to(tl.uint32) ^ seed.to(tl.uint32)
    key = _hash(_hash(key) ^ (seed >> 32).to(tl.uint32))
    bits = _hash(key[:, None] + (column.to(tl.uint32) * 0x9E3779B1)[None, :])
    return (bits >> 1).to(tl.int32) >= threshold
