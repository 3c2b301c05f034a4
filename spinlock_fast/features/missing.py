"""Column statistics for missing values and standardisation, from a bounded sample of the training rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.feature_source import DatasetInfo, FeatureSource
from spinlock_fast.features.statistics import nan_median, nan_robust_scale, robust_scale

Rows = NDArray[np.int64]

_MAX_ROWS = 50_000
_MAX_BYTES = 1 << 27  # 2,080 rows of the TEMPORAL family: the standard error of a median is 3 % of the spread
_ROWS_WITHOUT_GAPS = 512  # rows used for a position without missing values in the training rows
_STANDARDIZE_ROWS = 8192


def column_medians(source: FeatureSource, family: str, training_rows: Rows, memory_budget: int) -> Tensor:
    """Values that replace the missing ones of a family: float32 of a row's shape.

    The median of each position over the training rows, or over at most 512 of them where none is missing. A position
    without a value gets the median of its column of the last axis over all positions; NaN marks a column without any
    value. Beyond 50,000 rows or 128 MiB, evenly spaced chunks of training rows are used.
    """
    info = source.datasets[family]
    values = _sampled(source, family, training_rows, _MAX_ROWS, min(_MAX_BYTES, memory_budget // 8))
    flat = values.reshape(len(values), -1)
    by_position = nan_median(flat[:: -(-len(flat) // _ROWS_WITHOUT_GAPS)])
    gaps = np.flatnonzero(np.isnan(flat).any(0))
    if len(flat) > _ROWS_WITHOUT_GAPS and gaps.size:
        by_position[gaps] = nan_median(flat[:, gaps])
    by_position = by_position.reshape(info.row_shape)
    unknown = np.isnan(by_position)
    if unknown.any() and len(info.row_shape) > 1:
        by_column = nan_median(values.reshape(-1, info.row_shape[-1]))
        by_position = np.where(unknown, by_column, by_position)
    return torch.from_numpy(by_position).float()


def raw_statistics(
    source: FeatureSource, family: str, training_rows: Rows | None, memory_budget: int
) -> tuple[Tensor, Tensor]:
    """Median and robust scale per column of the last axis, from evenly spaced rows of the data set.

    Args:
        training_rows: rows whose non-missing values are used; None: all rows, with missing values as 0.
    """
    width = source.datasets[family].row_shape[-1]
    # The sample, its copy without NaN and the deviations from the median are in memory at once.
    values = _sampled(source, family, training_rows, _STANDARDIZE_ROWS, memory_budget // 4).reshape(-1, width)
    if training_rows is None:
        center, scale = robust_scale(np.nan_to_num(values, nan=0.0))
    else:
        center, scale = nan_robust_scale(np.nan_to_num(values, nan=np.nan))
        center = np.where(np.isnan(center), 0.0, center)
    scale = np.where(scale > 0, scale, 1.0)
    return torch.from_numpy(center).float(), torch.from_numpy(scale).float()


def _sampled(
    source: FeatureSource, family: str, rows: Rows | None, most_rows: int, most_bytes: int
) -> NDArray[np.float32]:
    """Raw values of evenly spaced chunks of the data set, restricted to `rows` (None: all rows)."""
    info = source.datasets[family]
    chosen = _spread_rows(info, most_rows, most_bytes)
    if rows is not None:
        inside = chosen[np.isin(chosen, rows)]
        chosen = inside if inside.size else rows[:: max(1, rows.size // chosen.size)][: chosen.size]
    return source.read_rows(family, chosen)


def _spread_rows(info: DatasetInfo, most_rows: int, most_bytes: int) -> Rows:
    rows = max(1, min(info.rows, most_rows, most_bytes // info.row_bytes))
    chunk = rows if rows == info.rows else max(1, min(info.chunk_rows, rows))
    starts = np.linspace(0, info.rows - chunk, max(1, rows // chunk)).astype(np.int64)
    chosen: Rows = (starts[:, None] + np.arange(chunk)).ravel()
    return chosen


def missing_report(
    family: str, counts: NDArray[np.int64], dropped: NDArray[np.bool_], names: list[str] | None, filling: str
) -> str:
    """One line on the number of filled values of a family and their columns.

    Args:
        counts: [D] missing values of each column.
        dropped: [D] columns without a value in the training rows.
        names: [D] column names; indices by default.
        filling: description of the replacement.
    """
    column_names = names or [f"column {i}" for i in range(len(counts))]
    filled = np.flatnonzero((counts > 0) & ~dropped)
    parts = []
    if filled.size:
        parts.append(
            f"{counts[filled].sum():,} missing values filled with {filling} in "
            f"{_list_names([f'{column_names[i]} ({counts[i]:,})' for i in filled])}"
        )
    if dropped.any():
        parts.append(
            f"dropped, no value in the training rows: {_list_names([column_names[i] for i in np.flatnonzero(dropped)])}"
        )
    return f"{family}: {'; '.join(parts)}"


def _list_names(names: list[str], most: int = 6) -> str:
    text = ", ".join(name[:60] for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most:,} more columns"
