"""Conditions of an operator as labels: parameters in bins, texts as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.analysis.observations import Observations

_DISTINCT = 12  # a number that takes no more values than this is a choice, not a quantity
_MOST_TEXTS = 64


@dataclass(frozen=True)
class Condition:
    """A label of every operator."""

    name: str
    kind: str  # "theta" or "label"
    codes: NDArray[np.int64]  # [N]
    levels: list[str]  # what each code means

    @property
    def counts(self) -> NDArray[np.int64]:
        return np.bincount(self.codes, minlength=len(self.levels))


def conditions_of(observed: Observations, bins: int) -> tuple[list[Condition], list[str]]:
    """Conditions that vary, and notes about those that do not."""
    found = [binned(name, values, bins) for name, values in observed.parameters.items()]
    found += [labelled(name, values) for name, values in observed.labels.items()]
    varying = [condition for condition in found if len(condition.levels) > 1]
    notes = [f"{c.name} is the same for all operators" for c in found if len(c.levels) < 2]
    return varying, notes


def binned(name: str, values: NDArray[np.float64], bins: int) -> Condition:
    """A parameter [N]: each value a level where there are at most 12, else quantile bins of about equal counts."""
    known = np.isfinite(values)
    distinct = np.unique(values[known])
    if distinct.size <= _DISTINCT:
        codes = np.searchsorted(distinct, values)
        levels = [f"{value:g}" for value in distinct]
    else:
        edges = np.unique(np.quantile(values[known], np.linspace(0, 1, bins + 1)))
        codes = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, edges.size - 2)
        levels = [f"{low:.3g} to {high:.3g}" for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
    if not known.all():
        codes = np.where(known, codes, len(levels))
        levels.append("not finite")
    return Condition(name, "theta", codes.astype(np.int64), levels)


def labelled(name: str, values: NDArray[Any]) -> Condition:
    """A label [N]: each text a level; beyond the 63 most frequent ones they are "other"."""
    distinct, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    levels = [str(value) for value in distinct]
    if len(levels) > _MOST_TEXTS:
        common = np.argsort(-counts, kind="stable")[: _MOST_TEXTS - 1]
        number = np.full(len(levels), common.size)
        number[common] = np.arange(common.size)
        codes, levels = number[codes], [levels[i] for i in common] + ["other"]
    return Condition(name, "label", codes.astype(np.int64), levels)
