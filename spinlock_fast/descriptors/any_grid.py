"""Descriptors of states on any grid: one, two or three space dimensions, any number of channels.

The definitions are those of `spinlock_fast.descriptors.registry`. Every operation is differentiable and out of place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.descriptors.geometry import BANDS, FourierModes, Grid
from spinlock_fast.descriptors.registry import SPATIAL
from spinlock_fast.kernels._common.native import native_supports

TINY = 1e-20  # added to denominators: a constant field gives 0
_PERCENTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_ROLLOFF = 0.85
_LOW_BANDS = 3  # below 8 cycles per side
_LEAST_RATIO = 1e-10
_MEAN_ABS, _GRADIENT_MEAN = (
    [feature.name for feature in SPATIAL].index(name) for name in ("mean_abs", "gradient_mean")
)
_EMPTY_SHARE = 1e-12  # of the largest variance: a band with less holds rounding errors


@dataclass(frozen=True)
class Series:
    """Time series of trajectories; T states, B trajectories, R = T - 1 changes (T where an initial state is given)."""

    state: Tensor  # [T, B, D] descriptors of each state
    energy: Tensor  # [T, B] mean square
    activity: Tensor  # [R, B] root mean square change per time step
    velocity: Tensor  # [R, B, d] of the translation that fits the change best, length per time step
    norms: Tensor  # [T, B, 3 * scales] L1, L2, total variation of block means
    probes: Tensor  # [T, B, C, P] values at fixed points


class StateDescriptors:
    """Computes descriptors of consecutive blocks of states of the same trajectories.

    Args:
        grid: the grid of the fields.
        scales: sides of the blocks whose means give the norms.
        device, dtype: of the fields; float32 or float64.
        initial: the state before the first block [B, C, *space]; None where there is none.
        modes: those of the grid, where they are known.
    """

    def __init__(
        self,
        grid: Grid,
        scales: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        initial: Tensor | None = None,
        modes: FourierModes | None = None,
    ) -> None:
        self.grid = grid
        self.scales = tuple(scales)
        self.modes = FourierModes(grid, device, dtype) if modes is None else modes
        self._last = initial
        self._probes = [torch.tensor(axis, device=device) for axis in grid.probes]

    def block(self, states: Tensor) -> Series:
        """Descriptors of the next S states [S, B, C, *space]."""
        S, B, C = states.shape[:3]
        fields = states.reshape(S * B * C, *self.grid.extents)
        gradients = [self._difference(fields, i) for i in range(self.grid.dimensions)]
        coefficients = self.modes.transform(fields)
        real, imag = coefficients.real.contiguous(), coefficients.imag.contiguous()
        power = real.square() + imag.square()
        spatial = _spatial(fields, gradients, self.grid, self._laplacian(gradients)).view(S, B, C, -1).mean(2)
        spectral = _spectral(power, self.modes).view(S, B, C, -1).mean(2)
        parts = [spatial, spectral]
        if C > 1:
            by_channel = [g.view(S * B, C, -1) for g in gradients]
            parts.append(
                _cross_channel(
                    real.view(S * B, C, -1), imag.view(S * B, C, -1), power.view(S * B, C, -1), by_channel, self.modes
                ).view(S, B, -1)
            )
        energy = fields.flatten(1).square().mean(1).view(S, B, C).mean(2)
        before = states if self._last is None else torch.cat([self._last[None], states])
        series = Series(
            state=torch.cat(parts, 2),
            energy=energy,
            activity=root((before[1:] - before[:-1]).square().flatten(2).mean(2)),
            velocity=self._velocity(before, coefficients.view(S, B, C, -1)),
            norms=self._norms(states, energy, spatial),
            probes=self._at_probes(states),
        )
        self._last = states[-1]
        return series

    def _next(self, fields: Tensor, axis: int) -> Tensor:
        """The neighbour of every point in the direction of an axis; at an end that is not periodic the point itself."""
        dim = axis - self.grid.dimensions
        if self.grid.periodic[axis]:
            return fields.roll(-1, dim)
        n = fields.shape[dim]
        return torch.cat([fields.narrow(dim, 1, n - 1), fields.narrow(dim, n - 1, 1)], dim)

    def _previous(self, fields: Tensor, axis: int) -> Tensor:
        dim = axis - self.grid.dimensions
        if self.grid.periodic[axis]:
            return fields.roll(1, dim)
        n = fields.shape[dim]
        return torch.cat([fields.narrow(dim, 0, 1), fields.narrow(dim, 0, n - 1)], dim)

    def _difference(self, fields: Tensor, axis: int) -> Tensor:
        """Forward difference over the spacing."""
        return (self._next(fields, axis) - fields) / self.grid.spacing[axis]

    def _laplacian(self, gradients: Sequence[Tensor]) -> Tensor:
        """Sum of the backward differences of forward differences; those beyond an end that is not periodic are 0."""
        parts = []
        for i, (slope, step) in enumerate(zip(gradients, self.grid.spacing, strict=True)):
            dim = i - self.grid.dimensions
            n = slope.shape[dim]
            before = slope.narrow(dim, n - 1, 1)
            before = before if self.grid.periodic[i] else torch.zeros_like(before)
            parts.append((slope - torch.cat([before, slope.narrow(dim, 0, n - 1)], dim)) / step)
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _velocity(self, states: Tensor, coefficients: Tensor) -> Tensor:
        """Least-squares translation between consecutive states [R + 1, B, C, *space] -> [R, B, d] (Lucas, Kanade 1981).

        By the phases of Fourier modes on a periodic grid, by central differences on any other.
        """
        R, B, C = states.shape[0] - 1, *states.shape[1:3]
        d = self.grid.dimensions
        if R == 0:
            return states.new_zeros(0, B, d)
        if all(self.grid.periodic):
            modes = coefficients
            if len(modes) == R:
                first = self.modes.transform(states[0].reshape(B * C, *self.grid.extents)).view(1, B, C, -1)
                modes = torch.cat([first, modes])
            weight = self.modes.multiplicity
            factor = 2.0 * math.pi / max(self.grid.sides)
            # The imaginary part of F_t conj(F_(t-1)), which is |F|^2 exp(-i k.v) for a translation by v.
            phase = (modes[1:] * modes[:-1].conj()).imag.sum(2) * weight
            power = (modes[1:].real.square() + modes[1:].imag.square()).sum(2) * weight
            right = -factor * torch.stack([phase @ k for k in self.modes.k], 2)
            rows = [torch.stack([power @ (a * b) for b in self.modes.k], 2) for a in self.modes.k]
            matrix = factor**2 * torch.stack(rows, 2)
        else:
            now = states[1:]
            slopes = [
                (self._next(now, i) - self._previous(now, i)).flatten(2) / (2.0 * step)
                for i, step in enumerate(self.grid.spacing)
            ]
            change = (now - states[:-1]).flatten(2)
            right = -torch.stack([(slope * change).mean(2) for slope in slopes], 2)
            matrix = torch.stack([torch.stack([(a * b).mean(2) for b in slopes], 2) for a in slopes], 2)
        matrix, right = matrix.double(), right.double()
        ridge = TINY + 1e-12 * matrix.diagonal(dim1=2, dim2=3).sum(2)
        eye = torch.eye(d, dtype=matrix.dtype, device=matrix.device)
        velocity = torch.linalg.solve(matrix + ridge[..., None, None] * eye, right[..., None])[..., 0]
        limit = torch.tensor(self.grid.sides, dtype=velocity.dtype, device=velocity.device)
        return torch.maximum(torch.minimum(velocity, limit), -limit).to(states.dtype)

    def _norms(self, states: Tensor, energy: Tensor, spatial: Tensor) -> Tensor:
        """L1, L2 and total variation of block means: [S, B, 3 * scales]."""
        S, B, C = states.shape[:3]
        fields = states.reshape(S * B * C, 1, *self.grid.extents)
        pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[self.grid.dimensions]
        columns = []
        for scale in self.scales:
            if scale == 1:  # computed already
                columns += [spatial[..., _MEAN_ABS], root(energy), spatial[..., _GRADIENT_MEAN]]
                continue
            means = pool(fields, scale)
            flat = means.reshape(S, B, -1)
            squares = torch.zeros_like(means)
            for i in range(self.grid.dimensions):
                squares = squares + self._difference(means, i).square()
            columns += [flat.abs().mean(2), root(flat.square().mean(2)), root(squares).reshape(S, B, -1).mean(2)]
        return torch.stack(columns, 2)

    def _at_probes(self, states: Tensor) -> Tensor:
        for i, index in enumerate(self._probes):
            states = states.index_select(3 + i, index)
        return states.flatten(3)


def concatenated(parts: Sequence[Series]) -> Series:
    """Consecutive blocks as one."""
    return Series(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def root(square: Tensor) -> Tensor:
    """sqrt with gradient 0 at 0."""
    zero = square <= 0.0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _spatial(fields: Tensor, gradients: Sequence[Tensor], grid: Grid, laplacian: Tensor) -> Tensor:
    """The group spatial of fields [B, *space]."""
    flat = fields.flatten(1)
    mean = flat.mean(1)
    centred = flat - mean[:, None]
    square_centred = centred.square()
    m2 = square_centred.mean(1)
    m3, m4 = (centred * square_centred).mean(1), square_centred.square().mean(1)
    slopes = [g.square() for g in gradients]
    squares = [s.flatten(1).mean(1) for s in slopes]
    square = torch.stack(squares).sum(0)
    length = root(reduce(torch.add, slopes)).flatten(1).mean(1)
    columns = [
        mean,
        m2,
        root(m2),
        m3 / (m2.pow(1.5) + TINY),
        torch.where(m2 > TINY, m4 / (m2.square() + TINY) - 3.0, 0.0),
        flat.amin(1),
        flat.amax(1),
        *_percentiles(fields).unbind(1),
        flat.abs().mean(1),
        length,
        root((square - length.square()).clamp(min=0.0)),
    ]
    if grid.dimensions == 2:
        columns.append((squares[1] - squares[0]) / (square + TINY))
    elif grid.dimensions == 3:
        stacked = torch.stack(squares)
        columns.append((stacked.amax(0) - stacked.amin(0)) / (square + TINY))
    # <u u'> = m2 - <(u - u')^2> / 2, averaged over the axes
    apart = torch.stack([s * step**2 for s, step in zip(squares, grid.spacing, strict=True)]).mean(0)
    above = (fields - mean.view(-1, *[1] * grid.dimensions) > 0.0).to(fields.dtype)
    columns += [
        root(laplacian.square().flatten(1).mean(1)),
        torch.where(m2 > TINY, 1.0 - apart / (2.0 * m2 + TINY), 0.0),
        _interfaces(above, grid),
    ]
    return torch.stack(columns, 1)


def _interfaces(above: Tensor, grid: Grid) -> Tensor:
    """Share of neighbouring pairs on two sides of the mean."""
    total = torch.zeros(len(above), dtype=above.dtype, device=above.device)
    for i, periodic in enumerate(grid.periodic):
        dim = i - grid.dimensions
        changes = above.diff(dim=dim).abs().flatten(1).sum(1)
        if periodic:
            changes = changes + (above.select(dim, 0) - above.select(dim, -1)).abs().reshape(len(above), -1).sum(1)
        total = total + changes
    return total / (grid.dimensions * grid.points)


def _percentiles(fields: Tensor) -> Tensor:
    """[B, 5], interpolated between sorted values; in two and three dimensions of every second point along each axis."""
    if fields.ndim > 2:
        fields = fields[:, *[slice(None, None, 2)] * (fields.ndim - 1)]
    values = fields.flatten(1)
    # numpy sorts short rows several times faster than torch on a CPU.
    fast = native_supports(values) and not values.requires_grad
    ordered = torch.from_numpy(np.sort(values.numpy(), axis=1)) if fast else torch.sort(values, 1).values
    last = ordered.shape[1] - 1
    out = []
    for share in _PERCENTILES:
        place = share * last
        low = min(int(place), last)
        out.append(torch.lerp(ordered[:, low], ordered[:, min(low + 1, last)], place - low))
    return torch.stack(out, 1)


def _spectral(power: Tensor, modes: FourierModes) -> Tensor:
    """The group spectral of power spectra [B, modes]."""
    weighted = power * modes.multiplicity
    bands = modes.sum_by(power, modes.band, BANDS)
    sum_all = bands.sum(1)
    total = sum_all + TINY
    own = power.clone()
    own[:, 0] = 0.0
    fast = native_supports(own) and not own.requires_grad  # as in `_percentiles`
    place = torch.from_numpy(own.numpy().argmax(1)) if fast else own.detach().argmax(1)
    strongest = own.gather(1, place[:, None])[:, 0]
    share = (bands / total[:, None]).clamp(0.0, 1.0)
    logs = (own + TINY).log()
    geometric = torch.exp(logs @ modes.multiplicity / modes.modes)
    information = (logs * own) @ modes.multiplicity
    # -sum p ln p with p = power / total
    entropy = ((sum_all / total) * total.log() - information / total) / math.log(max(modes.modes, 2.0))
    shells = modes.sum_by(power, modes.shell, modes.shells)
    reached = shells.cumsum(1) < _ROLLOFF * sum_all[:, None]
    centroid = weighted @ modes.norm / total
    mean_square = weighted @ modes.norm.square() / total
    columns = [*bands.unbind(1), *share.unbind(1)]
    dimensions = modes.grid.dimensions
    if dimensions == 2:
        ky, kx = modes.k
        turn = (kx.square() - ky.square()) / modes.norm.square().clamp(min=TINY)
        columns += (modes.sum_by(power * turn, modes.band, BANDS) / (bands + TINY)).unbind(1)
    axes = list(reversed(modes.k)) if dimensions > 1 else []  # x, y, z
    density = bands / modes.band_modes.clamp(min=1.0)
    columns += [
        *(k[place].abs() for k in axes),
        modes.norm[place],
        strongest * modes.conjugates[place] / total,
        centroid,
        *(weighted @ k.abs() / total for k in axes),
        root((mean_square - centroid.square()).clamp(min=0.0)),
        torch.where(sum_all > TINY, geometric * modes.modes / total, 0.0),
        entropy.clamp(0.0, 1.0),
        reached.sum(1).to(power.dtype),
        _slope((density + TINY).log(), modes),
    ]
    return torch.stack(columns, 1)


def _slope(logs: Tensor, modes: FourierModes) -> Tensor:
    """Least-squares slope of log densities [B, 5] over ln k of the octaves that the grid has."""
    held = modes.band_modes > 0.0
    weight = held.to(logs.dtype)
    x = math.log(2.0) * torch.arange(BANDS, dtype=logs.dtype, device=logs.device)
    x = (x - (x * weight).sum() / weight.sum()) * weight
    return (logs * weight) @ x / x.square().sum().clamp(min=TINY)


def _cross_channel(
    real: Tensor, imag: Tensor, power: Tensor, gradients: Sequence[Tensor], modes: FourierModes
) -> Tensor:
    """The group cross_channel.

    Args:
        real, imag: Fourier coefficients [B, C, modes].
        power: their squared moduli [B, C, modes].
        gradients: forward differences along each axis, [B, C, points] each.
    """
    B, C = real.shape[:2]
    pairs = list(combinations(range(C), 2))
    first, second = [i for i, _ in pairs], [j for _, j in pairs]
    covariance = ((real * modes.multiplicity) @ real.mT + (imag * modes.multiplicity) @ imag.mT).double()
    variance = covariance.diagonal(dim1=1, dim2=2)
    correlation = _ratio(covariance[:, first, second], variance[:, first] * variance[:, second]).clamp(-1.0, 1.0)
    slopes = torch.cat(list(gradients), 2)
    gram = (slopes @ slopes.mT).double()
    norms = gram.diagonal(dim1=1, dim2=2)
    aligned = _ratio(gram[:, first, second], norms[:, first] * norms[:, second]).mean(1)
    bands = modes.sum_by(power.flatten(0, 1), modes.band, BANDS).view(B, C, BANDS).double()
    coherence = torch.zeros(B, BANDS, dtype=torch.float64, device=power.device)
    least = _EMPTY_SHARE * variance.amax(1)[:, None] + TINY
    for i, j in pairs:
        products = (
            real[:, i] * real[:, j] + imag[:, i] * imag[:, j],
            imag[:, i] * real[:, j] - real[:, i] * imag[:, j],
        )
        co, quadrature = (modes.sum_by(part, modes.band, BANDS).double() for part in products)
        a, b = bands[:, i], bands[:, j]
        found = ((co.square() + quadrature.square()) / (a * b + TINY**2)).clamp(0.0, 1.0)
        coherence = coherence + torch.where(torch.minimum(a, b) < least, 0.0, found) / len(pairs)
    information = -0.5 * torch.log1p(-correlation.square().clamp(max=1.0 - _LEAST_RATIO))
    overflow = ~torch.isfinite(covariance).flatten(1).all(1)  # LAPACK refuses such a matrix
    eigenvalues = torch.linalg.eigvalsh(covariance.masked_fill(overflow[:, None, None], 0.0)).flip(1).clamp(min=0.0)
    eigenvalues = eigenvalues.masked_fill(overflow[:, None], torch.nan)
    trace = variance.sum(1)
    columns = [
        *eigenvalues.unbind(1),
        trace,
        -torch.log((eigenvalues[:, -1] / (eigenvalues[:, 0] + TINY)).clamp(_LEAST_RATIO, 1.0)),
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
    return torch.stack(columns, 1).to(power.dtype)


def _ratio(products: Tensor, squares: Tensor) -> Tensor:
    """products / sqrt(squares), 0 where that is tiny."""
    norms = root(squares)
    return torch.where(norms > TINY, products / (norms + TINY), 0.0)
