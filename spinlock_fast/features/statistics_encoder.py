"""Named statistics of time series, in place of a random projection."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Name -> definition. x_1 .. x_T is a column of a sample, <x> its mean over time.
STATISTICS = {
    "mean": "<x>",
    "std": "sqrt(<(x - <x>)^2>)",
    "trend": "Pearson correlation of x with time; 0 for a constant series",
    "first_tenth": "mean of the first ceil(T / 10) values",
    "last_tenth": "mean of the last ceil(T / 10) values",
    "min": "least value",
    "max": "greatest value",
    "quantile_10": "10 % of the values lie below, interpolated linearly (Hyndman and Fan 1996, type 7)",
    "median": "50 % of the values lie below, interpolated linearly",
    "quantile_90": "90 % of the values lie below, interpolated linearly",
    "autocorrelation_time": "lag in steps at which the autocorrelation first falls below 1/e, interpolated linearly, "
    "at most T/4 (Box and Jenkins 1970)",
    "dominant_frequency": "frequency, in cycles per step, of the largest value of the periodogram (Schuster 1898)",
    "dominant_share": "share of the variance at that frequency",
}
_QUANTILES = (0.1, 0.5, 0.9)
_VALUES_AT_ONCE = 1 << 20


class StatisticsEncoder(nn.Module):
    """[B, T, D] -> [B, 13 D]: `STATISTICS` of each column, those of a column together.

    Args:
        row_shape: (T, D); T may differ from call to call.

    Raises:
        ValueError: rows are not [T, D], or T is less than 2.
    """

    def __init__(self, row_shape: Sequence[int]) -> None:
        super().__init__()
        if len(row_shape) != 2 or row_shape[0] < 2:
            shape = tuple(row_shape)
            raise ValueError(
                f"StatisticsEncoder needs a 3-D dataset [N, T, D], T at least 2, got rows of shape {shape}"
            )
        self.output_dim = len(STATISTICS) * row_shape[1]

    @staticmethod
    def column_names(columns: Sequence[str]) -> list[str]:
        """Names "column::statistic" of the output, from those of the D columns."""
        return [f"{column}::{statistic}" for column in columns for statistic in STATISTICS]

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):  # FFT libraries refuse an empty batch
            return x.new_empty(0, self.output_dim)
        # In float64, as a series may change little about a large mean; a few rows at a time, as that takes memory.
        rows = max(1, _VALUES_AT_ONCE // max(x[:1].numel(), 1))
        parts = [series_statistics(part.transpose(1, 2).contiguous().double()).flatten(1) for part in x.split(rows)]
        return torch.cat(parts).to(x.dtype)


def series_statistics(x: Tensor) -> Tensor:
    """`STATISTICS` of time series [..., T]: [..., 13]."""
    T = x.shape[-1]
    mean = x.mean(-1)
    centred = x - mean[..., None]
    variance = centred.square().mean(-1)
    # Less than rounding errors of the mean: a constant series.
    constant = variance <= (4.0 * torch.finfo(x.dtype).eps * mean).square() + torch.finfo(x.dtype).tiny
    centred = centred.masked_fill(constant[..., None], 0.0)
    variance = variance.masked_fill(constant, 0.0)
    safe = variance.masked_fill(constant, 1.0)
    time = torch.arange(T, dtype=x.dtype, device=x.device)
    time = (time - time.mean()) / time.std(correction=0)
    tenth = -(-T // 10)
    ordered = x.sort(-1).values
    frequency, share = _dominant(centred, safe)
    columns = [
        mean,
        variance.sqrt(),
        (centred @ time) / (T * safe.sqrt()),
        x[..., :tenth].mean(-1),
        x[..., T - tenth :].mean(-1),
        ordered[..., 0],
        ordered[..., -1],
        *(_quantile(ordered, q) for q in _QUANTILES),
        _autocorrelation_time(centred, safe, max(1, T // 4)),
        frequency,
        share,
    ]
    return torch.stack(columns, -1)


def _quantile(ordered: Tensor, q: float) -> Tensor:
    place = q * (ordered.shape[-1] - 1)
    low = math.floor(place)
    high = min(low + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., low], ordered[..., high], place - low)


def _autocorrelation_time(centred: Tensor, variance: Tensor, longest: int) -> Tensor:
    """By the Wiener-Khinchin theorem; the covariance at a lag is over the T - lag pairs."""
    T = centred.shape[-1]
    longest = min(longest, T - 1)
    covariance = torch.fft.irfft(_power(torch.fft.rfft(centred, n=2 * T)), n=2 * T)[..., : longest + 1]
    pairs = T - torch.arange(longest + 1, dtype=centred.dtype, device=centred.device)
    r = covariance / pairs / variance[..., None]
    below = r < math.exp(-1.0)
    crossed = below.any(-1)
    first = torch.where(crossed, below.int().argmax(-1), longest).clamp(min=1)
    low, high = (r.gather(-1, (first - back)[..., None])[..., 0] for back in (1, 0))
    gap = (low - high).masked_fill(~crossed, 1.0)
    part = ((low - math.exp(-1.0)) / gap).clamp(0.0, 1.0)
    reached = torch.where(crossed, first - 1 + part, torch.full_like(part, float(longest)))
    return reached.masked_fill((centred == 0.0).all(-1), 0.0)


def _dominant(centred: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    T = centred.shape[-1]
    power = _power(torch.fft.rfft(centred, norm="forward"))[..., 1:]
    twice = torch.full((power.shape[-1],), 2.0, dtype=centred.dtype, device=centred.device)
    if T % 2 == 0:
        twice[-1] = 1.0  # the Nyquist frequency is its own conjugate
    power = power * twice  # adds up to the variance
    largest, place = power.max(-1)
    frequency = ((place + 1) / T).masked_fill(largest == 0.0, 0.0)
    return frequency, (largest / variance).clamp(max=1.0)


def _power(coefficients: Tensor) -> Tensor:
    return coefficients.real.square() + coefficients.imag.square()
