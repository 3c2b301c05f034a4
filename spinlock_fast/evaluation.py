"""Metrics of a checkpoint on a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spinlock_fast.checkpoint import CONFIG, load_run_config
from spinlock_fast.config import TrainingConfig
from spinlock_fast.features.categories import category_correlation, max_off_diagonal
from spinlock_fast.features.selection import Selection
from spinlock_fast.metrics import complete, evaluate
from spinlock_fast.rows import place_rows
from spinlock_fast.run_directory import find
from spinlock_fast.tokenizer import Tokenizer
from spinlock_fast.trainer import resolve_device


def evaluate_file(
    checkpoint: str | Path, data: str | list[str], device: str = "auto", *, allow_external: bool = True
) -> dict[str, Any]:
    """All metrics of a checkpoint on all rows of an HDF5 file; the weights of val_loss are the run's.

    Args:
        allow_external: False refuses data files that take values from outside of their directory.

    Raises:
        DataError: the checkpoint or the data cannot serve.
    """
    tokenizer = Tokenizer.from_checkpoint(checkpoint, resolve_device(device))
    tokenizer.allow_external = allow_external
    has_config = find(Path(checkpoint), CONFIG).exists()
    training = load_run_config(checkpoint).training if has_config else TrainingConfig()
    x = np.concatenate([block for _, block in tokenizer.features_file(data)])
    metrics = evaluate(tokenizer.model, place_rows(Selection(x), tokenizer.device), training)
    groups = tokenizer.model.config.group_indices
    complete(metrics, tokenizer.model, tokenizer.feature_names, max_off_diagonal(category_correlation(x, groups)))
    metrics["samples"] = len(x)
    return metrics
