"""Window sizes and read-ahead of a pass within a memory budget."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import lcm

from spinlock_fast.data.sharded_dataset import ShardedDataset, ShardedDatasets
from spinlock_fast.errors import ConfigError

_CONTIGUOUS_UNIT = (8, 4096)  # minimal rows and bytes of a unit of contiguous data
_MIN_UNITS = 8  # per window, for sufficient shuffling
_TASKS_PER_THREAD = 8  # queued chunks per thread; sequential windows may hold few chunks
_GROUPED_WINDOWS = 8  # read through h5py or from contiguous data: those that are complete are delivered together
_CONTIGUOUS_BYTES = 1 << 20  # per read task
_FREE_SCRATCH = 4 << 20  # scratch memory of a thread that the budget does not count
_COPIES = 3  # of a chunk in scratch memory: stored, inflated, unshuffled


@dataclass(frozen=True)
class WindowSizes:
    """Window sizes of a pass, in rows."""

    unit_rows: int  # rows that stay together when units are permuted
    window_rows: int
    windows_ahead: int  # windows decoded or delivered at a time
    threads: int


def available_cpus() -> int:
    """Number of CPUs available to this process."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not available on all systems
        return os.cpu_count() or 1


def shuffled_windows(
    sharded: ShardedDatasets, batch_size: int, window_rows: int, rank_rows: int, threads: int, budget: int
) -> WindowSizes:
    """Sizes for a shuffled pass: one window is delivered while the next is decoded.

    Units depend only on the files and `window_rows`, so that the order of rows does not depend on the budget.

    Raises:
        ConfigError: the windows exceed the budget; names a sufficient budget.
    """
    rows = min(window_rows, rank_rows)
    windows_ahead = 1 if rank_rows <= window_rows else 2
    base = _bytes(sharded, windows_ahead * rows + 2 * min(batch_size, rank_rows))
    threads = _threads_that_fit(sharded, threads, budget - base)
    needed = base + _scratch(sharded, 1)
    if needed > budget:
        raise ConfigError(
            f"memory_budget {budget} does not hold {windows_ahead} window{'s' * (windows_ahead > 1)} of {rows} rows of "
            f"{', '.join(dataset.path for dataset in sharded.datasets)}: at least {needed} bytes are needed, or "
            "a smaller window_rows"
        )
    return WindowSizes(_unit(sharded, window_rows), window_rows, windows_ahead, threads)


def sequential_windows(
    sharded: ShardedDatasets, batch_size: int, rank_rows: int, threads: int, budget: int
) -> WindowSizes:
    """Sizes for a sequential pass: the smallest windows of whole chunks that hold a batch, as many as fit the budget.

    Raises:
        ConfigError: not even one window fits; names a sufficient budget.
    """
    batch = min(batch_size, rank_rows)
    chunked = _chunk_rows(sharded) or [1]
    # Chunks larger than a window are decoded again for each window that overlaps them.
    for unit in (lcm(*chunked), max(chunked), min(max(chunked), batch)):
        rows = min(-(-batch // unit) * unit, rank_rows)
        base = _bytes(sharded, rows + 2 * batch)
        if base + _scratch(sharded, 1) <= budget:
            break
    else:
        raise ConfigError(
            f"memory_budget {budget} does not hold three batches of {batch} rows of "
            f"{', '.join(dataset.path for dataset in sharded.datasets)}: at least {base + _scratch(sharded, 1)} bytes "
            "are needed, or a smaller batch_size"
        )
    threads = _threads_that_fit(sharded, threads, budget - base)
    fit = 1 + (budget - base - _scratch(sharded, threads)) // _bytes(sharded, rows)
    # Read ahead only as much as keeps the threads busy: memory that is reused soon is still in the CPU cache.
    tasks = sum(
        -(-rows // dataset.chunk_rows) if dataset.chunk_bytes else 1 + _bytes(sharded, rows) // _CONTIGUOUS_BYTES
        for dataset in sharded.datasets
    )
    ahead = 1 + -(-_TASKS_PER_THREAD * threads // tasks)
    if any(dataset.h5py_reason or not dataset.chunk_bytes for dataset in sharded.datasets):
        ahead = max(ahead, _GROUPED_WINDOWS)
    return WindowSizes(unit, max(rows, unit), min(fit, ahead), threads)


def _unit(sharded: ShardedDatasets, window_rows: int) -> int:
    """Rows per unit: those of whole chunks, if possible, so that no chunk is decoded twice."""
    chunked = _chunk_rows(sharded)
    min_rows, min_bytes = _CONTIGUOUS_UNIT
    if not chunked:
        row_bytes = max(dataset.row_bytes for dataset in sharded.datasets)
        return min(max(min_rows, min_bytes // row_bytes), window_rows)
    for unit in (lcm(*chunked), max(chunked)):
        if unit * _MIN_UNITS <= window_rows:
            return unit
    # Chunks too large for the window: decode the dataset with the largest rows once, others repeatedly.
    widest = max(
        (dataset for dataset in sharded.datasets if dataset.chunk_bytes), key=lambda dataset: dataset.row_bytes
    )
    return min(widest.chunk_rows, window_rows)


def _chunk_rows(sharded: ShardedDatasets) -> list[int]:
    return [dataset.chunk_rows for dataset in sharded.datasets if dataset.chunk_bytes]


def _bytes(sharded: ShardedDatasets, rows: int) -> int:
    return rows * (8 + sum(dataset.row_bytes for dataset in sharded.datasets))


def _scratch(sharded: ShardedDatasets, threads: int) -> int:
    """Scratch memory for decoding beyond _FREE_SCRATCH, in bytes."""

    def per_thread(dataset: ShardedDataset) -> int:
        return max(0, _COPIES * dataset.chunk_bytes - _FREE_SCRATCH)

    native = max((per_thread(dataset) for dataset in sharded.datasets if dataset.read_natively), default=0)
    return threads * native + max(
        (per_thread(dataset) for dataset in sharded.datasets if dataset.h5py_reason), default=0
    )


def _threads_that_fit(sharded: ShardedDatasets, threads: int, available: int) -> int:
    while threads > 1 and _scratch(sharded, threads) > available:
        threads -= 1
    return threads
