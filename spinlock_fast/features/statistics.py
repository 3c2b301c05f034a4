"""Column statistics shared by cleaning, discovery and normalisation; float64.

Functions named nan_* ignore NaN; the others do not accept NaN. Results do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.features.blocks import Blocks, Matrix, TransformedRows, map_column_blocks, sum_of_blocks
from spinlock_fast.features.order_statistics import order_statistics

Vector = NDArray[np.float64]

MAD_TO_SIGMA = 1.4826  # standard deviations per MAD of a normal distribution

_SORTED_BYTES = 1 << 27  # of a matrix whose columns are sorted in memory; `order_statistics` reads larger ones


def is_sorted_in_memory(x: Blocks) -> bool:
    """Whether medians and quantiles of x are found by sorting a copy of its columns."""
    return bool(x.shape[0] * x.shape[1] * x[:0].itemsize <= _SORTED_BYTES)


def median(x: Blocks, ranks: Ranks = SINGLE, counts: NDArray[np.int64] | None = None) -> Vector:
    """Per column of x [N, F]: the median, rounded to the type of x.

    Args:
        counts: [F] how many values of a column to use if the others are NaN; all by default.
    """
    if counts is None and is_sorted_in_memory(x):
        result = np.empty(x.shape[1])

        def fill(columns: slice, block: Matrix) -> None:
            result[columns] = np.median(block, axis=1, overwrite_input=True)

        map_column_blocks(x, fill)
        return result
    count = np.full(x.shape[1], x.shape[0]) if counts is None else counts
    middle = order_statistics(x, np.stack([np.maximum(count - 1, 0) // 2, count // 2]), ranks)
    found: Vector = middle.mean(axis=0).astype(np.float64)
    return found


def median_and_mad(x: Blocks, ranks: Ranks = SINGLE) -> tuple[Vector, Vector]:
    """Per column of x [N, F]: the median, and the median distance from it."""
    if not is_sorted_in_memory(x):
        center = median(x, ranks)
        distances = TransformedRows(x, lambda block: np.abs(block - center.astype(block.dtype)), x.shape[1])
        return center, median(distances, ranks)
    center, mad = np.empty(x.shape[1]), np.empty(x.shape[1])

    def fill(columns: slice, block: Matrix) -> None:
        center[columns] = np.median(block, axis=1)
        deviation = np.abs(block - center[columns, None].astype(block.dtype))
        mad[columns] = np.median(deviation, axis=1, overwrite_input=True)

    map_column_blocks(x, fill)
    return center, mad


def percentiles(x: Blocks, percentages: Sequence[float], ranks: Ranks = SINGLE) -> Vector:
    """[Q, F] percentiles of each column, interpolated linearly as by `numpy.percentile`."""
    if is_sorted_in_memory(x):
        result = np.empty((len(percentages), x.shape[1]))

        def fill(columns: slice, block: Matrix) -> None:
            result[:, columns] = np.percentile(block, percentages, axis=1, overwrite_input=True)

        map_column_blocks(x, fill)
        return result
    place = np.asarray(percentages) / 100.0 * (x.shape[0] - 1)
    below = np.floor(place).astype(np.int64)
    places = np.stack([below, np.minimum(below + 1, x.shape[0] - 1)])  # [2, Q]
    places = np.repeat(places.reshape(-1, 1), x.shape[1], axis=1)
    low, high = order_statistics(x, places, ranks).reshape(2, len(place), -1)
    part = (place - below)[:, None]
    found: Vector = np.where(part < 0.5, low + (high - low) * part, high - (high - low) * (1.0 - part))
    return found


def mean_and_std(x: Blocks, ranks: Ranks = SINGLE) -> tuple[Vector, Vector]:
    """Mean and standard deviation per column, accumulated in float64 over blocks of rows."""
    N, F = x.shape
    mean = sum_of_blocks(x, lambda block: block.sum(axis=0, dtype=np.float64), (F,), ranks) / max(N, 1)
    square = sum_of_blocks(x, lambda block: np.square(block - mean).sum(axis=0), (F,), ranks)
    return mean, np.sqrt(square / max(N, 1))


def robust_scale(x: Blocks, mad_scale: float = MAD_TO_SIGMA, ranks: Ranks = SINGLE) -> tuple[Vector, Vector]:
    """Per column: the median, and mad_scale * MAD, or the standard deviation where MAD = 0."""
    center, mad = median_and_mad(x, ranks)
    return center, np.where(mad > 0, mad_scale * mad, mean_and_std(x, ranks)[1])


def center_and_scale(x: Blocks, method: Literal["standard", "mad"], ranks: Ranks = SINGLE) -> tuple[Vector, Vector]:
    """Per column: mean and standard deviation, or median and robust scale."""
    return robust_scale(x, ranks=ranks) if method == "mad" else mean_and_std(x, ranks)


def nan_median(x: Matrix) -> Vector:
    """Per column of x [N, F]: the median of the non-NaN values; NaN where there is none."""
    result = np.full(x.shape[1], np.nan)

    def fill(columns: slice, block: Matrix) -> None:
        out = result[columns]  # a view
        middle = [(block.shape[1] - 1) // 2, block.shape[1] // 2]
        block.partition([*middle, block.shape[1] - 1], axis=1)  # sorts NaN to the end; twice as fast as np.median
        out[:] = block[:, middle].mean(axis=1)
        for i in np.flatnonzero(np.isnan(block[:, -1])):
            known = block[i, ~np.isnan(block[i])]
            out[i] = np.median(known) if known.size else np.nan

    map_column_blocks(x, fill)
    return result


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


def correlation(x: Blocks, columns: NDArray[np.int64] | None = None, ranks: Ranks = SINGLE) -> NDArray[np.float64]:
    """Pearson correlation [F, F] of all or some columns; 0 with a constant column, 1 on the diagonal."""
    chosen = np.arange(x.shape[1]) if columns is None else columns
    mean, scale = (values[chosen] for values in mean_and_std(x, ranks))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)

    def products(rows: Matrix) -> NDArray[np.float64]:
        block = ((rows if columns is None else rows[:, chosen]) - mean) * inverse
        result: NDArray[np.float64] = block.T @ block
        return result

    total = sum_of_blocks(x, products, (chosen.size, chosen.size), ranks)
    result: NDArray[np.float64] = np.clip(total / x.shape[0], -1.0, 1.0)
    np.fill_diagonal(result, 1.0)
    return result
