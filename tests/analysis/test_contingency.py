"""Information of tables against scikit-learn, and the permutation test against permutations."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.metrics.cluster import expected_mutual_information as sklearn_expected

from spinlock_fast.analysis.contingency import PermutationTest, run_permutation_tests
from spinlock_fast.analysis.significance import false_discovery_rate
from spinlock_fast.features.mutual_information import (
    adjusted_mutual_information,
    contingency,
    expected_mutual_information,
    mutual_information,
)


def labels(rows: int, codes: int, levels: int, dependence: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = np.minimum(rng.geometric(0.2, rows) - 1, codes - 1)  # uneven, as codes are
    second = np.where(rng.random(rows) < dependence, first % levels, rng.integers(0, levels, rows))
    return first, second


@pytest.mark.parametrize(("rows", "codes", "levels"), [(12, 3, 2), (200, 15, 5), (3000, 28, 10), (20_000, 6, 3)])
@pytest.mark.parametrize("dependence", [0.0, 0.3, 1.0])
def test_information_is_that_of_scikit_learn(rows: int, codes: int, levels: int, dependence: float) -> None:
    a, b = labels(rows, codes, levels, dependence, seed=rows)
    table = contingency(a, b, (codes, levels))
    assert mutual_information(table) == pytest.approx(mutual_info_score(a, b), abs=1e-12)
    expected = sklearn_expected(contingency_matrix(a, b, sparse=True, dtype=np.int64), rows)
    assert expected_mutual_information(table) == pytest.approx(expected, rel=1e-9)
    assert adjusted_mutual_information(table) == pytest.approx(adjusted_mutual_info_score(a, b), abs=1e-9)


def test_rare_labels_have_the_expected_information_of_scikit_learn() -> None:
    """Expected counts below one: the tail is heavier than that of the normal approximation."""
    table = np.array([[30, 20_000], [5, 40], [1, 60]])
    a, b = (np.repeat(index.ravel(), table.ravel()) for index in np.indices(table.shape))
    expected = sklearn_expected(contingency_matrix(a, b, sparse=True, dtype=np.int64), table.sum())
    assert expected_mutual_information(table) == pytest.approx(expected, rel=1e-10)


def test_constant_labels_have_no_information() -> None:
    table = np.array([[40, 60]])
    assert adjusted_mutual_information(table) == 0.0
    test = PermutationTest(table, np.random.default_rng(0))
    run_permutation_tests([test], 0.05)
    assert np.isnan(test.p)
    assert test.tables == 0


def test_drawn_tables_have_the_information_of_shuffled_labels() -> None:
    a, b = labels(300, 8, 4, 0.1, seed=1)
    rng = np.random.default_rng(0)
    test = PermutationTest(contingency(a, b, (8, 4)), rng)
    drawn = test._permuted_information(2000)
    shuffled = np.array([mutual_information(contingency(a, rng.permutation(b), (8, 4))) for _ in range(2000)])
    assert drawn.mean() == pytest.approx(test.expected, rel=0.02)
    np.testing.assert_allclose(np.quantile(drawn, [0.1, 0.5, 0.9]), np.quantile(shuffled, [0.1, 0.5, 0.9]), rtol=0.08)


def test_p_values_of_independent_labels_are_uniform() -> None:
    rng = np.random.default_rng(0)
    tests = []
    for seed in range(200):
        a, b = labels(150, 6, 4, 0.0, seed=seed)
        tests.append(PermutationTest(contingency(a, b, (6, 4)), rng))
        tests[-1].draw(199)
    p = np.array([test.p for test in tests])
    # 200 values: 3 standard deviations of a share of s are 3 sqrt(s (1 - s) / 200).
    for level in (0.05, 0.25, 0.5):
        assert abs((p <= level).mean() - level) < 3 * np.sqrt(level * (1 - level) / 200)


def test_one_dependence_among_many_tests_is_found() -> None:
    """Needs more tables than the first stage draws: 1 / 200 is not below 0.05 / 300."""
    rng = np.random.default_rng(0)
    tests = []
    for seed in range(300):
        a, b = labels(200, 6, 4, 0.6 if seed == 0 else 0.0, seed=seed)
        tests.append(PermutationTest(contingency(a, b, (6, 4)), rng))
    run_permutation_tests(tests, 0.05)
    q = false_discovery_rate(np.array([test.p for test in tests]))
    assert q[0] <= 0.05
    assert tests[0].tables == 6000
    assert np.median([test.tables for test in tests]) < 100  # the others were settled early
    assert (q[1:] <= 0.05).sum() == 0
