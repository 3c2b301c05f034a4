"""Statistics of time series: known values, names, any length, constant series."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spinlock_fast.features.statistics_encoder import STATISTICS, StatisticsEncoder, series_statistics

NAMES = list(STATISTICS)


def statistic(x: torch.Tensor, name: str) -> torch.Tensor:
    return series_statistics(x)[..., NAMES.index(name)]


def test_values_are_those_of_numpy() -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 41)).cumsum(-1)
    found = {name: statistic(torch.from_numpy(x), name).numpy() for name in NAMES}
    time = np.arange(41.0)
    expected = {
        "mean": x.mean(-1),
        "std": x.std(-1),
        "trend": np.array([[np.corrcoef(series, time)[0, 1] for series in rows] for rows in x]),
        "first_tenth": x[..., :5].mean(-1),
        "last_tenth": x[..., -5:].mean(-1),
        "min": x.min(-1),
        "max": x.max(-1),
        "quantile_10": np.quantile(x, 0.1, -1),
        "median": np.median(x, -1),
        "quantile_90": np.quantile(x, 0.9, -1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12, atol=1e-12, err_msg=name)


def test_no_rows() -> None:
    encoder = StatisticsEncoder((16, 3))
    assert encoder(torch.zeros(0, 16, 3)).shape == (0, encoder.output_dim)


@pytest.mark.parametrize("T", [60, 61])
def test_a_sine_has_its_frequency(T: int) -> None:
    t = torch.arange(T, dtype=torch.float64)
    x = 3.0 + torch.sin(2.0 * math.pi * 6.0 / T * t)
    assert statistic(x, "dominant_frequency").item() == pytest.approx(6.0 / T)
    assert statistic(x, "dominant_share").item() == pytest.approx(1.0)
    assert statistic(x, "std").item() == pytest.approx(math.sqrt(0.5))


def test_the_nyquist_frequency_counts_once() -> None:
    t = torch.arange(60, dtype=torch.float64)
    x = 0.9 * (-1.0) ** t + math.sqrt(2.0) * torch.sin(2.0 * math.pi * 6.0 / 60.0 * t)  # variances 0.81 and 1
    assert statistic(x, "dominant_frequency").item() == pytest.approx(6.0 / 60.0)
    assert statistic(x, "dominant_share").item() == pytest.approx(1.0 / 1.81)


def test_an_autoregressive_series_has_its_correlation_time() -> None:
    rng, memory = np.random.default_rng(1), 0.9
    x = np.zeros((200, 2000))
    for t in range(1, 2000):
        x[:, t] = memory * x[:, t - 1] + rng.standard_normal(200)
    times = statistic(torch.from_numpy(x), "autocorrelation_time")
    assert times.mean().item() == pytest.approx(-1.0 / math.log(memory), rel=0.1)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
def test_a_constant_series_has_its_value_and_zeros(value: float) -> None:
    x = torch.full((2, 17), value, dtype=torch.float64)
    for name in ("mean", "first_tenth", "last_tenth", "min", "max", "quantile_10", "median", "quantile_90"):
        torch.testing.assert_close(statistic(x, name), torch.full((2,), value, dtype=torch.float64))
    for name in ("std", "trend", "autocorrelation_time", "dominant_frequency", "dominant_share"):
        assert statistic(x, name).tolist() == [0.0, 0.0], name


@pytest.mark.parametrize("T", [2, 3, 4, 5, 256])
def test_any_length_gives_finite_values(T: int) -> None:
    x = torch.randn(4, T, 6, generator=torch.Generator().manual_seed(T))
    found = StatisticsEncoder((T, 6))(x)
    assert found.shape == (4, 13 * 6)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()


def test_columns_of_the_output_are_in_the_order_of_their_names() -> None:
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    encoder = StatisticsEncoder((20, 3))
    names = encoder.column_names(["a", "b", "c"])
    assert len(names) == encoder.output_dim
    torch.testing.assert_close(encoder(x)[:, names.index("b::max")], x[:, :, 1].amax(1))


def test_a_small_change_about_a_large_mean_is_seen() -> None:
    t = torch.arange(64.0)
    x = (1e4 + torch.sin(2.0 * math.pi * 4.0 / 64.0 * t))[None, :, None]
    found = StatisticsEncoder((64, 1))(x)[0]
    assert found[NAMES.index("dominant_frequency")].item() == pytest.approx(4.0 / 64.0)
    assert found[NAMES.index("std")].item() == pytest.approx(math.sqrt(0.5), rel=1e-3)


def test_gradients_reach_the_series() -> None:
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    kept = [i for i, name in enumerate(NAMES) if name != "dominant_frequency"]
    assert torch.autograd.gradcheck(lambda v: series_statistics(v)[..., kept], (x,))


@pytest.mark.parametrize("shape", [(5,), (1, 3), (2, 3, 4)])
def test_rows_that_are_no_series_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="StatisticsEncoder needs a 3-D dataset"):
        StatisticsEncoder(shape)
