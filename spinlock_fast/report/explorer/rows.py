"""Columns of the explorer with a value for each row, and those that compare rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.analysis.conditions import Condition
from spinlock_fast.analysis.neighbours import code_coordinates
from spinlock_fast.analysis.observations import Codebooks, Floats, Observations

_MAP_STEPS = 65_535
RANK_STEPS = 255
_NOT_FINITE = 255  # of quantised values, which are in 0..254

Columns = dict[str, NDArray[Any]]


def row_columns(observed: Observations) -> Columns:
    """Row numbers, tokens, ranks of distances, and positions on the map."""
    columns: Columns = {"rows": observed.rows.astype(np.uint32)}
    for g, codes in enumerate(observed.codebooks.num_codes):
        columns[f"tokens/{g}"] = observed.tokens[:, g].astype(np.uint8 if codes <= 256 else np.uint16)
        columns[f"rank/{g}"] = distance_ranks(observed.tokens[:, g], observed.distance[:, g])
    position = token_map(observed.codebooks, observed.tokens)
    low, high = position.min(0), position.max(0)
    extent = float((high - low).max())  # one scale for both axes
    steps = np.rint((position - low) / (extent if extent > 0 else 1.0) * _MAP_STEPS).astype(np.uint16)
    return columns | {"map/x": steps[:, 0], "map/y": steps[:, 1]}


def token_map(codebooks: Codebooks, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """[N, 2] first two principal components of the code vectors of each row.

    Code vectors are scaled as for the distance of tokens (`code_coordinates`). The sign of a component is chosen such
    that its largest loading is positive.
    """
    coordinates = code_coordinates(codebooks, tokens)
    ends = np.cumsum([codes.shape[1] for codes in coordinates])
    width = max(int(ends[-1]), 2)
    covariance = np.zeros((width, width))
    parts = [slice(end - codes.shape[1], end) for end, codes in zip(ends.tolist(), coordinates, strict=True)]
    for g, first in enumerate(parts):  # from counts of pairs of codes; coordinates have mean 0
        for h, second in enumerate(parts[: g + 1]):
            K = len(coordinates[h])
            flat = np.bincount(tokens[:, g] * K + tokens[:, h], minlength=len(coordinates[g]) * K)
            block = coordinates[g].T.astype(np.float64) @ flat.reshape(-1, K) @ coordinates[h]
            covariance[first, second], covariance[second, first] = block, block.T
    axes = np.linalg.eigh(covariance)[1][:, [-1, -2]]
    axes *= np.sign(axes[np.abs(axes).argmax(0), [0, 1]])
    position = np.zeros((len(tokens), 2))
    for g, part in enumerate(parts):
        position += (coordinates[g] @ axes[part])[tokens[:, g]]
    return position


def distance_ranks(tokens: NDArray[np.int64], distance: Floats) -> NDArray[np.uint8]:
    """[N] floor(255 sqrt(r)), with r the share of the rows of the same code that are nearer to it.

    The square root resolves the nearest rows, which are typical of the code, better than the others.
    """
    order = np.lexsort((distance, tokens))
    counts = np.bincount(tokens)
    starts = np.cumsum(counts) - counts
    ordered = tokens[order]
    nearer = (np.arange(len(tokens)) - starts[ordered]) / counts[ordered]
    ranks = np.empty(len(tokens), np.uint8)
    ranks[order] = np.floor(RANK_STEPS * np.sqrt(nearer))
    return ranks


def condition_columns(conditions: Sequence[Condition]) -> Columns:
    """The level of each condition; there are at most 65."""
    return {f"condition/{i}": condition.codes.astype(np.uint8) for i, condition in enumerate(conditions)}


def neighbour_columns(observed: Observations) -> Columns:
    """Scaled code vectors, K x D values of each codebook, whose Euclidean distance is that of `search`."""
    coordinates = code_coordinates(observed.codebooks, observed.tokens)
    return {f"vectors/{g}": codes.ravel() for g, codes in enumerate(coordinates)}


def quantised(values: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Values as 0 (at or below `low`) to 254 (at or above `high`); 255 where they are not finite."""
    scaled = (np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1.0)
    steps = np.rint(np.clip(scaled, 0.0, 1.0) * (_NOT_FINITE - 1)).astype(np.uint8)
    return np.where(np.isfinite(values), steps, np.uint8(_NOT_FINITE))
