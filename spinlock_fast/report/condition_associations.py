"""What tokens tell about the conditions of their rows, as `analyze` measures it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.analysis.associations import associations_table
from spinlock_fast.analysis.conditions import Condition, make_conditions
from spinlock_fast.analysis.named_conditions import add_named_conditions
from spinlock_fast.analysis.observations import Observations, read_codebooks, read_conditions
from spinlock_fast.analysis.tables import Table
from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.tokenizer import Tokenizer

ALPHA = 0.05  # false discovery rate
_BINS = 5  # of a parameter


class Associations(NamedTuple):
    """Adjusted mutual information of tokens and conditions; conditions are ordered by their largest AMI."""

    conditions: list[str]  # [M]
    ami: NDArray[np.float64]  # [G, M]
    found: NDArray[np.bool_]  # [G, M] significant at the false discovery rate
    shuffled: NDArray[np.float64]  # [M] largest 95 % quantile of the AMI with shuffled conditions, over codebooks

    def by_category(self, categories: Sequence[int]) -> Associations:
        """The codebook with the largest AMI of each category, of those found where any is.

        Args:
            categories: [G] category of each codebook.
        """
        rows = [np.flatnonzero(np.array(categories) == c) for c in dict.fromkeys(categories)]
        strength = np.where(self.found, 2.0, 0.0) + np.nan_to_num(self.ami, nan=-1.0)
        best = np.stack([own[strength[own].argmax(0)] for own in rows])  # [C, M]
        across = np.arange(len(self.conditions))
        return Associations(self.conditions, self.ami[best, across], self.found[best, across], self.shuffled)

    def strongest(self, rows: Sequence[int], most: int) -> list[tuple[str, float]]:
        """Up to `most` conditions with a found association to some codebooks, and their AMI, in decreasing order."""
        ami = np.where(self.found[rows], self.ami[rows], -np.inf).max(0)
        order = np.argsort(-ami, kind="stable")[:most]
        return [(self.conditions[i], float(ami[i])) for i in order if np.isfinite(ami[i])]


def observed_conditions(
    tokenizer: Tokenizer, source: FeatureSource, names: Sequence[str], notes: list[str]
) -> list[Condition]:
    """The conditions of all rows of a source: theta, labels and those that a user names.

    Raises:
        DataError: a named condition cannot be used.
    """
    rows = np.arange(source.rows)
    parameters, labels = read_conditions(source, rows, [])  # files without conditions are common: no note
    observed = _observations(tokenizer, np.empty((source.rows, 0), np.int64))
    observed.parameters.update(parameters)
    observed.labels.update(labels)
    add_named_conditions(observed, source, names)
    notes += observed.notes
    return make_conditions(observed, _BINS)[0]


def associate(tokenizer: Tokenizer, tokens: NDArray[np.int64], conditions: Sequence[Condition]) -> Associations:
    """Tests every pair of codebook and condition.

    Args:
        tokens: [N, G].
    """
    random = generator(0, Stream.ANALYSIS)
    return association_matrix(associations_table(_observations(tokenizer, tokens), conditions, ALPHA, random), ALPHA)


def association_matrix(table: Table, alpha: float) -> Associations:
    """The table `associations` as matrices."""
    names = list(dict.fromkeys(table["condition"].tolist()))
    ami, null, q = (table[key].reshape(-1, len(names)) for key in ("ami", "null_q95", "q"))
    order = np.argsort(-np.nan_to_num(ami, nan=-1.0).max(0), kind="stable")
    shuffled = np.nan_to_num(null, nan=0.0).max(0)
    return Associations([names[i] for i in order], ami[:, order], (q <= alpha)[:, order], shuffled[order])


def _observations(tokenizer: Tokenizer, tokens: NDArray[np.int64]) -> Observations:
    """Observations without features."""
    N = len(tokens)
    empty = np.empty((N, 0), np.float32)
    return Observations(
        codebooks=read_codebooks(tokenizer),
        rows=np.arange(N),
        tokens=tokens,
        distance=empty,
        margin=empty,
        features=empty,
        feature_names=[],
        groups={},
        measured=empty,
        measured_names=[],
    )
