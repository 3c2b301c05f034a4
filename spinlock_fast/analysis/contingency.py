"""Contingency tables, their mutual information, and its distribution under independence."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import random_table

from spinlock_fast.analysis.significance import Array, Counts

# A hypergeometric count outside of this range around its mean has a weight below 1e-12.
_RANGE_SIGMA = 8.0
_RANGE_COUNTS = 25.0

_EXCEEDANCES = 10  # gives a Monte Carlo p value a relative standard error of about a third
_FIRST_TABLES = 199
_CELLS_AT_ONCE = 2_000_000


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
    a, b, N = _margins(table)
    if a.size < 2 or b.size < 2:
        return 0.0
    log_factorial, log = _log_tables(N)
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
    return chance_adjusted(mutual_information(table), expected_mutual_information(table), _mean_entropy(table))


def chance_adjusted(information: float, expected: float, upper: float) -> float:
    """(information - expected) / (upper - expected); 0 where both bounds coincide."""
    span = upper - expected
    return (information - expected) / span if span > 1e-12 else 0.0


def _mean_entropy(table: Counts) -> float:
    return (entropy(table.sum(1)) + entropy(table.sum(0))) / 2


def _margins(table: Counts) -> tuple[Counts, Counts, int]:
    a, b = table.sum(1), table.sum(0)
    return a[a > 0], b[b > 0], int(table.sum())


@lru_cache(maxsize=4)
def _log_tables(total: int) -> tuple[Array, Array]:
    """ln(n!) and ln(n) for n in 0..total, with 0 in place of ln(0)."""
    n = np.arange(total + 1)
    return gammaln(n + 1.0), np.log(np.maximum(n, 1))


class PermutationTest:
    """Permutation test of the mutual information of two labels, with sequential stopping.

    Permuting a label preserves the margins, so tables are drawn with fixed margins (Patefield 1981), which is exact and
    needs no pass over the data. Drawing stops once ten tables reach the observed information (Besag and Clifford 1991).

    Args:
        table: [R, C] counts.
        generator: source of random numbers.

    Attributes:
        tables: number of drawn tables.
        exceeded: number of those with at least the observed information.
    """

    def __init__(self, table: Counts, generator: np.random.Generator) -> None:
        self.information = mutual_information(table)
        self.expected = expected_mutual_information(table)
        self.upper_bound = _mean_entropy(table)
        self.tables = 0
        self.exceeded = 0
        self._null_information: list[Array] = []
        self._generator = generator
        self._rows, self._columns, self._total = _margins(table)
        self._varies = self._rows.size > 1 and self._columns.size > 1

    @property
    def ami(self) -> float:
        return chance_adjusted(self.information, self.expected, self.upper_bound)

    @property
    def p(self) -> float:
        """p value of the observed information; NaN where a label does not vary."""
        if not self._varies:
            return float("nan")
        if self.exceeded >= _EXCEEDANCES:
            return self.exceeded / self.tables
        return (self.exceeded + 1) / (self.tables + 1)

    @property
    def is_decided(self) -> bool:
        return not self._varies or self.exceeded >= _EXCEEDANCES

    def null_quantile(self, level: float) -> float:
        """Quantile of the AMI under the null hypothesis, from the first batch of tables."""
        if not self._null_information:
            return float("nan")
        return chance_adjusted(float(np.quantile(self._null_information[0], level)), self.expected, self.upper_bound)

    def draw(self, tables: int) -> None:
        """Draws tables up to a total of `tables`; stops early once the test is decided."""
        if not self._varies:
            return
        step = max(1, _CELLS_AT_ONCE // (self._rows.size * self._columns.size))
        while self.tables < tables and not self.is_decided:
            count = min(tables - self.tables, step)
            drawn = self._permuted_information(count)
            reached = np.flatnonzero(drawn >= self.information - 1e-12)
            if self.exceeded + reached.size >= _EXCEEDANCES:
                # Sequential stopping: tables after the tenth exceedance do not count.
                self.tables += int(reached[_EXCEEDANCES - self.exceeded - 1]) + 1
                self.exceeded = _EXCEEDANCES
            else:
                self.tables += count
                self.exceeded += reached.size
            if not self._null_information:
                self._null_information.append(drawn)

    def _permuted_information(self, count: int) -> Array:
        drawn = random_table.rvs(
            self._rows, self._columns, method="patefield", size=count, random_state=self._generator
        ).astype(np.int64)
        log = _log_tables(self._total)[1]
        joint = (drawn * log[drawn]).sum((1, 2))
        margins = (self._rows * log[self._rows]).sum() + (self._columns * log[self._columns]).sum()
        information: Array = (joint - margins) / self._total + log[self._total]
        return information


def run_permutation_tests(tests: list[PermutationTest], alpha: float) -> None:
    """Draws tables until every test is decided at false discovery rate alpha.

    With m tests, a single discovery needs p <= alpha / m and hence m / alpha tables. Most tests need fewer: each stage
    continues only the tests with fewer than ten exceedances.
    """
    most = int(np.ceil(len(tests) / alpha)) if tests else 0
    stages = [_FIRST_TABLES]
    while stages[-1] < most:
        stages.append(min(stages[-1] * 5 + 4, most))
    for tables in stages:
        for test in tests:
            test.draw(tables)
        open_tests = [test for test in tests if not test.is_decided]
        if not open_tests:
            return
        # Stop where every open test is below the threshold of Benjamini and Hochberg.
        p = np.array([test.p for test in tests])
        threshold = alpha * len(open_tests) / max(int(np.isfinite(p).sum()), 1)
        if max(test.p for test in open_tests) <= threshold:
            return
