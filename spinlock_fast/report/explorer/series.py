"""Time series of example rows on the explorer, beside the range of all rows, for families of shape [N, T, D]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from spinlock_fast.analysis.codes import one_hot
from spinlock_fast.analysis.observations import Observations
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.messages import printable
from spinlock_fast.report.explorer.fields import chosen_rows
from spinlock_fast.report.explorer.rows import Columns, quantised

QUANTILES = (0.1, 0.5, 0.9)  # of the rows, at each step
STEPS = 32  # largest number of steps
MAX_BYTES = 3_000_000  # of the values of all series and rows
BAND_ROWS = 2000  # largest number of rows for the quantiles: the error of a share of 10 % is 0.7 %

_MIN_STEPS = 4
_MIN_SERIES = 12  # as many series before more rows than those of examples
_MIN_CODE_ROWS = 20  # of codes that decide which series are kept
_BYTES_AT_ONCE = 128_000_000

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Series:
    """One series.

    Args:
        name: such as "spatial_variance"; with its family where several have series.
        steps: [S] time steps, evenly spaced, with the first and the last one.
        length: number of time steps T in the data.
        band: [3, S] quantiles of the rows at each step; NaN where no row has a finite value.
        low, high: range of the axis: of the band, extended by half its height on both sides where values are there.
        shift: [U] mean over steps of the mean of a code in use minus that of all rows, in standard deviations, of the
            values within the axis; 0 for codes without a row among those of the band.
        strength: [U] the same of the absolute value of the difference at each step.
        levels: [n, S] values of the stored rows from 0 to 254, those beyond the axis at its ends; 255 if not finite.
    """

    name: str
    steps: NDArray[np.int64]
    length: int
    band: Floats
    low: float
    high: float
    shift: Floats
    strength: Floats
    levels: NDArray[np.uint8]


@dataclass(frozen=True)
class SeriesPlots:
    """Series of n rows: `rows` [n] are indices of rows on the page, `band_rows` the number of those of the band."""

    rows: NDArray[np.int64]
    band_rows: int
    series: list[Series]

    def header(self) -> dict[str, Any]:
        """Number of rows of the band; name, axis and steps of each series."""
        each = [
            {"name": s.name, "low": s.low, "high": s.high, "length": s.length, "steps": s.steps.tolist()}
            for s in self.series
        ]
        return {"band_rows": self.band_rows, "series": each}

    def columns(self) -> Columns:
        """Rows, shifts and strengths [U, series], and band [3, S] and levels [n, S] of each series."""
        columns: Columns = {
            "series/rows": self.rows.astype(np.uint32),
            "series/shift": np.round(np.stack([s.shift for s in self.series], 1), 3).ravel(),
            "series/strength": np.round(np.stack([s.strength for s in self.series], 1), 3).ravel(),
        }
        for i, series in enumerate(self.series):
            columns[f"series/{i}/band"] = series.band.ravel()
            columns[f"series/{i}"] = series.levels.ravel()
        return columns


def time_series(source: FeatureSource, observed: Observations, examples: Sequence[NDArray[Any]]) -> SeriesPlots | None:
    """Series of all rows if they fit in 3 MB, else of examples and of the series that differ most between codes.

    Args:
        source: the data.
        observed: the rows of the page.
        examples: indices of example rows of the page by kind, the most important kind first.

    Returns:
        None if no family has at least 4 time steps.
    """
    lengths = {name: info.row_shape for name, info in source.datasets.items() if len(info.row_shape) == 2}
    families = {name: shape for name, shape in lengths.items() if shape[0] >= _MIN_STEPS and shape[1] > 0}
    if not families:
        return None
    N = len(observed.rows)
    steps = {name: evenly_spaced(T, STEPS) for name, (T, _) in families.items()}
    row_bytes = sum(len(steps[name]) * min(D, _MIN_SERIES) for name, (_, D) in families.items())
    rows = chosen_rows(N, examples, row_bytes, MAX_BYTES)
    sampled = evenly_spaced(N, BAND_ROWS)
    members = one_hot(observed.tokens[sampled], observed.codebooks.offsets)
    members = members[np.flatnonzero(np.bincount(_all_codes(observed), minlength=members.shape[0]))]
    found: list[Series] = []
    for name, (T, D) in families.items():
        at = steps[name]
        values = np.concatenate(list(_read(source, name, observed.rows[sampled], at)))
        axes = [_axis(values[..., d]) for d in range(D)]
        shift, strength = _differences(values, axes, members)
        fitting = max(1, MAX_BYTES // len(families) // (len(rows) * len(at)))
        kept = strongest(strength, np.diff(members.indptr), fitting)
        stored = np.concatenate(
            [
                np.stack([quantised(part[..., d], *axes[d][1:]) for d in kept], 1)
                for part in _read(source, name, observed.rows[rows], at)
            ]
        )
        names = source.series_names(name) or [f"series {d}" for d in range(D)]
        prefix = f"{name}: " if len(families) > 1 else ""
        for i, d in enumerate(kept.tolist()):
            band, low, high = axes[d]
            text = printable(prefix + names[d])
            found.append(Series(text, at, T, band, low, high, shift[:, d], strength[:, d], stored[:, i]))
    return SeriesPlots(rows, len(sampled), found)


def evenly_spaced(length: int, most: int) -> NDArray[np.int64]:
    """At most this many of 0, 1, ..., length - 1, with the first and the last one."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).astype(np.int64))


def _all_codes(observed: Observations) -> NDArray[np.int64]:
    codes: NDArray[np.int64] = (observed.tokens + observed.codebooks.offsets[:-1]).ravel()
    return codes


def _read(source: FeatureSource, family: str, rows: NDArray[np.int64], steps: NDArray[np.int64]) -> Iterator[Floats]:
    """[n, S, D] at some steps of ascending rows, a few rows at a time."""
    count = max(1, _BYTES_AT_ONCE // source.datasets[family].row_bytes)
    for start in range(0, len(rows), count):
        yield source.read_rows(family, rows[start : start + count])[:, steps]


def _axis(values: Floats) -> tuple[Floats, float, float]:
    """Band [3, S], and the range of the axis, of the values [n, S] of a series."""
    known = np.where(np.isfinite(values), values, np.nan)
    band = np.full((len(QUANTILES), values.shape[1]), np.nan, np.float32)
    any_known = ~np.isnan(known).all(0)
    if not any_known.any():
        return band, 0.0, 0.0
    band[:, any_known] = np.nanquantile(known[:, any_known].astype(np.float64), QUANTILES, axis=0)
    bottom, top = float(np.nanmin(band)), float(np.nanmax(band))
    around = (top - bottom) / 2
    if around == 0:  # a constant band; others deviate by any amount
        return band, float(np.nanmin(known)), float(np.nanmax(known))
    return band, max(bottom - around, float(np.nanmin(known))), min(top + around, float(np.nanmax(known)))


def _differences(
    values: Floats, axes: Sequence[tuple[Floats, float, float]], members: csr_matrix
) -> tuple[Floats, Floats]:
    """Shift and strength [U, D], see `Series`, of members [U, n] among the rows of the band."""
    n, S, D = values.shape
    counts = np.maximum(np.diff(members.indptr), 1)[:, None]
    shift, strength = np.zeros((2, members.shape[0], D), np.float32)
    for d, (_, low, high) in enumerate(axes):
        inside = np.where(np.isfinite(values[..., d]), np.clip(values[..., d], low, high), np.nan)
        known = ~np.isnan(inside)
        mean = np.where(known, inside, 0.0).sum(0) / np.maximum(known.sum(0), 1)
        centred = np.where(known, inside - mean, 0.0)
        deviation = np.sqrt(np.square(centred).mean(0))
        scaled = np.divide(centred, deviation, out=np.zeros((n, S)), where=deviation > 1e-6 * max(abs(low), abs(high)))
        means = (members @ scaled) / counts
        shift[:, d], strength[:, d] = means.mean(1), np.abs(means).mean(1)
    return shift, strength


def strongest(strength: Floats, counts: NDArray[Any], most: int) -> NDArray[np.int64]:
    """The series in which some code differs most from all rows, beyond what its number of rows explains; ascending.

    Args:
        strength: [U, D] in standard deviations.
        counts: [U] rows of each code.
        most: number of series.
    """
    by_chance = 0.8 / np.sqrt(np.maximum(counts, 1))  # the mean of |z| is 0.8 for a normal distribution
    frequent = counts >= _MIN_CODE_ROWS if (counts >= _MIN_CODE_ROWS).any() else counts > 0
    largest = (strength - by_chance[:, None])[frequent].max(0)
    return np.sort(np.argsort(-largest, kind="stable")[:most])
