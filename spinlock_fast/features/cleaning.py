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
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import DataError
from spinlock_fast.features.blocks import Blocks, Matrix, TransformedRows, extremes, sum_of_blocks
from spinlock_fast.features.statistics import correlation, mean_and_std, median, median_and_mad, percentiles

_ENTROPY_BINS = 50


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


def fit_cleaner(x: Blocks, config: FeatureCleaningConfig, ranks: Ranks = SINGLE) -> FeatureCleaner:
    """Fits a cleaner; reads x block by block.

    1. NaN becomes the column's median. 2. Columns with a standard deviation below variance_threshold are dropped.
    3. Of two columns with |correlation| above deduplicate_threshold, the one with the smaller
    entropy * IQR * (1 - share of outliers) is dropped. 4. Clip bounds are median -/+ mad_threshold * mad_scale * MAD,
    infinite where MAD = 0; outlier_method selects other bounds.

    Args:
        x: [N, C] columns of the training rows.
        ranks: each reads a part of the rows; the result is the same for any number of ranks.

    Raises:
        DataError: all columns are constant.
    """
    values, fill = _fill_nan(x, ranks)
    if not config.enabled:
        bound = np.full(values.shape[1], np.inf)
        return FeatureCleaner(np.ones(values.shape[1], dtype=bool), fill, -bound, bound)
    keep = mean_and_std(values, ranks)[1] >= max(config.variance_threshold, np.finfo(np.float64).tiny)
    if not keep.any():
        raise DataError(
            f"all {values.shape[1]} columns are constant (standard deviation below {config.variance_threshold:g}) "
            "or without values; of columns on a small scale, families.NAME.standardize: true"
        )
    keep[_duplicates(values, np.flatnonzero(keep), config.deduplicate_threshold, ranks)] = False
    low, high = clip_bounds(TransformedRows(values, lambda block: block[:, keep], int(keep.sum())), config, ranks)
    return FeatureCleaner(keep, fill, low, high)


def _fill_nan(x: Blocks, ranks: Ranks) -> tuple[Blocks, NDArray[np.float64]]:
    """x with NaN replaced by column medians, and the medians (0 for a column of NaN)."""
    missing = sum_of_blocks(x, lambda block: np.isnan(block).sum(axis=0).astype(np.float64), x.shape[1:], ranks)
    if not missing.any():
        return x, median(x, ranks)
    known = (x.shape[0] - missing).astype(np.int64)
    fill = np.where(known > 0, median(x, ranks, known), 0.0)
    filled = TransformedRows(x, lambda block: np.where(np.isnan(block), fill.astype(block.dtype), block), x.shape[1])
    return filled, fill


def clip_bounds(
    x: Blocks, config: FeatureCleaningConfig, ranks: Ranks = SINGLE
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per column of x [N, F]: lower and upper bound of values that are not outliers."""
    if config.outlier_method == "mad":
        center, mad = median_and_mad(x, ranks)
        half_width = np.where(mad > 0, config.mad_threshold * config.mad_scale * mad, np.inf)
        return center - half_width, center + half_width
    if config.outlier_method == "percentile":
        low, high = percentiles(x, config.percentile_range, ranks)
        # A column with one rare value must not become constant.
        return np.where(high > low, low, -np.inf), np.where(high > low, high, np.inf)
    if config.outlier_method == "iqr":
        first, third = percentiles(x, [25.0, 75.0], ranks)
        half_width = np.where(third > first, config.iqr_multiplier * (third - first), np.inf)
        return first - half_width, third + half_width
    bound = np.full(x.shape[1], np.inf)
    return -bound, bound


def _duplicates(x: Blocks, candidates: NDArray[np.int64], threshold: float, ranks: Ranks) -> NDArray[np.int64]:
    """Candidates to drop: each has a correlation above the threshold with a more informative column that stays."""
    is_duplicate = np.abs(correlation(x, candidates, ranks)) > threshold
    np.fill_diagonal(is_duplicate, False)
    duplicated = np.flatnonzero(is_duplicate.any(axis=0))
    if not duplicated.size:
        return duplicated
    rated = candidates[duplicated]
    score = informativeness(TransformedRows(x, lambda block: block[:, rated].astype(np.float64), rated.size), ranks)
    dropped = np.zeros(candidates.size, dtype=bool)
    for column in duplicated[np.argsort(-score, kind="stable")]:
        if not dropped[column]:
            dropped |= is_duplicate[column]
            dropped[column] = False
    return candidates[dropped]


def informativeness(x: Blocks, ranks: Ranks = SINGLE) -> NDArray[np.float64]:
    """Per column of float64 x [N, F]: entropy (nats, 50-bin histogram) * IQR * (1 - share beyond 5 sigma)."""
    N, F = x.shape
    low, high = extremes(x, ranks)
    width = np.where(high > low, high - low, 1.0)
    first, third = percentiles(x, [25.0, 75.0], ranks)
    floor, ceiling = clip_bounds(x, FeatureCleaningConfig(), ranks)

    def counts(block: Matrix) -> NDArray[np.float64]:
        """[F, bins + 1] rows in each bin, and rows beyond 5 sigma."""
        bins = np.minimum((block - low) / width * _ENTROPY_BINS, _ENTROPY_BINS - 1).astype(np.int64)
        in_bins = np.bincount((bins + np.arange(F) * _ENTROPY_BINS).ravel(), minlength=F * _ENTROPY_BINS)
        outside = ((block < floor) | (block > ceiling)).sum(axis=0)
        return np.hstack([in_bins.reshape(F, _ENTROPY_BINS), outside[:, None]]).astype(np.float64)

    share = sum_of_blocks(x, counts, (F, _ENTROPY_BINS + 1), ranks) / N
    share, outliers = share[:, :-1], share[:, -1]
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=1)
    result: NDArray[np.float64] = entropy * (third - first) * (1.0 - outliers)
    return result
