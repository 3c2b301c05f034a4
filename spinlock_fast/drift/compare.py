"""Compares the rows of a file with those that a checkpoint was trained on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from spinlock_fast.checkpoints.run_directory import REFERENCE, check_integrity, find
from spinlock_fast.device import resolve_device
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.drift.counts import Data, count_rows, reference_from_data
from spinlock_fast.drift.verdict import FEW_ROWS, judge
from spinlock_fast.errors import DataError
from spinlock_fast.models.reference_statistics import ReferenceStatistics
from spinlock_fast.tokenizer import DEFAULT_BUDGET, Tokenizer

log = logging.getLogger(__name__)


def monitor(
    checkpoint: str | Path,
    data: Data,
    reference: Data | None = None,
    *,
    device: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
    allow_external: bool = True,
    ranks: Ranks = SINGLE,
) -> dict[str, Any]:
    """Measures how far the rows of a file have drifted from the training rows of a checkpoint; see docs/drift.md.

    Args:
        checkpoint: checkpoint directory.
        data: HDF5 file, glob or list of files.
        reference: the data that the checkpoint was trained on, instead of its reference_statistics.json.
        device: see `resolve_device`.
        memory_budget: maximum bytes of raw features in memory.
        allow_external: False refuses data files with links to outside their directory.
        ranks: if there are several, each encodes a share of the rows; all return the same result.

    Returns:
        The contents of drift.json: verdict ("stable", "watch" or "drifted"), reasons (texts), rows, the measures of
        features, codebooks and families (see `judge`), and checkpoint_sha256.

    Raises:
        DataError: the checkpoint or the data cannot be read, or the checkpoint has no reference statistics.
    """
    tokenizer = Tokenizer.from_checkpoint(checkpoint, resolve_device(device))
    tokenizer.allow_external = allow_external
    if reference is None:
        statistics = read_reference(Path(checkpoint), tokenizer)
    else:
        statistics = reference_from_data(tokenizer, reference, memory_budget, ranks)
    result = judge(count_rows(tokenizer, statistics, data, memory_budget, ranks), statistics)
    if result["rows"] < FEW_ROWS:
        log.warning("few rows (%d): only large changes are significant", result["rows"])
    return {"checkpoint_sha256": tokenizer.checkpoint_hash, **result}


def read_reference(directory: Path, tokenizer: Tokenizer) -> ReferenceStatistics:
    """The reference statistics of a checkpoint directory; raises DataError."""
    path = find(directory, REFERENCE)
    try:
        check_integrity(directory, REFERENCE)
        return ReferenceStatistics.from_json(path.read_bytes(), tokenizer.model, tokenizer.feature_names)
    except FileNotFoundError:
        raise DataError(
            f"{directory}: no {REFERENCE} there; it was converted, or made by an earlier version: "
            "name the data that it was trained on with --reference"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(str(path)) else f"{path}: {text}") from None
