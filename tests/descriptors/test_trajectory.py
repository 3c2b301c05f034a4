"""Features of trajectories on series with known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from spinlock_fast.descriptors.registry import PER_TRAJECTORY
from spinlock_fast.descriptors.sensitivity import sensitivity_features
from spinlock_fast.descriptors.trajectory import (
    causality_features,
    granger,
    invariant_features,
    temporal_features,
)
from spinlock_fast.simulate.simulator import aggregate

T = 256
TIME = torch.arange(1, T + 1, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def named(group: str, values: Tensor) -> dict[str, float]:
    return dict(zip([feature.name for feature in PER_TRAJECTORY[group]], values[0].tolist(), strict=True))


def temporal(
    energy: Tensor | None = None, activity: Tensor | None = None, probes: Tensor | None = None
) -> dict[str, float]:
    energy = torch.ones(T, dtype=torch.float64) if energy is None else energy
    activity = torch.ones(T, dtype=torch.float64) if activity is None else activity
    probes = normal(3, 64, T) if probes is None else probes
    return named("temporal", temporal_features(energy[None], activity[None], probes[None]))


def test_a_decaying_field_has_a_negative_trend() -> None:
    f = temporal(energy=torch.exp(-0.02 * TIME), activity=torch.exp(-0.01 * TIME))
    assert f["early_growth_rate"] == pytest.approx(-0.02, rel=1e-6)
    assert f["late_growth_rate"] == pytest.approx(-0.02, rel=1e-6)
    assert f["energy_trend"] < -0.8
    assert f["activity_trend"] < -0.8
    assert f["energy_final_ratio"] < -4.0
    assert f["peak_time"] == pytest.approx(1 / T)
    assert f["activity_relative"] == pytest.approx(1.0, rel=1e-6)


def test_a_growing_field_has_a_positive_trend_and_a_steady_one_none() -> None:
    f = temporal(energy=TIME)
    assert f["energy_trend"] == pytest.approx(1.0, abs=1e-9)
    assert f["peak_time"] == 1.0
    steady = temporal()
    for name in (
        "early_growth_rate",
        "energy_trend",
        "energy_final_ratio",
        "energy_variability",
        "settling_time",
        "burstiness",
    ):
        assert steady[name] == pytest.approx(0.0, abs=1e-9), name


def test_settling_time() -> None:
    energy = torch.ones(T, dtype=torch.float64)
    energy[:64] = 3.0
    assert temporal(energy=energy)["settling_time"] == pytest.approx(0.25)


def test_white_noise_in_time() -> None:
    f = temporal()
    for lag in (1, 8, 32):
        assert abs(f[f"autocorrelation_{lag}"]) < 0.03
    assert f["correlation_time"] < 1.0
    assert f["roughness"] == pytest.approx(3.0, rel=0.02)
    assert f["zero_crossing_rate"] == pytest.approx(0.5, abs=0.02)
    assert f["frequency_centroid"] == pytest.approx(0.25, abs=0.01)
    assert f["frequency_entropy"] > 0.99
    assert f["temporal_share"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("cycles", [4, 16])
def test_an_oscillation_has_its_frequency(cycles: int) -> None:
    frequency = cycles / (T // 2)
    phases = 2 * math.pi * torch.rand(3, 64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    f = temporal(probes=torch.sin(2 * math.pi * frequency * TIME + phases))
    assert f["dominant_frequency"] == pytest.approx(frequency)
    assert f["dominant_share"] == pytest.approx(1.0, abs=1e-6)
    assert f["frequency_centroid"] == pytest.approx(frequency, rel=1e-6)
    assert f["frequency_entropy"] < 1e-6
    assert f["zero_crossing_rate"] == pytest.approx(2 * frequency, rel=0.1)
    assert f["autocorrelation_8"] == pytest.approx(math.cos(2 * math.pi * frequency * 8), abs=0.1)


def test_the_time_of_decay_of_correlation() -> None:
    # first-order autoregression with r(t) = exp(-t / 10)
    a = math.exp(-0.1)
    noise = normal(3, 512, T + 200)
    x = torch.zeros_like(noise)
    for t in range(1, noise.shape[2]):
        x[..., t] = a * x[..., t - 1] + math.sqrt(1 - a * a) * noise[..., t]
    f = temporal(probes=x[..., 200:])
    assert f["autocorrelation_1"] == pytest.approx(a, abs=0.03)
    assert f["correlation_time"] == pytest.approx(10.0, rel=0.25)


def test_bursts() -> None:
    energy = torch.ones(T, dtype=torch.float64)
    energy[100] = 5.0
    assert temporal(energy=energy)["burstiness"] > 50.0
    assert abs(temporal(energy=10.0 + normal(T).cumsum(0))["burstiness"]) < 1.0


def test_temporal_share() -> None:
    still = normal(3, 64, 1).expand(3, 64, T)
    assert temporal(probes=still)["temporal_share"] == pytest.approx(0.0, abs=1e-9)
    assert temporal(probes=still + normal(3, 64, T, seed=1))["temporal_share"] == pytest.approx(0.5, abs=0.05)


def driven(strength: float) -> Tensor:
    """Channel 0 drives channel 1 with a lag of one step; channel 2 is independent."""
    noise = normal(3, 64, T)
    x = torch.zeros_like(noise)
    for t in range(1, T):
        x[0, :, t] = 0.5 * x[0, :, t - 1] + noise[0, :, t]
        x[1, :, t] = strength * x[0, :, t - 1] + noise[1, :, t]
        x[2, :, t] = noise[2, :, t]
    return x[None]


def test_granger_causality_has_a_direction() -> None:
    x = driven(0.8)
    values = dict(zip([(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)], granger(x, 1)[0].tolist(), strict=True))
    # the residual variance falls from that of 0.8 x_0 + e, given the own past, to that of e
    assert values[0, 1] == pytest.approx(math.log(1 + 0.64 / 0.75), rel=0.1)
    assert max(value for pair, value in values.items() if pair != (0, 1)) < 0.01


def test_causality_features() -> None:
    velocity = torch.zeros(1, T, 2, dtype=torch.float64)
    linked, alone = (named("causality", causality_features(driven(s), velocity)) for s in (0.8, 0.0))
    assert linked["lag_asymmetry_max_1"] > 0.4
    assert alone["lag_asymmetry_max_1"] < 0.05
    assert linked["lag_asymmetry_mean_1"] == pytest.approx(linked["lag_asymmetry_max_1"] / 3, abs=0.05)
    assert linked["granger_max"] > 0.4
    assert alone["granger_max"] < 0.01
    assert linked["granger_2"] > 20 * alone["granger_2"]
    assert linked["flow_speed"] == linked["flow_persistence"] == 0.0


def test_simultaneous_channels_have_no_direction() -> None:
    common = driven(0.0)[:, :1].expand(1, 3, 64, T)
    f = named("causality", causality_features(common, torch.zeros(1, T, 2, dtype=torch.float64)))
    for lag in (1, 2, 3):
        assert f[f"lag_asymmetry_max_{lag}"] == pytest.approx(0.0, abs=1e-9)
    assert f["granger_max"] < 1e-6


def test_irreversibility_of_a_sawtooth() -> None:
    phases = torch.rand(3, 64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sawtooth = (TIME / 16 + phases) % 1.0
    velocity = torch.zeros(1, T, 2, dtype=torch.float64)
    forward = named("causality", causality_features(sawtooth[None], velocity))["irreversibility"]
    backward = named("causality", causality_features(sawtooth.flip(2)[None], velocity))["irreversibility"]
    assert forward < -2.0
    assert backward == pytest.approx(-forward, rel=1e-6)
    noise = named("causality", causality_features(normal(1, 3, 64, T), velocity))
    assert abs(noise["irreversibility"]) < 0.05


def test_speed_and_persistence_of_flow() -> None:
    probes = normal(1, 3, 64, T)
    steady = torch.tensor([0.3, 0.4], dtype=torch.float64).expand(1, T, 2)
    f = named("causality", causality_features(probes, steady))
    assert (f["flow_speed"], f["flow_persistence"]) == pytest.approx((0.5, 1.0))
    back_and_forth = steady * torch.where(TIME % 2 == 0, 1.0, -1.0)[:, None]
    f = named("causality", causality_features(probes, back_and_forth))
    assert (f["flow_speed"], f["flow_persistence"]) == pytest.approx((0.5, 0.0))


def test_invariants() -> None:
    norms = torch.ones(1, T, 9, dtype=torch.float64)
    norms[0, :, 0] = torch.exp(-0.1 * TIME)
    norms[0, :, 1] = torch.where(TIME % 2 == 0, 1.0, math.e)
    f = named("invariant_drift", invariant_features(norms))
    assert f["l1_drift_scale_1"] == pytest.approx(0.1)
    assert f["l1_monotonicity_scale_1"] == pytest.approx(-1.0)
    assert f["l2_drift_scale_1"] == pytest.approx(1.0)
    assert abs(f["l2_monotonicity_scale_1"]) < 0.01
    assert f["tv_drift_scale_8"] == f["tv_monotonicity_scale_8"] == 0.0


def test_series_that_stand_still_give_finite_features() -> None:
    zeros = torch.zeros(1, 3, 64, T, dtype=torch.float64)
    nothing = torch.zeros(1, T, dtype=torch.float64)
    assert torch.isfinite(temporal_features(nothing, nothing, zeros)).all()
    assert torch.isfinite(causality_features(zeros, torch.zeros(1, T, 2, dtype=torch.float64))).all()
    assert torch.isfinite(invariant_features(torch.zeros(1, T, 9, dtype=torch.float64))).all()


def test_sensitivity_of_linear_and_saturating_steps() -> None:
    u = normal(2, 1, 3, 8, 8).float()
    direction = normal(1, 3, 8, 8, seed=3).float()
    direction /= direction.square().mean().sqrt()
    linear = sensitivity_features(lambda x: 0.7 * x, u, direction)
    assert linear.shape == (2, 1, 10)
    expected = [0.7] * 7 + [1.0, 1.0, 0.7]
    for row in linear[:, 0]:
        assert row[1:].tolist() == pytest.approx(expected[1:], rel=1e-3)
        assert row[0].item() == pytest.approx(0.7, rel=0.05)  # a step of 1e-4 loses digits
    saturating = sensitivity_features(lambda x: torch.tanh(5.0 * x), u, direction)[0, 0].tolist()
    gains = saturating[3:7]
    assert gains == sorted(gains, reverse=True)
    assert saturating[7] < 0.9
    assert saturating[8] < 0.5


def test_aggregation_over_realizations() -> None:
    values = np.random.default_rng(0).standard_normal((5, 3, 120)).astype(np.float32) + 3.0
    values[:, :, 110:] = np.nan
    values[0, :, 0] = 0.0
    values[1, :, 0] = (-1.0, 0.0, 1.0)
    out = aggregate(values)
    assert out.shape == (5, 360)
    assert out[:, :110] == pytest.approx(values.mean(1)[:, :110], rel=1e-5)
    assert out[:, 120:230] == pytest.approx(values.std(1)[:, :110], rel=1e-4)
    assert out[2:, 240:350] == pytest.approx((values.std(1)[2:, :110] / np.abs(values.mean(1)[2:, :110])), rel=1e-3)
    assert out[0, 240] == 0.0
    assert out[1, 240] == 100.0
    assert set(np.flatnonzero(np.isnan(out).all(0))) == {*range(110, 120), *range(230, 240), *range(350, 360)}
    assert np.isfinite(np.delete(out, np.r_[110:120, 230:240, 350:360], axis=1)).all()
