"""Statistics of single fields on the torus."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spinlock_fast.descriptors.spectral import TINY

_PERCENTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def spatial_features(fields: Tensor, sums: dict[str, Tensor]) -> Tensor:
    """The 19 columns of `registry.SPATIAL` of fields [B, G, G], given their spectral sums: [B, 19]."""
    flat = fields.flatten(1)
    points = flat.shape[1]
    mean = flat.mean(1)
    centered = flat - mean[:, None]
    interfaces = _interface_density(centered.view_as(fields))
    square = centered.square()
    m2 = square.mean(1)
    m3 = centered.mul_(square).sum(1) / points
    m4 = square.square_().sum(1) / points
    gradient, gradient_square = total_variation(fields), sums["dx2"] + sums["dy2"]
    columns = [
        mean,
        m2,
        m2.sqrt(),
        m3 / (m2.pow(1.5) + TINY),
        torch.where(m2 > TINY, m4 / (m2.square() + TINY) - 3.0, 0.0),
        flat.amin(1),
        flat.amax(1),
        *_percentiles(fields).unbind(1),
        flat.abs().mean(1),
        gradient,
        (gradient_square - gradient.square()).clamp(min=0.0).sqrt_(),
        (sums["dx2"] - sums["dy2"]) / (gradient_square + TINY),
        sums["laplacian2"].sqrt(),
        # <u u'> = m2 - <(u - u')^2> / 2, averaged over both axes
        torch.where(m2 > TINY, 1.0 - gradient_square / (4.0 * m2 + TINY), 0.0),
        interfaces,
    ]
    return torch.stack(columns, 1)


def differences(fields: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences along x and y on the torus: [B, G, G] each."""
    gx, gy = torch.empty_like(fields), torch.empty_like(fields)
    torch.sub(fields[..., 1:], fields[..., :-1], out=gx[..., :-1])
    torch.sub(fields[..., 0], fields[..., -1], out=gx[..., -1])
    torch.sub(fields[..., 1:, :], fields[..., :-1, :], out=gy[..., :-1, :])
    torch.sub(fields[..., 0, :], fields[..., -1, :], out=gy[..., -1, :])
    return gx, gy


def total_variation(fields: Tensor) -> Tensor:
    """Mean length of the gradient: [B, G, G] -> [B]."""
    gx, gy = differences(fields)
    return gx.square_().addcmul_(gy, gy).sqrt_().mean((1, 2))


def _percentiles(fields: Tensor) -> Tensor:
    """[B, 5], by linear interpolation between the sorted values of even rows and columns."""
    values = fields[:, ::2, ::2].flatten(1)
    # numpy sorts short float32 rows about five times faster than torch on a CPU.
    ordered = torch.sort(values, 1).values if values.is_cuda else torch.from_numpy(np.sort(values.numpy(), axis=1))
    out = []
    for share in _PERCENTILES:
        place = share * (values.shape[1] - 1)
        low = int(place)
        out.append(torch.lerp(ordered[:, low], ordered[:, low + 1], place - low))
    return torch.stack(out, 1)


def _interface_density(centered: Tensor) -> Tensor:
    # float: torch sums small integers several times more slowly.
    gx, gy = differences((centered > 0.0).float())
    return (gx.abs_().sum((1, 2)) + gy.abs_().sum((1, 2))) / (2.0 * gx[0].numel())
