"""Initial conditions u0: ten named types in four families of equal share.

The channels of a field are independent, on the periodic unit square of `grid` x `grid` points.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Field2D = NDArray[np.float64]
CHANNELS = 3

_VARIANCES = (0.1, 0.25, 0.5, 1.0, 2.0)
_BANDS = {"low": (1.0, 4.0), "mid": (4.0, 10.0), "high": (10.0, 24.0)}  # cycles per domain

# name -> (family, share of the operators)
INITIAL_TYPES: dict[str, tuple[str, float]] = {
    **{f"gaussian_random_field_v{i}": ("gaussian", 0.05) for i in range(len(_VARIANCES))},
    **{f"multiscale_grf_{band}": ("band_limited", 0.25 / len(_BANDS)) for band in _BANDS},
    "structured": ("sinusoids", 0.25),
    "localized": ("blobs", 0.25),
}


def initial_field(name: str, grid: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """u0 [3, grid, grid] of a named type.

    gaussian_random_field_v0..v4: variance 0.1, 0.25, 0.5, 1, 2; Gaussian correlation of length 3/64 to
    8/64 of the side. multiscale_grf_low, _mid, _high: unit variance, wavenumbers 1-4, 4-10, 10-24.
    structured: one to three plane waves of unit amplitude. localized: three to six Gaussian blobs.
    """
    draw = _field_sampler(name, grid, rng)
    return np.stack([draw() for _ in range(CHANNELS)]).astype(np.float32)


def _field_sampler(name: str, grid: int, rng: np.random.Generator) -> Callable[[], Field2D]:
    if name.startswith("gaussian_random_field_v"):
        variance = _VARIANCES[int(name[-1])]
        length = rng.uniform(3.0, 8.0) / 64.0
        return lambda: _random_field(rng, np.exp(-0.5 * (np.pi * length * _wavenumbers(grid)) ** 2), variance)
    if name.startswith("multiscale_grf_"):
        low, high = _BANDS[name.rsplit("_", 1)[1]]
        k = _wavenumbers(grid)
        return lambda: _random_field(rng, ((k >= low) & (k < high)).astype(np.float64), 1.0)
    if name == "structured":
        return lambda: _waves(rng, grid)
    if name == "localized":
        return lambda: _blobs(rng, grid)
    raise ValueError(f"unknown initial condition {name!r}")


def _wavenumbers(grid: int) -> Field2D:
    """|k| in cycles per domain of the modes of a real transform: [grid, grid // 2 + 1]."""
    ky, kx = np.fft.fftfreq(grid, 1.0 / grid)[:, None], np.fft.rfftfreq(grid, 1.0 / grid)[None, :]
    k: Field2D = np.hypot(ky, kx)
    return k


def _random_field(rng: np.random.Generator, amplitude: Field2D, variance: float) -> Field2D:
    """White noise filtered in Fourier space and scaled to the sample variance `variance`."""
    grid = amplitude.shape[0]
    field: Field2D = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((grid, grid))) * amplitude, s=(grid, grid))
    field *= np.sqrt(variance / field.var())
    return field


def _waves(rng: np.random.Generator, grid: int) -> Field2D:
    x = np.arange(grid) / grid
    field = np.zeros((grid, grid))
    for _ in range(rng.integers(1, 4)):
        kx, ky = rng.integers(-5, 6, size=2)
        phase = 2.0 * np.pi * (ky * x[:, None] + (kx or 1) * x[None, :] + rng.random())
        field += np.sin(phase)
    return field


def _blobs(rng: np.random.Generator, grid: int) -> Field2D:
    x = np.arange(grid) / grid
    field = np.zeros((grid, grid))
    for _ in range(rng.integers(3, 7)):
        center, width = rng.random(2), rng.uniform(2.0, 7.0) / 64.0
        dy, dx = (np.abs(x - c) for c in center)
        dy, dx = np.minimum(dy, 1.0 - dy), np.minimum(dx, 1.0 - dx)
        amplitude = rng.uniform(0.5, 2.5) * rng.choice((-1.0, 1.0))
        field += amplitude * np.exp(-(dy[:, None] ** 2 + dx[None, :] ** 2) / (2.0 * width**2))
    return field
