"""Features of the relations between the channels of a state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spinlock_fast.descriptors.registry import PAIRS
from spinlock_fast.descriptors.spectral import BANDS, TINY, Wavenumbers

_LOW_BANDS = 3  # below 8 cycles per side
_LEAST_RATIO = 1e-10
_EMPTY_SHARE = 1e-12


def cross_channel_features(real: Tensor, imag: Tensor, sums: dict[str, Tensor], waves: Wavenumbers) -> Tensor:
    """The 17 columns of `registry.CROSS_CHANNEL`.

    Args:
        real, imag: Fourier coefficients [B, 3, G (G/2 + 1)].
        sums: of |F|^2, over [3 B].
        waves: wavenumbers of the grid.
    """
    own = {name: sums[name].view(len(real), 3, -1).double() for name in ("total", "dx2", "dy2", "bands")}
    variance, gradient = own["total"][..., 0], (own["dx2"] + own["dy2"])[..., 0]
    co, quadrature = _cross_spectra(real, imag, waves)  # [B, 3, 2 + bands], [B, 3, bands]
    covariance = co[..., 0]
    correlation = _ratio(covariance, variance).clamp_(-1.0, 1.0)
    aligned = _ratio(co[..., 1], gradient).mean(1)
    first, second = (own["bands"][:, [pair[side] for pair in PAIRS]] for side in (0, 1))
    # A band that contains rounding errors only has no coherence.
    empty = torch.minimum(first, second) < _EMPTY_SHARE * variance.amax(1)[:, None, None] + TINY
    coherence = (co[..., 2:].square() + quadrature.square()) / (first * second + TINY**2)
    coherence = torch.where(empty, 0.0, coherence.clamp_(0.0, 1.0)).mean(1)  # [B, bands]
    information = -0.5 * torch.log1p(-correlation.square().clamp(max=1.0 - _LEAST_RATIO))
    eigenvalues = symmetric_eigenvalues(variance, covariance)
    trace = variance.sum(1)
    columns = [
        *eigenvalues.unbind(1),
        trace,
        -torch.log((eigenvalues[:, 2] / (eigenvalues[:, 0] + TINY)).clamp(_LEAST_RATIO, 1.0)),
        trace.square() / (eigenvalues.square().sum(1) + TINY),
        *correlation.unbind(1),
        correlation.abs().mean(1),
        correlation.amax(1),
        correlation.amin(1),
        information.mean(1),
        information.amax(1),
        coherence[:, :_LOW_BANDS].mean(1),
        coherence[:, _LOW_BANDS:BANDS].mean(1),
        aligned,
    ]
    return torch.stack(columns, 1).float()


def _cross_spectra(real: Tensor, imag: Tensor, waves: Wavenumbers) -> tuple[Tensor, Tensor]:
    """Weighted sums over wavenumbers of the real and imaginary parts of F_i conj(F_j) over pairs."""
    co, quadrature = [], []
    product = torch.empty(len(real), real.shape[2], device=real.device)
    for i, j in PAIRS:
        torch.mul(real[:, i], real[:, j], out=product).addcmul_(imag[:, i], imag[:, j])
        co.append(product @ waves.cross_weights)
        torch.mul(imag[:, i], real[:, j], out=product).addcmul_(real[:, i], imag[:, j], value=-1.0)
        quadrature.append(product @ waves.cross_weights[:, 2:])
    return torch.stack(co, 1).double(), torch.stack(quadrature, 1).double()


def symmetric_eigenvalues(diagonal: Tensor, off: Tensor) -> Tensor:
    """Eigenvalues, descending, of positive semi-definite 3 x 3 matrices (Smith 1961).

    Args:
        diagonal: a_00, a_11, a_22: [B, 3].
        off: a_01, a_02, a_12: [B, 3].
    """
    middle = diagonal.mean(1)
    d = diagonal - middle[:, None]
    spread = ((d.square().sum(1) + 2.0 * off.square().sum(1)) / 6.0).sqrt()
    scale = 1.0 / spread.clamp(min=1e-150)
    (a, b, c), (p, q, r) = (d * scale[:, None]).unbind(1), (off * scale[:, None]).unbind(1)
    half = (a * (b * c - r * r) - p * (p * c - r * q) + q * (p * r - b * q)) / 2.0
    angle = torch.acos(half.clamp(-1.0, 1.0)) / 3.0
    largest = middle + 2.0 * spread * torch.cos(angle)
    least = middle + 2.0 * spread * torch.cos(angle + 2.0 * math.pi / 3.0)
    return torch.stack([largest, 3.0 * middle - largest - least, least], 1).clamp(min=0.0)


def _ratio(products: Tensor, squares: Tensor) -> Tensor:
    """products_ij / sqrt(squares_i squares_j) over pairs: [B, 3]."""
    norms = torch.stack([squares[:, i] * squares[:, j] for i, j in PAIRS], 1).sqrt()
    return torch.where(norms > TINY, products / (norms + TINY), 0.0)
