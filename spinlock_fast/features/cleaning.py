"""Column cleaning: drops constant and duplicate columns and clips outliers; fitted once, applied to new data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.config.schema import FeatureCleaningConfig
from spinlock_fast.data.payload_checks import checked_array
from spinlock_fast.errors import DataError
from spinlock_fast.features.statistics import (
    Matrix,
    correlation,
    map_column_blocks,
    map_on_threads,
    mean_and_std,
    median_and_mad,
)

_ENTROPY_BINS = 50
_SCORED_AT_ONCE = 16  # columns


@dataclass(frozen=True)
class FeatureCleaner:
    """A fitted cleaner of C raw columns, F of which are selected."""

    keep: NDArray[np.bool_]  # [C]
    fill: NDArray[np.float64]  # [C] median of each column, which replaces NaN
    low: NDArray[np.float64]  # [F] clip bounds; -inf and inf where a column is not clipped
    high: NDArray[np.float64]  # [F]

    def __call__(self, x: Matrix) -> NDArray[np.float32]:
        """Columns [N, C] -> cleaned features [N, F]."""
        return self.clip(self.select(x))

    def select(self, x: Matrix) -> NDArray[np.float32]:
        """Selected columns [N, F] of columns [N, C] with NaN replaced; a copy."""
        if x.ndim != 2 or x.shape[1] != self.keep.size:
            raise DataError(f"expected {self.keep.size} columns, got shape {x.shape}")
        selected: NDArray[np.float32] = x[:, self.keep].astype(np.float32, copy=False)
        rows, columns = np.nonzero(np.isnan(selected))
        selected[rows, columns] = self.fill[self.keep].astype(np.float32)[columns]
        return selected

    def clip(self, selected: NDArray[np.float32]) -> NDArray[np.float32]:
        """Clips selected columns [N, F] in place."""
        return np.clip(selected, self.low.astype(np.float32), self.high.astype(np.float32), out=selected)

    def state(self) -> dict[str, Any]:
        """State for `from_state`: tensors."""
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in vars(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], features: int | None = None) -> FeatureCleaner:
        """The cleaner with a saved state, of the given number of features (None: any); raises DataError."""
        keep = checked_array(state["keep"], "keep", "b", [None])
        features = int(keep.sum()) if features is None else features
        if keep.sum() != features:
            raise DataError(f"keep has {keep.sum()} features, expected {features}")
        fill = checked_array(state["fill"], "fill", "f", keep.shape)
        low, high = (checked_array(state[name], name, "f", [features]) for name in ("low", "high"))
        if not (low <= high).all():  # also refuses NaN
            raise DataError("low must be at most high")
        return cls(keep, fill, low, high)


def fit_cleaner(x: Matrix, config: FeatureCleaningConfig) -> FeatureCleaner:
    """Fits a cleaner.

    1. NaN becomes the column's median. 2. Columns with a standard deviation below variance_threshold are dropped.
    3. Of two columns with |correlation| above deduplicate_threshold, the one with the smaller
    entropy * IQR * (1 - share of outliers) is dropped. 4. Clip bounds are median -/+ mad_threshold * mad_scale * MAD,
    infinite where MAD = 0; outlier_method selects other bounds.

    Args:
        x: [N, C] columns of the training rows.

    Raises:
        DataError: all columns are constant.
    """
    values, fill = _fill_nan(x)
    if not config.enabled:
        bound = np.full(values.shape[1], np.inf)
        return FeatureCleaner(np.ones(values.shape[1], dtype=bool), fill, -bound, bound)
    keep = mean_and_std(values)[1] >= max(config.variance_threshold, np.finfo(np.float64).tiny)
    if not keep.any():
        raise DataError(
            f"all {values.shape[1]} columns are constant (standard deviation below {config.variance_threshold:g})"
        )
    keep[_duplicates(values, np.flatnonzero(keep), config.deduplicate_threshold)] = False
    low, high = clip_bounds(values[:, keep], config)
    return FeatureCleaner(keep, fill, low, high)


def _fill_nan(x: Matrix) -> tuple[Matrix, NDArray[np.float64]]:
    """x (a copy where it has NaN) with NaN replaced by column medians, and the medians (0 for a column of NaN)."""
    fill = np.zeros(x.shape[1])
    missing = np.zeros(x.shape[1], dtype=bool)

    def find(columns: slice, block: Matrix) -> None:
        nan = np.isnan(block)
        missing[columns] = nan.any(axis=1)
        some = ~nan.all(axis=1)
        fill[columns][some] = np.nanmedian(block[some], axis=1)

    map_column_blocks(x, find)
    if missing.any():
        x = np.where(np.isnan(x), fill.astype(x.dtype), x)
    return x, fill


def clip_bounds(x: Matrix, config: FeatureCleaningConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per column of x [N, F]: lower and upper bound of values that are not outliers."""
    if config.outlier_method == "mad":
        median, mad = median_and_mad(x)
        half_width = np.where(mad > 0, config.mad_threshold * config.mad_scale * mad, np.inf)
        return median - half_width, median + half_width
    if config.outlier_method == "percentile":
        low, high = np.percentile(x, config.percentile_range, axis=0)
        # A column with one rare value must not become constant.
        return np.where(high > low, low, -np.inf), np.where(high > low, high, np.inf)
    if config.outlier_method == "iqr":
        first, third = np.percentile(x, [25.0, 75.0], axis=0)
        half_width = np.where(third > first, config.iqr_multiplier * (third - first), np.inf)
        return first - half_width, third + half_width
    bound = np.full(x.shape[1], np.inf)
    return -bound, bound


def _duplicates(x: Matrix, candidates: NDArray[np.int64], threshold: float) -> NDArray[np.int64]:
    """Candidates to drop: each has a correlation above the threshold with a more informative column that stays."""
    is_duplicate = np.abs(correlation(x, candidates)) > threshold
    np.fill_diagonal(is_duplicate, False)
    duplicated = np.flatnonzero(is_duplicate.any(axis=0))
    score = np.full(candidates.size, np.inf)

    def rate(part: NDArray[np.int64]) -> None:
        score[part] = informativeness(x[:, candidates[part]].astype(np.float64))

    map_on_threads(rate, np.array_split(duplicated, -(-duplicated.size // _SCORED_AT_ONCE)) if duplicated.size else [])
    dropped = np.zeros(candidates.size, dtype=bool)
    for column in duplicated[np.argsort(-score[duplicated], kind="stable")]:
        if not dropped[column]:
            dropped |= is_duplicate[column]
            dropped[column] = False
    return candidates[dropped]


def informativeness(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per column of x [N, F]: entropy (nats, 50-bin histogram) * IQR * (1 - share beyond 5 sigma)."""
    N, F = x.shape
    low, high = x.min(axis=0), x.max(axis=0)
    width = np.where(high > low, high - low, 1.0)
    bins = np.minimum((x - low) / width * _ENTROPY_BINS, _ENTROPY_BINS - 1).astype(np.int64)
    counts = np.bincount((bins + np.arange(F) * _ENTROPY_BINS).ravel(), minlength=F * _ENTROPY_BINS)
    share = counts.reshape(F, _ENTROPY_BINS) / N
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=1)
    first, third = np.percentile(x, [25.0, 75.0], axis=0)
    floor, ceiling = clip_bounds(x, FeatureCleaningConfig())
    outliers = ((x < floor) | (x > ceiling)).mean(axis=0)
    result: NDArray[np.float64] = entropy * (third - first) * (1.0 - outliers)
    return result
