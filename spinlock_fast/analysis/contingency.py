"""Tables of counts, their information, and what chance alone would give."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import random_table

from spinlock_fast.analysis.significance import Array, Counts

# Of a hypergeometric count, what lies further out than this weighs less than 1e-12.
_REACH_SIGMA = 8.0
_REACH_COUNTS = 25.0

_EXCEEDANCES = 10  # after so many a Monte Carlo p value is settled to about a third
_FIRST_TABLES = 199
_TABLES_AT_ONCE = 2_000_000  # cells


def contingency(rows: NDArray[np.integer], columns: NDArray[np.integer], shape: tuple[int, int]) -> Counts:
    """[R, C] how often row label r meets column label c."""
    flat = rows.astype(np.int64) * shape[1] + columns
    return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)


def entropy(counts: Counts) -> float:
    """Entropy in nats of counts of any shape."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def mutual_information(table: Counts) -> float:
    """I = sum p_ij ln(p_ij / (p_i p_j)) in nats."""
    return max(0.0, entropy(table.sum(1)) + entropy(table.sum(0)) - entropy(table))


def expected_mutual_information(table: Counts) -> float:
    """Mean of I over all ways to pair the same labels at random: the hypergeometric model of Vinh et al. (2010).

    sum_ij sum_n (n / N) ln(N n / (a_i b_j)) P(n), P hypergeometric. All cells are summed together, each over the
    counts that carry weight.
    """
    a, b, N = _margins(table)
    if a.size < 2 or b.size < 2:
        return 0.0
    log_factorial, log = _log_tables(N)
    a, b = (v.ravel() for v in np.broadcast_arrays(a[:, None], b[None]))
    mean = a * b / N
    sigma = np.sqrt(mean * (N - a) / N * (N - b) / max(N - 1, 1))
    reach = _REACH_SIGMA * sigma + _REACH_COUNTS
    low = np.maximum(np.maximum(1, a + b - N), np.floor(mean - reach)).astype(np.int64)
    high = np.minimum(np.minimum(a, b), np.ceil(mean + reach)).astype(np.int64)
    lengths = np.maximum(high - low + 1, 0)
    cell = np.repeat(np.arange(a.size), lengths)
    n = np.arange(cell.size) - np.repeat(np.cumsum(lengths) - lengths, lengths) + low[cell]
    fixed = log_factorial[a] + log_factorial[b] + log_factorial[N - a] + log_factorial[N - b] - log_factorial[N]
    a, b = a[cell], b[cell]
    ways = log_factorial[n] + log_factorial[a - n] + log_factorial[b - n] + log_factorial[N - a - b + n]
    gain = log[n] + (log[N] - log[a] - log[b])
    return float((n / N * gain * np.exp(fixed[cell] - ways)).sum())


def adjusted_mutual_information(table: Counts) -> float:
    """(I - E I) / ((H_rows + H_columns) / 2 - E I): 0 for chance, 1 for equal labels (Vinh et al. 2010)."""
    return adjust(mutual_information(table), expected_mutual_information(table), _mean_entropy(table))


def adjust(information: float, expected: float, most: float) -> float:
    """(information - expected) / (most - expected); 0 where there is nothing to know."""
    room = most - expected
    return (information - expected) / room if room > 1e-12 else 0.0


def _mean_entropy(table: Counts) -> float:
    return (entropy(table.sum(1)) + entropy(table.sum(0))) / 2


def _margins(table: Counts) -> tuple[Counts, Counts, int]:
    a, b = table.sum(1), table.sum(0)
    return a[a > 0], b[b > 0], int(table.sum())


@lru_cache(maxsize=4)
def _log_tables(total: int) -> tuple[Array, Array]:
    """ln(n!) and ln(n) for n in 0..total; ln(0) counts as 0."""
    n = np.arange(total + 1)
    return gammaln(n + 1.0), np.log(np.maximum(n, 1))


class PermutationTest:
    """Whether labels share more information than they do when one of them is shuffled.

    Shuffling keeps the margins, so that tables are drawn with these margins (Patefield 1981) instead of rows being
    permuted: exact, without a pass over the data. Tables are added until ten of them, or `most`, reach the observed
    information (Besag and Clifford 1991), so that clear cases of either kind cost little.

    Args:
        table: [R, C] counts.
        generator: numpy's.
    """

    def __init__(self, table: Counts, generator: np.random.Generator) -> None:
        self.information = mutual_information(table)
        self.expected = expected_mutual_information(table)
        self.most = _mean_entropy(table)
        self.tables = 0
        self.exceeded = 0
        self._sample: list[Array] = []
        self._generator = generator
        self._rows, self._columns, self._total = _margins(table)
        self._possible = self._rows.size > 1 and self._columns.size > 1

    @property
    def ami(self) -> float:
        return adjust(self.information, self.expected, self.most)

    @property
    def p(self) -> float:
        """Probability of such information by chance; NaN where a label does not vary."""
        if not self._possible:
            return float("nan")
        if self.exceeded >= _EXCEEDANCES:
            return self.exceeded / self.tables
        return (self.exceeded + 1) / (self.tables + 1)

    @property
    def settled(self) -> bool:
        return not self._possible or self.exceeded >= _EXCEEDANCES

    def null_quantile(self, level: float) -> float:
        """Quantile of the AMI of the shuffled labels of the first draw."""
        if not self._sample:
            return float("nan")
        return adjust(float(np.quantile(self._sample[0], level)), self.expected, self.most)

    def draw(self, tables: int) -> None:
        """Adds tables up to a number of them; stops early when settled."""
        if not self._possible:
            return
        step = max(1, _TABLES_AT_ONCE // (self._rows.size * self._columns.size))
        while self.tables < tables and not self.settled:
            count = min(tables - self.tables, step)
            found = self._shuffled_information(count)
            reached = np.flatnonzero(found >= self.information - 1e-12)
            if self.exceeded + reached.size >= _EXCEEDANCES:
                # The rule stops at the tenth: later ones of this draw do not count.
                self.tables += int(reached[_EXCEEDANCES - self.exceeded - 1]) + 1
                self.exceeded = _EXCEEDANCES
            else:
                self.tables += count
                self.exceeded += reached.size
            if not self._sample:
                self._sample.append(found)

    def _shuffled_information(self, count: int) -> Array:
        drawn = random_table.rvs(
            self._rows, self._columns, method="patefield", size=count, random_state=self._generator
        ).astype(np.int64)
        log = _log_tables(self._total)[1]
        joint = (drawn * log[drawn]).sum((1, 2))
        margins = (self._rows * log[self._rows]).sum() + (self._columns * log[self._columns]).sum()
        information: Array = (joint - margins) / self._total + log[self._total]
        return information


def settle(tests: list[PermutationTest], alpha: float) -> None:
    """Draws tables until every p value is settled, or small enough for any verdict at false discovery rate alpha.

    With m tests a single true finding needs p <= alpha / m, hence m / alpha tables. Most verdicts need fewer: the
    stages go on only for tests that fewer than ten shuffled tables have reached.
    """
    most = int(np.ceil(len(tests) / alpha)) if tests else 0
    stages = [_FIRST_TABLES]
    while stages[-1] < most:
        stages.append(min(stages[-1] * 5 + 4, most))
    for tables in stages:
        for test in tests:
            test.draw(tables)
        open_tests = [test for test in tests if not test.settled]
        if not open_tests:
            return
        # Every open test is below the line of Benjamini and Hochberg.
        p = np.array([test.p for test in tests])
        line = alpha * len(open_tests) / max(int(np.isfinite(p).sum()), 1)
        if max(test.p for test in open_tests) <= line:
            return
