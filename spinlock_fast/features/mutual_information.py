"""Contingency tables and their mutual information, adjusted for chance."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

# A hypergeometric count outside of this range around its mean has a weight below 1e-12.
_RANGE_SIGMA = 8.0
_RANGE_COUNTS = 25.0


def contingency(rows: NDArray[np.integer], columns: NDArray[np.integer], shape: tuple[int, int]) -> Counts:
    """[R, C] number of joint occurrences of row label r and column label c."""
    flat = rows.astype(np.int64) * shape[1] + columns
    return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)


def entropy(counts: Counts) -> float:
    """Entropy of counts of any shape in nats."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def mutual_information(table: Counts) -> float:
    """I = sum p_ij ln(p_ij / (p_i p_j)) in nats."""
    return max(0.0, entropy(table.sum(1)) + entropy(table.sum(0)) - entropy(table))


def expected_mutual_information(table: Counts) -> float:
    """Expected I under random pairing of the labels, the hypergeometric model of Vinh et al. (2010).

    E I = sum_ij sum_n (n / N) ln(N n / (a_i b_j)) P(n), P hypergeometric. All cells are summed together, each over the
    counts of non-negligible weight.
    """
    a, b, N = margins(table)
    if a.size < 2 or b.size < 2:
        return 0.0
    log_factorial, log = log_tables(N)
    a, b = (v.ravel() for v in np.broadcast_arrays(a[:, None], b[None]))
    mean = a * b / N
    sigma = np.sqrt(mean * (N - a) / N * (N - b) / max(N - 1, 1))
    half_width = _RANGE_SIGMA * sigma + _RANGE_COUNTS
    low = np.maximum(np.maximum(1, a + b - N), np.floor(mean - half_width)).astype(np.int64)
    high = np.minimum(np.minimum(a, b), np.ceil(mean + half_width)).astype(np.int64)
    lengths = np.maximum(high - low + 1, 0)
    cell = np.repeat(np.arange(a.size), lengths)
    n = np.arange(cell.size) - np.repeat(np.cumsum(lengths) - lengths, lengths) + low[cell]
    log_margins = log_factorial[a] + log_factorial[b] + log_factorial[N - a] + log_factorial[N - b] - log_factorial[N]
    a, b = a[cell], b[cell]
    log_arrangements = log_factorial[n] + log_factorial[a - n] + log_factorial[b - n] + log_factorial[N - a - b + n]
    log_ratio = log[n] + (log[N] - log[a] - log[b])
    return float((n / N * log_ratio * np.exp(log_margins[cell] - log_arrangements)).sum())


def adjusted_mutual_information(table: Counts) -> float:
    """(I - E I) / ((H_rows + H_columns) / 2 - E I): 0 for independent, 1 for identical labels (Vinh et al. 2010)."""
    return chance_adjusted(mutual_information(table), expected_mutual_information(table), mean_entropy(table))


def chance_adjusted(information: float, expected: float, upper: float) -> float:
    """(information - expected) / (upper - expected); 0 where both bounds coincide."""
    span = upper - expected
    return (information - expected) / span if span > 1e-12 else 0.0


def mean_entropy(table: Counts) -> float:
    return (entropy(table.sum(1)) + entropy(table.sum(0))) / 2


def margins(table: Counts) -> tuple[Counts, Counts, int]:
    a, b = table.sum(1), table.sum(0)
    return a[a > 0], b[b > 0], int(table.sum())


@lru_cache(maxsize=4)
def log_tables(total: int) -> tuple[Array, Array]:
    """ln(n!) and ln(n) for n in 0..total, with 0 in place of ln(0)."""
    n = np.arange(total + 1)
    return gammaln(n + 1.0), np.log(np.maximum(n, 1))
