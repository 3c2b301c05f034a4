"""Spatially correlated Gaussian noise and dropout masks with one random stream per place of use.

Each (seed, operator, realization, block of steps) has its own generator, so that no number depends on the other
operators of a simulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from spinlock_fast.simulate.initial_conditions import CHANNELS
from spinlock_fast.simulate.parameters import Theta

BLOCK_STEPS = 16  # steps whose noise is drawn together; changing it changes all data


class Purpose(IntEnum):
    """Purpose of a random stream."""

    THETA = 0
    WEIGHTS = 1
    INITIAL = 2
    NOISE = 3
    PROBE = 4


def generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """The random stream of a purpose and a place, for instance (operator, realization, block)."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, int(purpose), *place])))


def spectral_filter(correlation: float, grid: int) -> Tensor:
    """Amplitudes [grid, grid // 2 + 1] that give white noise the autocorrelation exp(-r^2 / (2 correlation^2)).

    By the Wiener-Khinchin theorem the power spectrum is the Fourier transform of the autocorrelation,
    exp(-2 pi^2 correlation^2 f^2); the amplitude is its square root, normalised to unit variance.
    """
    fy, fx = torch.fft.fftfreq(grid, dtype=torch.float64), torch.fft.rfftfreq(grid, dtype=torch.float64)
    amplitude = torch.exp(-((math.pi * correlation) ** 2) * (fy[:, None] ** 2 + fx[None, :] ** 2))
    twice = torch.full((grid // 2 + 1,), 2.0, dtype=torch.float64)
    twice[0] = twice[-1] = 1.0
    variance = (amplitude.square() * twice).sum() / grid**2
    return (amplitude / variance.sqrt()).float()


def schedule(theta: Theta, steps: int) -> Tensor:
    """Standard deviation of the noise at each step: [steps].

    constant: noise_scale; decaying: noise_scale exp(-4 t / T); periodic: noise_scale (1 + sin(2 pi t / 32)).
    """
    t = torch.arange(steps, dtype=torch.float64)
    shape = {
        "constant": torch.ones_like(t),
        "decaying": torch.exp(-4.0 * t / steps),
        "periodic": 1.0 + torch.sin(2.0 * math.pi * t / 32.0),
    }[theta.noise_schedule]
    return (theta.noise_scale * shape).float()


class NoiseSource:
    """Noise and dropout masks of some operators in blocks of steps.

    Args:
        thetas: the operators.
        seed: seed of the data set.
        realizations: M, trajectories of an operator.
        grid: points along a side.
        steps: T, steps of a trajectory.
        mask_shape: (hidden layers, channels) of the masks, zero-padded beyond an operator's own.
        device: device of the noise. Streams of a CUDA device differ from those of the CPU.
    """

    def __init__(
        self,
        thetas: Sequence[Theta],
        seed: int,
        realizations: int,
        grid: int,
        steps: int,
        mask_shape: tuple[int, int],
        device: torch.device,
    ) -> None:
        self._thetas, self._seed, self._device = thetas, seed, device
        self._realizations, self._grid = realizations, grid
        self._mask_shape = mask_shape
        filters = torch.stack([spectral_filter(theta.noise_correlation, grid) for theta in thetas])
        self._filter = filters[:, None].to(device)  # [O, 1, G, G // 2 + 1]
        self._scale = torch.stack([schedule(theta, steps) for theta in thetas], 1).to(device)  # [T, O]

    def block(self, index: int) -> tuple[Tensor, Tensor]:
        """Noise [S, M, O, 3, G, G] and masks [S, M, O, hidden layers, C] of a block of S steps."""
        pairs = [(theta, r) for r in range(self._realizations) for theta in self._thetas]
        shape = (BLOCK_STEPS, self._realizations, len(self._thetas))
        streams = [generator(self._seed, Purpose.NOISE, theta.index, r, index) for theta, r in pairs]
        masks = torch.stack([self._mask(theta, rng) for (theta, _), rng in zip(pairs, streams, strict=True)], 1)
        white = torch.empty(BLOCK_STEPS, len(pairs), CHANNELS, self._grid, self._grid, device=self._device)
        for i, rng in enumerate(streams):
            self._draw(rng, white[:, i])
        white = white.view(*shape, CHANNELS, self._grid, self._grid)
        scale = self._scale[index * BLOCK_STEPS : (index + 1) * BLOCK_STEPS]
        spectrum = torch.fft.rfft2(white[: len(scale)]).mul_(self._filter)
        noise = torch.fft.irfft2(spectrum, s=(self._grid, self._grid))
        noise *= scale[:, None, :, None, None, None]
        return noise, masks.view(*shape, *self._mask_shape).to(self._device)

    def _mask(self, theta: Theta, rng: np.random.Generator) -> Tensor:
        """Mask of channel dropout (Tompson et al. 2015) with kept channels scaled by 1 / (1 - rate): [S, layers, C]."""
        layers, channels = theta.num_layers - 1, theta.base_channels
        keep_mask = rng.random((BLOCK_STEPS, layers, channels)) >= theta.dropout_rate
        mask = torch.zeros(BLOCK_STEPS, *self._mask_shape)
        mask[:, :layers, :channels] = torch.from_numpy(keep_mask / (1.0 - theta.dropout_rate)).float()
        return mask

    def _draw(self, rng: np.random.Generator, out: Tensor) -> None:
        """Fills [S, 3, G, G] with independent standard normal values."""
        if self._device.type == "cuda":
            own = torch.Generator(self._device)
            own.manual_seed(int(rng.integers(2**63)))
            out.normal_(generator=own)
            return
        out.copy_(box_muller(torch.from_numpy(rng.random(out.numel(), dtype=np.float32))).view_as(out))


def box_muller(uniform: Tensor) -> Tensor:
    """Standard normal values from an even number of uniform values in [0, 1) (Box and Muller 1958)."""
    radius, angle = uniform.view(2, -1)
    # 1 - u lies in (0, 1]: the logarithm is finite.
    radius = torch.sub(1.0, radius).log_().mul_(-2.0).sqrt_()
    angle = angle * (2.0 * math.pi)
    normal = torch.empty_like(uniform).view(2, -1)
    torch.cos(angle, out=normal[0])
    torch.sin(angle, out=normal[1])
    return (normal * radius).view(-1)
