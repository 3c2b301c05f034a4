"""Clipping and normalisation of a feature matrix in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.config.schema import FeatureCleaningConfig
from spinlock_fast.features.cleaning import clip_bounds
from spinlock_fast.features.normalize import Normalizer, fit_normalizer
from spinlock_fast.features.statistics import center_and_scale, mean_and_std

_SAMPLED_ROWS = 50_000
_SAMPLED_BYTES = 1 << 28
_ROWS_AT_ONCE = 8192

# A matrix counts as standardised where centres and scales differ from 0 and 1 by at most these tolerances plus
# sampling error.
_CENTER_TOLERANCE = 0.1
_SCALE_TOLERANCE = 0.25
_ERRORS = 4.0  # standard errors
_SMALL_SHARE = 0.1  # share of columns whose scale may be smaller


@dataclass(frozen=True)
class MatrixNormalizer:
    """(clip(x, low, high) - center) / scale per column [F], in float64."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    normalizer: Normalizer

    def __call__(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """[N, F] of any numeric type -> [N, F] float32."""
        result = np.empty(x.shape, dtype=np.float32)
        for start in range(0, len(x), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            result[rows] = self.normalizer(np.clip(x[rows].astype(np.float64), self.low, self.high))
        return result

    def inverse(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised columns back to their units."""
        return self.normalizer.inverse(x)


def fit_matrix_normalizer(
    x: NDArray[Any],
    rows: NDArray[np.int64],
    cleaning: FeatureCleaningConfig,
    method: Literal["standard", "mad"],
    columns: Sequence[int] | None = None,
) -> MatrixNormalizer | None:
    """Fits clipping and standardisation to some rows of a matrix; None where it is standardised already.

    Clip bounds are those of the pipeline (`clip_bounds`), from at most 50,000 evenly spaced rows; centre and scale are
    those of all `rows`. No column is dropped: a constant one becomes 0.

    Args:
        x: [N, F] finite, of any numeric type; may be a memory map.
        rows: training rows.
        columns: columns that decide whether x is standardised; all by default.
    """
    chosen = slice(None) if columns is None else np.asarray(columns)
    most = max(1, min(_SAMPLED_ROWS, _SAMPLED_BYTES // (8 * x.shape[1])))
    sample = np.asarray(x[rows[:: -(-len(rows) // most)]], dtype=np.float64)
    if _standardized(*center_and_scale(sample[:, chosen], method), len(sample)):
        return None
    training_rows = _RowSubset(x, rows)
    if method == "standard" and len(sample) < len(rows):  # sample statistics of heavy-tailed columns are unreliable
        mean, std = mean_and_std(training_rows)  # type: ignore[arg-type]
        if _standardized(mean[chosen], std[chosen], len(rows)):
            return None
    low, high = np.full(x.shape[1], -np.inf), np.full(x.shape[1], np.inf)
    if cleaning.enabled:
        low, high = clip_bounds(sample, cleaning)
    if method == "mad":
        return MatrixNormalizer(low, high, fit_normalizer(np.clip(sample, low, high), method))
    center, scale = mean_and_std(replace(training_rows, low=low, high=high))  # type: ignore[arg-type]
    constant = scale <= np.finfo(np.float32).eps * np.abs(center)  # its deviations are rounding errors
    return MatrixNormalizer(low, high, Normalizer(method, center, np.where(constant, 1.0, scale)))


@dataclass(frozen=True)
class _RowSubset:
    """Lazily clipped rows of a matrix, for `mean_and_std`."""

    matrix: NDArray[Any]
    numbers: NDArray[np.int64]
    low: NDArray[np.float64] | float = -np.inf
    high: NDArray[np.float64] | float = np.inf

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.numbers), self.matrix.shape[1]

    def __getitem__(self, places: slice) -> NDArray[np.float64]:
        return np.clip(self.matrix[self.numbers[places]].astype(np.float64), self.low, self.high)


def _standardized(center: NDArray[np.float64], scale: NDArray[np.float64], rows: int) -> bool:
    error = _ERRORS / math.sqrt(rows)
    if (np.abs(center) > _CENTER_TOLERANCE + error).any() or (scale > 1.0 + _SCALE_TOLERANCE + error).any():
        return False
    varying = scale[scale > 0]
    return bool((varying < 1.0 - _SCALE_TOLERANCE - error).sum() <= _SMALL_SHARE * varying.size)
