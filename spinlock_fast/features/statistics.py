"""Column statistics shared by cleaning, discovery and normalisation; float64.

Functions named nan_* ignore NaN; the others do not accept NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.data.row_view import RowView

Matrix = NDArray[np.float32] | NDArray[np.float64]
Vector = NDArray[np.float64]
Blocks = Matrix | RowView  # supports slicing of rows
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

    map_column_blocks(x, fill)
    return median, mad


def map_column_blocks(x: Matrix, work: Callable[[slice, Matrix], None]) -> None:
    """Calls work(columns, block) with transposed contiguous blocks of a few columns, on threads, without copying x."""
    blocks = [slice(start, start + _COLUMNS_AT_ONCE) for start in range(0, x.shape[1], _COLUMNS_AT_ONCE)]
    map_on_threads(lambda columns: work(columns, x[:, columns].T.copy()), blocks)


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


def mean_and_std(x: Blocks) -> tuple[Vector, Vector]:
    """Mean and standard deviation per column, accumulated in float64 over blocks of rows."""
    starts = range(0, x.shape[0], _ROWS_AT_ONCE)
    mean, square = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for start in starts:
        mean += x[start : start + _ROWS_AT_ONCE].sum(axis=0, dtype=np.float64)
    mean /= max(x.shape[0], 1)
    for start in starts:
        square += np.square(x[start : start + _ROWS_AT_ONCE] - mean).sum(axis=0)
    return mean, np.sqrt(square / max(x.shape[0], 1))


def robust_scale(x: Matrix, mad_scale: float = MAD_TO_SIGMA) -> tuple[Vector, Vector]:
    """Per column: the median, and mad_scale * MAD, or the standard deviation where MAD = 0."""
    median, mad = median_and_mad(x)
    return median, np.where(mad > 0, mad_scale * mad, mean_and_std(x)[1])


def center_and_scale(x: Blocks, method: Literal["standard", "mad"]) -> tuple[Vector, Vector]:
    """Per column: mean and standard deviation, or median and robust scale."""
    return robust_scale(x) if method == "mad" else mean_and_std(x)  # type: ignore[arg-type]


def nan_median(x: Matrix) -> Vector:
    """Per column of x [N, F]: the median of the non-NaN values; NaN where there is none."""
    median = np.full(x.shape[1], np.nan)

    def fill(columns: slice, block: Matrix) -> None:
        out = median[columns]  # a view
        middle = [(block.shape[1] - 1) // 2, block.shape[1] // 2]
        block.partition([*middle, block.shape[1] - 1], axis=1)  # sorts NaN to the end; twice as fast as np.median
        out[:] = block[:, middle].mean(axis=1)
        for i in np.flatnonzero(np.isnan(block[:, -1])):
            known = block[i, ~np.isnan(block[i])]
            out[i] = np.median(known) if known.size else np.nan

    map_column_blocks(x, fill)
    return median


def nan_robust_scale(x: Matrix) -> tuple[Vector, Vector]:
    """`robust_scale` of the non-NaN values; NaN where there is none."""
    center, scale = np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    missing = np.isnan(x)
    some = missing.any(axis=0)
    if not some.all():
        center[~some], scale[~some] = robust_scale(x[:, ~some])
    for i in np.flatnonzero(some & ~missing.all(axis=0)):
        (center[i],), (scale[i],) = robust_scale(x[~missing[:, i], i : i + 1])
    return center, scale


def correlation(x: Blocks, columns: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """Pearson correlation [F, F] of all or some columns; 0 with a constant column, 1 on the diagonal."""
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
