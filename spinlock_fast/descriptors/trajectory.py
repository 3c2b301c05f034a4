"""The SUMMARY features of a trajectory, from its time series."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import torch
from torch import Tensor

from spinlock_fast.descriptors.any_grid import Series, root
from spinlock_fast.descriptors.names import DescriptorNames
from spinlock_fast.descriptors.per_step import StepSeries
from spinlock_fast.descriptors.registry import CROSS_CHANNEL, CROSS_IN_SUMMARY, LAGS, SPATIAL, SPECTRAL

_TINY = 1e-12
_AUTOCORRELATION_LAGS = (1, 8, 32)
_GRANGER_ORDERS = (1, 2)


def trajectory_features(series: StepSeries) -> Tensor:
    """[B, 110] columns of `registry.PER_TRAJECTORY` before operator_sensitivity."""
    average = series.features.double().mean(0)
    fields = len(SPATIAL) + len(SPECTRAL)
    cross = [fields + i for i, feature in enumerate(CROSS_CHANNEL) if feature.name in CROSS_IN_SUMMARY]
    probes = series.probes.double().permute(1, 2, 3, 0)  # [B, 3, 64, T]
    parts = [
        average[:, :fields],
        temporal_features(series.energy.double().T, series.activity.double().T, probes),
        average[:, cross],
        causality_features(probes, series.velocity.double().transpose(0, 1)),
        invariant_features(series.norms.double().transpose(0, 1)),
    ]
    return torch.cat(parts, 1).float()


def describe_trajectories(series: Series, names: DescriptorNames) -> Tensor:
    """Descriptors of trajectories in the order of `names.trajectory`: [B, D], float64."""
    average = series.state.double().mean(0)
    fields = sum(len(names.state[group]) for group in ("spatial", "spectral"))
    probes = series.probes.double().permute(1, 2, 3, 0)  # [B, C, P, T]
    parts = [
        average[:, :fields],
        temporal_features(series.energy.double().T, series.activity.double().T, probes),
        average[:, [fields + i for i in names.cross_in_summary]],
        causality_features(probes, series.velocity.double().transpose(0, 1)),
        invariant_features(series.norms.double().transpose(0, 1)),
    ]
    return torch.cat(parts, 1)


def temporal_features(energy: Tensor, activity: Tensor, probes: Tensor) -> Tensor:
    """The group temporal.

    Args:
        energy: mean square of the states [B, T].
        activity: root mean square changes [B, T], or [B, T - 1] where no state precedes the first.
        probes: values at fixed points [B, C, P, T].
    """
    T = energy.shape[1]
    logs = energy.clamp(min=_TINY).log()
    half = min(T // 2, T - 2)  # of a short trajectory at least two states
    late = energy[:, half:]
    final = energy[:, -max(T // 16, 1) :].mean(1)
    off = (energy - final[:, None]).abs() > 0.1 * final[:, None] + _TINY
    time = torch.arange(1, T + 1, device=energy.device)
    changes = energy.diff(dim=1)
    changes = changes - changes.mean(1, keepdim=True)
    columns = [
        _slope(logs[:, : max(T // 4, 2)]),
        _slope(logs[:, half:]),
        _trend(energy),
        final.clamp(min=_TINY).log() - logs[:, 0],
        root(late.var(1, correction=0)) / (late.mean(1) + _TINY),
        (off * time).amax(1) / T,
        (energy.argmax(1) + 1) / T,
        activity.mean(1),
        (activity / (root(energy[:, T - activity.shape[1] :]) + _TINY)).mean(1),
        _trend(activity),
        _roughness(probes),
        *_autocorrelation_features(probes[..., half:], max(T // 4, 1)),
        *_frequency_features(probes[..., half:]),
        *_crossing_features(probes[..., half:]),
        changes.pow(4).mean(1) / (changes.square().mean(1).square() + _TINY**2) - 3.0 * (changes.abs().amax(1) > _TINY),
    ]
    return torch.stack(columns, 1)


def causality_features(probes: Tensor, velocity: Tensor) -> Tensor:
    """The group causality.

    Args:
        probes: [B, C, P, T].
        velocity: of the best translation at each change [B, R, d].
    """
    centered = probes - probes.mean(3, keepdim=True)
    scale = root(centered.square().mean((2, 3)))  # [B, C]
    columns = []
    C, T = probes.shape[1], probes.shape[3]
    first, second = (list(side) for side in zip(*combinations(range(C), 2), strict=True)) if C > 1 else ([], [])
    for lag in (min(lag, T - 1) for lag in LAGS if C > 1):
        # r_ij(lag): channel i now with channel j `lag` steps later
        product = torch.einsum("bipt,bjpt->bij", centered[..., :-lag], centered[..., lag:])
        product = product / (centered.shape[2] * (centered.shape[3] - lag))
        r = product / (scale[:, :, None] * scale[:, None, :] + _TINY)
        apart = (r - r.transpose(1, 2)).abs()
        pairs = apart[:, first, second]
        columns += [pairs.mean(1), pairs.amax(1)]
    if C > 1:
        one, two = (granger(centered, order) for order in _GRANGER_ORDERS)
        columns += [one.mean(1), two.mean(1), one.amax(1)]
    steps = probes.diff(dim=3)
    steps = steps - steps.mean((2, 3), keepdim=True)
    m2 = steps.square().mean((2, 3))
    speed = velocity.norm(dim=2).mean(1)
    columns += [
        (steps.pow(3).mean((2, 3)) / (m2.pow(1.5) + _TINY**1.5)).mean(1),
        speed,
        velocity.mean(1).norm(dim=1) / (speed + _TINY),
    ]
    return torch.stack(columns, 1)


def granger(centered: Tensor, order: int) -> Tensor:
    """[B, C (C - 1)] ln(residual variance given the own past / given both pasts) of each pair i -> j (Granger 1969).

    Args:
        centered: series minus their means [B, C, P, T]; one regression over all points.
        order: lags of the linear model.
    """
    B, C, _, T = centered.shape
    if order >= T:
        return centered.new_zeros(B, C * (C - 1))
    past = torch.stack([centered[..., order - 1 - lag : T - 1 - lag] for lag in range(order)], 2)
    now = centered[..., order:]
    past, now = past.flatten(3), now.flatten(2)  # [B, C, order, n], [B, C, n]
    out = []
    for i, j in permutations(range(C), 2):
        own = _residual(past[:, j], now[:, j])
        both = _residual(torch.cat([past[:, j], past[:, i]], 1), now[:, j])
        floor = _TINY + 1e-9 * now[:, j].square().mean(1)
        out.append(((own + floor) / (both + floor)).log().clamp(min=0.0))
    return torch.stack(out, 1)


def _residual(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared residual of the least-squares regression of y [B, n] on x [B, p, n]."""
    n = x.shape[2]
    gram, right = x @ x.mT / n, (x @ y[..., None]) / n
    ridge = _TINY + 1e-10 * gram.diagonal(dim1=1, dim2=2).sum(1)
    gram = gram + ridge[:, None, None] * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    solution: Tensor = torch.linalg.solve(gram, right)
    explained = (solution * right).sum((1, 2))
    return (y.square().mean(1) - explained).clamp(min=0.0)


def invariant_features(norms: Tensor) -> Tensor:
    """The group invariant_drift, of norms [B, T, 9]: two columns for each."""
    change = norms.clamp(min=_TINY).log().diff(dim=1)
    total = change.abs().sum(1)
    columns = torch.stack([change.abs().mean(1), change.sum(1) / (total + _TINY)], 2)
    return columns.flatten(1)


def _slope(values: Tensor) -> Tensor:
    t = torch.arange(values.shape[1], dtype=values.dtype, device=values.device)
    t = t - t.mean()
    return values @ t / t.square().sum()


def _trend(values: Tensor) -> Tensor:
    """Pearson correlation with time; 0 for a constant series."""
    t = torch.arange(values.shape[1], dtype=values.dtype, device=values.device)
    t = t - t.mean()
    centered = values - values.mean(1, keepdim=True)
    return centered @ t / (centered.square().sum(1) * t.square().sum() + _TINY**2).sqrt()


def _roughness(probes: Tensor) -> Tensor:
    if probes.shape[3] < 3:
        return probes.new_zeros(len(probes))
    first = probes.diff(dim=3)
    second = first.diff(dim=3)
    return second.square().mean((1, 2, 3)) / (first.square().mean((1, 2, 3)) + _TINY)


def _autocorrelation_features(probes: Tensor, longest: int) -> list[Tensor]:
    """Autocorrelation at three lags, and the lag at which it falls to 1/e, by the Wiener-Khinchin theorem."""
    T = probes.shape[3]
    longest = min(longest, T - 1)
    centered = probes - probes.mean(3, keepdim=True)
    spectrum = torch.fft.rfft(centered, n=2 * T).abs().square().mean((1, 2))
    covariance = torch.fft.irfft(spectrum)[:, : longest + 1]
    covariance = covariance * (T / (T - torch.arange(longest + 1, device=probes.device)))
    r = covariance / (covariance[:, :1] + _TINY)
    below = r < math.exp(-1.0)
    first = torch.where(below.any(1), below.int().argmax(1), longest).clamp(min=1)
    low, high = (r.gather(1, (first - back)[:, None])[:, 0] for back in (1, 0))
    part = ((low - math.exp(-1.0)) / (low - high + _TINY)).clamp(0.0, 1.0)
    time = torch.where(below.any(1), first - 1 + part, float(longest))
    return [*(r[:, min(lag, longest)] for lag in _AUTOCORRELATION_LAGS), time]


def _frequency_features(probes: Tensor) -> list[Tensor]:
    T = probes.shape[3]
    centered = probes - probes.mean(3, keepdim=True)
    power = torch.fft.rfft(centered).abs().square().mean((1, 2))[:, 1:]
    frequency = torch.arange(1, power.shape[1] + 1, dtype=power.dtype, device=power.device) / T
    p = power / (power.sum(1, keepdim=True) + _TINY)
    top = p.argmax(1)
    entropy = -torch.special.xlogy(p, p.masked_fill(p <= 0.0, 1.0)).sum(1) / math.log(max(p.shape[1], 2))
    return [frequency[top], p.amax(1), p @ frequency, entropy]


def _crossing_features(probes: Tensor) -> list[Tensor]:
    """Share of the variance over time, and the rate of mean crossings."""
    over_time = probes.var(3, correction=0).mean((1, 2))
    total_variance = probes.flatten(2).var(2, correction=0).mean(1)
    above = probes > probes.mean(3, keepdim=True)
    crossings = (above[..., 1:] != above[..., :-1]).double().mean((1, 2, 3))
    return [over_time / (total_variance + _TINY), crossings]
