"""Conditions of operators as discrete labels: binned parameters, and text labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.analysis.observations import Observations

_MAX_DISTINCT_VALUES = 12  # a parameter with at most so many values is treated as categorical
_MAX_TEXTS = 64


@dataclass(frozen=True)
class Condition:
    """A discrete label of every operator."""

    name: str
    kind: str  # "theta" or "label"
    codes: NDArray[np.int64]  # [N]
    levels: list[str]  # text of each code

    @property
    def counts(self) -> NDArray[np.int64]:
        return np.bincount(self.codes, minlength=len(self.levels))


def make_conditions(observed: Observations, bins: int) -> tuple[list[Condition], list[str]]:
    """Conditions that vary, and a note for each constant one."""
    conditions = [bin_parameter(name, values, bins) for name, values in observed.parameters.items()]
    conditions += [label_condition(name, values) for name, values in observed.labels.items()]
    varying = [condition for condition in conditions if len(condition.levels) > 1]
    notes = [f"{c.name} is the same for all operators" for c in conditions if len(c.levels) < 2]
    return varying, notes


def bin_parameter(name: str, values: NDArray[np.float64], bins: int) -> Condition:
    """A parameter [N] as a condition: one level per value up to 12 distinct values, else quantile bins.

    A value that several quantiles have in common has a level of its own.
    """
    known = np.isfinite(values)
    distinct = np.unique(values[known])
    if distinct.size <= _MAX_DISTINCT_VALUES:
        codes = np.searchsorted(distinct, values)
        levels = [f"{value:g}" for value in distinct]
    else:
        codes = np.zeros(values.size, np.int64)
        codes[known], levels = _quantile_bins(values[known], bins)
    if not known.all():
        codes = np.where(known, codes, len(levels))
        levels.append("not finite")
    return Condition(name, "theta", codes.astype(np.int64), levels)


def _quantile_bins(values: NDArray[np.float64], bins: int) -> tuple[NDArray[np.intp], list[str]]:
    """The bin of each finite value between quantiles, and the texts of the bins; those without a value are left out."""
    edges, repeats = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)), return_counts=True)
    common = edges[repeats > 1]
    # The last bin contains its upper edge, unless that is a common value.
    bounds = np.union1d(edges if edges[-1] in common else edges[:-1], np.nextafter(common, np.inf))
    used, codes = np.unique(np.searchsorted(bounds, values, side="right") - 1, return_inverse=True)
    levels = []
    for bound in bounds[used]:
        above = int(np.searchsorted(edges, bound, side="right"))
        low = edges[above - 1]
        levels.append(f"{low:.3g}" if bound in common else f"{low:.3g} to {edges[above]:.3g}")
    return codes, levels


def label_condition(name: str, values: NDArray[Any]) -> Condition:
    """A label [N] as a condition: one level per text; beyond the 63 most frequent texts, "other"."""
    distinct, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    levels = [str(value) for value in distinct]
    if len(levels) > _MAX_TEXTS:
        common = np.argsort(-counts, kind="stable")[: _MAX_TEXTS - 1]
        number = np.full(len(levels), common.size)
        number[common] = np.arange(common.size)
        codes, levels = number[codes], [levels[i] for i in common] + ["other"]
    return Condition(name, "label", codes.astype(np.int64), levels)
