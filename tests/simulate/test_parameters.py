"""theta: ranges, shares, and independence of the number of operators."""

from __future__ import annotations

import numpy as np
import pytest

from spinlock_fast.simulate.config import ParameterSpace
from spinlock_fast.simulate.initial_conditions import INITIAL_TYPES
from spinlock_fast.simulate.parameters import PARAMETER_NAMES, Theta, ThetaSequence


@pytest.fixture(scope="module")
def sequence() -> ThetaSequence:
    return ThetaSequence(ParameterSpace(), seed=7)


@pytest.fixture(scope="module")
def thetas(sequence: ThetaSequence) -> list[Theta]:
    return sequence.thetas(0, 1024)


def test_theta_does_not_depend_on_the_requested_range(sequence: ThetaSequence) -> None:
    whole = sequence.thetas(0, 40)
    assert sequence.thetas(13, 14) == whole[13:14]
    assert sequence.thetas(5, 22) == whole[5:22]
    assert [theta.index for theta in whole] == list(range(40))


def test_points_are_those_of_one_sobol_sequence(sequence: ThetaSequence) -> None:
    # A scrambled Sobol sequence puts one point of 2^m into each interval of width 2^-m, in every dimension.
    points = sequence.unit(0, 256)
    assert points.shape == (256, 12)
    for column in points.T:
        assert sorted((column * 256).astype(int)) == list(range(256))


def test_another_seed_gives_other_operators(sequence: ThetaSequence) -> None:
    other = ThetaSequence(ParameterSpace(), seed=8)
    assert not np.allclose(sequence.unit(0, 16), other.unit(0, 16))


def test_values_stay_in_their_ranges_and_reach_both_ends(thetas: list[Theta]) -> None:
    space = ParameterSpace()
    assert {theta.num_layers for theta in thetas} == {2, 3, 4}
    assert {theta.base_channels for theta in thetas} == {4, 5, 6, 7, 8}
    assert {theta.kernel_size for theta in thetas} == {3, 5}
    for name in ("dropout_rate", "noise_scale", "noise_correlation", "step_size"):
        low, high = getattr(space, name)
        values = np.array([getattr(theta, name) for theta in thetas])
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high


def test_shares_of_policies_initial_conditions_and_noise(sequence: ThetaSequence, thetas: list[Theta]) -> None:
    assert sum(theta.update_policy == "residual" for theta in thetas) == pytest.approx(768, abs=2)
    families = [INITIAL_TYPES[theta.initial_condition][0] for theta in thetas]
    for family in ("gaussian", "band_limited", "sinusoids", "blobs"):
        assert families.count(family) == pytest.approx(256, abs=2)
    assert {theta.initial_condition for theta in thetas} == set(INITIAL_TYPES)
    assert len(INITIAL_TYPES) == 10
    for regime in ("low", "medium", "high"):
        assert [sequence.noise_regime(theta) for theta in thetas].count(regime) == pytest.approx(1024 / 3, abs=3)
    # log-uniform: the median is the geometric mean of the ends
    assert np.median([theta.noise_scale for theta in thetas]) == pytest.approx(np.sqrt(1e-4 * 0.3), rel=0.02)


def test_scaled_theta_lies_in_the_unit_cube_and_follows_the_values(
    sequence: ThetaSequence, thetas: list[Theta]
) -> None:
    scaled = np.stack([sequence.scaled(theta) for theta in thetas])
    values = np.stack([sequence.values(theta) for theta in thetas])
    assert scaled.dtype == values.dtype == np.float32
    assert scaled.shape == values.shape == (1024, 12)
    assert scaled.min() >= 0.0
    assert scaled.max() <= 1.0
    for column, name in enumerate(PARAMETER_NAMES):
        order = np.argsort(values[:, column], kind="stable")
        assert (np.diff(scaled[order, column]) >= 0.0).all(), name
        assert scaled[:, column].max() > 0.99, name
        assert scaled[:, column].min() < 0.01, name


def test_a_range_of_one_value_is_allowed() -> None:
    sequence = ThetaSequence(ParameterSpace(step_size=(0.2, 0.2), noise_scale=(0.1, 0.1)), seed=1)
    theta = sequence.thetas(3, 4)[0]
    assert theta.step_size == pytest.approx(0.2)
    assert sequence.scaled(theta)[PARAMETER_NAMES.index("step_size")] == 0.0
    assert sequence.noise_regime(theta) == "medium"
