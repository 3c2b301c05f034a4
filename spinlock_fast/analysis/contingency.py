"""The distribution of the mutual information of a contingency table under independence."""

from __future__ import annotations

import numpy as np
from scipy.stats import random_table

from spinlock_fast.features.mutual_information import (
    Array,
    Counts,
    chance_adjusted,
    expected_mutual_information,
    log_tables,
    margins,
    mean_entropy,
    mutual_information,
)

_EXCEEDANCES = 10  # gives a Monte Carlo p value a relative standard error of about a third
_FIRST_TABLES = 199
_CELLS_AT_ONCE = 2_000_000


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
        self.upper_bound = mean_entropy(table)
        self.tables = 0
        self.exceeded = 0
        self._null_information: list[Array] = []
        self._generator = generator
        self._rows, self._columns, self._total = margins(table)
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
        log = log_tables(self._total)[1]
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
