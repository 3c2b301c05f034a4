"""Information and explained variance that each level of a category adds to the levels before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.analysis.observations import Observations
from spinlock_fast.analysis.tables import Table
from spinlock_fast.features.mutual_information import entropy

_COLUMNS_AT_ONCE = 16


def refinement_table(observed: Observations) -> Table:
    """One row per category and level.

    With W the tokens of the levels so far as one label: entropy H(level), conditional entropy H(level | levels before),
    their ratio (1: all new, 0: determined by the levels before), the number of cells of W in use, and the share of the
    variance of the category's features between cells: eta^2 = 1 - SS_within / SS, and its unbiased form
    epsilon^2 = 1 - (SS_within / (N - cells)) / (SS / (N - 1)) (Kelley 1935), which many cells do not inflate.
    Features are standardised first. `added` is the increase of epsilon^2.
    """
    rows = []
    codebooks, N = observed.codebooks, len(observed.tokens)
    for category, members in codebooks.by_category().items():
        x = _standardised(observed.features[:, list(observed.groups[category])])
        total = float(np.square(x, dtype=np.float64).sum())
        cells = np.zeros(N, np.int64)
        before, explained_before = 0.0, 0.0
        for g in members:
            token = observed.tokens[:, g]
            cells = np.unique(cells * codebooks.num_codes[g] + token, return_inverse=True)[1]
            counts = np.bincount(cells)
            joint = entropy(counts)
            own = entropy(np.bincount(token))
            within = total - _between(x, cells, counts)
            eta = 1 - within / total if total > 0 else 0.0
            degrees_of_freedom = N - counts.size
            epsilon = (
                1 - within / degrees_of_freedom * (N - 1) / total
                if total > 0 and degrees_of_freedom > 0
                else float("nan")
            )
            rows.append(
                (
                    category,
                    codebooks.levels[g],
                    own,
                    joint - before,
                    (joint - before) / own if own > 0 else 0.0,
                    counts.size,
                    eta,
                    epsilon,
                    epsilon - explained_before,
                )
            )
            before, explained_before = joint, epsilon
    names = (
        "category",
        "level",
        "entropy_nats",
        "conditional_entropy_nats",
        "new_share",
        "cells",
        "eta_squared",
        "epsilon_squared",
        "added",
    )
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def _standardised(x: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = x - x.mean(0, dtype=np.float64)
    scale = centred.std(0)
    standardised: NDArray[np.float32] = np.divide(centred, scale, out=np.zeros_like(centred), where=scale > 0).astype(
        np.float32
    )
    return standardised


def _between(x: NDArray[np.float32], cells: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    """Sum of squared cell means, each weighted by the operators of its cell."""
    total = 0.0
    order = np.argsort(cells, kind="stable")
    starts = np.cumsum(counts) - counts
    for start in range(0, x.shape[1], _COLUMNS_AT_ONCE):
        block = x[order, start : start + _COLUMNS_AT_ONCE].astype(np.float64)
        sums = np.add.reduceat(block, starts, axis=0)
        total += float((sums**2 / counts[:, None]).sum())
    return total
