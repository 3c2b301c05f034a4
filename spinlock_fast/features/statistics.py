"""Column statistics shared by cleaning, discovery and normalisation; float64.

Those of "known" values leave missing ones (NaN) out; the others take no NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.data.row_view import RowView

Matrix = NDArray[np.float32] | NDArray[np.float64]
Vector = NDArray[np.float64]
Blocks = Matrix | RowView  # what can be read a few rows at a time
Item = TypeVar("Item")

MAD_TO_SIGMA = 1.4826  # standard deviations per MAD of a normal distribution

_ROWS_AT_ONCE = 16384
_COLUMNS_AT_ONCE = 16


def median_and_mad(x: Matrix) -> tuple[Vector, Vector]:
    """Per column of x [N, F]: the median, and the median distance from it."""
    median, mad = np.empty(x.shape[1]), np.empty(x.shape[1])

    def fill(columns: slice, block: Matrix) -> None:
        median[columns] = np.median(block, axis=1)
        deviation = np.abs(block - median[columns, None].astype(block.dtype))
        mad[columns] = np.median(deviation, axis=1, overwrite_input=True)

    for_column_blocks(x, fill)
    return median, mad


def for_column_blocks(x: Matrix, work: Callable[[slice, Matrix], None]) -> None:
    """Calls work(columns, x[:, columns] transposed and contiguous), a few columns at a time: fast, and no copy of x."""
    blocks = [slice(start, start + _COLUMNS_AT_ONCE) for start in range(0, x.shape[1], _COLUMNS_AT_ONCE)]
    on_threads(lambda columns: work(columns, x[:, columns].T.copy()), blocks)


def on_threads(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Calls work(item) for all items, in no order, on as many threads as torch uses.

    NumPy sorts, copies and computes without the interpreter's lock.
    """
    waiting = list(items)
    threads = min(torch.get_num_threads(), len(waiting))
    if threads < 2:
        for item in waiting:
            work(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, waiting):
            pass


def mean_and_std(x: Blocks) -> tuple[Vector, Vector]:
    """Per column, summed in float64, block by block of rows."""
    starts = range(0, x.shape[0], _ROWS_AT_ONCE)
    mean, square = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for start in starts:
        mean += x[start : start + _ROWS_AT_ONCE].sum(axis=0, dtype=np.float64)
    mean /= max(x.shape[0], 1)
    for start in starts:
        square += np.square(x[start : start + _ROWS_AT_ONCE] - mean).sum(axis=0)
    return mean, np.sqrt(square / max(x.shape[0], 1))


def robust_scale(x: Matrix, mad_scale: float = MAD_TO_SIGMA) -> tuple[Vector, Vector]:
    """Per column: the median, and mad_scale * MAD; where MAD = 0 the standard deviation takes its place."""
    median, mad = median_and_mad(x)
    return median, np.where(mad > 0, mad_scale * mad, mean_and_std(x)[1])


def known_median(x: Matrix) -> Vector:
    """Per column of x [N, F]: the median of the values that are not NaN; NaN where there is none."""
    median = np.full(x.shape[1], np.nan)

    def fill(columns: slice, block: Matrix) -> None:
        found = median[columns]  # a view
        middle = [(block.shape[1] - 1) // 2, block.shape[1] // 2]
        block.partition([*middle, block.shape[1] - 1], axis=1)  # NaN goes to the end; np.median takes twice as long
        found[:] = block[:, middle].mean(axis=1)
        for i in np.flatnonzero(np.isnan(block[:, -1])):
            known = block[i, ~np.isnan(block[i])]
            found[i] = np.median(known) if known.size else np.nan

    for_column_blocks(x, fill)
    return median


def known_robust_scale(x: Matrix) -> tuple[Vector, Vector]:
    """`robust_scale` of the values that are not NaN; NaN where there is none."""
    center, scale = np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    missing = np.isnan(x)
    some = missing.any(axis=0)
    if not some.all():
        center[~some], scale[~some] = robust_scale(x[:, ~some])
    for i in np.flatnonzero(some & ~missing.all(axis=0)):
        (center[i],), (scale[i],) = robust_scale(x[~missing[:, i], i : i + 1])
    return center, scale


def correlation(x: Blocks, columns: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """Pearson correlation [F, F] between columns (all, or some); 0 with a constant one, 1 on the diagonal."""
    chosen = np.arange(x.shape[1]) if columns is None else columns
    mean, scale = (values[chosen] for values in mean_and_std(x))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    total = np.zeros((chosen.size, chosen.size))
    for start in range(0, x.shape[0], _ROWS_AT_ONCE):
        rows = x[start : start + _ROWS_AT_ONCE]
        block = ((rows if columns is None else rows[:, chosen]) - mean) * inverse
        total += block.T @ block
    result: NDArray[np.float64] = np.clip(total / x.shape[0], -1.0, 1.0)
    np.fill_diagonal(result, 1.0)
    return result
