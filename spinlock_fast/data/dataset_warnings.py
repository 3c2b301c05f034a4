"""Warnings about datasets that are read slowly or hold unexpected values; each is logged once per process."""

from __future__ import annotations

import logging
from pathlib import Path

from spinlock_fast.data.backing_files import descriptor_limit
from spinlock_fast.data.sharded_dataset import ShardedDatasets

log = logging.getLogger(__name__)

_logged: set[tuple[Path, str]] = set()


def log_unusual_datasets(sharded: ShardedDatasets) -> None:
    """Logs once per dataset: packed numbers, reversed axes of MATLAB, and too many source files."""
    for dataset in sharded.datasets:
        for shard in dataset.shards:
            messages = []
            if shard.packing is not None:
                messages.append(str(shard.packing))
            if shard.matlab and len(shard.shape) > 1 and shard.shape[0] < shard.shape[-1]:
                messages.append(
                    f"written by MATLAB, which reverses axes: shape {shard.shape} is read as {shard.shape[0]} rows; "
                    "if these are the columns, save the transposed array"
                )
            sources = len({source.path for source in shard.backing_files if source.opened_by_hdf5})
            if 2 * sources > (limit := descriptor_limit()):
                messages.append(
                    f"takes values from {sources} files, but this process may have {limit} open; raise the limit with "
                    "`ulimit -n`"
                )
            # Most shards have the same properties: log the first one and those that differ.
            if shard is dataset.shards[0] or shard.packing != dataset.shards[0].packing:
                for message in messages:
                    warn_once(shard.file, f"{dataset.path}: {message}")


def log_slow_reading(sharded: ShardedDatasets, window_rows: int | None) -> None:
    """Logs datasets that are read through h5py and, for a shuffled pass, chunks larger than a window.

    Args:
        sharded: datasets to read.
        window_rows: rows of a window; None for a sequential pass.
    """
    file = sharded.files[0]
    for dataset in sharded.datasets:
        if dataset.h5py_reason:
            warn_once(
                file, f"{dataset.path} is read through {dataset.reading.replace('h5py', 'h5py, which is slower', 1)}"
            )
        if window_rows is not None and dataset.chunk_rows > window_rows:
            log.warning(
                "%s: %s: chunks of %d rows are decoded again for each window of %d rows that overlaps them; a larger "
                "window_rows saves time",
                file,
                dataset.path,
                dataset.chunk_rows,
                window_rows,
            )


def warn_once(file: Path, message: str) -> None:
    """Logs a warning about a file, once per process."""
    if (file, message) not in _logged:
        _logged.add((file, message))
        log.warning("%s: %s", file, message)
