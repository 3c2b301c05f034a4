"""Planted associations are found, and no others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planted import operators, rows_where

from spinlock_fast.analysis import AnalysisConfig, analyze_observations
from spinlock_fast.errors import DataError


def test_tokens_are_associated_with_their_parameter_only() -> None:
    tables = analyze_observations(operators(600, seed=0), AnalysisConfig()).tables
    found = tables["associations"]["q"] <= 0.05
    assert set(tables["associations"]["condition"][found]) == {"step"}
    assert set(tables["associations"]["codebook"][found]) == {"slow/L0", "slow/L1", "slow/L2"}
    assert (tables["associations"]["ami"][found] > 0.2).all()
    (first,) = rows_where(tables["lifts"], codebook="slow/L0", code=0, condition="step", value=lowest(tables))
    assert tables["lifts"]["lift"][first] > 3
    assert tables["lifts"]["q"][first] < 1e-6
    features = tables["features"]
    clear = features["q"] < 1e-6
    # All levels of "slow" follow the parameter, and so do the features that its first level moves.
    assert set(features["feature"][clear]) == {"family::feature_0", "family::feature_1"}
    assert {str(name).split("/")[0] for name in features["codebook"][clear]} == {"slow"}


def lowest(tables: dict[str, dict[str, np.ndarray]]) -> str:
    values = tables["lifts"]["value"][rows_where(tables["lifts"], condition="step")]
    return str(values[0])


def test_independent_tokens_have_no_associations() -> None:
    """With a false discovery rate of 5 %, five or more of 20 independent data sets with a discovery have p = 0.003."""
    false: dict[str, int] = {"associations": 0, "lifts": 0, "features": 0, "pairs": 0}
    config = AnalysisConfig(queries=10)
    for seed in range(20):
        summary = analyze_observations(operators(200, seed=seed, dependent=False), config).summary
        for name in ("associations", "lifts", "features"):
            false[name] += summary["found"][name]["found"] > 0
        false["pairs"] += summary["pairs_of_codes_found"] > 0
    assert max(false.values()) < 5, false


def test_shuffled_tokens_have_no_associations() -> None:
    observed = operators(600, seed=0)
    order = np.random.default_rng(1).permutation(600)
    summary = analyze_observations(replace(observed, tokens=observed.tokens[order]), AnalysisConfig()).summary
    assert summary["found"]["associations"]["found"] == 0
    assert summary["found"]["lifts"]["found"] <= 1


def test_the_same_seed_gives_the_same_tables() -> None:
    first, second = (analyze_observations(operators(100, seed=2), AnalysisConfig(seed=3)).tables for _ in range(2))
    for name, table in first.items():
        for column, values in table.items():
            np.testing.assert_array_equal(values, second[name][column], err_msg=f"{name}.{column}")


def test_too_few_operators_are_refused() -> None:
    with pytest.raises(DataError, match="19 operators are too few"):
        analyze_observations(operators(19, seed=0), AnalysisConfig())
