"""Means, spreads and paired differences of the measures of a variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and spread over seeds."""

    count: int
    mean: float
    spread: float | None  # standard deviation with divisor n - 1; None of one value


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference to the base over seeds that both have, with the interval of Student's t."""

    pairs: int
    mean: float
    low: float | None  # None of one pair
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval exists and does not contain 0."""
        return self.low is not None and self.high is not None and (self.low > 0.0 or self.high < 0.0)


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean and standard deviation of values; None of no values."""
    if not values:
        return None
    return Summary(len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> PairedDifference | None:
    """The difference of a measure to the base.

    The mean m of the n differences of equal seeds has the interval m +/- t s / sqrt(n), where s is their standard
    deviation and t the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom.

    Args:
        values: measure of the variant by seed.
        base: measure of the base by seed.

    Returns:
        None if no seed is in both.
    """
    differences = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    summary = summarize(differences)
    if summary is None:
        return None
    if summary.spread is None:
        return PairedDifference(1, summary.mean, None, None)
    quantile = float(stats.t.ppf((1.0 + CONFIDENCE) / 2.0, summary.count - 1))
    half = quantile * summary.spread / math.sqrt(summary.count)
    return PairedDifference(summary.count, summary.mean, summary.mean - half, summary.mean + half)
