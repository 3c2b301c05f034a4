"""Statistics of a checkpoint on a data file, computed in one pass, for panels that need more than metrics.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.analysis.conditions import Condition
from spinlock_fast.config.random_streams import VERSION, streams_of
from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import place_rows
from spinlock_fast.data.row_view import RowView
from spinlock_fast.data.split import split_rows
from spinlock_fast.errors import DataError
from spinlock_fast.features.categories import category_correlation, max_off_diagonal
from spinlock_fast.features.statistics import correlation
from spinlock_fast.models.input_check import InputCheck, row_errors
from spinlock_fast.models.metrics import add_model_metrics, evaluate
from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.condition_associations import observed_conditions

# Tolerance of a correlation: normalised features are stored in float32.
_ROUNDING = 1e-4


@dataclass
class DataStatistics:
    """Statistics of the rows of a file."""

    name: str
    rows: int
    tokens: NDArray[np.int64]  # [N, G]
    counts: NDArray[np.int64]  # [codes] rows per code, concatenated over codebooks
    centroids: NDArray[np.float64]  # [codes, F] mean normalised features of those rows; NaN for an unused code
    correlation_on: str  # the rows of the two correlations below, as text
    # Mean |Pearson correlation| between features of two categories [C, C] and between a feature and those of a category
    # [C, F], without the correlation of a feature with itself; NaN within a category of one feature.
    category_correlation: NDArray[np.float64]
    affinity: NDArray[np.float64]
    conditions: list[Condition] = field(default_factory=list)  # those that vary

    @property
    def used(self) -> NDArray[np.bool_]:
        """[codes] whether any row has the code."""
        return self.counts > 0


def measure_data(
    summary: CheckpointSummary, data: str | Path | list[str], conditions: Sequence[str] = ()
) -> DataStatistics:
    """Encodes a file with the checkpoint's tokenizer; sets `summary.metrics` where the checkpoint has no measured ones.

    Holds the cleaned features [N, F] in memory; raw values are read block by block.

    Args:
        conditions: further conditions, see `spinlock_fast.analysis.named_conditions.add_named_conditions`.

    Raises:
        DataError: the file cannot be used, or does not fit the checkpoint.
    """
    tokenizer = summary.tokenizer
    with tokenizer.source(data) as source:
        known = observed_conditions(tokenizer, source, conditions, summary.notes)
        check = InputCheck(tokenizer.training_range, source.rows)
        x = np.concatenate([block for _, _, block in tokenizer.raw_and_features(source, check=check)])
    if not len(x):
        raise DataError(f"{_name(data)}: no rows")
    check.add_errors(row_errors(tokenizer.model, x, np.arange(len(x))))
    check.log_warnings()
    tokens = np.concatenate(
        [
            tokenizer.model.get_tokens(part.to(tokenizer.device)).cpu().numpy()
            for part in torch.from_numpy(x).split(4096)
        ]
    )
    rows, rows_text = _correlation_rows(summary, x)
    between = category_correlation(rows, tokenizer.model.config.group_indices)
    counts, centroids = _code_centroids(summary, x, tokens)
    result = DataStatistics(
        name=_name(data),
        rows=len(x),
        tokens=tokens,
        counts=counts,
        centroids=centroids,
        correlation_on=rows_text,
        category_correlation=np.where(_single_feature_categories(summary), np.nan, between),
        affinity=_affinity(rows, summary.groups),
        conditions=known,
    )
    if "quality" not in summary.metrics:
        training = summary.config.training if summary.config else TrainingConfig()
        summary.metrics = evaluate(tokenizer.model, place_rows(RowView(x), tokenizer.device), training)
        add_model_metrics(
            summary.metrics,
            tokenizer.model,
            tokenizer.feature_names,
            max_off_diagonal(between),
        )
        summary.measured_on = f"{result.rows:,} rows of {result.name}"
    return result


def _name(data: str | Path | list[str]) -> str:
    return Path(data).name if isinstance(data, (str, Path)) else f"{len(data)} files"


def _code_centroids(
    summary: CheckpointSummary, x: NDArray[np.float32], tokens: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    counts, centroids = [], []
    for g, codebook in enumerate(summary.codebooks):
        count = np.bincount(tokens[:, g], minlength=codebook.codes)
        member = np.zeros((codebook.codes, len(x)), dtype=np.float32)
        member[tokens[:, g], np.arange(len(x))] = 1.0
        with np.errstate(invalid="ignore"):
            centroids.append((member @ x).astype(np.float64) / np.where(count > 0, count, np.nan)[:, None])
        counts.append(count)
    return np.concatenate(counts), np.concatenate(centroids)


def _correlation_rows(summary: CheckpointSummary, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], str]:
    """The training rows and their name where the file is the data of the run, else all rows.

    The training split is recognised by its largest category correlation, which metrics.json holds.
    """
    config, metrics = summary.config, summary.metrics
    if config is not None and metrics.get("samples") == len(x) and "category_correlation_max" in metrics:
        for streams in (VERSION, 1):  # the split of earlier versions
            with streams_of(streams):
                train = x[split_rows(len(x), config.training, config.random_seed).train]
            largest = max_off_diagonal(category_correlation(train, summary.model.config.group_indices))
            if abs(largest - metrics["category_correlation_max"]) < _ROUNDING:
                return train, f"the {len(train):,} training rows"
    return x, f"all {len(x):,} rows"


def _affinity(x: NDArray[np.float32], groups: list[list[int]]) -> NDArray[np.float64]:
    strength = np.abs(correlation(x))
    np.fill_diagonal(strength, 0.0)  # without the correlation of a feature with itself
    result = np.zeros((len(groups), x.shape[1]))
    for c, members in enumerate(groups):
        others = np.full(x.shape[1], len(members))
        others[members] -= 1
        result[c] = strength[members].sum(0) / np.where(others > 0, others, np.nan)
    return result


def _single_feature_categories(summary: CheckpointSummary) -> NDArray[np.bool_]:
    """[C, C] True on the diagonal where a category has one feature."""
    single: NDArray[np.bool_] = np.diag([len(members) == 1 for members in summary.groups])
    return single
