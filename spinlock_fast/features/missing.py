"""Statistics of raw columns that replace missing values, from a bounded sample of the training rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.feature_source import DatasetInfo, FeatureSource
from spinlock_fast.features.statistics import known_median, known_robust_scale, robust_scale

Rows = NDArray[np.int64]

_MOST_ROWS = 50_000
_MOST_BYTES = 1 << 27  # 2,080 rows of the TEMPORAL family: the standard error of a median is 3 % of the spread
_ROWS_WITHOUT_GAPS = 512  # for a position where no training row misses a value, but new data may
_STANDARDIZE_ROWS = 8192


def column_medians(source: FeatureSource, family: str, training_rows: Rows, memory_budget: int) -> Tensor:
    """What replaces the missing values of a family: float32 of a row's shape.

    The median of each position over the training rows (over 512 of them at most where none misses a value); where no
    training row has a value, that of the last axis's column over all positions; NaN where the column has no value at
    all. Where the family takes more than 50,000 rows or 128 MiB, the medians are those of training rows in chunks
    spread evenly over the data set.
    """
    info = source.datasets[family]
    values = _sampled(source, family, training_rows, _MOST_ROWS, min(_MOST_BYTES, memory_budget // 8))
    flat = values.reshape(len(values), -1)
    by_position = known_median(flat[:: -(-len(flat) // _ROWS_WITHOUT_GAPS)])
    gaps = np.flatnonzero(np.isnan(flat.sum(0)))
    if len(flat) > _ROWS_WITHOUT_GAPS and gaps.size:
        by_position[gaps] = known_median(flat[:, gaps])
    by_position = by_position.reshape(info.row_shape)
    unknown = np.isnan(by_position)
    if unknown.any() and len(info.row_shape) > 1:
        by_column = known_median(values.reshape(-1, info.row_shape[-1]))
        by_position = np.where(unknown, by_column, by_position)
    return torch.from_numpy(by_position).float()


def raw_statistics(
    source: FeatureSource, family: str, training_rows: Rows | None, memory_budget: int
) -> tuple[Tensor, Tensor]:
    """Median and robust scale per last-axis column of raw values, from rows spread evenly over the data set.

    Args:
        training_rows: statistics of the known values of these rows; None: of all rows, a missing value counts as 0.
    """
    width = source.datasets[family].row_shape[-1]
    # The sample, its copy without NaN and its deviations from the median exist together.
    values = _sampled(source, family, training_rows, _STANDARDIZE_ROWS, memory_budget // 4).reshape(-1, width)
    if training_rows is None:
        center, scale = robust_scale(np.nan_to_num(values, nan=0.0))
    else:
        center, scale = known_robust_scale(np.nan_to_num(values, nan=np.nan))
        center = np.where(np.isnan(center), 0.0, center)
    scale = np.where(scale > 0, scale, 1.0)
    return torch.from_numpy(center).float(), torch.from_numpy(scale).float()


def _sampled(
    source: FeatureSource, family: str, rows: Rows | None, most_rows: int, most_bytes: int
) -> NDArray[np.float32]:
    """Raw values of some of the rows (None: of all), whole chunks spread evenly over the data set."""
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
    """One line: how many values of a family were filled, in which columns of its last axis.

    Args:
        counts: [D] missing values of each column.
        dropped: [D] columns without a value in the training rows.
        names: [D] of the columns; numbers when not given.
        filling: what took their place, in words.
    """
    called = names or [f"column {i}" for i in range(len(counts))]
    filled = np.flatnonzero((counts > 0) & ~dropped)
    parts = []
    if filled.size:
        parts.append(
            f"{counts[filled].sum():,} missing values filled with {filling} in "
            f"{_listed([f'{called[i]} ({counts[i]:,})' for i in filled])}"
        )
    if dropped.any():
        parts.append(
            f"no value in the training rows, so left out: {_listed([called[i] for i in np.flatnonzero(dropped)])}"
        )
    return f"{family}: {'; '.join(parts)}"


def _listed(names: list[str], most: int = 6) -> str:
    text = ", ".join(name[:60] for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most:,} more columns"
