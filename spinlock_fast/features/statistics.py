"""Column statistics shared by cleaning, discovery and normalisation; float64, without NaN."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32] | NDArray[np.float64]
Vector = NDArray[np.float64]

MAD_TO_SIGMA = 1.4826  # standard deviations per MAD of a normal distribution

_ROWS_AT_ONCE = 16384
_COLUMNS_AT_ONCE = 16


def median_and_mad(x: Matrix) -> tuple[Vector, Vector]:
    """Per column of x [N, F]: the median, and the median distance from it."""
    median, mad = np.empty(x.shape[1]), np.empty(x.shape[1])
    for columns, block in column_blocks(x):
        median[columns] = np.median(block, axis=1)
        deviation = np.abs(block - median[columns, None].astype(block.dtype))
        mad[columns] = np.median(deviation, axis=1, overwrite_input=True)
    return median, mad


def column_blocks(x: Matrix) -> Iterator[tuple[slice, Matrix]]:
    """(columns, x[:, columns] transposed and contiguous), a few columns at a time: fast, and no copy of x."""
    for start in range(0, x.shape[1], _COLUMNS_AT_ONCE):
        columns = slice(start, start + _COLUMNS_AT_ONCE)
        yield columns, x[:, columns].T.copy()


def mean_and_std(x: Matrix) -> tuple[Vector, Vector]:
    """Per column, summed in float64, block by block of rows."""
    mean = x.mean(axis=0, dtype=np.float64)
    square = np.zeros(x.shape[1])
    for start in range(0, x.shape[0], _ROWS_AT_ONCE):
        square += np.square(x[start : start + _ROWS_AT_ONCE] - mean).sum(axis=0)
    return mean, np.sqrt(square / max(x.shape[0], 1))


def robust_scale(x: Matrix, mad_scale: float = MAD_TO_SIGMA) -> tuple[Vector, Vector]:
    """Per column: the median, and mad_scale * MAD; where MAD = 0 the standard deviation takes its place."""
    median, mad = median_and_mad(x)
    return median, np.where(mad > 0, mad_scale * mad, mean_and_std(x)[1])


def correlation(x: Matrix, columns: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
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
