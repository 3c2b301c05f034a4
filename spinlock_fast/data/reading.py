"""One pass of a loader: windows are submitted ahead, batches taken as they become complete."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast import _native
from spinlock_fast.data.h5py_rows import H5pyRows
from spinlock_fast.data.memory import BatchMemory
from spinlock_fast.data.order import Order
from spinlock_fast.data.table import Tables
from spinlock_fast.errors import DataError


@dataclass
class PassStats:
    """What a pass has done so far."""

    batches: int = 0
    rows: int = 0
    seconds: float = 0.0  # from the first request for a batch to the last delivery
    seconds_waited: float = 0.0
    reader: _native.RowReader | None = None

    def summary(self) -> dict[str, Any]:
        none: _native.ReaderStats = {"chunks": 0, "stored_bytes": 0, "decoded_bytes": 0, "cpu_seconds": 0.0}
        native = self.reader.stats() if self.reader is not None else none
        return {
            "batches": self.batches,
            "rows": self.rows,
            "seconds": self.seconds,
            "seconds_waited": self.seconds_waited,
            **native,
            "decoded_mb_per_second": native["decoded_bytes"] / 1e6 / self.seconds if self.seconds else 0.0,
        }


@dataclass
class _Batch:
    first: int
    tensors: list[Tensor]  # in the order of the tables
    index: Tensor
    error: DataError | None = None
    rows: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.index.numpy()


def batch_memory(tables: Tables, order: Order, ahead: int, pin: bool) -> list[BatchMemory]:
    """Memory for the batches of a pass, by table; `pin`: page-locked."""
    most, window = order.most_rows
    in_flight = 2 + ahead * (2 + window // most)  # the caller's, and those of the windows
    return [BatchMemory(table.row_shape, table.dtype, most, in_flight, pin) for table in tables.tables]


class LoaderPass:
    """Batches from `first_batch` to `stop_batch` or the end of an epoch. To be closed: it holds threads and open files.

    Args:
        ahead: windows that are decoded or delivered at a time.
        memory: of `batch_memory`, used again from pass to pass.
    """

    def __init__(
        self,
        tables: Tables,
        order: Order,
        epoch: int,
        first_batch: int,
        stop_batch: int | None = None,
        *,
        ahead: int,
        threads: int,
        verify_checksums: bool,
        memory: list[BatchMemory],
        stats: PassStats,
    ) -> None:
        self._tables = tables
        self._ends = order.batch_ends[:stop_batch]
        self._next_batch = first_batch
        self._start = int(self._ends[first_batch - 1]) if first_batch else 0
        self._windows = order.windows(epoch)
        self._ahead = ahead
        self._memory = memory
        self._reader = _native.RowReader(*tables.descriptions(), threads, verify_checksums)
        self._slow = H5pyRows(tables)
        self._submitted = self._start
        self._running: deque[int] = deque()  # end of each window that is not wholly delivered
        self._batches: deque[_Batch] = deque()  # begun, not delivered
        self._stats = stats
        self._process = os.getpid()
        stats.reader = self._reader

    def close(self) -> None:
        """Joins the threads and closes the files; batches that were delivered stay."""
        self._reader.close()
        if os.getpid() == self._process:  # a forked process must leave the files of its parent alone
            self._slow.close()
        self._batches.clear()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        began = time.perf_counter()
        for end in self._ends[self._next_batch :].tolist():
            asked = time.perf_counter()
            self._submit(end)
            batch = self._take()
            while self._running and self._running[0] <= end:
                self._running.popleft()
            self._submit(end)  # before the caller works on the batch, so that the threads have something to do
            self._stats.batches += 1
            self._stats.rows += len(batch["index"])
            now = time.perf_counter()
            self._stats.seconds_waited += now - asked
            self._stats.seconds = now - began
            yield batch

    def _take(self) -> dict[str, Tensor]:
        batch = self._batches[0]
        try:
            self._reader.wait(batch.first)
        except _native.ReadError as error:
            raise DataError(str(error)) from None
        if batch.error is not None:
            raise batch.error
        self._batches.popleft()
        names = (table.path for table in self._tables.tables)
        return {**dict(zip(names, batch.tensors, strict=True)), "index": batch.index}

    def _submit(self, needed: int) -> None:
        """Windows ahead, and those that a batch up to position `needed` reaches into."""
        while len(self._running) < self._ahead or self._submitted < needed:
            if not len(self._ends) or self._submitted >= self._ends[-1]:
                return
            if (window := next(self._windows, None)) is None:
                return
            first, rows = window
            rows = rows[max(0, self._start - first) : max(0, int(self._ends[-1]) - first)]
            first = max(first, self._start)
            if not len(rows):
                continue
            end = first + len(rows)
            self._add_batches(end)
            for batch in self._batches:
                low, high = max(batch.first, first), min(batch.first + len(batch.rows), end)
                if low < high:
                    batch.rows[low - batch.first : high - batch.first] = rows[low - first : high - first]
            self._reader.submit(first, rows)
            self._running.append(end)
            self._submitted = end
            self._read_slowly(first, rows)

    def _add_batches(self, end: int) -> None:
        """Memory for the batches that begin before position `end`."""
        while self._next_batch < len(self._ends):
            first = int(self._ends[self._next_batch - 1]) if self._next_batch else 0
            if first >= end:
                return
            count = int(self._ends[self._next_batch]) - first
            tensors = [memory.take(count) for memory in self._memory]
            pairs = zip(self._tables.tables, tensors, strict=True)
            native = [tensor.numpy() for table, tensor in pairs if not table.reason]
            self._reader.add_batch(first, count, native)
            self._batches.append(
                _Batch(first, tensors, torch.empty(count, dtype=torch.int64, pin_memory=self._memory[0].pin))
            )
            self._next_batch += 1

    def _read_slowly(self, first: int, rows: NDArray[np.int64]) -> None:
        """The window's rows of the datasets that h5py reads."""
        starts = np.array([batch.first for batch in self._batches])
        for t, table in enumerate(self._tables.tables):
            if not table.reason:
                continue
            for block in self._slow.blocks(table, rows):
                which = np.searchsorted(starts, first + block, side="right") - 1
                values, error = None, None
                try:
                    values = self._slow.read(table, rows[block])
                except DataError as caught:
                    error = caught
                for b in np.unique(which):
                    batch, mine = self._batches[int(b)], which == b
                    if values is None:
                        batch.error = batch.error or error
                    else:
                        batch.tensors[t].numpy()[first + block[mine] - batch.first] = values[mine]
