"""Statistics of single fields on the torus."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.descriptors.spectral import TINY
from spinlock_fast.kernels._common.native import address, library, native_supports

_PERCENTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def spatial_features(fields: Tensor, sums: dict[str, Tensor]) -> Tensor:
    """The 19 columns of `registry.SPATIAL` of fields [B, G, G], given their spectral sums: [B, 19]."""
    flat = fields.flatten(1)
    points = flat.shape[1]
    mean = flat.mean(1)
    centered = flat - mean[:, None]
    interfaces, least, greatest = _interfaces_and_extremes(fields, mean)
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
        least,
        greatest,
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
    if native_supports(fields):
        squares = torch.empty_like(fields)
        library.squared_gradients(address(fields), len(fields), fields.shape[2], address(squares))
        return squares.sqrt_().mean((1, 2))
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


def block_means(fields: Tensor, scale: int) -> Tensor:
    """Means of blocks of side `scale`: [..., G, G] -> [..., G / scale, G / scale]."""
    if not native_supports(fields):
        return F.avg_pool2d(fields, scale)
    *batch, G, _ = fields.shape
    out = torch.empty(*batch, G // scale, G // scale)
    library.block_means(address(fields), math.prod(batch), G, scale, address(out))
    return out


def _interfaces_and_extremes(fields: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Share of neighbouring pairs on two sides of the mean, minimum, maximum: [B] each."""
    pairs = 2.0 * fields[0].numel()
    if native_supports(fields):
        found = count, least, greatest = torch.empty(3, len(fields)).unbind()
        library.interfaces_and_extremes(
            address(fields), address(mean), len(fields), fields.shape[2], *(address(out) for out in found)
        )
        return count / pairs, least, greatest
    # float: torch sums small integers several times more slowly.
    gx, gy = differences((fields - mean[:, None, None] > 0.0).float())
    interfaces = (gx.abs_().sum((1, 2)) + gy.abs_().sum((1, 2))) / pairs
    return interfaces, fields.flatten(1).amin(1), fields.flatten(1).amax(1)
