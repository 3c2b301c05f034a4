"""Whether two checkpoints, say of two seeds, tell the same operators apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from spinlock_fast.analysis.contingency import adjusted_mutual_information, contingency
from spinlock_fast.analysis.observations import Observations
from spinlock_fast.analysis.tables import Table
from spinlock_fast.features.statistics import correlation


def feature_overlap(
    x: NDArray[np.float32],
    groups_x: Mapping[str, Sequence[int]],
    y: NDArray[np.float32],
    groups_y: Mapping[str, Sequence[int]],
) -> NDArray[np.float64]:
    """[C, C'] how far two categories describe the same: mean over both's features of max |r| with the other's.

    Encoders of different seeds give different columns, so names cannot tell; where both have the same features it
    is 1.
    """
    both = np.abs(correlation(np.concatenate([x, y], axis=1)))[: x.shape[1], x.shape[1] :]
    overlap = np.zeros((len(groups_x), len(groups_y)))
    for (i, a), (j, b) in product(enumerate(groups_x.values()), enumerate(groups_y.values())):
        block = both[np.ix_(list(a), list(b))]
        overlap[i, j] = (block.max(1).sum() + block.max(0).sum()) / sum(block.shape)
    return overlap


def stability_table(name: str, first: Observations, other_name: str, other: Observations) -> Table:
    """A row per pair of levels of each pair of matched categories: adjusted mutual information of their tokens.

    Categories are matched one to one so that the overlaps have the greatest sum (Kuhn 1955); those of the larger
    checkpoint that are left over have no row.
    """
    overlap = feature_overlap(first.features, first.groups, other.features, other.groups)
    columns: dict[str, list[object]] = {
        key: []
        for key in ("checkpoint_a", "checkpoint_b", "category_a", "category_b", "overlap", "level_a", "level_b", "ami")
    }
    names, other_names = list(first.groups), list(other.groups)
    for i, j in zip(*(side.tolist() for side in linear_sum_assignment(-overlap)), strict=True):
        books = first.books.of_category()[names[i]]
        other_books = other.books.of_category()[other_names[j]]
        for g, h in product(books, other_books):
            shape = (first.books.num_codes[g], other.books.num_codes[h])
            ami = adjusted_mutual_information(contingency(first.tokens[:, g], other.tokens[:, h], shape))
            levels = (first.books.levels[g], other.books.levels[h])
            row = (name, other_name, names[i], other_names[j], overlap[i, j], *levels, ami)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return {key: np.array(values) for key, values in columns.items()}
