"""Features of every state: the 63 TEMPORAL features, and the series that trajectory features are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinlock_fast.descriptors.cross_channel import cross_channel_features
from spinlock_fast.descriptors.registry import SCALES, SPATIAL
from spinlock_fast.descriptors.spatial import block_means, spatial_features, total_variation
from spinlock_fast.descriptors.spectral import TINY, Wavenumbers, spectral_features

_NAMES = [feature.name for feature in SPATIAL]
_MEAN_ABS, _GRADIENT_MEAN = (_NAMES.index(name) for name in ("mean_abs", "gradient_mean"))
_EXTREMES = [_NAMES.index(name) for name in ("min", "max")]
_BOUND_SHARE = 0.01  # share of values at the clipping bound from which a step counts as diverged

PROBES = 8  # probe points along a side of the grid


@dataclass(frozen=True)
class StepSeries:
    """Series over steps of trajectories; S steps, B trajectories (realizations times operators)."""

    features: Tensor  # [S, B, 63]
    energy: Tensor  # [S, B] mean square of the state
    activity: Tensor  # [S, B] root mean square change from the previous step
    velocity: Tensor  # [S, B, 2] best translation from the previous step, px/step
    norms: Tensor  # [S, B, 9] L1, L2, total variation at each scale
    probes: Tensor  # [S, B, 3, 64] values at fixed points
    at_bound: Tensor  # [S, B] whether at least 1 % of the values is at the clipping bound


def concatenate_series(parts: list[StepSeries]) -> StepSeries:
    """Concatenates consecutive blocks."""
    return StepSeries(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


class StepFeatures:
    """Features of consecutive blocks of states of the same trajectories.

    Args:
        initial: u_0 of every trajectory [B, 3, G, G].
        clip: bound at which fields are clipped.
        waves: wavenumbers of the grid.
    """

    def __init__(self, initial: Tensor, clip: float, waves: Wavenumbers) -> None:
        self._waves, self._clip = waves, clip
        self._last_state = initial
        self._last_modes = waves.transform(initial.flatten(0, 1))

    def block(self, states: Tensor) -> StepSeries:
        """Features of the next S states [S, B, 3, G, G]."""
        S, B, C, G, _ = states.shape
        fields = states.view(S * B * C, G, G)
        real, imag, power = self._waves.power(fields)
        sums = self._waves.sums(power)
        velocity = self._velocity(real, imag, sums, S * B)
        energy = (sums["total"] + power[:, 0]).view(S, B, C).mean(2)
        of_fields = spatial_features(fields, sums)
        spatial = of_fields.view(S, B, C, -1).mean(2)
        re, im = (part.view(S * B, C, -1) for part in (real, imag))
        cross = cross_channel_features(re, im, sums, self._waves).view(S, B, -1)
        spectral = spectral_features(power, sums, self._waves).view(S, B, C, -1).mean(2)
        stride = G // PROBES
        series = StepSeries(
            features=torch.cat([spatial, spectral, cross], 2),
            energy=energy,
            activity=self._activity(states),
            velocity=velocity.view(S, B, 2),
            norms=_norms(states, energy, spatial),
            probes=states[..., stride // 2 :: stride, stride // 2 :: stride].flatten(3).clone(),
            at_bound=self._at_bound(states, of_fields),
        )
        self._last_state = states[-1].clone()
        self._last_modes = (real[-B * C :].clone(), imag[-B * C :].clone())
        return series

    def _activity(self, states: Tensor) -> Tensor:
        change = torch.empty_like(states)
        torch.sub(states[0], self._last_state, out=change[0])
        torch.sub(states[1:], states[:-1], out=change[1:])
        return change.square_().mean((2, 3, 4)).sqrt_()

    def _velocity(self, real: Tensor, imag: Tensor, sums: dict[str, Tensor], count: int) -> Tensor:
        """Least-squares translation between consecutive states from the phases of their modes: [count, 2]."""
        rows = len(self._last_modes[0])
        cross_imag = torch.empty_like(real)
        now, before = (real[rows:], imag[rows:]), (real[:-rows], imag[:-rows])
        for out, (a, b), (c, d) in (
            (cross_imag[:rows], (real[:rows], imag[:rows]), self._last_modes),
            (cross_imag[rows:], now, before),
        ):
            # the imaginary part of F_t conj(F_(t-1)), which is |F|^2 exp(-i k.v) for a translation by v
            torch.mul(b, c, out=out).addcmul_(a, d, value=-1.0)
        moment = -(cross_imag @ self._waves.flow_weights).view(count, -1, 2).sum(1).double()
        xx, yy, xy = (sums[name].view(count, -1).sum(1).double() for name in ("flow_xx", "flow_yy", "flow_xy"))
        determinant = xx * yy - xy.square() + TINY
        vx = (yy * moment[:, 0] - xy * moment[:, 1]) / determinant
        vy = (xx * moment[:, 1] - xy * moment[:, 0]) / determinant
        return torch.stack([vx, vy], 1).clamp_(-self._waves.grid, self._waves.grid).float()

    def _at_bound(self, states: Tensor, spatial: Tensor) -> Tensor:
        if states.device.type == "cpu" and float(spatial[:, _EXTREMES].abs().max()) < self._clip:
            return torch.zeros(states.shape[:2], dtype=torch.bool)
        flat = states.flatten(2)
        return (flat.abs() >= self._clip).float().mean(2) >= _BOUND_SHARE


def _norms(states: Tensor, energy: Tensor, spatial: Tensor) -> Tensor:
    """L1, L2 and total variation of block means over each of SCALES: [S, B, 9]."""
    S, B = states.shape[:2]
    fields = states.flatten(0, 1)
    # The norms at scale 1 are computed already.
    columns = [spatial[..., _MEAN_ABS].flatten(), energy.flatten().sqrt(), spatial[..., _GRADIENT_MEAN].flatten()]
    for scale in SCALES[1:]:
        blocks = block_means(fields, scale)
        columns += [blocks.abs().mean((1, 2, 3)), blocks.square().mean((1, 2, 3)).sqrt_()]
        columns.append(total_variation(blocks.flatten(0, 1)).view(S * B, -1).mean(1))
    return torch.stack(columns, 1).view(S, B, -1)
