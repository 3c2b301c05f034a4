"""Spectral features of fields on the torus: every sum over wavenumbers is one matrix product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spinlock_fast.kernels._common.native import address, library, native_supports

TINY = 1e-20  # added to denominators: a constant field gives 0
BANDS = 5
_ROLLOFF = 0.85


class Wavenumbers:
    """Weights of the modes of a real transform of [G, G], for products with power spectra [B, G (G/2 + 1)].

    Args:
        grid: G, points along a side.
        device: where the weights live.
    """

    def __init__(self, grid: int, device: torch.device) -> None:
        ky = torch.fft.fftfreq(grid, 1.0 / grid, dtype=torch.float64)[:, None].expand(grid, grid // 2 + 1)
        kx = torch.fft.rfftfreq(grid, 1.0 / grid, dtype=torch.float64)[None, :].expand_as(ky)
        k = torch.hypot(kx, ky)
        weight = torch.full_like(k, 2.0)  # a stored mode represents itself and its conjugate
        weight[:, 0] = weight[:, -1] = 1.0
        weight[0, 0] = 0.0  # the mean is excluded
        self.grid, self.modes = grid, grid**2 - 1
        self.shells = int(k.max().round()) + 1
        shell = torch.nn.functional.one_hot(k.round().long(), self.shells).double()  # [G, G/2 + 1, shells]
        octave = torch.log2(k.clamp(min=1.0)).floor().clamp(max=BANDS - 1).long()
        band = torch.nn.functional.one_hot(octave, BANDS).double()
        dx, dy = (2.0 - 2.0 * torch.cos(2.0 * math.pi * f / grid) for f in (kx, ky))  # of forward differences
        columns = [
            *shell.unbind(-1),
            *band.unbind(-1),
            *(band * ((kx**2 - ky**2) / k.square().clamp(min=1.0))[..., None]).unbind(-1),
            *(k, kx.abs(), ky.abs(), k.square()),
            *(dx, dy, (dx + dy).square()),
            *((2.0 * math.pi / grid) ** 2 * moment for moment in (kx**2, ky**2, kx * ky)),
        ]
        self.weights = self._flatten_columns(columns, weight, device)  # [G (G/2 + 1), columns]
        self.cross_weights = self._flatten_columns([torch.ones_like(k), dx + dy, *band.unbind(-1)], weight, device)
        self.flow_weights = self._flatten_columns(
            [2.0 * math.pi / grid * kx, 2.0 * math.pi / grid * ky], weight, device
        )
        self.multiplicity = self._flatten_columns([torch.ones_like(k)], weight, device)[:, 0]
        pair = torch.full_like(k, 2.0)  # a mode and its conjugate, where both are distinct
        for y, x in ((0, 0), (0, -1), (grid // 2, 0), (grid // 2, -1)):
            pair[y, x] = 1.0
        self.conjugates = pair.reshape(-1).float().to(device)
        self.band_modes = (band * weight[..., None]).sum((0, 1)).float().to(device)
        self.kx, self.ky = kx.abs().reshape(-1).float().to(device), ky.abs().reshape(-1).float().to(device)

    def _flatten_columns(self, columns: list[Tensor], weight: Tensor, device: torch.device) -> Tensor:
        return torch.stack([(column * weight).reshape(-1) for column in columns], 1).float().to(device)

    def transform(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary Fourier coefficients [B, G (G/2 + 1)] of fields [B, G, G].

        Sums of their squares over all modes are mean squares over the grid.
        """
        real, imag, _ = self.power(fields)
        return real, imag

    def power(self, fields: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `transform`, and the squared moduli."""
        coefficients = torch.fft.rfft2(fields, norm="forward").flatten(1)
        if native_supports(fields) and not coefficients.requires_grad:
            real, imag, power = torch.empty(3, *coefficients.shape).unbind()
            library.split_complex(
                address(coefficients), coefficients.numel(), address(real), address(imag), address(power)
            )
            return real, imag, power
        real, imag = coefficients.real.contiguous(), coefficients.imag.contiguous()
        return real, imag, real.square().addcmul_(imag, imag)

    def sums(self, power: Tensor) -> dict[str, Tensor]:
        """Named sums over wavenumbers of |F|^2 [B, G (G/2 + 1)]: [B] or [B, shells or bands] each."""
        shells, bands, band_anisotropy, moments = (power @ self.weights).split([self.shells, BANDS, BANDS, 10], 1)
        labels = ("k", "kx", "ky", "k2", "dx2", "dy2", "laplacian2", "flow_xx", "flow_yy", "flow_xy")
        out = dict(zip(labels, moments.unbind(1), strict=True))
        return {"shells": shells, "bands": bands, "band_anisotropy": band_anisotropy, "total": bands.sum(1), **out}


def spectral_features(power: Tensor, sums: dict[str, Tensor], waves: Wavenumbers) -> Tensor:
    """The 27 columns of `registry.SPECTRAL` of power spectra [B, G (G/2 + 1)]: [B, 27]."""
    total = sums["total"] + TINY
    bands = sums["bands"]
    # The mean is excluded from all columns below.
    power[:, 0] = 0.0
    # numpy finds the largest values of rows several times faster than torch on a CPU.
    place = power.argmax(1) if power.is_cuda else torch.from_numpy(power.numpy().argmax(1))
    strongest = power.gather(1, place[:, None])[:, 0]
    kx, ky = waves.kx[place], waves.ky[place]
    centroid = sums["k"] / total
    logs = power.add(TINY).log_()
    geometric = torch.exp(logs @ waves.multiplicity / waves.modes)
    information = logs.mul_(power) @ waves.multiplicity
    share = (bands / total[:, None]).clamp_(0.0, 1.0)
    # -sum p ln p with p = power / total
    entropy = ((sums["total"] / total) * total.log() - information / total) / math.log(waves.modes)
    reached = sums["shells"].cumsum(1) < _ROLLOFF * sums["total"][:, None]
    columns = [
        *bands.unbind(1),
        *share.unbind(1),
        *(sums["band_anisotropy"] / (bands + TINY)).unbind(1),
        kx,
        ky,
        torch.hypot(kx, ky),
        strongest * waves.conjugates[place] / total,
        centroid,
        sums["kx"] / total,
        sums["ky"] / total,
        (sums["k2"] / total - centroid.square()).clamp_(min=0.0).sqrt_(),
        torch.where(sums["total"] > TINY, geometric * waves.modes / total, 0.0),
        entropy.clamp_(0.0, 1.0),
        reached.sum(1).float(),
        _slope((bands / waves.band_modes + TINY).log_()),
    ]
    return torch.stack(columns, 1)


def _slope(logs: Tensor) -> Tensor:
    """Least-squares slope over ln k of the octaves' log densities [B, 5]."""
    x = math.log(2.0) * (torch.arange(BANDS, device=logs.device) - (BANDS - 1) / 2)
    return logs @ x / x.square().sum()
