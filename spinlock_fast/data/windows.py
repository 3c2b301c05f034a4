"""How many rows are read together and ahead, within a budget of memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import lcm

from spinlock_fast.data.table import Table, Tables
from spinlock_fast.errors import ConfigError

_CONTIGUOUS_UNIT = (8, 4096)  # rows that stay together: at least so many, and at least so many bytes
_UNITS_A_WINDOW = 8  # fewer would hardly mix
_TASKS_A_THREAD = 8  # chunks that are waiting while one is decoded: sequential windows may hold few of them
_CONTIGUOUS_BYTES = 1 << 20  # that are read at once
_FREE_SCRATCH = 4 << 20  # bytes of a thread that are not counted, as its stack is not
_COPIES = 3  # of a chunk: as stored, inflated, un-shuffled


@dataclass(frozen=True)
class Windows:
    """Sizes of a pass."""

    unit_rows: int
    window_rows: int
    ahead: int  # windows that are decoded or delivered at a time
    threads: int


def processors() -> int:
    """Those that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def shuffled_windows(
    tables: Tables, batch_size: int, window_rows: int, rank_rows: int, threads: int, budget: int
) -> Windows:
    """Two windows, one that is delivered and one that is decoded; raises ConfigError where they do not fit.

    Which rows stay together depends on the files and `window_rows` alone, so that the order does.
    """
    rows = min(window_rows, rank_rows)
    ahead = 1 if rank_rows <= window_rows else 2
    base = _bytes(tables, ahead * rows + 2 * min(batch_size, rank_rows))
    threads = _threads_that_fit(tables, threads, budget - base)
    needed = base + _scratch(tables, 1)
    if needed > budget:
        raise ConfigError(
            f"memory_budget {budget} does not hold {ahead} window{'s' * (ahead > 1)} of {rows} rows of "
            f"{', '.join(table.path for table in tables.tables)}: at least {needed} bytes are needed, or a smaller "
            "window_rows"
        )
    return Windows(_unit(tables, window_rows), window_rows, ahead, threads)


def sequential_windows(tables: Tables, batch_size: int, rank_rows: int, threads: int, budget: int) -> Windows:
    """The smallest windows of whole chunks that hold a batch, as many as fit; raises ConfigError where none does."""
    batch = min(batch_size, rank_rows)
    chunked = _chunk_rows(tables) or [1]
    # Large chunks that do not fit are decoded for every window that they reach into.
    for unit in (lcm(*chunked), max(chunked), min(max(chunked), batch)):
        rows = min(-(-batch // unit) * unit, rank_rows)
        base = _bytes(tables, rows + 2 * batch)
        if base + _scratch(tables, 1) <= budget:
            break
    else:
        raise ConfigError(
            f"memory_budget {budget} does not hold three batches of {batch} rows of "
            f"{', '.join(table.path for table in tables.tables)}: at least {base + _scratch(tables, 1)} bytes are "
            "needed, or a smaller batch_size"
        )
    threads = _threads_that_fit(tables, threads, budget - base)
    fit = 1 + (budget - base - _scratch(tables, threads)) // _bytes(tables, rows)
    # Memory that comes round soon is still in the processor's cache: no more ahead than keeps the threads busy.
    tasks = sum(
        -(-rows // table.chunk_rows) if table.chunk_bytes else 1 + _bytes(tables, rows) // _CONTIGUOUS_BYTES
        for table in tables.tables
    )
    return Windows(unit, max(rows, unit), min(fit, 1 + -(-_TASKS_A_THREAD * threads // tasks)), threads)


def _unit(tables: Tables, window_rows: int) -> int:
    """Rows that stay together when units are permuted: those of a chunk, so that none is decoded twice."""
    chunked = _chunk_rows(tables)
    least, least_bytes = _CONTIGUOUS_UNIT
    if not chunked:
        row_bytes = max(table.row_bytes for table in tables.tables)
        return min(max(least, least_bytes // row_bytes), window_rows)
    for unit in (lcm(*chunked), max(chunked)):
        if unit * _UNITS_A_WINDOW <= window_rows:
            return unit
    # Chunks that are too large to be mixed: the dataset with the most bytes is decoded once, others more often.
    widest = max((table for table in tables.tables if table.chunk_bytes), key=lambda table: table.row_bytes)
    return min(widest.chunk_rows, window_rows)


def _chunk_rows(tables: Tables) -> list[int]:
    return [table.chunk_rows for table in tables.tables if table.chunk_bytes]


def _bytes(tables: Tables, rows: int) -> int:
    return rows * (8 + sum(table.row_bytes for table in tables.tables))


def _scratch(tables: Tables, threads: int) -> int:
    """Bytes for decoding that are worth counting."""

    def of(table: Table) -> int:
        return max(0, _COPIES * table.chunk_bytes - _FREE_SCRATCH)

    native = max((of(table) for table in tables.native), default=0)
    return threads * native + max((of(table) for table in tables.tables if table.reason), default=0)


def _threads_that_fit(tables: Tables, threads: int, left: int) -> int:
    while threads > 1 and _scratch(tables, threads) > left:
        threads -= 1
    return threads
