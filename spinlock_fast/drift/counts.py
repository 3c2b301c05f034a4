"""Counts of the rows of a file in the bins of reference statistics, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import DataError
from spinlock_fast.models.input_check import TEST, UNKNOWN, VALIDATION
from spinlock_fast.models.reference_statistics import (
    BINS,
    REFERENCE_ROWS,
    ReferenceStatistics,
    at_bounds,
    code_counts,
    codes_and_distances,
    normalized_bounds,
)
from spinlock_fast.tokenizer import DEFAULT_BUDGET, Tokenizer

Ints = NDArray[np.int64]
Data = str | Path | list[str]


@dataclass
class DriftCounts:
    """Counts of F features and G codebooks of at most K codes; sums of several blocks or ranks are those of all rows.

    Args:
        rows: [3] counted rows; rows without a value in a family; counted rows without a finite latent.
        features, distances: [F, 10] and [G, 10] rows in each bin.
        features_beyond, clipped, distances_beyond: [F], [F] and [G] rows beyond percentiles, and at a clip bound.
        usage: [G, K] rows of each code.
        missing: [families, 2] missing raw values, and all raw values.
    """

    rows: Ints
    features: Ints
    features_beyond: Ints
    clipped: Ints
    usage: Ints
    distances: Ints
    distances_beyond: Ints
    missing: Ints

    @classmethod
    def zeros(cls, reference: ReferenceStatistics) -> DriftCounts:
        F, G = len(reference.features), len(reference.codebooks)
        K = max(len(codebook.usage) for codebook in reference.codebooks)
        shapes = [(3,), (F, BINS), (F,), (F,), (G, K), (G, BINS), (G,), (len(reference.missing), 2)]
        return cls(*(np.zeros(shape, np.int64) for shape in shapes))

    def merge(self, ranks: Ranks) -> None:
        """Adds the counts of all ranks."""
        for counts in vars(self).values():
            ranks.sum_(torch.from_numpy(counts))


def count_rows(
    tokenizer: Tokenizer,
    reference: ReferenceStatistics,
    data: Data,
    memory_budget: int = DEFAULT_BUDGET,
    ranks: Ranks = SINGLE,
) -> DriftCounts:
    """Counts the rows of HDF5 files; reads them once, in bounded memory.

    A row of which a family has no value is counted apart, since the tokenizer replaces all its values.

    Raises:
        DataError: the data cannot be read, or every row lacks a family.
    """
    counts = DriftCounts.zeros(reference)
    bounds = normalized_bounds(tokenizer.cleaner, tokenizer.normalizer)
    with tokenizer.source(data) as source:
        for _, raw, x in tokenizer.raw_and_features(source, memory_budget, None, ranks):
            empty = np.zeros(len(x), bool)
            for i, name in enumerate(reference.missing):
                missing = torch.isnan(raw[name]).reshape(len(x), -1)
                counts.missing[i] += (int(missing.sum()), missing.numel())
                empty |= missing.all(1).cpu().numpy()
            _count_block(counts, tokenizer, reference, x[~empty], bounds)
            counts.rows[1] += np.count_nonzero(empty)
    counts.merge(ranks)
    if not counts.rows[0]:
        raise DataError(f"no row of these data has a value in every family ({counts.rows[1]:,} rows)")
    return counts


def _count_block(
    counts: DriftCounts,
    tokenizer: Tokenizer,
    reference: ReferenceStatistics,
    x: NDArray[np.float32],
    bounds: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> None:
    if not len(x):
        return
    codes, distances = codes_and_distances(tokenizer.model, x)
    counts.rows[0] += len(x)
    counts.rows[2] += np.count_nonzero((codes < 0).any(1))
    counts.clipped += at_bounds(x, bounds).sum(0)
    for f, feature in enumerate(reference.features):
        bins, beyond = feature.values.count(x[:, f])
        counts.features[f, : len(bins)] += bins
        counts.features_beyond[f] += beyond
    for g, codebook in enumerate(reference.codebooks):
        usage = code_counts(codes[:, g], len(codebook.usage))
        counts.usage[g, : len(usage)] += usage
        bins, beyond = codebook.distance.count(distances[:, g])
        counts.distances[g, : len(bins)] += bins
        counts.distances_beyond[g] += beyond


def reference_from_data(
    tokenizer: Tokenizer, data: Data, memory_budget: int = DEFAULT_BUDGET, ranks: Ranks = SINGLE
) -> ReferenceStatistics:
    """Reference statistics of a checkpoint that has none, from the file that it was trained on.

    Test rows of the run and rows that it does not know are left out, if the checkpoint records its rows; distances are
    then those of validation rows.

    Raises:
        DataError: the data cannot be read, or hold no row of the run.
    """
    parts: list[tuple[NDArray[np.float32], Ints]] = []
    missing = {family.name: [0, 0] for family in tokenizer.families}
    with tokenizer.source(data) as source:
        stride = -(-source.rows // REFERENCE_ROWS)
        for start, raw, x in tokenizer.raw_and_features(source, memory_budget, None, ranks):
            for name, total in missing.items():
                total[0] += int(torch.isnan(raw[name]).sum())
                total[1] += raw[name].numel()
            sample = slice(-start % stride, None, stride)
            parts.append((x[sample], _keys(tokenizer, raw)[sample]))
    blocks = [block for of_rank in ranks.gather_objects(parts) for block in of_rank]
    totals = ranks.gather_objects(missing)
    x = np.concatenate([block for block, _ in blocks])
    used, held_out = np.ones(len(x), bool), np.zeros(len(x), bool)
    if tokenizer.known_rows is not None:
        splits = tokenizer.known_rows.splits_of(np.concatenate([keys for _, keys in blocks]))
        used, held_out = (splits != TEST) & (splits != UNKNOWN), splits == VALIDATION
        if not used.any():
            raise DataError("the reference data hold no row that the checkpoint was trained on")
    return ReferenceStatistics.of(
        tokenizer.model,
        tokenizer.feature_names,
        normalized_bounds(tokenizer.cleaner, tokenizer.normalizer),
        x[used],
        x[held_out],
        {name: (sum(part[name][0] for part in totals), sum(part[name][1] for part in totals)) for name in missing},
    )


def _keys(tokenizer: Tokenizer, raw: dict[str, Tensor]) -> Ints:
    first = next(iter(raw.values()))
    return np.zeros(len(first), np.int64) if tokenizer.known_rows is None else tokenizer.row_keys(raw)
