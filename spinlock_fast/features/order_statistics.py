"""Exact order statistics of columns that are read block by block, in memory that does not depend on their length.

Radix selection: each pass counts one digit of the sort keys of the values that share the digits found so far. Counts of
blocks add up exactly, so the result depends neither on the blocks nor on the number of ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.features.blocks import Blocks, Matrix, map_on_threads

_DIGIT_BITS = 11
_BLOCK_BYTES = 1 << 22
_COLUMNS_AT_ONCE = 16


def order_statistics(x: Blocks, places: NDArray[np.int64], ranks: Ranks = SINGLE) -> Matrix:
    """Values at given places of the sorted columns.

    Args:
        x: [N, F] float32 or float64; NaN sort behind all numbers.
        places: [T, F] places in 0 .. N - 1.
        ranks: each counts a part of the blocks.

    Returns:
        [T, F] values, in the type of x.
    """
    dtype = x[:0].dtype
    bits = 8 * dtype.itemsize
    prefix = np.zeros(places.shape, np.uint64)
    left = places.astype(np.int64)  # places among the values with this prefix
    shift = bits
    while shift > 0:
        width = min(_DIGIT_BITS, shift)
        shift -= width
        counts = _digit_counts(x, prefix, shift, width, ranks)
        upto = counts.cumsum(2)
        digit = (upto <= left[..., None]).sum(2)
        before = np.take_along_axis(upto - counts, digit[..., None], 2)[..., 0]
        left -= before
        prefix = prefix << np.uint64(width) | digit.astype(np.uint64)
    return _values_of(prefix, dtype)


def _digit_counts(x: Blocks, prefix: NDArray[np.uint64], shift: int, width: int, ranks: Ranks) -> NDArray[np.int64]:
    """[T, F, 2^width] how often a digit occurs in the keys of column f that begin with prefix[t, f]."""
    (N, F), T = x.shape, len(prefix)
    counts = np.zeros((T, F, 1 << width), np.int64)
    repeated = np.vstack([np.zeros((1, F), bool), prefix[1:] == prefix[:-1]])
    block_rows = max(1024, _BLOCK_BYTES // (4 * F))
    for start in range(ranks.rank * block_rows, N, ranks.size * block_rows):
        block = x[start : start + block_rows]

        def count(columns: slice, block: Matrix = block) -> None:
            for f, keys in enumerate(_keys_of(block[:, columns].T.copy()), columns.start):
                is_first = shift + width == 8 * keys.itemsize
                leading = keys >> (shift + width) if not is_first else keys
                for t in np.flatnonzero(~repeated[:, f]):
                    chosen = keys if is_first else keys[leading == prefix[t, f].astype(keys.dtype)]
                    digits = chosen >> shift if is_first else (chosen >> shift) & ((1 << width) - 1)
                    counts[t, f] += np.bincount(digits.astype(np.intp), minlength=1 << width)

        map_on_threads(count, [slice(f, f + _COLUMNS_AT_ONCE) for f in range(0, F, _COLUMNS_AT_ONCE)])
    for t in range(1, T):
        counts[t, repeated[t]] = counts[t - 1, repeated[t]]
    ranks.sum_(torch.from_numpy(counts))
    return counts


def _keys_of(x: NDArray[Any]) -> NDArray[Any]:
    """Unsigned integers in the order of the values, in the memory of x; -0 equals 0, all NaN are equal and last."""
    unsigned: Any = np.uint32 if x.dtype == np.float32 else np.uint64
    signed: Any = np.int32 if x.dtype == np.float32 else np.int64
    x += 0  # -0 becomes 0
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isnan(x.sum()):
            x[np.isnan(x)] = np.nan
    sign = 8 * x.itemsize - 1
    keys: NDArray[Any] = x.view(unsigned)
    keys ^= np.right_shift(x.view(signed), sign).view(unsigned) | unsigned(1 << sign)
    return keys


def _values_of(keys: NDArray[np.uint64], dtype: np.dtype[Any]) -> Matrix:
    unsigned: Any = np.uint32 if dtype == np.float32 else np.uint64
    narrow = keys.astype(unsigned)
    sign = unsigned(1 << (8 * dtype.itemsize - 1))
    values: Matrix = np.where(narrow & sign, narrow & ~sign, ~narrow).view(dtype)
    return values
