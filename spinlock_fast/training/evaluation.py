"""Metrics of a checkpoint on a file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.checkpoints.directory import CONFIG, load_run_config
from spinlock_fast.checkpoints.run_directory import find
from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import place_rows
from spinlock_fast.data.row_view import RowView
from spinlock_fast.device import resolve_device
from spinlock_fast.errors import DataError
from spinlock_fast.features.categories import category_correlation, max_off_diagonal
from spinlock_fast.models.input_check import TEST, TRAIN, VALIDATION, InputCheck, row_errors
from spinlock_fast.models.metrics import complete, evaluate
from spinlock_fast.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Rows = Literal["auto", "heldout", "all", "train", "validation", "test"]
_PARTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


def evaluate_file(
    checkpoint: str | Path,
    data: str | Path | list[str],
    device: str = "auto",
    rows: Rows = "auto",
    *,
    allow_external: bool = True,
) -> dict[str, Any]:
    """All metrics of a checkpoint on rows of an HDF5 file; the weights of val_loss are the run's.

    Rows that the checkpoint was trained on are recognised by their values, in whatever file and order.

    Args:
        rows: which are measured. "heldout": those that it was not trained on; "train", "validation" and "test": those
            of the run's split; "auto": held-out rows where the file has training rows as well, else all.
        allow_external: False refuses data files that take values from outside of their directory.

    Returns:
        Those of `metrics.evaluate` on val_rows rows; rows: which, as above; samples: rows of the file; trained_rows:
        how many of the file were trained on (None: the checkpoint does not say); compared_with_training: see
        `InputCheck.summary`; category_correlation_max, of all rows of the file.
    Raises:
        DataError: the checkpoint or the data cannot serve, or there are no such rows.
    """
    tokenizer = Tokenizer.from_checkpoint(checkpoint, resolve_device(device))
    tokenizer.allow_external = allow_external
    has_config = find(Path(checkpoint), CONFIG).exists()
    training = load_run_config(checkpoint).training if has_config else TrainingConfig()
    blocks, keys = [], []
    with tokenizer.source(data) as source:
        check = InputCheck(tokenizer.training_range, source.rows)
        for _, raw, block in tokenizer.raw_and_features(source, check=check):
            blocks.append(block)
            if tokenizer.known_rows is not None:
                keys.append(tokenizer.row_keys(raw))
    x = np.concatenate(blocks)
    parts = tokenizer.known_rows.parts_of(np.concatenate(keys)) if tokenizer.known_rows is not None else None
    measured, chosen = _choose(rows, parts, len(x))
    metrics = evaluate(tokenizer.model, place_rows(RowView(x, chosen), tokenizer.device), training)
    groups = tokenizer.model.config.group_indices
    complete(metrics, tokenizer.model, tokenizer.feature_names, max_off_diagonal(category_correlation(x, groups)))
    check.only(chosen)
    check.add_errors(row_errors(tokenizer.model, x, chosen))
    metrics |= {
        "rows": measured,
        "samples": len(x),
        "trained_rows": None if parts is None else int((parts == TRAIN).sum()),
        "compared_with_training": check.summary(),
    }
    warning = check.warning()
    if warning is not None:
        log.warning("%s", warning)
    return metrics


def _choose(rows: Rows, parts: NDArray[np.uint8] | None, count: int) -> tuple[str, NDArray[np.int64]]:
    """The name of the rows that are measured, and their numbers."""
    everything = np.arange(count)
    if parts is None:
        if rows not in ("auto", "all"):
            raise DataError(
                "the checkpoint does not say which rows it was trained on (it was converted, or made by an earlier "
                "version): only all rows can be measured"
            )
        log.warning(
            "the checkpoint does not say which rows it was trained on: training rows may be among those measured"
        )
        return "all", everything
    trained = parts == TRAIN
    if rows == "auto":
        if trained.all():
            log.warning("every row of these data was trained on: held-out rows have a larger error")
        rows = "heldout" if trained.any() and not trained.all() else "all"
    if rows == "all":
        return rows, everything
    chosen = np.flatnonzero(~trained if rows == "heldout" else parts == _PARTS[rows])
    if not chosen.size:
        raise DataError(f"these data hold no {'held-out' if rows == 'heldout' else rows} rows of the run")
    return rows, chosen
