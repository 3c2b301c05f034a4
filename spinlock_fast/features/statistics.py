"""Column statistics shared by cleaning, discovery and normalisation; float64, without NaN."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32] | NDArray[np.float64]
Vector = NDArray[np.float64]

MAD_TO_SIGMA = 1.4826  # standard deviations per MAD of a normal distribution

_ROWS_AT_ONCE = 16384


def median_and_mad(x: Matrix) -> tuple[Vector, Vector]:
    """Per column of x [N, F]: the median, and the median distance from it."""
    median = np.median(x, axis=0)
    mad = np.median(np.abs(x - median.astype(x.dtype)), axis=0)
    return median.astype(np.float64), mad.astype(np.float64)


def robust_scale(x: Matrix, mad_scale: float = MAD_TO_SIGMA) -> tuple[Vector, Vector]:
    """Per column: the median, and mad_scale * MAD; where MAD = 0 the standard deviation takes its place."""
    median, mad = median_and_mad(x)
    return median, np.where(mad > 0, mad_scale * mad, x.std(axis=0, dtype=np.float64))


def correlation(x: Matrix) -> NDArray[np.float64]:
    """Pearson correlation [F, F] between columns; 0 with a constant column, 1 on the diagonal."""
    mean = x.mean(axis=0, dtype=np.float64)
    scale = x.std(axis=0, dtype=np.float64)
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    total = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, x.shape[0], _ROWS_AT_ONCE):
        block = (x[start : start + _ROWS_AT_ONCE] - mean) * inverse
        total += block.T @ block
    result: NDArray[np.float64] = np.clip(total / x.shape[0], -1.0, 1.0)
    np.fill_diagonal(result, 1.0)
    return result
