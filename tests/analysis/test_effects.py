"""Standardised means of codes against their formula and Student's interval of SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from planted import operators, rows_where
from scipy import stats

from spinlock_fast.analysis.codes import features_table, one_hot
from spinlock_fast.analysis.effects import code_effects, standardised_means


def test_effects_equal_the_interval_of_scipy_and_the_table_of_features() -> None:
    observed = operators(240, seed=2)
    members = one_hot(observed.tokens, observed.codebooks.offsets)
    effects = code_effects(observed, members)
    table = features_table(observed, members, [])
    x = np.concatenate([observed.features, observed.measured], axis=1).astype(np.float64)
    assert effects.names == [*observed.feature_names, *observed.measured_names]
    assert effects.kinds == ["model"] * 7 + ["measured"] * 2
    for u in (0, 7, len(effects.codes) - 1):
        code = int(effects.codes[u])
        g = int(np.searchsorted(observed.codebooks.offsets, code, side="right") - 1)
        own = x[observed.tokens[:, g] == code - observed.codebooks.offsets[g]]
        low, high = stats.t.interval(0.95, len(own) - 1, own.mean(0), stats.sem(own))
        np.testing.assert_allclose(effects.effect[u], (own.mean(0) - x.mean(0)) / x.std(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(effects.half_width[u], (high - low) / 2 / x.std(0), rtol=1e-9)
        rows = rows_where(
            table, codebook=observed.codebooks.names[g], code=code - observed.codebooks.offsets[g]
        )  # in the order of the features
        np.testing.assert_array_equal(effects.auc[u], table["auc"][rows])
        np.testing.assert_allclose(effects.q[u], table["q"][rows], rtol=1e-12)


@pytest.mark.filterwarnings("error")
def test_a_constant_feature_and_a_code_of_one_row_have_no_value() -> None:
    tokens = np.array([[0], [1], [1], [1]])
    x = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [4.0, 5.0]], np.float32)
    effect, half_width = standardised_means(one_hot(tokens, np.array([0, 2])), x)
    np.testing.assert_allclose(effect[:, 0], [-1.5 / np.sqrt(1.25), 0.5 / np.sqrt(1.25)])
    assert np.isnan(half_width[0]).all()
    assert np.isfinite(half_width[1, 0])
    assert np.isnan(effect[:, 1]).all()
