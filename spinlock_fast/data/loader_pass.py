"""One pass over the rows: windows of rows are submitted ahead, batches are delivered in order."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast import _native
from spinlock_fast.data.batch_memory import BatchMemory
from spinlock_fast.data.direct_reading import CallerTime, direct_reading_seconds
from spinlock_fast.data.h5py_thread import H5pyBatch, H5pyThread
from spinlock_fast.data.row_order import RowSequence
from spinlock_fast.data.shard_fetcher import ShardFetcher
from spinlock_fast.data.sharded_dataset import ShardedDatasets
from spinlock_fast.errors import DataError


@dataclass
class PassStats:
    """Statistics of a pass."""

    batches: int = 0
    rows: int = 0
    seconds: float = 0.0  # from the first request of a batch to the last delivery
    seconds_waited: float = 0.0
    reader: _native.RowReader | None = None

    def summary(self) -> dict[str, Any]:
        empty: _native.ReaderStats = {"chunks": 0, "stored_bytes": 0, "decoded_bytes": 0, "cpu_seconds": 0.0}
        native = self.reader.stats() if self.reader is not None else empty
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
    end: int
    tensors: list[Tensor]  # in the order of the datasets
    arrays: list[NDArray[Any]]  # the same memory
    index: Tensor
    rows: NDArray[np.int64]  # the same memory
    h5py_tasks: int = 0  # tasks of the h5py thread that must be complete


def batch_memory(sharded: ShardedDatasets, order: RowSequence, windows_ahead: int, pin: bool) -> list[BatchMemory]:
    """Memory for the batches of a pass, one per dataset; pinned if `pin`."""
    batch, window = order.max_rows
    in_flight = 2 + windows_ahead * (2 + window // batch)  # batches held by the caller and in windows
    return [BatchMemory(dataset.row_shape, dataset.dtype, batch, in_flight, pin) for dataset in sharded.datasets]


class LoaderPass:
    """Iterates over batches of an epoch. Holds threads and open files until it is closed.

    Args:
        sharded: datasets to read.
        order: order of the rows and sizes of the batches.
        epoch: selects the permutation of the order.
        first_batch: number of the first batch to deliver.
        stop_batch: end of the range of batches; the end of the epoch by default.
        windows_ahead: number of windows that are decoded or delivered at a time.
        threads: decoding threads.
        verify_checksums: verify fletcher32 checksums.
        memory: result of `batch_memory`, to share memory between consecutive passes.
        stats: updated during the pass.
        caller: time that the caller took for batches of earlier passes, updated during this one.
    """

    def __init__(
        self,
        sharded: ShardedDatasets,
        order: RowSequence,
        epoch: int = 0,
        first_batch: int = 0,
        stop_batch: int | None = None,
        *,
        windows_ahead: int,
        threads: int,
        verify_checksums: bool = True,
        memory: list[BatchMemory] | None = None,
        stats: PassStats | None = None,
        caller: CallerTime | None = None,
    ) -> None:
        self._sharded = sharded
        self._batch_end = order.batch_end
        self._batches = range(first_batch, order.batch_count if stop_batch is None else stop_batch)
        self._next_batch = first_batch
        self._start, self._stop = order.batch_end(first_batch), order.batch_end(self._batches.stop)
        self._windows = order.windows(epoch, self._start)
        self._fetcher = ShardFetcher(sharded, order.shards(epoch))
        self._windows_ahead = windows_ahead
        self._memory = batch_memory(sharded, order, windows_ahead, pin=False) if memory is None else memory
        self._reader = _native.RowReader(*sharded.native_descriptions(), threads, verify_checksums)
        self._h5py_thread = H5pyThread(sharded)
        self._names = [*(dataset.path for dataset in sharded.datasets), "index"]
        self._native = any(dataset.read_natively for dataset in sharded.datasets)
        self._h5py_datasets = [(t, dataset) for t, dataset in enumerate(sharded.datasets) if dataset.h5py_reason]
        self._first_row = order.first_row
        self._caller = CallerTime() if caller is None else caller
        self._direct_seconds = direct_reading_seconds(sharded, order, threads)
        self._submitted = self._delivered = self._start
        self._window_ends: deque[int] = deque()  # end position of each window not yet delivered
        self._pending: deque[_Batch] = deque()  # submitted, not yet delivered
        self._stats = PassStats() if stats is None else stats
        self._owner_pid = os.getpid()
        self._stats.reader = self._reader

    def close(self) -> None:
        """Joins the threads and closes the files; delivered batches stay valid."""
        self._reader.close()
        if os.getpid() == self._owner_pid:  # a forked process must not close the files of its parent
            self._h5py_thread.close()
            self._fetcher.close()
        self._pending.clear()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        started = time.perf_counter()
        for number in self._batches:
            end = self._batch_end(number + 1)
            requested = time.perf_counter()
            batch = self._read_directly(end) or self._read_ahead(end)
            self._stats.batches += 1
            self._stats.rows += end - self._delivered
            self._delivered = end
            now = time.perf_counter()
            self._stats.seconds_waited += now - requested
            self._stats.seconds = now - started
            yield batch
            self._caller.add(time.perf_counter() - now)

    def _read_directly(self, end: int) -> dict[str, Tensor] | None:
        """Reads the batch up to position `end` in this thread; None if it is to be read by the threads."""
        first = self._delivered
        if self._first_row is None or self._submitted != first or not self._caller_is_short():
            return None
        row = self._first_row + first
        tensors, arrays = self._allocate(end - first)
        if not self._reader.read_cached(row, end - first, arrays):
            self._direct_seconds = 0.0  # not in the page cache: the threads read the rest, and report errors
            return None
        self._start = self._submitted = end
        self._next_batch += 1
        index = torch.from_numpy(np.arange(row, row + end - first))
        if self._memory[0].pin:
            index = index.pin_memory()
        return dict(zip(self._names, (*tensors, index), strict=True))

    def _caller_is_short(self) -> bool:
        return self._caller.shorter_than(self._direct_seconds)

    def _allocate(self, rows: int) -> tuple[list[Tensor], list[NDArray[Any]]]:
        """Memory of a batch for each dataset, as tensors and as arrays."""
        memory = [memory.allocate(rows) for memory in self._memory]
        return [tensor for tensor, _ in memory], [array for _, array in memory]

    def _read_ahead(self, end: int) -> dict[str, Tensor]:
        """Waits for the batch up to position `end`, and submits the next windows."""
        self._submit(end)
        batch = self._deliver()
        while self._window_ends and self._window_ends[0] <= end:
            self._window_ends.popleft()
        self._fetcher.release(end)
        # Several windows at a time: code stays in the cache.
        if len(self._window_ends) <= self._windows_ahead // 2:
            self._submit(end)  # keeps the threads busy while the caller processes the batch
        return batch

    def _deliver(self) -> dict[str, Tensor]:
        batch = self._pending[0]
        if self._native:
            try:
                self._reader.wait(batch.first)
            except _native.ReadError as error:
                raise DataError(str(error)) from None
        self._h5py_thread.wait(batch.h5py_tasks, batch.first)
        self._pending.popleft()
        return dict(zip(self._names, (*batch.tensors, batch.index), strict=True))

    def _submit(self, needed: int) -> None:
        """Submits windows ahead, unless the caller reads directly; at least all windows before position `needed`."""
        ahead = 0 if self._caller_is_short() else self._windows_ahead
        while self._submitted < self._stop and (len(self._window_ends) < ahead or self._submitted < needed):
            if (window := next(self._windows, None)) is None:
                return
            first, rows = window
            if first < self._start or first + len(rows) > self._stop:
                rows = rows[max(0, self._start - first) : max(0, self._stop - first)]
                first = max(first, self._start)
            if len(rows):
                self._submit_window(first, rows)

    def _submit_window(self, first: int, rows: NDArray[np.int64]) -> None:
        end = first + len(rows)
        self._fetcher.require(end, rows)
        self._add_batches(end)
        batches = [batch for batch in self._pending if first < batch.end]
        for batch in batches:
            low, high = max(batch.first, first), min(batch.end, end)
            batch.rows[low - batch.first : high - batch.first] = rows[low - first : high - first]
        if self._native:
            self._reader.submit(first, rows)
        self._window_ends.append(end)
        self._submitted = end
        for t, dataset in self._h5py_datasets:
            memory = [H5pyBatch(batch.first, batch.arrays[t]) for batch in batches]
            tasks = self._h5py_thread.submit(dataset, first, rows, memory)
            for batch, needed in zip(batches, tasks, strict=True):
                batch.h5py_tasks = max(batch.h5py_tasks, needed)

    def _add_batches(self, end: int) -> None:
        """Adds the batches that start before position `end`."""
        while self._next_batch < self._batches.stop:
            first = self._batch_end(self._next_batch)
            if first >= end:
                return
            self._next_batch += 1
            stop = self._batch_end(self._next_batch)
            tensors, arrays = self._allocate(stop - first)
            if self._native:
                self._reader.add_batch(first, stop - first, arrays)
            index = torch.empty(stop - first, dtype=torch.int64, pin_memory=self._memory[0].pin)
            self._pending.append(_Batch(first, stop, tensors, arrays, index, index.numpy()))
