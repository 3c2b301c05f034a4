"""Features of single states on fields with known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from spinlock_fast.descriptors.cross_channel import symmetric_eigenvalues
from spinlock_fast.descriptors.per_step import StepFeatures, StepSeries, concatenate_series
from spinlock_fast.descriptors.registry import temporal_names
from spinlock_fast.descriptors.spectral import Wavenumbers

G = 64
WAVES = Wavenumbers(G, torch.device("cpu"))
X = torch.arange(G, dtype=torch.float64) / G


def series_of(states: Tensor, initial: Tensor | None = None, clip: float = 10.0) -> StepSeries:
    """Series of one trajectory of states [S, 3, G, G]."""
    states = states.float()[:, None].contiguous()
    start = states[0] if initial is None else initial.float()[None]
    return StepFeatures(start, clip, WAVES).block(states)


def features_of(state: Tensor) -> dict[str, float]:
    """The 63 features of a state [3, G, G], by name."""
    values = series_of(state[None]).features[0, 0].tolist()
    return dict(zip(temporal_names(), values, strict=True))


def plane_wave(kx: int, ky: int, amplitude: float = 1.0, phase: float = 0.3) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * (kx * X[None, :] + ky * X[:, None]) + phase)


def white(seed: int = 0, channels: int = 3) -> Tensor:
    return torch.randn(channels, G, G, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_white_noise() -> None:
    f = features_of(white())
    error = 1 / math.sqrt(3 * G * G)
    assert abs(f["spatial_mean"]) < 4 * error
    assert f["spatial_variance"] == pytest.approx(1.0, abs=4 * math.sqrt(2) * error)
    assert abs(f["spatial_skewness"]) < 4 * math.sqrt(6) * error
    assert abs(f["spatial_kurtosis"]) < 4 * math.sqrt(24) * error
    assert abs(f["spatial_neighbor_correlation"]) < 4 * error
    assert f["spatial_interface_density"] == pytest.approx(0.5, abs=0.02)
    assert f["spatial_mean_abs"] == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)
    # the differences are normal with variance 2: their length has a Rayleigh distribution
    assert f["spatial_gradient_mean"] == pytest.approx(math.sqrt(2) * math.sqrt(math.pi / 2), rel=0.02)
    assert f["spatial_laplacian_rms"] == pytest.approx(math.sqrt(20), rel=0.03)
    assert abs(f["spatial_gradient_anisotropy"]) < 0.03
    for name, z in (("percentile_5", -1.645), ("percentile_25", -0.674), ("median", 0.0), ("percentile_95", 1.645)):
        assert f[f"spatial_{name}"] == pytest.approx(z, abs=0.1)
    # of |F|^2 with an exponential distribution: exp(-Euler's constant)
    assert f["spectral_flatness"] == pytest.approx(math.exp(-0.5772), abs=0.02)
    assert f["spectral_slope"] == pytest.approx(0.0, abs=0.3)
    assert f["spectral_entropy"] > 0.92
    assert abs(f["cross_channel_correlation_abs_mean"]) < 0.05
    assert f["cross_channel_coherence_high"] < 0.01
    assert f["cross_channel_participation_ratio"] == pytest.approx(3.0, abs=0.02)
    assert f["cross_channel_trace"] == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize(("kx", "ky"), [(5, 0), (0, 9), (3, 4), (-3, 4), (12, 5), (20, 21)])
def test_a_plane_wave_has_its_frequency(kx: int, ky: int) -> None:
    f = features_of(torch.stack([plane_wave(kx, ky, phase=phase) for phase in (0.1, 1.0, 2.0)]))
    k = math.hypot(kx, ky)
    assert f["spectral_dominant_frequency_x"] == pytest.approx(abs(kx), abs=1e-4)
    assert f["spectral_dominant_frequency_y"] == pytest.approx(abs(ky), abs=1e-4)
    assert f["spectral_dominant_frequency"] == pytest.approx(k, abs=1e-4)
    assert f["spectral_centroid"] == pytest.approx(k, rel=1e-4)
    assert f["spectral_centroid_x"] == pytest.approx(abs(kx), abs=1e-2)
    assert f["spectral_centroid_y"] == pytest.approx(abs(ky), abs=1e-2)
    assert f["spectral_bandwidth"] < 0.1
    assert f["spectral_peak_share"] == pytest.approx(1.0, abs=1e-4)
    assert f["spectral_entropy"] == pytest.approx(math.log(2) / math.log(G * G - 1), abs=1e-3)
    assert f["spectral_flatness"] < 1e-6
    assert abs(f["spectral_rolloff"] - k) <= 0.5
    band = min(int(math.log2(k)), 4)
    for i in range(5):
        assert f[f"spectral_band_{i}_share"] == pytest.approx(float(i == band), abs=1e-4)
        assert f[f"spectral_band_{i}_power"] == pytest.approx(0.5 * (i == band), abs=1e-4)
    assert f[f"spectral_band_{band}_anisotropy"] == pytest.approx((kx**2 - ky**2) / k**2, abs=1e-3)
    assert f["spatial_variance"] == pytest.approx(0.5, rel=1e-4)
    neighbors = (math.cos(2 * math.pi * kx / G) + math.cos(2 * math.pi * ky / G)) / 2
    assert f["spatial_neighbor_correlation"] == pytest.approx(neighbors, abs=1e-4)


def test_a_zero_field_gives_zeros() -> None:
    f = features_of(torch.zeros(3, G, G))
    undefined = {name for name in f if name.startswith("spectral_dominant")} | {"cross_channel_log_condition"}
    for name, value in f.items():
        assert math.isfinite(value), name
        assert value == pytest.approx(0.0, abs=1e-5) or name in undefined, name


def test_a_constant_field_has_its_level_and_no_variation() -> None:
    f = features_of(torch.full((3, G, G), 2.0))
    for name in ("mean", "min", "max", "median", "mean_abs", *(f"percentile_{p}" for p in (5, 25, 75, 95))):
        assert f[f"spatial_{name}"] == pytest.approx(2.0, rel=1e-5), name
    for name in ("variance", "std", "skewness", "kurtosis", "gradient_mean", "laplacian_rms", "interface_density"):
        assert f[f"spatial_{name}"] == pytest.approx(0.0, abs=1e-5), name
    assert all(math.isfinite(value) for value in f.values())


def test_symmetry_and_its_loss() -> None:
    symmetric = torch.stack([plane_wave(2, 3), plane_wave(4, 1), plane_wave(0, 2)])
    assert abs(features_of(symmetric)["spatial_skewness"]) < 1e-3
    skewed = features_of(white().exp())
    assert skewed["spatial_skewness"] > 2.0
    assert skewed["spatial_kurtosis"] > 5.0
    assert features_of(-white().exp())["spatial_skewness"] == pytest.approx(-skewed["spatial_skewness"], rel=1e-4)


def test_moments_agree_with_scipy() -> None:
    field = white().exp()
    f = features_of(field)
    flat = field.flatten(1).numpy()
    assert f["spatial_skewness"] == pytest.approx(stats.skew(flat, axis=1).mean(), rel=1e-3)
    assert f["spatial_kurtosis"] == pytest.approx(stats.kurtosis(flat, axis=1).mean(), rel=1e-3)
    assert f["spatial_std"] == pytest.approx(flat.std(axis=1).mean(), rel=1e-4)


@pytest.mark.parametrize(("share", "shell"), [(0.80, 20), (0.90, 4)])
def test_rolloff_is_where_85_percent_of_the_power_is_reached(share: float, shell: int) -> None:
    wave = plane_wave(4, 0, math.sqrt(2 * share)) + plane_wave(0, 20, math.sqrt(2 * (1 - share)))
    assert features_of(wave.expand(3, G, G))["spectral_rolloff"] == pytest.approx(shell)


def test_gradients_and_interfaces_of_stripes() -> None:
    stripes = torch.where(torch.arange(G) % 16 < 8, 1.0, -1.0).expand(3, G, G)
    f = features_of(stripes)
    assert f["spatial_gradient_anisotropy"] == pytest.approx(1.0, abs=1e-4)
    assert features_of(stripes.mT)["spatial_gradient_anisotropy"] == pytest.approx(-1.0, abs=1e-4)
    assert f["spatial_gradient_mean"] == pytest.approx(2.0 / 8, rel=1e-4)
    assert f["spatial_gradient_std"] == pytest.approx(math.sqrt(4.0 / 8 - 1.0 / 16), rel=1e-3)
    assert f["spatial_interface_density"] == pytest.approx(1 / 8 / 2, rel=1e-4)
    assert (f["spatial_min"], f["spatial_max"]) == (-1.0, 1.0)


def test_correlated_channels() -> None:
    base = white(channels=1)[0]
    same = features_of(torch.stack([base, 2.0 * base, -base]))
    assert same["cross_channel_correlation_01"] == pytest.approx(1.0, abs=1e-4)
    assert same["cross_channel_correlation_02"] == pytest.approx(-1.0, abs=1e-4)
    assert same["cross_channel_correlation_max"] == pytest.approx(1.0, abs=1e-4)
    assert same["cross_channel_correlation_min"] == pytest.approx(-1.0, abs=1e-4)
    assert same["cross_channel_coherence_low"] == pytest.approx(1.0, abs=1e-4)
    assert same["cross_channel_coherence_high"] == pytest.approx(1.0, abs=1e-4)
    assert same["cross_channel_participation_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert same["cross_channel_gradient_alignment"] == pytest.approx(-1 / 3, abs=1e-4)
    assert same["cross_channel_log_condition"] > 10.0
    mixed = features_of(torch.stack([base, 0.6 * base + 0.8 * white(1)[0], white(1)[1]]))
    assert mixed["cross_channel_correlation_01"] == pytest.approx(0.6, abs=0.03)
    assert mixed["cross_channel_mutual_information_max"] == pytest.approx(-0.5 * math.log(1 - 0.36), abs=0.03)


def test_a_shifted_channel_is_coherent_without_being_correlated() -> None:
    f = features_of(torch.stack([plane_wave(3, 0, phase=p) for p in (1.0, 1.0 + math.pi / 2, 1.0)]))
    assert abs(f["cross_channel_correlation_01"]) < 1e-3
    assert f["cross_channel_correlation_02"] == pytest.approx(1.0, abs=1e-3)
    f = features_of(torch.stack([plane_wave(3, 0, phase=p) for p in (1.0, 2.0, 1.0)]))
    assert f["cross_channel_coherence_low"] == pytest.approx(1 / 3, abs=1e-4)  # one of three octaves, every pair
    assert f["cross_channel_coherence_high"] == pytest.approx(0.0, abs=1e-4)


def test_eigenvalues_agree_with_lapack() -> None:
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((200, 3, 3))
    factors[:20, :, 2] = 0.0  # rank two
    matrices = factors @ factors.transpose(0, 2, 1)
    matrices[20] = np.eye(3)
    diagonal = torch.from_numpy(matrices[:, [0, 1, 2], [0, 1, 2]])
    off = torch.from_numpy(matrices[:, [0, 0, 1], [1, 2, 2]])
    expected = np.linalg.eigvalsh(matrices)[:, ::-1]
    assert symmetric_eigenvalues(diagonal, off).numpy() == pytest.approx(expected, abs=1e-6 * expected.max())


def test_energy_activity_and_norms() -> None:
    first, second = white(1), white(2)
    series = series_of(torch.stack([first, second]), initial=torch.zeros(3, G, G))
    assert series.energy[:, 0].tolist() == pytest.approx([u.square().mean().item() for u in (first, second)], rel=1e-5)
    changes = [first.square().mean().sqrt().item(), (second - first).square().mean().sqrt().item()]
    assert series.activity[:, 0].tolist() == pytest.approx(changes, rel=1e-5)
    l1, l2, tv = series.norms[0, 0, :3].tolist()
    assert l1 == pytest.approx(first.abs().mean().item(), rel=1e-5)
    assert l2 == pytest.approx(first.square().mean().sqrt().item(), rel=1e-5)
    gx, gy = first.roll(-1, 2) - first, first.roll(-1, 1) - first
    assert tv == pytest.approx((gx**2 + gy**2).sqrt().mean().item(), rel=1e-5)
    blocks = first.unflatten(1, (16, 4)).unflatten(3, (16, 4)).mean((2, 4))
    assert series.norms[0, 0, 3].item() == pytest.approx(blocks.abs().mean().item(), rel=1e-4)
    assert series.norms[0, 0, 4].item() == pytest.approx(blocks.square().mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("velocity", [(0.4, 0.0), (0.0, -0.7), (0.3, 0.5)])
def test_velocity_of_a_translation(velocity: tuple[float, float]) -> None:
    spectrum = torch.fft.fft2(torch.stack([plane_wave(2, 1), plane_wave(1, -3), plane_wave(0, 2) + plane_wave(3, 0)]))
    k = 2 * math.pi * torch.fft.fftfreq(G, dtype=torch.float64)
    moved = spectrum * torch.exp(-1j * (k[None, :] * velocity[0] + k[:, None] * velocity[1]))
    states = torch.fft.ifft2(torch.stack([spectrum, moved])).real
    series = series_of(states)
    assert series.velocity[0, 0].tolist() == pytest.approx([0.0, 0.0], abs=1e-4)
    assert series.velocity[1, 0].tolist() == pytest.approx(list(velocity), abs=0.02)


def test_values_at_the_clipping_bound_are_flagged() -> None:
    inside, at_bound = torch.full((3, G, G), 9.9), torch.zeros(3, G, G)
    at_bound[0, :2] = -10.0  # 128 of 12,288 values: just above a percent
    almost = torch.zeros(3, G, G)
    almost[0, 0] = 10.0
    assert series_of(torch.stack([inside, at_bound, almost])).at_bound[:, 0].tolist() == [False, True, False]


def test_blocks_join_to_the_whole() -> None:
    states = torch.stack([white(seed) for seed in range(6)]).float()[:, None]
    initial = torch.zeros(1, 3, G, G)
    whole = StepFeatures(initial, 10.0, WAVES).block(states)
    steps = StepFeatures(initial, 10.0, WAVES)
    parts = concatenate_series([steps.block(states[:2]), steps.block(states[2:])])
    for name, value in vars(whole).items():
        assert torch.allclose(getattr(parts, name).double(), value.double(), atol=1e-5, rtol=1e-5), name
