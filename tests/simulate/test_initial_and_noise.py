"""Statistics of initial conditions and noise."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from spinlock_fast.simulate.config import ParameterSpace
from spinlock_fast.simulate.initial_conditions import INITIAL_TYPES, initial_field
from spinlock_fast.simulate.noise import (
    BLOCK_STEPS,
    NoiseSource,
    Purpose,
    box_muller,
    generator,
    schedule,
    spectral_filter,
)
from spinlock_fast.simulate.parameters import Theta, ThetaSequence

CPU = torch.device("cpu")


def a_theta(**changes: object) -> Theta:
    theta = ThetaSequence(ParameterSpace(), seed=0).thetas(0, 1)[0]
    return dataclasses.replace(theta, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(INITIAL_TYPES))
def test_fields_are_finite_of_the_right_shape_and_repeatable(name: str) -> None:
    field = initial_field(name, 64, np.random.default_rng(3))
    assert field.shape == (3, 64, 64)
    assert field.dtype == np.float32
    assert np.isfinite(field).all()
    assert 0.05 < field.std() < 4.0
    assert (field == initial_field(name, 64, np.random.default_rng(3))).all()
    assert not np.allclose(field[0], field[1])


@pytest.mark.parametrize(("version", "variance"), list(enumerate((0.1, 0.25, 0.5, 1.0, 2.0))))
def test_random_fields_have_their_variance(version: int, variance: float) -> None:
    field = initial_field(f"gaussian_random_field_v{version}", 64, np.random.default_rng(1))
    assert field.var(axis=(1, 2)) == pytest.approx(variance, rel=1e-4)


@pytest.mark.parametrize(("band", "low", "high"), [("low", 1, 4), ("mid", 4, 10), ("high", 10, 24)])
def test_band_limited_fields_hold_only_their_band(band: str, low: float, high: float) -> None:
    field = initial_field(f"multiscale_grf_{band}", 64, np.random.default_rng(1))
    power = np.abs(np.fft.fft2(field)) ** 2
    k = np.hypot(np.fft.fftfreq(64, 1 / 64)[:, None], np.fft.fftfreq(64, 1 / 64)[None, :])
    assert power[:, (k < low) | (k >= high)].sum() < 1e-6 * power.sum()


def test_waves_have_few_modes_and_blobs_are_localized() -> None:
    for seed in range(5):
        wave = initial_field("structured", 64, np.random.default_rng(seed))
        modes = np.abs(np.fft.fft2(wave)) ** 2 > 1.0
        assert modes.sum(axis=(1, 2)).min() >= 2
        assert modes.sum(axis=(1, 2)).max() <= 6
        blob = initial_field("localized", 64, np.random.default_rng(seed))
        assert (np.abs(blob) < 0.1).mean() > 0.3


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        initial_field("nonsense", 64, np.random.default_rng(0))


def test_normal_values_are_normal() -> None:
    rng = generator(1, Purpose.NOISE, 0)
    x = box_muller(torch.from_numpy(rng.random(2**20, dtype=np.float32))).double()
    error = 1 / math.sqrt(len(x))
    assert abs(x.mean()) < 4 * error
    assert abs(x.var() - 1) < 4 * math.sqrt(2) * error
    assert abs(x.pow(3).mean()) < 4 * math.sqrt(15) * error
    assert abs(x.pow(4).mean() - 3) < 4 * math.sqrt(96) * error
    assert abs((x[1:] * x[:-1]).mean()) < 4 * error
    half = len(x) // 2  # the two halves share their radius
    assert abs((x[:half] * x[half:]).mean()) < 4 * math.sqrt(2) * error


def test_an_extreme_uniform_value_stays_finite() -> None:
    edge = torch.tensor([0.0, 1.0 - 2.0**-24, 0.0, 0.5])
    assert torch.isfinite(box_muller(edge)).all()


@pytest.mark.parametrize("length", [0.0, 1.5, 4.0])
def test_the_filter_sets_the_correlation_and_keeps_the_variance(length: float) -> None:
    power = spectral_filter(length, 64).double().square()
    autocorrelation = torch.fft.irfft2(power.to(torch.complex128), s=(64, 64))
    assert autocorrelation[0, 0].item() == pytest.approx(1.0, rel=1e-5)
    for r in (1, 2, 4):
        expected = math.exp(-(r**2) / (2 * length**2)) if length else 0.0
        assert autocorrelation[0, r].item() == pytest.approx(expected, abs=1e-3)
        assert autocorrelation[r, 0].item() == pytest.approx(expected, abs=1e-3)


def test_schedules() -> None:
    constant = schedule(a_theta(noise_schedule="constant", noise_scale=0.5), 64)
    assert (constant == 0.5).all()
    decaying = schedule(a_theta(noise_schedule="decaying", noise_scale=0.5), 64)
    assert decaying[0].item() == pytest.approx(0.5)
    assert (decaying.diff() < 0).all()
    assert decaying.tolist() == pytest.approx([0.5 * math.exp(-4.0 * t / 64) for t in range(64)])
    periodic = schedule(a_theta(noise_schedule="periodic", noise_scale=0.5), 64)
    assert periodic[:32].tolist() == pytest.approx(periodic[32:].tolist(), abs=1e-6)
    assert periodic.max().item() == pytest.approx(1.0)
    assert periodic.min().item() == pytest.approx(0.0, abs=1e-6)


def source(thetas: list[Theta], realizations: int = 2, mask_shape: tuple[int, int] = (3, 8)) -> NoiseSource:
    return NoiseSource(thetas, 5, realizations, 32, 48, mask_shape, CPU)


def test_noise_has_the_scale_and_differs_between_operators_realizations_and_steps() -> None:
    thetas = [a_theta(index=i, noise_scale=0.2, noise_schedule="constant", noise_correlation=1.0) for i in (3, 9)]
    noise, _ = source(thetas).block(0)
    assert noise.shape == (BLOCK_STEPS, 2, 2, 3, 32, 32)
    assert noise.std().item() == pytest.approx(0.2, rel=0.03)
    flat = noise.permute(1, 2, 3, 0, 4, 5).reshape(12 * BLOCK_STEPS, -1)
    correlation = torch.corrcoef(flat).fill_diagonal_(0.0)
    assert correlation.abs().max() < 0.3  # 1,024 points with a correlation length of one: about 1 / sqrt(300) each
    second, _ = source(thetas).block(1)
    assert not torch.equal(noise, second)


def test_noise_and_masks_depend_on_their_place_alone() -> None:
    thetas = [a_theta(index=i, base_channels=4 + i, num_layers=2 + i, dropout_rate=0.3) for i in range(3)]
    noise, masks = source(thetas).block(1)
    for i, theta in enumerate(thetas):
        alone, mask = source([theta], mask_shape=(theta.num_layers - 1, theta.base_channels)).block(1)
        assert torch.equal(alone[:, :, 0], noise[:, :, i])
        assert torch.equal(mask[:, :, 0], masks[:, :, i, : mask.shape[3], : mask.shape[4]])
    first, _ = source(thetas, realizations=1).block(1)
    assert torch.equal(first, noise[:, :1])


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    theta = a_theta(base_channels=8, num_layers=4, dropout_rate=0.3)
    masks = torch.cat([source([theta], realizations=8).block(block)[1] for block in range(3)])
    assert (masks == 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert masks.mean().item() == pytest.approx(1.0, abs=0.03)
    none = source([a_theta(dropout_rate=0.0, base_channels=8, num_layers=4)]).block(0)[1]
    assert (none == 1).all()


def test_the_last_block_is_cut_to_the_steps() -> None:
    cut = NoiseSource([a_theta()], 5, 2, 32, 40, (3, 8), CPU)
    assert len(cut.block(2)[0]) == 8
