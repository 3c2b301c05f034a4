"""Nearest neighbours of operators by the distance of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.analysis.conditions import Condition
from spinlock_fast.analysis.observations import Codebooks, Floats, Observations
from spinlock_fast.analysis.tables import Table

_ROWS_AT_ONCE = 8192
_SPARE_CANDIDATES = 8  # extra candidates, since float32 distances may swap near ones


def code_coordinates(codebooks: Codebooks, tokens: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    """Scaled code vectors [K, D] per codebook, whose Euclidean distance is the token distance.

    d(i, j)^2 = mean over codebooks of |e_i - e_j|^2 / s, with s the mean of |e_i - e_j|^2 over all pairs of operators,
    so that every codebook has the same weight. The mean of d^2 is 1; d is 0 where all tokens agree. A codebook with one
    code in use contributes 0.
    """
    counts = [np.bincount(tokens[:, g], minlength=codes) for g, codes in enumerate(codebooks.num_codes)]
    return scaled_codes(codebooks.vectors, counts)


def scaled_codes(codebooks: Sequence[Floats], counts: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
    """As `code_coordinates`, from code vectors [K, D] and the rows [K] of each code, per codebook."""
    scaled = []
    for vectors, rows in zip(codebooks, counts, strict=True):
        share = rows / rows.sum()
        codes = vectors.astype(np.float64)
        mean = share @ codes
        spread = 2.0 * float(share @ np.square(codes - mean).sum(1))
        factor = 1.0 / np.sqrt(spread * len(codebooks)) if spread > 0 else 0.0
        scaled.append(((codes - mean) * factor).astype(np.float32))
    return scaled


def nearest_operators(
    codebooks: Codebooks, tokens: NDArray[np.int64], queries: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[Q, count] nearest rows of each query row except itself, and their distances, in ascending order."""
    coordinates = code_coordinates(codebooks, tokens)
    query_points = _token_coordinates(coordinates, tokens[queries])
    rows = np.empty((len(queries), 0), np.int64)
    square = np.empty((len(queries), 0), np.float32)
    num_candidates = min(count + _SPARE_CANDIDATES, len(tokens) - 1)
    for start in range(0, len(tokens), _ROWS_AT_ONCE):
        block = _token_coordinates(coordinates, tokens[start : start + _ROWS_AT_ONCE])
        square_distance = query_points @ block.T
        square_distance *= -2.0
        square_distance += np.square(block).sum(1)  # without |query|^2, which does not change the order
        square_distance[_query_positions(queries, start, len(block))] = np.inf
        best = np.argpartition(square_distance, min(num_candidates, len(block)) - 1, axis=1)[:, :num_candidates]
        rows = np.concatenate([rows, best + start], axis=1)
        square = np.concatenate([square, np.take_along_axis(square_distance, best, 1)], axis=1)
        order = np.argsort(square, axis=1, kind="stable")[:, :num_candidates]
        rows, square = np.take_along_axis(rows, order, 1), np.take_along_axis(square, order, 1)
    distance = _exact_distances(coordinates, tokens, queries, rows)
    order = np.lexsort((rows, distance), axis=1)[:, :count]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(distance, order, 1)


def neighbours_table(
    observed: Observations, queries: NDArray[np.int64], rows: NDArray[np.int64], distance: NDArray[np.float64]
) -> Table:
    """One row per query and neighbour: rank, distance, and Hamming distance of their tokens."""
    differ = (observed.tokens[queries][:, None] != observed.tokens[rows]).sum(2)
    count = rows.shape[1]
    return {
        "row": np.repeat(observed.rows[queries], count),
        "rank": np.tile(np.arange(count), len(queries)),
        "neighbour": observed.rows[rows].ravel(),
        "distance": distance.ravel(),
        "tokens_that_differ": differ.ravel(),
    }


def agreement_table(conditions: Sequence[Condition], queries: NDArray[np.int64], rows: NDArray[np.int64]) -> Table:
    """One row per condition: how often the nearest operator, and how often any other one, has the same value."""
    same, chance = [], []
    for condition in conditions:
        own = condition.codes[queries]
        same.append(float((own == condition.codes[rows[:, 0]]).mean()))
        others = len(condition.codes) - 1
        chance.append(float(((condition.counts[own] - 1) / others).mean()))
    lift = [s / c if c > 0 else float("nan") for s, c in zip(same, chance, strict=True)]
    return {
        "condition": np.array([c.name for c in conditions], dtype=str),
        "same_as_nearest": np.array(same),
        "same_as_any": np.array(chance),
        "lift": np.array(lift),
    }


def _token_coordinates(coordinates: list[NDArray[np.float32]], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.concatenate([codes[tokens[:, g]] for g, codes in enumerate(coordinates)], axis=1)


def _query_positions(queries: NDArray[np.int64], start: int, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    inside = np.flatnonzero((queries >= start) & (queries < start + rows))
    return inside, queries[inside] - start


def _exact_distances(
    coordinates: list[NDArray[np.float32]],
    tokens: NDArray[np.int64],
    queries: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Distances computed from differences, so that equal tokens have distance exactly 0."""
    square = np.zeros(rows.shape)
    for g, codes in enumerate(coordinates):
        away = codes[tokens[queries, g]][:, None] - codes[tokens[rows, g]]
        square += np.square(away, dtype=np.float64).sum(2)
    return np.sqrt(square)
