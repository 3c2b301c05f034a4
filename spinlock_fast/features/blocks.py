"""Matrices that are read block by block, and sums over their blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.data.row_view import RowView
from spinlock_fast.distributed import SINGLE, Ranks

Matrix = NDArray[np.float32] | NDArray[np.float64]
Item = TypeVar("Item")

ROWS_AT_ONCE = 16384  # rows of a block; determines the rounding of sums, so it does not depend on sizes or ranks
_COLUMNS_AT_ONCE = 16
_VALUES_AT_ONCE = 1 << 22  # of a block of columns


@dataclass(frozen=True)
class TransformedRows:
    """Rows of another matrix, transformed when they are read.

    Args:
        rows: the other matrix [N, C].
        transform: function [n, C] -> [n, columns] of any n.
        columns: columns of the result.
    """

    rows: Matrix | RowView | TransformedRows
    transform: Callable[[Matrix], Matrix]
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.columns

    def __getitem__(self, positions: slice | NDArray[np.int64]) -> Matrix:
        """Rows [n, columns]."""
        return self.transform(self.rows[positions])


Blocks = Matrix | RowView | TransformedRows


def sum_of_blocks(
    x: Blocks, summand: Callable[[Matrix], NDArray[np.float64]], shape: tuple[int, ...], ranks: Ranks = SINGLE
) -> NDArray[np.float64]:
    """Sum of summand(block), of the given shape, over the blocks of x in their order.

    With several ranks, each computes a part of the summands. The sum has the same bits for any number of ranks.
    """
    total = np.zeros(shape)
    starts = range(0, x.shape[0], ROWS_AT_ONCE)
    for first in range(0, len(starts), ranks.size):
        summands = np.zeros((min(ranks.size, len(starts) - first), *shape))
        if ranks.rank < len(summands):
            start = starts[first + ranks.rank]
            summands[ranks.rank] = summand(x[start : start + ROWS_AT_ONCE])
        ranks.sum_(torch.from_numpy(summands))
        for value in summands:
            total += value
    return total


def extremes(x: Blocks, ranks: Ranks = SINGLE) -> tuple[Matrix, Matrix]:
    """The least and the largest value of each column."""
    low = np.full(x.shape[1], np.inf, x[:0].dtype)
    high = -low
    for start in range(ranks.rank * ROWS_AT_ONCE, x.shape[0], ranks.size * ROWS_AT_ONCE):
        block = x[start : start + ROWS_AT_ONCE]
        np.minimum(low, block.min(axis=0), out=low)
        np.maximum(high, block.max(axis=0), out=high)
    ranks.min_(torch.from_numpy(low))
    ranks.max_(torch.from_numpy(high))
    return low, high


def map_column_blocks(x: Blocks, work: Callable[[slice, Matrix], None]) -> None:
    """Calls work(columns, block) with transposed contiguous blocks [columns, N] of a few columns, on threads.

    Copies x unless it is an array.
    """
    N, F = x.shape
    if isinstance(x, np.ndarray):
        values = x
    else:
        values = np.empty((N, F), x[:0].dtype)
        for start in range(0, N, ROWS_AT_ONCE):
            values[start : start + ROWS_AT_ONCE] = x[start : start + ROWS_AT_ONCE]
    width = max(1, min(_COLUMNS_AT_ONCE, _VALUES_AT_ONCE // max(N, 1)))
    blocks = [slice(start, min(start + width, F)) for start in range(0, F, width)]
    map_on_threads(lambda columns: work(columns, values[:, columns].T.copy()), blocks)


def map_on_threads(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Calls work(item) for all items in any order, on as many threads as torch uses.

    NumPy releases the GIL while it sorts, copies and computes.
    """
    work_items = list(items)
    threads = min(torch.get_num_threads(), len(work_items))
    if threads < 2:
        for item in work_items:
            work(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, work_items):
            pass
