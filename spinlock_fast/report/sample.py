"""What a data file tells about a checkpoint: measured in one pass, for panels that need more than metrics."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.config.random_streams import VERSION, streams_of
from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import place_rows
from spinlock_fast.data.row_view import RowView
from spinlock_fast.data.split import split_rows
from spinlock_fast.errors import DataError
from spinlock_fast.features.categories import category_correlation, max_off_diagonal
from spinlock_fast.features.statistics import correlation
from spinlock_fast.models.input_check import InputCheck, row_errors
from spinlock_fast.models.metrics import complete, evaluate
from spinlock_fast.report.contents import Contents

log = logging.getLogger(__name__)

# Of a correlation: features are kept in float32, normalised.
_ROUNDING = 1e-4


@dataclass
class Sample:
    """Measured on the rows of a file."""

    name: str
    rows: int
    tokens: NDArray[np.int64]  # [N, G]
    counts: NDArray[np.int64]  # [codes], rows of each code, codebook after codebook
    centroids: NDArray[np.float64]  # [codes, F], mean normalised features of those rows; NaN where there are none
    correlation_on: str  # the rows that the next two rest on, in words
    # Mean |Pearson correlation| of features of two categories [C, C], and of a feature with those of a category [C, F],
    # never of a feature with itself; NaN within a category of one feature.
    category_correlation: NDArray[np.float64]
    affinity: NDArray[np.float64]

    @property
    def used(self) -> NDArray[np.bool_]:
        """[codes] whether a row has the code."""
        return self.counts > 0


def measure_sample(contents: Contents, data: str | list[str]) -> Sample:
    """Reads a file through the checkpoint's tokenizer; metrics that the checkpoint lacks are measured, too.

    Holds the cleaned features [N, F] in memory, raw values block by block.

    Raises:
        DataError: the file cannot serve, or does not fit the checkpoint.
    """
    tokenizer = contents.tokenizer
    with tokenizer.source(data) as source:
        check = InputCheck(tokenizer.training_range, source.rows)
        x = np.concatenate([block for _, _, block in tokenizer.raw_and_features(source, check=check)])
    if not len(x):
        raise DataError(f"{_name(data)}: no rows")
    check.add_errors(row_errors(tokenizer.model, x, np.arange(len(x))))
    warning = check.warning()
    if warning is not None:
        log.warning("%s", warning)
    tokens = np.concatenate(
        [
            tokenizer.model.get_tokens(part.to(tokenizer.device)).cpu().numpy()
            for part in torch.from_numpy(x).split(4096)
        ]
    )
    rows, words = _correlated_rows(contents, x)
    between = category_correlation(rows, tokenizer.model.config.group_indices)
    counts, centroids = _code_means(contents, x, tokens)
    result = Sample(
        name=_name(data),
        rows=len(x),
        tokens=tokens,
        counts=counts,
        centroids=centroids,
        correlation_on=words,
        category_correlation=np.where(_alone(contents), np.nan, between),
        affinity=_affinity(rows, contents.groups),
    )
    if "quality" not in contents.metrics:
        training = contents.config.training if contents.config else TrainingConfig()
        contents.metrics = evaluate(tokenizer.model, place_rows(RowView(x), tokenizer.device), training)
        complete(
            contents.metrics,
            tokenizer.model,
            tokenizer.feature_names,
            max_off_diagonal(between),
        )
        contents.measured_on = f"{result.rows:,} rows of {result.name}"
    return result


def _name(data: str | list[str]) -> str:
    return Path(data).name if isinstance(data, str) else f"{len(data)} files"


def _code_means(
    contents: Contents, x: NDArray[np.float32], tokens: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    counts, centroids = [], []
    for g, book in enumerate(contents.codebooks):
        count = np.bincount(tokens[:, g], minlength=book.codes)
        member = np.zeros((book.codes, len(x)), dtype=np.float32)
        member[tokens[:, g], np.arange(len(x))] = 1.0
        with np.errstate(invalid="ignore"):
            centroids.append((member @ x).astype(np.float64) / np.where(count > 0, count, np.nan)[:, None])
        counts.append(count)
    return np.concatenate(counts), np.concatenate(centroids)


def _correlated_rows(contents: Contents, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], str]:
    """The training rows, where these are the data of the run, else all rows."""
    config, metrics = contents.config, contents.metrics
    if config is not None and metrics.get("samples") == len(x) and "category_correlation_max" in metrics:
        for streams in (VERSION, 1):  # runs of earlier versions drew other rows
            with streams_of(streams):
                train = x[split_rows(len(x), config.training, config.random_seed).train]
            found = max_off_diagonal(category_correlation(train, contents.model.config.group_indices))
            if abs(found - metrics["category_correlation_max"]) < _ROUNDING:
                return train, f"the {len(train):,} training rows"
    return x, f"all {len(x):,} rows"


def _affinity(x: NDArray[np.float32], groups: list[list[int]]) -> NDArray[np.float64]:
    strength = np.abs(correlation(x))
    np.fill_diagonal(strength, 0.0)  # a feature with itself says nothing
    result = np.zeros((len(groups), x.shape[1]))
    for c, members in enumerate(groups):
        others = np.full(x.shape[1], len(members))
        others[members] -= 1
        result[c] = strength[members].sum(0) / np.where(others > 0, others, np.nan)
    return result


def _alone(contents: Contents) -> NDArray[np.bool_]:
    """[C, C] true on the diagonal where a category has one feature."""
    single: NDArray[np.bool_] = np.diag([len(members) == 1 for members in contents.groups])
    return single
