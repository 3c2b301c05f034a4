"""Evaluates a checkpoint on data files."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.checkpoints.directory import CONFIG, load_run_config
from spinlock_fast.checkpoints.run_directory import find
from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.feature_matrix import FeatureMatrix, is_kept_on_disk
from spinlock_fast.data.host_rows import place_rows
from spinlock_fast.data.row_view import RowView
from spinlock_fast.device import resolve_device
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import DataError
from spinlock_fast.features.categories import category_correlation, max_off_diagonal
from spinlock_fast.models.input_check import TEST, TRAIN, VALIDATION, InputCheck, row_errors
from spinlock_fast.models.joint_metrics import joint_searches
from spinlock_fast.models.metrics import add_model_metrics, evaluate
from spinlock_fast.tokenizer import DEFAULT_BUDGET, Tokenizer

log = logging.getLogger(__name__)

RowSelection = Literal["auto", "heldout", "all", "train", "validation", "test"]
_SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


def evaluate_file(
    checkpoint: str | Path,
    data: str | Path | list[str],
    device: str = "auto",
    rows: RowSelection = "auto",
    *,
    allow_external: bool = True,
    memory_budget: int = DEFAULT_BUDGET,
    ranks: Ranks = SINGLE,
) -> dict[str, Any]:
    """Metrics of a checkpoint on rows of HDF5 files, with the loss weights of its run.

    Rows of the run are recognised by their values, in any file and order.

    Args:
        checkpoint: checkpoint directory.
        data: HDF5 file, glob or list of files.
        device: see `resolve_device`.
        rows: which rows are measured. "heldout": those that the checkpoint was not trained on; "train", "validation"
            and "test": those of the run's split; "auto": held-out rows if the data also have training rows, else all.
        allow_external: False refuses data files with links to outside their directory.
        memory_budget: maximum bytes of raw features in memory; features that take more than half of it are kept in a
            file in the directory for temporary files (TMPDIR).
        ranks: if there are several, each encodes and measures a share of the rows; all return the same metrics. They
            share the file of features.

    Returns:
        The metrics of `metrics.evaluate` and `add_model_metrics`, and: joint, see `joint_searches`; rows, the
        selection that was measured; samples, rows in the data; trained_rows, how many of them the checkpoint was
        trained on (None if it does not record them); compared_with_training, see `InputCheck.summary`.

    Raises:
        DataError: the checkpoint or the data cannot be read, or no row is selected.
    """
    tokenizer = Tokenizer.from_checkpoint(checkpoint, resolve_device(device))
    tokenizer.allow_external = allow_external
    has_config = os.path.exists(find(Path(checkpoint), CONFIG))
    training = load_run_config(checkpoint).training if has_config else TrainingConfig()
    keys = []
    with tokenizer.source(data) as source:
        columns = len(tokenizer.feature_names)
        on_disk = is_kept_on_disk(source.rows, columns, "auto", memory_budget, ranks)
        matrix = FeatureMatrix(source.rows, columns, Path(tempfile.gettempdir()) if on_disk else None, ranks)
        check = InputCheck(tokenizer.training_range, source.rows)
        for start, raw, block in tokenizer.raw_and_features(source, memory_budget, check, ranks):
            matrix.write(start, block)
            if tokenizer.known_rows is not None:
                keys.append(tokenizer.row_keys(raw))
    matrix.synchronize()
    check.merge(ranks)
    x = matrix.x
    splits = None
    if tokenizer.known_rows is not None:
        keys = [block for blocks in ranks.gather_objects(keys) for block in blocks]
        splits = tokenizer.known_rows.splits_of(np.concatenate(keys))
    selection, selected = _select_rows(rows, splits, len(x))
    mine = RowView(x, selected[ranks.share(len(selected))])
    placed = place_rows(mine, tokenizer.device)
    metrics = evaluate(tokenizer.model, placed, training, ranks=ranks)
    correlation = category_correlation(RowView(x), tokenizer.model.config.group_indices, ranks)
    add_model_metrics(metrics, tokenizer.model, tokenizer.feature_names, max_off_diagonal(correlation))
    check.restrict_to(selected)
    check.add_errors(row_errors(tokenizer.model, x, selected))
    metrics |= {
        "joint": joint_searches(tokenizer.model, placed, ranks),
        "rows": selection,
        "samples": len(x),
        "trained_rows": None if splits is None else int((splits == TRAIN).sum()),
        "compared_with_training": check.summary(),
    }
    check.log_warnings()
    return metrics


def _select_rows(rows: RowSelection, splits: NDArray[np.uint8] | None, count: int) -> tuple[str, NDArray[np.int64]]:
    """The resolved selection, and the numbers of its rows."""
    all_rows = np.arange(count)
    if splits is None:
        if rows not in ("auto", "all"):
            raise DataError(
                "the checkpoint does not say which rows it was trained on (it was converted, or made by an earlier "
                "version): only all rows can be measured"
            )
        log.warning(
            "the checkpoint does not say which rows it was trained on: training rows may be among those measured"
        )
        return "all", all_rows
    trained = splits == TRAIN
    if rows == "auto":
        if trained.all():
            log.warning("every row of these data was trained on: held-out rows have a larger error")
        rows = "heldout" if trained.any() and not trained.all() else "all"
    if rows == "all":
        return rows, all_rows
    selected = np.flatnonzero(~trained if rows == "heldout" else splits == _SPLITS[rows])
    if not selected.size:
        raise DataError(f"these data hold no {'held-out' if rows == 'heldout' else rows} rows of the run")
    return rows, selected
