"""Agreement between the tokens of two checkpoints, for instance of two seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from spinlock_fast.analysis.observations import Observations
from spinlock_fast.analysis.tables import Table
from spinlock_fast.features.mutual_information import adjusted_mutual_information, contingency
from spinlock_fast.features.statistics import correlation


def feature_overlap(
    x: NDArray[np.float32],
    groups_x: Mapping[str, Sequence[int]],
    y: NDArray[np.float32],
    groups_y: Mapping[str, Sequence[int]],
) -> NDArray[np.float64]:
    """[C, C'] overlap of two categories: mean over the features of both of max |r| with those of the other.

    1 where both have the same features. Encoders of different seeds give different columns, so that names cannot be
    compared.
    """
    both = np.abs(correlation(np.concatenate([x, y], axis=1)))[: x.shape[1], x.shape[1] :]
    overlap = np.zeros((len(groups_x), len(groups_y)))
    for (i, a), (j, b) in product(enumerate(groups_x.values()), enumerate(groups_y.values())):
        block = both[np.ix_(list(a), list(b))]
        overlap[i, j] = (block.max(1).sum() + block.max(0).sum()) / sum(block.shape)
    return overlap


def stability_table(name: str, first: Observations, other_name: str, other: Observations) -> Table:
    """One row per pair of levels of each pair of matched categories: adjusted mutual information of their tokens.

    Categories are matched one to one with the largest sum of overlaps (Kuhn 1955); unmatched ones have no row.
    """
    overlap = feature_overlap(first.features, first.groups, other.features, other.groups)
    columns: dict[str, list[object]] = {
        key: []
        for key in ("checkpoint_a", "checkpoint_b", "category_a", "category_b", "overlap", "level_a", "level_b", "ami")
    }
    names, other_names = list(first.groups), list(other.groups)
    for i, j in zip(*(side.tolist() for side in linear_sum_assignment(-overlap)), strict=True):
        codebooks = first.codebooks.by_category()[names[i]]
        other_books = other.codebooks.by_category()[other_names[j]]
        for g, h in product(codebooks, other_books):
            shape = (first.codebooks.num_codes[g], other.codebooks.num_codes[h])
            ami = adjusted_mutual_information(contingency(first.tokens[:, g], other.tokens[:, h], shape))
            levels = (first.codebooks.levels[g], other.codebooks.levels[h])
            row = (name, other_name, names[i], other_names[j], overlap[i, j], *levels, ami)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return {key: np.array(values) for key, values in columns.items()}
