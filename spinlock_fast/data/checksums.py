"""Fletcher-32 checksum of a matrix that is read block by block."""

from __future__ import annotations

from spinlock_fast import _native
from spinlock_fast.data.row_view import RowView
from spinlock_fast.distributed import SINGLE, Ranks

_BLOCK_BYTES = 1 << 24
_MODULUS = 65535


def fletcher32_of_rows(x: RowView, ranks: Ranks = SINGLE) -> int:
    """`_native.fletcher32` of the contiguous rows [N, F]; with several ranks, each reads a part of them."""
    rows = max(1, _BLOCK_BYTES // (4 * x.shape[1]))
    starts = range(0, x.shape[0], rows)
    parts = []
    for start in starts[ranks.share(len(starts))]:
        block = x[start : start + rows]
        parts.append((_native.fletcher32(block), block.size * 2))  # words of 16 bits
    checksum = 0
    for part, words in (pair for gathered in ranks.gather_objects(parts) for pair in gathered):
        checksum = _appended(checksum, part, words)
    return checksum


def _appended(first: int, second: int, words: int) -> int:
    """Checksum of data with checksum `first`, followed by `words` words with checksum `second`."""
    low, high = first & 0xFFFF, first >> 16
    total_low = low + (second & 0xFFFF)
    total_high = high + words * low + (second >> 16)
    return _reduced(total_high) << 16 | _reduced(total_low)


def _reduced(value: int) -> int:
    """The residue as the checksum writes it: 0 only for the sum of nothing but zeros."""
    return (value - 1) % _MODULUS + 1 if value else 0
