"""Intervals, tail probabilities and q values against scipy's, one by one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, false_discovery_control, hypergeom

from spinlock_fast.analysis.significance import false_discovery_rate, hypergeometric_p, wilson_interval


def test_q_values_are_those_of_scipy() -> None:
    p = np.random.default_rng(0).random((7, 30)) ** 2
    p[0, :4] = p[3, 3]  # ties
    expected = false_discovery_control(p.ravel(), method="bh").reshape(p.shape)
    np.testing.assert_allclose(false_discovery_rate(p), expected, rtol=1e-12)


def test_nan_is_not_counted_as_a_test() -> None:
    p = np.array([0.01, np.nan, 0.04])
    np.testing.assert_allclose(false_discovery_rate(p), [0.02, np.nan, 0.04])
    assert false_discovery_rate(np.empty(0)).shape == (0,)


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (1, 3), (40, 100), (999, 1000)])
def test_wilson_is_that_of_scipy(successes: int, trials: int) -> None:
    low, high = wilson_interval(successes, trials)
    expected = binomtest(successes, trials).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose([low, high], [expected.low, expected.high], atol=1e-12)


def test_interval_without_trials_is_0_to_1() -> None:
    assert [float(bound) for bound in wilson_interval(0, 0)] == [0.0, 1.0]


@pytest.mark.parametrize("total", [30, 400, 20_000])
def test_tails_are_those_of_the_hypergeometric_distribution(total: int) -> None:
    rng = np.random.default_rng(total)
    a, b = rng.integers(1, total, 60), rng.integers(1, total, 60)
    n = rng.hypergeometric(a, total - a, b)
    n[:20] = np.maximum(0, a + b - total)[:20]  # the ends of the range
    n[20:40] = np.minimum(a, b)[20:40]
    below, above = hypergeom.cdf(n, total, a, b), hypergeom.sf(n - 1, total, a, b)
    expected = np.minimum(1.0, 2 * np.minimum(below, above))
    found = hypergeometric_p(n, a, b, total)
    usual = expected > 1e-250  # scipy's own sums end there
    np.testing.assert_allclose(found[usual], expected[usual], rtol=1e-6, atol=1e-300)
    assert (found[~usual] < 1e-200).all()


def test_p_value_of_a_certain_count_is_one() -> None:
    np.testing.assert_allclose(hypergeometric_p([10, 3], [10, 3], [10, 10], 10), 1.0)
